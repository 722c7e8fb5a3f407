"""Answers of chats and completions. Independent of HTTP.

`ChatTurn` is the common part of chats and responses: tools become a grammar, and the output becomes text and calls.
The writers give the chunks of streamed completions and chats. A chunk is one event of a stream here.
"""

from dataclasses import replace
from importlib.util import find_spec
from typing import Protocol

from transformers import PreTrainedTokenizerBase

from flex_nano_vllm.async_inference import Submission
from flex_nano_vllm.detokenizer import OffsetCounter, TextWriter, echo, token_bytes, token_name
from flex_nano_vllm.grammar import WHITESPACE_PATTERN, json_rule, string_limit
from flex_nano_vllm.input_processor import InputProcessor
from flex_nano_vllm.outputs import CompletionDelta, CompletionOutput, RequestOutput
from flex_nano_vllm.sampling_params import InvalidRequestError, SamplingParams, StructuredOutputsParams
from flex_nano_vllm.server_guard import APIError
from flex_nano_vllm.server_protocol import (
    DONE,
    ChatCompletionRequest,
    CompletionRequest,
    Envelope,
    chat_logprobs,
    completion_logprobs,
    ending,
    new_call_id,
    server_sent_event,
    tool_call,
    usage,
    usage_of,
)
from flex_nano_vllm.server_tools import (
    CallArguments,
    CallForm,
    CallParser,
    CallStart,
    Piece,
    TextPiece,
    first_invalid_tool,
    tools_grammar,
    visible_added_tokens,
)


def with_tools(
    params: SamplingParams, body: ChatCompletionRequest, form: CallForm, input_processor: InputProcessor
) -> SamplingParams:
    """Return the parameters, with the grammar of valid calls if the request or the form of the calls needs one."""
    response_format, limit = body.response_format, string_limit(input_processor.geometry.max_request_tokens)
    text_rule = None
    if response_format is not None and response_format.type != "text" and not body.needs_call:
        if response_format.type == "regex":
            message = "response_format of type regex cannot be combined with tools"
            raise InvalidRequestError(message, "response_format")
        pattern = response_format.whitespace_pattern
        try:
            text_rule = json_rule(
                response_format.json_source, WHITESPACE_PATTERN if pattern is None else pattern, limit
            )
        except ValueError as error:
            raise InvalidRequestError(str(error), "response_format") from error
    if not (body.needs_call or text_rule or find_spec("llguidance")):  # calls can be parsed without a grammar
        return params
    try:
        added_tokens = visible_added_tokens(input_processor.tokenizer)
        grammar = tools_grammar(
            form, body.callable_tools, body.needs_call, body.max_calls, text_rule, limit, added_tokens
        )
        if grammar is not None:
            _check(grammar, form, body, input_processor)
    except InvalidRequestError:
        raise
    except (ValueError, ImportError) as error:
        raise InvalidRequestError(f"tools: {error}", "tools") from error
    if grammar is None:
        return params
    return replace(params, structured_outputs=StructuredOutputsParams(grammar=grammar))


def _check(grammar: str, form: CallForm, body: ChatCompletionRequest, input_processor: InputProcessor) -> None:
    """Compile the grammar, so that the engine finds it compiled. If that fails, name the tool that causes the error."""
    try:
        input_processor.check_grammar(grammar)
    except ValueError as error:
        found = first_invalid_tool(
            form, body.callable_tools, lambda rule: input_processor.check_grammar(f"start: {rule}")
        )
        if found is None and body.response_format is not None:
            raise InvalidRequestError(f"response_format: {error}", "response_format") from error
        name, reason = found or ("all tools together", error)
        raise ValueError(f"the parameters of {name}: {reason}") from error


