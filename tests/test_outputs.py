"""Outputs of an engine: stop conditions, order, seeds and counts.

The oracle of greedy tokens is Hugging Face's `generate`. The oracle of drawn tokens is a sum over Hugging Face's logits
in plain Python.
"""

import pytest
import torch
from engines import (
    PROMPTS,
    SIZES,
    TIGHT,
    assert_empty,
    byte_model,
    drain,
    greedy,
    inverse_cdf,
    own_model,
    prompt_of,
    tokens_of,
)
from tiny_models import hf_generate, tiny_model

from benchmarks.random_models import byte_tokenizer
from flex_nano_vllm import Inference, SamplingParams
from flex_nano_vllm.outputs import RequestMetrics
from flex_nano_vllm.sampler import uniform

# --- stopping ----------------------------------------------------------------------------------------------------


STOP_PROMPT = "hello"


@pytest.fixture
def words():
    """Return a model, its tokens after STOP_PROMPT, and the index of a token that does not occur before that index."""
    model = byte_model()
    tokens = hf_generate(model, byte_tokenizer()(STOP_PROMPT).input_ids, 12, ignore_eos=True)
    stop_at = next(i for i in range(3, 12) if tokens[i] not in tokens[:i] and tokens[i] > 2)
    return model, tokens, stop_at


def say(engine, **parameters):
    params = SamplingParams(temperature=0, max_tokens=12, **parameters)
    return engine.generate(STOP_PROMPT, params, use_tqdm=False)[0].outputs[0]


@pytest.mark.parametrize(
    "source", ["generation_config", "generation_config list", "config", "config list", "tokenizer"]
)
def test_an_eos_token_of_every_source_stops_and_is_not_in_the_text(words, source):
    model, tokens, stop_at = words
    eos, tokenizer = tokens[stop_at], byte_tokenizer()
    model.generation_config.eos_token_id = model.config.eos_token_id = None
    if source.startswith("generation_config"):
        model.generation_config.eos_token_id = [1, eos] if "list" in source else eos
    elif source.startswith("config"):
        model.config.eos_token_id = [1, eos] if "list" in source else eos
    else:
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(eos)
    with Inference(model, tokenizer, **SIZES) as engine:
        stopped = say(engine)
        assert stopped.finish_reason == "stop"
        assert stopped.token_ids == tokens[: stop_at + 1]
        assert stopped.text == byte_tokenizer().decode(tokens[:stop_at], skip_special_tokens=True)
        assert_empty(engine)

        ignored = say(engine, ignore_eos=True)
        assert (ignored.token_ids, ignored.finish_reason) == (tokens, "length")


def test_the_eos_tokens_of_all_sources_are_combined(words):
    model, _, _ = words
    tokenizer = byte_tokenizer()
    model.generation_config.eos_token_id, model.config.eos_token_id = [10, 11], 12
    with Inference(model, tokenizer, **SIZES) as engine:
        assert engine.input_processor.eos_token_ids == {10, 11, 12, tokenizer.eos_token_id}


def test_a_model_without_eos_stops_at_max_tokens(words):
    model, tokens, _ = words
    model.generation_config.eos_token_id = model.config.eos_token_id = None
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = None
    with Inference(model, tokenizer, **SIZES) as engine:
        assert engine.input_processor.eos_token_ids == frozenset()
        assert (say(engine).token_ids, say(engine).finish_reason) == (tokens, "length")


def test_an_eos_as_the_last_allowed_token_finishes_with_stop(words):
    model, tokens, stop_at = words
    model.generation_config.eos_token_id = tokens[stop_at]
    with Inference(model, None, **SIZES) as engine:
        params = SamplingParams(temperature=0, max_tokens=stop_at + 1)
        (output,) = engine.generate([byte_tokenizer()(STOP_PROMPT).input_ids], params, use_tqdm=False)
        assert (output.outputs[0].token_ids, output.outputs[0].finish_reason) == (tokens[: stop_at + 1], "stop")
        assert output.outputs[0].text is None


def test_an_eos_in_the_prompt_does_not_stop_the_output(words):
    model, tokens, _ = words
    prompt = byte_tokenizer()(STOP_PROMPT).input_ids
    model.generation_config.eos_token_id = prompt
    first = next((i for i, token in enumerate(tokens) if token in prompt), 11)
    with Inference(model, None, **SIZES) as engine:
        params = SamplingParams(temperature=0, max_tokens=12)
        assert tokens_of(engine.generate([prompt], params, use_tqdm=False)) == [tokens[: first + 1]]


# --- order -------------------------------------------------------------------------------------------------------


def test_outputs_are_in_prompt_order_and_their_tokens_do_not_depend_on_it(engine):
    prompts = [prompt_of(n) for n in (20, 1, 7, 3, 12)]
    lengths = [1, 9, 2, 6, 4]
    oracle = [hf_generate(tiny_model("gemma2"), p, n, ignore_eos=True) for p, n in zip(prompts, lengths)]
    for order in ([0, 1, 2, 3, 4], [4, 3, 2, 1, 0], [1, 4, 0, 3, 2]):
        params = [greedy(lengths[i]) for i in order]
        outputs = engine.generate([prompts[i] for i in order], params, use_tqdm=False)
        assert [output.prompt_token_ids for output in outputs] == [prompts[i] for i in order]
        assert tokens_of(outputs) == [oracle[i] for i in order]
        ids = [output.request_id for output in outputs]
        assert ids == sorted(set(ids))


