"""Checks before all endpoints: the API key, the size of a request and the time it takes. Errors in OpenAI's format.

Depends on no endpoints except the public paths.
"""

import asyncio
import hashlib
import hmac
import json
import logging
import re
import uuid
from collections.abc import Sequence
from contextvars import ContextVar
from dataclasses import dataclass

import anyio
import h11
from pydantic_core import ErrorDetails
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from flex_nano_vllm.async_inference import EngineBusy, EngineClosing, EngineDead, EngineError
from flex_nano_vllm.sampling_params import InvalidRequestError
from flex_nano_vllm.server_protocol import DONE, MAX_PROMPTS, server_sent_event

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


PUBLIC_PATHS = {"/", "/health"}
ERROR_EVENT_TIMEOUT = 1.0  # seconds for a client to read the error at the end of its stream
# Method with path, and id, of the request that the current task serves.
_current_request: ContextVar[tuple[str, str]] = ContextVar("current_request", default=("", ""))
HEAD_TIMEOUT = 30.0  # seconds from the connection, or the first byte of a later request, to the end of the headers


@dataclass(frozen=True)
class Limits:
    """Limits of one request."""

    max_body_bytes: int = 2 * 2**20
    request_timeout: float = 600.0  # seconds, from the request's headers to the last byte of the response


class Guard:
    """Middleware that checks the API key, the type and size of the body, and the time that a request takes.

    It also adds a request id to each response, and logs each error response.
    """

    def __init__(self, app: ASGIApp, api_key: str | None, limits: Limits):
        self.app, self.limits = app, limits
        self.key_digest = None if api_key is None else hashlib.sha256(api_key.encode()).digest()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        headers = dict(scope["headers"])
        request_id = _request_id(headers)
        _current_request.set((f"{scope['method']} {scope['path'][:100]!r}", request_id))
        answer = _Answer(request_id, send)
        if scope["path"] not in PUBLIC_PATHS and not self.is_allowed(headers):
            error = APIError(401, "the API key is missing or wrong: send Authorization: Bearer KEY", "invalid_api_key")
            return await error.response()(scope, receive, answer.send)
        if scope["method"] == "HEAD":  # the same as GET; uvicorn omits the body
            scope = scope | {"method": "GET"}
        try:
            check_media(headers)
            with anyio.fail_after(self.limits.request_timeout):
                body = await self.body(receive, headers)
                await self.app(scope, _replayed(body, receive), answer.send)
        except APIError as error:
            await error.response()(scope, receive, answer.send)
        except TimeoutError:
            error = APIError(503, f"the request took more than the limit of {self.limits.request_timeout} s", "timeout")
            if not answer.has_started:
                await error.response()(scope, receive, answer.send)
                return
            log_error(error.status, str(error))
            if answer.is_stream:
                with anyio.move_on_after(ERROR_EVENT_TIMEOUT):  # a client that does not read would block forever
                    await answer.send({"type": "http.response.body", "body": error.last_events})
        except Exception as error:
            if answer.has_started:
                raise
            await api_error(error).response()(scope, receive, answer.send)

    def is_allowed(self, headers: dict[bytes, bytes]) -> bool:
        if self.key_digest is None:
            return True
        scheme, _, key = headers.get(b"authorization", b"").partition(b" ")
        is_same = hmac.compare_digest(hashlib.sha256(key).digest(), self.key_digest)  # in constant time
        return is_same and scheme.lower() == b"bearer"

    async def body(self, receive: Receive, headers: dict[bytes, bytes]) -> bytes:
        """Return the whole body. Read and discard a body that is too large, so that the client can read the error."""
        most, parts, num_bytes = self.limits.max_body_bytes, [], 0
        length = headers.get(b"content-length", b"0")
        is_too_large = not length.isdigit() or int(length) > most
        more = True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return b""
            num_bytes += len(message.get("body", b""))
            is_too_large |= num_bytes > most
            if is_too_large:
                parts.clear()
            else:
                parts.append(message.get("body", b""))
            more = message.get("more_body", False) and num_bytes <= 64 * most
        if is_too_large:
            raise APIError(413, f"the body is larger than the limit of {most} bytes", "body_too_large")
        return b"".join(parts)


class _Answer:
    """Sends a response: adds the request id to its headers, and logs it if it is an error."""

    def __init__(self, request_id: str, send: Send):
        self._request_id, self._send = request_id, send
        self.has_started = self.is_stream = False
        self._status = 0

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.has_started, self._status = True, message["status"]
            self.is_stream = dict(message["headers"]).get(b"content-type", b"").startswith(b"text/event-stream")
            headers = [*message["headers"], (b"x-request-id", self._request_id.encode())]
            message = message | {"headers": headers}
        elif self._status >= 400:
            self._log(message.get("body", b""))
            self._status = 0  # log once
        await self._send(message)

    def _log(self, body: bytes) -> None:
        """Log one line. Error messages contain no prompt (see `api_error`)."""
        try:
            reason = json.loads(body)["error"]["message"]
        except (ValueError, LookupError, TypeError):
            reason = ""
        log_error(self._status, reason)


def log_error(status: int, reason: str) -> None:
    """Log one line about the current request, whose response or stream is an error."""
    request, request_id = _current_request.get()
    level = logging.WARNING if status >= 500 else logging.INFO
    logger.log(level, "%s: %s %s (%s)", request, status, " ".join(reason.split()), request_id)


def _request_id(headers: dict[bytes, bytes]) -> str:
    """Return the client's own request id if it has 1 to 128 printable ASCII characters, else a new one."""
    given = headers.get(b"x-request-id", b"").decode("latin-1")
    return given if re.fullmatch("[!-~]{1,128}", given) else f"req_{uuid.uuid4().hex}"


def check_media(headers: dict[bytes, bytes]) -> None:
    """Raise APIError if the headers declare a body that is not JSON, or that is compressed."""
    has_body = b"transfer-encoding" in headers or headers.get(b"content-length", b"0") != b"0"
    kind = headers.get(b"content-type", b"").decode("latin-1").partition(";")[0].strip().lower()
    if has_body and not re.fullmatch(r"application/([a-z0-9.+-]+\+)?json", kind):
        got = f"got {kind[:100]!r}" if kind else "but it is missing"
        raise APIError(415, f"Content-Type must be application/json, {got}", "unsupported_media_type")
    encoding = headers.get(b"content-encoding", b"identity").decode("latin-1").strip().lower()
    if encoding not in ("identity", ""):
        message = f"Content-Encoding {encoding[:100]!r} is not supported: send the body uncompressed"
        raise APIError(415, message, "unsupported_media_type")


def _replayed(body: bytes, receive: Receive) -> Receive:
    messages = iter([{"type": "http.request", "body": body, "more_body": False}])

    async def replay() -> Message:
        return next(messages, None) or await receive()

    return replay


class HeaderTimeoutH11(H11Protocol):
    """Uvicorn's HTTP protocol, which here closes a connection that does not send the headers of a request in time.

    It uses the parser in pure Python, because uvicorn's other parser, httptools, accepts headers of 50 MB.
    """

    _head_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        self._head_timer = self.loop.call_later(HEAD_TIMEOUT, transport.close)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        is_waiting = self.conn.their_state is h11.IDLE  # the head is not complete
        if self._head_timer is not None and not is_waiting:
            self._head_timer.cancel()
            self._head_timer = None
        elif self._head_timer is None and is_waiting:
            self._head_timer = self.loop.call_later(HEAD_TIMEOUT, self.transport.close)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
        super().connection_lost(exc)
