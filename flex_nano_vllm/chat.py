"""Conversations to prompts, through the tokenizer's own template. Knows no engine."""

import re

from jinja2.exceptions import TemplateError
from transformers import PreTrainedTokenizerBase

ROLES = ("system", "user", "assistant")
# Around numbers, these stand for control tokens in what people say, until the template is through; and for the first of
# the two itself, so that nobody can forge them.
_OPEN, _CLOSE = "\ue000", "\ue001"


def chat_token_ids(tokenizer: PreTrainedTokenizerBase | None, messages: list[dict]) -> list[int]:
    """The tokens of a conversation, up to where the model is to answer.

    What people say cannot end their turn or open another one: a control token in a message's content is read as the
    characters it is written with. A template is a program that came with the tokenizer: transformers runs it in a
    sandbox, and nothing of a request but the messages reaches it.

    Args:
        messages: `{"role": ..., "content": ...}`, the content a text or a list of `{"type": "text", "text": ...}`.
    Raises:
        ValueError: for messages of another form, without a template, or what the template refuses.
    """
    if tokenizer is None:
        raise ValueError("a chat needs a tokenizer, and the engine has none")
    if not tokenizer.chat_template:
        raise ValueError("the tokenizer has no chat template: use a completion, or a model that was made to chat")
    if not isinstance(messages, list | tuple) or not messages:
        raise ValueError(f"messages must be a non-empty list of dicts with role and content, got {messages!r}")
    control_tokens = sorted(_control_tokens(tokenizer), key=len, reverse=True)
    pattern = re.compile("|".join(map(re.escape, [_OPEN, *control_tokens])))
    conversation, spoken = [], []

    def defused(match: re.Match) -> str:
        spoken.append(match[0])
        return f"{_OPEN}{len(spoken) - 1}{_CLOSE}"

    for index, message in enumerate(messages):
        role, content = _role_and_content(message, index)
        conversation.append({"role": role, "content": pattern.sub(defused, content)})
    try:
        text = tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True)
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


def _control_tokens(tokenizer: PreTrainedTokenizerBase) -> set[str]:
    added = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    return added | set(tokenizer.all_special_tokens)


def _role_and_content(message: dict, index: int) -> tuple[str, str]:
    name = f"message {index}"
    if not isinstance(message, dict) or message.get("role") not in ROLES:
        raise ValueError(f"{name} must be a dict with content and one of the roles {', '.join(ROLES)}")
    content = message.get("content")
    if isinstance(content, list | tuple):
        for part in content:
            if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
                kind = part.get("type") if isinstance(part, dict) else part
                raise ValueError(f"{name}: only parts of type text are supported, got {kind!r}")
        content = "".join(part["text"] for part in content)
    if not isinstance(content, str):
        raise ValueError(f"{name}: content must be a text or a list of text parts, got {content!r}")
    try:
        content.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{name} is not valid Unicode: {error}") from None
    return message["role"], content
