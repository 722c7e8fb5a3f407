"""Check that the engine is correct and measure its speed: `uv run benchmark.py` runs on any machine.

1. Exactness: compare the greedy tokens of a few prompts with Hugging Face. The prompts run alone, batched, in reverse
   order, together with unrelated requests ("among strangers"), and under preemption. A token that is not Hugging
   Face's own choice is a near-tie if its log-probability is within a tolerance of that choice, and a mismatch
   otherwise. Near-ties are counted and shown. A mismatch makes the exit status 1.
2. Answers, only for tiny-gemma2, the trained model in the package: compare the answers of the engine with those of
   `generate`, for questions with one right answer. A different answer makes the exit status 1.
3. Throughput: run a seeded workload of fixed lengths, and report latencies and memory.
4. Roofline: compare prefill and decode steps with the memory bandwidth and the matmul rate of this machine.

The last line of stdout is one JSON object. `ENABLE_PROFILING=1` also writes one line per step to profile.csv.
"""

import os
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
from benchmarks.baselines import continuous_batching, padded_batches
from benchmarks.crossover import report_crossover
from benchmarks.exactness import NEAR_TIE, compare, greedy_in_batches, hf_generate
from benchmarks.overhead import report_overhead
from benchmarks.random_models import SHAPES, byte_tokenizer, random_model
from benchmarks.report import (
    FinishedRequest,
    compare_runs,
    device_name,
    json_line,
    print_results,
    summarize,
)
from benchmarks.roofline import measure_machine, measure_shares
from benchmarks.savings import PARTS, Sizes, report_savings
from benchmarks.tasks import TASKS, held_out_questions, is_right, prompt_text
from benchmarks.workload import DEFAULT_MODELS, TOKEN_IDS, RunOptions, digest, make_workload
from flex_nano_vllm import Inference, RequestOutput, SamplingParams
from flex_nano_vllm.models import EMBEDDED_MODELS

TINY_GEMMA2 = "tiny-gemma2"
TEXTS = (
    "The 12 months of the year are: January, February, March,",
    "The first 20 prime numbers are: 2, 3,",
)
# Questions for the trained model, by task. Its answers change if a sliding window or a softcap is not applied.
QUESTIONS = {"long lookup": 4, "reversing": 4, "stories": 4}
# Lengths of random prompts: near page boundaries and beyond the window. (The trained model answers them briefly.)
PROMPT_LENS = (1, 120, 127, 128, 250, 600)
EXACTNESS_TOKENS = 80  # enough for the list of primes
NUM_STRANGERS = 16
QUESTIONS_PER_TASK = 8
ROOFLINE_BATCHES = (1, 32, 256)
ROOFLINE_PROMPT_LEN = 256
ANSWER_TOKENS = 128
CHECK_TOKENS = max(PROMPT_LENS) + EXACTNESS_TOKENS  # prompt and output of the longest request in both checks


@dataclass
class Options(RunOptions):
    check: bool = field(default=True, metadata={"help": "compare tokens and answers with Hugging Face first"})
    check_len: int = field(
        default=max(PROMPT_LENS),
        metadata={"help": "tokens of the longest random prompt in the exactness check, and at most of its outputs"},
    )
    roofline: bool = field(default=True, metadata={"help": "compare the time of steps with the limits of the machine"})
    baseline: str | None = field(
        default=None,
        metadata={
            "help": "run the workload without the engine: hf (generate on padded batches) or hf-cb (transformers' "
            "continuous batching; an error if its tokens are wrong)"
        },
    )
    csv: str = field(default="profile.csv", metadata={"help": "CSV file for the steps, written if ENABLE_PROFILING=1"})
    attention: bool = field(
        default=False,
        metadata={
            "help": "time attention alone, paged and on gathered pages, at fixed sizes; needs no model and no engine"
        },
    )
    overhead: bool = field(
        default=False,
        metadata={
            "help": "time decode steps, and the host's share of them, over batch size, pool size, waiting requests and "
            "streams, max_seq_length and the length of outputs (at fixed values; engines of each size are compiled "
            "again)"
        },
    )
    savings: list[str] = field(
        default_factory=list,
        metadata={
            "help": "measure what prefix caching, cascade attention and the release of pages outside a window save: "
            f"{', '.join(PARTS)}, or all (at fixed lengths; engines of each size are compiled again)"
        },
    )
    compare: list[str] = field(
        default_factory=list,
        metadata={
            "help": "files with JSON lines of runs, also of benchmark_vllm.py: only print a comparison of these runs"
        },
    )
    plot: list[str] = field(
        default_factory=list,
        metadata={
            "help": "only plot files (extra: plot): CSVs of runs to profile.png, or --savings output to savings.png"
        },
    )


