"""The requests of the OpenAI API (their fields, types and limits), and its responses. Independent of engine and HTTP.

Fields that vLLM adds to OpenAI's have vLLM's names. A feature of OpenAI that this server does not have is rejected
by name if a client requests it. Unknown fields of a request are ignored, because OpenAI's clients send new ones every
month. Numbers are strict: `true` and "2" are not integers, NaN and Infinity are not numbers.

The classes of responses describe them in /openapi.json. The functions below build the responses as plain dicts.
"""

import json
import math
import secrets
import string
import time
import uuid
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema, model_validator
from pydantic_core import PydanticCustomError

from flex_nano_vllm import __version__
from flex_nano_vllm.outputs import CompletionDelta, CompletionOutput, Logprob, RequestOutput
from flex_nano_vllm.sampling_params import (
    MAX_LOGIT_BIAS,
    MAX_LOGPROBS,
    MAX_SEED,
    MIN_SEED,
    InvalidRequestError,
    SamplingParams,
    StructuredOutputsParams,
)
from flex_nano_vllm.server_tools import MAX_CALLS, MAX_TOOLS, tool_schemas

MAX_PROMPTS, MAX_SAMPLES = 64, 16
MAX_CHOICES = 128  # prompts times samples
MAX_MESSAGES, MAX_PARTS = 4096, 256
MAX_ECHOED = 2**18  # prompt log-probabilities in one response, about 10 MB

TokenId = Annotated[int, Field(ge=0, le=2**31 - 1)]
# The first error ends the validation: a body can contain a million errors, and listing them takes seconds.
TokenIds = Annotated[list[TokenId], Field(fail_fast=True)]
Penalty = Annotated[float, Field(ge=-2, le=2)]


def unsupported(*harmless: Any) -> Any:
    """The type of a field that OpenAI supports and this server does not. It accepts null and the `harmless` values."""

    def check(value: Any) -> Any:
        if value is not None and value not in harmless:
            raise PydanticCustomError("unsupported", "is not supported")
        return value

    return Annotated[Any, AfterValidator(check), WithJsonSchema({"enum": [None, *harmless]})]


def _encodable(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("is not valid Unicode") from None
    return text


Text = Annotated[str, AfterValidator(_encodable)]  # JSON may contain half of a surrogate pair


def _serializable(value: dict[str, Any]) -> dict[str, Any]:
    """Check that a JSON object can be sent again: Python's parser accepts NaN, infinity and lone surrogates."""
    try:
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    except RecursionError:
        raise ValueError("is nested too deeply") from None
    except ValueError:
        raise ValueError("contains NaN, infinity or text that is not valid Unicode") from None
    return value


JSONObject = Annotated[dict[str, Any], AfterValidator(_serializable)]


def invalid_field(name: str, message: str) -> PydanticCustomError:
    """The error of a validator that looks at several fields."""
    return PydanticCustomError("invalid_field", message, {"param": name})


def _few(bias: Any) -> Any:
    """Check the number of entries before each entry is validated."""
    if isinstance(bias, dict) and len(bias) > MAX_LOGIT_BIAS:
        raise ValueError(f"has {len(bias)} entries, more than {MAX_LOGIT_BIAS}")
    return bias


class Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False)


class Closed(Strict):
    """An object that may have no unknown fields."""

    model_config = ConfigDict(extra="forbid")


class StreamOptions(Strict):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None  # usage in every chunk


class JSONSchema(Closed):
    name: str | None = None
    description: str | None = None
    schema_: JSONObject | bool | None = Field(None, alias="schema")
    strict: bool | None = None  # ignored: schemas are always enforced


