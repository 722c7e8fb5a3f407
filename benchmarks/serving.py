"""Load test of the server, and of the same engine offline, in turns. Uses only the public API of both.

    uv run --extra serve python -m benchmarks.serving

The HTTP client is written out here, because clients share the processors with the server: a client library would use
more processor time than the server does.
"""

import asyncio
import json
import random
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.random_models import SHAPES, byte_tokenizer, random_model
from benchmarks.report import FinishedRequest, strict, summarize
from benchmarks.workload import TOKEN_IDS, WorkloadRequest, make_workload
from flex_nano_vllm.cli import needs_serve
from flex_nano_vllm.inference import Inference
from flex_nano_vllm.sampling_params import SamplingParams

PROMPT_LENS, OUTPUT_LENS = (32, 512), (32, 128)


@dataclass(frozen=True)
class Answer:
    """Response to one HTTP request. Times are in seconds."""

    status: int  # 0: the client closed the connection early
    num_events: int
    ttft: float | None  # to the first event of a stream
    seconds: float
    head: bytes  # in lower case
    body: bytes  # as received: a chunked body still has its chunk sizes


class Client:
    """HTTP client for one request at a time, on one connection while it stays open. Use it in an `async with` block."""

    def __init__(self, host: str, port: int):
        self.host, self.port = host, port
        self._connection: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def ask(self, request: dict, path: str = "/v1/completions", breaks_off_after: int | None = None) -> Answer:
        """Send one request and read the response, to its end or up to `breaks_off_after` events.

        Raises ConnectionError if the server closes the connection before the end of a stream.
        """
        payload = json.dumps(request).encode()
        head = f"POST {path} HTTP/1.1\r\nHost: {self.host}\r\nContent-Type: application/json\r\n"
        started = time.perf_counter()
        if self._connection is None:
            self._connection = await asyncio.open_connection(self.host, self.port)
        reader, writer = self._connection
        writer.write(f"{head}Content-Length: {len(payload)}\r\n\r\n".encode() + payload)
        head, body, num_events, ttft = b"", bytearray(), 0, None
        while breaks_off_after is None or num_events < breaks_off_after:
            if not head:
                head = (await reader.readuntil(b"\r\n\r\n")).lower()
            if b"transfer-encoding: chunked" not in head:
                body += await reader.readexactly(int(re.search(rb"content-length: (\d+)", head)[1]))
                break
            part = await reader.read(65_536)
            if not part:
                raise ConnectionError("the server closed the connection before the end of the response")
            body += part
            num_events += part.count(b"data: ")
            if num_events and ttft is None:
                ttft = time.perf_counter() - started
            if body.endswith(b"\r\n0\r\n\r\n"):
                break
        else:
            self.close()
            return Answer(0, num_events, ttft, time.perf_counter() - started, head, bytes(body))
        if b"connection: close" in head:
            self.close()
        return Answer(int(head.split()[1]), num_events, ttft, time.perf_counter() - started, head, bytes(body))

    def close(self) -> None:
        if self._connection is not None:
            self._connection[1].close()
            self._connection = None

    async def __aenter__(self) -> "Client":
        return self

    async def __aexit__(self, *exception: object) -> None:
        self.close()


async def ask_all(
    port: int,
    num_clients: int,
    requests: list[WorkloadRequest],
    ask_one: Callable[[Client, WorkloadRequest], Awaitable[Any]],
) -> list[Any]:
    """Send the requests from `num_clients` clients. Each client sends its next request when it has its response.

    Returns the results of `ask_one`, in the order of completion.
    """
    todo, answers = iter(requests), []

    async def work() -> None:
        async with Client("127.0.0.1", port) as client:
            for request in todo:
                answers.append(await ask_one(client, request))

    await asyncio.gather(*(work() for _ in range(num_clients)))
    return answers


@contextmanager
def server(*arguments: str) -> Iterator[int]:
    """Start a server on the local machine, and yield its port when it is compiled and ready."""
    command = [sys.executable, "-m", "flex_nano_vllm.server", "--port", "0", *arguments]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, encoding="utf-8")
    try:
        lines = []
        for line in process.stderr:
            lines.append(line)
            if "Uvicorn running on" in line:
                break
        else:
            raise RuntimeError("the server did not start:\n" + "".join(lines))
        threading.Thread(target=process.stderr.read, daemon=True).start()  # a full pipe would block the server
        yield int(line.split("http://")[1].split()[0].rsplit(":", 1)[1])
    finally:
        process.terminate()
        process.wait()


