"""Every sampling parameter through the engine.

The oracle runs Hugging Face's model on the growing sequence, one token at a time, and loops over the vocabulary in
plain Python.
"""

import functools
import math
import random

import pytest
import torch
from engines import (
    SIZES,
    TIGHT,
    assert_empty,
    drain,
    greedy,
    own_model,
    prompt_of,
    token_of,
    tokens_of,
)
from tiny_models import VOCABULARY, tiny_model

from flex_nano_vllm import Inference, SamplingParams, logprobs, sampler, scheduler
from flex_nano_vllm.sampler import Draw, uniform

EOS = 1


@functools.cache
def hf_logits(tokens):
    """Return the logits of all positions, [T, V]."""
    with torch.no_grad():
        return tiny_model("gemma2")(torch.tensor([tokens])).logits[0]


@functools.cache
def hf_logprobs(tokens):
    return hf_logits(tokens).log_softmax(dim=-1).tolist()


def expected(prompt, params, index=0):
    """Return (tokens, finish_reason, stop_reason) of sample `index`."""
    tokens, room = list(prompt), SIZES["max_seq_length"] - len(prompt)
    num_wanted = min(room, params.max_tokens or room)
    stop_ids = set(params.stop_token_ids or ())
    end_ids = stop_ids if params.ignore_eos else stop_ids | {EOS}
    while True:
        output = tokens[len(prompt) :]
        changes = {}
        for i in range(VOCABULARY):
            bias = (params.logit_bias or {}).get(i, 0.0)
            if i in end_ids and len(output) < params.min_tokens:
                bias = -math.inf
            divisor = params.repetition_penalty if i in tokens else 1.0
            penalty = params.frequency_penalty * output.count(i) + params.presence_penalty * (i in output)
            changes[i] = (bias, divisor, penalty)
        draw = Draw(
            temperature=params.temperature,
            u=uniform(params.seed + index, len(tokens)) if params.temperature else 0.0,
            top_k=max(0, params.top_k),
            top_p=params.top_p,
            min_p=params.min_p,
        )
        logits = hf_logits(tuple(tokens))[-1].tolist()
        token = token_of(logits, draw, changes, params.allowed_token_ids, is_double=True, margin=1e-6)
        assert token is not None, "a number is too close to a boundary between tokens: choose another seed"
        tokens.append(token)
        output = tokens[len(prompt) :]
        if token in end_ids:
            return output, "stop", token if token in stop_ids and (params.ignore_eos or token != EOS) else None
        if len(output) == num_wanted:
            return output, "length", None


def check_rating(named, context, token_id, num_top):
    """Check the logprobs of a token after `context`. Hugging Face's attention softmax is in float32."""
    logprobs = hf_logprobs(context)[-1]
    best = sorted(range(VOCABULARY), key=lambda i: -logprobs[i])
    assert next(iter(named)) == token_id
    assert [i for i in named if i != token_id] == [i for i in best[:num_top] if i != token_id]
    for i, (logprob, rank, text, _) in named.items():
        assert logprob == pytest.approx(logprobs[i], abs=2e-6)
        assert (rank, text) == (best.index(i) + 1, None)


def check(output, prompt, params):
    """Check an output against the oracle and the parameters of its request."""
    assert output.prompt_token_ids == prompt
    for index, completion in enumerate(output.outputs):
        answer = (completion.token_ids, completion.finish_reason, completion.stop_reason)
        assert answer == expected(prompt, params, index)
        assert (completion.index, completion.text) == (index, None)
        if params.logprobs is None:
            assert completion.logprobs is completion.cumulative_logprob is None
            continue
        assert len(completion.logprobs) == len(completion.token_ids)
        for i, (token_id, named) in enumerate(zip(completion.token_ids, completion.logprobs)):
            check_rating(named, (*prompt, *completion.token_ids[:i]), token_id, params.logprobs)
        own = [named[token_id].logprob for token_id, named in zip(completion.token_ids, completion.logprobs)]
        assert completion.cumulative_logprob == pytest.approx(sum(own), abs=1e-9)
    if params.prompt_logprobs is None:
        assert output.prompt_logprobs is None
        return
    assert len(output.prompt_logprobs) == len(prompt) and output.prompt_logprobs[0] is None
    for i, named in enumerate(output.prompt_logprobs[1:], start=1):
        check_rating(named, tuple(prompt[:i]), prompt[i], params.prompt_logprobs)


