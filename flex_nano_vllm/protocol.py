"""The OpenAI API as data: what its requests may hold, and the shapes of answers. Knows no engine and no HTTP.

Fields that vLLM adds to OpenAI's have vLLM's names. What OpenAI has and we do not is refused by name if it is asked
for; fields that nobody knows are ignored, as OpenAI's clients send more of them every month. Numbers are strict: `true`
and "2" are no ints, NaN and Infinity are nothing.
"""

import time
import uuid
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema, model_validator

from flex_nano_vllm.outputs import Logprob, RequestOutput
from flex_nano_vllm.sampling_params import (
    MAX_LOGIT_BIAS,
    MAX_LOGPROBS,
    MAX_SEED,
    SamplingParams,
    StructuredOutputsParams,
)

MAX_PROMPTS, MAX_SAMPLES = 64, 16
MAX_CHOICES = 128  # prompts times samples
MAX_MESSAGES, MAX_PARTS = 4096, 256
MAX_ECHOED = 2**18  # log-probabilities of prompts in one answer, about 10 MB of it

TokenId = Annotated[int, Field(ge=0, le=2**31 - 1)]
# The first mistake ends the check: a body has room for a million of them, and to list them takes seconds.
TokenIds = Annotated[list[TokenId], Field(fail_fast=True)]
Penalty = Annotated[float, Field(ge=-2, le=2)]


def unsupported(*harmless: Any) -> Any:
    """A field for what OpenAI has and we do not: null, and values that ask for nothing."""

    def check(value: Any) -> Any:
        if value is not None and value not in harmless:
            raise ValueError("is not supported")
        return value

    return Annotated[Any, AfterValidator(check), WithJsonSchema({"enum": [None, *harmless]})]


def _encodable(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("is not valid Unicode") from None
    return text


Text = Annotated[str, AfterValidator(_encodable)]  # JSON may hold half of a surrogate pair


def _few(bias: Any) -> Any:
    """Before all of its entries are looked at."""
    if isinstance(bias, dict) and len(bias) > MAX_LOGIT_BIAS:
        raise ValueError(f"has {len(bias)} entries, more than {MAX_LOGIT_BIAS}")
    return bias


class Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False)


class StreamOptions(Strict):
    include_usage: bool | None = None
    continuous_usage_stats: unsupported(False) = None


class JSONSchema(Strict):
    name: str | None = None
    schema_: dict[str, Any] | bool = Field(alias="schema")


class ResponseFormat(Strict):
    """OpenAI's three types, and `regex`."""

    type: Literal["text", "json_object", "json_schema", "regex"]
    json_schema: JSONSchema | None = None
    regex: str | None = None

    def structured_outputs(self) -> StructuredOutputsParams | None:
        if self.type == "text":
            return None
        if self.type == "json_object":
            return StructuredOutputsParams(json_object=True)
        if self.type == "json_schema":
            if self.json_schema is None:
                raise ValueError("response_format of type json_schema needs json_schema")
            schema = self.json_schema.schema_
            return StructuredOutputsParams(json="true" if schema is True else schema)
        if self.regex is None:
            raise ValueError("response_format of type regex needs regex")
        return StructuredOutputsParams(regex=self.regex)


class GenerationRequest(Strict):
    """What completions and chats have in common. None stands for the default."""

    model: str
    n: Annotated[int, Field(ge=1, le=MAX_SAMPLES)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=0, le=MAX_SEED)] | None = None
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
    # vLLM's additions.
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
    structured_outputs: unsupported({}) = None  # `response_format` is
    guided_json: unsupported() = None
    guided_regex: unsupported() = None
    guided_choice: unsupported() = None
    guided_grammar: unsupported() = None
    prompt_logprobs: unsupported() = None  # `echo` with `logprobs` has them
    truncate_prompt_tokens: unsupported() = None
    use_beam_search: unsupported(False) = None
    bad_words: unsupported([]) = None
    length_penalty: unsupported(1) = None
    prompt_embeds: unsupported() = None
    logits_processors: unsupported([]) = None
    return_tokens_as_token_ids: unsupported(False) = None

    SAME: ClassVar[tuple[str, ...]] = (  # names of `SamplingParams` too
        *("n", "temperature", "top_p", "seed", "stop", "presence_penalty", "frequency_penalty", "top_k", "min_p"),
        *("repetition_penalty", "min_tokens", "stop_token_ids", "allowed_token_ids", "ignore_eos"),
        *("skip_special_tokens", "include_stop_str_in_output"),
    )

    @model_validator(mode="after")
    def _check_stream_options(self):
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options are for stream=true only")
        return self

    def sampling_params(self, **others: Any) -> SamplingParams:
        """Raises ValueError, as `SamplingParams` does."""
        given = {name: getattr(self, name) for name in self.SAME if getattr(self, name) is not None}
        if self.logit_bias:
            try:
                given["logit_bias"] = {int(token_id): bias for token_id, bias in self.logit_bias.items()}
            except ValueError:
                raise ValueError("logit_bias must be an object by token ids") from None
        if self.response_format is not None:
            given["structured_outputs"] = self.response_format.structured_outputs()
        return SamplingParams(**given, **others)

    @property
    def includes_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)


