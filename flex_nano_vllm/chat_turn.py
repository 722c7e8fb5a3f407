"""The common part of chats and responses: tools become a grammar, and the output becomes text and calls. Independent of
HTTP.
"""

from dataclasses import replace
from importlib.util import find_spec

from flex_nano_vllm.async_inference import Submission
from flex_nano_vllm.grammar import WHITESPACE_PATTERN, json_rule, string_limit
from flex_nano_vllm.input_processor import InputProcessor
from flex_nano_vllm.protocol import ChatCompletionRequest
from flex_nano_vllm.replies import new_call_id, tool_call
from flex_nano_vllm.sampling_params import InvalidRequestError, SamplingParams, StructuredOutputsParams
from flex_nano_vllm.tools import (
    CallArguments,
    CallForm,
    CallParser,
    CallStart,
    Piece,
    TextPiece,
    culprit,
    tools_grammar,
    visible_added_tokens,
)


def with_tools(
    params: SamplingParams, body: ChatCompletionRequest, form: CallForm, input_processor: InputProcessor
) -> SamplingParams:
    """Return the parameters, with the grammar of valid calls if the request or the form of the calls needs one."""
    response_format, limit = body.response_format, string_limit(input_processor.geometry.max_request_tokens)
    otherwise = None
    if response_format is not None and response_format.type != "text" and not body.needs_call:
        if response_format.type == "regex":
            message = "response_format of type regex cannot be combined with tools"
            raise InvalidRequestError(message, "response_format")
        pattern = response_format.whitespace_pattern
        try:
            otherwise = json_rule(
                response_format.json_source, WHITESPACE_PATTERN if pattern is None else pattern, limit
            )
        except ValueError as error:
            raise InvalidRequestError(str(error), "response_format") from error
    if not (body.needs_call or otherwise or find_spec("llguidance")):  # calls can be parsed without a grammar
        return params
    try:
        added_tokens = visible_added_tokens(input_processor.tokenizer)
        grammar = tools_grammar(
            form, body.callable_tools, body.needs_call, body.max_calls, otherwise, limit, added_tokens
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
        found = culprit(form, body.callable_tools, lambda rule: input_processor.check_grammar(f"start: {rule}"))
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
        said, calls = "", []
        for piece in self.pieces(index, text, is_complete=True):
            match piece:
                case TextPiece():
                    said += piece.text
                case CallStart():
                    calls.append(tool_call(new_call_id(), piece.name, ""))
                case CallArguments():
                    calls[piece.index]["function"]["arguments"] += piece.text
        message = dict(role="assistant", content=said if said or not calls else None, refusal=None, annotations=[])
        return message | ({"tool_calls": calls} if calls else {})
