"""What an engine lives through: aborts, callers that come at the wrong time, takeovers, its end."""

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
from flex_nano_vllm.patching import attention_layers, is_patched

# --- abort -------------------------------------------------------------------------------------------------------


SCARCE = dict(n_pages=11, watermark=0)
STATES = {
    # prompt lengths of the older requests, and of the one that is aborted; sizes; the state, seen in its sequence
    "waiting": ([4, 4, 4], 5, {}, lambda s: s.row is None),
    "half of its prompt computed": ([4], 14, {}, lambda s: 0 < s.num_computed_tokens < s.num_prompt_tokens),
    "decoding": ([4, 4], 5, {}, lambda s: len(s.output_token_ids) == 3),
    "preempted": ([9, 9], 9, SCARCE, lambda s: s.metrics.num_preemptions and s.row is None),
    "recomputing": (
        [9, 9],
        9,
        dict(SCARCE, enable_prefix_caching=False),  # else it would find nearly all of it again
        lambda s: s.metrics.num_preemptions and 0 < s.num_computed_tokens < s.num_tokens - 1,
    ),
}


@pytest.mark.parametrize("state", STATES)
def test_abort_works_in_every_state_and_others_do_not_notice(state):
    older, length, sizes, in_state = STATES[state]
    prompts = [prompt_of(n, seed) for seed, n in enumerate([*older, length, 3])]  # and one younger
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
        assert in_state(victim) and victim.finish_reason is None, "the workload never gets there"

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


def test_abort_of_a_finished_or_an_unknown_request_is_none_and_no_harm(engine, expected):
    finished = engine.generate([PROMPTS[0]], greedy(3), use_tqdm=False)[0].request_id
    running = engine.add_request(PROMPTS[1], greedy(8))
    engine.run_one_step()
    before = engine.stats()
    assert [engine.abort(i) for i in (finished, running + 1, -1)] == [None, None, None]
    assert engine.stats() == before
    assert drain(engine)[running].outputs[0].token_ids == expected[1]


# --- one caller at a time ----------------------------------------------------------------------------------------


def test_generate_refuses_while_requests_are_unfinished_and_leaves_them_alone(engine, expected):
    request_id = engine.add_request(PROMPTS[0], greedy(8))
    for _ in range(2):  # waiting, and then running
        before = engine.stats()
        with pytest.raises(RuntimeError, match="unfinished"):
            engine.generate([PROMPTS[1]], greedy(8), use_tqdm=False)
        assert engine.stats() == before
        engine.run_one_step()
    assert drain(engine)[request_id].outputs[0].token_ids == expected[0]
    assert_empty(engine)


def inside_the_second_step(monkeypatch, callback):
    """Have `callback` called from within the model's forward, once."""
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
def test_a_call_from_inside_a_step_is_refused_and_corrupts_nothing(engine, expected, monkeypatch, name):
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
    """An engine in the middle of `generate` in another thread. Yields it and a function that lets that thread go on
    and returns its result."""
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
    engine.scheduler.reset()  # so that a call that slipped through fails its own test alone


@pytest.mark.parametrize("name", CALLS)
def test_a_call_from_a_second_thread_is_refused_and_corrupts_nothing(busy_engine, expected, name):
    engine, finish = busy_engine
    call, error, match = CALLS[name]
    with pytest.raises(error, match=match):
        call(engine)
    assert tokens_of(finish()) == expected
    assert_empty(engine)


def test_a_request_added_by_a_second_thread_during_generate_is_refused(busy_engine, expected):
    """It would be computed by a `generate` that does not know whose it is, and its answer thrown away."""
    engine, finish = busy_engine
    with pytest.raises(RuntimeError):
        engine.add_request(PROMPTS[0], greedy(2))
    assert tokens_of(finish()) == expected


# --- takeover and the end ----------------------------------------------------------------------------------------


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


