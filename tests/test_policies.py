"""Policies order the queues: which request is admitted first, and which is preempted first. Results stay the same."""

import asyncio
import math

import pytest
from engines import SIZES, TIGHT, assert_empty, greedy, make_sequence, own_model, prompt_of, samples_of, tokens_of
from serving import MODEL
from tiny_models import hf_generate, tiny_model

from flex_nano_vllm import LLM, AsyncInference, Inference, SamplingParams
from flex_nano_vllm.geometry import Geometry
from flex_nano_vllm.invariants import check_scheduler
from flex_nano_vllm.kv_manager import KVManager
from flex_nano_vllm.patching import is_patched
from flex_nano_vllm.policies import POLICIES, queue_key
from flex_nano_vllm.sampling_params import InvalidRequestError
from flex_nano_vllm.scheduler import Scheduler
from flex_nano_vllm.server_protocol import ChatCompletionRequest, CompletionRequest


def scheduler_of(usable_pages=100, rows=1, budget=64):
    """Return a scheduler with pages of one token, no prefix caching and no watermark."""
    return Scheduler(KVManager(Geometry(usable_pages + 1, 1, rows, 100, budget), prefix_caching=False), budget, 0)


def submit(scheduler, policy, request_id, prompt_len=2, max_tokens=2, priority=0, samples=1):
    group = []
    for _ in range(samples):
        params = SamplingParams(priority=priority)
        sequence = make_sequence([1] * prompt_len, request_id, prompt_len + max_tokens, params=params, group=group)
        sequence.queue_key = queue_key(policy)(group[0])
        scheduler.add(sequence)
    check_scheduler(scheduler)
    return group


def step(scheduler):
    """Run one step. Returns the number of computed tokens by request id."""
    chunks = scheduler.schedule()
    check_scheduler(scheduler)
    scheduler.commit(chunks, samples_of(1 for _ in chunks))
    return {chunk.sequence.request_id: chunk.length for chunk in chunks}


def first_steps(scheduler):
    """Run all requests. Returns the request ids in the order of their first chunks."""
    order = []
    while scheduler.has_unfinished_requests():
        order += [request_id for request_id in step(scheduler) if request_id not in order]
    return order


# ---- order ----


@pytest.mark.parametrize(
    ("policy", "order"),
    [
        ("fcfs", [0, 1, 2, 3, 4]),
        ("priority", [2, 4, 1, 0, 3]),
        ("sjf", [1, 3, 0, 2, 4]),
        (lambda sequence: -sequence.request_id, [4, 3, 2, 1, 0]),
        (lambda sequence: (sequence.num_prompt_tokens > 5, -sequence.request_id), [3, 1, 4, 2, 0]),
    ],
    ids=["fcfs", "priority", "sjf", "number", "tuple"],
)
def test_requests_start_in_the_order_of_the_key_and_then_of_arrival(policy, order):
    scheduler = scheduler_of()
    lengths, priorities = [(6, 2), (2, 2), (8, 3), (3, 1), (7, 9)], [3, 0, -1, 3, -1]
    for i, ((prompt_len, max_tokens), priority) in enumerate(zip(lengths, priorities)):
        submit(scheduler, policy, i, prompt_len, max_tokens, priority if policy == "priority" else 0)
    assert first_steps(scheduler) == order


def test_a_later_request_with_a_smaller_priority_overtakes_waiting_requests_but_not_running_ones():
    scheduler = scheduler_of()
    for i, priority in enumerate([5, 5, 1]):
        submit(scheduler, "priority", i, priority=priority)
        step(scheduler)
    assert scheduler.num_preemptions == 0
    assert [s.request_id for s in (*scheduler.running, *scheduler.waiting)] == [2, 1], "0 has ended"


def test_the_last_running_request_by_key_is_preempted():
    scheduler = scheduler_of(usable_pages=12, rows=3)
    for i, priority in enumerate([1, 2, 0]):
        submit(scheduler, "priority", i, prompt_len=3, max_tokens=6, priority=priority)
    assert step(scheduler) == {2: 3, 0: 3, 1: 3}
    assert step(scheduler) == {2: 1, 0: 1, 1: 1}
    assert step(scheduler) == {2: 1, 0: 1}, "the pool is full"
    assert [s.request_id for s in scheduler.waiting] == [1]
    submit(scheduler, "priority", 3, prompt_len=1, priority=1)
    assert [s.request_id for s in scheduler.waiting] == [3, 1], "the preempted request waits at the place of its key"
    assert first_steps(scheduler) == [2, 0, 3, 1]


def test_decodes_get_a_token_in_every_step_beside_a_long_prompt_with_a_smaller_priority():
    scheduler = scheduler_of(rows=4, budget=8)
    for i in range(2):
        submit(scheduler, "priority", i, max_tokens=20, priority=7)
    step(scheduler)
    submit(scheduler, "priority", 2, prompt_len=20, priority=0)
    submit(scheduler, "priority", 3, prompt_len=9, priority=-1)
    seen = [step(scheduler) for _ in range(6)]
    assert seen[:2] == [{0: 1, 1: 1, 3: 6}, {3: 3, 0: 1, 1: 1, 2: 3}]
    assert all(computed[0] == computed[1] == 1 for computed in seen)