def random_params(rng, some):
    """Return random parameters. Each is in use with probability `some`."""

    def maybe(value, otherwise):
        return value if rng.random() < some else otherwise

    n = maybe(3, 1)
    min_tokens = maybe(rng.randint(1, 4), 0)
    return SamplingParams(
        n=n,
        temperature=maybe(rng.uniform(0.3, 2), 1.0) if n > 1 else maybe(rng.uniform(0.3, 2), rng.choice([0.0, 1.0])),
        seed=rng.randrange(1000),
        top_k=maybe(rng.choice([-1, 1, 5, 50, 500]), 0),
        top_p=maybe(rng.choice([0.5, 0.9]), 1.0),
        min_p=maybe(rng.choice([0.01, 0.1]), 0.0),
        presence_penalty=maybe(rng.uniform(-2, 2), 0.0),
        frequency_penalty=maybe(rng.uniform(-2, 2), 0.0),
        repetition_penalty=maybe(rng.uniform(0.5, 2), 1.0),
        logit_bias=maybe({rng.randrange(VOCABULARY): rng.uniform(-9, 9) for _ in range(9)} | {EOS: 6.0}, None),
        allowed_token_ids=maybe([EOS, *rng.sample(range(VOCABULARY), 100)], None),
        stop_token_ids=maybe(rng.sample(range(VOCABULARY), 15), None),
        ignore_eos=rng.random() < 0.5,
        min_tokens=min_tokens,
        max_tokens=maybe(min_tokens + rng.randint(1, 5), 6),
        logprobs=maybe(rng.choice([0, 1, 5]), None),
        prompt_logprobs=maybe(rng.choice([0, 2]), None),
    )


COMMON = prompt_of(9, seed=5)  # several prompts begin with these tokens
NUM_REQUESTS = 12


@pytest.fixture(scope="module")
def requests():
    rng = random.Random(6)
    prompts = [[*COMMON[: rng.choice([0, 5, 9])], *prompt_of(rng.randint(1, 12), seed=i)] for i in range(NUM_REQUESTS)]
    return [(prompt, random_params(rng, some=(0.3, 0.6, 0.9)[i % 3])) for i, prompt in enumerate(prompts)]


def test_the_requests_of_these_tests_use_every_parameter_and_end_in_every_way(requests):
    ends = [expected(prompt, params, index)[1:] for prompt, params in requests for index in range(params.n)]
    assert {reason for reason, _ in ends} == {"stop", "length"}
    assert ("stop", None) in ends and any(stop is not None for _, stop in ends)
    default = vars(SamplingParams())
    unused = {name for name in default if all(vars(params)[name] == default[name] for _, params in requests)}
    of_text = {"stop", "skip_special_tokens", "include_stop_str_in_output", "structured_outputs"}
    assert unused == of_text | {"priority"}  # which orders the queues only


@pytest.mark.parametrize(
    "sizes",
    [
        dict(),
        dict(TIGHT),
        dict(TIGHT, enable_prefix_caching=False),
        dict(max_num_batched_tokens=1),
        dict(page_size=1, n_pages=97),
    ],
    ids=str,
)
def test_every_parameter_matches_the_oracle_for_every_size(requests, sizes):
    """The requests run twice, in different orders, so that the second run can have many cached tokens.

    Prompt logprobs must be complete in both runs.
    """
    with Inference(own_model("sampling"), None, **{**SIZES, **sizes}) as engine:
        indices = list(range(5 if sizes == dict(max_num_batched_tokens=1) else NUM_REQUESTS))
        for order in (indices, random.Random(1).sample(indices, len(indices))):
            prompts, params = zip(*(requests[i] for i in order))
            outputs = engine.generate(prompts, params, use_tqdm=False)
            for i, output in zip(order, outputs):
                check(output, *requests[i])
                assert not (output.num_cached_tokens and requests[i][1].prompt_logprobs is not None)
            assert_empty(engine)
        if "watermark" in sizes:
            assert engine.stats().num_preemptions > 3
        else:
            assert engine.stats().num_cached_tokens > 0


def test_requests_that_arrive_while_others_run_match_the_oracle(engine, requests):
    ids, outputs = [], {}
    for prompt, params in requests:
        ids.append(engine.add_request(prompt, params))
        outputs |= {output.request_id: output for output in engine.run_one_step()}
        engine.check_invariants()
    outputs |= drain(engine)
    for request_id, request in zip(ids, requests):
        check(outputs[request_id], *request)


@pytest.mark.parametrize("repetition", [1.0, 2.0, 0.5])
def test_penalties_count_output_tokens_and_repetition_penalty_also_prompt_tokens(engine, repetition):
    """The prompt is half of the list of allowed tokens."""
    prompt = prompt_of(9, seed=4)
    allowed = [*prompt, *prompt_of(9, seed=3)]
    params = [
        SamplingParams(
            temperature=0,
            max_tokens=8,
            ignore_eos=True,
            allowed_token_ids=allowed,
            presence_penalty=presence,
            frequency_penalty=frequency,
            repetition_penalty=repetition,
        )
        for presence, frequency in [(0, 0), (2, 0), (-2, 0), (0, 1.5), (0, -1.5), (1, 1)]
    ]
    outputs = engine.generate([prompt] * len(params), params, use_tqdm=False)
    for output, p in zip(outputs, params):
        check(output, prompt, p)


