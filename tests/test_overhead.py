"""Measuring the time of a step outside the model leaves the engine unchanged, and the times add up."""

import json
import threading
from dataclasses import replace

import pytest
import torch
from engines import prompt_of
from rich.console import Console
from tiny_models import tiny_model
from torch.overrides import TorchFunctionMode

from benchmarks import overhead
from benchmarks.overhead import (
    decoding_together,
    distinct_prompts,
    measure_decode_step,
    measure_followed,
    measure_streams,
    report_overhead,
)
from benchmarks.random_models import byte_tokenizer
from benchmarks.workload import RunOptions
from flex_nano_vllm import Inference, SamplingParams
from flex_nano_vllm.async_inference import AsyncInference


@pytest.fixture
def engine():
    with Inference(tiny_model("llama", torch.float64), None, 3, 400, page_size=16, compile=False) as engine:
        yield engine


@pytest.mark.parametrize(("batch_size", "num_waiting"), [(1, 0), (3, 0), (3, 5)])
def test_the_given_numbers_of_requests_decode_and_wait(engine, batch_size, num_waiting, monkeypatch):
    queues = []
    step = type(engine).run_one_step

    def noted_step(self):
        outputs = step(self)
        queues.append((len(self.scheduler.running), len(self.scheduler.waiting)))
        assert not outputs, "a request ended during the measurement"
        return outputs

    monkeypatch.setattr(type(engine), "run_one_step", noted_step)
    result = measure_decode_step(engine, batch_size, num_waiting, num_steps=4)
    assert set(queues[-4:]) == {(batch_size, num_waiting)}
    assert (result.batch_size, result.num_waiting, result.n_pages) == (batch_size, num_waiting, 76)
    assert (result.max_seq_length, result.output_len) == (400, 0)
    assert 0 < result.model_seconds < result.seconds and 0 < result.host_share < 1
    assert "call_model" not in vars(engine.runner) and not engine.has_unfinished_requests()
    engine.check_invariants()


def test_a_request_that_ends_too_early_raises_an_error_and_leaves_the_engine_idle(engine, monkeypatch):
    """The third request is never admitted, so the first two end before it decodes."""
    scheduler, admit = engine.scheduler, engine.scheduler._admit
    monkeypatch.setattr(scheduler, "_admit", lambda sequence: len(scheduler.running) < 2 and admit(sequence))
    with pytest.raises(RuntimeError, match="a request ended before 3 requests"):
        measure_decode_step(engine, 3, num_steps=4)
    assert not engine.has_unfinished_requests()
    engine.check_invariants()


@pytest.mark.parametrize("sizes", [dict(max_seq_length=280), dict(max_seq_length=400, n_pages=30)])
def test_requests_that_would_end_early_are_rejected(sizes):
    with (
        Inference(tiny_model("llama"), None, 3, page_size=16, compile=False, **sizes) as engine,
        pytest.raises(ValueError, match="do not fit"),
    ):
        measure_decode_step(engine, 3)


def test_waiting_requests_need_a_full_batch(engine):
    with pytest.raises(ValueError, match="max_batch_size=3"):
        measure_decode_step(engine, 2, num_waiting=1)


def test_no_two_prompts_share_a_page():
    prompts = distinct_prompts(256, prompt_len=9)
    assert {len(prompt) for prompt in prompts} == {9}
    assert len({tuple(prompt[:2]) for prompt in prompts}) == 256


def test_prompts_of_a_measurement_are_no_cache_hits(engine):
    with decoding_together(engine, 3, prompt_len=40, num_steps=2) as step:
        while engine.scheduler.waiting:
            step()
    assert (engine.stats().num_prompt_tokens, engine.stats().num_cached_tokens) == (3 * 40, 0)


