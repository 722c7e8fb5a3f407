"""The responses of the OpenAI API. Independent of the engine and of HTTP.

The classes describe the responses in /openapi.json. The functions build the responses as plain dicts.
"""

import json
import math
import secrets
import string
import time
import uuid
from typing import Any, Literal

from pydantic import BaseModel

from flex_nano_vllm import __version__
from flex_nano_vllm.outputs import CompletionDelta, CompletionOutput, Logprob, RequestOutput

FINGERPRINT = f"flex-nano-vllm-{__version__}"


class PromptTokensDetails(BaseModel):
    cached_tokens: int


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class Reply(BaseModel):
    id: str
    created: int
    model: str
    system_fingerprint: str
    usage: Usage


class CompletionLogprobs(BaseModel):
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(BaseModel):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Literal["stop", "length"]
    stop_reason: int | str | None


class Completion(Reply):
    object: Literal["text_completion"]
    choices: list[CompletionChoice]


class TokenLogprob(BaseModel):
    token: str
    logprob: float
    bytes: list[int]


class RatedToken(TokenLogprob):
    top_logprobs: list[TokenLogprob]


class ChatLogprobs(BaseModel):
    content: list[RatedToken]
    refusal: None


class FunctionCall(BaseModel):
    name: str
    arguments: str


class MessageToolCall(BaseModel):
    id: str
    type: Literal["function"]
    function: FunctionCall


class AssistantMessage(BaseModel):
    role: Literal["assistant"]
    content: str | None
    refusal: None
    annotations: list[Any]
    tool_calls: list[MessageToolCall] = []


class ChatChoice(BaseModel):
    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length", "tool_calls"]
    stop_reason: int | str | None


class ChatCompletion(Reply):
    object: Literal["chat.completion"]
    choices: list[ChatChoice]


class ServedModel(BaseModel):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int


class ModelList(BaseModel):
    object: Literal["list"]
    data: list[ServedModel]


class Tokens(BaseModel):
    tokens: list[int]
    count: int
    max_model_len: int


class Detokenized(BaseModel):
    prompt: str


class Health(BaseModel):
    status: Literal["ok"]


class Version(BaseModel):
    version: str


class ShownRequest(BaseModel):
    id: int
    row: int | None
    num_tokens: int
    num_computed_tokens: int
    num_prompt_tokens: int


class ShownPool(BaseModel):
    """The pool of one attention window. For `pages` see `PageTable.holders`."""

    window: int | None
    page_size: int
    num_pages: int
    pages: list[int]


class State(BaseModel):
    stats: dict[str, Any]
    pools: list[ShownPool]
    running: list[ShownRequest]
    waiting: list[ShownRequest]


class Error(BaseModel):
    message: str
    type: str
    param: str | None = None
    code: str | int | None = None


class ErrorResponse(BaseModel):
    error: Error


def new_id(prefix: str) -> str:
    return f"{prefix}{uuid.uuid4().hex}"


def new_call_id() -> str:
    """Return an id of a tool call in the only form that Mistral's chat templates accept: nine letters or digits."""
    return "".join(secrets.choice(string.ascii_letters + string.digits) for _ in range(9))


class Envelope:
    """The fields of a response, or of each chunk of a stream, around its choices."""

    def __init__(self, kind: str, prefix: str, model: str):
        self.fields = dict(id=new_id(prefix), object=kind, created=int(time.time()), model=model)
        self.fields["system_fingerprint"] = FINGERPRINT

    def with_choices(self, choices: list[dict], **usage: dict | None) -> dict:
        return self.fields | {"choices": choices} | usage


def usage_of(outputs: list[RequestOutput]) -> dict:
    """Count the tokens of all requests and samples. Each prompt is counted once."""
    num_prompt = sum(len(output.prompt_token_ids) for output in outputs)
    num_generated = sum(len(completion.token_ids) for output in outputs for completion in output.outputs)
    return usage(num_prompt, num_generated, sum(output.num_cached_tokens for output in outputs))


def usage(num_prompt: int, num_generated: int, num_cached: int = 0) -> dict:
    return dict(
        prompt_tokens=num_prompt,
        completion_tokens=num_generated,
        total_tokens=num_prompt + num_generated,
        prompt_tokens_details={"cached_tokens": num_cached},
    )


def ending(completion: CompletionOutput | CompletionDelta, ends_with_calls: bool = False) -> dict:
    """Return how a choice has ended. The values are None until it has ended."""
    reason = completion.finish_reason
    reason = "tool_calls" if reason == "stop" and ends_with_calls else reason
    return dict(finish_reason=reason, stop_reason=completion.stop_reason)


def completion_logprobs(
    token_ids: list[int], rated: list[dict[int, Logprob] | None], offsets: list[int], first_name: str | None = None
) -> dict:
    """Return the logprobs of a completion: four lists with one entry for each token.

    Args:
        offsets: where the tokens begin in the whole text.
        first_name: name of the token that has no logprob because no token precedes it.
    """
    tokens, logprobs, top = [], [], []
    for token_id, entry in zip(token_ids, rated):
        tokens.append(first_name if entry is None else entry[token_id].decoded_token)
        logprobs.append(None if entry is None else _finite(entry[token_id].logprob))
        by_name: dict[str, float] = {}
        for other in entry.values() if entry is not None else ():  # for equal names, keep the more likely token
            name = other.decoded_token
            by_name[name] = max(by_name.get(name, -math.inf), _finite(other.logprob))
        top.append(None if entry is None else by_name)
    return dict(tokens=tokens, token_logprobs=logprobs, top_logprobs=top, text_offset=offsets)


def chat_logprobs(token_ids: list[int], rated: list[dict[int, Logprob]], num_top: int) -> list[dict]:
    """Return the logprobs of a chat: a list of tokens, each with the `num_top` most likely tokens at its position."""
    content = []
    for token_id, entry in zip(token_ids, rated):
        likely = sorted((other for other in entry.values() if other.rank <= num_top), key=lambda other: other.rank)
        content.append(_chat_logprob(entry[token_id]) | {"top_logprobs": [_chat_logprob(other) for other in likely]})
    return content


def _chat_logprob(logprob: Logprob) -> dict:
    return dict(token=logprob.decoded_token, logprob=_finite(logprob.logprob), bytes=list(logprob.token_bytes or b""))


def _finite(logprob: float) -> float:
    """Replace minus infinity, which JSON does not have, by the number that vLLM uses."""
    return max(logprob, -9999.0)


def tool_call(call_id: str, name: str, arguments: str) -> dict[str, Any]:
    return dict(id=call_id, type="function", function=dict(name=name, arguments=arguments))


DONE = b"data: [DONE]\n\n"  # the last event of every stream


def server_sent_event(data: dict, name: str | None = None) -> bytes:
    """Return an event in ASCII, because some clients split lines at any Unicode line break."""
    head = f"event: {name}\n" if name else ""
    return f"{head}data: {json.dumps(data, separators=(',', ':'))}\n\n".encode()
