"""Exceptions and interrupts at every seam, and numbers that are not finite: nothing is lost, and whoever is not to
blame does not notice."""

import copy
import math

import pytest
import torch
from engines import (
    COMPILED,
    LENGTHS,
    MAX_STEPS,
    PROMPTS,
    SIZES,
    TEXTS,
    TIGHT,
    assert_empty,
    byte_model,
    drain,
    greedy,
    prompt_of,
    raise_at_call,
    tokens_of,
)
from tiny_models import hf_generate, tiny_model

from flex_nano_vllm import Inference, SamplingParams, answers, inference, sampling
from flex_nano_vllm.attention import PagedKVCache
from flex_nano_vllm.exactness import greedy_under_preemption
from flex_nano_vllm.page_table import PageTable
from flex_nano_vllm.random_models import byte_tokenizer
from flex_nano_vllm.runner import ModelRunner
from flex_nano_vllm.scheduler import Scheduler
from flex_nano_vllm.step import StepBatch

# --- exceptions and interrupts -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def expected_texts():
    """Greedy token ids of TEXTS, by Hugging Face."""
    model, tokenizer = byte_model(), byte_tokenizer()
    return [
        hf_generate(model, tokenizer(text).input_ids, length, ignore_eos=True) for text, length in zip(TEXTS, LENGTHS)
    ]


@pytest.fixture(scope="module")
def tight_engine():
    with Inference(byte_model(), byte_tokenizer(), **TIGHT) as engine:
        yield engine


def generate_texts(engine):
    return engine.generate(TEXTS, [greedy(length) for length in LENGTHS], use_tqdm=False)


def test_the_workload_of_the_fault_tests_chunks_prompts_and_preempts(tight_engine, expected_texts):
    before = tight_engine.stats().num_preemptions
    assert tokens_of(generate_texts(tight_engine)) == expected_texts
    assert tight_engine.stats().num_preemptions > before
    assert any(len(text) + 1 > tight_engine.scheduler.max_num_batched_tokens for text in TEXTS)


TOKENIZER = type(byte_tokenizer())

SEAMS = [
    (TOKENIZER, "__call__", 2),
    (Scheduler, "add", 2),
    (Scheduler, "schedule", 2),
    (PageTable, "allocate", 2),
    (PageTable, "reserve", 1),
    (PageTable, "reserve", 5),
    (PageTable, "_map", 1),  # a page is in nobody's hands
    (PageTable, "_map", 2),  # half-way through a reservation
    (PageTable, "_map", 6),
    (PageTable, "erase", 1),
    (PageTable, "sync", 2),
    (StepBatch, "build", 1),
    (StepBatch, "build", 3),
    (ModelRunner, "forward", 2),
    (PagedKVCache, "update", 4),  # the second layer of the second step: the first has written its keys and values
    (PagedKVCache, "attend", 4),
    (inference, "take_samples", 1),
    (sampling, "draw_of", 3),
    (ModelRunner, "sample", 3),
    (Scheduler, "commit", 1),
    (Scheduler, "commit", 4),
    (Scheduler, "_release", 1),  # a preemption
    (Scheduler, "_release", 3),
    (answers, "text_of", 1),
    (answers, "text_of", 2),
    (inference.tqdm, "update", 1),
]


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("exception", [OSError, KeyboardInterrupt])
@pytest.mark.parametrize(
    ("owner", "name", "number"), SEAMS, ids=lambda value: getattr(value, "__name__", str(value)).rpartition(".")[2]
)
def test_generate_can_fail_at_any_seam_and_the_engine_is_whole(
    tight_engine, expected_texts, monkeypatch, owner, name, number, exception, after
):
    raise_at_call(monkeypatch, owner, name, number, exception, after)
    with pytest.raises(exception, match="injected"):
        generate_texts(tight_engine)
    assert_empty(tight_engine)
    monkeypatch.undo()
    assert tokens_of(generate_texts(tight_engine)) == expected_texts
    assert_empty(tight_engine)


def add_texts(engine):
    return [engine.add_request(text, greedy(length)) for text, length in zip(TEXTS, LENGTHS)]


def progress(engine):
    everyone = [*engine.scheduler.running, *engine.scheduler.waiting]
    return {s.request_id: (list(s.token_ids), s.num_computed_tokens) for s in everyone}


