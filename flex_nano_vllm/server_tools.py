"""Tool calls: the forms in which models write them, the grammar of valid calls, and a parser that finds calls in an
output. Independent of HTTP.

tools ─► the model's chat template ─► the model writes   <tool_call>
      ─► a grammar of valid calls                        {"name": "add", "arguments": {"a": 1, "b": 2}}
                                                         </tool_call>
CallParser ─► CallStart(0, "add"), CallArguments(0, '{"a": 1, "b": 2}')
"""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from flex_nano_vllm.grammar import MAX_SCHEMA_BYTES, check_schema, json_rule

MAX_CALLS = 16  # in one output
MAX_TOOLS = 128  # OpenAI's limit


@dataclass(frozen=True)
class CallForm:
    """The form in which a family of models writes tool calls."""

    marker: str  # text that the chat templates of the family contain
    begin: str  # before each call
    end: str  # after each call
    opening: str  # before the first call
    between: str  # between two calls
    closing: str  # after the last call
    arguments: str  # JSON key of a call's arguments


# The first form whose marker is in the chat template is used.
CALL_FORMS = (
    CallForm("<tool_call>", "<tool_call>\n", "\n</tool_call>", "", "\n", "", "arguments"),  # Hermes, Qwen, tiny-gemma2
    CallForm("[TOOL_CALLS]", "", "", "[", ", ", "]", "arguments"),  # Mistral; the marker is a special token
    CallForm("", "", "", "", "; ", "", "parameters"),  # Llama 3
)


def call_form(chat_template: str) -> CallForm:
    """Return the form of tool calls for a chat template."""
    return next(form for form in CALL_FORMS if form.marker in chat_template)


def tools_grammar(
    form: CallForm,
    tools: dict[str, dict],
    is_required: bool,
    max_calls: int,
    text_rule: str | None = None,
    max_string_len: int | None = None,
    added_tokens: dict[str, int] | None = None,
) -> str | None:
    """Return the grammar of outputs whose calls are valid, in llguidance's Lark syntax.

    Args:
        tools: JSON schemas of the arguments, by tool name.
        is_required: the output must be one call or more. If False, outputs without calls are allowed too.
        max_calls: maximum number of calls in one output.
        text_rule: right side of a grammar rule for outputs without calls. None allows any text, which calls may follow.
        max_string_len: see `grammar.bounded`.
        added_tokens: ids of the tokens that `visible_added_tokens` returns.
    Returns:
        The grammar. None if calls are optional, `text_rule` is None and `form.begin` is empty: an invalid call could
        not be distinguished from text.
    Raises:
        ValueError: a schema is malformed or too large, alone or together with the other schemas.
    """
    if not is_required and not form.begin and text_rule is None:
        return None
    rules = []
    for i, (name, schema) in enumerate(tools.items()):
        try:
            rule = json_rule(_call_schema(form, name, schema), max_string_len=max_string_len, is_for_tools=True)
            rules.append(f"tool_{i}: {rule}")
        except ValueError as error:
            raise ValueError(f"the parameters of {name}: {error}") from error
    check_tools(tools)
    rules.append(f"tool: {' | '.join(f'tool_{i}' for i in range(len(tools)))}")
    added_tokens = added_tokens or {}
    begin, end = _tag(form.begin, added_tokens), _tag(form.end, added_tokens)
    opening, between, closing = map(_quoted, (form.opening, form.between, form.closing))
    rules.append(f"call: {begin} tool {end}")
    more = f"({between} call){{0,{max_calls - 1}}}" if max_calls > 1 else ""
    calls = f"{opening} call {more} {closing}"
    if is_required:
        return "\n".join([f"start: {calls}", *rules])
    if text_rule is not None:
        return "\n".join([f"start: {calls} | otherwise", f"otherwise: {text_rule}", *rules])
    # Lazy: after the begin of a call, the output cannot return to text. A tag may be spelled or be one token, and
    # llguidance does not count added tokens as text.
    tag, choices = form.begin.strip(), ["TEXT", "text_and_tag tool_and_end"]
    if tag in added_tokens:
        choices.append(f"TEXT {_token(added_tokens[tag])} tool_and_end")
    start, others = " | ".join(choices), [str(token_id) for name, token_id in added_tokens.items() if name != tag]
    if others:  # in one terminal and without recursion: a model may have thousands of them
        start = f"text_and_others ({start})"
        rules.append(f"text_and_others: (TEXT <[{','.join(others)}]>)*")
    rules += [
        f"text_and_tag[lazy]: TEXT {_quoted(tag)}",
        rf"tool_and_end: /\s?/ tool {end} {more}",
        r"TEXT: /(.|\n)*/",
    ]
    return "\n".join([f"start: {start}", *rules])