class ResponseFormat(Closed):
    """OpenAI's three types, and `regex`."""

    type: Literal["text", "json_object", "json_schema", "regex"]
    json_schema: JSONSchema | None = None
    schema_: JSONObject | bool | None = Field(None, alias="schema")  # for json_object, as in llama.cpp
    regex: str | None = None
    whitespace_pattern: str | None = None  # white space between the symbols of JSON; vLLM's name

    NEEDED: ClassVar[dict[str, tuple[str, ...]]] = {
        "text": (),
        "json_object": ("schema_", "whitespace_pattern"),
        "json_schema": ("json_schema", "whitespace_pattern"),
        "regex": ("regex",),
    }

    @model_validator(mode="after")
    def _check_fields(self):
        for name in ("json_schema", "schema_", "regex", "whitespace_pattern"):
            if getattr(self, name) is not None and name not in self.NEEDED[self.type]:
                raise ValueError(f"{name.rstrip('_')} is not a field of type {self.type}")
        if self.type in ("json_schema", "regex") and getattr(self, self.type) is None:
            raise ValueError(f"type {self.type} needs the field {self.type}")
        return self

    @property
    def json_source(self) -> dict[str, Any] | str | None:
        """The schema that the output must match; None if the output need not be JSON."""
        schema = self.json_schema.schema_ if self.json_schema is not None else self.schema_
        if self.type == "json_object" and schema is None:
            return {"type": "object"}
        return None if self.type in ("text", "regex") else "true" if schema in (None, True) else schema

    def structured_outputs(self) -> StructuredOutputsParams | None:
        if self.type == "text":
            return None
        if self.type == "regex":
            return StructuredOutputsParams(regex=self.regex)
        return StructuredOutputsParams(json=self.json_source, whitespace_pattern=self.whitespace_pattern)


class GenerationRequest(Strict):
    """The fields that all generating endpoints share. None stands for the default."""

    model: str
    n: Annotated[int, Field(ge=1, le=MAX_SAMPLES)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=MIN_SEED, le=MAX_SEED)] | None = None
    stop: Text | Annotated[list[Text], Field(max_length=16)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: Annotated[
        Annotated[dict[str, float], Field(max_length=MAX_LOGIT_BIAS)] | None, BeforeValidator(_few)
    ] = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None
    user: Text | None = None
    # Added by vLLM
    top_k: Annotated[int, Field(ge=-1)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.001, le=10)] | None = None
    min_tokens: Annotated[int, Field(ge=0)] | None = None
    stop_token_ids: Annotated[TokenIds, Field(max_length=64)] | None = None
    allowed_token_ids: Annotated[TokenIds, Field(min_length=1)] | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    include_stop_str_in_output: bool | None = None
    cache_salt: Annotated[str, Field(min_length=1)] | None = None
    priority: Annotated[int, Field(ge=MIN_SEED, le=MAX_SEED)] | None = None
    structured_outputs: unsupported({}) = None  # use `response_format`
    guided_json: unsupported() = None
    guided_regex: unsupported() = None
    guided_choice: unsupported() = None
    guided_grammar: unsupported() = None
    prompt_logprobs: unsupported() = None  # use `echo` with `logprobs`
    truncate_prompt_tokens: unsupported() = None
    use_beam_search: unsupported(False) = None
    bad_words: unsupported([]) = None
    length_penalty: unsupported(1) = None
    prompt_embeds: unsupported() = None
    logits_processors: unsupported([]) = None
    return_tokens_as_token_ids: unsupported(False) = None

    SAME: ClassVar[tuple[str, ...]] = (  # fields with the same name in `SamplingParams`
        *("n", "temperature", "top_p", "seed", "stop", "presence_penalty", "frequency_penalty", "top_k", "min_p"),
        *("repetition_penalty", "min_tokens", "stop_token_ids", "allowed_token_ids", "ignore_eos"),
        *("skip_special_tokens", "include_stop_str_in_output", "priority"),
    )

    @model_validator(mode="after")
    def _check_stream_options(self):
        if self.stream_options is not None and not self.stream:
            raise invalid_field("stream_options", "stream_options needs stream=true")
        return self

    def sampling_params(self, defaults: dict[str, Any], **others: Any) -> SamplingParams:
        """Return the parameters of the request. Raises ValueError, as `SamplingParams` does.

        Args:
            defaults: values of `SamplingParams` fields that the request does not set.
            others: values of `SamplingParams` fields that have another name in the request.
        """
        given = {name: getattr(self, name) for name in self.SAME if getattr(self, name) is not None}
        if self.logit_bias:
            try:
                given["logit_bias"] = {int(token_id): bias for token_id, bias in self.logit_bias.items()}
            except ValueError:
                raise InvalidRequestError("the keys of logit_bias must be token ids", "logit_bias") from None
        if self.response_format is not None:
            given["structured_outputs"] = self.response_format.structured_outputs()
        stated = {name for name, value in (given | others).items() if value is not None}
        merged = defaults | given | others
        least, most = merged.get("min_tokens", 0), merged.get("max_tokens", SamplingParams.max_tokens)
        if most is not None and least > most and not {"min_tokens", "max_tokens"} <= stated:  # change a default
            merged |= {"min_tokens": most} if "max_tokens" in stated else {"max_tokens": least}
        return SamplingParams(**merged)

    @property
    def includes_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def includes_usage_always(self) -> bool:
        """Whether every chunk of a stream contains the usage so far."""
        return bool(self.includes_usage and self.stream_options.continuous_usage_stats)


