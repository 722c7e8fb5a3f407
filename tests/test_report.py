"""Reports of runs: figures are right, only runs of equal work are compared, and baselines do the whole work."""

import functools
import io
import json
import math
import os
import sys
import types

import pandas as pd
import pytest
import torch
from rich.console import Console
from tiny_models import tiny_model

import benchmark_vllm
from benchmarks import baselines
from benchmarks.baselines import continuous_batching, padded_batches
from benchmarks.report import FinishedRequest, compare_runs, json_line, summarize
from benchmarks.workload import RunOptions, make_workload

CPU = torch.device("cpu")


def a_run(engine="flex-nano-vllm", seconds=2.0, seed=0, model="m", dtype="float32", tokens=20, **sizes) -> str:
    """Return the JSON line of a run of one request with 10 prompt tokens."""
    options = RunOptions(
        model=model, dtype=dtype, num_requests=1, min_new_tokens=20, max_new_tokens=20, seed=seed, **sizes
    )
    results = summarize([FinishedRequest(10, tokens, 0.5, 0.1)], seconds, CPU)
    return json_line(engine, "1.0", "compiled", model, CPU, options, options.requests(), 3.0, results)


def test_a_summary_adds_up():
    requests = [FinishedRequest(10, 1, 0.1, None), FinishedRequest(30, 4, 0.3, 0.02), FinishedRequest(2, 3, 0.2, 0.04)]
    results = summarize(requests, 2.0, CPU)
    assert (results["num_requests"], results["prompt_tokens"], results["output_tokens"]) == (3, 42, 8)
    rates = (results["requests_per_s"], results["output_tokens_per_s"], results["total_tokens_per_s"])
    assert rates == (1.5, 4.0, 25.0)
    assert results["ttft_p50_ms"] == pytest.approx(200)
    assert results["tpot_p50_ms"] == pytest.approx(30)
    assert results["peak_memory_gb"] > 0.05  # this process has loaded torch


def test_a_figure_that_was_not_measured_is_null():
    results = summarize([FinishedRequest(10, 1, 0.1, None)], 2.0, CPU)
    assert math.isnan(results["tpot_p50_ms"])
    options = RunOptions()
    options.fill_in("cpu")
    line = json_line("e", "1.0", "compiled", "m", CPU, options, options.requests(), 3.0, results)
    assert "NaN" not in line and json.loads(line)["results"]["tpot_p50_ms"] is None


def compared(tmp_path, *runs: str) -> list[list[str]]:
    """Return the cells of each line of the table that `compare_runs` prints."""
    files = []
    for i, run in enumerate(runs):
        files.append(tmp_path / f"{i}.log")
        files[-1].write_text(f"some table\n{run}\n", encoding="utf-8")
    console = Console(width=200, file=io.StringIO())
    compare_runs([str(file) for file in files], console)
    rows = [line.split("│")[1:-1] for line in console.file.getvalue().splitlines() if line.startswith("│")]
    return [[cell.strip() for cell in row] for row in rows]


def test_runs_are_compared_by_their_medians(tmp_path):
    ours, theirs = [a_run(seconds=s) for s in (4.0, 1.0, 2.0)], [a_run("vllm", s) for s in (1.0, 8.0, 4.0)]
    first, second = compared(tmp_path, ours[0], theirs[0], ours[1], theirs[1], ours[2], theirs[2])
    assert first[0].startswith("flex-nano-vllm 1.0 compiled, float32") and second[0].startswith("vllm 1.0")
    assert first[1:4] == ["3", "10", "1.00"]
    assert second[1:4] == ["3", "5", "0.50"]


def test_runs_of_different_sizes_are_separate_lines_of_the_table(tmp_path):
    runs = [a_run(seconds=2.0, n_pages=513), a_run(seconds=4.0, n_pages=257), a_run("vllm", seconds=1.0)]
    full, half, vllm = compared(tmp_path, *runs)
    assert "n_pages 513" in full[0] and "n_pages 257" in half[0] and "n_pages" not in vllm[0]
    assert [row[1] for row in (full, half, vllm)] == ["1"] * 3 and [half[3], vllm[3]] == ["0.50", "2.00"]


