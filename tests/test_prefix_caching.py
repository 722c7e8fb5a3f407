"""Requests with a common prefix share its computed pages, and their tokens do not change."""

import random

import pytest
from engines import (
    SIZES,
    TIGHT,
    drain,
    greedy,
    make_sequence,
    own_model,
    prompt_of,
    raise_at_call,
    samples_of,
    tokens_of,
)
from tiny_models import WINDOW, hf_generate, tiny_model

from flex_nano_vllm import Inference, SamplingParams, prefix_cache
from flex_nano_vllm.attention import PagedKVCache
from flex_nano_vllm.geometry import Geometry
from flex_nano_vllm.invariants import check_scheduler
from flex_nano_vllm.kv_manager import KVManager
from flex_nano_vllm.prefix_cache import PrefixCache
from flex_nano_vllm.scheduler import Scheduler

PAGE = SIZES["page_size"]


@pytest.fixture
def engine():
    with Inference(own_model("prefix caching"), None, **SIZES) as engine:
        yield engine
        engine.check_invariants()


def cached(outputs):
    return [output.num_cached_tokens for output in outputs]


def generate(engine, *prompts, max_tokens=3, **options):
    return engine.generate(list(prompts), greedy(max_tokens), use_tqdm=False, **options)


def expected(prompt, max_tokens=3):
    return hf_generate(tiny_model("gemma2"), prompt, max_tokens, ignore_eos=True)


# ---- cache hits ----


