"""Which tokens may come next so that the output fits a regular expression or a JSON schema. Knows no model, no sampling
and no requests.

The work is done by llguidance, an optional dependency, which follows the grammar byte by byte; a character may be split
over tokens. What is ours are the limits: a grammar comes from outside, and must cost neither minutes nor gigabytes.
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
MAX_INTEGER = 9 * 10**18  # llguidance 1.9.1 fails at the largest of 64 bits
MAX_LIMITED_STRING = 8192  # characters: each takes a state of the lexer
MAX_DEPTH = 64  # of the schema's JSON text
MAX_CACHED_GRAMMARS = 32

# llguidance gives up by itself where a regular expression or a grammar unfolds into too much. Not so in 1.9.1: the time
# for an object grows with the square of its properties (6,000 take 3 s); a chain of 1,000 references overflows the
# stack, which ends the process; a divisor takes up to 40 ms; the patterns of `patternProperties` are compared with one
# another (200 take 0.4 s); and for a string that has to match several patterns, each of them multiplies the time (10
# take 25 ms, 12 0.3 s, 14 6 s and 0.7 GB).
MAX_OBJECTS = 2000
MAX_USES = {"$ref": 256, "multipleOf": 16}
MAX_PATTERNS = 64
MAX_PATTERNS_IN_CONJUNCTION = 8
JOINING = {"$ref", "allOf", "anyOf", "oneOf"}
JOINED = {"pattern", "format", "properties", "patternProperties", "additionalProperties", "items", "prefixItems"}

LIMITS = dict(
    max_lexer_states=20_000,  # about 1 KB each, kept for as long as the grammar is
    max_grammar_size=100_000,
    verbose_errors=False,  # or messages would hold the output and the grammar
)
# `no_forcing`: where the text is certain, llguidance would else allow but the first token of its tokenization, and that
# takes text such as "<eos>" for the special token.
OPTIONS = '%llguidance {"no_forcing": true}\n'
GRAMMAR = f"{OPTIONS}start: "
# Between two symbols of JSON: nothing or one space. Where more is allowed, a weak model writes little else.
WHITESPACE_PATTERN = " "


class GrammarCompiler:
    """Turns sources into grammars over the tokens of one tokenizer; any thread may ask.

    Args:
        vocab_size: how many logits the model has. Ids that the tokenizer does not know are never allowed.
        eos_token_ids: allowed where the text may end, and nothing else once it has to.
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
                f"eos_token_ids={sorted(eos_token_ids)}: a text that fits a grammar ends with an EOS token, "
                f"which has to be one of the {len(tokenizer)} tokens and the {vocab_size} logits"
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
        """The grammar of a source, from the cache if it is there.

        Args:
            kind: "json_object", "json_schema", "regex" (as of Rust's regex, matched as a whole, with digits and word
                characters of ASCII, as in the patterns of a schema), "choice", or "grammar" (llguidance's Lark:
                https://github.com/guidance-ai/llguidance/blob/main/docs/syntax.md).
            source: the schema as text or parsed, the regular expression, the strings to choose from, or the grammar.
            whitespace_pattern: a regular expression for what may stand between two symbols of JSON.
            max_string_len: characters of a string of a JSON schema that states no limit, see `bounded`.
        Raises:
            ValueError: the source is malformed, uses what is not supported, or is too large.
        """
        if kind == "json_object":
            text = schema_grammar({"type": "object"}, whitespace_pattern)
        elif kind == "json_schema":
            text = schema_grammar(source, whitespace_pattern, max_string_len)
        elif kind == "regex":
            text = self._regex_grammar(source, MAX_REGEX_BYTES)
        elif kind == "choice":
            if not (isinstance(source, list) and source and all(isinstance(choice, str) for choice in source)):
                raise ValueError("a choice has to be a list of strings, one at least")
            text = self._regex_grammar("|".join(map(re.escape, source)), MAX_SCHEMA_BYTES)
        elif kind == "grammar":
            if not isinstance(source, str):
                raise ValueError(f"a grammar has to be a string, not {type(source).__name__}")
            check_size(source, MAX_GRAMMAR_BYTES)
            text = f"{OPTIONS}{source}"
        else:
            raise ValueError(f"unknown kind of grammar {kind!r}: json_object, json_schema, regex, choice or grammar")
        return self._cached(text)

    def _regex_grammar(self, source: str, max_bytes: int) -> str:
        if not isinstance(source, str):
            raise ValueError(f"a regular expression has to be a string, not {type(source).__name__}")
        check_size(source, max_bytes)
        if (len(source) - len(source.rstrip("\\"))) % 2:  # llguidance 1.9.1 would drop it
            raise ValueError("the regular expression ends in a single backslash")
        return f"{GRAMMAR}/{self._llguidance.regex_to_lark(source, 'dw')}/"

    def _matcher(self, text: str):
        return self._llguidance.LLMatcher(self._tokenizer, text, limits=self._limits, log_level=0)

    def _mask(self, matcher) -> np.ndarray:
        """A matcher that fails, here or before, allows EOS; it has to be asked for its error."""
        mask = np.frombuffer(matcher.compute_bitmask(), dtype="<i4")[: self.num_words] & self._has_logit
        if matcher.is_error() or not mask.any():
            raise ValueError(reason_of(matcher))
        return mask


