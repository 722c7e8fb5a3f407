# /// script
# requires-python = ">=3.10"
# dependencies = ["vllm", "accelerate", "pandas", "psutil", "rich", "tqdm"]
# ///
"""Run the benchmark's workload on vLLM: `uv run benchmark_vllm.py` with CUDA; for a CPU see docs/benchmarking.md.

The requests, the table, the JSON line and the CSV columns of `ENABLE_PROFILING=1` are those of `benchmark.py`;
`benchmark.py --compare FILE...` compares the runs of both. If vLLM cannot run, one line on stderr gives the reason, and
the exit status is 2.
"""

import os
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from types import ModuleType

import pandas as pd
import torch
from rich.console import Console
from transformers import AutoConfig, HfArgumentParser

from benchmarks.random_models import SHAPES, random_model
from benchmarks.report import FinishedRequest, device_name, json_line, print_results, summarize
from benchmarks.workload import DEFAULT_MODELS, RunOptions, WorkloadRequest, digest
from flex_nano_vllm.models import EMBEDDED_MODELS
from flex_nano_vllm.outputs import StepMetrics

# vLLM reads these variables when it is imported. Its scheduler runs in this process, so that its steps can be counted.
# Its threads are those of torch, not bound to cores. It sends no usage statistics.
SETTINGS = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
}


@dataclass
class Options(RunOptions):
    csv: str = field(
        default="profile_vllm.csv", metadata={"help": "CSV file for the steps, written if ENABLE_PROFILING=1"}
    )


def main() -> int:
    (options,) = HfArgumentParser(Options, description=__doc__.split("\n")[0]).parse_args_into_dataclasses()
    console = Console()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    options.fill_in(device.type)
    options.model = options.model or DEFAULT_MODELS[device.type]
    requests = options.requests()
    os.environ.update(SETTINGS | os.environ)
    started = time.perf_counter()
    try:
        import vllm

        llm = load(vllm, options)
    except (ImportError, RuntimeError, ValueError, OSError) as error:
        reason = (str(error) or repr(error)).splitlines()[0]
        print(f"vLLM cannot run here (docs/benchmarking.md describes the installation): {reason}", file=sys.stderr)
        return 2
    generate(vllm, llm, requests[:1])  # warm-up: calls all kernels for the first time
    warmup_seconds = time.perf_counter() - started
    mode = "compiled" if options.compile else "eager"
    console.print(f"vLLM {vllm.__version__}, {mode}, {options.model}, {options.dtype}, on {device_name(device)}")
    console.print(f"ready in {warmup_seconds:.1f} s\nworkload of {len(requests)} requests, digest {digest(requests)}")

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    finished, seconds, steps = generate(vllm, llm, requests)
    results = summarize(finished, seconds, device)
    assert results["output_tokens"] == sum(request.max_tokens for request in requests)
    results["preemptions"] = steps[-1].num_preemptions
    print_results(results, console)
    if os.environ.get("ENABLE_PROFILING") == "1":
        pd.DataFrame(map(asdict, steps)).to_csv(options.csv, index=False)
        console.print(f"{len(steps)} steps written to {options.csv}")
    print(json_line("vllm", vllm.__version__, mode, options.model, device, options, requests, warmup_seconds, results))
    return 0


def load(vllm: ModuleType, options: Options) -> object:
    path = str(EMBEDDED_MODELS.get(options.model, options.model))
    with tempfile.TemporaryDirectory() as folder:
        if path in SHAPES:
            random_model(path, getattr(torch, options.dtype)).save_pretrained(folder)
            path = folder
        return vllm.LLM(
            path,
            skip_tokenizer_init=True,
            dtype=options.dtype,
            max_model_len=options.max_seq_length,
            max_num_seqs=options.max_batch_size,
            max_num_batched_tokens=options.max_num_batched_tokens,
            kv_cache_memory_bytes=kv_bytes(path, options),
            enable_prefix_caching=False,
            enforce_eager=not options.compile,
        )


def kv_bytes(path: str, options: Options) -> int:
    """Return the bytes of as many pages as `benchmark.py` has with the same options, in all layers.

    One of these pages is reserved, in vLLM too.
    """
    config = AutoConfig.from_pretrained(path)
    n_pages = options.n_pages or 1 + options.max_batch_size * -(-options.max_seq_length // options.page_size)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    per_token = 2 * config.num_hidden_layers * config.num_key_value_heads * head_dim
    return n_pages * options.page_size * per_token * getattr(torch, options.dtype).itemsize


def generate(
    vllm: ModuleType, llm: object, requests: list[WorkloadRequest]
) -> tuple[list[FinishedRequest], float, list[StepMetrics]]:
    """Run the requests step by step, timed by the same clock as in `benchmark.py`.

    Returns the finished requests, the seconds of the run, and the metrics of each step.
    """
    engine = llm.llm_engine
    scheduler = engine.engine_core.engine_core.scheduler
    schedule, scheduled, num_preemptions = scheduler.schedule, {}, 0

    def schedule_and_note(*args: object, **kwargs: object) -> object:
        nonlocal num_preemptions
        computed = {id_: request.num_computed_tokens for id_, request in scheduler.requests.items()}
        output = schedule(*args, **kwargs)
        for id_, num_tokens in output.num_scheduled_tokens.items():
            is_decode = num_tokens == 1 and computed[id_] >= scheduler.requests[id_].num_prompt_tokens
            scheduled[id_] = (num_tokens, is_decode)
        num_preemptions += len(output.preempted_req_ids or ())
        return output

    scheduler.schedule = schedule_and_note
    first_token, finished, steps = {}, {}, []
    started = time.perf_counter()
    for i, request in enumerate(requests):
        params = vllm.SamplingParams(temperature=0, max_tokens=request.max_tokens, ignore_eos=True, detokenize=False)
        engine.add_request(str(i), {"prompt_token_ids": list(request.prompt_token_ids)}, params)
    while engine.has_unfinished_requests():
        scheduled.clear()
        step_started = time.perf_counter()
        outputs = engine.step()
        now = time.perf_counter()
        for output in outputs:
            i, num_tokens = int(output.request_id), len(output.outputs[0].token_ids)
            first_token.setdefault(i, now)
            if output.finished:
                ttft, rest = first_token[i] - started, now - first_token[i]
                tpot = rest / (num_tokens - 1) if num_tokens > 1 else None
                finished[i] = FinishedRequest(len(output.prompt_token_ids), num_tokens, ttft, tpot)
        pool = scheduler.kv_cache_manager.block_pool
        steps.append(
            StepMetrics(
                step=len(steps) + 1,
                time=now - started,
                duration=now - step_started,
                num_prefill_tokens=sum(num for num, is_decode in scheduled.values() if not is_decode),
                num_decode_tokens=sum(is_decode for _, is_decode in scheduled.values()),
                num_running=len(scheduler.running),
                num_waiting=len(scheduler.waiting),
                num_preemptions=num_preemptions,
                num_used_pages=pool.num_gpu_blocks - 1 - pool.get_num_free_blocks(),
                kv_usage=pool.get_usage(),
            )
        )
    scheduler.schedule = schedule
    return [finished[i] for i in range(len(requests))], now - started, steps


if __name__ == "__main__":
    sys.exit(main())