class ChatTurn:
    """The request of a chat, and the parsers of its output."""

    def __init__(self, submission: Submission, body: ChatCompletionRequest, form: CallForm):
        self.submission, self.body, self.form = submission, body, form
        self._parsers: dict[int, CallParser] = {}  # by choice

    def pieces(self, index: int, text: str, is_complete: bool) -> list[Piece]:
        """Return the text and the calls in new text of a choice."""
        if not self.body.known_tools:
            return [TextPiece(text)] if text else []
        if index not in self._parsers:
            self._parsers[index] = CallParser(self.form, set(self.body.callable_tools), self.body.max_calls)
        return self._parsers[index].feed(text, is_complete)

    def ends_with_calls(self, index: int) -> bool:
        """Return whether a choice has calls, all of them complete so far."""
        parser = self._parsers.get(index)
        return parser is not None and 0 < parser.num_calls == parser.num_complete_calls

    def message(self, index: int, text: str) -> dict:
        """Return the complete message of a choice."""
        content, calls = "", []
        for piece in self.pieces(index, text, is_complete=True):
            match piece:
                case TextPiece():
                    content += piece.text
                case CallStart():
                    calls.append(tool_call(new_call_id(), piece.name, ""))
                case CallArguments():
                    calls[piece.index]["function"]["arguments"] += piece.text
        message = dict(
            role="assistant",
            content=content if content or not calls else None,
            refusal=None,
            annotations=[],
        )
        return message | ({"tool_calls": calls} if calls else {})


class EventWriter(Protocol):
    """Converts the output of requests to the events of their stream."""

    def begin(self) -> bytes:
        """Return the events before the first delta."""

    def delta(self, index: int, delta: CompletionDelta) -> bytes:
        """Return the events of a delta of the request number `index`."""

    def end(self, outputs: list[RequestOutput]) -> bytes:
        """Return the events after the last delta."""

    def fail(self, error: APIError) -> bytes:
        """Return the events that end a stream after a request has failed."""


class ChunkWriter:
    """Writes a stream of chunks with one choice each, then the usage if the client requests it."""

    def __init__(
        self,
        kind: str,
        prefix: str,
        model: str,
        body: CompletionRequest | ChatCompletionRequest,
        submission: Submission,
    ):
        self.body, self.submission = body, submission
        self._envelope = Envelope(kind, prefix, model)
        self._num_generated = 0

    def begin(self) -> bytes:
        return b""

    def delta(self, index: int, delta: CompletionDelta) -> bytes:
        self._num_generated += len(delta.token_ids)
        used = {"usage": None} if self.body.includes_usage else {}
        if self.body.includes_usage_always:
            used = {"usage": usage(self.submission.num_prompt_tokens, self._num_generated)}
        chunks = [self._envelope.with_choices([choice], **used) for choice in self.choices(index, delta)]
        return b"".join(map(server_sent_event, chunks))

    def choices(self, index: int, delta: CompletionDelta) -> list[dict]:
        """Return the choices of a delta, one for each chunk."""
        raise NotImplementedError

    def end(self, outputs: list[RequestOutput]) -> bytes:
        if not self.body.includes_usage:
            return DONE
        return server_sent_event(self._envelope.with_choices([], usage=usage_of(outputs))) + DONE

    def fail(self, error: APIError) -> bytes:
        return error.last_events


def as_requested(body: CompletionRequest, output: RequestOutput) -> RequestOutput:
    """Return the part of an output that the response contains: no tokens if `max_tokens` is 0."""
    if body.max_tokens != 0:
        return output
    return replace(output, outputs=[without_tokens(completion) for completion in output.outputs])


def without_tokens(item: CompletionDelta | CompletionOutput) -> CompletionDelta | CompletionOutput:
    """Return an output without the one token that the engine generates at least."""
    logprobs = None if item.logprobs is None else []
    reason = item.finish_reason and "length"
    return replace(item, text="", token_ids=[], logprobs=logprobs, finish_reason=reason, stop_reason=None)


