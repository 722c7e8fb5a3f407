"""Computes which tokens may come next so that the output fits a regular expression or a JSON schema. Independent of the
model, sampling and requests.

llguidance, an optional dependency, does the work. It follows the grammar byte by byte, so a character may be split over
several tokens. This module adds limits: clients send grammars, and a grammar must cost neither minutes nor gigabytes.
"""

import json
import re
from collections import Counter
from functools import lru_cache
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

MAX_SCHEMA_BYTES = 64 * 1024
MAX_REGEX_BYTES = 4 * 1024
MAX_WHITESPACE_BYTES = 128
MAX_GRAMMAR_BYTES = 256 * 1024
MAX_INTEGER = 9 * 10**18  # llguidance 1.9.1 fails at the largest 64-bit integer
MAX_LIMITED_STRING = 8192  # characters: each needs one state of the lexer
MAX_DEPTH = 64  # nesting of the schema's JSON
MAX_CACHED_GRAMMARS = 32

# llguidance rejects a regular expression or a grammar that expands too much. llguidance 1.9.1 does not limit these:
# - The time for an object grows with the square of the number of its properties (6,000 take 3 s).
# - A chain of 1,000 references overflows the stack, which ends the process.
# - A divisor (`multipleOf`) takes up to 40 ms.
# - The patterns of `patternProperties` are compared with each other (200 take 0.4 s).
# - Each pattern that the same string has to match multiplies the time (10 take 25 ms, 12 take 0.3 s, 14 take 6 s and
#   0.7 GB).
MAX_OBJECTS = 2000
MAX_USES = {"$ref": 256, "multipleOf": 16}
MAX_PATTERNS = 64
MAX_PATTERNS_IN_CONJUNCTION = 8
JOINING = {"$ref", "allOf", "anyOf", "oneOf"}
JOINED = {"pattern", "format", "properties", "patternProperties", "additionalProperties", "items", "prefixItems"}

LIMITS = dict(
    max_lexer_states=20_000,  # about 1 KB each, kept as long as the grammar
    max_grammar_size=100_000,
    verbose_errors=False,  # verbose messages contain the output and the grammar
)
# Without `no_forcing`, llguidance allows a single token where the grammar leaves only one text: the first token of that
# text's tokenization. That tokenization turns text such as "<eos>" into the special token.
OPTIONS = '%llguidance {"no_forcing": true}\n'
GRAMMAR = f"{OPTIONS}start: "
# Whitespace between two symbols of JSON: nothing or one space. If more is allowed, a weak model writes little else.
WHITESPACE_PATTERN = " "


