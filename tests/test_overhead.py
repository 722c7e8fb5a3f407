"""Measuring the time of a step outside the model leaves the engine unchanged, and the times add up."""

import pytest
import torch
from tiny_models import tiny_model

from benchmarks.overhead import decoding_together, distinct_prompts, measure_decode_step
from flex_nano_vllm import Inference


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
