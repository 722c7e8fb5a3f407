"""Reports of benchmark runs: figures, a table, one JSON line, and a comparison of runs. Independent of any engine.

`benchmark.py` and `benchmark_vllm.py` both use this module, each in an environment of its own.
"""

import json
import platform
import resource
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import pandas as pd
import torch
import transformers
from rich.console import Console
from rich.table import Table

from benchmarks.workload import RunOptions, WorkloadRequest, digest

# Settings that become part of a run's name in a comparison if runs of that name differ in them
SIZES = ("max_batch_size", "max_seq_length", "n_pages", "page_size", "max_num_batched_tokens")
# Columns in which runs must agree; otherwise a ratio of them means nothing
SAME_WORK = ("model", "workload digest", "prompt tokens", "output tokens")


@dataclass(frozen=True)
class FinishedRequest:
    """Token counts and latencies of a request. `ttft` and `tpot` are in seconds, None where not measured."""

    num_prompt_tokens: int
    num_output_tokens: int
    ttft: float | None
    tpot: float | None


def summarize(requests: list[FinishedRequest], seconds: float, device: torch.device) -> dict:
    """Return throughput, latencies and peak memory of a finished run. Names that end in `_ms` mean milliseconds."""
    prompt_tokens = sum(request.num_prompt_tokens for request in requests)
    output_tokens = sum(request.num_output_tokens for request in requests)
    ttft = pd.Series([request.ttft for request in requests], dtype=float).dropna() * 1e3
    tpot = pd.Series([request.tpot for request in requests], dtype=float).dropna() * 1e3
    return {
        "seconds": seconds,
        "num_requests": len(requests),
        "prompt_tokens": prompt_tokens,
        "output_tokens": output_tokens,
        "requests_per_s": len(requests) / seconds,
        "output_tokens_per_s": output_tokens / seconds,
        "total_tokens_per_s": (prompt_tokens + output_tokens) / seconds,
        "ttft_p50_ms": ttft.quantile(0.5),
        "ttft_p99_ms": ttft.quantile(0.99),
        "tpot_p50_ms": tpot.quantile(0.5),
        "tpot_p99_ms": tpot.quantile(0.99),
        "peak_memory_gb": peak_memory_bytes(device) / 1e9,
    }


def print_results(results: dict, console: Console) -> None:
    table = Table("", "", show_header=False)
    for name, value in results.items():
        table.add_row(name.replace("_", " "), f"{value:,.2f}" if isinstance(value, float) else f"{value:,}")
    console.print(table)


def json_line(
    engine: str,
    version: str,
    mode: str,
    model: str,
    device: torch.device,
    options: RunOptions,
    requests: list[WorkloadRequest],
    warmup_seconds: float,
    results: dict,
    **more: object,
) -> str:
    """Return a run as one line of strict JSON."""
    record = {
        "engine": engine,
        "mode": mode,
        "versions": {
            engine: version,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "model": model,
        "settings": asdict(options),
        "warmup_seconds": round(warmup_seconds, 2),
        "workload_digest": digest(requests),
        **more,
        "results": strict(results),
    }
    return json.dumps(record, allow_nan=False)


def strict(results: dict) -> dict:
    """Make figures valid in JSON: round floats to four decimals, and replace NaN (not measured) by None (null)."""
    return {
        name: None if value != value else round(value, 4) if isinstance(value, float) else value
        for name, value in results.items()
    }


def compare_runs(paths: list[str], console: Console) -> None:
    """Print a table of the runs in the files, each with its ratio to the first one.

    A run is a JSON line; other lines are skipped. Several runs of the same engine, settings and machine are one line of
    the table, with their medians. Raises ValueError for a file without a run, and for runs with different work
    (`SAME_WORK`).
    """
    runs = [run for path in paths for run in _read_runs(path)]
    frame = pd.DataFrame(
        {
            "run": f"{run['engine']} {run['versions'][run['engine']]} {run['mode']}, {run['settings']['dtype']}",
            "machine": f"{run['device']}, {run['threads']} threads",
            "model": run["model"],
            "workload digest": run["workload_digest"],
            "prompt tokens": run["results"]["prompt_tokens"],
            "output tokens": run["results"]["output_tokens"],
            "tok/s": run["results"]["output_tokens_per_s"],
            "TTFT": run["results"]["ttft_p50_ms"],
            "TPOT": run["results"]["tpot_p50_ms"],
            "memory": run["results"]["peak_memory_gb"],
        }
        for run in runs
    )
    for name in SAME_WORK:
        if frame[name].nunique() > 1:
            raise ValueError(f"no ratio: the runs differ in {name}: {', '.join(map(str, frame[name].unique()))}")
    table = Table("run", "runs", "output tok/s", "ratio", "TTFT p50, ms", "TPOT p50, ms", "peak memory, GB")
    sizes = pd.DataFrame([run["settings"] for run in runs], columns=SIZES).astype(str)
    for _, group in frame.groupby("run"):
        for size in SIZES:
            if sizes.loc[group.index, size].nunique() > 1:
                frame.loc[group.index, "run"] += f", {size} " + sizes.loc[group.index, size]
    first = None
    for (name, machine), group in frame.groupby(["run", "machine"], sort=False):
        rate = group["tok/s"].median()
        first = first or rate
        medians = [f"{group[column].median():,.1f}" for column in ("TTFT", "TPOT", "memory")]
        table.add_row(f"{name}, {machine}", str(len(group)), f"{rate:,.0f}", f"{rate / first:.2f}", *medians)
    console.print(table)


def _read_runs(path: str) -> list[dict]:
    lines = Path(path).read_text(encoding="utf-8").splitlines()
    runs = [json.loads(line) for line in lines if line.startswith('{"engine"')]
    if not runs:
        raise ValueError(f"{path} contains no JSON line of a benchmark run")
    return runs


def peak_memory_bytes(device: torch.device) -> int:
    """Return the peak of allocated GPU memory, or on a CPU the peak of the process (without compiler processes)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes on macOS, in KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU ({torch.backends.cpu.get_cpu_capability()})"
