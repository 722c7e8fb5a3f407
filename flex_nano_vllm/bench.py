"""The server under load, beside the same engine offline: in one run, in turns. Knows the API only, not the engine's
parts.

The clients are a few lines of their own, because they share the processors with the server: a client library would take
more of them than the server does.
"""

import asyncio
import json
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.table import Table

from flex_nano_vllm.inference import Inference
from flex_nano_vllm.report import FinishedRequest, summarize
from flex_nano_vllm.sampling_params import SamplingParams
from flex_nano_vllm.workload import TOKEN_IDS, WorkloadRequest, make_workload

PROMPT_LENS, OUTPUT_LENS = (32, 512), (32, 128)


@dataclass(frozen=True)
class Answer:
    """What one request got over HTTP. Times in seconds."""

    status: int  # 0: the client broke off
    num_events: int
    ttft: float | None  # to the first event of a stream
    seconds: float
    body: bytes  # as it came, chunk marks included


async def ask(
    host: str, port: int, request: dict, path: str = "/v1/completions", breaks_off_after: int | None = None
) -> Answer:
    """Send one request on a connection of its own, and read the answer: to its end, or up to so many events."""
    payload = json.dumps(request).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\nConnection: close\r\n"
    started = time.perf_counter()
    reader, writer = await asyncio.open_connection(host, port)
    parts, num_events, ttft = [], 0, None
    try:
        writer.write(f"{head}Content-Length: {len(payload)}\r\n\r\n".encode() + payload)
        while breaks_off_after is None or num_events < breaks_off_after:
            part = await reader.read(65_536)
            if not part:
                break
            parts.append(part)
            num_events += part.count(b"data: ")
            if num_events and ttft is None:
                ttft = time.perf_counter() - started
    finally:
        writer.close()
    body = b"".join(parts)
    broke_off = breaks_off_after is not None and num_events >= breaks_off_after
    status = 0 if broke_off or not body else int(body.split(b" ", 2)[1])
    return Answer(status, num_events, ttft, time.perf_counter() - started, body)


async def ask_all(
    num_clients: int, requests: list[WorkloadRequest], ask_one: Callable[[WorkloadRequest], object]
) -> list[Answer]:
    """Let so many clients work through the requests, each asking the next one as soon as it has its answer."""
    todo, answers = iter(requests), []

    async def client() -> None:
        for request in todo:
            answers.append(await ask_one(request))

    await asyncio.gather(*(client() for _ in range(num_clients)))
    return answers


@contextmanager
def server(*arguments: str) -> Iterator[int]:
    """A server on the local machine, ready and compiled. Gives its port."""
    command = [sys.executable, "-m", "flex_nano_vllm.server", "--port", "0", *arguments]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        lines = []
        for line in process.stderr:
            lines.append(line)
            if "Uvicorn running on" in line:
                break
        else:
            raise RuntimeError("the server has not started:\n" + "".join(lines))
        yield int(line.split("http://")[1].split()[0].rsplit(":", 1)[1])
    finally:
        process.terminate()
        process.communicate()


def bench(model: str, num_requests: int, num_clients: int, repeats: int, console: Console) -> dict:
    """Ask a server for whole answers and for streams, and an engine of the same sizes offline, in turns."""
    requests = make_workload(num_requests, PROMPT_LENS, OUTPUT_LENS, TOKEN_IDS, seed=0)
    longest = PROMPT_LENS[1] + OUTPUT_LENS[1]
    console.print("starting the server and compiling, which takes minutes the first time")
    with (
        server("--model", model, "--max-seq-length", str(longest)) as port,
        Inference.from_pretrained(model, max_seq_length=longest) as engine,
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
            async def ask_one(request: WorkloadRequest) -> FinishedRequest:
                salt = str(random.random())  # nothing is found computed
                body = dict(model=model, prompt=request.prompt_token_ids, max_tokens=request.max_tokens, temperature=0)
                answer = await ask("127.0.0.1", port, body | dict(ignore_eos=True, stream=stream, cache_salt=salt))
                if answer.status != 200 or (stream and b"data: [DONE]" not in answer.body[-40:]):
                    raise RuntimeError(f"the server answered: {answer.body[-500:]!r}")
                num_tokens, tpot = request.max_tokens, None
                if stream:
                    tpot = (answer.seconds - answer.ttft) / (num_tokens - 1)
                return FinishedRequest(len(request.prompt_token_ids), num_tokens, answer.ttft, tpot)

            return asyncio.run(ask_all(num_clients, requests, ask_one))

        kinds = {"offline": offline, "server": lambda: served(False), "server, streams": lambda: served(True)}
        runs: dict[str, list[dict]] = {name: [] for name in kinds}
        for turn in range(repeats + 1):
            for name, run in kinds.items():
                started = time.perf_counter()
                results = summarize(run(), time.perf_counter() - started, torch.device("cpu"))
                if turn:  # the first one warms up
                    runs[name].append(results)
    table = Table("", "output tok/s", "of offline", "TTFT p50 / p99, ms", "TPOT p50 / p99, ms")
    rates = {name: statistics.median(run["output_tokens_per_s"] for run in of_kind) for name, of_kind in runs.items()}
    for name, of_kind in runs.items():
        last = of_kind[-1]
        times = (f"{last[f'{t}_p50_ms']:,.1f} / {last[f'{t}_p99_ms']:,.1f}" for t in ("ttft", "tpot"))
        table.add_row(name, f"{rates[name]:,.0f}", f"{rates[name] / rates['offline']:.2f}", *times)
    console.print(table)
    return {"model": model, "num_requests": num_requests, "num_clients": num_clients, "runs": runs}


def _params(max_tokens: int) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)