@pytest.mark.parametrize(
    ("other", "what"), [({"seed": 1}, "workload digest"), ({"tokens": 19}, "output tokens"), ({"model": "n"}, "model")]
)
def test_runs_of_different_work_are_not_compared(tmp_path, other, what):
    with pytest.raises(ValueError, match=f"no ratio: the runs differ in {what}"):
        compared(tmp_path, a_run(), a_run("vllm", **other))


def test_a_file_without_a_run_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="contains no JSON line"):
        compared(tmp_path, "Traceback")


@pytest.mark.parametrize("architecture", ["llama", "gemma2"])
def test_padded_batches_finish_every_request(architecture):
    model = tiny_model(architecture, torch.float32)
    requests = make_workload(5, (1, 20), (2, 6), range(3, 200), seed=0)
    finished, seconds = padded_batches(model, requests, batch_size=2)
    lengths = [(request.num_prompt_tokens, request.num_output_tokens) for request in finished]
    assert lengths == [(len(request.prompt_token_ids), request.max_tokens) for request in requests]
    assert all(0 < request.ttft < seconds for request in finished)
    # Each batch waits for the previous one.
    assert finished[0].ttft == finished[1].ttft < finished[2].ttft == finished[3].ttft < finished[4].ttft


def test_continuous_batching_is_measured_only_if_its_tokens_are_right(monkeypatch):
    # By default it allocates most of the machine's memory, which takes a minute.
    small = functools.partial(baselines.ContinuousBatchingConfig, num_blocks=16, max_batch_tokens=64)
    monkeypatch.setattr(baselines, "ContinuousBatchingConfig", small)
    requests = make_workload(5, (20, 30), (4, 6), range(3, 200), seed=0)
    finished, _ = continuous_batching(tiny_model("llama", torch.float32), requests, batch_size=2)
    lengths = [(request.num_prompt_tokens, request.num_output_tokens) for request in finished]
    assert lengths == [(len(request.prompt_token_ids), request.max_tokens) for request in requests]
    with pytest.raises(RuntimeError, match="no figures"):
        continuous_batching(tiny_model("gemma2", torch.float32), requests, batch_size=2)


def test_plot_draws_every_run(tmp_path):
    plots = pytest.importorskip("benchmarks.plots")
    steps = pd.DataFrame(
        {
            "time": [0.5, 1.0, 2.0],
            "duration": [0.4, 0.5, 1.0],
            "num_prefill_tokens": [20, 0, 0],
            "num_decode_tokens": [0, 2, 2],
            "num_running": [2, 2, 0],
            "num_waiting": [1, 0, 0],
            "kv_usage": [0.1, 0.2, 0.0],
        }
    )
    files = [str(tmp_path / name) for name in ("profile.csv", "profile_vllm.csv")]
    for file in files:
        steps.to_csv(file, index=False)
    plots.plot_steps(files, str(tmp_path / "runs.png"))
    assert (tmp_path / "runs.png").read_bytes().startswith(b"\x89PNG")


@pytest.fixture
def run_vllm(monkeypatch, capsys):
    """Return a function that runs the main of benchmark_vllm.py with this module as `vllm`; returns its status and
    output."""

    def run(vllm):
        monkeypatch.setitem(sys.modules, "vllm", vllm)
        monkeypatch.setattr(sys, "argv", ["benchmark_vllm.py"])
        monkeypatch.setattr(os, "environ", dict(os.environ))  # which main changes
        return benchmark_vllm.main(), capsys.readouterr()

    return run


def test_a_missing_vllm_is_reported_in_one_line(run_vllm):
    status, output = run_vllm(None)
    assert status == 2 and output.out == ""
    assert len(output.err.splitlines()) == 1 and "vLLM cannot run here" in output.err


def test_vllm_gets_the_default_model_and_an_error_without_a_message_is_reported(run_vllm, monkeypatch):
    def llm(path, **settings):
        assert path.endswith("tiny_gemma2") and settings["max_num_seqs"] == 32, path
        raise RuntimeError

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    status, output = run_vllm(types.SimpleNamespace(LLM=llm))
    assert status == 2 and output.err.splitlines()[-1].endswith("RuntimeError()"), output.err