@pytest.mark.parametrize("length", [1, 3, 4, 5, 8, 9, 13])
def test_a_repeated_prompt_hits_all_full_pages_before_its_last_token(engine, length):
    prompt = prompt_of(length)
    first, again = generate(engine, prompt), generate(engine, prompt)
    assert cached(first) == [0] and cached(again) == [(length - 1) // PAGE * PAGE]
    assert tokens_of(first) == tokens_of(again) == [expected(prompt)]
    assert engine.stats().num_computed_tokens == 2 * (length + 2) - cached(again)[0]


def test_generated_tokens_are_cached_too(engine):
    """As in a chat, each prompt extends the previous prompt and its output."""
    prompt, computed = prompt_of(6), 0
    for turn in range(3):
        (output,) = generate(engine, prompt, max_tokens=4)
        known = max(0, len(prompt) - 3) // PAGE * PAGE if turn else 0  # the last token of an output is never computed
        assert output.num_cached_tokens == known
        computed += len(prompt) - known + 3
        assert engine.stats().num_computed_tokens == computed
        prompt = prompt + output.outputs[0].token_ids + prompt_of(2, seed=turn)


def test_only_the_common_prefix_of_prompts_is_shared(engine):
    common, tails = prompt_of(9), [prompt_of(5, seed) for seed in range(3)]
    generate(engine, common + tails[0])
    outputs = generate(engine, common + tails[1], common[:8] + tails[2], common[:7] + tails[2], tails[2] + common)
    assert cached(outputs) == [8, 8, 4, 0]
    assert tokens_of(outputs)[:2] == [expected(common + tails[1]), expected(common[:8] + tails[2])]


def test_identical_prompts_wait_one_step_for_the_pages_that_the_first_one_computes():
    with Inference(own_model("prefix caching"), None, **dict(SIZES, max_num_batched_tokens=64)) as engine:
        prompt = prompt_of(13)
        ids = [engine.add_request(prompt, greedy(3)) for _ in range(3)]
        engine.run_one_step()
        assert engine.stats().num_computed_tokens == 13 and engine.stats().num_waiting == 2
        engine.run_one_step()
        assert engine.stats().num_computed_tokens == 13 + 1 + 1 + 1, "both other prompts start in the second step"
        assert engine.stats().num_used_pages == 4 + 1 + 1
        outputs = drain(engine)
        assert [outputs[i].num_cached_tokens for i in ids] == [0, 12, 12]
        assert tokens_of(outputs.values()) == [expected(prompt)] * 3


def scheduler_of(*prompts, n_pages=100, budget=64):
    """Return a scheduler with pages of four tokens, and sequences of six new tokens for the prompts. No model."""
    scheduler = Scheduler(KVManager(Geometry(n_pages, 4, 8, 96, budget)), budget, 0)
    for i, prompt in enumerate(prompts):
        scheduler.add(make_sequence(prompt, i, len(prompt) + 6))
    return scheduler


def starts(chunks):
    return {chunk.sequence.request_id: chunk.start for chunk in chunks}


def commit(scheduler, chunks, tokens=None):
    scheduler.commit(chunks, samples_of(tokens or [100 + chunk.start for chunk in chunks]))
    check_scheduler(scheduler)


def test_a_waiting_request_holds_up_those_behind_it_for_one_step():
    scheduler = scheduler_of(prompt_of(13), prompt_of(13), prompt_of(5, seed=1))
    first = scheduler.schedule()
    assert starts(first) == {0: 0}
    commit(scheduler, first)
    assert starts(scheduler.schedule()) == {0: 13, 1: 12, 2: 0}


def test_a_request_whose_next_page_no_chunk_computes_does_not_wait():
    """The first prompt ends before its second page is full. Another prompt has another second page."""
    scheduler = scheduler_of(prompt_of(13)[:7], prompt_of(13), prompt_of(13)[:4] + prompt_of(9, seed=1))
    commit(scheduler, scheduler.schedule())  # the first page of all three
    assert starts(scheduler.schedule()) == {0: 7, 1: 4, 2: 4}
    other = scheduler_of(prompt_of(13)[:3], prompt_of(13)[:4], prompt_of(13)[:4])
    assert starts(other.schedule()) == {0: 0, 1: 0, 2: 0}, "the last token of a prompt is never a cache hit"


def test_a_request_waits_for_a_page_that_a_decode_fills():
    scheduler = scheduler_of(prompt_of(6))
    for token in (8, 9):
        commit(scheduler, scheduler.schedule(), [token])
    longer = [*prompt_of(6), 8, 9, 5, 5]
    scheduler.add(make_sequence(longer, 1, 20))
    filling = scheduler.schedule()
    assert starts(filling) == {0: 7}
    commit(scheduler, filling)
    assert starts(scheduler.schedule()) == {0: 8, 1: 8}


def test_a_request_computes_the_pages_itself_if_the_request_that_it_waits_for_ends():
    prompt = prompt_of(13)
    aborted, failed, preempted = (scheduler_of(prompt, prompt) for _ in range(3))
    commit(failed, failed.schedule(), [-1])
    assert starts(failed.schedule()) == {1: 0}, "pages of a failed sequence are never shared"
    aborted.schedule()  # then the forward pass raises
    aborted.abort(0)
    assert starts(aborted.schedule()) == {1: 0}
    preempted.schedule()
    preempted.preempt_last()
    assert starts(preempted.schedule()) == {0: 0}


def test_a_failed_step_is_scheduled_again_with_the_same_chunks_and_its_pages_are_shared_after_it():
    scheduler = scheduler_of(prompt_of(13), prompt_of(13))
    first = scheduler.schedule()  # then the forward pass raises
    again = scheduler.schedule()
    assert first == again and starts(again) == {0: 0}
    check_scheduler(scheduler)
    commit(scheduler, again)
    assert starts(scheduler.schedule()) == {0: 13, 1: 12}


def test_stats_contains_the_cache_hit_rate(engine):
    generate(engine, prompt_of(13))
    generate(engine, prompt_of(13))
    stats = engine.stats()
    assert (stats.num_prompt_tokens, stats.num_cached_tokens, stats.cache_hit_rate) == (26, 12, 12 / 26)
    assert stats.num_used_pages == 0 and stats.num_evictable_pages == 3
    assert stats.num_free_pages == engine.page_table.num_usable_pages


# ---- no cache hits ----


def test_without_prefix_caching_there_are_no_cache_hits():
    with Inference(own_model("prefix caching"), None, **SIZES, enable_prefix_caching=False) as engine:
        assert cached(generate(engine, prompt_of(13), prompt_of(13))) == [0, 0]
        assert cached(generate(engine, prompt_of(13))) == [0]
        assert engine.stats().num_evictable_pages == 0


def test_only_requests_with_equal_salts_share_pages(engine):
    prompt = prompt_of(13)
    assert cached(generate(engine, prompt, cache_salt="a")) == [0]
    assert cached(generate(engine, prompt)) == [0]
    assert cached(generate(engine, prompt, cache_salt="b")) == [0]
    assert cached(generate(engine, prompt, cache_salt="a")) == [12]
    assert cached(generate(engine, prompt)) == [12]


@pytest.mark.parametrize("salt", ["", 1, b"a"])
def test_a_salt_must_be_a_non_empty_string(engine, salt):
    with pytest.raises(ValueError, match="cache_salt"):
        generate(engine, prompt_of(3), cache_salt=salt)


def test_different_texts_with_equal_keys_are_never_confused(engine, monkeypatch):
    """All pages have one key: pages with other tokens, with equal tokens at other positions, and with other salts."""
    monkeypatch.setattr(prefix_cache, "chained_key", lambda parent_key, token_ids: b"forged")
    page = prompt_of(PAGE)
    twice, other = page * 3 + [5], [*prompt_of(2 * PAGE, seed=1), 5]
    for prompt, known in ((twice, 0), (twice, PAGE), (other, 0), (twice, PAGE), (other, 0), (page + other, PAGE)):
        outputs = generate(engine, prompt)
        assert cached(outputs) == [known], "only the entry that got the key first is found"
        assert tokens_of(outputs) == [expected(prompt)]
    assert cached(generate(engine, twice, cache_salt="a")) == [0]


def test_a_key_depends_on_all_previous_tokens_and_on_the_salt():
    cache = PrefixCache(page_size=2)
    root, salted = cache.root(None), cache.root("a")
    a = cache.add(root, [1, 2])
    entries = [a, cache.add(a, [1, 2]), cache.add(root, [2, 1]), cache.add(salted, [1, 2])]
    assert len({entry.key for entry in entries}) == 4 and all(len(entry.key) == 32 for entry in entries)
    assert cache.add(root, [1, 2]) is a
    assert cache.find([1, 2, 1, 2, 1, 2], root) == entries[:2]
    assert cache.find([1, 2, 1], salted) == [entries[3]]


def test_an_entry_without_references_is_removed():
    cache = PrefixCache(page_size=1)
    root = cache.root(None)
    leaf = cache.add(cache.add(root, [1]), [2])
    assert cache.find([1, 2, 3], root) == [leaf.parent, leaf]
    del leaf
    assert cache.find([1, 2, 3], root) == []


def test_reset_prefix_cache_empties_the_cache_and_raises_while_requests_are_unfinished(engine):
    generate(engine, prompt_of(13))
    engine.reset_prefix_cache()
    assert cached(generate(engine, prompt_of(13))) == [0]
    engine.add_request(prompt_of(13), greedy(3))
    engine.run_one_step()
    with pytest.raises(RuntimeError, match="unfinished requests"):
        engine.reset_prefix_cache()
    drain(engine)


def test_the_hit_rate_counts_the_prompt_of_several_samples_once():
    with Inference(own_model("prefix caching"), None, **SIZES, enable_prefix_caching=False) as engine:
        engine.generate(prompt_of(13), SamplingParams(n=3, seed=0, max_tokens=2, ignore_eos=True), use_tqdm=False)
        assert (engine.stats().num_prompt_tokens, engine.stats().num_cached_tokens) == (13, 0)


@pytest.mark.parametrize("every", [4, 8])  # one of `every` requests has the common prefix; there are eight rows
def test_a_common_prefix_stays_cached_while_other_requests_run(every):
    """Pages in the last window of the prefix are kept after a request has needed them once.

    Layers with a window soon release these pages, and their pool is small.
    """
    rng = random.Random(0)
    geometry = Geometry(1 + 8 * 64, 16, 8, 1024, 128, (64, None))
    scheduler = Scheduler(KVManager(geometry), 128, 32)
    common, sequences = [rng.randrange(1000) for _ in range(256)], []
    for i in range(8 * every):
        own = [rng.randrange(1000) for _ in range(16 if i % every == 0 else 272)]
        prompt = common + own if i % every == 0 else own
        max_total = len(prompt) + rng.randint(30, 90)
        sequences.append(make_sequence(prompt, i, max_total))
        scheduler.add(sequences[-1])
    while scheduler.has_unfinished_requests():
        chunks = scheduler.schedule()
        scheduler.commit(chunks, samples_of(rng.randrange(1000) for _ in chunks))
    assert sum(geometry.pools.values()) < 1.5 * geometry.n_pages
    assert [sequence.num_cached_tokens for sequence in sequences[::every]][2:] == [256] * 6


# ---- sharing changes no tokens ----


def test_pages_are_evicted_only_if_needed_and_the_longest_evictable_pages_first():
    with Inference(own_model("prefix caching"), None, **dict(SIZES, n_pages=9, enable_window_release=False)) as engine:
        old, young = prompt_of(13), prompt_of(13, seed=1)
        generate(engine, old)  # 13 + 2 tokens: three full pages
        generate(engine, young)
        assert engine.stats().num_evictable_pages == 6
        generate(engine, prompt_of(16, seed=2))  # needs five pages, and two are free
        assert cached(generate(engine, young)) == [12]
        assert cached(generate(engine, old)) == [0]


@pytest.mark.parametrize("options", [{}, dict(enable_window_release=False), dict(enable_prefix_caching=False)], ids=str)
@pytest.mark.parametrize("seed", range(4))
def test_tokens_equal_hugging_face_with_sharing_eviction_and_preemption(seed, options):
    rng = random.Random(seed)
    with Inference(own_model("prefix caching"), None, **{**TIGHT, "n_pages": 9, **options}) as engine:
        texts = [prompt_of(4, seed)]
        for _ in range(4):
            prompts = []
            for _ in range(rng.randint(1, 4)):
                text = rng.choice(texts)
                prompts.append(
                    (text[: rng.randint(0, len(text))] + prompt_of(rng.randint(1, 6), rng.randrange(9)))[:20]
                )
            prompts.append(rng.choice(prompts))
            outputs = generate(engine, *prompts, max_tokens=5)
            assert tokens_of(outputs) == [expected(prompt, 5) for prompt in prompts]
            texts += [output.prompt_token_ids + output.outputs[0].token_ids for output in outputs]
            engine.check_invariants()
        assert engine.stats().num_preemptions > 0
        assert (engine.stats().num_cached_tokens > 0) == engine.kv.prefix_caching


def test_a_preempted_request_hits_its_own_cached_pages():
    computed = {}
    for caching in (False, True):
        with Inference(own_model("prefix caching"), None, **TIGHT, enable_prefix_caching=caching) as engine:
            prompts = [prompt_of(9, seed) for seed in range(4)]
            outputs = generate(engine, *prompts, max_tokens=8)
            assert tokens_of(outputs) == [expected(prompt, 8) for prompt in prompts]
            assert engine.stats().num_preemptions > 0
            computed[caching] = engine.stats().num_computed_tokens
    assert computed[True] < computed[False]


def test_pages_that_a_failed_step_did_not_compute_are_never_read(monkeypatch):
    """The first of three equal prompts is computed in a step that fails. Then this request is aborted."""
    with Inference(own_model("prefix caching"), None, **dict(SIZES, max_num_batched_tokens=64)) as engine:
        prompt = prompt_of(13)
        ids = [engine.add_request(prompt, greedy(3)) for _ in range(3)]
        with monkeypatch.context() as context:
            raise_at_call(context, PagedKVCache, "attend", 1, OSError)
            with pytest.raises(OSError):
                engine.run_one_step()
        engine.abort(ids[0])
        engine.check_invariants()
        outputs = drain(engine)
        assert tokens_of(outputs.values()) == [expected(prompt)] * 2


def test_a_prompt_longer_than_the_window_hits_the_cache(engine):
    """Layers with a window hold only the last window of a prefix, which is enough for a cache hit."""
    length = WINDOW + 3 * PAGE + 1
    prompt = prompt_of(length)[:28]
    first = generate(engine, prompt)
    again = generate(engine, prompt)
    assert cached(again) == [(len(prompt) - 1) // PAGE * PAGE]
    assert tokens_of(first) == tokens_of(again) == [expected(prompt)]