def test_a_second_engine_takes_the_model_over_and_the_first_says_so(model, expected_of_llama):
    first = Inference(model, None, **SIZES)
    assert answer(first) == expected_of_llama
    second = Inference(model, None, **{**SIZES, "n_pages": 9})
    assert answer(second) == expected_of_llama
    for call in CALLS_OF_AN_OPEN_ENGINE.values():
        with pytest.raises(RuntimeError, match=r"closed.*another engine"):
            call(first)
    first.close()  # what it gave back once is not its own any more
    assert answer(second) == expected_of_llama
    del first
    gc.collect()
    assert answer(second) == expected_of_llama


def test_the_pool_of_the_first_engine_is_gone_before_the_second_takes_its_own(model, monkeypatch):
    first = Inference(model, None, **SIZES)
    answer(first)
    layers = attention_layers(model)
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


def test_an_engine_with_unfinished_requests_is_not_taken_over(model, expected_of_llama):
    first = Inference(model, None, **SIZES)
    request_id = first.add_request(PROMPTS[0], greedy(4))
    for _ in range(2):  # waiting, and then running
        with pytest.raises(ValueError, match="unfinished requests"):
            Inference(model, None, **SIZES)
        first.run_one_step()
    assert drain(first)[request_id].outputs[0].token_ids == expected_of_llama
    assert answer(Inference(model, None, **SIZES)) == expected_of_llama


def test_a_closed_engine_forgets_its_requests_and_does_not_hold_the_model(model, expected_of_llama):
    first = Inference(model, None, **SIZES)
    first.add_request(PROMPTS[0], greedy(4))
    first.add_request(PROMPTS[1], greedy(4))
    first.run_one_step()
    first.close()
    assert_empty(first)
    assert answer(Inference(model, None, **SIZES)) == expected_of_llama


def test_a_with_block_that_an_exception_leaves_gives_the_model_back(model, expected_of_llama):
    with pytest.raises(OSError, match="injected"), Inference(model, None, **SIZES) as engine:
        engine.add_request(PROMPTS[0], greedy(4))
        engine.run_one_step()
        raise OSError("injected")
    assert hf_generate(model, PROMPTS[0], 4, ignore_eos=True) == expected_of_llama
    assert answer(Inference(model, None, **SIZES)) == expected_of_llama


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("way", ["close", "with", "del"])
def test_every_end_of_an_engine_gives_the_model_back(model, expected_of_llama, way, implementation):
    model.set_attn_implementation(implementation)
    attributes = [set(vars(layer)) for layer in attention_layers(model)]
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
    assert [set(vars(layer)) for layer in attention_layers(model)] == attributes
    assert [name for name, _ in model.named_buffers()] == buffers
    assert hf_generate(model, PROMPTS[0], 4, ignore_eos=True) == expected_of_llama


@pytest.mark.parametrize("close", [True, False], ids=["closed", "dropped"])
def test_an_engine_and_its_model_die_together(close):
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
def test_a_closed_engine_says_that_it_is_closed(model, name):
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
def test_a_patched_model_that_is_called_directly_says_whom_it_belongs_to(engine, call):
    with pytest.raises(RuntimeError, match=r"belongs to an Inference engine.*engine\.close\(\)"):
        call(engine.model)


def test_changing_the_attention_of_an_engines_model_is_noticed(model, expected_of_llama):
    """Hugging Face's own functions would take the step for one more keyword, and requests would see each other."""
    with Inference(model, None, **SIZES) as engine:
        model.set_attn_implementation("eager")
        with pytest.raises(RuntimeError, match="set_attn_implementation"):
            engine.generate([[5]], greedy(1), use_tqdm=False)


def test_inference_mode_makes_no_difference(model, expected_of_llama):
    with torch.inference_mode():
        engine = Inference(model, None, **SIZES)
        assert answer(engine) == expected_of_llama
    assert answer(engine) == expected_of_llama
    engine.close()
    assert not is_patched(model)


def test_a_request_that_has_ended_is_freed_without_the_collector(engine, monkeypatch):
    """Where torch is loaded, the collector comes once in tens of thousands of requests."""
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
