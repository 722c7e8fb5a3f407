"""OpenAI's newer API, `/v1/responses`: a request becomes a chat request, and the output becomes items and events.

Nothing is stored, so each request contains the whole conversation. Independent of the engine and of HTTP.
"""

import time
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Discriminator, Field, Tag, model_validator

from flex_nano_vllm.outputs import CompletionDelta, RequestOutput
from flex_nano_vllm.sampling_params import MAX_LOGPROBS, InvalidRequestError
from flex_nano_vllm.server_chat import ChatTurn
from flex_nano_vllm.server_guard import APIError
from flex_nano_vllm.server_protocol import (
    DONE,
    MAX_MESSAGES,
    MAX_PARTS,
    ChatCompletionRequest,
    Closed,
    GenerationRequest,
    JSONObject,
    Name,
    Strict,
    Text,
    chat_logprobs,
    new_call_id,
    new_id,
    server_sent_event,
    unsupported,
)
from flex_nano_vllm.server_tools import MAX_TOOLS, CallArguments, CallStart, TextPiece

# Chat or engine name of a parameter -> name in this API, where the two differ
API_NAMES = {
    "messages": "input",
    "prompt": "input",
    "max_tokens": "max_output_tokens",
    "structured_outputs": "text",
    "response_format": "text",
    "logprobs": "top_logprobs",
}
LOGPROBS = "message.output_text.logprobs"  # the item of `include` that requests log-probabilities


class InputPart(Strict):
    type: Literal["input_text", "output_text", "text", "refusal"]
    text: Text | None = None
    refusal: Text | None = None

    @property
    def content(self) -> str | None:
        return self.refusal if self.type == "refusal" else self.text

    @model_validator(mode="after")
    def _check_content(self):
        if self.content is None:
            raise ValueError(f"a content part of type {self.type} has no text")
        return self


Parts = Annotated[list[InputPart], Field(fail_fast=True, max_length=MAX_PARTS)]


class InputMessage(Strict):
    type: Literal["message"] = "message"
    role: Literal["user", "assistant", "system", "developer"]
    content: Text | Parts


class InputCall(Strict):
    type: Literal["function_call"]
    call_id: Text
    name: Text
    arguments: Text


class InputResult(Strict):
    type: Literal["function_call_output"]
    call_id: Text
    output: Text | Parts


class InputReasoning(Strict):
    """Reasoning of another model, which is ignored."""

    type: Literal["reasoning"]


def _kind(item: Any) -> Any:
    return item.get("type", "message") if isinstance(item, dict) else getattr(item, "type", None)


InputItem = Annotated[
    Annotated[InputMessage, Tag("message")]
    | Annotated[InputCall, Tag("function_call")]
    | Annotated[InputResult, Tag("function_call_output")]
    | Annotated[InputReasoning, Tag("reasoning")],
    Discriminator(_kind),
]


class TextFormat(Closed):
    type: Literal["text", "json_object", "json_schema"]
    name: Text | None = None
    description: Text | None = None
    schema_: JSONObject | None = Field(None, alias="schema")
    strict: bool | None = None

    @model_validator(mode="after")
    def _check_fields(self):
        if self.type == "json_schema" and (self.name is None or self.schema_ is None):
            raise ValueError("type json_schema needs the fields name and schema")
        used = {"text": (), "json_object": ("schema_",)}.get(self.type, ("name", "description", "schema_", "strict"))
        for name in ("name", "description", "schema_", "strict"):
            if getattr(self, name) is not None and name not in used:
                raise ValueError(f"{name.rstrip('_')} is not a field of type {self.type}")
        return self


class TextOptions(Closed):
    format: TextFormat | None = None
    verbosity: Literal["low", "medium", "high"] | None = None  # for models that support it


class FlatTool(Closed):
    type: Literal["function"]
    name: Name
    description: Text | None = None
    parameters: JSONObject | None = None
    strict: bool | None = None