class GrammarCompiler:
    """Compiles sources to grammars over the tokens of one tokenizer. Thread-safe.

    Args:
        vocab_size: number of logits of the model. Ids that the tokenizer does not contain are never allowed.
        eos_token_ids: allowed where the text may end; the only allowed tokens where the text has to end.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, vocab_size: int, eos_token_ids: frozenset[int]):
        try:
            import llguidance
            from llguidance.hf import from_tokenizer
        except ImportError as error:
            remedy = "pip install flex-nano-vllm[structured]"
            raise ImportError(f"structured output needs llguidance: {remedy}") from error

        if not eos_token_ids or not all(0 <= token < min(vocab_size, len(tokenizer)) for token in eos_token_ids):
            raise ValueError(
                f"eos_token_ids={sorted(eos_token_ids)}: structured output needs at least one EOS token, and each must "
                f"be one of the {len(tokenizer)} tokens of the tokenizer and have one of the {vocab_size} logits"
            )
        self._llguidance = llguidance
        width = max(vocab_size, len(tokenizer))
        self._tokenizer = from_tokenizer(tokenizer, n_vocab=width, eos_token=sorted(eos_token_ids))
        self._limits = llguidance.LLParserLimits(**LIMITS)
        self.num_words = (vocab_size + 31) // 32
        has_logit = np.arange(32 * self.num_words) < vocab_size
        self._has_logit = np.packbits(has_logit, bitorder="little").view("<i4")
        self._cached = lru_cache(MAX_CACHED_GRAMMARS)(lambda text: Grammar(self, text))

    def compile(
        self,
        kind: str,
        source: str | list[str] | dict | bool | None = None,
        whitespace_pattern: str = WHITESPACE_PATTERN,
        max_string_len: int | None = None,
    ) -> "Grammar":
        """Compile a source to a grammar, or return the cached grammar.

        Args:
            kind: "json_object", "json_schema", "regex" (the syntax of Rust's regex; it has to match the whole text, and
                its digits and word characters are ASCII, as in the patterns of a schema), "choice", or "grammar"
                (llguidance's Lark: https://github.com/guidance-ai/llguidance/blob/main/docs/syntax.md).
            source: the schema as text or parsed, the regular expression, the strings to choose from, or the grammar.
            whitespace_pattern: a regular expression for the whitespace between two symbols of JSON.
            max_string_len: maximum number of characters of a string that the JSON schema does not limit, see `bounded`.
        Raises:
            ValueError: the source is malformed, uses an unsupported feature, or is too large.
        """
        if kind == "json_object":
            text = schema_grammar({"type": "object"}, whitespace_pattern)
        elif kind == "json_schema":
            text = schema_grammar(source, whitespace_pattern, max_string_len)
        elif kind == "regex":
            text = self._regex_grammar(source, MAX_REGEX_BYTES)
        elif kind == "choice":
            if not (isinstance(source, list) and source and all(isinstance(choice, str) for choice in source)):
                raise ValueError("a choice must be a non-empty list of strings")
            text = self._regex_grammar("|".join(map(re.escape, source)), MAX_SCHEMA_BYTES)
        elif kind == "grammar":
            if not isinstance(source, str):
                raise ValueError(f"a grammar must be a string, not {type(source).__name__}")
            check_size(source, MAX_GRAMMAR_BYTES)
            text = f"{OPTIONS}{source}"
        else:
            raise ValueError(
                f"unknown kind of grammar {kind!r}: use json_object, json_schema, regex, choice or grammar"
            )
        return self._cached(text)

    def _regex_grammar(self, source: str, max_bytes: int) -> str:
        if not isinstance(source, str):
            raise ValueError(f"a regular expression must be a string, not {type(source).__name__}")
        check_size(source, max_bytes)
        if (len(source) - len(source.rstrip("\\"))) % 2:  # llguidance 1.9.1 would drop the backslash
            raise ValueError("the regular expression ends with an unpaired backslash")
        return f"{GRAMMAR}/{self._llguidance.regex_to_lark(source, 'dw')}/"

    def _matcher(self, text: str):
        return self._llguidance.LLMatcher(self._tokenizer, text, limits=self._limits, log_level=0)

    def _mask(self, matcher) -> np.ndarray:
        """Return the mask of a matcher. A failed matcher allows EOS, so its error has to be checked explicitly."""
        mask = np.frombuffer(matcher.compute_bitmask(), dtype="<i4")[: self.num_words] & self._has_logit
        if matcher.is_error() or not mask.any():
            raise ValueError(reason_of(matcher))
        return mask


class Grammar:
    """A compiled grammar. Requests share it, together with the lexer states that are computed while they follow it."""

    def __init__(self, compiler: GrammarCompiler, text: str):
        self.compiler = compiler
        self.text = text
        self._start = self.new_matcher()
        compiler._mask(self._start)  # raises ValueError if the grammar is invalid

    def new_matcher(self):
        """Return a matcher at the start of the grammar that shares no state with other matchers."""
        return self.compiler._matcher(self.text)

    def follow(self) -> "Follower":
        return Follower(self, self._start.deep_copy())


class Follower:
    """The position of one sample's output in its grammar."""

    def __init__(self, grammar: Grammar, matcher):
        self._grammar = grammar
        self._matcher = matcher
        self._is_shared = True
        self._num_consumed = 0

    @property
    def num_words(self) -> int:
        """Number of words of the bit mask that `allowed` returns."""
        return self._grammar.compiler.num_words

    def allowed(self, token_ids: list[int], start: int = 0) -> np.ndarray:
        """Return the tokens that may follow the output: int32 [ceil(V / 32)], bit i % 32 of word i // 32 for token i.

        Every call takes all tokens, of which the output begins at `start`. The output begins with the output of the
        previous call.

        Raises:
            ValueError: the output does not fit the grammar, or computing the next mask exceeds a limit.
        """
        try:
            return self._allowed(token_ids, start)
        except ValueError:
            if not self._is_shared:
                raise
        # A copied matcher shares its lexer with the other samples, so it also fails at a limit that another sample has
        # exceeded. A new matcher counts the cost of this sample only.
        self._matcher, self._is_shared, self._num_consumed = self._grammar.new_matcher(), False, 0
        return self._allowed(token_ids, start)

    def allowed_of(self, token_ids: list[int], start: int, others: np.ndarray | None) -> tuple[np.ndarray, str | None]:
        """Return the tokens that may follow the output and are in the bit mask `others`; the reason if there are none.

        The arguments are those of `allowed`. `others` is None if it contains all tokens.
        """
        num_tokens = len(token_ids) - start
        try:
            mask = self.allowed(token_ids, start)
        except ValueError as error:
            reason = f"the grammar cannot be followed after {num_tokens} output tokens: {error}"
            return np.zeros(self.num_words, dtype=np.int32), reason
        if others is None:
            return mask, None
        mask = mask & others
        reason = f"no token of allowed_token_ids continues the structured output after {num_tokens} tokens"
        return mask, None if mask.any() else reason

    def _allowed(self, token_ids: list[int], start: int) -> np.ndarray:
        assert len(token_ids) - start >= self._num_consumed
        for token in token_ids[start + self._num_consumed :]:
            if not self._matcher.consume_token(token) or self._matcher.is_error():
                raise ValueError(f"output token {self._num_consumed} ({token}): {reason_of(self._matcher)}")
            self._num_consumed += 1
        return self._grammar.compiler._mask(self._matcher)


def has_others(mask: np.ndarray, token_ids: frozenset[int]) -> bool:
    """Return whether a bit mask contains a token that is not one of `token_ids`."""
    bits = np.unpackbits(mask.view(np.uint8), bitorder="little")
    bits[list(token_ids)] = 0
    return bool(bits.any())


def schema_grammar(
    source: str | dict | bool | None,
    whitespace_pattern: str = WHITESPACE_PATTERN,
    max_string_len: int | None = None,
) -> str:
    """Return the grammar of JSON that fits a schema."""
    return f"{GRAMMAR}{json_rule(source, whitespace_pattern, max_string_len)}"


def json_rule(
    source: str | dict | bool | None,
    whitespace_pattern: str = WHITESPACE_PATTERN,
    max_string_len: int | None = None,
    is_for_tools: bool = False,
) -> str:
    """Return the right side of a grammar rule: JSON that fits a schema, within the limits of `bounded`.

    Args:
        is_for_tools: ignore keywords that llguidance does not support, because the schemas of tools have many of them.
    Raises:
        ValueError: the schema is malformed or too large.
    """
    try:
        check_size(whitespace_pattern, MAX_WHITESPACE_BYTES)
        text = source if isinstance(source, str) else json.dumps(source, ensure_ascii=False)
        check_size(text, MAX_SCHEMA_BYTES)
        schema = json.loads(text)
        schema = {} if schema is True else schema
        if not isinstance(schema, dict):
            raise ValueError("the schema must be an object or true")
        check_schema(schema)
        # json.dumps must not sort the keys: the output has the properties in the order of the schema.
        options = {"whitespace_pattern": whitespace_pattern, "lenient": is_for_tools}
        # If schemas are joined, each part has to allow the properties of the other parts.
        schema = bounded(schema, max_string_len, closes_objects=not _joins_objects(schema))
        text = json.dumps(schema | {"x-guidance": options}, ensure_ascii=False, allow_nan=False)
        text.encode()  # raises ValueError for lone surrogates, which the source may contain escaped
        return f"%json {text}"
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"bad JSON schema: {error}") from error