class CompletionRequest(GenerationRequest):
    # Left to right: otherwise pydantic would also try each of many tokens as a text.
    prompt: Annotated[
        str
        | Annotated[TokenIds, Field(min_length=1)]
        | Annotated[list[str], Field(fail_fast=True, min_length=1, max_length=MAX_PROMPTS)]
        | Annotated[list[TokenIds], Field(fail_fast=True, min_length=1, max_length=MAX_PROMPTS)],
        Field(union_mode="left_to_right"),
    ]
    max_tokens: Annotated[int, Field(ge=0)] | None = None  # 0: only prompt logprobs, with `echo` and `logprobs`
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    echo: bool | None = None
    best_of: unsupported(1) = None
    suffix: unsupported("") = None
    add_special_tokens: unsupported(True) = None

    @property
    def prompts(self) -> list[str | list[int]]:
        is_one = isinstance(self.prompt, str) or isinstance(self.prompt[0], int)
        return [self.prompt] if is_one else self.prompt

    def to_params(self, defaults: dict[str, Any]) -> SamplingParams:
        # The response contains the prompt's logprobs only if it echoes the prompt.
        prompt_logprobs = self.logprobs if self.echo else None
        if self.max_tokens == 0 and self.min_tokens:
            raise InvalidRequestError(f"min_tokens={self.min_tokens} is more than max_tokens=0", "min_tokens")
        limit = {} if self.max_tokens is None else {"max_tokens": max(1, self.max_tokens)}
        return self.sampling_params(defaults, logprobs=self.logprobs, prompt_logprobs=prompt_logprobs, **limit)


class TextPart(Strict):
    type: str
    text: str | None = None


class CalledFunction(Strict):
    name: Text
    arguments: Text


class ToolCall(Strict):
    id: Text
    type: Literal["function"] = "function"
    function: CalledFunction


class Message(Strict):
    role: str
    content: str | Annotated[list[TextPart], Field(fail_fast=True, max_length=MAX_PARTS)] | None = None
    tool_calls: Annotated[list[ToolCall], Field(fail_fast=True, max_length=MAX_TOOLS)] | None = None
    tool_call_id: Text | None = None
    function_call: unsupported() = None

    @property
    def texts(self) -> list[str]:
        """The texts of the message, including those of its tool calls."""
        calls = [call.function.name + call.function.arguments for call in self.tool_calls or ()]
        if isinstance(self.content, list):
            return [part.text or "" for part in self.content] + calls
        return [self.content or "", *calls]

    def to_dict(self) -> dict:
        message = self.model_dump(exclude_none=True)
        # Chat templates do not know OpenAI's newer name of the role.
        return message | {"role": "system"} if self.role == "developer" else message


Name = Annotated[str, Field(pattern="^[a-zA-Z0-9_-]{1,64}$")]


class Function(Closed):
    name: Name
    description: Text | None = None
    parameters: JSONObject | None = None
    strict: bool | None = None  # ignored: schemas are always enforced if the model's form of a call allows a grammar


