"""What the requests of the OpenAI API may hold. Knows no engine and no HTTP.

Fields that vLLM adds to OpenAI's have vLLM's names. What OpenAI has and this server does not is refused by name if a
client asks for it; unknown fields of a request are ignored, because OpenAI's clients send new ones every month. Numbers
are strict: `true` and "2" are no ints, NaN and Infinity are no numbers.
"""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema, model_validator
from pydantic_core import PydanticCustomError

from flex_nano_vllm.sampling_params import (
    MAX_LOGIT_BIAS,
    MAX_LOGPROBS,
    MAX_SEED,
    MIN_SEED,
    InvalidRequestError,
    SamplingParams,
    StructuredOutputsParams,
)
from flex_nano_vllm.tools import MAX_CALLS, MAX_TOOLS, tool_schemas

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
            raise PydanticCustomError("unsupported", "is not supported")
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


class Closed(Strict):
    """An object of which every field is looked at."""

    model_config = ConfigDict(extra="forbid")


class StreamOptions(Strict):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None  # in every chunk


class JSONSchema(Closed):
    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] | bool | None = Field(None, alias="schema")
    strict: bool | None = None  # schemas are always followed


class ResponseFormat(Closed):
    """OpenAI's three types, and `regex`."""

    type: Literal["text", "json_object", "json_schema", "regex"]
    json_schema: JSONSchema | None = None
    schema_: dict[str, Any] | bool | None = Field(None, alias="schema")  # of json_object, as llama.cpp has it
    regex: str | None = None
    whitespace_pattern: str | None = None  # between the symbols of JSON; vLLM's name

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
                raise ValueError(f"{name.rstrip('_')} is no field of type {self.type}")
        if self.type in ("json_schema", "regex") and getattr(self, self.type) is None:
            raise ValueError(f"type {self.type} needs {self.type}")
        return self

    @property
    def json_source(self) -> dict[str, Any] | str | None:
        """The schema that the answer has to fit; None where it needs not be JSON."""
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
    """What completions and chats have in common. None stands for the default."""

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

    def sampling_params(self, defaults: dict[str, Any], **others: Any) -> SamplingParams:
        """Raises ValueError, as `SamplingParams` does.

        Args:
            defaults: of `SamplingParams`, for what the request does not say.
            others: what the request says in fields of other names.
        """
        given = {name: getattr(self, name) for name in self.SAME if getattr(self, name) is not None}
        if self.logit_bias:
            try:
                given["logit_bias"] = {int(token_id): bias for token_id, bias in self.logit_bias.items()}
            except ValueError:
                raise InvalidRequestError("logit_bias must be an object by token ids", "logit_bias") from None
        if self.response_format is not None:
            given["structured_outputs"] = self.response_format.structured_outputs()
        stated = {name for name, value in (given | others).items() if value is not None}
        merged = defaults | given | others
        least, most = merged.get("min_tokens", 0), merged.get("max_tokens")
        if most is not None and least > most and not {"min_tokens", "max_tokens"} <= stated:  # a default gives way
            merged["max_tokens" if "min_tokens" in stated else "min_tokens"] = least if "min_tokens" in stated else most
        return SamplingParams(**merged)

    @property
    def includes_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def includes_usage_always(self) -> bool:
        """Whether every chunk of a stream tells what has been used so far."""
        return bool(self.includes_usage and self.stream_options.continuous_usage_stats)


class CompletionRequest(GenerationRequest):
    # Left to right: else each of many tokens would be tried as a text as well.
    prompt: Annotated[
        str
        | Annotated[TokenIds, Field(min_length=1)]
        | Annotated[list[str], Field(fail_fast=True, min_length=1, max_length=MAX_PROMPTS)]
        | Annotated[list[TokenIds], Field(fail_fast=True, min_length=1, max_length=MAX_PROMPTS)],
        Field(union_mode="left_to_right"),
    ]
    max_tokens: Annotated[int, Field(ge=0)] | None = None  # 0: the prompt only, which `echo` and `logprobs` rate
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
        # A prompt that the answer does not show is not rated.
        prompt_logprobs = self.logprobs if self.echo else None
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
        """What it says."""
        calls = [call.function.name + call.function.arguments for call in self.tool_calls or ()]
        if isinstance(self.content, list):
            return [part.text or "" for part in self.content] + calls
        return [self.content or "", *calls]

    def to_dict(self) -> dict:
        message = self.model_dump(exclude_none=True)
        # OpenAI's newer word, which templates do not know.
        return message | {"role": "system"} if self.role == "developer" else message


Name = Annotated[str, Field(pattern="^[a-zA-Z0-9_-]{1,64}$")]


class Function(Closed):
    name: Name
    description: Text | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None  # schemas are always followed, where the model's form of a call lets a grammar do it


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
    # Of models that reason; others ignore it, here as at OpenAI.
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None
    chat_template: unsupported() = None  # a program: a client must not send one
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
        return self.sampling_params(defaults, logprobs=num_top, **limit)  # None: as many as fit

    @property
    def known_tools(self) -> list[dict]:
        """The tools that the model is told of, in OpenAI's form."""
        if self.tool_choice == "none":
            return []
        return [tool.model_dump(exclude_none=True, exclude={"function": {"strict"}}) for tool in self.tools or ()]

    @property
    def callable_tools(self) -> dict[str, dict]:
        """The schemas of the tools that may be called, by name."""
        schemas = tool_schemas(self.known_tools)
        if isinstance(self.tool_choice, NamedTool):
            return {self.tool_choice.function.name: schemas[self.tool_choice.function.name]}
        return schemas

    @property
    def max_calls(self) -> int:
        """Of one answer. Where a call must come, one does, unless the client wants more: a weak model would go on."""
        is_parallel = self.parallel_tool_calls
        if is_parallel is None:
            is_parallel = not self.needs_call
        return MAX_CALLS if is_parallel else 1

    @property
    def needs_call(self) -> bool:
        """Whether the answer must be a call."""
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
            raise ValueError("exactly one of prompt and messages is needed")
        return self


class DetokenizeRequest(Strict):
    model: str | None = None
    tokens: TokenIds