@pytest.mark.parametrize("exception", [OSError, KeyboardInterrupt])
@pytest.mark.parametrize(
    ("owner", "name", "number"),
    [
        (PageTable, "reserve", 1),
        (PageTable, "reserve", 5),
        (PageTable, "sync", 2),
        (StepBatch, "build", 1),
        (StepBatch, "build", 4),
        (PagedKVCache, "update", 4),
        (PagedKVCache, "attend", 1),
        (PagedKVCache, "attend", 4),
        (PagedKVCache, "attend", 9),
        (inference, "take_samples", 1),
        (ModelRunner, "sample", 5),
        (sampling, "draw_of", 3),
        (Scheduler, "commit", 3),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)).rpartition(".")[2],
)
def test_a_step_that_failed_before_its_commit_can_be_repeated(
    tight_engine, expected_texts, monkeypatch, owner, name, number, exception
):
    ids = add_texts(tight_engine)
    raise_at_call(monkeypatch, owner, name, number, exception)
    outputs = {}
    with pytest.raises(exception, match="injected"):
        for _ in range(MAX_STEPS):
            before = progress(tight_engine)
            outputs.update((output.request_id, output) for output in tight_engine.run_one_step())
    monkeypatch.undo()
    tight_engine.check_invariants()
    after = progress(tight_engine)
    assert after.keys() == before.keys()
    for request_id, (tokens, num_computed) in after.items():
        assert tokens == before[request_id][0]
        assert num_computed in (before[request_id][1], 0)  # 0: preempted for the step
    outputs.update(drain(tight_engine))
    assert tokens_of(outputs[request_id] for request_id in ids) == expected_texts
    assert_empty(tight_engine)


def test_a_step_that_fails_again_and_again_takes_nothing_more(tight_engine, expected_texts, monkeypatch):
    ids = add_texts(tight_engine)

    def fail(*args, **kwargs):
        raise OSError("injected")

    monkeypatch.setattr(PagedKVCache, "attend", fail)
    held = set()
    for _ in range(5):
        with pytest.raises(OSError, match="injected"):
            tight_engine.run_one_step()
        tight_engine.check_invariants()
        held.add(tight_engine.stats())
    assert len(held) == 1
    monkeypatch.undo()
    outputs = drain(tight_engine)
    assert tokens_of(outputs[request_id] for request_id in ids) == expected_texts


def test_requests_of_a_failed_step_can_be_aborted(tight_engine, expected_texts, monkeypatch):
    ids = add_texts(tight_engine)
    raise_at_call(monkeypatch, PagedKVCache, "attend", 5, OSError)
    with pytest.raises(OSError, match="injected"):
        drain(tight_engine)
    monkeypatch.undo()
    for request_id in ids:
        assert tight_engine.abort(request_id).outputs[0].finish_reason == "abort"
    assert_empty(tight_engine)
    assert tokens_of(generate_texts(tight_engine)) == expected_texts


def test_a_text_that_cannot_be_decoded_loses_no_request(tight_engine, expected_texts, monkeypatch):
    """The contract of run_one_step: "if it raises, nothing has moved: the step can be run again"."""
    ids = add_texts(tight_engine)
    raise_at_call(monkeypatch, answers, "text_of", 1, OverflowError)
    with pytest.raises(OverflowError, match="injected"):
        drain(tight_engine)
    monkeypatch.undo()
    outputs = drain(tight_engine)
    assert_empty(tight_engine)
    assert outputs.keys() == set(ids)
    assert tokens_of(outputs[request_id] for request_id in ids) == expected_texts


def test_an_abort_whose_text_cannot_be_decoded_gives_the_pages_back(tight_engine, monkeypatch):
    request_id = tight_engine.add_request("abc", greedy(5))
    tight_engine.run_one_step()
    raise_at_call(monkeypatch, answers, "text_of", 1, OverflowError)
    with pytest.raises(OverflowError, match="injected"):
        tight_engine.abort(request_id)
    assert_empty(tight_engine)


# --- logits that are not finite ----------------------------------------------------------------------------------


