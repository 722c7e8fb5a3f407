"""Is the engine right, and how fast is it? `uv run benchmark.py` answers both on any machine.

1. Exactness: greedy tokens of a few prompts against Hugging Face `generate`: alone, batched, reordered, among
   strangers, under preemption. A token that `generate` would not have chosen is a mismatch, and the exit status 1,
   unless Hugging Face's own log-probabilities put it within a tolerance of its choice: then it is a near-tie, counted
   and shown.
2. Answers, if the model is the trained one in the package: the engine's and `generate`'s to questions with one right
   answer. One that differs is an exit status of 1, too.
3. Throughput: a seeded workload of fixed lengths, with latencies and memory.

The last line of stdout is one JSON object. `ENABLE_PROFILING=1` also writes a line per step to profile.csv.
"""

import json
import os
import platform
import resource
import sys
import time
from dataclasses import asdict, dataclass, field

import pandas as pd
import torch
import transformers
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser, PreTrainedModel

import flex_nano_vllm
from flex_nano_vllm import Inference, RequestOutput, SamplingParams
from flex_nano_vllm.exactness import NEAR_TIE, compare, greedy_in_all_company, hf_generate
from flex_nano_vllm.inference import EMBEDDED_MODELS
from flex_nano_vllm.random_models import GEMMA2_SHAPES, byte_tokenizer, random_gemma2
from flex_nano_vllm.tasks import TASKS, held_out_questions, is_right, prompt_text
from flex_nano_vllm.workload import digest, make_workload

GEMMA_2_2B = "google/gemma-2-2b"
TINY_GEMMA2 = "tiny-gemma2"
TOKEN_IDS = range(5, 259)  # ordinary tokens of every vocabulary: five special ones come before, in that of tiny-gemma2
TEXTS = (
    "The 12 months of the year are: January, February, March,",
    "The first 20 prime numbers are: 2, 3,",
)
# Asked of the trained model, whose answers to them a lost window or softcap changes.
QUESTIONS = {"long lookup": 4, "reversing": 4, "stories": 4}
# Random tokens, of lengths next to page boundaries and past the window. (The trained model has little to say to them.)
PROMPT_LENS = (1, 120, 127, 128, 250, 380)
EXACTNESS_TOKENS = 80  # as many as the list of primes takes
NUM_STRANGERS = 16
QUESTIONS_PER_TASK = 8
ANSWER_TOKENS = 128
CHECK_TOKENS = 512  # prompt and output of the longest request in either check


@dataclass
class Options:
    """Sizes left at their default depend on the device: see `main`."""

    model: str | None = field(
        default=None,
        metadata={
            "help": "folder, hub id, tiny-gemma2, or a shape with random weights (gemma2-tiny, gemma-2-2b); "
            "default: google/gemma-2-2b on a GPU, tiny-gemma2 on a CPU"
        },
    )
    dtype: str | None = field(default=None, metadata={"help": "default: bfloat16 on a GPU, float32 on a CPU"})
    num_requests: int | None = field(default=None, metadata={"help": "default: 512 on a GPU, 64 on a CPU"})
    max_prompt_len: int = 512
    min_new_tokens: int | None = field(default=None, metadata={"help": "default: 128 on a GPU, 32 on a CPU"})
    max_new_tokens: int | None = field(default=None, metadata={"help": "default: 512 on a GPU, 128 on a CPU"})
    max_batch_size: int | None = field(default=None, metadata={"help": "default: 256 on a GPU, 32 on a CPU"})
    max_seq_length: int = 1024
    n_pages: int | None = field(default=None, metadata={"help": "default: from free memory"})
    page_size: int = 128
    max_num_batched_tokens: int | None = field(default=None, metadata={"help": "token budget of a step"})
    compile: bool = True
    check: bool = field(default=True, metadata={"help": "check exactness"})
    seed: int = 0
    csv: str = field(default="profile.csv", metadata={"help": "where ENABLE_PROFILING=1 writes its steps"})