def test_the_samples_of_a_request_stay_together():
    scheduler = scheduler_of(rows=2)
    submit(scheduler, "priority", 0, priority=1, samples=3)
    submit(scheduler, "priority", 1, priority=0, samples=3)
    order = [(s.request_id, s.index) for s in scheduler.waiting]
    assert order == [(1, 0), (1, 1), (1, 2), (0, 0), (0, 1), (0, 2)]
    assert first_steps(scheduler) == [1, 0]


@pytest.mark.parametrize("policy", [*POLICIES, lambda sequence: -sequence.num_prompt_tokens])
def test_tokens_do_not_depend_on_the_policy(policy):
    prompts = [prompt_of(length, seed=length) for length in (9, 3, 14, 6, 11, 2)]
    params = [
        SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, priority=i % 3 if policy == "priority" else 0)
        for i in range(len(prompts))
    ]
    with Inference(own_model("policies"), None, **TIGHT, policy=policy) as engine:
        outputs = engine.generate(prompts, params, use_tqdm=False)
        assert engine.stats().num_preemptions > 0
        assert_empty(engine)
    expected = [hf_generate(tiny_model("gemma2"), prompt, 8, ignore_eos=True) for prompt in prompts]
    assert tokens_of(outputs) == expected


# ---- rejected values ----


@pytest.mark.parametrize("policy", ["lifo", "", None, 3, ["fcfs"]])
def test_an_unknown_policy_is_rejected_and_the_model_is_not_touched(policy):
    model = own_model("policies")
    with Inference(model, None, **SIZES) as engine:
        with pytest.raises(ValueError, match="policy must be one of 'fcfs', 'priority', 'sjf', or a function"):
            Inference(model, None, **SIZES, policy=policy)
        assert is_patched(model), "the engine that the model belongs to is still open"
        engine.generate([prompt_of(3)], greedy(1), use_tqdm=False)


@pytest.mark.parametrize("key", [None, "a", math.nan, (1, math.nan), [1, 2], (1, "a"), 1j, ((1,),)])
def test_a_key_that_cannot_be_compared_is_rejected_before_anything_is_queued(key):
    with Inference(own_model("policies"), None, **SIZES, policy=lambda sequence: key) as engine:
        with pytest.raises(ValueError, match="must return a number or a tuple of numbers"):
            engine.add_request(prompt_of(3), SamplingParams(n=2))
        assert_empty(engine)


def test_a_key_function_that_raises_rejects_its_request_only():
    def key(sequence):
        return {3: 1, 5: (2, 2), 4: 0.5}[sequence.num_prompt_tokens]

    with Inference(own_model("policies"), None, **SIZES, policy=key) as engine:
        kept = [engine.add_request(prompt_of(length), greedy(2)) for length in (5, 3)]
        with pytest.raises(KeyError):
            engine.add_request(prompt_of(7), greedy(2))
        with pytest.raises(KeyError):
            engine.generate([prompt_of(4), prompt_of(7)], greedy(2), use_tqdm=False)
        engine.check_invariants()
        assert [sequence.request_id for sequence in engine.scheduler.waiting] == kept[::-1]
        for request_id in kept:
            engine.abort(request_id)

        async def shared():
            async with AsyncInference(engine) as shared:
                with pytest.raises(KeyError):
                    await shared.generate(prompt_of(7), greedy(2))
                return await shared.generate(prompt_of(4), greedy(2))

        assert len(asyncio.run(shared()).outputs[0].token_ids) == 2
        assert_empty(engine)


def test_the_key_function_is_called_once_per_request():
    calls = []
    with Inference(own_model("policies"), None, **TIGHT, policy=lambda s: calls.append(s) or 0) as engine:
        engine.generate([prompt_of(9), prompt_of(9, seed=1)], SamplingParams(n=2, max_tokens=8), use_tqdm=False)
    assert [(sequence.index, sequence.num_prompt_tokens) for sequence in calls] == [(0, 9), (0, 9)]


@pytest.mark.parametrize("policy", ["fcfs", "sjf"])
def test_a_priority_that_the_policy_would_ignore_is_rejected(policy):
    with Inference(own_model("policies"), None, **SIZES, policy=policy) as engine:
        with pytest.raises(InvalidRequestError, match=f"priority=-2 needs policy='priority'.*{policy}") as error:
            engine.add_request(prompt_of(3), SamplingParams(priority=-2))
        assert error.value.param == "priority"
        assert_empty(engine)


@pytest.mark.parametrize("priority", [1.0, "1", None, True, 2**63, -(2**63) - 1, math.nan])
def test_a_priority_is_a_signed_64_bit_int(priority):
    with pytest.raises(InvalidRequestError, match="priority must be an int") as error:
        SamplingParams(priority=priority)
    assert error.value.param == "priority"


# ---- names of vLLM ----


def test_requests_of_the_server_have_a_priority():
    chat = dict(model=MODEL, messages=[{"role": "user", "content": "hi"}])
    assert ChatCompletionRequest(**chat, priority=-3).to_params({}).priority == -3
    assert CompletionRequest(model=MODEL, prompt="hi", priority=3).to_params({}).priority == 3
    assert ChatCompletionRequest(**chat).to_params({}).priority == 0


def test_llm_takes_vllms_name_of_the_policy():
    with pytest.raises(ValueError, match="policy must be one of"):
        LLM("tiny-gemma2", scheduling_policy="lifo")