def spoil_logits(monkeypatch, engine, spoil, num_good_tokens=0):
    """Let `spoil(row of logits)` happen to the middle request, once it has `num_good_tokens`."""
    forward = engine.runner.forward

    def spoiled(chunks):
        logits = forward(chunks)
        for row, chunk in zip(logits, chunks):
            sequence = chunk.sequence
            if (
                sequence.token_ids[: len(PROMPTS[1])] == PROMPTS[1]
                and len(sequence.output_token_ids) >= num_good_tokens
            ):
                spoil(row)
        return logits

    monkeypatch.setattr(engine.runner, "forward", spoiled)


@pytest.mark.parametrize("num_good_tokens", [0, 3])
@pytest.mark.parametrize(
    "spoil",
    [
        lambda row: row.fill_(math.nan),
        lambda row: row[7].fill_(math.nan),
        lambda row: row[7].fill_(math.inf),
        lambda row: row.fill_(-math.inf),
    ],
    ids=["all NaN", "one NaN", "one inf", "all -inf"],
)
def test_a_request_whose_logits_are_not_finite_ends_in_error_and_its_neighbours_do_not_notice(
    engine, expected, monkeypatch, spoil, num_good_tokens
):
    spoil_logits(monkeypatch, engine, spoil, num_good_tokens)
    first, middle, last = engine.generate(PROMPTS, greedy(5), use_tqdm=False)
    assert middle.outputs[0].finish_reason == "error"
    assert middle.outputs[0].token_ids == expected[1][:num_good_tokens]
    assert tokens_of([first, last]) == [expected[0][:5], expected[2][:5]]
    assert {first.outputs[0].finish_reason, last.outputs[0].finish_reason} == {"length"}
    assert_empty(engine)


def test_when_all_logits_are_nan_all_requests_end_in_error_and_the_engine_lives(engine, expected, monkeypatch):
    forward = engine.runner.forward
    monkeypatch.setattr(engine.runner, "forward", lambda chunks: forward(chunks).fill_(math.nan))
    outputs = engine.generate(PROMPTS, greedy(5), use_tqdm=False)
    assert [(output.outputs[0].token_ids, output.outputs[0].finish_reason) for output in outputs] == [([], "error")] * 3
    monkeypatch.undo()
    assert tokens_of(engine.generate(PROMPTS, greedy(8), use_tqdm=False)) == expected


def test_a_drawn_token_of_logits_that_are_not_finite_is_an_error_too(engine, monkeypatch):
    alone = engine.generate([PROMPTS[0]], SamplingParams(seed=3, max_tokens=4, ignore_eos=True), use_tqdm=False)
    spoil_logits(monkeypatch, engine, lambda row: row.fill_(math.nan))
    params = SamplingParams(seed=3, max_tokens=4, ignore_eos=True)
    first, middle, _ = engine.generate(PROMPTS, params, use_tqdm=False)
    assert middle.outputs[0].finish_reason == "error"
    assert tokens_of([first]) == tokens_of(alone)


@pytest.fixture
def poisonous_engine(expected):
    """Token 3 has no finite embedding: whoever says it has NaN keys and values, not only NaN logits."""
    assert all(3 not in [*prompt, *tokens] for prompt, tokens in zip(PROMPTS, expected))
    model = copy.deepcopy(tiny_model("gemma2"))
    with torch.no_grad():
        model.get_input_embeddings().weight[3] = math.nan
    with Inference(model, None, **SIZES) as engine:
        yield engine


def test_nan_keys_and_values_stay_with_their_request(poisonous_engine, expected):
    outputs = poisonous_engine.generate([PROMPTS[0], [5, 3, 6], PROMPTS[2]], greedy(5), use_tqdm=False)
    assert [output.outputs[0].finish_reason for output in outputs] == ["length", "error", "length"]
    assert tokens_of(outputs) == [expected[0][:5], [], expected[2][:5]]


def test_nan_keys_and_values_do_not_outlive_their_request(poisonous_engine, expected):
    (poisoned,) = poisonous_engine.generate([[5, 3, 6] * 8], greedy(5), use_tqdm=False)
    assert poisoned.outputs[0].finish_reason == "error"
    # The pages are free again, and these requests get them.
    assert tokens_of(poisonous_engine.generate(PROMPTS, greedy(5), use_tqdm=False)) == [e[:5] for e in expected]