def test_requests_may_arrive_while_others_run(engine, expected):
    ids = []
    for prompt in PROMPTS:
        ids.append(engine.add_request(prompt, greedy(8)))
        engine.run_one_step()
        engine.run_one_step()
        engine.check_invariants()
    outputs = drain(engine)
    assert tokens_of(outputs[request_id] for request_id in ids) == expected


def test_equal_prompts_are_separate_requests(engine, expected):
    outputs = engine.generate([PROMPTS[0]] * 3, greedy(8), use_tqdm=False)
    assert tokens_of(outputs) == [expected[0]] * 3


# --- seeds -------------------------------------------------------------------------------------------------------


def drawn(seed, temperature=1.0, max_tokens=8):
    return SamplingParams(temperature=temperature, seed=seed, max_tokens=max_tokens, ignore_eos=True)


@pytest.fixture(scope="module")
def drawn_alone(expected):
    """Return eight tokens after PROMPTS[0] at temperature 1 with seed 7, drawn from Hugging Face's logits."""
    tokens = list(PROMPTS[0])
    with torch.no_grad():
        for position in range(len(tokens), len(tokens) + 8):
            logits = tiny_model("gemma2")(torch.tensor([tokens])).logits[0, -1].tolist()
            token, distance = inverse_cdf(logits, 1.0, uniform(7, position))
            assert distance > 1e-9, "u is too close to a boundary between tokens: choose another seed"
            tokens.append(token)
    return tokens[len(PROMPTS[0]) :]


def test_a_seed_draws_from_the_distribution_of_the_model(engine, drawn_alone):
    assert tokens_of(engine.generate([PROMPTS[0]], drawn(7), use_tqdm=False)) == [drawn_alone]


@pytest.mark.parametrize("position", [0, 1, 2])
def test_a_seed_gives_the_same_tokens_in_a_batch_with_other_requests(engine, drawn_alone, position):
    prompts = [prompt_of(9, seed=1), prompt_of(2, seed=1)]
    params = [drawn(7, max_tokens=5), drawn(None)]
    prompts.insert(position, PROMPTS[0])
    params.insert(position, drawn(7))
    assert engine.generate(prompts, params, use_tqdm=False)[position].outputs[0].token_ids == drawn_alone


@pytest.mark.parametrize(
    "sizes",
    [
        dict(page_size=1, n_pages=97),
        dict(page_size=7),
        dict(page_size=32, n_pages=4),
        dict(max_num_batched_tokens=3),
        dict(max_batch_size=1),
    ],
    ids=str,
)
def test_a_seed_gives_the_same_tokens_for_any_page_size_and_budget(drawn_alone, sizes):
    with Inference(own_model("seeds"), None, **{**SIZES, **sizes}) as engine:
        outputs = engine.generate([prompt_of(3, seed=2), PROMPTS[0]], drawn(7), use_tqdm=False)
        assert outputs[1].outputs[0].token_ids == drawn_alone


def test_a_seed_gives_the_same_tokens_under_preemption(drawn_alone):
    with Inference(own_model("seeds"), None, **{**SIZES, "n_pages": 6, "watermark": 0}) as engine:
        prompts = [prompt_of(4, seed=1), PROMPTS[0], prompt_of(3, seed=1)]
        outputs = engine.generate(prompts, drawn(7), use_tqdm=False)
        assert outputs[1].metrics.num_preemptions > 0
        assert outputs[1].outputs[0].token_ids == drawn_alone
        assert_empty(engine)


def test_different_seeds_give_different_tokens(engine):
    prompts = [PROMPTS[0]] * 6
    params = [drawn(seed) for seed in (0, 1, 2, 2**63 - 1, None, None)]
    answers = tokens_of(engine.generate(prompts, params, use_tqdm=False))
    assert len({tuple(tokens) for tokens in answers}) == 6


def test_each_request_has_its_own_temperature(engine, expected):
    params = [greedy(4), drawn(5, temperature=0.3, max_tokens=4), drawn(5, temperature=2.0, max_tokens=4)]
    alone = [engine.generate([PROMPTS[0]], p, use_tqdm=False)[0].outputs[0].token_ids for p in params]
    together = tokens_of(engine.generate([PROMPTS[0]] * 3, params, use_tqdm=False))
    assert together == alone
    assert together[0] == expected[0][:4]
    assert together[1] != together[2]


# --- counts ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def recorded():
    """Return engine and outputs of a run with chunked prompts and preemptions, with all steps recorded."""
    sizes = {**TIGHT, "record_steps": True}
    with Inference(own_model("recorded"), None, **sizes) as engine:
        prompts = [prompt_of(n) for n in (8, 3, 11, 2)]
        outputs = engine.generate(prompts, [greedy(n) for n in (6, 3, 5, 7)], use_tqdm=False)
        yield engine, outputs