class Tool(Strict):
    type: Literal["function"]
    function: Function


class FunctionName(Strict):
    name: Name


class NamedTool(Strict):
    type: Literal["function"]
    function: FunctionName


Messages = Annotated[list[Message], Field(fail_fast=True, min_length=1, max_length=MAX_MESSAGES)]


class ChatCompletionRequest(GenerationRequest):
    messages: Messages
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    tools: Annotated[list[Tool], Field(fail_fast=True, max_length=MAX_TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    functions: unsupported([]) = None
    function_call: unsupported("none", "auto") = None
    modalities: unsupported(["text"]) = None
    audio: unsupported() = None
    prediction: unsupported() = None
    web_search_options: unsupported() = None
    # For reasoning models; other models ignore it, here and at OpenAI.
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None
    chat_template: unsupported() = None  # a template is a program: clients must not send one
    chat_template_kwargs: unsupported({}) = None
    add_generation_prompt: unsupported(True) = None
    continue_final_message: unsupported(False) = None
    echo: unsupported(False) = None

    def _check_tools(self) -> None:
        names = [tool.function.name for tool in self.tools or ()]
        twice = [name for name in names if names.count(name) > 1]
        if twice:
            raise InvalidRequestError(f"two tools have the name {twice[0]}", "tools")
        if self.tool_choice == "required" and not names:
            raise InvalidRequestError('tool_choice "required" needs tools', "tool_choice")
        if isinstance(self.tool_choice, NamedTool) and self.tool_choice.function.name not in names:
            message = f"tool_choice names {self.tool_choice.function.name}, which is not among the tools"
            raise InvalidRequestError(message, "tool_choice")

    def to_params(self, defaults: dict[str, Any]) -> SamplingParams:
        self._check_tools()
        if self.top_logprobs is not None and not self.logprobs:
            raise InvalidRequestError("top_logprobs needs logprobs=true", "top_logprobs")
        num_top = (self.top_logprobs or 0) if self.logprobs else None
        max_tokens = self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens
        limit = {} if max_tokens is None and "max_tokens" in defaults else {"max_tokens": max_tokens}
        return self.sampling_params(defaults, logprobs=num_top, **limit)  # None: as many tokens as fit

    @property
    def known_tools(self) -> list[dict]:
        """The tools that are given to the chat template, in OpenAI's form."""
        if self.tool_choice == "none":
            return []
        return [tool.model_dump(exclude_none=True, exclude={"function": {"strict"}}) for tool in self.tools or ()]

    @property
    def callable_tools(self) -> dict[str, dict]:
        """The argument schemas of the tools that may be called, by tool name."""
        schemas = tool_schemas(self.known_tools)
        if isinstance(self.tool_choice, NamedTool):
            return {self.tool_choice.function.name: schemas[self.tool_choice.function.name]}
        return schemas

    @property
    def max_calls(self) -> int:
        """Most calls in one output. The default is 1 for a required call, because a weak model would not stop."""
        is_parallel = self.parallel_tool_calls
        if is_parallel is None:
            is_parallel = not self.needs_call
        return MAX_CALLS if is_parallel else 1

    @property
    def needs_call(self) -> bool:
        """Whether the output must be a tool call."""
        return self.tool_choice == "required" or isinstance(self.tool_choice, NamedTool)

    @property
    def num_top(self) -> int:
        return self.top_logprobs or 0


class TokenizeRequest(Strict):
    model: str | None = None
    prompt: str | None = None
    messages: Messages | None = None
    add_special_tokens: unsupported(True) = None
    add_generation_prompt: unsupported(True) = None
    continue_final_message: unsupported(False) = None
    return_token_strs: unsupported(False) = None

    @model_validator(mode="after")
    def _check_one(self):
        if (self.prompt is None) == (self.messages is None):
            raise invalid_field("prompt", "exactly one of prompt and messages must be given")
        return self


class DetokenizeRequest(Strict):
    model: str | None = None
    tokens: TokenIds


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
    """The pool of one attention window. For `pages` see `invariants.holders`."""

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