def test_who_counted_on_what_turned_out_not_to_be_finite_has_no_token_yet(poisonous_engine):
    """Two equal prompts in one step: the second one shares a page that the first was to fill."""
    ids = [poisonous_engine.add_request([5, 3, 6, 7, 8], greedy(2)) for _ in range(2)]
    (failed,) = poisonous_engine.run_one_step()
    assert (failed.request_id, failed.outputs[0].finish_reason) == (ids[0], "error")
    (waiting,) = poisonous_engine.scheduler.waiting
    assert waiting.request_id == ids[1] and waiting.metrics.first_token_time is None
    assert poisonous_engine.stats().num_generated_tokens == 0
    assert [output.outputs[0].finish_reason for output in drain(poisonous_engine).values()] == ["error"]


def test_a_token_that_was_not_there_is_not_counted(engine, monkeypatch):
    before = engine.stats()
    spoil_logits(monkeypatch, engine, lambda row: row.fill_(math.nan), num_good_tokens=2)
    outputs = engine.generate(PROMPTS, greedy(4), use_tqdm=False)
    num_tokens = sum(len(tokens) for tokens in tokens_of(outputs))
    assert num_tokens == 4 + 2 + 4
    assert engine.stats().num_generated_tokens - before.num_generated_tokens == num_tokens


def test_a_request_that_never_got_a_token_has_no_time_of_its_first(engine, monkeypatch):
    spoil_logits(monkeypatch, engine, lambda row: row.fill_(math.nan))
    output = engine.generate([PROMPTS[1]], greedy(4), use_tqdm=False)[0]
    assert output.outputs[0].token_ids == []
    assert output.metrics.first_token_time is None and output.metrics.ttft is None


# --- keys and values that are not finite, on the kernel and without it

POISON = 7

HEALTHY = [prompt_of(length) for length in (5, 20, 14, 3)]


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.compiled)])
def test_nan_in_one_request_leaves_its_neighbours_and_successors_alone(compiled):
    """The token 7 has an embedding of NaN, so its keys and values are NaN in every layer. Its neighbours decode in the
    same steps; its successors get its pages, whose masked slots still hold what it wrote."""
    model = copy.deepcopy(tiny_model("gemma2", torch.float32 if compiled else torch.float64))
    expected = [hf_generate(model, prompt, 6) for prompt in HEALTHY]
    expected_single = hf_generate(model, [5], 6)
    with torch.no_grad():
        model.get_input_embeddings().weight[POISON] = torch.nan
    # At the first position, the second (which the CPU kernel has been seen to overlook), in the middle, at the end.
    bad = [[POISON, *HEALTHY[1]], [5, POISON, *HEALTHY[1]], HEALTHY[1] + [POISON] + HEALTHY[0], [POISON]]
    poisoned = [HEALTHY[0], bad[0], bad[1], HEALTHY[2], bad[2], HEALTHY[3], bad[3]]
    with Inference(model, None, **COMPILED, compile=compiled) as engine:
        outputs = engine.generate(poisoned, greedy(6), use_tqdm=False)
        failed = [output.outputs[0].finish_reason == "error" for output in outputs]
        assert failed == [prompt in bad for prompt in poisoned]
        healthy = [output.outputs[0].token_ids for output in outputs if output.outputs[0].finish_reason != "error"]
        assert healthy == [expected[0], expected[2], expected[3]]
        # A step of single tokens is one of decodes, with a graph of its own.
        first, single, last = engine.generate([[POISON], [5], [POISON]], greedy(6), use_tqdm=False)
        assert first.outputs[0].finish_reason == last.outputs[0].finish_reason == "error"
        assert single.outputs[0].token_ids == expected_single
        again = engine.generate(HEALTHY, greedy(6), use_tqdm=False)
        assert [output.outputs[0].token_ids for output in again] == expected
        engine.check_invariants()


def test_an_interrupted_check_under_preemption_leaves_the_pool_whole(engine, monkeypatch):
    with monkeypatch.context() as patch:
        raise_at_call(patch, ModelRunner, "forward", 3, KeyboardInterrupt)
        with pytest.raises(KeyboardInterrupt):
            greedy_under_preemption(engine, PROMPTS, 8)
    assert_empty(engine)
