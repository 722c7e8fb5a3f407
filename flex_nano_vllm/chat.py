"""Conversations to prompts, through the tokenizer's own template. Knows no engine."""

import json
import re
from collections.abc import Callable
from typing import Any

from jinja2.exceptions import TemplateError
from transformers import PreTrainedTokenizerBase

from flex_nano_vllm.detokenizer import special_token_names

ROLES = ("system", "user", "assistant", "tool")
# Around numbers, these stand for control tokens in messages until the template is through; and for the first of the two
# itself, so that a message cannot forge them.
_OPEN, _CLOSE = "\ue000", "\ue001"


def chat_token_ids(
    tokenizer: PreTrainedTokenizerBase | None, messages: list[dict], tools: list[dict] | None = None
) -> list[int]:
    """The tokens of a conversation, up to where the model is to answer.

    A message cannot end its turn or open another one: a control token in what it says is read as the characters it is
    written with. A template is a program that came with the tokenizer: transformers runs it in a sandbox, and it gets
    nothing of a request but messages and tools.

    Args:
        messages: `{"role": ..., "content": ...}`, the content a text or a list of `{"type": "text", "text": ...}`. An
            assistant's message may have `tool_calls`, and a tool's message the `tool_call_id` that it answers.
        tools: in OpenAI's form, `{"type": "function", "function": {"name": ..., "parameters": {...}}}`.
    Raises:
        ValueError: for messages of another form, for tools where the template has no place for them, without a
            template, or what the template refuses.
    """
    if tokenizer is None:
        raise ValueError("a chat needs a tokenizer, and the engine has none")
    if not tokenizer.chat_template:
        raise ValueError("the tokenizer has no chat template: use a completion, or a model that was made to chat")
    if not isinstance(messages, list | tuple) or not messages:
        got = f"an empty {type(messages).__name__}" if messages in ([], ()) else f"a {type(messages).__name__}"
        raise ValueError(f"messages must be a non-empty list of dicts with role and content, not {got}")
    if tools and "tools" not in template_of(tokenizer):
        raise ValueError("tools: the model's chat template has no place for them, so the model would not know them")
    control_tokens = sorted({_OPEN, *special_token_names(tokenizer)}, key=len, reverse=True)
    pattern = re.compile("|".join(map(re.escape, control_tokens)))
    spoken: list[str] = []

    def defused(match: re.Match) -> str:
        spoken.append(match[0])
        return f"{_OPEN}{len(spoken) - 1}{_CLOSE}"

    try:
        conversation = [_message(message, index) for index, message in enumerate(messages)]
        given = _with_texts((conversation, tools or None), lambda text: pattern.sub(defused, text))
        json.dumps(tools, ensure_ascii=False).encode()
    except RecursionError:
        raise ValueError("messages or tools are nested too deeply") from None
    except UnicodeEncodeError as error:
        raise ValueError(f"tools are not valid Unicode: {error}") from None
    try:
        text = tokenizer.apply_chat_template(given[0], tools=given[1], tokenize=False, add_generation_prompt=True)
    except (TemplateError, ArithmeticError, LookupError, TypeError) as error:
        raise ValueError(f"the chat template refuses the messages: {error}") from error
    parts = re.split(f"{_OPEN}([0-9]+){_CLOSE}", text)
    # Many at once, since to call a tokenizer costs more than what it does.
    written = tokenizer(parts[::2], add_special_tokens=False).input_ids
    token_ids = list(written[0])
    if len(parts) > 1:
        said = [spoken[int(number)] for number in parts[1::2]]
        of_said = tokenizer(said, add_special_tokens=False, split_special_tokens=True).input_ids
        for ids_said, ids_written in zip(of_said, written[1:]):
            token_ids += ids_said + ids_written
    return token_ids


def template_of(tokenizer: PreTrainedTokenizerBase) -> str:
    """The chat template that a conversation with tools gets; "" if there is none."""
    templates = tokenizer.chat_template
    if isinstance(templates, dict):  # a tokenizer may have several
        return templates.get("tool_use") or templates.get("default") or ""
    return templates or ""


def _with_texts(value: Any, change: Callable[[str], str]) -> Any:
    """A structure with all of its texts changed, keys included."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, list | tuple):
        return [_with_texts(item, change) for item in value]
    if isinstance(value, dict):
        return {change(str(key)): _with_texts(item, change) for key, item in value.items()}
    return value


def _message(message: dict, index: int) -> dict:
    """A message as templates know it."""
    name = f"message {index}"
    if not isinstance(message, dict) or message.get("role") not in ROLES:
        raise ValueError(f"{name} must be a dict with content and one of the roles {', '.join(ROLES)}")
    role, content = message["role"], message.get("content")
    calls = message.get("tool_calls") or [] if role == "assistant" else []
    if content is None and calls:
        content = ""
    if isinstance(content, list | tuple):
        for part in content:
            kind = part.get("type") if isinstance(part, dict) else type(part).__name__
            if kind != "text":
                raise ValueError(f"{name}: only content parts of type text are supported, got {kind!r}")
            if not isinstance(part.get("text"), str):
                raise ValueError(f"{name}: a content part of type text has no text")
        content = "".join(part["text"] for part in content)
    if not isinstance(content, str):
        raise ValueError(f"{name}: content must be a text or a list of text parts, got {type(content).__name__}")
    known = {"role": role, "content": content}
    if calls:
        known["tool_calls"] = [_call(call, f"{name}: tool call {i}") for i, call in enumerate(calls)]
    if role == "tool":
        known |= {key: message[key] for key in ("tool_call_id", "name") if isinstance(message.get(key), str)}
    try:
        json.dumps(known, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{name} is not valid Unicode: {error}") from None
    return known


def _call(call: dict, name: str) -> dict:
    """A call with its arguments parsed: templates write JSON themselves."""
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise ValueError(f"{name} must be a dict with a function that has a name")
    arguments = function.get("arguments") or {}
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except ValueError:
            raise ValueError(f"{name}: arguments must be the text of a JSON object") from None
    if not isinstance(arguments, dict):
        raise ValueError(f"{name}: arguments must be a JSON object")
    function = {"name": function["name"], "arguments": arguments}
    return {"id": str(call.get("id", "")), "type": "function", "function": function}