@contextmanager
def loadable(model: str) -> Iterator[str]:
    """Yield a model that server and engine can load: for a shape with random weights, a temporary folder."""
    if model not in SHAPES:
        yield model
        return
    with tempfile.TemporaryDirectory() as folder:
        random_model(model).save_pretrained(folder)
        byte_tokenizer().save_pretrained(folder)
        yield folder


def bench(model: str, num_requests: int, num_clients: int, repeats: int, console: Console) -> dict:
    """Measure a server, with whole responses and with streams, and an offline engine of the same sizes, in turns."""
    requests = make_workload(num_requests, PROMPT_LENS, OUTPUT_LENS, TOKEN_IDS, seed=0)
    longest = PROMPT_LENS[1] + OUTPUT_LENS[1]
    console.print("starting the server and compiling (takes minutes on the first run)")
    with (
        loadable(model) as path,
        server("--model", path, "--served-model-name", model, "--max-seq-length", str(longest)) as port,
        Inference.from_pretrained(path, max_seq_length=longest) as engine,
    ):
        engine.warmup()

        def offline() -> list[FinishedRequest]:
            engine.reset_prefix_cache()
            params = [_params(request.max_tokens) for request in requests]
            outputs = engine.generate([list(request.prompt_token_ids) for request in requests], params, use_tqdm=False)
            return [
                FinishedRequest(len(o.prompt_token_ids), n := len(o["token_ids"]), o.metrics.ttft, o.metrics.tpot(n))
                for o in outputs
            ]

        def served(stream: bool) -> list[FinishedRequest]:
            async def ask_one(client: Client, request: WorkloadRequest) -> FinishedRequest:
                salt = str(random.random())  # no request is a cache hit of another
                body = dict(model=model, prompt=request.prompt_token_ids, max_tokens=request.max_tokens, temperature=0)
                answer = await client.ask(body | dict(ignore_eos=True, stream=stream, cache_salt=salt))
                if answer.status != 200 or (stream and b"data: [DONE]" not in answer.body[-40:]):
                    raise RuntimeError(f"the server answered {answer.status}: {answer.body[-500:]!r}")
                num_tokens, tpot = request.max_tokens, None
                if stream:
                    tpot = (answer.seconds - answer.ttft) / (num_tokens - 1)
                return FinishedRequest(len(request.prompt_token_ids), num_tokens, answer.ttft, tpot)

            return asyncio.run(ask_all(port, num_clients, requests, ask_one))

        kinds = {"offline": offline, "server": lambda: served(False), "server, streams": lambda: served(True)}
        runs: dict[str, list[dict]] = {name: [] for name in kinds}
        for turn in range(repeats + 1):
            for name, run in kinds.items():
                started = time.perf_counter()
                results = summarize(run(), time.perf_counter() - started, torch.device("cpu"))
                if turn:  # turn 0 is the warm-up
                    runs[name].append(strict(results))
    table = Table("", "output tok/s", "share of offline", "TTFT p50 / p99, ms", "TPOT p50 / p99, ms")
    rates = {name: statistics.median(run["output_tokens_per_s"] for run in of_kind) for name, of_kind in runs.items()}
    for name, of_kind in runs.items():
        last = of_kind[-1]
        times = [
            "-" if last[f"{t}_p50_ms"] is None else f"{last[f'{t}_p50_ms']:,.1f} / {last[f'{t}_p99_ms']:,.1f}"
            for t in ("ttft", "tpot")
        ]
        table.add_row(name, f"{rates[name]:,.0f}", f"{rates[name] / rates['offline']:.2f}", *times)
    console.print(table)
    return {"model": model, "num_requests": num_requests, "num_clients": num_clients, "runs": runs}


def main(
    model: Annotated[
        str, typer.Option(help="Folder, hub id, tiny-gemma2, or a shape with random weights: gemma2-tiny, ...")
    ] = "tiny-gemma2",
    num_requests: Annotated[int, typer.Option(help="Number of requests of each run.")] = 256,
    num_clients: Annotated[int, typer.Option(help="Number of concurrent clients.")] = 64,
    repeats: Annotated[int, typer.Option(help="Number of runs of each kind; the kinds alternate.")] = 3,
) -> None:
    """Compare the server under load with the same engine offline. The last line of the output is JSON."""
    needs_serve()
    print(json.dumps(bench(model, num_requests, num_clients, repeats, Console())))


def _params(max_tokens: int) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)


if __name__ == "__main__":
    typer.run(main)