class Grammar:
    """What an output has to fit. Requests share it, and what has been found out about it while following it."""

    def __init__(self, compiler: GrammarCompiler, text: str):
        self.compiler = compiler
        self.text = text
        self._start = self.new_matcher()
        compiler._mask(self._start)  # a mistake shows here, or in the first mask

    def new_matcher(self):
        """A matcher at the beginning that shares nothing."""
        return self.compiler._matcher(self.text)

    def follow(self) -> "Follower":
        return Follower(self, self._start.deep_copy())


class Follower:
    """How far the output of one sample has come in its grammar."""

    def __init__(self, grammar: Grammar, matcher):
        self._grammar = grammar
        self._matcher = matcher
        self._is_shared = True
        self._num_consumed = 0

    @property
    def num_words(self) -> int:
        """Of the bits that `allowed` gives."""
        return self._grammar.compiler.num_words

    def allowed(self, output_token_ids: list[int]) -> np.ndarray:
        """The tokens that may follow the output: int32 [ceil(V / 32)], bit i % 32 of word i // 32 for token i.

        Each call is given all of the output, which begins with that of the call before.

        Raises:
            ValueError: the output does not fit, or the next mask would cost more than the limits allow.
        """
        try:
            return self._allowed(output_token_ids)
        except ValueError:
            if not self._is_shared:
                raise
        # A copy shares its lexer with the other samples, and so a limit that any of them has run into. Alone it counts
        # what this sample costs.
        self._matcher, self._is_shared, self._num_consumed = self._grammar.new_matcher(), False, 0
        return self._allowed(output_token_ids)

    def _allowed(self, output_token_ids: list[int]) -> np.ndarray:
        assert len(output_token_ids) >= self._num_consumed
        for token in output_token_ids[self._num_consumed :]:
            if not self._matcher.consume_token(token) or self._matcher.is_error():
                raise ValueError(f"output token {self._num_consumed} ({token}): {reason_of(self._matcher)}")
            self._num_consumed += 1
        return self._grammar.compiler._mask(self._matcher)


def schema_grammar(
    source: str | dict | bool | None,
    whitespace_pattern: str = WHITESPACE_PATTERN,
    max_string_len: int | None = None,
) -> str:
    """The grammar of JSON that fits a schema."""
    return f"{GRAMMAR}{json_rule(source, whitespace_pattern, max_string_len)}"