def string_limit(context_len: int) -> int | None:
    """Return the maximum length, in characters, of strings that the schema does not limit.

    It is half of the context length in tokens, so that the JSON can end before the context does. None for long
    contexts: their models end strings by themselves, and the limit would cost memory.
    """
    return context_len // 2 if context_len <= 2 * MAX_LIMITED_STRING else None


def bounded(schema: Any, max_string_len: int | None, closes_objects: bool = False) -> Any:
    """Return a schema with limits that stop a weak model from writing one value forever.

    Integers have at most 19 digits and strings at most `max_string_len` characters, unless the schema limits them
    itself.

    Args:
        closes_objects: forbid additional properties in objects that list their properties, unless `required` contains
            other properties or the schema sets `additionalProperties`.
    """
    if not isinstance(schema, dict):
        return schema
    node, kinds = dict(schema), schema.get("type")
    kinds = kinds if isinstance(kinds, list) else [kinds]
    if not node.keys() & {"enum", "const"}:
        if "string" in kinds and max_string_len is not None and not node.keys() & {"maxLength", "pattern", "format"}:
            least = node.get("minLength")
            node["maxLength"] = max(max_string_len, least if isinstance(least, int) else 0)
        if "integer" in kinds and "multipleOf" not in node:
            node |= _missing_bounds(node)
    names, needed = node.get("properties"), node.get("required", [])
    if closes_objects and isinstance(names, dict) and isinstance(needed, list) and set(needed) <= set(names):
        node.setdefault("additionalProperties", False)
    for key, child in schema.items():
        if key in ("properties", "$defs", "definitions") and isinstance(child, dict):
            node[key] = {name: bounded(part, max_string_len, closes_objects) for name, part in child.items()}
        elif key in ("items", "additionalProperties"):
            node[key] = bounded(child, max_string_len, closes_objects)
        elif key in ("anyOf", "oneOf", "prefixItems") and isinstance(child, list):
            node[key] = [bounded(part, max_string_len, closes_objects) for part in child]
    return node


