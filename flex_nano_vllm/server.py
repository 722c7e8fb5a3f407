"""The OpenAI API over HTTP, for a shared engine. Does not depend on steps or masks.

    uv run --extra serve python -m flex_nano_vllm.server --model tiny-gemma2

Clients are not trusted. Every size is limited before it is used. If there is an API key, every path requires it, except
`/health` and the page at `/`. No error message contains a prompt or the contents of a file.
"""

import asyncio
import json
import logging
import re
import time
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from dataclasses import asdict
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer
import uvicorn
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import HTMLResponse, JSONResponse, RedirectResponse, Response, StreamingResponse
from prometheus_client import CollectorRegistry, Histogram, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from flex_nano_vllm import __version__
from flex_nano_vllm import server_protocol as protocol
from flex_nano_vllm import server_responses as responses
from flex_nano_vllm.async_inference import AsyncInference, EngineBusy, EngineClosing, EngineError, Submission
from flex_nano_vllm.inference import Inference
from flex_nano_vllm.input_processor import template_of
from flex_nano_vllm.invariants import holders
from flex_nano_vllm.outputs import CompletionDelta, CompletionOutput, RequestOutput
from flex_nano_vllm.sampling_params import InvalidRequestError, not_expressed, sampling_defaults
from flex_nano_vllm.server_chat import (
    ChatChunks,
    ChatTurn,
    CompletionChunks,
    CompletionTexts,
    EventWriter,
    as_requested,
    with_tools,
)
from flex_nano_vllm.server_guard import APIError, Guard, HeaderTimeoutH11, Limits, api_error, invalid_fields, log_error
from flex_nano_vllm.server_protocol import ChatCompletionRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest
from flex_nano_vllm.server_responses import ResponsesRequest, ResponseWriter
from flex_nano_vllm.server_tools import call_form

logger = logging.getLogger(__name__)

PAGE = (Path(__file__).parent / "page.html").read_text(encoding="utf-8")
PAGE_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'"
MAX_SHOWN_PAGES, MAX_SHOWN_REQUESTS = 4096, 64
MAX_CHARS_PER_TOKEN = 32  # limit per token of the context; longer texts are rejected without being tokenized
ERRORS = {status: {"model": protocol.ErrorResponse} for status in (400, 401, 404, 413, 415, 429, 500, 503)}


class EventStream(StreamingResponse):
    """The server-sent events of a submission. If the client disconnects, its requests are aborted."""

    def __init__(self, events: AsyncIterator[bytes], submission: Submission):
        # The page uses these ids to find its own request in `/state`.
        headers = {"Cache-Control": "no-cache", "x-engine-request-id": ",".join(map(str, submission.request_ids))}
        super().__init__(events, media_type="text/event-stream", headers=headers)
        self.submission = submission

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:  # not in the iterator, which may never have been started
            self.submission.abort()


