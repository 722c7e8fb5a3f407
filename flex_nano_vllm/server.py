"""The OpenAI API over HTTP, in front of an engine that is shared. Knows nothing of steps, pages or masks.

    uv run --extra serve python -m flex_nano_vllm.server --model tiny-gemma2

Who calls is not trusted: every size is bounded before it is used, every path but `/health` and the page at `/` asks for
the API key if there is one, and no answer holds what a request or a file held.
"""

import asyncio
import hashlib
import hmac
import json
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import anyio
import typer
import uvicorn
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from flex_nano_vllm import __version__, protocol
from flex_nano_vllm.answers import token_text
from flex_nano_vllm.async_inference import Answers, AsyncInference, EngineBusy, EngineClosing, EngineDead, EngineError
from flex_nano_vllm.inference import Inference
from flex_nano_vllm.intake import StructureError
from flex_nano_vllm.outputs import CompletionDelta, RequestOutput
from flex_nano_vllm.protocol import ChatCompletionRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest

logger = logging.getLogger(__name__)

PUBLIC_PATHS = {"/", "/health"}
PAGE = (Path(__file__).parent / "page.html").read_text()
PAGE_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'"
MAX_SHOWN_PAGES, MAX_SHOWN_REQUESTS = 4096, 64
MAX_CHARS_PER_TOKEN = 32  # texts of more on average are too long whatever they say, and are not tokenized to see
MAX_MESSAGE_LEN = 400  # of an error: some name what is wrong, and that may be long
ERRORS = {status: {"model": protocol.ErrorResponse} for status in (400, 401, 404, 413, 429, 500, 503)}


@dataclass(frozen=True)
class Limits:
    """What one request may take."""

    max_body_bytes: int = 2 * 2**20
    request_timeout: float = 600.0  # seconds, from the first byte of the request to the last one of the answer


class APIError(Exception):
    """An error in OpenAI's shape."""

    def __init__(self, status: int, message: str, code: str | None = None, param: str | None = None):
        super().__init__(message if len(message) <= MAX_MESSAGE_LEN else f"{message[:MAX_MESSAGE_LEN]}…")
        self.status, self.code, self.param = status, code, param

    @property
    def body(self) -> dict:
        kinds = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
        kind = kinds.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        retry = {"Retry-After": "1"} if self.status == 429 else {"Retry-After": "10"} if self.status == 503 else {}
        return JSONResponse(self.body, self.status, headers=retry)


