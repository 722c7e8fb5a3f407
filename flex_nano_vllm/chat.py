"""Converts conversations to prompt tokens with the tokenizer's chat template. Independent of the engine."""

import json
import re
from collections.abc import Callable
from typing import Any

from jinja2.exceptions import TemplateError
from transformers import PreTrainedTokenizerBase

from flex_nano_vllm.detokenizer import special_token_names
from flex_nano_vllm.sampling_params import shortened

ROLES = ("system", "user", "assistant", "tool")
# A number between these characters replaces a control token of a message while the template is rendered. The first
# character itself is replaced in the same way, so that a message cannot forge such a placeholder.
_OPEN, _CLOSE = "\ue000", "\ue001"


def chat_token_ids(
    tokenizer: PreTrainedTokenizerBase | None, messages: list[dict], tools: list[dict] | None = None
) -> list[int]:
    """Return the tokens of a conversation, up to the point where the model answers.

    A message cannot end its turn or open another turn: a control token in its content is tokenized as plain characters.
    A template is a program that comes with the tokenizer. transformers runs it in a sandbox, and it receives only the
    messages and tools of a request.

    Args:
        messages: `{"role": ..., "content": ...}`, the content a string or a list of `{"type": "text", "text": ...}`. An
            assistant message may have `tool_calls`. A tool message may have the `tool_call_id` of the call it answers.
        tools: in OpenAI's form, `{"type": "function", "function": {"name": ..., "parameters": {...}}}`.
    Raises:
        ValueError: messages have another form, the template does not support the given tools, there is no tokenizer or
            no template, or the template raises an error.
    """
    if tokenizer is None:
        raise ValueError("a chat needs a tokenizer, but the engine has none")
    if not tokenizer.chat_template:
        raise ValueError("the tokenizer has no chat template: use completions, or a chat model")
    if not isinstance(messages, list | tuple) or not messages:
        got = f"an empty {type(messages).__name__}" if messages in ([], ()) else f"a {type(messages).__name__}"
        raise ValueError(f"messages must be a non-empty list of dicts with role and content, not {got}")
    if tools and "tools" not in template_of(tokenizer):
        raise ValueError("tools: the model's chat template does not support them, so the model would not see them")
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
    except TypeError as error:
        raise ValueError(f"tools must be a list of JSON objects: {error}") from error
    except UnicodeEncodeError as error:
        raise ValueError(f"tools are not valid Unicode: {error}") from None
    try:
        text = tokenizer.apply_chat_template(given[0], tools=given[1], tokenize=False, add_generation_prompt=True)
    except (TemplateError, ArithmeticError, LookupError, TypeError) as error:
        raise ValueError(f"the chat template raises an error for the messages: {error}") from error
    parts = re.split(f"{_OPEN}([0-9]+){_CLOSE}", text)
    # One call for all parts, because a call of the tokenizer has more overhead than work.
    written = tokenizer(parts[::2], add_special_tokens=False).input_ids
    token_ids = list(written[0])
    if len(parts) > 1:
        said = [spoken[int(number)] for number in parts[1::2]]
        of_said = tokenizer(said, add_special_tokens=False, split_special_tokens=True).input_ids
        for ids_said, ids_written in zip(of_said, written[1:]):
            token_ids += ids_said + ids_written
    return token_ids


def template_of(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the chat template for conversations with tools; "" if there is none."""
    templates = tokenizer.chat_template
    if isinstance(templates, dict):  # a tokenizer may have several
        return templates.get("tool_use") or templates.get("default") or ""
    return templates or ""


def _with_texts(value: Any, change: Callable[[str], str]) -> Any:
    """Return a nested structure with `change` applied to all of its strings, including dict keys."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, list | tuple):
        return [_with_texts(item, change) for item in value]
    if isinstance(value, dict):
        return {change(str(key)): _with_texts(item, change) for key, item in value.items()}
    return value


def _message(message: dict, index: int) -> dict:
    """Check a message and return it in the form that templates expect."""
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
                raise ValueError(f"{name}: only content parts of type text are supported, got {shortened(kind)}")
            if not isinstance(part.get("text"), str):
                raise ValueError(f"{name}: a content part of type text has no text, which must be a string")
        content = "".join(part["text"] for part in content)
    if not isinstance(content, str):
        raise ValueError(f"{name}: content must be a string or a list of text parts, got {type(content).__name__}")
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
    """Check a tool call and return it with its arguments parsed, because templates write the JSON themselves."""
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise ValueError(f"{name} must be a dict with a function that has a name")
    arguments = function.get("arguments") or {}
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except ValueError:
            raise ValueError(f"{name}: arguments must be a string that contains a JSON object") from None
    if not isinstance(arguments, dict):
        raise ValueError(f"{name}: arguments must be a JSON object")
    function = {"name": function["name"], "arguments": arguments}
    return {"id": str(call.get("id", "")), "type": "function", "function": function}
