"""The OpenAI API over HTTP, in front of an engine that is shared. Knows nothing of steps, pages or masks.

    uv run --extra serve python -m flex_nano_vllm.server --model tiny-gemma2

Who calls is not trusted: every size is bounded before it is used, every path but `/health` and the page at `/` asks for
the API key if there is one, and no error holds a prompt or what a file held.
"""

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
import uvicorn
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from flex_nano_vllm import __version__, protocol
from flex_nano_vllm.answers import token_text
from flex_nano_vllm.api_errors import DONE, APIError, api_error
from flex_nano_vllm.async_inference import Answers, AsyncInference, EngineBusy, EngineClosing, EngineError
from flex_nano_vllm.guard import Guard, ImpatientH11, Limits
from flex_nano_vllm.inference import Inference
from flex_nano_vllm.outputs import CompletionDelta, RequestOutput
from flex_nano_vllm.prometheus import Metrics
from flex_nano_vllm.protocol import ChatCompletionRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest

logger = logging.getLogger(__name__)

PAGE = (Path(__file__).parent / "page.html").read_text()
PAGE_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'"
MAX_SHOWN_PAGES, MAX_SHOWN_REQUESTS = 4096, 64
MAX_CHARS_PER_TOKEN = 32  # texts of more on average are too long whatever they say, and are not tokenized to see
ERRORS = {status: {"model": protocol.ErrorResponse} for status in (400, 401, 404, 413, 429, 500, 503)}


class EventStream(StreamingResponse):
    """Server-sent events of requests, which end when nobody reads them any more."""

    def __init__(self, events: AsyncIterator[bytes], answers: Answers):
        # The page finds its own request in `/state` by these ids.
        headers = {"Cache-Control": "no-cache", "x-engine-request-id": ",".join(map(str, answers.request_ids))}
        super().__init__(events, media_type="text/event-stream", headers=headers)
        self.answers = answers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:  # not in the iterator: it may never have been started
            self.answers.leave()


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
        if params.prompt_logprobs is not None:
            num_echoed = answers.num_prompt_tokens * params.n * (params.prompt_logprobs + 1)
            if num_echoed > protocol.MAX_ECHOED:
                answers.leave()
                most = f"more than the {protocol.MAX_ECHOED} that one answer may have"
                raise APIError(400, f"echo and logprobs give {num_echoed} log-probabilities, {most}", param="logprobs")
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
        return {"object": "list", "data": [await self.model(self.model_name)]}

    async def model(self, name: str) -> dict:
        self.check_model(name)
        model = dict(id=name, object="model", created=0, owned_by="flex-nano-vllm")
        return model | {"max_model_len": self.engine.max_seq_length}

    async def health(self) -> Response:
        self.shared.check_open()
        return JSONResponse({"status": "ok"})

    async def version(self) -> dict:
        return {"version": __version__}

    async def prometheus(self) -> Response:
        return Response(self.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

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
        if len(messages) > self.engine.max_seq_length:  # each has a token at least
            raise APIError(400, f"{len(messages)} messages have more tokens than fit", param="messages")
        self.check_length("".join(part for message in messages for part in message.texts))
        return await self.shared.chat_prompt(conversation)

    def echoed(self, output: RequestOutput) -> str:
        if output.prompt is not None:
            return output.prompt
        return self.engine.intake.detokenize(output.prompt_token_ids)

    async def whole(self, answers: Answers, request: Request) -> list[RequestOutput]:
        """The requests' answers, in order. A client that leaves ends them."""
        with answers:
            watching = asyncio.create_task(_leave_with_client(request, answers))
            try:
                ended = {index: output async for news in answers for index, output in news}
            finally:
                watching.cancel()
        outputs = [ended[index] for index in sorted(ended)]
        if any(completion.finish_reason == "error" for output in outputs for completion in output.outputs):
            raise EngineError(NOT_FINITE)
        for output in outputs:
            self.metrics.observe(output)
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
        """The events of a stream: a chunk for each choice that `choices_of` makes of a delta, usage, the end. Those of
        one time are sent together."""
        outputs, response_id, data = [], protocol.new_id(prefix), b""

        def chunk(choices: list[dict], usage: dict | None = None) -> bytes:
            return _event(protocol.envelope(kind, response_id, self.model_name, choices, usage))

        try:
            async for news in answers:
                for index, item in news:
                    if isinstance(item, RequestOutput):
                        outputs.append(item)
                        self.metrics.observe(item)
                    elif item.finish_reason == "error":
                        raise EngineError(NOT_FINITE)
                    else:
                        data += b"".join(chunk([choice]) for choice in choices_of(index, item))
                if not answers.have_ended:
                    yield data
                    data = b""
            if includes_usage:
                data += chunk([], protocol.usage_of(outputs))
            data += DONE.encode()
        except Exception as error:
            data += api_error(error).last_events
        yield data


NOT_FINITE = "the model's numbers were not finite, or left no token to choose"


def _ending(completion: Any) -> dict:
    return dict(finish_reason=completion.finish_reason, stop_reason=completion.stop_reason)


def _event(data: dict) -> bytes:
    # As ASCII: some clients cut lines at any of Unicode's line breaks.
    return f"data: {json.dumps(data, separators=(',', ':'))}\n\n".encode()


async def _leave_with_client(request: Request, answers: Answers) -> None:
    """A client that goes is noticed by nobody else before the answer is sent."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
    answers.leave()


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
        await shared.close(timeout=5.0)  # requests have ended, or were cancelled

    app = FastAPI(title="flex-nano-vllm", lifespan=lifespan, docs_url=None, redoc_url=None, responses=ERRORS)
    app.add_middleware(Guard, api_key=api_key, limits=limits or Limits())

    async def on_error(request: Request, error: Exception) -> Response:
        return api_error(error).response()

    async def on_invalid(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        # Not the keys of an object of the client's.
        location = [str(part) for part in first["loc"] if part != "body"][: 1 if "logit_bias" in first["loc"] else None]
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
    app.get("/v1/models/{name:path}")(api.model)
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
    max_waiting: Annotated[int, typer.Option(help="Samples that may wait; more get a 429.")] = 1024,
    request_timeout: Annotated[float, typer.Option(help="Seconds that a request may take.")] = 600.0,
    drain_timeout: Annotated[int, typer.Option(help="Seconds that requests have to finish after SIGTERM.")] = 30,
) -> None:
    """Serve a model over the OpenAI API."""
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    if api_key is None and host not in ("127.0.0.1", "::1", "localhost"):
        logger.warning("anybody who reaches %s may use the model: there is no --api-key", host)
    try:
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
    except (ValueError, OSError) as error:
        raise SystemExit(str(error)) from None
    shared = AsyncInference(engine, max_waiting)
    if engine.runner.compiled:
        logger.info("compiling, which takes minutes the first time")
        asyncio.run(shared.warmup())
    app = create_app(shared, served_model_name or model, api_key, Limits(request_timeout=request_timeout))
    uvicorn.run(
        app,
        host=host,
        port=port,
        http=ImpatientH11,
        ws="none",
        access_log=False,
        server_header=False,
        limit_concurrency=4096,
        timeout_graceful_shutdown=drain_timeout,
    )


if __name__ == "__main__":
    typer.run(serve)