class CompletionRequest(GenerationRequest):
    # Left to right: else each of many tokens would be tried as a text as well.
    prompt: Annotated[
        str
        | Annotated[TokenIds, Field(min_length=1)]
        | Annotated[list[str], Field(fail_fast=True, min_length=1, max_length=MAX_PROMPTS)]
        | Annotated[list[TokenIds], Field(fail_fast=True, min_length=1, max_length=MAX_PROMPTS)],
        Field(union_mode="left_to_right"),
    ]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    echo: bool | None = None
    best_of: unsupported(1) = None
    suffix: unsupported("") = None
    add_special_tokens: unsupported(True) = None

    @property
    def prompts(self) -> list[str | list[int]]:
        is_one = isinstance(self.prompt, str) or isinstance(self.prompt[0], int)
        return [self.prompt] if is_one else self.prompt

    def to_params(self) -> SamplingParams:
        # No prompt is rated that nobody sees.
        prompt_logprobs = self.logprobs if self.echo else None
        limit = {} if self.max_tokens is None else {"max_tokens": self.max_tokens}
        return self.sampling_params(logprobs=self.logprobs, prompt_logprobs=prompt_logprobs, **limit)


class TextPart(Strict):
    type: str
    text: str | None = None


class Message(Strict):
    role: str
    content: str | Annotated[list[TextPart], Field(fail_fast=True, max_length=MAX_PARTS)] | None = None
    tool_calls: unsupported([]) = None
    function_call: unsupported() = None

    @property
    def texts(self) -> list[str]:
        """What it says."""
        if isinstance(self.content, list):
            return [part.text or "" for part in self.content]
        return [self.content or ""]

    def to_dict(self) -> dict:
        message = self.model_dump(include={"role", "content"})
        # OpenAI's newer word, which no template knows.
        return message | {"role": "system"} if self.role == "developer" else message


Messages = Annotated[list[Message], Field(fail_fast=True, min_length=1, max_length=MAX_MESSAGES)]


class ChatCompletionRequest(GenerationRequest):
    messages: Messages
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    tools: unsupported([]) = None
    tool_choice: unsupported("none", "auto") = None
    functions: unsupported([]) = None
    function_call: unsupported("none", "auto") = None
    modalities: unsupported(["text"]) = None
    audio: unsupported() = None
    prediction: unsupported() = None
    web_search_options: unsupported() = None
    reasoning_effort: unsupported("none") = None
    chat_template: unsupported() = None  # a program, which nobody gets to send
    chat_template_kwargs: unsupported({}) = None
    add_generation_prompt: unsupported(True) = None
    continue_final_message: unsupported(False) = None
    echo: unsupported(False) = None

    def to_params(self) -> SamplingParams:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs=true")
        num_top = (self.top_logprobs or 0) if self.logprobs else None
        max_tokens = self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens
        return self.sampling_params(logprobs=num_top, max_tokens=max_tokens)  # None: as many as fit

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
            raise ValueError("exactly one of prompt and messages is needed")
        return self


class DetokenizeRequest(Strict):
    model: str | None = None
    tokens: TokenIds


class Error(BaseModel):
    message: str
    type: str
    param: str | None = None
    code: str | int | None = None


class ErrorResponse(BaseModel):
    error: Error


def new_id(prefix: str) -> str:
    return f"{prefix}-{uuid.uuid4().hex}"


def envelope(object_name: str, response_id: str, model: str, choices: list[dict], usage: dict | None) -> dict:
    """What every answer and every chunk of one has around its choices."""
    created = int(time.time())
    return dict(
        id=response_id,
        object=object_name,
        created=created,
        model=model,
        choices=choices,
        usage=usage,
        system_fingerprint=None,
    )


def usage_of(outputs: list[RequestOutput]) -> dict:
    """Tokens of all requests and samples; a prompt counts once."""
    prompt = sum(len(output.prompt_token_ids) for output in outputs)
    completion = sum(len(completion.token_ids) for output in outputs for completion in output.outputs)
    cached = sum(output.num_cached_tokens for output in outputs)
    return dict(
        prompt_tokens=prompt,
        completion_tokens=completion,
        total_tokens=prompt + completion,
        prompt_tokens_details={"cached_tokens": cached},
    )


def completion_logprobs(
    token_ids: list[int], rated: list[dict[int, Logprob] | None], offset: int, first_text: str | None = None
) -> dict:
    """The four lists of the older API.

    Args:
        offset: of the first token in the whole text.
        first_text: of a token that is not rated because it has none before it.
    """
    tokens, logprobs, top, offsets = [], [], [], []
    for token_id, entry in zip(token_ids, rated):
        text = first_text if entry is None else entry[token_id].decoded_token
        tokens.append(text)
        logprobs.append(None if entry is None else _finite(entry[token_id].logprob))
        top.append(None if entry is None else {other.decoded_token: _finite(other.logprob) for other in entry.values()})
        offsets.append(offset)
        offset += len(text)
    return dict(tokens=tokens, token_logprobs=logprobs, top_logprobs=top, text_offset=offsets)


def chat_logprobs(token_ids: list[int], rated: list[dict[int, Logprob]], num_top: int) -> dict:
    """A list of tokens, each with the `num_top` most likely ones in its place."""
    content = []
    for token_id, entry in zip(token_ids, rated):
        likely = sorted((other for other in entry.values() if other.rank <= num_top), key=lambda other: other.rank)
        content.append(_chat_logprob(entry[token_id]) | {"top_logprobs": [_chat_logprob(other) for other in likely]})
    return dict(content=content, refusal=None)


def _chat_logprob(logprob: Logprob) -> dict:
    token = logprob.decoded_token
    return dict(token=token, logprob=_finite(logprob.logprob), bytes=list(token.encode()))


def _finite(logprob: float) -> float:
    """JSON has no infinity; vLLM has this number in its place."""
    return max(logprob, -9999.0)