def _missing_bounds(node: dict) -> dict[str, int]:
    """Return the bounds that the schema of an integer lacks. None if its other bound has more than 19 digits."""
    lower, upper = node.get("minimum", node.get("exclusiveMinimum")), node.get("maximum", node.get("exclusiveMaximum"))
    is_within = [isinstance(bound, int | float) and abs(bound) <= MAX_INTEGER for bound in (lower, upper)]
    missing = {}
    if upper is None and (lower is None or is_within[0]):
        missing["maximum"] = MAX_INTEGER
    if lower is None and (upper is None or is_within[1]):
        missing["minimum"] = -MAX_INTEGER
    return missing


def _joins_objects(node: Any) -> bool:
    """Return whether any part of a schema joins an object's properties with those of another schema."""
    if isinstance(node, dict):
        joins = "allOf" in node or ("properties" in node and node.keys() & {"anyOf", "oneOf", "$ref"})
        return bool(joins) or any(map(_joins_objects, node.values()))
    return isinstance(node, list) and any(map(_joins_objects, node))


def check_size(text: str, max_bytes: int) -> None:
    num_bytes = len(text.encode())  # raises ValueError for lone surrogates
    if num_bytes > max_bytes:
        raise ValueError(f"{num_bytes} bytes exceed the limit of {max_bytes}")


def check_schema(schema: dict) -> None:
    """Raise ValueError if a schema exceeds one of the limits that llguidance lacks.

    Property names and data are counted as if they were keywords.
    """
    if "x-guidance" in schema:
        raise ValueError("x-guidance is not supported")  # its options could allow output that is not JSON
    level, objects, depth = [schema], [], 0
    while level:
        objects += [node for node in level if isinstance(node, dict)]
        level = [
            child
            for node in level
            if isinstance(node, dict | list)
            for child in (node.values() if isinstance(node, dict) else node)
        ]
        depth += 1
        if depth > MAX_DEPTH:
            raise ValueError(f"the schema is nested more than {MAX_DEPTH} levels deep")

    uses = Counter(key for node in objects for key in node)
    pattern_properties = [node["patternProperties"] for node in objects if "patternProperties" in node]
    num_patterns = uses["pattern"] + uses["format"] + sum(len(p) for p in pattern_properties if isinstance(p, dict))
    is_conjunction = any(
        "allOf" in node or (node.keys() & JOINING and len(node.keys() & (JOINING | JOINED)) > 1) for node in objects
    )
    max_patterns = MAX_PATTERNS_IN_CONJUNCTION if is_conjunction else MAX_PATTERNS
    for what, num, max_num in [
        ("objects", len(objects), MAX_OBJECTS),
        *((f"uses of {key}", uses[key], limit) for key, limit in MAX_USES.items()),
        (
            f"patterns and formats{' (with schemas joined by allOf, anyOf, oneOf or $ref)' * is_conjunction}",
            num_patterns,
            max_patterns,
        ),
    ]:
        if num > max_num:
            raise ValueError(f"the schema has {num} {what}, but compiling more than {max_num} would take too long")


def reason_of(matcher) -> str:
    message = matcher.get_error()
    if not message or message.startswith("NoExtension"):
        return "no text fits the grammar"
    message = re.split(r"\n +\d+ \| |\n<", message)[0]  # drop the excerpts of the grammar and of the state
    message = re.sub(r"^at \d+\(\d+\): ", "", message)
    return message if len(message) <= 400 else f"{message[:200]} ... {message[-200:]}"
