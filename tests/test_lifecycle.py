"""The life cycle of an engine: abort, calls at the wrong time, takeover of the model by another engine, and close."""

import copy
import gc
import itertools
import threading
import weakref

import pytest
import torch
from engines import (
    MAX_STEPS,
    PROMPTS,
    SIZES,
    assert_empty,
    drain,
    greedy,
    own_model,
    prompt_of,
    tokens_of,
)
from tiny_models import hf_generate, tiny_model

from flex_nano_vllm import Inference, SamplingParams
from flex_nano_vllm.attention import PagedKVCache
from flex_nano_vllm.patching import is_patched

# --- abort -------------------------------------------------------------------------------------------------------


SCARCE = dict(n_pages=11, watermark=0)
STATES = {
    # prompt lengths of the older requests and of the aborted request; sizes; whether its sequence is in the state
    "waiting": ([4, 4, 4], 5, {}, lambda s: s.row is None),
    "half of its prompt computed": ([4], 14, {}, lambda s: 0 < s.num_computed_tokens < s.num_prompt_tokens),
    "decoding": ([4, 4], 5, {}, lambda s: len(s.output_token_ids) == 3),
    "preempted": ([9, 9], 9, SCARCE, lambda s: s.metrics.num_preemptions and s.row is None),
    "recomputing": (
        [9, 9],
        9,
        dict(SCARCE, enable_prefix_caching=False),  # otherwise nearly all its tokens would be cache hits
        lambda s: s.metrics.num_preemptions and 0 < s.num_computed_tokens < s.num_tokens - 1,
    ),
}


@pytest.mark.parametrize("state", STATES)
def test_abort_works_in_every_state_and_does_not_affect_other_requests(state):
    older, length, sizes, in_state = STATES[state]
    prompts = [prompt_of(n, seed) for seed, n in enumerate([*older, length, 3])]  # the last request is younger
    model = own_model("abort")
    oracle = [hf_generate(tiny_model("gemma2"), prompt, 8, ignore_eos=True) for prompt in prompts]
    with Inference(model, None, **{**SIZES, "max_num_batched_tokens": 8, **sizes}) as engine:
        ids = [engine.add_request(prompt, greedy(8)) for prompt in prompts]
        aborted_id = ids[-2]
        (victim,) = [s for s in engine.scheduler.waiting if s.request_id == aborted_id]
        outputs = {}
        for _ in range(MAX_STEPS):
            if in_state(victim):
                break
            outputs.update((output.request_id, output) for output in engine.run_one_step())
        assert in_state(victim) and victim.finish_reason is None, "the workload never reaches the state"

        aborted = engine.abort(aborted_id)
        engine.check_invariants()
        assert aborted.request_id == aborted_id
        assert aborted.prompt_token_ids == prompts[-2]
        assert aborted.outputs[0].finish_reason == "abort"
        assert aborted.outputs[0].token_ids == oracle[-2][: len(aborted.outputs[0].token_ids)]

        assert engine.abort(aborted_id) is None
        outputs.update(drain(engine))
        assert engine.abort(aborted_id) is None
        assert aborted_id not in outputs
        others = [i for i in range(len(ids)) if i != len(ids) - 2]
        assert tokens_of(outputs[ids[i]] for i in others) == [oracle[i] for i in others]
        assert_empty(engine)
        assert engine.stats().num_finished_requests == len(ids)


def test_abort_of_a_request_that_never_ran_has_no_tokens(engine):
    aborted = engine.abort(engine.add_request(PROMPTS[0], greedy(5)))
    assert (aborted.outputs[0].token_ids, aborted.outputs[0].finish_reason) == ([], "abort")
    assert_empty(engine)


def test_abort_of_a_finished_or_unknown_request_returns_none_and_changes_nothing(engine, expected):
    finished = engine.generate([PROMPTS[0]], greedy(3), use_tqdm=False)[0].request_id
    running = engine.add_request(PROMPTS[1], greedy(8))
    engine.run_one_step()
    before = engine.stats()
    assert [engine.abort(i) for i in (finished, running + 1, -1)] == [None, None, None]
    assert engine.stats() == before
    assert drain(engine)[running].outputs[0].token_ids == expected[1]