def main() -> int:
    (options,) = HfArgumentParser(Options, description=__doc__.split("\n")[0]).parse_args_into_dataclasses()
    console = Console()
    if options.compare:
        try:
            compare_runs(options.compare, console)
        except (ValueError, OSError) as error:
            raise SystemExit(str(error)) from None
        return 0
    if options.plot:
        from benchmarks.plots import plot_savings, plot_steps  # needs matplotlib, an optional dependency

        if options.plot[0].endswith(".csv"):
            plot_steps(options.plot, "profile.png")
        else:
            plot_savings(options.plot, "savings.png")
        return 0
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    options.fill_in(device.type)
    if options.attention:
        report_crossover(device, options.dtype, console)
        return 0
    model, tokenizer, model_name = load(options.model, getattr(torch, options.dtype), device, console)
    console.print(f"{model_name}, {options.dtype}, on {device_name(device)}, torch {torch.__version__}")
    if options.overhead:
        report_overhead(model, options, console)
        return 0
    if options.savings:
        try:
            report_savings(model, options, Sizes(), options.savings, console)
        except ValueError as error:
            raise SystemExit(str(error)) from None
        return 0
    if options.baseline:
        return run_baseline(model, model_name, options, console)
    return run_engine(model, tokenizer, model_name, options, console)


def run_baseline(model: PreTrainedModel, model_name: str, options: Options, console: Console) -> int:
    """Run the workload on transformers alone, in batches of `max_batch_size`. Returns the exit status."""
    run = {"hf": padded_batches, "hf-cb": continuous_batching}[options.baseline]
    if not getattr(model.config, "attn_logit_softcapping", None):
        model.set_attn_implementation("sdpa")  # faster than eager, but it does not apply a softcap
    requests = options.requests()
    started = time.perf_counter()
    run(model, requests[:1], options.max_batch_size)
    warmup_seconds = time.perf_counter() - started
    console.print(f"\nworkload of {len(requests)} requests, digest {digest(requests)}, without the engine")
    finished, seconds = run(model, requests, options.max_batch_size)
    results = summarize(finished, seconds, model.device)
    print_results(results, console)
    engine, version = f"transformers {options.baseline}", transformers.__version__
    print(json_line(engine, version, "eager", model_name, model.device, options, requests, warmup_seconds, results))
    return 0