class CompletionTexts:
    """Builds the text and logprobs of the choices of one prompt, complete or delta by delta.

    The first part of each choice includes the text and logprobs of the prompt if the request has `echo`.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, body: CompletionRequest, params: SamplingParams, output: RequestOutput
    ):
        self._tokenizer, self._params, self._output, self._echoes = tokenizer, params, output, bool(body.echo)
        skip, prompt = params.skip_special_tokens, output.prompt_token_ids
        self._echo, self._offsets = echo(tokenizer, output.prompt, prompt, skip) if body.echo else ("", [])
        first = token_bytes(tokenizer, prompt[0], skip_special_tokens=False, begins_text=True)
        self._first_name = token_name(first)
        self._counters: dict[int, OffsetCounter] = {}  # by choice, from its first tokens on

    def choice(self, new: CompletionOutput | CompletionDelta) -> dict:
        """Return the text, logprobs and finish_reason of a delta or of a complete output."""
        text, token_ids, rated = new.text, new.token_ids, new.logprobs
        is_first = new.index not in self._counters
        if is_first:
            skip, prompt = self._params.skip_special_tokens, self._output.prompt_token_ids
            has_own_start = self._params.structured_outputs is not None
            writer = TextWriter(self._tokenizer, skip, prompt, has_own_start)
            self._counters[new.index] = OffsetCounter(writer, len(self._echo))
        offsets = self._counters[new.index].take(token_ids) if rated is not None else []
        if is_first and self._echoes:
            text = self._echo + text
            if rated is not None:
                token_ids = self._output.prompt_token_ids + token_ids
                rated = self._output.prompt_logprobs + rated
                offsets = self._offsets + offsets
        logprobs = None if rated is None else completion_logprobs(token_ids, rated, offsets, self._first_name)
        return dict(text=text, logprobs=logprobs) | ending(new)


class CompletionChunks(ChunkWriter):
    """The stream of `/v1/completions`."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        model: str,
        body: CompletionRequest,
        params: SamplingParams,
        submission: Submission,
    ):
        super().__init__("text_completion", "cmpl-", model, body, submission)
        self.tokenizer, self.params = tokenizer, params
        self._texts: dict[int, CompletionTexts] = {}  # by prompt

    def delta(self, index: int, delta: CompletionDelta) -> bytes:
        return super().delta(index, without_tokens(delta) if self.body.max_tokens == 0 else delta)

    def choices(self, index: int, delta: CompletionDelta) -> list[dict]:
        if index not in self._texts:
            output = self.submission.so_far(index)
            self._texts[index] = CompletionTexts(self.tokenizer, self.body, self.params, output)
        return [dict(index=index * self.params.n + delta.index) | self._texts[index].choice(delta)]

    def end(self, outputs: list[RequestOutput]) -> bytes:
        return super().end([as_requested(self.body, output) for output in outputs])


class ChatChunks(ChunkWriter):
    """The stream of `/v1/chat/completions`."""

    def __init__(self, model: str, turn: ChatTurn):
        super().__init__("chat.completion.chunk", "chatcmpl-", model, turn.body, turn.submission)
        self.turn = turn
        self._begun: set[int] = set()

    def choices(self, index: int, delta: CompletionDelta) -> list[dict]:
        pieces = self.turn.pieces(delta.index, delta.text, delta.finish_reason is not None)
        contents = [_content(piece) for piece in pieces]
        if delta.index not in self._begun:
            self._begun.add(delta.index)
            contents.insert(0, {"role": "assistant", "content": ""})
        logprobs = None
        if delta.logprobs is not None:
            content = chat_logprobs(delta.token_ids, delta.logprobs, self.turn.body.num_top)
            logprobs = dict(content=content, refusal=None) if content else None
        if logprobs or delta.finish_reason or not contents:
            contents += [{}] if not contents or "role" in contents[-1] else []
        choices = [dict(index=delta.index, delta=content, logprobs=None, finish_reason=None) for content in contents]
        choices[-1] |= {"logprobs": logprobs} | ending(delta, self.turn.ends_with_calls(delta.index))
        return choices


def _content(piece: Piece) -> dict:
    if isinstance(piece, TextPiece):
        return {"content": piece.text}
    if isinstance(piece, CallStart):
        return {"tool_calls": [{"index": piece.index} | tool_call(new_call_id(), piece.name, "")]}
    return {"tool_calls": [{"index": piece.index, "function": {"arguments": piece.text}}]}
