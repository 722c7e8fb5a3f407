"""Checks before all endpoints: the API key, the size of a request and the time it takes. Depends on no endpoints except
the public paths.
"""

import asyncio
import hashlib
import hmac
import json
import logging
import re
import uuid
from contextvars import ContextVar
from dataclasses import dataclass

import anyio
import h11
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from flex_nano_vllm.api_errors import APIError, api_error

logger = logging.getLogger(__name__)

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
        """Log one line. Error messages contain no prompt (see `api_errors`)."""
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