@pytest.mark.parametrize("num_waiting", [0, 5])
def test_the_given_number_of_streams_wait_while_the_thread_of_the_engine_is_measured(engine, num_waiting, monkeypatch):
    states, step = [], AsyncInference._step

    def noted_step(self):
        step(self)
        queues = len(self.engine.scheduler.running), len(self.engine.scheduler.waiting)
        is_streamed = all(mailbox.reader is not None for mailbox in self._mailboxes.values())
        states.append((*queues, len(self._mailboxes), is_streamed, threading.current_thread() is self.engine.owner))

    monkeypatch.setattr(AsyncInference, "_step", noted_step)
    result = measure_streams(engine, num_waiting, num_steps=4)
    assert states.count((3, num_waiting, 3 + num_waiting, True, True)) >= 4
    assert (result.batch_size, result.num_waiting, result.output_len) == (3, num_waiting, 0)
    assert 0 < result.model_seconds < result.seconds
    assert "call_model" not in vars(engine.runner) and not engine.has_unfinished_requests() and engine.owner is None
    engine.check_invariants()


def test_a_failed_step_ends_the_measurement_of_streams(engine, monkeypatch):
    forward, num_steps = engine.runner.forward, 0

    def failing_forward(chunks):
        nonlocal num_steps
        num_steps += 1
        if num_steps == 6:
            raise RuntimeError("the step fails")
        return forward(chunks)

    monkeypatch.setattr(engine.runner, "forward", failing_forward)
    with pytest.raises(RuntimeError, match=r"a request ended before 3 requests|the step has failed"):
        measure_streams(engine, 2, num_steps=20)
    assert not engine.has_unfinished_requests() and engine.owner is None


def test_followed_outputs_have_the_given_lengths_and_are_decoded_in_every_step(monkeypatch):
    states, step = [], Inference.run_one_step

    def noted_step(self):
        outputs = step(self)
        running = self.scheduler.running
        assert all(len(sequence.text.text) == sequence.output_len for sequence in running)
        states.append((len(running), min(sequence.output_len for sequence in running)))
        return outputs

    def model(*args):
        raise AssertionError("the model was called")

    monkeypatch.setattr(Inference, "run_one_step", noted_step)
    with Inference(tiny_model("llama"), byte_tokenizer(), 3, 500, page_size=16, compile=False) as engine:
        monkeypatch.setattr(engine.runner, "_run_any_length", model)
        times = measure_followed(engine, output_lens=(8, 60), num_steps=4)
        assert not engine.has_unfinished_requests()
        engine.check_invariants()
    assert [(time.batch_size, time.num_waiting, time.output_len) for time in times] == [(3, 0, 8), (3, 0, 60)]
    assert [length for _, length in states[states.index((3, 8)) :][:6]] == [*range(8, 14)]
    assert states[-1] == (3, 60 + 1 + 4)  # one step before the measured ones


def test_followed_outputs_are_read_after_each_step(monkeypatch):
    deltas = []

    class NotedReader(overhead.OutputReader):
        def deltas(self):
            new = list(super().deltas())
            deltas.extend(new)
            return iter(new)

    monkeypatch.setattr(overhead, "OutputReader", NotedReader)
    with (
        Inference(tiny_model("llama"), byte_tokenizer(), 1, 400, page_size=16, compile=False) as engine,
        decoding_together(engine, 1, prompt_len=4, num_steps=3, follow=True) as step,
    ):
        (sequence,) = engine.scheduler.waiting
        assert sequence.params.stops == (overhead.STOP,)
        for _ in range(3):
            step()
        assert [delta.token_ids for delta in deltas] == [[token_id] for token_id in sequence.output_token_ids]


