"""The lower bound of a step's cost equals a count by hand, and shares of the limit cover the steps that ran."""

import io

import pytest
import torch
from rich.console import Console
from tiny_models import WINDOW, tiny_model

from benchmark import Options, report_roofline
from benchmarks.roofline import Machine, StepCost, measure_machine, measure_shares, step_cost
from flex_nano_vllm import Inference
from flex_nano_vllm.models import spec_of

# Sizes of tiny_model("llama"): 2 layers, hidden 48, 4 heads and 2 kv heads of 12, intermediate 96, vocabulary 211.
LINEAR = 2 * (2 * 48 * 48 + 2 * 48 * 24 + 3 * 48 * 96)
NORMS = 2 * 2 * 48
HEAD = 211 * 48


def test_the_costs_of_a_decode_and_of_a_prompt_equal_counts_by_hand():
    model = tiny_model("llama", torch.float32)
    decode = step_cost(model, spec_of(model), [(9, 1)])
    kv_of_token = 2 * 2 * 2 * 12  # keys and values, layers, kv heads, head dim
    assert decode.num_bytes == 4 * (LINEAR + NORMS + HEAD + (10 + 1) * kv_of_token)
    scores = 2 * 4 * 10  # layers, heads, visible keys
    assert decode.num_operations == 2 * (LINEAR + NORMS + HEAD) + 4 * 12 * scores
    prompt = step_cost(model, spec_of(model), [(0, 10)])
    assert prompt.num_bytes == 4 * (LINEAR + NORMS + HEAD + (10 + 10) * kv_of_token)
    # The last layer computes keys and values of all tokens, and everything else for the last token only.
    layer, keys = (LINEAR + NORMS) // 2, 2 * 48 * 24
    linear = 10 * (layer + keys) + layer - keys + HEAD
    assert prompt.num_operations == 2 * linear + 4 * 12 * 4 * (55 + 10)


def test_a_window_saves_the_cost_of_tokens_before_it():
    model = tiny_model("mistral", torch.float32)  # a window in both layers
    near, far = (
        step_cost(model, spec_of(model), [(WINDOW - 1, 1)]),
        step_cost(model, spec_of(model), [(WINDOW + 40, 1)]),
    )
    assert near == far
    assert step_cost(model, spec_of(model), [(WINDOW - 2, 1)]).num_operations < near.num_operations
    near, far = (
        step_cost(model, spec_of(model), [(WINDOW - 1, 9)]),
        step_cost(model, spec_of(model), [(WINDOW + 40, 9)]),
    )
    assert near == far


def test_decodes_are_measured_after_a_prefill_of_many_small_steps():
    with Inference(tiny_model("llama"), None, 4, 128, page_size=16, max_num_batched_tokens=4, compile=False) as engine:
        shares = measure_shares(engine, Machine(1e9, 1e9), 4, prompt_len=9, num_decode_steps=5)
    assert [(share.phase, share.num_tokens) for share in shares][-1] == ("decode", 20)


def test_a_pool_too_small_for_a_batch_size_omits_only_its_line_of_the_roofline():
    console = Console(width=200, file=io.StringIO())
    with Inference(tiny_model("llama"), None, 32, 128, 6, page_size=16, compile=False) as engine:
        roofline = report_roofline(engine, Options(max_batch_size=32, max_prompt_len=20), console)
        assert not engine.has_unfinished_requests()
        engine.check_invariants()
    assert [step["batch_size"] for step in roofline["steps"]] == [1, 1]
    assert "no roofline at batch size 32: 32 requests" in console.file.getvalue()


def test_the_slower_of_memory_and_arithmetic_is_the_limit():
    machine = Machine(copy_bandwidth=100.0, matmul_rate=1000.0)
    assert StepCost(200, 1000).seconds(machine) == 2.0
    assert StepCost(200, 4000).seconds(machine) == 4.0


def test_the_measured_limits_of_the_machine_are_plausible():
    machine = measure_machine(torch.device("cpu"), torch.float32)
    assert 1e8 < machine.copy_bandwidth < 1e13 and 1e8 < machine.matmul_rate < 1e15


def test_shares_cover_all_steps_and_leave_the_engine_idle():
    with Inference(tiny_model("llama"), None, 4, 128, page_size=16, max_num_batched_tokens=32, compile=False) as engine:
        shares = []
        for batch_size in (1, 3):
            shares += measure_shares(engine, Machine(1e9, 1e9), batch_size, prompt_len=20, num_decode_steps=5)
        assert not engine.has_unfinished_requests()
        engine.check_invariants()
    assert [(share.phase, share.batch_size) for share in shares] == [
        ("prefill", 1),
        ("decode", 1),
        ("prefill", 3),
        ("decode", 3),
    ]
    assert [share.num_tokens for share in shares][1::2] == [5, 15]
    assert shares[0].num_tokens == 20 and shares[2].num_tokens >= 60
    assert all(share.share == pytest.approx(share.limit_seconds / share.seconds) for share in shares)
