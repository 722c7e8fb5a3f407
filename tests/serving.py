"""Helpers: a gate that holds the steps of an engine, a server in a thread of this process, and HTTP clients."""

import asyncio
import http.client
import json
import re
import socket
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import openai
import uvicorn
from engines import byte_model

from benchmarks.random_models import byte_tokenizer
from flex_nano_vllm import Inference
from flex_nano_vllm.async_inference import AsyncInference
from flex_nano_vllm.server import create_app
from flex_nano_vllm.server_guard import HeaderTimeoutH11, Limits

HERE = str(Path(__file__).parents[1]).encode()
PATIENCE = 60  # seconds after which a test has hung; no helper waits for a fixed time
MODEL = "tiny-random"
TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
ROOMY = dict(max_batch_size=4, max_seq_length=64, n_pages=65, page_size=4, compile=False)


def new_engine(**sizes: object) -> Inference:
    """Build an engine with the same weights on every call, so that one engine can be the oracle of another."""
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return Inference(byte_model(), tokenizer, **(ROOMY | sizes))


def run(coroutine: Awaitable) -> Any:
    """Run a coroutine in its own event loop, for at most `PATIENCE` seconds."""

    async def bounded() -> Any:
        return await asyncio.wait_for(coroutine, PATIENCE)

    return asyncio.run(bounded())


async def until(condition: Callable[[], bool]) -> None:
    """Let other coroutines run until a condition is true."""
    while not condition():
        await asyncio.sleep(0)


class Gate:
    """Holds each step of an engine, after its requests were scheduled, until the test lets the step pass."""

    def __init__(self, engine: Inference):
        self._arrived, self._permits, self._is_open = threading.Semaphore(0), threading.Semaphore(0), False
        forward = engine.runner.forward

        def gated(chunks: list) -> Any:
            self._arrived.release()
            if not self._is_open:
                assert self._permits.acquire(timeout=PATIENCE), "the test does not let the step pass"
            return forward(chunks)

        engine.runner.forward = gated

    def wait(self) -> None:
        """Wait until a step arrives at the gate."""
        assert self._arrived.acquire(timeout=PATIENCE), "no step arrives"

    async def arrival(self) -> None:
        await asyncio.to_thread(self.wait)

    def let_pass(self) -> None:
        self._permits.release()

    def open(self) -> None:
        """Let this step and all later steps pass."""
        self._is_open = True
        self._permits.release()


class Calls:
    """Counts the calls of a method, and lets a test wait for the next one."""

    def __init__(self, monkeypatch: Any, owner: object, name: str):
        self.number, self._semaphore = 0, threading.Semaphore(0)
        original = getattr(owner, name)

        def call(*args: object, **kwargs: object) -> Any:
            result = original(*args, **kwargs)
            self.number += 1
            self._semaphore.release()
            return result

        monkeypatch.setattr(owner, name, call)

    def wait(self) -> None:
        assert self._semaphore.acquire(timeout=PATIENCE), "the method is not called"


class Served:
    """A running server, with methods that send requests to it."""

    def __init__(self, shared: AsyncInference, port: int):
        self.shared, self.engine, self.port = shared, shared.engine, port

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def connection(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE)

    def begin(self, path: str, body: dict, **headers: str) -> http.client.HTTPConnection:
        """Send a request, and return the connection with the response unread."""
        connection = self.connection()
        connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"} | headers)
        return connection

    def ask(
        self, method: str, path: str, body: object = None, headers: dict | None = None
    ) -> tuple[int, dict[str, str], bytes]:
        """Send a request, and return the status, headers and body of the response.

        A body that is neither bytes nor text is sent as JSON.
        """
        connection = self.connection()
        if body is not None and not isinstance(body, str | bytes):
            body = json.dumps(body)
        if isinstance(body, str):
            body = body.encode()
        given = {} if body is None else {"Content-Type": "application/json"}
        try:
            connection.request(method, path, body, given | (headers or {}))
            response = connection.getresponse()
            return response.status, {k.lower(): v for k, v in response.getheaders()}, response.read()
        finally:
            connection.close()

    def raw(self, request: bytes) -> bytes:
        """Send bytes, which need not be valid HTTP, and return the bytes of the response."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=PATIENCE) as connection:
            parts = []
            with suppress(BrokenPipeError, ConnectionResetError):  # rejected before the server has read all bytes
                connection.sendall(request)
            with suppress(ConnectionResetError):
                while part := connection.recv(65536):
                    parts.append(part)
            return b"".join(parts)

    def between_steps(self, function: Callable[[], Any]) -> Any:
        """Run a function in the thread that owns the engine, after all earlier commands, and return its result."""
        return run(self.shared.call(function))

    def wait_until_idle(self) -> None:
        while self.between_steps(self.engine.has_unfinished_requests):
            pass


@contextmanager
def serving(
    engine: Inference,
    api_key: str | None = None,
    limits: Limits | None = None,
    max_waiting: int = 1024,
    send_buffer: int | None = None,
    allowed_origins: tuple[str, ...] = (),
    defaults: dict | None = None,
    keep_alive: float = 5,
) -> Iterator[Served]:
    """Serve an engine as `python -m flex_nano_vllm.server` does, on a free port."""
    shared = AsyncInference(engine, max_waiting, stream_interval=0)
    app = create_app(shared, MODEL, api_key, limits, allowed_origins, defaults)
    config = uvicorn.Config(
        app,
        http=HeaderTimeoutH11,
        ws="none",
        access_log=False,
        server_header=False,
        log_config=None,
        timeout_graceful_shutdown=PATIENCE,
        timeout_keep_alive=keep_alive,
    )
    server = uvicorn.Server(config)
    listener = socket.create_server(("127.0.0.1", 0))  # clients that connect before the thread runs wait in the backlog
    if send_buffer is not None:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)
    thread = threading.Thread(target=server.run, kwargs=dict(sockets=[listener]), daemon=True)
    thread.start()
    try:
        yield Served(shared, listener.getsockname()[1])
    finally:
        server.should_exit = True
        thread.join(PATIENCE)
        assert not thread.is_alive(), "the server does not stop"


def events_of(body: bytes) -> list[dict | str]:
    """Return the data of server-sent events."""
    *events, rest = body.split(b"\n\n")
    assert rest == b"" and all(event.startswith(b"data: ") for event in events), body
    data = [event.removeprefix(b"data: ").decode() for event in events]
    return [text if text == "[DONE]" else json.loads(text) for text in data]


def client_of(served, key="none"):
    return openai.OpenAI(base_url=f"{served.url}/v1", api_key=key, max_retries=0, timeout=PATIENCE)


def assert_is_error(status, body):
    """Check that a body is an error in OpenAI's format. Returns the error."""
    body = body.encode() if isinstance(body, str) else body
    error = json.loads(body)["error"]
    assert set(error) == {"message", "type", "param", "code"}, error
    assert isinstance(error["message"], str) and error["message"] and isinstance(error["type"], str)
    assert isinstance(error["param"], str | None) and isinstance(error["code"], str | None)
    kinds = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
    assert error["type"] == kinds.get(status, "server_error" if status >= 500 else "invalid_request_error")
    assert len(body) < 1000, "too much of the request is echoed"
    assert not re.search(rb"Traceback|\.py\b|site-packages|File \\\"", body) and HERE not in body, body
    return error