# --- one caller at a time ----------------------------------------------------------------------------------------


def test_generate_raises_while_requests_are_unfinished_and_does_not_affect_them(engine, expected):
    request_id = engine.add_request(PROMPTS[0], greedy(8))
    for _ in range(2):  # first waiting, then running
        before = engine.stats()
        with pytest.raises(RuntimeError, match="unfinished"):
            engine.generate([PROMPTS[1]], greedy(8), use_tqdm=False)
        assert engine.stats() == before
        engine.run_one_step()
    assert drain(engine)[request_id].outputs[0].token_ids == expected[0]
    assert_empty(engine)


def inside_the_second_step(monkeypatch, callback):
    """Call `callback` once, from inside the model's forward pass in the second step."""
    attend, calls = PagedKVCache.attend, itertools.count(1)

    def attend_and_call(*args, **kwargs):
        if next(calls) == 4:  # the second layer of the second step
            callback()
        return attend(*args, **kwargs)

    monkeypatch.setattr(PagedKVCache, "attend", attend_and_call)


CALLS = {
    "run_one_step": (lambda engine: engine.run_one_step(), RuntimeError, "busy"),
    "abort": (lambda engine: engine.abort(0), RuntimeError, "busy"),
    "warmup": (lambda engine: engine.warmup(), RuntimeError, "busy"),
    "generate": (lambda engine: engine.generate([[5]], use_tqdm=False), RuntimeError, "busy"),
    "another engine": (lambda engine: Inference(engine.model, None, **SIZES), ValueError, "unfinished"),
    "the model": (lambda engine: engine.model(torch.tensor([[5]])), RuntimeError, "belongs to an Inference engine"),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_call_from_inside_a_step_raises_and_corrupts_nothing(engine, expected, monkeypatch, name):
    call, error, match = CALLS[name]
    refusals = []

    def callback():
        with pytest.raises(error, match=match):
            call(engine)
        refusals.append(name)

    inside_the_second_step(monkeypatch, callback)
    assert tokens_of(engine.generate(PROMPTS, greedy(8), use_tqdm=False)) == expected
    assert refusals == [name]
    assert_empty(engine)


@pytest.fixture
def busy_engine(engine, monkeypatch):
    """Yield an engine that is inside `generate` in another thread, and a function that lets this thread continue and
    returns its result."""
    arrived, leave, results = threading.Event(), threading.Event(), []

    def wait():
        arrived.set()
        assert leave.wait(timeout=60)

    inside_the_second_step(monkeypatch, wait)
    worker = threading.Thread(
        target=lambda: results.append(engine.generate(PROMPTS, greedy(8), use_tqdm=False)), daemon=True
    )
    worker.start()
    assert arrived.wait(timeout=60)

    def finish():
        leave.set()
        worker.join(timeout=60)
        assert not worker.is_alive()
        return results[0] if results else []

    yield engine, finish
    finish()
    engine.scheduler.reset()  # so that a call that was wrongly accepted fails only its own test


@pytest.mark.parametrize("name", CALLS)
def test_a_call_from_a_second_thread_raises_and_corrupts_nothing(busy_engine, expected, name):
    engine, finish = busy_engine
    call, error, match = CALLS[name]
    with pytest.raises(error, match=match):
        call(engine)
    assert tokens_of(finish()) == expected
    assert_empty(engine)


def test_a_request_added_by_a_second_thread_during_generate_is_rejected(busy_engine, expected):
    """Otherwise `generate` would compute the request and drop its output."""
    engine, finish = busy_engine
    with pytest.raises(RuntimeError):
        engine.add_request(PROMPTS[0], greedy(2))
    assert tokens_of(finish()) == expected


# --- takeover and close ------------------------------------------------------------------------------------------


@pytest.fixture
def model():
    return copy.deepcopy(tiny_model("llama"))


@pytest.fixture(scope="module")
def expected_of_llama():
    return hf_generate(tiny_model("llama"), PROMPTS[0], 4, ignore_eos=True)


def answer(engine):
    return engine.generate([PROMPTS[0]], greedy(4), use_tqdm=False)[0].outputs[0].token_ids


CALLS_OF_AN_OPEN_ENGINE = {
    "generate": lambda engine: engine.generate([[5]], use_tqdm=False),
    "add_request": lambda engine: engine.add_request([5]),
    "run_one_step": lambda engine: engine.run_one_step(),
    "abort": lambda engine: engine.abort(0),
    "warmup": lambda engine: engine.warmup(),
}


def test_a_second_engine_takes_over_the_model_and_calls_of_the_first_raise(model, expected_of_llama):
    first = Inference(model, None, **SIZES)
    assert answer(first) == expected_of_llama
    second = Inference(model, None, **{**SIZES, "n_pages": 9})
    assert answer(second) == expected_of_llama
    for call in CALLS_OF_AN_OPEN_ENGINE.values():
        with pytest.raises(RuntimeError, match=r"closed.*another engine"):
            call(first)
    first.close()  # it has released the model already, so this does nothing
    assert answer(second) == expected_of_llama
    del first
    gc.collect()
    assert answer(second) == expected_of_llama


def test_the_pool_of_the_first_engine_is_freed_before_the_second_allocates_its_own(model, monkeypatch):
    first = Inference(model, None, **SIZES)
    answer(first)
    layers = [layer.self_attn for layer in model.model.layers]
    old = [weakref.ref(t) for layer in layers for t in (layer.kv_cache.k_cache, layer.kv_cache.v_cache)]
    alive = []
    create = PagedKVCache.__init__

    def count_and_create(*args, **kwargs):
        gc.collect()
        alive.append(sum(tensor() is not None for tensor in old))
        create(*args, **kwargs)

    monkeypatch.setattr(PagedKVCache, "__init__", count_and_create)
    second = Inference(model, None, **SIZES)
    assert alive == [0] * len(layers)
    assert [name for name, _ in model.named_buffers() if "k_cache" in name or "v_cache" in name] == [
        f"model.layers.{i}.self_attn.kv_cache.{kind}" for i in range(len(layers)) for kind in ("k_cache", "v_cache")
    ]
    second.close()


def test_the_model_of_an_engine_with_unfinished_requests_cannot_be_taken_over(model, expected_of_llama):
    first = Inference(model, None, **SIZES)
    request_id = first.add_request(PROMPTS[0], greedy(4))
    for _ in range(2):  # first waiting, then running
        with pytest.raises(ValueError, match="unfinished requests"):
            Inference(model, None, **SIZES)
        first.run_one_step()
    assert drain(first)[request_id].outputs[0].token_ids == expected_of_llama
    assert answer(Inference(model, None, **SIZES)) == expected_of_llama


def test_a_closed_engine_drops_its_requests_and_releases_the_model(model, expected_of_llama):
    first = Inference(model, None, **SIZES)
    first.add_request(PROMPTS[0], greedy(4))
    first.add_request(PROMPTS[1], greedy(4))
    first.run_one_step()
    first.close()
    assert_empty(first)
    assert answer(Inference(model, None, **SIZES)) == expected_of_llama


def test_a_with_block_that_ends_with_an_exception_restores_the_model(model, expected_of_llama):
    with pytest.raises(OSError, match="injected"), Inference(model, None, **SIZES) as engine:
        engine.add_request(PROMPTS[0], greedy(4))
        engine.run_one_step()
        raise OSError("injected")
    assert hf_generate(model, PROMPTS[0], 4, ignore_eos=True) == expected_of_llama
    assert answer(Inference(model, None, **SIZES)) == expected_of_llama


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("way", ["close", "with", "del"])
def test_closing_or_deleting_an_engine_restores_the_model(model, expected_of_llama, way, implementation):
    model.set_attn_implementation(implementation)
    attributes = [set(vars(layer)) for layer in [layer.self_attn for layer in model.model.layers]]
    buffers = [name for name, _ in model.named_buffers()]
    engine = Inference(model, None, **SIZES)
    assert is_patched(model)
    assert model.config._attn_implementation != implementation
    assert answer(engine) == expected_of_llama
    if way == "close":
        engine.close()
        engine.close()
    elif way == "with":
        with engine as entered:
            assert entered is engine
    else:
        del engine
        gc.collect()
    assert not is_patched(model)
    assert model.config._attn_implementation == implementation
    assert [set(vars(layer)) for layer in [layer.self_attn for layer in model.model.layers]] == attributes
    assert [name for name, _ in model.named_buffers()] == buffers
    assert hf_generate(model, PROMPTS[0], 4, ignore_eos=True) == expected_of_llama


@pytest.mark.parametrize("close", [True, False], ids=["closed", "dropped"])
def test_an_engine_and_its_model_are_garbage_collected(close):
    model = copy.deepcopy(tiny_model("llama"))
    engine = Inference(model, None, **SIZES)
    answer(engine)
    references = [weakref.ref(engine), weakref.ref(model), weakref.ref(engine.page_table.table)]
    if close:
        engine.close()
    del engine, model
    gc.collect()
    assert [reference() for reference in references] == [None] * 3


@pytest.mark.parametrize("name", CALLS_OF_AN_OPEN_ENGINE)
def test_a_call_of_a_closed_engine_raises(model, name):
    engine = Inference(model, None, **SIZES)
    engine.close()
    with pytest.raises(RuntimeError, match="this engine is closed"):
        CALLS_OF_AN_OPEN_ENGINE[name](engine)
    assert_empty(engine)


@pytest.mark.parametrize(
    "call",
    [
        lambda model: model(torch.tensor([[5, 6]])),
        lambda model: model(torch.tensor([[5, 6]]), use_cache=False),
        lambda model: model(torch.tensor([[5, 6]]), attention_mask=torch.ones(1, 2)),
        lambda model: hf_generate(model, [5, 6], 2),
    ],
    ids=["model()", "without cache", "with mask", "generate()"],
)
def test_a_direct_call_of_a_patched_model_raises(engine, call):
    with pytest.raises(RuntimeError, match=r"belongs to an Inference engine.*engine\.close\(\)"):
        call(engine.model)


def test_a_step_raises_if_the_attention_implementation_of_the_model_was_changed(model, expected_of_llama):
    """Hugging Face's attention would accept the step as a keyword argument, and requests would attend to each other."""
    with Inference(model, None, **SIZES) as engine:
        model.set_attn_implementation("eager")
        with pytest.raises(RuntimeError, match="set_attn_implementation"):
            engine.generate([[5]], greedy(1), use_tqdm=False)


def test_an_engine_works_the_same_inside_and_outside_inference_mode(model, expected_of_llama):
    with torch.inference_mode():
        engine = Inference(model, None, **SIZES)
        assert answer(engine) == expected_of_llama
    assert answer(engine) == expected_of_llama
    engine.close()
    assert not is_patched(model)


def test_an_ended_request_is_freed_without_the_garbage_collector(engine, monkeypatch):
    """When torch is loaded, the garbage collector runs once in tens of thousands of requests."""
    seen = []
    add = engine.scheduler.add
    monkeypatch.setattr(engine.scheduler, "add", lambda sequence: seen.append(weakref.ref(sequence)) or add(sequence))
    gc.disable()
    try:
        engine.generate([PROMPTS[0]] * 2, SamplingParams(seed=1, n=3, max_tokens=3), use_tqdm=False)
        engine.abort(engine.add_request(PROMPTS[0], greedy(3)))
        assert len(seen) == 7 and not any(reference() for reference in seen)
    finally:
        gc.enable()