def test_prompt_logprobs_of_a_long_prompt_are_computed_in_parts(engine, monkeypatch):
    monkeypatch.setattr(logprobs, "LOGPROB_ROWS_AT_ONCE", 4)
    prompt, params = prompt_of(21), SamplingParams(temperature=0, prompt_logprobs=3, logprobs=2, max_tokens=3)
    check(engine.generate(prompt, params, use_tqdm=False)[0], prompt, params)


@pytest.mark.parametrize("sizes", [dict(), TIGHT, dict(max_num_batched_tokens=9, n_pages=13)], ids=str)
def test_a_step_computes_a_limited_number_of_logits_of_prompts(monkeypatch, sizes):
    """Requests share the limit. All running sequences advance in each step, and prompt logprobs are complete."""
    monkeypatch.setattr(scheduler, "MAX_PROMPT_LOGITS", 5)
    rated = SamplingParams(temperature=0, prompt_logprobs=1, max_tokens=4)
    lengths = [15, 9, 1, 14, 12, 2, 13, 7]
    requests = [(prompt_of(n, seed=i), greedy(9) if i in (1, 4) else rated) for i, n in enumerate(lengths)]
    counts = []
    with Inference(own_model("limited logits"), None, **{**SIZES, **sizes}) as engine:
        forward = engine.runner.forward

        def watched(chunks):
            assert all(chunk.length > 0 for chunk in chunks)
            assert [chunk.sequence for chunk in chunks] == engine.scheduler.running
            logits = forward(chunks)
            assert len(logits) == sum(chunk.num_logits for chunk in chunks)
            counts.append(len(logits) - len(chunks))
            return logits

        engine.runner.forward = watched
        outputs = engine.generate(*zip(*requests), use_tqdm=False)
        for output, request in zip(outputs, requests):
            check(output, *request)
        assert max(counts) == 5
        assert_empty(engine)


def test_a_prompt_with_prompt_logprobs_is_cached_but_has_no_cache_hit(engine):
    prompt, rated = prompt_of(17, seed=9), SamplingParams(temperature=0, prompt_logprobs=0, max_tokens=1)
    cached = [engine.generate(prompt, p, use_tqdm=False)[0].num_cached_tokens for p in (rated, greedy(1), rated)]
    assert cached == [0, 16, 0]


# --- stopping ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "num_tokens", "reason"),
    [
        (dict(), 1, None),
        (dict(min_tokens=4), 5, None),
        (dict(min_tokens=8), 8, "length"),
        (dict(ignore_eos=True), 8, "length"),
        (dict(ignore_eos=True, min_tokens=4), 8, "length"),
        (dict(stop_token_ids=[EOS]), 1, None),
        (dict(ignore_eos=True, stop_token_ids=[EOS]), 1, EOS),
        (dict(ignore_eos=True, stop_token_ids=[EOS, 5], min_tokens=3), 4, EOS),
        (dict(stop_token_ids=[7], logit_bias={7: 100, EOS: 50}), 1, 7),
        (dict(stop_token_ids=[7], logit_bias={7: 100, EOS: 50}, min_tokens=2), 3, 7),
        (dict(allowed_token_ids=[EOS, 9], min_tokens=2), 3, None),
        (dict(allowed_token_ids=[9]), 8, "length"),
    ],
    ids=str,
)
def test_a_likely_eos_ends_the_output_as_soon_as_it_is_allowed(engine, options, num_tokens, reason):
    params = SamplingParams(**{**dict(temperature=0, max_tokens=8, logit_bias={EOS: 100}), **options})
    prompt = prompt_of(5)
    (output,) = engine.generate(prompt, params, use_tqdm=False)
    assert len(output.outputs[0].token_ids) == num_tokens
    assert output.outputs[0].finish_reason == ("length" if reason == "length" else "stop")
    assert output.outputs[0].stop_reason == (None if reason == "length" else reason)
    check(output, prompt, params)


def test_an_eos_that_the_model_does_not_have_is_ignored(requests):
    """A tokenizer may have added tokens that the model does not have, and a config may contain -1."""
    model = own_model("odd eos")
    model.generation_config.eos_token_id = [EOS, -1, VOCABULARY, 10**6]
    params = SamplingParams(temperature=0, max_tokens=4, min_tokens=2)
    with Inference(model, None, **SIZES) as engine:
        check(engine.generate(prompt_of(5), params, use_tqdm=False)[0], prompt_of(5), params)