def visible_added_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """Return the ids of added tokens that have text and that llguidance nevertheless does not count as text.

    These are the tokens written in angle brackets, such as `<think>` and `<tool_call>` of Qwen3.
    """
    added = tokenizer.added_tokens_decoder.items()
    return {
        token.content: token_id
        for token_id, token in added
        if not token.special and token.content.startswith("<") and token.content.endswith(">")
    }


def _tag(text: str, added_tokens: dict[str, int]) -> str:
    """Return the grammar of a tag and the whitespace around it. A tag that is also one token may be either."""
    tag = text.strip()
    if tag not in added_tokens:
        return _quoted(text)
    before, after = text.split(tag)
    return f"{_quoted(before)} ({_token(added_tokens[tag])} | {_quoted(tag)}) {_quoted(after)}"


def _token(token_id: int) -> str:
    return f"<[{token_id}]>"


def check_tools(tools: dict[str, dict]) -> None:
    """Raise ValueError if all schemas together exceed the limits of a single schema."""
    try:
        size = len(json.dumps(tools, ensure_ascii=False).encode())
        if size > MAX_SCHEMA_BYTES:
            raise ValueError(f"their schemas have {size} bytes, more than the limit of {MAX_SCHEMA_BYTES}")
        check_schema({"properties": tools})
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"all tools together: {error}") from error


def first_invalid_tool(
    form: CallForm, tools: dict[str, dict], compile_rule: Callable[[str], object]
) -> tuple[str, ValueError] | None:
    """Return the first tool whose schema cannot be compiled, with the error; None if all schemas compile."""
    for name, schema in tools.items():
        try:
            compile_rule(json_rule(_call_schema(form, name, schema), is_for_tools=True))
        except ValueError as error:
            return name, error
    return None


def _call_schema(form: CallForm, name: str, schema: dict) -> dict:
    """Return the schema of a whole call.

    The references of the tool's schema are relative to its own root, so they get the place of the arguments.
    """
    if schema.get("type", "object") != "object":
        raise ValueError(f"type must be 'object', got {schema['type']!r}")
    if "x-guidance" in schema:  # options of llguidance
        raise ValueError("x-guidance is not supported")
    own_id = schema.get("$id")
    schema = {key: part for key, part in schema.items() if key != "$id"}  # "#" would refer to the schema that has it
    arguments = {"type": "object"} | _moved(schema, f"#/properties/{form.arguments}", own_id)
    properties = {"name": {"const": name}, form.arguments: arguments}
    return {"type": "object", "properties": properties, "required": list(properties)}


def _moved(schema: Any, root: str, own_id: str | None) -> Any:
    """Return a schema whose references to its own root, or to its `$id`, refer to `root` instead.

    Data in the schema and parts with an `$id` of their own are unchanged.
    """
    if isinstance(schema, list):
        return [_moved(part, root, own_id) for part in schema]
    if not isinstance(schema, dict) or isinstance(schema.get("$id"), str):
        return schema
    moved = {}
    for key, part in schema.items():
        if key == "$ref" and isinstance(part, str):
            pointer = part.removeprefix(own_id) if isinstance(own_id, str) and own_id else part
            is_own = pointer in ("", "#") or pointer.startswith("#/")
            moved[key] = root + pointer.removeprefix("#") if is_own else part
        elif key in ("properties", "patternProperties", "$defs", "definitions") and isinstance(part, dict):
            # Names may look like keywords.
            moved[key] = {name: _moved(child, root, own_id) for name, child in part.items()}
        else:
            moved[key] = part if key in ("const", "enum", "default", "examples") else _moved(part, root, own_id)
    return moved


def _quoted(text: str) -> str:
    return json.dumps(text) if text else ""


class TextPiece(NamedTuple):
    """Text of an output outside of calls."""

    text: str


class CallStart(NamedTuple):
    """The start of call number `index` of an output, with the name of the tool."""

    index: int
    name: str


class CallArguments(NamedTuple):
    """A piece of the JSON of the arguments of call number `index`."""

    index: int
    text: str


Piece = TextPiece | CallStart | CallArguments

# The JSON of a call before its arguments. Llama models sometimes write a type, and use either key for the arguments.
_HEAD = re.compile(
    r'\s*\{\s*(?:"type"\s*:\s*"function"\s*,\s*)?"name"\s*:\s*"(?P<name>[^"\\]*)"\s*,'
    r'\s*"(?:arguments|parameters)"\s*:\s*(?=\{)'
)
MAX_HEAD_LEN = 256  # characters; output without the head of a call within this length is text