def json_rule(
    source: str | dict | bool | None,
    whitespace_pattern: str = WHITESPACE_PATTERN,
    max_string_len: int | None = None,
    is_for_tools: bool = False,
) -> str:
    """The right side of a rule of a grammar: JSON that fits a schema, within the limits of `bounded`.

    Args:
        is_for_tools: keywords that llguidance does not know are ignored: the schemas of tools have many.
    Raises:
        ValueError: for a schema that is malformed or too large.
    """
    try:
        check_size(whitespace_pattern, MAX_WHITESPACE_BYTES)
        text = source if isinstance(source, str) else json.dumps(source, ensure_ascii=False)
        check_size(text, MAX_SCHEMA_BYTES)
        schema = json.loads(text)
        schema = {} if schema is True else schema
        if not isinstance(schema, dict):
            raise ValueError("it has to be an object or true")
        check_schema(schema)
        # Not sorted: the order of properties is the order in which they are written.
        options = {"whitespace_pattern": whitespace_pattern, "lenient": is_for_tools}
        # A part of a conjunction has to admit the properties of the other parts.
        schema = bounded(schema, max_string_len, closes_objects=not _joins_objects(schema))
        text = json.dumps(schema | {"x-guidance": options}, ensure_ascii=False, allow_nan=False)
        text.encode()  # a surrogate may have been escaped
        return f"%json {text}"
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"bad JSON schema: {error}") from error


def string_limit(context_len: int) -> int | None:
    """Characters of a string without a limit of its own: half of the tokens of the context, so that JSON can end before
    the context does. None in long contexts, whose models end their strings, and where the limit would cost memory."""
    return context_len // 2 if context_len <= 2 * MAX_LIMITED_STRING else None


def bounded(schema: Any, max_string_len: int | None, closes_objects: bool = False) -> Any:
    """A schema that a weak model cannot follow for ever: integers have at most 19 digits, strings at most
    `max_string_len` characters, unless the schema limits them itself.

    Args:
        closes_objects: an object whose properties the schema lists gets no others, unless the schema says otherwise.
    """
    if not isinstance(schema, dict):
        return schema
    node, kinds = dict(schema), schema.get("type")
    kinds = kinds if isinstance(kinds, list) else [kinds]
    if not node.keys() & {"enum", "const"}:
        limits = node.keys() & {"minLength", "maxLength", "pattern", "format"}
        if "string" in kinds and max_string_len is not None and not limits:
            node["maxLength"] = max_string_len
        limits = node.keys() & {"minimum", "maximum", "multipleOf", "exclusiveMinimum", "exclusiveMaximum"}
        if "integer" in kinds and not limits:
            node |= {"minimum": -MAX_INTEGER, "maximum": MAX_INTEGER}
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


def _joins_objects(node: Any) -> bool:
    """Whether a schema anywhere joins an object's properties with those of another schema."""
    if isinstance(node, dict):
        joins = "allOf" in node or ("properties" in node and node.keys() & {"anyOf", "oneOf", "$ref"})
        return bool(joins) or any(map(_joins_objects, node.values()))
    return isinstance(node, list) and any(map(_joins_objects, node))


def check_size(text: str, max_bytes: int) -> None:
    num_bytes = len(text.encode())  # a ValueError where there are lone surrogates
    if num_bytes > max_bytes:
        raise ValueError(f"{num_bytes} bytes are more than the {max_bytes} that are allowed")


def check_schema(schema: dict) -> None:
    """Refuses what llguidance has no limit for. Property names and data count as if they were keywords."""
    if "x-guidance" in schema:
        raise ValueError("x-guidance is not supported")  # could make the output something else than JSON
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
            raise ValueError(f"it is nested more than {MAX_DEPTH} levels deep")

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
        (f"patterns and formats{' and joins schemas' * is_conjunction}", num_patterns, max_patterns),
    ]:
        if num > max_num:
            raise ValueError(f"it has {num} {what}; more than {max_num} would take too long")


def reason_of(matcher) -> str:
    message = matcher.get_error()
    if not message or message.startswith("NoExtension"):
        return "no text fits"
    message = re.split(r"\n +\d+ \| |\n<", message)[0]  # without the grammar and the state
    message = re.sub(r"^at \d+\(\d+\): ", "", message)
    return message if len(message) <= 400 else f"{message[:200]} ... {message[-200:]}"