def run_engine(
    model: PreTrainedModel,
    tokenizer: transformers.PreTrainedTokenizerBase,
    model_name: str,
    options: Options,
    console: Console,
) -> int:
    """Run the checks and the workload on the engine. Returns the exit status."""

    def build_engine() -> Inference:
        return Inference(
            model,
            tokenizer,
            options.max_batch_size,
            options.max_seq_length,
            options.n_pages,
            options.page_size,
            max_num_batched_tokens=options.max_num_batched_tokens,
            compile=None if options.compile else False,
            record_steps=os.environ.get("ENABLE_PROFILING") == "1",
        )

    started = time.perf_counter()
    graphs_before = num_graphs()
    engine = build_engine()
    check_tokens = min(CHECK_TOKENS, options.check_len + EXACTNESS_TOKENS)
    if options.check and engine.max_request_tokens < check_tokens:
        sys.exit(
            f"the checks need requests of {check_tokens} tokens, but max_seq_length and the pool allow "
            f"{engine.max_request_tokens}: raise them, or pass --no_check"
        )
    engine.warmup()
    warmup_seconds = time.perf_counter() - started
    num_compiled = num_graphs() - graphs_before
    mode = (
        f"compiled {num_compiled} of at most {engine.runner.max_graphs + engine.sampler.max_graphs} graphs"
        if engine.runner.compiled
        else "uncompiled"
    )
    console.print(
        f"ready in {warmup_seconds:.1f} s: {mode}, {engine.page_table.n_pages} pages of {options.page_size} tokens"
    )
    console.print(str(engine.plan(options.max_prompt_len, options.max_new_tokens)))

    exactness = answers = None
    options.n_pages = engine.page_table.n_pages  # a pool of another size would need other graphs
    options.max_num_batched_tokens = engine.scheduler.max_num_batched_tokens
    if options.check:
        texts = [*TEXTS, *(exactness_questions() if model_name == TINY_GEMMA2 else ())]
        exactness = check_exactness(engine, model, texts, options, console)
        engine = build_engine()
    if options.check and model_name == TINY_GEMMA2:
        answers = check_answers(engine, model, console)
        engine = build_engine()

    requests = options.requests()
    console.print(f"\nworkload of {len(requests)} requests, digest {digest(requests)}")
    if model.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    graphs_before = num_graphs()
    started = time.perf_counter()
    outputs = engine.generate(
        [list(request.prompt_token_ids) for request in requests],
        [SamplingParams(temperature=0, max_tokens=r.max_tokens, ignore_eos=True) for r in requests],
        use_tqdm=sys.stderr.isatty(),
    )
    seconds = time.perf_counter() - started
    results = summarize(list(map(finished_request, outputs)), seconds, model.device)
    assert results["output_tokens"] == sum(request.max_tokens for request in requests), (
        "some outputs are shorter than max_tokens: n_pages is too small"
    )
    results["preemptions"] = engine.stats().num_preemptions
    results["graphs_compiled_while_timed"] = num_graphs() - graphs_before
    print_results(results, console)

    if engine.steps:
        pd.DataFrame(map(asdict, engine.steps)).to_csv(options.csv, index=False)
        console.print(f"{len(engine.steps)} steps written to {options.csv}")
    roofline = report_roofline(engine, options, console) if options.roofline else None
    print(
        json_line(
            "flex-nano-vllm",
            flex_nano_vllm.__version__,
            "compiled" if engine.runner.compiled else "eager",
            model_name,
            model.device,
            options,
            requests,
            warmup_seconds,
            results,
            num_graphs=num_compiled,
            exactness=exactness,
            answers=answers,
            roofline=roofline,
        )
    )
    wrong = (exactness and exactness["mismatches"], answers and answers["different"])
    return 1 if any(wrong) else 0


def load(
    name: str | None, dtype: torch.dtype, device: torch.device, console: Console
) -> tuple[PreTrainedModel, transformers.PreTrainedTokenizerBase, str]:
    """Load the model `name`, or the default model of the device. Returns the model, its tokenizer and its name.

    If the default model of a GPU cannot be loaded, the result is a model of the same shape with random weights. Raises
    OSError if any other model cannot be loaded.
    """
    wanted = name or DEFAULT_MODELS[device.type]
    if wanted in SHAPES:
        return random_model(wanted, dtype, device), byte_tokenizer(), wanted
    path = str(EMBEDDED_MODELS.get(wanted, wanted))
    try:
        model = AutoModelForCausalLM.from_pretrained(
            path,
            dtype=dtype,
            device_map=device,
            use_safetensors=True,
            attn_implementation="eager",  # for the checks: older transformers choose sdpa, which ignores the softcap
        )
        return model, AutoTokenizer.from_pretrained(path), wanted
    except OSError as error:
        if name is not None:
            raise
        console.print(f"cannot load {path} ({str(error).splitlines()[0]}): using its shape with random weights")
        return load(path.removeprefix("google/"), dtype, device, console)


def exactness_questions() -> list[str]:
    return [question.prompt for task, num in QUESTIONS.items() for question in held_out_questions(task, num, seed=2)]