class Metrics:
    """Counts of the engine, read at each scrape, and latencies of finished requests."""

    def __init__(self, engine: Inference):
        self.engine = engine
        self.registry = CollectorRegistry()
        self.registry.register(self)
        seconds = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)

        def histogram(name: str, text: str, scale: float = 1.0) -> Histogram:
            buckets = [scale * bound for bound in seconds]
            return Histogram(f"flex_nano_vllm_{name}", text, registry=self.registry, buckets=buckets)

        self.ttft = histogram("time_to_first_token_seconds", "Seconds from arrival to the first token.")
        self.tpot = histogram(
            "time_per_output_token_seconds", "Mean seconds per token after the first, by request.", 0.1
        )
        self.latency = histogram("e2e_request_latency_seconds", "Seconds from arrival to the last token.")

    def collect(self) -> Iterable[Metric]:
        stats = self.engine.stats()
        gauges = dict(
            num_requests_running=(stats.num_running, "Running sequences."),
            num_requests_waiting=(stats.num_waiting, "Waiting sequences."),
            kv_cache_usage_perc=(stats.kv_usage, "Used pages as a share of the usable pages, 0 to 1."),
        )
        counters = dict(
            num_preemptions=(stats.num_preemptions, "Preemptions of sequences because pages ran out."),
            prompt_tokens=(stats.num_prompt_tokens, "Prompt tokens."),
            generation_tokens=(stats.num_generated_tokens, "Generated tokens."),
            prefix_cache_hits=(stats.num_cached_tokens, "Prompt tokens found in the prefix cache."),
        )
        for name, (value, text) in gauges.items():
            yield GaugeMetricFamily(f"flex_nano_vllm_{name}", text, value)
        for name, (value, text) in counters.items():
            yield CounterMetricFamily(f"flex_nano_vllm_{name}", text, value)
        ended = CounterMetricFamily("flex_nano_vllm_request_success", "Finished sequences.", labels=["finished_reason"])
        for reason, number in stats.finish_reasons.items():
            ended.add_metric([reason], number)
        yield ended

    def text(self) -> bytes:
        """Return all metrics in Prometheus' text format."""
        return generate_latest(self.registry)

    def observe(self, output: RequestOutput) -> None:
        """Record the latencies of a request, unless it was aborted."""
        if any(completion.finish_reason == "abort" for completion in output.outputs):
            return
        metrics = output.metrics
        if metrics.ttft is not None:
            self.ttft.observe(metrics.ttft)
        if (tpot := metrics.tpot(max(len(completion.token_ids) for completion in output.outputs))) is not None:
            self.tpot.observe(tpot)
        self.latency.observe(metrics.finished_time - metrics.arrival_time)


