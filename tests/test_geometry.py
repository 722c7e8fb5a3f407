"""Sizes of pools and requests: secondary pools have enough pages for every workload, and few for small windows."""

import itertools
import random

import pytest
from engines import SIZES, drain, greedy, make_sequence, own_model, prompt_of, samples_of
from tiny_models import WINDOW

from flex_nano_vllm import Inference
from flex_nano_vllm.geometry import Geometry
from flex_nano_vllm.invariants import check_scheduler
from flex_nano_vllm.kv_manager import KVManager
from flex_nano_vllm.memory import pages_held
from flex_nano_vllm.scheduler import Scheduler


def geometry(n_pages=100, page_size=4, rows=3, max_seq_length=64, budget=8, windows=(None, 6), release=True):
    return Geometry(n_pages, page_size, rows, max_seq_length, budget, windows, release)


def test_each_window_has_a_pool_and_the_widest_window_has_the_primary_pool():
    assert list(geometry(windows=(6, None, 9, None)).pools) == [None, 9, 6]
    assert list(geometry(windows=(6, 9)).pools) == [9, 6]
    assert geometry(windows=(6, None)).pools[None] == 100
    assert geometry(windows=(6, None), release=False).pools == {None: 100}
    assert geometry(windows=(6, 9), release=False).pools == {None: 100}


def test_a_window_is_none_if_no_row_is_longer_than_the_window():
    assert geometry(max_seq_length=64, windows=(63, 64, 65, None)).layer_windows == (63, None, None, None)
    assert geometry(n_pages=5, windows=(15, 16, None)).layer_windows == (15, None, None)  # rows of 16 tokens


def test_rows_can_be_longer_than_the_pool_only_if_all_layers_release_pages():
    sizes = dict(n_pages=8, page_size=4, max_seq_length=64, budget=8)
    assert geometry(**sizes, windows=(None, 6)).max_request_tokens == 28
    assert geometry(**sizes, windows=(6,), release=False).max_request_tokens == 28
    assert geometry(**sizes, windows=(6,)).max_request_tokens == 64
    assert geometry(**sizes, windows=(20,)).max_request_tokens == 28  # tokens seen and computed in a step need 8 pages


@pytest.mark.parametrize("windows", [(None, 3), (None, 7, 2), (5,), (9, 4)])
@pytest.mark.parametrize(("page_size", "rows", "budget"), [(1, 3, 4), (4, 3, 6), (4, 1, 1), (3, 4, 20)])
def test_secondary_pools_never_run_out_and_no_row_holds_more_pages_than_predicted(windows, page_size, rows, budget):
    """Run requests of random lengths. `KVManager.reserve` asserts that no secondary pool runs out."""
    sizes = Geometry(40, page_size, rows, 30, budget, windows)
    scheduler = Scheduler(KVManager(sizes), budget, watermark=0)
    rng, most = random.Random(0), 0
    for request_id in range(30):
        length = rng.randint(1, min(29, sizes.max_request_tokens - 1))
        tokens = [rng.randrange(3) for _ in range(length)]
        total = rng.randint(length + 1, sizes.max_request_tokens)
        scheduler.add(make_sequence(tokens, request_id, total))
    while scheduler.has_unfinished_requests():
        chunks = scheduler.schedule()
        for sequence in scheduler.running:
            held = scheduler.kv.primary.num_pages(sequence.row)
            assert held <= sizes.most_pages(sequence.num_tokens)
            most = max(most, held)
        scheduler.commit(chunks, samples_of(rng.randrange(3) for _ in chunks))
        check_scheduler(scheduler)
        for window, sequence in itertools.product(sizes.layer_windows, scheduler.running):
            table = scheduler.kv.table(window)
            assert table.num_pages(sequence.row) <= pages_held(sizes, window, sequence.num_computed_tokens)
    assert most > 1


@pytest.mark.parametrize("release", [True, False])
def test_a_plan_has_the_pages_and_bytes_that_a_request_holds_at_its_end(release):
    with Inference(own_model("planned"), None, **SIZES, enable_window_release=release) as engine:
        plan = engine.plan(20, 8)
        caches = [layer.self_attn.kv_cache for layer in engine.model.get_decoder().layers]
        for kind in plan.kinds:
            mine = [cache for cache in caches if engine.runner.layout.masks[cache.mask].window == kind.window]
            assert kind.num_layers == len(mine)
            slots = mine[0].k_cache.shape[2]
            assert kind.bytes_per_token == sum(cache.k_cache.nbytes + cache.v_cache.nbytes for cache in mine) / slots
            assert kind.pool_pages == slots // engine.page_table.page_size - 1
            assert kind.request_bytes == kind.request_pages * 4 * kind.bytes_per_token
        pages = {kind.window: kind.request_pages for kind in plan.kinds}
        assert pages == {None: 7, WINDOW: 7 - (28 - 1 - WINDOW) // 4 if release else 7}
        engine.add_request(prompt_of(20), greedy(9))  # the last of these tokens is never computed
        while (sequence := (engine.scheduler.running or engine.scheduler.waiting)[0]).num_computed_tokens < 27:
            engine.run_one_step()
        assert {window: engine.kv.table(window).num_pages(sequence.row) for window in pages} == pages
        drain(engine)
        assert plan.refusal is None and plan.num_new_tokens == 8
        assert plan.max_concurrent == 3
        assert "7 of 24 pages" in str(plan) and "3 requests at once" in str(plan)


def test_as_many_requests_run_at_once_as_the_plan_predicts():
    with Inference(own_model("planned"), None, **dict(SIZES, n_pages=13, watermark=32)) as engine:
        assert engine.plan(9, 12).max_concurrent == 2
        for seed in range(3):
            engine.add_request(prompt_of(9, seed), greedy(12))
        most = 0
        while engine.has_unfinished_requests():
            engine.run_one_step()
            most = max(most, engine.stats().num_running)
        assert most == 2 and engine.stats().num_preemptions == 0


def test_a_plan_has_at_most_as_many_concurrent_requests_as_a_step_has_tokens():
    with Inference(own_model("planned"), None, **dict(SIZES, max_num_batched_tokens=2)) as engine:
        assert engine.plan(4, 4).max_concurrent == 2


def test_a_plan_of_a_request_that_would_be_rejected_has_the_error_message():
    with Inference(own_model("planned"), None, **SIZES) as engine:
        plan = engine.plan(32, 1)
        assert plan.max_concurrent == plan.num_new_tokens == 0
        with pytest.raises(ValueError, match="max_seq_length=32") as refused:
            engine.add_request(prompt_of(32), greedy(1))
        assert str(refused.value) == f"prompt {plan.refusal}"
        assert plan.refusal in str(plan)
        assert engine.plan(30, 100).num_new_tokens == 2
        for lengths in ((0, 1), (1, 0), (1.0, 1)):
            with pytest.raises(ValueError, match="must be an int >= 1"):
                engine.plan(*lengths)
