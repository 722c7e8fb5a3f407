"""Everything that only a GPU can show, in one command: tests, exactness, throughput, other engines, switches, roofline.

    uv run python -m benchmarks.gpu_day --minutes 30 --output results/my-gpu

Each part is a command of this repository in a process of its own. `<output>/<part>.json` has its result, and
`<output>/<part>.log` its output. A second run with the same output skips the parts that are done.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.report import device_name

ROOT = Path(__file__).parent.parent
NUM_LAST_LINES = 20  # of its output, in the record of a part
SHARE_OF_POOL = re.compile(r"(\d+)%of-(\S+)")  # an argument: a share of the pages that another part had
HAS_VLLM = "import importlib.util, sys; sys.exit(importlib.util.find_spec('vllm') is None)"


@dataclass(frozen=True)
class Part:
    """A part of the day.

    Args:
        minutes: expected on a GPU. The part does not start if less is left.
        arguments: of `python -m`. `{model}` is the model of the workload, and `{output}` the folder of the results.
        pretended: further arguments, with which the part is short although an interpreter runs the kernels.
    """

    name: str
    minutes: float
    arguments: str
    pretended: str = ""


SHORT = (
    "--model gemma2-mini --num_requests 2 --max_prompt_len 20 --min_new_tokens 2 --max_new_tokens 4 "
    "--max_batch_size 1 --max_seq_length 96 --page_size 16 --max_num_batched_tokens 64"
)
SHORT_CHECK = f"{SHORT} --max_batch_size 2 --check_len 2"
UNCOMPILED = f"{SHORT} --no_compile"  # of parts whose kernels another part has run
WORKLOAD = "benchmark --model {model} --no_check --no_roofline"
# In the order of their value.
PARTS = (
    Part("tests", 6, "pytest -m gpu", "-n 0 tests/test_gpu.py"),
    Part("exact-float32", 4, "benchmark --model tiny-gemma2 --dtype float32 --no_roofline", SHORT_CHECK),
    Part("exact-bfloat16", 4, "benchmark --model tiny-gemma2 --dtype bfloat16 --no_roofline", SHORT_CHECK),
    Part("workload", 5, WORKLOAD + " --csv {output}/profile.csv", SHORT),
    Part("workload-90", 4, WORKLOAD + " --n_pages 90%of-workload", UNCOMPILED),
    Part("workload-50", 4, WORKLOAD + " --n_pages 50%of-workload", UNCOMPILED),
    Part("hf", 5, "benchmark --model {model} --baseline hf --max_batch_size 64", SHORT),
    Part("vllm", 6, "benchmark_vllm --model {model} --n_pages 90%of-workload --csv {output}/profile_vllm.csv", SHORT),
    Part(
        "switches",
        10,
        "benchmarks.switches",
        "--model gemma2-mini --dtype float32 --batch-sizes 2 --prompt-len 1 --num-steps 1 --page-size 16 --turns 1",
    ),
    Part("roofline", 4, "benchmark --model {model} --no_check --num_requests 1", UNCOMPILED),
)


@dataclass(frozen=True)
class Day:
    """Where and how the parts run. `pretend`: the pretended GPU, see `pretended_gpu.py`; None: the real one."""

    output: Path
    model: str
    vllm_python: str
    pretend: str | None

    @property
    def device(self) -> str:
        return f"pretended {self.pretend}" if self.pretend else device_name(torch.device("cuda"))

    def record(self, name: str) -> dict:
        """Return the record of a part; an empty one if the part has not run."""
        try:
            return json.loads((self.output / f"{name}.json").read_text(encoding="utf-8"))
        except FileNotFoundError:
            return {}

    def is_done(self, part: Part) -> bool:
        """Return whether this command, and no other one of this name, has succeeded on this device."""
        record = self.record(part.name)
        asked = "done", self.device, self.obstacle(part) or self.command(part)
        return (record.get("status"), record.get("device"), record.get("command")) == asked

    def obstacle(self, part: Part) -> str | None:
        """Return the reason why a part cannot run, or None if it can."""
        needed = SHARE_OF_POOL.search(part.arguments)
        if needed and not self.record(needed[2]).get("result"):
            return f"needs the result of {needed[2]}"
        if part.name == "vllm" and subprocess.run([self.vllm_python, "-c", HAS_VLLM]).returncode:
            return f"vllm is not installed for {self.vllm_python}: see --vllm-python"
        return None

    def command(self, part: Part) -> list[str]:
        def words(arguments: str) -> list[str]:
            return [SHARE_OF_POOL.sub(pages, word.format(**vars(self))) for word in arguments.split()]

        def pages(share: re.Match) -> str:
            return str(int(share[1]) * self.record(share[2])["result"]["settings"]["n_pages"] // 100)

        python = [self.vllm_python if part.name == "vllm" else sys.executable, "-m"]
        if self.pretend is None:
            return [*python, *words(part.arguments)]
        return [*python, "benchmarks.pretended_gpu", self.pretend, *words(part.arguments), *words(part.pretended)]

    def run(self, part: Part, seconds: float) -> str:
        """Run a part for at most `seconds`, write its record, and return its status."""
        command, log, started = self.command(part), self.output / f"{part.name}.log", time.monotonic()
        environment = os.environ | {"ENABLE_PROFILING": str(int("--csv" in command)), "PYTHONUNBUFFERED": "1"}
        if self.pretend:
            environment["TRITON_INTERPRET"] = "1"  # before triton is imported
        with log.open("w", encoding="utf-8") as file:
            options = dict(stdout=file, stderr=subprocess.STDOUT, cwd=ROOT, env=environment, start_new_session=True)
            process = subprocess.Popen(command, **options)
            try:
                status = "failed" if process.wait(seconds) else "done"
            except subprocess.TimeoutExpired:
                status = "out of time"
            finally:  # also processes that the part has started, and after an interrupt
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
        results = [line for line in lines if line.startswith('{"')]
        record = {
            "status": status,
            "exit_status": process.returncode,
            "command": command,
            "seconds": round(time.monotonic() - started, 3),
            "device": self.device,
            "versions": {name: version(name) for name in ("flex-nano-vllm", "torch", "transformers")},
            "result": json.loads(results[-1]) if results and status == "done" else None,
            "last_lines": lines[-NUM_LAST_LINES:],
        }
        written = self.output / f"{part.name}.json.partial"
        written.write_text(json.dumps(record, indent=1), encoding="utf-8")
        written.replace(self.output / f"{part.name}.json")
        return status


def run_parts(day: Day, parts: list[Part], minutes: float, console: Console) -> int:
    """Run the parts that are not done, and print a table. Returns the exit status: 1 if a part failed."""
    deadline, statuses = time.monotonic() + 60 * minutes, {}
    for part in parts:
        left = deadline - time.monotonic()
        if day.is_done(part):
            statuses[part.name] = "done before"
        elif obstacle := day.obstacle(part):
            statuses[part.name] = f"skipped: {obstacle}"
        elif left < 60 * part.minutes:
            statuses[part.name] = f"not started: it takes {part.minutes:g} minutes, and {left / 60:.1f} are left"
        else:
            console.print(f"{part.name}, about {part.minutes:g} minutes on a GPU")
            statuses[part.name] = day.run(part, left)
    table = Table("part", "status", "seconds", "output tok/s", title=day.device)
    for name, status in statuses.items():
        record = day.record(name)
        rate = ((record.get("result") or {}).get("results") or {}).get("output_tokens_per_s")
        table.add_row(name, status, str(record.get("seconds", "")), f"{rate:,.0f}" if rate else "")
    console.print(table)
    return int("failed" in statuses.values())


def main(
    output: Annotated[Path, typer.Option(help="Folder of the results.")] = Path("results/gpu"),
    minutes: Annotated[float, typer.Option(help="Time limit. A part that still runs then is killed.")] = 30,
    only: Annotated[str, typer.Option(help="Names of parts to run, separated by commas.")] = "",
    list_parts: Annotated[bool, typer.Option("--list", help="Print the parts and stop.")] = False,
    model: Annotated[str, typer.Option(help="Model of the workload, see docs/benchmarking.md.")] = "gemma-2-2b",
    vllm_python: Annotated[str, typer.Option(help="Python of an environment with vLLM.")] = sys.executable,
    pretend: Annotated[str | None, typer.Option(help="Interpret kernels for this GPU: a tiny model, no GPU.")] = None,
) -> None:
    """Run everything that needs a GPU, part by part. The exit status is 1 if a part failed."""
    console, names = Console(), [part.name for part in PARTS]
    if unknown := sorted(set(filter(None, only.split(","))) - set(names)):
        raise SystemExit(f"no part is called {', '.join(unknown)}: the parts are {', '.join(names)}")
    parts = [part for part in PARTS if not only or part.name in only.split(",")]
    if list_parts:
        for part in parts:
            console.print(f"{part.name:15} {part.minutes:3g} minutes: {part.arguments}", highlight=False)
        return
    if pretend is None and not torch.cuda.is_available():
        raise SystemExit("there is no CUDA device: run this on a machine with a GPU, or pass --pretend 'RTX 3090'")
    output.mkdir(parents=True, exist_ok=True)
    raise SystemExit(run_parts(Day(output.resolve(), model, vllm_python, pretend), parts, minutes, console))


if __name__ == "__main__":
    typer.run(main)