class API:
    """The endpoints. Each of them returns a response of the engine or raises an exception.

    Args:
        defaults: values of `SamplingParams` fields that a request does not set.
    """

    def __init__(self, shared: AsyncInference, model_name: str, defaults: dict[str, Any]):
        self.shared, self.engine, self.model_name, self.defaults = shared, shared.engine, model_name, defaults
        self.tokenizer = shared.engine.tokenizer
        self.metrics = Metrics(shared.engine)
        self.created = int(time.time())

    async def completions(self, body: CompletionRequest, request: Request) -> Response:
        self.check_model(body.model)
        params = body.to_params(self.defaults)
        num_choices = len(body.prompts) * params.n
        if num_choices > protocol.MAX_CHOICES:
            raise APIError(
                400, f"{num_choices} choices (prompts times n) exceed the limit of {protocol.MAX_CHOICES}", param="n"
            )
        self.check_length("prompt", *(prompt for prompt in body.prompts if isinstance(prompt, str)))
        submission = await self.shared.submit(body.prompts, params, body.cache_salt, follow=bool(body.stream))
        if params.prompt_logprobs is not None:
            num_echoed = submission.num_prompt_tokens * params.n * (params.prompt_logprobs + 1)
            if num_echoed > protocol.MAX_ECHOED:
                submission.abort()
                excess = f"more than the limit of {protocol.MAX_ECHOED}: use fewer prompts or logprobs"
                raise APIError(
                    400, f"echo with logprobs returns {num_echoed} log-probabilities, {excess}", param="logprobs"
                )
        if body.stream:
            writer = CompletionChunks(self.tokenizer, self.model_name, body, params, submission)
            return EventStream(self.events(submission, writer), submission)
        outputs = [as_requested(body, output) for output in await self.whole(submission, request)]
        choices = []
        for output in outputs:
            texts = CompletionTexts(self.tokenizer, body, params, output)
            choices += [dict(index=len(choices) + i) | texts.choice(new) for i, new in enumerate(output.outputs)]
        return self.answer("text_completion", "cmpl-", choices, outputs)

    async def chat_completions(self, body: ChatCompletionRequest, request: Request) -> Response:
        self.check_model(body.model)
        turn = await self.chat_turn(body)
        if body.stream:
            return EventStream(self.events(turn.submission, ChatChunks(self.model_name, turn)), turn.submission)
        outputs = await self.whole(turn.submission, request)
        choices = []
        for index, completion in enumerate(outputs[0].outputs):
            logprobs = None
            if completion.logprobs is not None:
                content = protocol.chat_logprobs(completion.token_ids, completion.logprobs, body.num_top)
                logprobs = dict(content=content, refusal=None)
            message = turn.message(index, completion.text)
            choice = dict(index=index, message=message, logprobs=logprobs)
            choices.append(choice | protocol.ending(completion, turn.ends_with_calls(index)))
        return self.answer("chat.completion", "chatcmpl-", choices, outputs)

    async def responses(self, body: ResponsesRequest, request: Request) -> Response:
        self.check_model(body.model)
        try:
            turn = await self.chat_turn(body.to_chat())
        except ValidationError as error:
            raise api_error(invalid_fields(error.errors()), responses.API_NAMES) from error
        except (APIError, ValueError) as error:
            raise api_error(error, responses.API_NAMES) from error
        writer = ResponseWriter(body, turn, self.model_name, self.defaults)
        if body.stream:
            return EventStream(self.events(turn.submission, writer), turn.submission)
        (output,) = await self.whole(turn.submission, request)
        return JSONResponse(writer.whole(output))

    async def chat_turn(self, body: ChatCompletionRequest) -> ChatTurn:
        """Submit a chat to the engine."""
        params, form = body.to_params(self.defaults), call_form(template_of(self.tokenizer))
        prompt = await self.chat_prompt(body.messages, body.known_tools)
        if body.known_tools:
            params = await asyncio.to_thread(with_tools, params, body, form, self.engine.input_processor)
        try:
            submission = await self.shared.submit([prompt], params, body.cache_salt, follow=bool(body.stream))
        except InvalidRequestError as error:
            raise api_error(error, {"prompt": "messages"}) from error
        return ChatTurn(submission, body, form)

    async def tokenize(self, body: TokenizeRequest) -> dict:
        self.check_model(body.model or self.model_name)
        if body.messages is not None:
            token_ids = await self.chat_prompt(body.messages)
        else:
            self.check_length("prompt", body.prompt)
            token_ids = await asyncio.to_thread(self.engine.input_processor.tokenize, body.prompt)
        return {"tokens": token_ids, "count": len(token_ids), "max_model_len": self.engine.max_seq_length}

    async def detokenize(self, body: DetokenizeRequest) -> dict:
        self.check_model(body.model or self.model_name)
        return {"prompt": await asyncio.to_thread(self.engine.input_processor.detokenize, body.tokens)}

    async def models(self) -> dict:
        return {"object": "list", "data": [self.served_model]}

    async def model(self, name: str) -> Response:
        if not name:  # the path of the list with a slash at the end
            return RedirectResponse("/v1/models")
        self.check_model(name)
        return JSONResponse(self.served_model)

    @property
    def served_model(self) -> dict:
        model = dict(id=self.model_name, object="model", created=self.created, owned_by="flex-nano-vllm")
        return model | {"max_model_len": self.engine.max_seq_length}

    async def health(self) -> Response:
        self.shared.check_open()
        return JSONResponse({"status": "ok"})

    async def version(self) -> dict:
        return {"version": __version__}

    async def prometheus(self) -> Response:
        return Response(self.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def state(self) -> dict:
        """Return the data that the page draws: the queues, and the row that uses each page."""
        return await self.shared.call(self._state)

    def _state(self) -> dict:
        scheduler = self.engine.scheduler

        def shown(sequences: Iterable) -> list[dict]:
            names = ("row", "num_tokens", "num_computed_tokens", "num_prompt_tokens")
            some = [sequence for sequence, _ in zip(sequences, range(MAX_SHOWN_REQUESTS))]
            return [{"id": s.request_id} | {name: getattr(s, name) for name in names} for s in some]

        pools = []
        for window, table in self.engine.kv.pools.items():
            pages = holders(table)[:MAX_SHOWN_PAGES]
            pools.append(dict(window=window, page_size=table.page_size, num_pages=table.n_pages, pages=pages))
        queues = dict(running=shown(scheduler.running), waiting=shown(scheduler.waiting))
        return dict(stats=asdict(self.engine.stats()), pools=pools, **queues)

    async def page(self) -> Response:
        return HTMLResponse(PAGE, headers={"Content-Security-Policy": PAGE_POLICY})

    def check_model(self, name: str) -> None:
        if name != self.model_name:
            raise APIError(404, f"this server only has the model {self.model_name!r}", "model_not_found", "model")

    def check_length(self, param: str, *texts: str) -> None:
        max_chars = MAX_CHARS_PER_TOKEN * self.engine.max_seq_length
        for text in texts:
            if len(text) > max_chars:
                message = f"a text of {len(text)} characters exceeds the limit of {max_chars}: shorten it"
                limit = f"the maximum context length is {self.engine.max_request_tokens} tokens"
                raise APIError(400, f"{message} ({limit})", "context_length_exceeded", param)

    async def chat_prompt(self, messages: list[protocol.Message], tools: list[dict] | None = None) -> list[int]:
        conversation = [message.to_dict() for message in messages]
        if len(messages) > self.engine.max_seq_length:  # each message has at least one token
            limit = f"the maximum context length is {self.engine.max_request_tokens} tokens"
            message = f"{len(messages)} messages are too many: {limit}"
            raise APIError(400, message, "context_length_exceeded", "messages")
        self.check_length("tools", json.dumps(tools, ensure_ascii=False) if tools else "")
        self.check_length("messages", "".join(part for message in messages for part in message.texts))
        return await self.shared.chat_prompt(conversation, tools or None)

    async def whole(self, submission: Submission, request: Request) -> list[RequestOutput]:
        """Return the outputs of the requests, in order. Abort the requests if the client disconnects."""
        with submission:
            watching = asyncio.create_task(_leave_with_client(request, submission))
            try:
                ended = {index: output async for updates in submission for index, output in updates}
            finally:
                watching.cancel()
        outputs = [ended[index] for index in sorted(ended)]
        for output in outputs:
            for completion in output.outputs:
                _check_ending(completion)
            self.metrics.observe(output)
        return outputs

    def answer(self, kind: str, prefix: str, choices: list[dict], outputs: list[RequestOutput]) -> Response:
        envelope = protocol.Envelope(kind, prefix, self.model_name)
        return JSONResponse(envelope.with_choices(choices, usage=protocol.usage_of(outputs)))

    async def events(self, submission: Submission, writer: EventWriter) -> AsyncIterator[bytes]:
        """Yield the events of a stream. Events that are available at the same time are sent together."""
        outputs, data = {}, writer.begin()
        try:
            async for updates in submission:
                for index, item in updates:
                    if isinstance(item, RequestOutput):
                        outputs[index] = item
                        self.metrics.observe(item)
                    else:
                        _check_ending(item)
                        data += writer.delta(index, item)
                if not submission.have_ended:
                    yield data
                    data = b""
            data += writer.end([outputs[index] for index in sorted(outputs)])
        except Exception as error:
            failure = api_error(error)
            log_error(failure.status, str(failure))
            data += writer.fail(failure)
        yield data


def _check_ending(item: CompletionOutput | CompletionDelta) -> None:
    """Raise an error if an output has ended with finish_reason "error"."""
    if item.finish_reason != "error":
        return
    if item.error.param is not None:  # a parameter of the request caused the error
        raise APIError(400, item.error.message, param=item.error.param)
    raise EngineError(item.error.message)


async def _leave_with_client(request: Request, submission: Submission) -> None:
    """Abort the requests when the client disconnects. Starlette notices that only when it sends the response."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
    submission.abort()


def create_app(
    shared: AsyncInference,
    model_name: str,
    api_key: str | None = None,
    limits: Limits | None = None,
    allowed_origins: tuple[str, ...] = (),
    defaults: dict[str, Any] | None = None,
) -> FastAPI:
    """Build the application. At shutdown, after all requests have finished, the application closes `shared`.

    Args:
        model_name: the model name that requests must contain.
        api_key: the key that clients must send; None requires no key.
        allowed_origins: origins of other web pages that may call this server; "*" for all.
        defaults: values of `SamplingParams` fields that a request does not set.
    """
    if shared.engine.tokenizer is None:
        raise ValueError("the engine has no tokenizer, which the API needs")
    if api_key == "":  # for example an environment variable that is set but empty
        raise ValueError("the API key is empty: pass a key, or None to require no key")
    api = API(shared, model_name, defaults or {})

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await shared.close(timeout=5.0)  # all requests have ended or were cancelled before

    app = FastAPI(title="flex-nano-vllm", lifespan=lifespan, docs_url=None, redoc_url=None, responses=ERRORS)
    app.add_middleware(Guard, api_key=api_key, limits=limits or Limits())
    if origins := valid_origins(allowed_origins):  # before the guard: a preflight request does not contain the key
        exposed = ["x-request-id", "x-engine-request-id", "retry-after"]
        allowed = dict(allow_methods=["*"], allow_headers=["*"], expose_headers=exposed)
        app.add_middleware(CORSMiddleware, allow_origins=origins, **allowed)

    async def on_error(request: Request, error: Exception) -> Response:
        return api_error(error).response()

    async def on_invalid(request: Request, error: RequestValidationError | ValidationError) -> Response:
        return invalid_fields(error.errors()).response()

    async def on_http_error(request: Request, error: HTTPException) -> Response:
        is_unreadable = error.status_code == 400  # FastAPI's only error of its own: the body cannot be parsed
        failure = APIError(400, "the body is not valid JSON", "invalid_json") if is_unreadable else None
        response = (failure or APIError(error.status_code, error.detail)).response()
        response.headers.update(error.headers or {})  # the Allow header
        return response

    app.add_exception_handler(RequestValidationError, on_invalid)
    app.add_exception_handler(HTTPException, on_http_error)
    for kind in (APIError, EngineError, EngineBusy, EngineClosing, ValueError):
        app.add_exception_handler(kind, on_error)

    def streamed(model: type) -> dict:
        return {200: {"model": model, "content": {"text/event-stream": {}}}}

    app.post("/v1/completions", responses=streamed(protocol.Completion))(api.completions)
    app.post("/v1/chat/completions", responses=streamed(protocol.ChatCompletion))(api.chat_completions)
    app.post("/v1/responses", responses=streamed(responses.Response))(api.responses)
    app.get("/v1/models", response_model=protocol.ModelList)(api.models)
    app.get("/v1/models/{name:path}", responses={200: {"model": protocol.ServedModel}})(api.model)
    app.post("/tokenize", response_model=protocol.Tokens)(api.tokenize)
    app.post("/detokenize", response_model=protocol.Detokenized)(api.detokenize)
    app.get("/health", responses={200: {"model": protocol.Health}})(api.health)
    app.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})(api.prometheus)
    app.get("/version", response_model=protocol.Version)(api.version)
    app.get("/state", response_model=None, responses={200: {"model": protocol.State}})(api.state)
    app.get("/", include_in_schema=False)(api.page)
    return app


def valid_origins(origins: Iterable[str]) -> list[str]:
    """Return origins as browsers send them. Raises ValueError for a string that cannot be an origin."""
    valid = [origin.rstrip("/").lower() for origin in origins]
    for origin in valid:
        if origin not in ("*", "null") and not re.fullmatch(r"[a-z][a-z0-9+.-]*://[^/\s*@?#]+", origin):
            raise ValueError(f"an allowed origin must be scheme://host[:port], null or *, got {origin!r}")
    # Browsers leave out the default port.
    return [re.sub(r"^(http://.*):80$|^(https://.*):443$", r"\1\2", origin) for origin in valid]


class GenerationConfigSource(str, Enum):
    """Source of the sampling defaults."""

    model = "model"
    none = "none"


def server_defaults(engine: Inference) -> dict[str, Any]:
    """Return the sampling defaults of the model's generation config. Log them and the settings that are not applied."""
    config = engine.model.generation_config
    defaults, missing = sampling_defaults(config), not_expressed(config)
    if defaults:
        logger.info("sampling defaults from the model's generation_config: %s", defaults)
    if missing:
        logger.warning("settings of the model's generation_config that are not applied: %s", ", ".join(missing))
    return defaults


def serve(
    model: Annotated[str, typer.Option(help="Model folder, hub id, or tiny-gemma2.")] = "tiny-gemma2",
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 listens on all interfaces.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on; 0 selects a free port.")] = 8000,
    api_key: Annotated[
        str | None, typer.Option(envvar="FLEX_NANO_VLLM_API_KEY", help="API key that clients must send.")
    ] = None,
    served_model_name: Annotated[str | None, typer.Option(help="Model name that clients send.")] = None,
    dtype: Annotated[str, typer.Option(help="Type of weights and KV cache: auto, float32, bfloat16, ...")] = "auto",
    max_batch_size: Annotated[int, typer.Option(help="Most sequences that run at once.")] = 32,
    max_seq_length: Annotated[int | None, typer.Option(help="Most tokens of prompt and output together.")] = None,
    n_pages: Annotated[int | None, typer.Option(help="Pages of the KV pool.")] = None,
    page_size: Annotated[int | None, typer.Option(help="Tokens per page.")] = None,
    max_num_batched_tokens: Annotated[int | None, typer.Option(help="Token budget of a step.")] = None,
    policy: Annotated[str, typer.Option(help="Which requests come first: fcfs, priority or sjf.")] = "fcfs",
    compile: Annotated[bool, typer.Option(help="Compile the model before the first request.")] = True,
    generation_config: Annotated[
        GenerationConfigSource, typer.Option(help="Sampling defaults: from the model, or none.")
    ] = GenerationConfigSource.model,
    allowed_origins: Annotated[
        list[str] | None, typer.Option(help="Web origin that may call the server (CORS), * for all; may be repeated.")
    ] = None,
    max_waiting: Annotated[int, typer.Option(help="Most sequences that may wait; further requests get a 429.")] = 1024,
    request_timeout: Annotated[float, typer.Option(help="Most seconds that a request may take.")] = 600.0,
    drain_timeout: Annotated[int, typer.Option(help="Seconds for requests to finish after SIGTERM.")] = 30,
) -> None:
    """Serve a model over the OpenAI API."""
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    try:
        origins = valid_origins(allowed_origins or ())
    except ValueError as error:
        raise SystemExit(f"--allowed-origins: {error}") from None
    if api_key is None and host not in ("127.0.0.1", "::1", "localhost"):
        logger.warning("there is no --api-key: every client that reaches %s can use the model", host)
    try:
        engine = Inference.from_pretrained(
            model,
            dtype=dtype,
            max_batch_size=max_batch_size,
            max_seq_length=max_seq_length,
            n_pages=n_pages,
            page_size=page_size,
            max_num_batched_tokens=max_num_batched_tokens,
            policy=policy,
            compile=None if compile else False,
        )
    except (ValueError, OSError) as error:
        raise SystemExit(str(error)) from None
    try:
        defaults = server_defaults(engine) if generation_config == GenerationConfigSource.model else {}
    except ValueError as error:
        raise SystemExit(f"invalid generation_config: {error}; --generation-config none ignores it") from None
    # --generation-config decides, and settings that are not applied are logged
    engine.input_processor.warns_of_defaults = False
    shared = AsyncInference(engine, max_waiting)
    if engine.runner.compiled:
        asyncio.run(shared.warmup())
    limits = Limits(request_timeout=request_timeout)
    app = create_app(shared, served_model_name or model, api_key, limits, tuple(origins), defaults)
    uvicorn.run(
        app,
        host=host,
        port=port,
        http=HeaderTimeoutH11,
        ws="none",
        access_log=False,
        server_header=False,
        limit_concurrency=4096,
        timeout_graceful_shutdown=drain_timeout,
    )


if __name__ == "__main__":
    typer.run(serve)