def test_the_report_has_all_values_of_each_curve(monkeypatch, capsys):
    monkeypatch.setattr(overhead, "PROMPT_LEN", 40)
    sizes = dict(BATCH_SIZES=(1, 2, 3), POOL_FACTORS=(1, 2), NUM_WAITING=(0, 3), NUM_STREAMS=(0, 4))
    sizes |= dict(MAX_SEQ_LENGTHS=(128, 1_024), OUTPUT_LENS=(5, 60))
    for name, values in sizes.items():
        monkeypatch.setattr(overhead, name, values)
    model = tiny_model("gemma2", torch.float32)
    options = RunOptions("tiny", max_seq_length=128, max_prompt_len=1, max_new_tokens=1, compile=False)
    options.fill_in("cpu")
    report_overhead(model, options, Console())
    curves = json.loads(capsys.readouterr().out.splitlines()[-1])

    def column(curve: str, field: str) -> tuple:
        return tuple(step[field] for step in curves[curve])

    assert column("batch size", "batch_size") == sizes["BATCH_SIZES"]
    assert column("pages", "n_pages") == (1 + 3 * 2, 1 + 3 * 2 * 2)
    assert column("waiting", "num_waiting") == sizes["NUM_WAITING"]
    assert column("streams", "num_waiting") == sizes["NUM_STREAMS"]
    assert column("max_seq_length", "max_seq_length") == sizes["MAX_SEQ_LENGTHS"]
    assert column("max_seq_length", "n_pages") == (1 + 1_024 // 64,) * 2
    assert column("followed", "output_len") == sizes["OUTPUT_LENS"]
    for curve in ("pages", "waiting", "streams", "max_seq_length", "followed"):
        assert set(column(curve, "batch_size")) == {2}
    assert model.config.max_position_embeddings == 512  # as before


class Waits(TorchFunctionMode):
    """Notes the calls for which the host has to wait for results of the device."""

    NAMES = ("tolist", "item", "cpu", "nonzero", "unique", "masked_select", "equal", "allclose", "is_nonzero")
    CONVERSIONS = ("__bool__", "__int__", "__float__", "__index__", "__contains__")

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", "")
        index = args[1] if name in ("__getitem__", "__setitem__") else ()
        by_mask = any(isinstance(i, torch.Tensor) and i.dtype == torch.bool for i in as_tuple(index))
        if name in (*self.NAMES, *self.CONVERSIONS) or by_mask:
            self.seen.append(name)
        return func(*args, **kwargs or {})


def as_tuple(index):
    return index if isinstance(index, tuple) else (index,)


@pytest.mark.parametrize(
    "params",
    [
        dict(temperature=0),
        dict(temperature=0.7, top_k=5, top_p=0.9, min_p=0.1, seed=1),
        dict(temperature=0, logprobs=2, prompt_logprobs=1),
        dict(temperature=0, repetition_penalty=1.2, logit_bias={5: 2.0}, allowed_token_ids=[4, 5, 6]),
    ],
    ids=str,
)
def test_the_host_waits_for_the_device_once_in_a_step(params):
    """Prompts in chunks, decodes, a fork, a preemption and a request that ends are in these steps."""
    params = SamplingParams(max_tokens=8, **params)
    sizes = dict(max_batch_size=3, max_seq_length=64, n_pages=9, page_size=4, max_num_batched_tokens=10, watermark=0)
    with Inference(tiny_model("gemma2", torch.float64), None, **sizes, compile=False) as engine:
        for length, n in ((3, 2), (14, 1), (1, 1)):
            engine.add_request(prompt_of(length), replace(params, n=n))
        num_steps = 0
        while engine.scheduler.has_unfinished_requests():
            with Waits() as waits:
                engine.run_one_step()
            assert len(waits.seen) == 1 and waits.seen[0] in ("tolist", "cpu"), waits.seen
            num_steps += 1
        assert num_steps > 10 and engine.stats().num_preemptions > 0


def test_waiting_for_the_device_is_noticed():
    tensor = torch.arange(3)
    with Waits() as waits:
        assert tensor[tensor > 1].tolist() == [2] and tensor.sum() > 1 and int(tensor[0]) == 0
    assert waits.seen == ["__getitem__", "tolist", "__bool__", "__int__"]
