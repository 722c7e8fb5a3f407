"""What stands before a server: the API key, and how large a request may be and how long it may take. Knows no endpoint
but those that are public.
"""

import asyncio
import hashlib
import hmac
from dataclasses import dataclass

import anyio
import h11
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from flex_nano_vllm.api_errors import APIError

PUBLIC_PATHS = {"/", "/health"}
LAST_WORDS_TIMEOUT = 1.0  # seconds for a client to take the error at the end of its stream
HEAD_TIMEOUT = 30.0  # seconds from the connection, or the first byte of a further request, to the end of its headers


@dataclass(frozen=True)
class Limits:
    """What one request may take."""

    max_body_bytes: int = 2 * 2**20
    request_timeout: float = 600.0  # seconds, from the headers of the request to the last byte of the answer


class Guard:
    """Stands before everything else: the key, the size of the body, and the time that a request may take."""

    def __init__(self, app: ASGIApp, api_key: str | None, limits: Limits):
        self.app, self.limits = app, limits
        self.key_digest = None if api_key is None else hashlib.sha256(api_key.encode()).digest()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        if scope["path"] not in PUBLIC_PATHS and not self.is_allowed(dict(scope["headers"])):
            error = APIError(401, "the API key is missing or wrong: send Authorization: Bearer KEY", "invalid_api_key")
            return await error.response()(scope, receive, send)
        started = streams = False

        async def note_start(message: Message) -> None:
            nonlocal started, streams
            if message["type"] == "http.response.start":
                started = True
                streams = dict(message["headers"]).get(b"content-type", b"").startswith(b"text/event-stream")
            await send(message)

        try:
            with anyio.fail_after(self.limits.request_timeout):
                body = await self.body(receive, dict(scope["headers"]))
                await self.app(scope, _replayed(body, receive), note_start)
        except APIError as error:
            await error.response()(scope, receive, send)
        except TimeoutError:
            error = APIError(503, f"the answer takes more than {self.limits.request_timeout} s", "timeout")
            if not started:
                await error.response()(scope, receive, send)
            elif streams:
                with anyio.move_on_after(LAST_WORDS_TIMEOUT):  # a client that does not read would keep us for ever
                    await send({"type": "http.response.body", "body": error.last_events})

    def is_allowed(self, headers: dict[bytes, bytes]) -> bool:
        if self.key_digest is None:
            return True
        scheme, _, key = headers.get(b"authorization", b"").partition(b" ")
        is_same = hmac.compare_digest(hashlib.sha256(key).digest(), self.key_digest)  # in a time that tells nothing
        return is_same and scheme.lower() == b"bearer"

    async def body(self, receive: Receive, headers: dict[bytes, bytes]) -> bytes:
        """The whole body. One that is too large is thrown away as it comes, so that the client gets to read why."""
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
            raise APIError(413, f"the body has more than the {most} bytes that are allowed", "body_too_large")
        return b"".join(parts)


def _replayed(body: bytes, receive: Receive) -> Receive:
    messages = iter([{"type": "http.request", "body": body, "more_body": False}])

    async def replay() -> Message:
        return next(messages, None) or await receive()

    return replay


class ImpatientH11(H11Protocol):
    """Uvicorn's HTTP, for connections that bring a request: others are closed. In pure Python, since httptools, its
    other parser, takes headers of 50 MB."""

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