def test_a_top_k_of_zero_or_of_at_least_the_vocabulary_keeps_all_tokens(engine):
    params = [SamplingParams(seed=3, max_tokens=4, top_k=top_k) for top_k in (10**400, 0, 211)]
    answers = tokens_of(engine.generate([prompt_of(5)] * 3, params, use_tqdm=False))
    assert answers[0] == answers[1] == answers[2]


# --- numbers that are not finite ---------------------------------------------------------------------------------


@pytest.mark.parametrize("num_good_tokens", [0, 2])
def test_a_failed_request_has_logprobs_of_its_tokens_and_other_requests_have_all(engine, monkeypatch, num_good_tokens):
    forward, prompts = engine.runner.forward, [prompt_of(5), prompt_of(9), prompt_of(2)]

    def spoiled(chunks):
        logits, row = forward(chunks), 0
        for chunk in chunks:
            row += chunk.num_logits
            if chunk.sequence.token_ids[:9] == prompts[1] and chunk.sequence.output_len >= num_good_tokens:
                logits[row - 1].fill_(math.nan)
        return logits

    monkeypatch.setattr(engine.runner, "forward", spoiled)
    params = SamplingParams(seed=1, max_tokens=4, ignore_eos=True, logprobs=2, prompt_logprobs=1, top_k=30)
    first, middle, last = engine.generate(prompts, params, use_tqdm=False)
    check(first, prompts[0], params)
    check(last, prompts[2], params)
    completion = middle.outputs[0]
    assert completion.finish_reason == "error"
    assert completion.token_ids == expected(prompts[1], params)[0][:num_good_tokens]
    assert len(completion.logprobs) == num_good_tokens and math.isfinite(completion.cumulative_logprob)
    assert len(middle.prompt_logprobs) == 9
    assert_empty(engine)


def test_only_the_request_without_a_possible_token_ends_in_error(engine):
    banned = SamplingParams(seed=1, max_tokens=4, min_tokens=2, allowed_token_ids=[EOS, 5], stop_token_ids=[5, 6])
    with pytest.raises(ValueError, match="holds stop tokens only"):
        engine.generate(prompt_of(5), banned, use_tqdm=False)
    params = SamplingParams(seed=1, max_tokens=3, logprobs=0)
    object.__setattr__(params, "repetition_penalty", 5e-324)  # normally rejected: logits become infinite
    outputs = engine.generate([prompt_of(5)] * 2, [params, greedy(3)], use_tqdm=False)
    assert [output.outputs[0].finish_reason for output in outputs] == ["error", "length"]
    assert outputs[0].outputs[0].logprobs == [] and outputs[0].outputs[0].cumulative_logprob == 0


# --- cost --------------------------------------------------------------------------------------------------------


def test_a_step_of_greedy_requests_computes_no_distribution(engine, monkeypatch):
    calls = []
    inverse_cdf = sampler.inverse_cdf
    monkeypatch.setattr(sampler, "inverse_cdf", lambda *arguments: calls.append(1) or inverse_cdf(*arguments))
    plain = SamplingParams(temperature=0, max_tokens=3, top_k=5, top_p=0.5, seed=3, logprobs=2, prompt_logprobs=1)
    engine.generate([prompt_of(5), prompt_of(2)], [plain, greedy(3)], use_tqdm=False)
    assert not calls
    engine.generate([prompt_of(5), prompt_of(2)], [SamplingParams(max_tokens=3), greedy(5)], use_tqdm=False)
    assert len(calls) == 3, "the two steps after the end of the sampled request must not compute a distribution"


TO_THE_HOST = ["tolist", "item", "cpu", "numpy", "__bool__", "__int__", "__float__", "__index__", "nonzero"]


@pytest.mark.parametrize("some", [0.0, 1.0], ids=["plain", "everything"])
def test_a_step_copies_its_results_to_the_host_in_one_transfer(engine, monkeypatch, some):
    """Only results that depend on logits are copied. Other numbers are computed on the host, in numpy."""
    params = random_params(random.Random(3), some) if some else greedy(6)
    engine.generate([prompt_of(5), prompt_of(8)], params, use_tqdm=False)
    for length in (5, 8):
        engine.add_request(prompt_of(length, seed=8), params)
    calls = []

    def counted(name, original):
        return lambda tensor, *args, **kwargs: calls.append(name) or original(tensor, *args, **kwargs)

    with monkeypatch.context() as patch:
        for name in TO_THE_HOST:
            patch.setattr(torch.Tensor, name, counted(name, getattr(torch.Tensor, name)))
        for _ in range(3):
            calls.clear()
            engine.run_one_step()
            assert calls in (["tolist"], ["cpu", "numpy"])
    drain(engine)