def api_error(error: Exception) -> APIError:
    """What a client is told of an exception."""
    match error:
        case APIError():
            return error
        case EngineBusy():
            return APIError(429, str(error), "queue_full")
        case EngineClosing():
            return APIError(503, str(error), "shutting_down")
        case EngineDead():
            return APIError(503, "the engine has died", "engine_dead")
        case EngineError():
            return APIError(500, str(error), "engine_error")
        case StructureError():
            return APIError(400, str(error), param="response_format")
        case ValueError():
            return APIError(400, str(error))
    logger.error("an unexpected error", exc_info=error)
    return APIError(500, "internal error", "internal_error")


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
        started = False

        async def note_start(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            with anyio.fail_after(self.limits.request_timeout):
                body = await self.body(receive, dict(scope["headers"]))
                await self.app(scope, _replayed(body, receive), note_start)
        except APIError as error:
            await error.response()(scope, receive, send)
        except TimeoutError:
            if not started:
                error = APIError(503, f"the answer takes more than {self.limits.request_timeout} s", "timeout")
                await error.response()(scope, receive, send)

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


class EventStream(StreamingResponse):
    """Server-sent events of requests, which end when nobody reads them any more."""

    def __init__(self, events: AsyncIterator[bytes], answers: Answers):
        super().__init__(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self.answers = answers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:  # not in the iterator: it may never have been started
            self.answers.leave()


class Metrics:
    """What Prometheus reads: counts of the engine, taken when it asks, and times of finished requests."""

    def __init__(self, engine: Inference):
        self.engine = engine
        self.registry = CollectorRegistry()
        self.registry.register(self)
        seconds = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)

        def histogram(name: str, text: str, scale: float = 1.0) -> Histogram:
            buckets = [scale * bound for bound in seconds]
            return Histogram(f"flex_nano_vllm_{name}", text, registry=self.registry, buckets=buckets)

        self.ttft = histogram("time_to_first_token_seconds", "From arrival to the first token.")
        self.tpot = histogram("time_per_output_token_seconds", "Per request: mean of the tokens after the first.", 0.1)
        self.latency = histogram("e2e_request_latency_seconds", "From arrival to the last token.")
        self.finished = Counter(
            "flex_nano_vllm_request_success", "Samples that have ended.", ["finished_reason"], registry=self.registry
        )

    def collect(self) -> Iterable[Metric]:
        stats = self.engine.stats()
        gauges = dict(
            num_requests_running=(stats.num_running, "Sequences in the batch."),
            num_requests_waiting=(stats.num_waiting, "Sequences that wait for a place in it."),
            kv_cache_usage_perc=(stats.kv_usage, "Used share of the pages, 0 to 1."),
        )
        counters = dict(
            num_preemptions=(stats.num_preemptions, "Sequences sent back to the queue for want of pages."),
            prompt_tokens=(stats.num_prompt_tokens, "Tokens of prompts."),
            generation_tokens=(stats.num_generated_tokens, "Tokens generated."),
            prefix_cache_hits=(stats.num_cached_tokens, "Tokens of prompts that were found computed."),
        )
        for name, (value, text) in gauges.items():
            yield GaugeMetricFamily(f"flex_nano_vllm_{name}", text, value)
        for name, (value, text) in counters.items():
            yield CounterMetricFamily(f"flex_nano_vllm_{name}", text, value)

    def observe(self, output: RequestOutput) -> None:
        metrics = output.metrics
        if metrics.ttft is not None:
            self.ttft.observe(metrics.ttft)
        if (tpot := metrics.tpot(max(len(completion.token_ids) for completion in output.outputs))) is not None:
            self.tpot.observe(tpot)
        self.latency.observe(metrics.finished_time - metrics.arrival_time)
        for completion in output.outputs:
            self.finished.labels(completion.finish_reason).inc()


class API:
    """The endpoints. Each answers from the engine, or raises."""

    def __init__(self, shared: AsyncInference, model_name: str):
        self.shared, self.engine, self.model_name = shared, shared.engine, model_name
        self.metrics = Metrics(shared.engine)

    async def completions(self, body: CompletionRequest, request: Request) -> Response:
        self.check_model(body.model)
        params = body.to_params()
        if len(body.prompts) * params.n > protocol.MAX_CHOICES:
            raise APIError(400, f"more than {protocol.MAX_CHOICES} completions in one request", param="n")
        self.check_length(*(prompt for prompt in body.prompts if isinstance(prompt, str)))
        answers = await self.shared.submit(body.prompts, params, body.cache_salt, follow=bool(body.stream))
        if body.stream:
            return EventStream(self.completion_events(body, answers), answers)
        outputs = await self.whole(answers, request)
        choices = []
        for output in outputs:
            prefix = self.echoed(output) if body.echo else ""
            for completion in output.outputs:
                logprobs = None
                if completion.logprobs is not None:
                    token_ids, rated, first = completion.token_ids, completion.logprobs, None
                    if body.echo:
                        token_ids = output.prompt_token_ids + token_ids
                        rated = output.prompt_logprobs + rated
                        first = token_text(output.prompt_token_ids[0], self.engine.tokenizer)
                    logprobs = protocol.completion_logprobs(token_ids, rated, 0, first)
                choice = dict(index=len(choices), text=prefix + completion.text, logprobs=logprobs)
                choices.append(choice | _ending(completion))
        return self.answer("text_completion", "cmpl", choices, outputs)

    async def chat_completions(self, body: ChatCompletionRequest, request: Request) -> Response:
        self.check_model(body.model)
        params = body.to_params()
        prompt = await self.chat_prompt(body.messages)
        answers = await self.shared.submit([prompt], params, body.cache_salt, follow=bool(body.stream))
        if body.stream:
            return EventStream(self.chat_events(body, answers), answers)
        outputs = await self.whole(answers, request)
        choices = []
        for completion in outputs[0].outputs:
            logprobs = None
            if completion.logprobs is not None:
                logprobs = protocol.chat_logprobs(completion.token_ids, completion.logprobs, body.num_top)
            message = dict(role="assistant", content=completion.text, refusal=None)
            choice = dict(index=completion.index, message=message, logprobs=logprobs)
            choices.append(choice | _ending(completion))
        return self.answer("chat.completion", "chatcmpl", choices, outputs)

    async def tokenize(self, body: TokenizeRequest) -> dict:
        self.check_model(body.model or self.model_name)
        if body.messages is not None:
            token_ids = await self.chat_prompt(body.messages)
        else:
            self.check_length(body.prompt)
            token_ids = await asyncio.to_thread(self.engine.intake.tokenize, body.prompt)
        return {"tokens": token_ids, "count": len(token_ids), "max_model_len": self.engine.max_seq_length}

    async def detokenize(self, body: DetokenizeRequest) -> dict:
        self.check_model(body.model or self.model_name)
        return {"prompt": await asyncio.to_thread(self.engine.intake.detokenize, body.tokens)}

    async def models(self) -> dict:
        model = dict(id=self.model_name, object="model", created=0, owned_by="flex-nano-vllm")
        return {"object": "list", "data": [model | {"max_model_len": self.engine.max_seq_length}]}

    async def health(self) -> Response:
        self.shared.check_open()
        return JSONResponse({"status": "ok"})

    async def version(self) -> dict:
        return {"version": __version__}

    async def prometheus(self) -> Response:
        return Response(generate_latest(self.metrics.registry), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def state(self) -> dict:
        """What the page draws: queues, and who holds which page."""
        return await self.shared.call(self._state)

    def _state(self) -> dict:
        scheduler = self.engine.scheduler

        def shown(sequences: Iterable) -> list[dict]:
            names = ("row", "num_tokens", "num_computed_tokens", "num_prompt_tokens")
            some = [sequence for sequence, _ in zip(sequences, range(MAX_SHOWN_REQUESTS))]
            return [{"id": s.request_id} | {name: getattr(s, name) for name in names} for s in some]

        pools = []
        for window, table in self.engine.kv.pools.items():
            pages = table.holders()[:MAX_SHOWN_PAGES]
            pools.append(dict(window=window, page_size=table.page_size, num_pages=table.n_pages, pages=pages))
        queues = dict(running=shown(scheduler.running), waiting=shown(scheduler.waiting))
        return dict(stats=asdict(self.engine.stats()), pools=pools, **queues)

    async def page(self) -> Response:
        return HTMLResponse(PAGE, headers={"Content-Security-Policy": PAGE_POLICY})

    def check_model(self, name: str) -> None:
        if name != self.model_name:
            raise APIError(404, f"this server has the model {self.model_name!r} only", "model_not_found", "model")

    def check_length(self, *texts: str) -> None:
        most = MAX_CHARS_PER_TOKEN * self.engine.max_seq_length
        for text in texts:
            if len(text) > most:
                raise APIError(400, f"a text of {len(text)} characters has more than {most}: shorten it")

    async def chat_prompt(self, messages: list[protocol.Message]) -> list[int]:
        conversation = [message.to_dict() for message in messages]
        parts = [part for message in messages for part in message.texts]
        self.check_length("".join(parts))
        return await self.shared.chat_prompt(conversation)

    def echoed(self, output: RequestOutput) -> str:
        if output.prompt is not None:
            return output.prompt
        return self.engine.intake.detokenize(output.prompt_token_ids)

    async def whole(self, answers: Answers, request: Request) -> list[RequestOutput]:
        """The requests' answers, in order. A client that leaves ends them."""
        with answers:
            outputs = await _unless_disconnected(request, _collect(answers))
        for output in outputs:
            self.metrics.observe(output)
        if any(completion.finish_reason == "error" for output in outputs for completion in output.outputs):
            raise EngineError(NOT_FINITE)
        return outputs

    def answer(self, kind: str, prefix: str, choices: list[dict], outputs: list[RequestOutput]) -> Response:
        usage = protocol.usage_of(outputs)
        return JSONResponse(protocol.envelope(kind, protocol.new_id(prefix), self.model_name, choices, usage))

    async def completion_events(self, body: CompletionRequest, answers: Answers) -> AsyncIterator[bytes]:
        offsets: dict[int, int] = {}  # by choice: characters that were sent
        num_samples = body.n or 1

        def choices(index: int, delta: CompletionDelta) -> list[dict]:
            number = index * num_samples + delta.index
            text, logprobs, offset = delta.text, None, offsets.get(number)
            token_ids, rated, first = delta.token_ids, delta.logprobs, None
            if offset is None:
                offset = 0
                if body.echo:
                    output = answers.so_far(index)
                    text = self.echoed(output) + text
                    if rated is not None:
                        token_ids, rated = output.prompt_token_ids + token_ids, output.prompt_logprobs + rated
                        first = token_text(output.prompt_token_ids[0], self.engine.tokenizer)
            if rated is not None:
                logprobs = protocol.completion_logprobs(token_ids, rated, offset, first)
                offsets[number] = offset + sum(map(len, logprobs["tokens"]))
            else:
                offsets[number] = 0
            return [dict(index=number, text=text, logprobs=logprobs) | _ending(delta)]

        async for event in self.events("text_completion", "cmpl", body.includes_usage, answers, choices):
            yield event

    async def chat_events(self, body: ChatCompletionRequest, answers: Answers) -> AsyncIterator[bytes]:
        begun: set[int] = set()

        def choices(index: int, delta: CompletionDelta) -> list[dict]:
            opening = []
            if delta.index not in begun:
                begun.add(delta.index)
                role = {"role": "assistant", "content": ""}
                opening = [dict(index=delta.index, delta=role, logprobs=None, finish_reason=None)]
            logprobs = None
            if delta.logprobs is not None:
                logprobs = protocol.chat_logprobs(delta.token_ids, delta.logprobs, body.num_top)
            content = {"content": delta.text} if delta.text else {}
            return [*opening, dict(index=delta.index, delta=content, logprobs=logprobs) | _ending(delta)]

        async for event in self.events("chat.completion.chunk", "chatcmpl", body.includes_usage, answers, choices):
            yield event

    async def events(
        self,
        kind: str,
        prefix: str,
        includes_usage: bool,
        answers: Answers,
        choices_of: Callable[[int, CompletionDelta], list[dict]],
    ) -> AsyncIterator[bytes]:
        """The events of a stream: a chunk for each choice that `choices_of` makes of a delta, usage, the end."""
        outputs, failed, response_id = [], False, protocol.new_id(prefix)

        def chunk(choices: list[dict], usage: dict | None = None) -> bytes:
            return _event(protocol.envelope(kind, response_id, self.model_name, choices, usage))

        try:
            async for index, item in answers:
                if isinstance(item, RequestOutput):
                    outputs.append(item)
                    self.metrics.observe(item)
                    if failed:
                        raise EngineError(NOT_FINITE)
                    continue
                if item.finish_reason == "error":
                    failed = True  # its answer, which is counted, comes next
                    continue
                for choice in choices_of(index, item):
                    yield chunk([choice])
            if includes_usage:
                yield chunk([], protocol.usage_of(outputs))
        except Exception as error:
            yield _event(api_error(error).body)
        yield b"data: [DONE]\n\n"


NOT_FINITE = "the model's numbers were not finite, or left no token to choose"


def _ending(completion: Any) -> dict:
    return dict(finish_reason=completion.finish_reason, stop_reason=completion.stop_reason)


def _event(data: dict) -> bytes:
    return f"data: {json.dumps(data, ensure_ascii=False, separators=(',', ':'))}\n\n".encode()


async def _collect(answers: Answers) -> list[RequestOutput]:
    outputs = {index: item async for index, item in answers}
    return [outputs[index] for index in sorted(outputs)]


async def _unless_disconnected(request: Request, work: Awaitable) -> Any:
    """What `work` gives. It is cancelled when the client goes: nobody else would notice before it answers."""
    working = asyncio.ensure_future(work)
    watching = asyncio.ensure_future(_disconnect(request))
    try:
        await asyncio.wait([working, watching], return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise APIError(499, "the client has gone")
        return working.result()
    finally:
        for task in (working, watching):
            task.cancel()
        with suppress(BaseException):
            await asyncio.gather(working, watching, return_exceptions=True)


async def _disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def create_app(
    shared: AsyncInference, model_name: str, api_key: str | None = None, limits: Limits | None = None
) -> FastAPI:
    """The application. It closes `shared` when it ends, after all requests have finished.

    Args:
        model_name: what requests must call the model.
        api_key: None lets everybody in.
    """
    if shared.engine.tokenizer is None:
        raise ValueError("the engine has no tokenizer, and the API is about texts")
    if api_key == "":  # the variable of an environment that was meant to hold one
        raise ValueError("the API key is empty: give one, or none at all")
    api = API(shared, model_name)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await shared.close()

    app = FastAPI(title="flex-nano-vllm", lifespan=lifespan, docs_url=None, redoc_url=None, responses=ERRORS)
    app.add_middleware(Guard, api_key=api_key, limits=limits or Limits())

    async def on_error(request: Request, error: Exception) -> Response:
        return api_error(error).response()

    async def on_invalid(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        location = [str(part) for part in first["loc"] if part != "body"]
        param = location[0] if location and first["type"] != "json_invalid" else None  # else it is a place in the text
        where = f"{'.'.join(location)}: " if location else ""
        if param == "prompt" and len(location) > 1:  # of its forms, pydantic names the first
            first["msg"] = f"a text or a list of token ids, or a list of up to {protocol.MAX_PROMPTS} such"
            where = "prompt must be "
        return APIError(400, where + first["msg"].removeprefix("Value error, "), param=param).response()

    async def on_http_error(request: Request, error: HTTPException) -> Response:
        response = APIError(error.status_code, error.detail).response()
        response.headers.update(error.headers or {})  # Allow
        return response

    app.add_exception_handler(RequestValidationError, on_invalid)
    app.add_exception_handler(HTTPException, on_http_error)
    for kind in (APIError, EngineError, EngineBusy, EngineClosing, ValueError):
        app.add_exception_handler(kind, on_error)
    app.add_exception_handler(Exception, on_error)

    streamed, text = ({200: {"content": {kind: {}}}} for kind in ("text/event-stream", "text/plain"))
    app.post("/v1/completions", responses=streamed)(api.completions)
    app.post("/v1/chat/completions", responses=streamed)(api.chat_completions)
    app.get("/v1/models")(api.models)
    app.post("/tokenize")(api.tokenize)
    app.post("/detokenize")(api.detokenize)
    app.get("/health")(api.health)
    app.get("/metrics", response_class=Response, responses=text)(api.prometheus)
    app.get("/version")(api.version)
    app.get("/state")(api.state)
    app.get("/", include_in_schema=False)(api.page)
    return app


def serve(
    model: Annotated[str, typer.Option(help="Folder, hub id, or tiny-gemma2.")] = "tiny-gemma2",
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 is everybody's.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0 for any that is free.")] = 8000,
    api_key: Annotated[
        str | None, typer.Option(envvar="FLEX_NANO_VLLM_API_KEY", help="What clients must send.")
    ] = None,
    served_model_name: Annotated[str | None, typer.Option(help="What clients call the model.")] = None,
    dtype: Annotated[str, typer.Option(help="Of weights and KV: auto, float32, bfloat16, ...")] = "auto",
    max_batch_size: Annotated[int, typer.Option(help="Sequences that run at once.")] = 32,
    max_seq_length: Annotated[int | None, typer.Option(help="Prompt and output, in tokens.")] = None,
    n_pages: Annotated[int | None, typer.Option(help="Pages of the KV pool.")] = None,
    page_size: Annotated[int | None, typer.Option(help="Tokens of a page.")] = None,
    max_num_batched_tokens: Annotated[int | None, typer.Option(help="Token budget of a step.")] = None,
    compile: Annotated[bool, typer.Option(help="Compile the model, before the first request.")] = True,
    max_waiting: Annotated[int, typer.Option(help="Requests that may wait; more get a 429.")] = 1024,
    request_timeout: Annotated[float, typer.Option(help="Seconds that a request may take.")] = 600.0,
    drain_timeout: Annotated[int, typer.Option(help="Seconds that requests have to finish after SIGTERM.")] = 30,
) -> None:
    """Serve a model over the OpenAI API."""
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    if api_key is None and host not in ("127.0.0.1", "::1", "localhost"):
        logger.warning("anybody who reaches %s may use the model: there is no --api-key", host)
    engine = Inference.from_pretrained(
        model,
        dtype=dtype,
        max_batch_size=max_batch_size,
        max_seq_length=max_seq_length,
        n_pages=n_pages,
        page_size=page_size,
        max_num_batched_tokens=max_num_batched_tokens,
        compile=None if compile else False,
    )
    shared = AsyncInference(engine, max_waiting)
    if engine.runner.compiled:
        logger.info("compiling, which takes minutes the first time")
        asyncio.run(shared.warmup())
    app = create_app(shared, served_model_name or model, api_key, Limits(request_timeout=request_timeout))
    uvicorn.run(
        app,
        host=host,
        port=port,
        http="h11",  # httptools takes headers of 50 MB
        ws="none",
        access_log=False,
        server_header=False,
        limit_concurrency=4096,
        timeout_graceful_shutdown=drain_timeout,
    )


if __name__ == "__main__":
    typer.run(serve)