class FlatToolName(Strict):
    type: Literal["function"]
    name: Name


class ResponsesRequest(GenerationRequest):
    input: Text | Annotated[list[InputItem], Field(fail_fast=True, min_length=1, max_length=MAX_MESSAGES)]
    instructions: Text | None = None
    max_output_tokens: Annotated[int, Field(ge=1)] | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    text: TextOptions | None = None
    tools: Annotated[list[FlatTool], Field(fail_fast=True, max_length=MAX_TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | FlatToolName | None = None
    parallel_tool_calls: bool | None = None
    metadata: dict[Text, Text] | None = None
    include: list[Literal["message.output_text.logprobs", "reasoning.encrypted_content"]] | None = None
    reasoning: dict[str, Any] | None = None  # for reasoning models
    store: bool | None = None  # accepted, but the response has `store: false`
    n: unsupported(1) = None
    max_tokens: unsupported() = None  # use `max_output_tokens`
    max_completion_tokens: unsupported() = None
    logprobs: unsupported(False) = None  # use `include`
    response_format: unsupported() = None  # use `text.format`
    previous_response_id: unsupported() = None  # responses are not stored
    conversation: unsupported() = None
    background: unsupported(False) = None
    truncation: unsupported("disabled") = None
    max_tool_calls: unsupported() = None
    prompt: unsupported() = None

    def to_chat(self) -> ChatCompletionRequest:
        """Return the equivalent chat request. Raises pydantic's ValidationError if a chat does not allow its values."""
        fields = self.model_dump(include=set(GenerationRequest.model_fields), exclude_none=True, by_alias=True)
        fields |= dict(messages=self.messages, max_tokens=self.max_output_tokens)
        fields["parallel_tool_calls"] = self.parallel_tool_calls
        if self.top_logprobs or LOGPROBS in (self.include or ()):
            if self.tools and self.tool_choice != "none":  # the logprobs would belong to text and to calls
                message = "log-probabilities cannot be combined with tools in a response: use chat completions"
                raise InvalidRequestError(message, "top_logprobs")
            fields |= dict(logprobs=True, top_logprobs=self.top_logprobs or 0)
        if self.text is not None and self.text.format is not None:
            form = self.text.format.model_dump(by_alias=True, exclude_none=True)
            kind = form.pop("type")
            fields["response_format"] = {"type": kind} | ({"json_schema": form} if kind == "json_schema" else form)
        if self.tools:
            tools = [tool.model_dump(exclude={"type"}, exclude_none=True) for tool in self.tools]
            fields["tools"] = [{"type": "function", "function": tool} for tool in tools]
        choice = self.tool_choice
        named = isinstance(choice, FlatToolName)
        fields["tool_choice"] = {"type": "function", "function": {"name": choice.name}} if named else choice
        return ChatCompletionRequest.model_validate(fields)

    @property
    def messages(self) -> list[dict]:
        """The conversation in the form of a chat.

        Calls become part of the assistant message before them. Consecutive system messages, including the instructions,
        become one message, because most chat templates accept only one.
        """
        messages: list[dict] = []
        if self.instructions is not None:
            messages.append({"role": "system", "content": self.instructions})
        items = [InputMessage(role="user", content=self.input)] if isinstance(self.input, str) else self.input
        for item in items:
            match item:
                case InputMessage():
                    role = "system" if item.role == "developer" else item.role
                    if role == "system" and messages and messages[-1]["role"] == "system":
                        messages[-1]["content"] += f"\n\n{_text(item.content)}"
                    else:
                        messages.append({"role": role, "content": _text(item.content)})
                case InputCall():
                    if not messages or messages[-1]["role"] != "assistant":
                        messages.append({"role": "assistant", "content": ""})
                    call = {"id": item.call_id, "function": {"name": item.name, "arguments": item.arguments}}
                    messages[-1].setdefault("tool_calls", []).append(call)
                case InputResult():
                    messages.append({"role": "tool", "content": _text(item.output), "tool_call_id": item.call_id})
        return messages


def _text(content: str | list[InputPart]) -> str:
    if isinstance(content, str):
        return content
    return "".join(part.content for part in content)


class Response(BaseModel):
    """A response of `/v1/responses`, without the fields that repeat the request."""

    id: str
    object: Literal["response"]
    created_at: int
    status: Literal["completed", "incomplete", "in_progress"]
    model: str
    output: list[dict[str, Any]]
    usage: dict[str, Any] | None


class ResponseWriter:
    """Builds one response: the events of its stream, and the complete response, which the last event contains.

    Args:
        defaults: temperature and top_p if the request does not set them.
    """

    def __init__(self, body: ResponsesRequest, turn: ChatTurn, model: str, defaults: dict[str, Any]):
        self.body, self.turn = body, turn
        choice, text = body.tool_choice or "auto", body.text or TextOptions()
        form = {"type": "text"} if text.format is None else text.format.model_dump(by_alias=True, exclude_none=True)
        if form["type"] == "json_schema":
            form = {"description": None, "strict": None} | form
        self.response: dict[str, Any] = dict(
            id=new_id("resp_"),
            object="response",
            created_at=int(time.time()),
            status="in_progress",
            model=model,
            output=[],
            usage=None,
            error=None,
            incomplete_details=None,
            completed_at=None,
            instructions=body.instructions,
            max_output_tokens=body.max_output_tokens,
            max_tool_calls=None,
            metadata=body.metadata or {},
            parallel_tool_calls=body.parallel_tool_calls is not False,
            previous_response_id=None,
            prompt_cache_key=None,
            reasoning={"effort": None, "summary": None},
            safety_identifier=None,
            service_tier="default",
            store=False,
            background=False,
            temperature=defaults.get("temperature", 1.0) if body.temperature is None else body.temperature,
            top_p=defaults.get("top_p", 1.0) if body.top_p is None else body.top_p,
            presence_penalty=body.presence_penalty or 0.0,
            frequency_penalty=body.frequency_penalty or 0.0,
            top_logprobs=body.top_logprobs or 0,
            text={"format": form} | ({"verbosity": text.verbosity} if text.verbosity else {}),
            tool_choice=choice if isinstance(choice, str) else choice.model_dump(),
            tools=[tool.model_dump() for tool in body.tools or ()],
            truncation="disabled",
        )
        self._item: dict[str, Any] | None = None  # the item that is being written
        self._logprobs: list[dict] = []  # of tokens without complete text
        self._num_events = 0

    def begin(self) -> bytes:
        return self._event("response.created", response=self.response) + self._event(
            "response.in_progress", response=self.response
        )

    def delta(self, index: int, delta: CompletionDelta) -> bytes:
        logprobs = []
        if delta.logprobs is not None:
            logprobs = chat_logprobs(delta.token_ids, delta.logprobs, self.turn.body.num_top)
        return self._take(delta.text, delta.finish_reason, logprobs)

    def whole(self, output: RequestOutput) -> dict:
        """Return the response to a request that was not streamed."""
        (completion,) = output.outputs
        logprobs = []
        if completion.logprobs is not None:
            logprobs = chat_logprobs(completion.token_ids, completion.logprobs, self.turn.body.num_top)
        self._take(completion.text, completion.finish_reason, logprobs)
        self.end([output])
        return self.response

    def end(self, outputs: list[RequestOutput]) -> bytes:
        (output,) = outputs
        events = self._close("completed")
        num_prompt, num_generated = len(output.prompt_token_ids), len(output.outputs[0].token_ids)
        self.response["usage"] = dict(
            input_tokens=num_prompt,
            input_tokens_details={"cached_tokens": output.num_cached_tokens, "cache_write_tokens": 0},
            output_tokens=num_generated,
            output_tokens_details={"reasoning_tokens": 0},
            total_tokens=num_prompt + num_generated,
        )
        self.response["completed_at"] = int(time.time())
        if self.response["status"] == "in_progress":
            self.response["status"] = "completed"
        return events + self._event(f"response.{self.response['status']}", response=self.response) + DONE

    def fail(self, error: APIError) -> bytes:
        details = error.body["error"]
        return self._event("error", **details | {"type": "error"}, error=details) + DONE

    def _take(self, text: str, finish_reason: str | None, logprobs: list[dict]) -> bytes:
        """Return the events of new text, and of the end if there is a finish_reason. Logprobs come with the text."""
        events = b""
        self._logprobs += logprobs
        for piece in self.turn.pieces(0, text, finish_reason is not None):
            match piece:
                case TextPiece():
                    if self._item is None or self._item["type"] != "message":
                        events += self._close("completed") + self._open_message()
                    events += self._say(piece.text)
                case CallStart():
                    events += self._close("completed") + self._open_call(piece.name)
                case CallArguments():
                    self._item["arguments"] += piece.text
                    events += self._item_event("response.function_call_arguments.delta", delta=piece.text)
        if finish_reason is not None:
            if not self.response["output"] and self._item is None:  # an empty output is a message without text
                events += self._open_message()
            if self._logprobs and self._item is not None:  # of an EOS token, or of an incomplete character
                events += self._say("")
            if finish_reason in ("length", "abort"):
                self.response |= dict(status="incomplete", incomplete_details={"reason": "max_output_tokens"})
            status = self.response["status"]
            if self._item is not None and self._item["type"] == "function_call":
                status = "completed" if self.turn.ends_with_calls(0) else "incomplete"
            events += self._close(status)
        return events

    def _open_message(self) -> bytes:
        part = dict(type="output_text", text="", annotations=[], logprobs=[])
        self._item = dict(type="message", id=new_id("msg_"), status="in_progress", role="assistant", content=[])
        events = self._event("response.output_item.added", output_index=self._index, item=self._item)
        events += self._item_event("response.content_part.added", content_index=0, part=part)
        self._item["content"].append(part)
        return events

    def _say(self, text: str) -> bytes:
        (part,), logprobs, self._logprobs = self._item["content"], self._logprobs, []
        part["text"] += text
        part["logprobs"] += logprobs
        return self._item_event("response.output_text.delta", content_index=0, delta=text, logprobs=logprobs)

    def _open_call(self, name: str) -> bytes:
        ids = dict(id=new_id("fc_"), call_id=new_call_id())
        self._item = dict(type="function_call", **ids, name=name, arguments="", status="in_progress")
        return self._event("response.output_item.added", output_index=self._index, item=self._item)

    def _close(self, status: str) -> bytes:
        """End the current item, if there is one, and return its events."""
        if self._item is None:
            return b""
        if self._item["type"] == "message":
            (part,) = self._item["content"]
            events = self._item_event(
                "response.output_text.done", content_index=0, text=part["text"], logprobs=part["logprobs"]
            )
            events += self._item_event("response.content_part.done", content_index=0, part=part)
        else:
            arguments, name = self._item["arguments"], self._item["name"]
            events = self._item_event("response.function_call_arguments.done", arguments=arguments, name=name)
        self._item["status"] = "completed" if status == "in_progress" else status
        events += self._event("response.output_item.done", output_index=self._index, item=self._item)
        self.response["output"].append(self._item)
        self._item = None
        return events

    @property
    def _index(self) -> int:
        return len(self.response["output"])

    def _item_event(self, kind: str, /, **fields: Any) -> bytes:
        return self._event(kind, item_id=self._item["id"], output_index=self._index, **fields)

    def _event(self, kind: str, /, **fields: Any) -> bytes:
        self._num_events += 1
        return server_sent_event({"type": kind, "sequence_number": self._num_events - 1} | fields, kind)