def test_the_recorded_run_preempts(recorded):
    engine, _ = recorded
    assert engine.stats().num_preemptions > 0


def test_the_tokens_of_all_steps_add_up_to_the_computed_tokens(recorded):
    engine, outputs = recorded
    stats = engine.stats()
    steps = engine.steps
    assert [step.step for step in steps] == list(range(1, stats.num_steps + 1))
    assert sum(step.num_prefill_tokens + step.num_decode_tokens for step in steps) == stats.num_computed_tokens
    # Every token of a request except the last is computed at least once, and some again after a preemption.
    assert stats.num_computed_tokens > sum(
        len(output.prompt_token_ids) + len(output.outputs[0].token_ids) - 1 for output in outputs
    )
    assert all(
        0 < step.num_prefill_tokens + step.num_decode_tokens <= engine.scheduler.max_num_batched_tokens
        for step in steps
    )


def test_the_counts_of_generated_tokens_and_finished_requests_match_the_outputs(recorded):
    engine, outputs = recorded
    assert engine.stats().num_generated_tokens == sum(len(tokens) for tokens in tokens_of(outputs))
    assert engine.stats().num_finished_requests == len(outputs)


def test_the_count_of_preemptions_matches_the_requests(recorded):
    engine, outputs = recorded
    preemptions = engine.stats().num_preemptions
    assert preemptions == sum(output.metrics.num_preemptions for output in outputs)
    counts = [step.num_preemptions for step in engine.steps]
    assert counts == sorted(counts) and counts[-1] == preemptions


def test_used_pages_never_exceed_the_pool_and_all_pages_are_free_at_the_end(recorded):
    engine, _ = recorded
    usable = engine.page_table.num_usable_pages
    for step in engine.steps:
        assert 0 <= step.num_used_pages <= usable
        assert step.kv_usage == step.num_used_pages / usable
        assert 0 <= step.num_running <= engine.page_table.max_batch_size
        assert step.num_running + step.num_waiting <= 4
    last = engine.steps[-1]
    assert (last.num_running, last.num_waiting, last.num_used_pages, last.kv_usage) == (0, 0, 0, 0.0)
    assert_empty(engine)


def test_the_times_of_a_request_are_in_order(recorded):
    _, outputs = recorded
    for output in outputs:
        times = output.metrics
        assert times.arrival_time <= times.first_scheduled_time <= times.first_token_time <= times.finished_time
        assert times.ttft >= 0 and times.tpot(len(output.outputs[0].token_ids)) >= 0


def test_prompt_tokens_are_prefilled_once_without_preemption_and_other_tokens_are_decodes():
    with Inference(own_model("counted"), None, **{**SIZES, "record_steps": True}) as engine:
        engine.generate([prompt_of(8), prompt_of(5)], [greedy(4), greedy(3)], use_tqdm=False)
        assert sum(step.num_prefill_tokens for step in engine.steps) == 8 + 5
        assert sum(step.num_decode_tokens for step in engine.steps) == (4 - 1) + (3 - 1)


@pytest.mark.parametrize("length", [1, 9], ids=["a prompt of one token", "a last chunk of one token"])
def test_a_chunk_of_one_prompt_token_counts_as_prefill(length):
    with Inference(
        own_model("counted"), None, **{**SIZES, "max_num_batched_tokens": 4, "record_steps": True}
    ) as engine:
        engine.generate([prompt_of(length)], greedy(3), use_tqdm=False)
        assert sum(step.num_prefill_tokens for step in engine.steps) == length
        assert sum(step.num_decode_tokens for step in engine.steps) == 3 - 1


def test_steps_are_recorded_only_on_request_and_always_counted(engine):
    before = engine.stats().num_steps
    engine.generate([PROMPTS[0]], greedy(3), use_tqdm=False)
    assert engine.steps == []
    assert engine.stats().num_steps == before + 3


def test_stats_are_displayed_as_an_html_table(engine):
    html = engine.stats()._repr_html_()
    assert html.startswith("<table>") and "num_free_pages" in html


def test_ttft_counts_from_arrival_and_tpot_from_the_first_token():
    metrics = RequestMetrics(arrival_time=10.0, first_scheduled_time=12.0, first_token_time=13.0, finished_time=18.0)
    assert metrics.ttft == 3.0
    assert metrics.tpot(num_output_tokens=6) == 1.0
    assert metrics.tpot(num_output_tokens=1) is None
    assert RequestMetrics(arrival_time=10.0).ttft is None


def test_only_sampled_requests_without_a_seed_use_torchs_generator(engine):
    def state_after(params):
        torch.manual_seed(0)
        engine.generate([PROMPTS[0]], params, use_tqdm=False)
        return torch.get_rng_state()

    torch.manual_seed(0)
    untouched = torch.get_rng_state()
    assert torch.equal(state_after(greedy(1)), untouched)
    assert torch.equal(state_after(SamplingParams(seed=5, max_tokens=1)), untouched)
    assert not torch.equal(state_after(SamplingParams(max_tokens=1)), untouched)
