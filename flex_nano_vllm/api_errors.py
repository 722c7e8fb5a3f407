"""Errors in OpenAI's format, and the conversion of exceptions to them. Independent of requests and endpoints."""

import json
import logging
import re
from collections.abc import Sequence

from pydantic_core import ErrorDetails
from starlette.responses import JSONResponse

from flex_nano_vllm.async_inference import EngineBusy, EngineClosing, EngineDead, EngineError
from flex_nano_vllm.protocol import MAX_PROMPTS
from flex_nano_vllm.replies import DONE, server_sent_event
from flex_nano_vllm.sampling_params import InvalidRequestError

logger = logging.getLogger(__name__)

MAX_MESSAGE_LEN = 400  # characters; some messages quote the invalid value, which may be long
# Engine name -> API name, where the two differ
API_NAMES = {"structured_outputs": "response_format"}
# Errors do not repeat the values of these parameters
PRIVATE = {
    *("prompt", "suffix", "messages", "input", "instructions", "tools", "response_format", "text"),
    *("user", "metadata", "cache_salt"),
}


class APIError(Exception):
    """An error in OpenAI's format."""

    def __init__(self, status: int, message: str, code: str | None = None, param: str | None = None):
        super().__init__(message if len(message) <= MAX_MESSAGE_LEN else f"{message[:MAX_MESSAGE_LEN]}…")
        self.status, self.param = status, param
        self.code = "invalid_value" if code is None and status == 400 else code

    @property
    def body(self) -> dict:
        kinds = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
        kind = kinds.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}

    @property
    def last_events(self) -> bytes:
        """The events that end a failed stream."""
        return server_sent_event(self.body) + DONE

    def response(self) -> JSONResponse:
        retry = {"Retry-After": "1"} if self.status == 429 else {"Retry-After": "10"} if self.status == 503 else {}
        return JSONResponse(self.body, self.status, headers=retry)


def api_error(error: Exception, names: dict[str, str] | None = None) -> APIError:
    """Convert an exception to the error that the client gets.

    Args:
        names: the endpoint's names of parameters, by their names elsewhere.
    """
    names = API_NAMES | (names or {})
    match error:
        case APIError():
            return APIError(error.status, _renamed(str(error), names), error.code, names.get(error.param, error.param))
        case EngineBusy():
            return APIError(429, str(error), "queue_full")
        case EngineClosing():
            return APIError(503, str(error), "shutting_down")
        case EngineDead():
            return APIError(503, "the engine has died", "engine_dead")
        case EngineError():
            return APIError(500, str(error), "engine_error")
        case InvalidRequestError():
            return APIError(400, _renamed(str(error), names), error.code, names.get(error.param, error.param))
        case ValueError():
            return APIError(400, str(error))
    logger.error("an unexpected error", exc_info=error)
    return APIError(500, "internal error", "internal_error")


def _renamed(message: str, names: dict[str, str]) -> str:
    """Return a message with the endpoint's parameter names. Names without an underscore stay: they may be words."""
    pattern = "|".join(rf"\b{name}\b" for name in names if "_" in name)
    return re.sub(pattern, lambda match: names[match[0]], message)


# pydantic adds the name of a union's branch to the location of an error.
TYPE_NAMES = {"str", "int", "float", "bool", "list", "dict"}
ITEM_TAGS = {"message", "function_call", "function_call_output", "reasoning"}  # follow the index of an input item


def invalid_fields(errors: Sequence[ErrorDetails]) -> APIError:
    """Return the error for an invalid body. Its message names the field, the value and the limit."""
    error = _most_telling(errors)
    kind, place = error["type"], [part for part in error["loc"] if part != "body"]
    if kind == "json_invalid":
        return APIError(400, f"the body is not valid JSON: {error['ctx']['error']}", "invalid_json")
    if kind == "invalid_field":
        return APIError(400, error["msg"], param=error["ctx"]["param"])
    if not place:
        return APIError(400, "the body must be a JSON object", "invalid_json")
    of_items = {i + 1 for i, part in enumerate(place) if isinstance(part, int) and place[0] == "input"}
    fields = [
        str(part) for i, part in enumerate(place) if not _is_branch(part) and not (i in of_items and part in ITEM_TAGS)
    ]
    if "logit_bias" in fields:  # its keys come from the client and are no field names
        fields = fields[:1]
    param = fields[0] if fields else None
    of_prompt = [other for other in errors if "prompt" in other["loc"][:2]]
    is_union = any(_is_branch(part) for part in place)
    if param == "prompt" and is_union and all(other["type"].endswith(("_type", "too_short")) for other in of_prompt):
        forms = f"a text or a list of token ids, or a list of up to {MAX_PROMPTS} texts or token id lists"
        return APIError(400, f"prompt must be {forms}", param=param)
    message = error["msg"].removeprefix("Value error, ").replace(" found using _kind()", "")
    if kind.endswith("_type") and _is_branch(error["loc"][-1]):  # name the types of all branches of the union
        branches = [other["msg"] for other in errors if other["loc"][:-1] == error["loc"][:-1]]
        message = " or ".join([branches[0], *(branch.removeprefix("Input should be ") for branch in branches[1:])])
    message = re.sub(r"(dictionary|object)( or instance of \w+| or object to extract fields from)?", "object", message)
    if kind == "union_tag_not_found":
        message = "Input should be an object with a type or a role"
    value = error.get("input")
    is_public = param not in PRIVATE or (fields[-1] == "type" and kind == "literal_error")
    if is_public and isinstance(value, bool | int | float | str):
        message += f", got {json.dumps(value) if isinstance(value, bool) else repr(value)[:50]}"
    codes = {"missing": "missing_required_parameter", "unsupported": "unsupported_parameter"}
    return APIError(400, f"{'.'.join(fields)}: {message}" if fields else message, codes.get(kind), param)


def _is_branch(part: str | int) -> bool:
    """Return whether a part of an error location names a branch of a union, and not a field."""
    is_name = isinstance(part, int) or (part.isidentifier() and part[0].islower())
    return not is_name or part in TYPE_NAMES


def _most_telling(errors: Sequence[ErrorDetails]) -> ErrorDetails:
    """Return the most useful error of the first invalid field.

    pydantic reports every branch of a union. A value that breaks a limit of one branch is a better explanation than the
    wrong type for another branch.
    """

    def field(error: ErrorDetails) -> tuple:
        return tuple(part for part in error["loc"] if part != "body")[:1]

    of_first_field = [error for error in errors if field(error) == field(errors[0])]
    return max(of_first_field, key=lambda error: (not error["type"].endswith("_type"), len(error["loc"])))