def check_exactness(
    engine: Inference, model: PreTrainedModel, texts: list[str], options: Options, console: Console
) -> dict:
    """Compare the greedy tokens of the prompts with Hugging Face, in five scenarios. Closes the engine."""
    prompts = [engine.tokenizer(text).input_ids for text in texts]
    lengths, num_tokens = [n for n in PROMPT_LENS if n <= options.check_len], min(EXACTNESS_TOKENS, options.check_len)
    prompts += [list(make_workload(1, (n, n), (1, 1), TOKEN_IDS, seed=n)[0].prompt_token_ids) for n in lengths]
    longest = options.max_seq_length - EXACTNESS_TOKENS
    strangers = make_workload(NUM_STRANGERS, (1, longest), (1, 1), TOKEN_IDS, seed=options.seed + 1)
    scenarios = greedy_in_batches(engine, prompts, [list(s.prompt_token_ids) for s in strangers], num_tokens)
    num_preemptions = engine.stats().num_preemptions
    engine.close()

    for text, tokens in zip(TEXTS, scenarios["batched"]):
        completion = engine.tokenizer.decode(tokens, skip_special_tokens=True)
        show_completion(text, completion, console)
    expected = [hf_generate(model, prompt, num_tokens) for prompt in prompts]
    comparisons = {name: compare(model, prompts, outputs, expected) for name, outputs in scenarios.items()}
    table = Table(
        "scenario", "equal to generate", "near-ties", "mismatches", title="greedy tokens, compared with Hugging Face"
    )
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
        f"{counts['tokens']} tokens, {num_preemptions} preemptions; a near-tie is at most {NEAR_TIE[model.dtype]} nats "
        f"less likely than Hugging Face's own choice; the largest one is {counts['largest_near_tie']:.2g}"
    )
    return counts


def check_answers(engine: Inference, model: PreTrainedModel, console: Console) -> dict:
    """Compare the answers of the engine and of `generate` to held-out questions of every task. Closes the engine.

    Every other question is a chat turn.
    """
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
                "different": output.outputs[0].token_ids != tokens,  # EOS included
            }
        )
        if rows[-1]["different"]:
            show_completion(question.prompt, f"{texts[0]}, but generate answers: {texts[1]}", console)
    by_task = pd.DataFrame(rows).groupby("task", sort=False).sum()
    table = Table(
        "task", "questions", "right", "right by generate", "different", title="answers of the engine and of generate"
    )
    for task, counts in by_task.iterrows():
        table.add_row(task, *map(str, counts))
    console.print(table)
    return {name: int(total) for name, total in by_task.sum().items()}


def report_roofline(engine: Inference, options: Options, console: Console) -> dict:
    """Compare prefill and decode steps at several batch sizes with the limits of this machine."""
    machine = measure_machine(engine.model.device, engine.model.dtype)
    shares = []
    for size in ROOFLINE_BATCHES:
        if size <= options.max_batch_size:
            try:
                shares += measure_shares(engine, machine, size, min(ROOFLINE_PROMPT_LEN, options.max_prompt_len))
            except ValueError as error:  # this batch does not fit; measure the other sizes
                console.print(f"no roofline at batch size {size}: {error}")
    table = Table("step", "batch", "tokens/s", "share of the limit")
    table.title = f"limits: {machine.copy_bandwidth / 1e9:,.0f} GB/s, {machine.matmul_rate / 1e9:,.0f} GFLOP/s"
    for share in shares:
        rate = share.num_tokens / share.seconds
        table.add_row(share.phase, str(share.batch_size), f"{rate:,.0f}", f"{share.share:.0%}")
    console.print(table)
    return {"machine": asdict(machine), "steps": [asdict(share) | {"share": share.share} for share in shares]}


def show_completion(prompt: str, text: str, console: Console) -> None:
    shortened = prompt if len(prompt) <= 80 else f"{prompt[:30]} … {prompt[-45:]}"
    console.print(f"  {shortened!r} -> {text!r}", markup=False, highlight=False)


def finished_request(output: RequestOutput) -> FinishedRequest:
    num_tokens = len(output.outputs[0].token_ids)
    return FinishedRequest(
        len(output.prompt_token_ids), num_tokens, output.metrics.ttft, output.metrics.tpot(num_tokens)
    )


def num_graphs() -> int:
    """Return the number of graphs that torch.compile has compiled in this process."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


if __name__ == "__main__":
    sys.exit(main())