def main() -> int:
    (options,) = HfArgumentParser(Options, description=__doc__.split("\n")[0]).parse_args_into_dataclasses()
    console = Console()
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")
    for name, gpu_default, cpu_default in (
        ("dtype", "bfloat16", "float32"),
        ("num_requests", 512, 64),
        ("min_new_tokens", 128, 32),
        ("max_new_tokens", 512, 128),
        ("max_batch_size", 256, 32),
    ):
        if getattr(options, name) is None:
            setattr(options, name, gpu_default if on_gpu else cpu_default)
    if options.max_prompt_len + options.max_new_tokens > options.max_seq_length:
        sys.exit(f"max_prompt_len and max_new_tokens add up to more than max_seq_length={options.max_seq_length}")
    model, tokenizer, model_name = load(options.model, getattr(torch, options.dtype), device, console)
    console.print(f"{model_name}, {options.dtype}, on {device_name(device)}, torch {torch.__version__}")

    def build_engine(n_pages: int | None) -> Inference:
        return Inference(
            model,
            tokenizer,
            options.max_batch_size,
            options.max_seq_length,
            n_pages,
            options.page_size,
            max_num_batched_tokens=options.max_num_batched_tokens,
            compile=None if options.compile else False,
            record_steps=os.environ.get("ENABLE_PROFILING") == "1",
        )

    started = time.perf_counter()
    graphs_before = num_graphs()
    engine = build_engine(options.n_pages)
    if options.check and engine.max_request_tokens < CHECK_TOKENS:
        sys.exit(
            f"the checks need requests of {CHECK_TOKENS} tokens, but max_seq_length and the pool allow "
            f"{engine.max_request_tokens}: raise them, or pass --no_check"
        )
    engine.warmup()
    warmup_seconds = time.perf_counter() - started
    num_compiled = num_graphs() - graphs_before
    mode = f"{num_compiled} of at most {engine.runner.max_graphs} graphs" if engine.runner.compiled else "uncompiled"
    console.print(f"ready in {warmup_seconds:.1f} s: {mode}, {engine.page_table.n_pages} pages of {options.page_size}")

    exactness = answers = None
    n_pages = engine.page_table.n_pages  # a pool of another size would be compiled anew
    if options.check:
        texts = [*TEXTS, *(exactness_questions() if model_name == TINY_GEMMA2 else ())]
        exactness = check_exactness(engine, model, texts, options, console)
        engine = build_engine(n_pages)
    if options.check and model_name == TINY_GEMMA2:
        answers = check_answers(engine, model, console)
        engine = build_engine(n_pages)

    requests = make_workload(
        options.num_requests,
        prompt_lens=(1, options.max_prompt_len),
        output_lens=(options.min_new_tokens, options.max_new_tokens),
        token_ids=TOKEN_IDS,
        seed=options.seed,
    )
    console.print(f"\nworkload of {len(requests)} requests, digest {digest(requests)}")
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    graphs_before = num_graphs()
    started = time.perf_counter()
    outputs = engine.generate(
        [list(request.prompt_token_ids) for request in requests],
        [SamplingParams(temperature=0, max_tokens=r.max_tokens, ignore_eos=True) for r in requests],
        use_tqdm=sys.stderr.isatty(),
    )
    seconds = time.perf_counter() - started
    results = summarize(outputs, seconds)
    assert results["output_tokens"] == sum(request.max_tokens for request in requests), "the pool cut answers short"
    results["preemptions"] = engine.stats().num_preemptions
    results["peak_memory_gb"] = peak_memory_bytes(device) / 1e9
    results["graphs_compiled_while_timed"] = num_graphs() - graphs_before
    print_results(results, console)

    if engine.steps:
        pd.DataFrame(map(asdict, engine.steps)).to_csv(options.csv, index=False)
        console.print(f"{len(engine.steps)} steps written to {options.csv}")
    record = {
        "engine": "flex-nano-vllm",
        "versions": {
            "flex_nano_vllm": flex_nano_vllm.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "model": model_name,
        "settings": asdict(options)
        | {"n_pages": engine.page_table.n_pages, "compiled": engine.runner.compiled}
        | {"max_num_batched_tokens": engine.scheduler.max_num_batched_tokens},
        "warmup_seconds": round(warmup_seconds, 2),
        "num_graphs": num_compiled,
        "workload_digest": digest(requests),
        "exactness": exactness,
        "answers": answers,
        "results": {
            name: None if value != value else round(value, 4) if isinstance(value, float) else value
            for name, value in results.items()
        },
    }
    print(json.dumps(record))
    wrong = (exactness and exactness["mismatches"], answers and answers["different"])
    return 1 if any(wrong) else 0


def load(
    name: str | None, dtype: torch.dtype, device: torch.device, console: Console
) -> tuple[PreTrainedModel, transformers.PreTrainedTokenizerBase, str]:
    """The model asked for, or the device's default: on a GPU its shape with random weights where it cannot be had."""
    if name is None and device.type == "cpu":
        name = TINY_GEMMA2
    if name in GEMMA2_SHAPES:
        return random_gemma2(name, dtype, device), byte_tokenizer(), f"{name} (random weights)"
    path = str(EMBEDDED_MODELS.get(name, name or GEMMA_2_2B))
    try:
        model = AutoModelForCausalLM.from_pretrained(
            path,
            dtype=dtype,
            device_map=device,
            use_safetensors=True,
            attn_implementation="eager",  # for the oracle: older transformers would choose sdpa, which has no softcap
        )
        return model, AutoTokenizer.from_pretrained(path), name or path
    except OSError as error:
        if name is not None:
            raise
        console.print(f"{path} cannot be had ({str(error).splitlines()[0]}): its shape with random weights")
        return load(path.removeprefix("google/"), dtype, device, console)


def exactness_questions() -> list[str]:
    return [question.prompt for task, num in QUESTIONS.items() for question in held_out_questions(task, num, seed=2)]


def check_exactness(
    engine: Inference, model: PreTrainedModel, texts: list[str], options: Options, console: Console
) -> dict:
    """Run the same prompts in five kinds of company and hold each to Hugging Face. Closes the engine."""
    prompts = [engine.tokenizer(text).input_ids for text in texts]
    prompts += [list(make_workload(1, (n, n), (1, 1), TOKEN_IDS, seed=n)[0].prompt_token_ids) for n in PROMPT_LENS]
    longest = options.max_seq_length - EXACTNESS_TOKENS
    strangers = make_workload(NUM_STRANGERS, (1, longest), (1, 1), TOKEN_IDS, seed=options.seed + 1)
    scenarios = greedy_in_all_company(engine, prompts, [list(s.prompt_token_ids) for s in strangers], EXACTNESS_TOKENS)
    num_preemptions = engine.stats().num_preemptions
    engine.close()

    for text, tokens in zip(TEXTS, scenarios["batched"]):
        completion = engine.tokenizer.decode(tokens, skip_special_tokens=True)
        show_completion(text, completion, console)
    expected = [hf_generate(model, prompt, EXACTNESS_TOKENS) for prompt in prompts]
    comparisons = {name: compare(model, prompts, outputs, expected) for name, outputs in scenarios.items()}
    table = Table("scenario", "equal to generate", "near-ties", "mismatches", title="exactness against Hugging Face")
    for name, result in comparisons.items():
        equal = f"{result.num_equal} of {result.num_outputs}"
        table.add_row(name, equal, str(result.near_ties), str(result.mismatches))
    console.print(table)
    counts = {
        "tokens": sum(result.num_tokens for result in comparisons.values()),
        "mismatches": sum(result.mismatches for result in comparisons.values()),
        "near_ties": sum(result.near_ties for result in comparisons.values()),
        "largest_near_tie": max(result.largest_near_tie for result in comparisons.values()),
        "preemptions": num_preemptions,
    }
    console.print(
        f"{counts['tokens']} tokens, {num_preemptions} preemptions; near-tie: up to {NEAR_TIE[model.dtype]} nats less "
        f"likely than Hugging Face's own choice, largest seen {counts['largest_near_tie']:.2g}"
    )
    return counts


def check_answers(engine: Inference, model: PreTrainedModel, console: Console) -> dict:
    """Held-out questions of every task, every other one as a chat turn, to the engine and to `generate`. Closes the
    engine."""
    tokenizer = engine.tokenizer
    questions = [question for task in TASKS for question in held_out_questions(task, QUESTIONS_PER_TASK, seed=2)]
    texts = [prompt_text(question, tokenizer if i % 2 else None) for i, question in enumerate(questions)]
    outputs = engine.generate(texts, SamplingParams(temperature=0, max_tokens=ANSWER_TOKENS), use_tqdm=False)
    engine.close()

    rows = []
    for i, (question, output) in enumerate(zip(questions, outputs)):
        if i % QUESTIONS_PER_TASK == 0:
            show_completion(question.prompt, output.outputs[0].text, console)
        tokens = hf_generate(model, output.prompt_token_ids, ANSWER_TOKENS)
        texts = tokenizer.batch_decode([output.outputs[0].token_ids, tokens], skip_special_tokens=True)
        rows.append(
            {
                "task": question.task,
                "questions": 1,
                "right": is_right(question, texts[0]),
                "right_by_generate": is_right(question, texts[1]),
                "different": output.outputs[0].token_ids != tokens,  # the EOS among them
            }
        )
        if rows[-1]["different"]:
            show_completion(question.prompt, f"{texts[0]}, but generate: {texts[1]}", console)
    by_task = pd.DataFrame(rows).groupby("task", sort=False).sum()
    table = Table("task", "questions", "right", "right by generate", "different", title="answers, engine and generate")
    for task, counts in by_task.iterrows():
        table.add_row(task, *map(str, counts))
    console.print(table)
    return {name: int(total) for name, total in by_task.sum().items()}


def show_completion(prompt: str, text: str, console: Console) -> None:
    shortened = prompt if len(prompt) <= 80 else f"{prompt[:30]} … {prompt[-45:]}"
    console.print(f"  {shortened!r} -> {text!r}", markup=False, highlight=False)


def summarize(outputs: list[RequestOutput], seconds: float) -> dict:
    """Throughput and latencies of a finished run; times in milliseconds where the name says so."""
    num_prompt_tokens = sum(len(output.prompt_token_ids) for output in outputs)
    num_output_tokens = sum(len(output.outputs[0].token_ids) for output in outputs)
    ttft = pd.Series([output.metrics.ttft for output in outputs], dtype=float) * 1e3
    tpot = pd.Series([o.metrics.tpot(len(o.outputs[0].token_ids)) for o in outputs], dtype=float).dropna() * 1e3
    return {
        "seconds": seconds,
        "num_requests": len(outputs),
        "prompt_tokens": num_prompt_tokens,
        "output_tokens": num_output_tokens,
        "requests_per_s": len(outputs) / seconds,
        "output_tokens_per_s": num_output_tokens / seconds,
        "total_tokens_per_s": (num_prompt_tokens + num_output_tokens) / seconds,
        "ttft_p50_ms": ttft.quantile(0.5),
        "ttft_p99_ms": ttft.quantile(0.99),
        "tpot_p50_ms": tpot.quantile(0.5),
        "tpot_p99_ms": tpot.quantile(0.99),
    }


def print_results(results: dict, console: Console) -> None:
    table = Table("", "", show_header=False)
    for name, value in results.items():
        table.add_row(name.replace("_", " "), f"{value:,.2f}" if isinstance(value, float) else f"{value:,}")
    console.print(table)


def num_graphs() -> int:
    """Graphs that torch.compile has made in this process."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def peak_memory_bytes(device: torch.device) -> int:
    """Peak of allocated device memory, or of the process on a CPU (its compiler runs not included)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes on macOS, in KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU ({torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads)"


if __name__ == "__main__":
    sys.exit(main())
