"""benchmark.py detects a wrong engine, its workload is the same in every process, and its report adds up."""

import json
import sys

import pandas as pd
import pytest
from engines import standard_python
from rich.console import Console

import benchmark
from benchmarks import workload
from benchmarks.workload import digest, make_workload
from flex_nano_vllm.masks import Causal

ARGUMENTS = ["--no_compile", "--num_requests", "4", "--max_prompt_len", "20", "--min_new_tokens", "2"]
ARGUMENTS += ["--max_new_tokens", "6"]


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    """Return a function that runs the benchmark's main in a temporary folder.

    It returns the exit status and the JSON of the last line of stdout. `longest`: tokens of the longest prompt in the
    exactness check, which takes most of the time.
    """
    monkeypatch.setattr(benchmark, "EXACTNESS_TOKENS", 8)
    monkeypatch.setattr(benchmark, "NUM_STRANGERS", 2)
    monkeypatch.setattr(benchmark, "QUESTIONS_PER_TASK", 1)
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str, longest: int = 300) -> tuple[int, dict]:
        monkeypatch.setattr(benchmark, "PROMPT_LENS", (1, longest))
        monkeypatch.setattr(benchmark, "CHECK_TOKENS", longest + 80)
        sizes = ["--max_seq_length", str(longest + 80)]
        monkeypatch.setattr(sys, "argv", ["benchmark.py", *ARGUMENTS, *sizes, *arguments])
        status = benchmark.main()
        return status, json.loads(capsys.readouterr().out.splitlines()[-1])

    return run


def test_the_report_adds_up_and_the_csv_has_a_line_per_step(run, monkeypatch, tmp_path):
    monkeypatch.setenv("ENABLE_PROFILING", "1")
    status, record = run()
    requests = make_workload(4, (1, 20), (2, 6), range(5, 259), seed=0)
    assert status == 0
    assert record["exactness"]["mismatches"] == 0 and record["exactness"]["preemptions"] > 0
    assert record["answers"] == {"questions": 11, "right": 11, "right_by_generate": 11, "different": 0}
    assert record["workload_digest"] == digest(requests)
    assert record["results"]["output_tokens"] == sum(request.max_tokens for request in requests)
    assert record["results"]["prompt_tokens"] == sum(len(request.prompt_token_ids) for request in requests)
    steps = pd.read_csv(tmp_path / "profile.csv")
    tokens = steps["num_prefill_tokens"] + steps["num_decode_tokens"]
    # The last token of a request is sampled, but never computed.
    assert tokens.sum() == record["results"]["prompt_tokens"] + record["results"]["output_tokens"] - 4
    assert steps["time"].is_monotonic_increasing and steps["num_running"].iloc[-1] == 0


# Both prompts are well beyond the window of the model: 64 and 512 tokens.
@pytest.mark.parametrize(("model", "longest"), [("tiny-gemma2", 300), ("gemma2-tiny", 600)])
def test_a_wrong_mask_gives_a_mismatch_and_exit_status_1(model, longest, run, monkeypatch):
    """The mask is that of Gemma-2 without its sliding window, as in the original engine."""
    monkeypatch.setattr("flex_nano_vllm.models.layer_masks", lambda layers: [Causal()] * len(layers))
    status, record = run("--model", model, "--no_roofline", longest=longest)
    assert status == 1
    assert record["exactness"]["mismatches"] > 0


def test_an_answer_that_differs_from_generate_gives_exit_status_1(run, monkeypatch):
    """It does so even if each token is the most likely one after the preceding tokens."""
    monkeypatch.setattr(benchmark, "check_exactness", lambda engine, *_: engine.close())
    hf_generate = benchmark.hf_generate
    monkeypatch.setattr(benchmark, "hf_generate", lambda *args: hf_generate(*args)[:-1])
    status, record = run("--no_roofline")
    assert status == 1
    assert record["answers"] == {"questions": 11, "right": 11, "right_by_generate": 11, "different": 11}


def test_sizes_too_small_for_the_checks_are_rejected_at_the_start(run):
    for sizes in (["--max_seq_length", "379"], ["--n_pages", "3", "--page_size", "128"]):
        with pytest.raises(SystemExit, match="raise them, or pass --no_check"):
            run(*sizes)


def test_a_shorter_check_omits_long_prompts_and_fits_into_smaller_sizes(run):
    status, record = run("--model", "gemma2-mini", "--no_roofline", "--check_len", "3", "--max_seq_length", "90")
    assert status == 0
    # Three tokens, or fewer before EOS, of two texts and of the prompt of one token, in five scenarios
    assert 15 < record["exactness"]["tokens"] <= 45


def test_the_workload_is_the_same_in_every_process():
    program = "print(digest(make_workload(20, (1, 9), (1, 9), range(3, 99), seed=7)))"
    digests = {standard_python(workload, program, PYTHONHASHSEED=salt) for salt in ("1", "2")}
    assert len(digests) == 1
    other_seed = digest(make_workload(20, (1, 9), (1, 9), range(3, 99), seed=8))
    assert other_seed not in digests.pop()


def test_random_weights_replace_an_unavailable_model_only_if_it_is_the_default_of_a_gpu(monkeypatch):
    def no_hub(*args: object, **kwargs: object) -> None:
        raise OSError("no network")

    monkeypatch.setattr(benchmark.AutoModelForCausalLM, "from_pretrained", no_hub)
    monkeypatch.setattr(benchmark, "random_model", lambda shape, dtype, device: shape)
    cpu, gpu, float32 = benchmark.torch.device("cpu"), benchmark.torch.device("cuda"), benchmark.torch.float32
    shape, _, name = benchmark.load(None, float32, gpu, Console())
    assert (shape, name) == ("gemma-2-2b", "gemma-2-2b")
    for name, device in (("google/gemma-2-2b", cpu), ("google/gemma-2-2b", gpu), (None, cpu)):
        with pytest.raises(OSError, match="no network"):
            benchmark.load(name, float32, device, Console())


def test_the_default_model_on_a_cpu_is_the_one_in_the_package():
    cpu = benchmark.torch.device("cpu")
    model, tokenizer, name = benchmark.load(None, benchmark.torch.float32, cpu, Console())
    assert name == "tiny-gemma2" and model.config.sliding_window == 64
    assert tokenizer.decode(tokenizer("July").input_ids, skip_special_tokens=True) == "July"