class CallParser:
    """Finds the calls of known tools in an output that arrives in pieces of any size.

    Text that only looks like a call stays text: a call with an unknown name, or JSON without a name. Whitespace around
    calls is dropped.
    """

    def __init__(self, form: CallForm, names: set[str], max_calls: int = MAX_CALLS):
        self.form, self.names, self.max_calls = form, names, max_calls
        self.num_calls = self.num_complete_calls = 0
        self._begin, self._end = form.begin.strip(), form.end.strip()
        self._take = self._text  # the method that parses the next characters
        self._buffer = ""
        self._has_said = False
        self._depth, self._in_string, self._is_escaped = 0, False, False  # within the arguments

    def feed(self, text: str, is_complete: bool = False) -> list[Piece]:
        """Take more text and return the pieces that are final. `is_complete`: no more text follows."""
        self._buffer += text
        pieces: list[Piece] = []
        while True:
            before = self._take, len(self._buffer)
            pieces += self._take(is_complete)
            if (self._take, len(self._buffer)) == before:
                return _joined(pieces)

    def _text(self, is_complete: bool) -> list[Piece]:
        if self._begin:
            start = self._buffer.find(self._begin)
            if start >= 0:
                self._take, certain = self._head, len(self._buffer[:start].rstrip())
                return self._say(self._buffer[:certain], certain)
            certain = len(self._buffer) - _overlap(self._buffer, self._begin)
        else:  # an output is either calls or text
            if self._buffer.lstrip()[:1] in ("{", "[") and not self._has_said:
                self._take = self._head
                return []
            certain = len(self._buffer)
        if is_complete:
            return self._say(self._buffer.rstrip() if self.num_calls else self._buffer, len(self._buffer))
        certain = len(self._buffer[:certain].rstrip())  # whitespace is dropped if a call follows
        return self._say(self._buffer[:certain], certain)

    def _head(self, is_complete: bool) -> list[Piece]:
        sign = re.match(rf"\s*{re.escape(self._begin)}" if self._begin else r"[\s\[]*", self._buffer)
        match = _HEAD.match(self._buffer, sign.end())
        if match and match["name"] in self.names and self.num_calls < self.max_calls:
            self._take, self._buffer = self._arguments, self._buffer[match.end() :]
            self.num_calls += 1
            return [CallStart(self.num_calls - 1, match["name"])]
        if match or is_complete or len(self._buffer) - sign.end() > MAX_HEAD_LEN:
            self._take, length = self._text, max(1, sign.end())
            return self._say(self._buffer[:length], length)
        return []

    def _arguments(self, is_complete: bool) -> list[Piece]:
        num_taken = 0
        for char in self._buffer:
            num_taken += 1
            if self._is_escaped:
                self._is_escaped = False
            elif self._in_string:
                self._is_escaped, self._in_string = char == "\\", char != '"'
            elif char == '"':
                self._in_string = True
            elif char in "{[":
                self._depth += 1
            elif char in "}]":
                self._depth -= 1
                if self._depth == 0:
                    self._take = self._tail
                    self.num_complete_calls += 1
                    break
        piece, self._buffer = self._buffer[:num_taken], self._buffer[num_taken:]
        return [CallArguments(self.num_calls - 1, piece)] if piece else []

    def _tail(self, is_complete: bool) -> list[Piece]:
        separator = "" if self._begin else r"[;,\]]?\s*"
        match = re.match(rf"\s*\}}\s*{re.escape(self._end)}\s*{separator}", self._buffer)
        if match and (match.end() < len(self._buffer) or is_complete):
            self._take, self._buffer = self._text, self._buffer[match.end() :]
        elif is_complete and f"}}\n{self._end}".startswith(self._buffer.strip()):  # cut off within the end of a call
            self._take, self._buffer = self._text, ""
        elif is_complete or len(self._buffer) > MAX_HEAD_LEN:  # not the end of a call
            self._take = self._text
        return []

    def _say(self, text: str, length: int) -> list[Piece]:
        """Remove `length` characters from the buffer and return `text`, the part of them to emit."""
        self._buffer = self._buffer[length:]
        self._has_said |= bool(text.strip())
        return [TextPiece(text)] if text else []


def _overlap(text: str, begin: str) -> int:
    """Return how many of the last characters of a text may be the start of `begin`."""
    return next((n for n in range(min(len(text), len(begin) - 1), 0, -1) if text.endswith(begin[:n])), 0)


def _joined(pieces: list[Piece]) -> list[Piece]:
    """Merge neighbouring text pieces, and neighbouring argument pieces of the same call."""
    joined: list[Piece] = []
    for piece in pieces:
        last = joined[-1] if joined else None
        if type(last) is type(piece) and not isinstance(piece, CallStart) and last[:-1] == piece[:-1]:
            joined[-1] = piece._replace(text=last.text + piece.text)
        else:
            joined.append(piece)
    return joined


def tool_schemas(tools: list[dict[str, Any]]) -> dict[str, dict]:
    """Return the schemas of the arguments by tool name, for tools in OpenAI's form."""
    empty = {"type": "object", "properties": {}, "additionalProperties": False}
    return {tool["function"]["name"]: tool["function"].get("parameters") or empty for tool in tools}
