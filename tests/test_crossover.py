"""The three ways to attend that the benchmark times give the same outputs. A different output is detected."""

import pytest
import torch

from benchmarks import crossover
from benchmarks.crossover import measure_crossover
from flex_nano_vllm.runner import compile_flex_attention

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def uncompiled(monkeypatch):
    uncompiled = compile_flex_attention("cpu", compiled=False)
    monkeypatch.setattr(crossover, "compile_flex_attention", lambda *_, **__: uncompiled)
    monkeypatch.setattr(crossover, "REPETITIONS", 1)


def test_every_size_is_measured_in_three_ways():
    measurements = list(measure_crossover(CPU, torch.float32, [24, 40], [1, 3], [8]))
    assert all(m.seconds > 0 and m.peak_bytes > 0 for m in measurements)
    sizes = [(m.phase, m.batch_size, m.kv_len) for m in measurements]
    decodes = {("decode", batch_size, kv_len) for batch_size in (1, 3) for kv_len in (24, 40)}
    prefills = {("prefill", 1, 24), ("prefill", 1, 40)}  # three prompts have more tokens than max(kv_lens)
    assert set(sizes) == decodes | prefills and len(sizes) == 3 * len(set(sizes))
    # Gathering copies all keys and values.
    peak = {m.way: m.peak_bytes for m in measurements if (m.phase, m.batch_size, m.kv_len) == ("decode", 3, 40)}
    copied = 2 * 3 * 40 * crossover.NUM_KV_HEADS * crossover.HEAD_DIM * 4
    assert peak["gather + sdpa"] >= copied and peak["gather + naive"] >= copied


def test_wrong_paged_attention_is_detected(monkeypatch):
    attend = crossover.PagedKVCache.attend
    for wrong in (lambda output: output + 0.01, lambda output: output * torch.nan):
        monkeypatch.setattr(
            crossover.PagedKVCache, "attend", lambda *args, wrong=wrong, **options: wrong(attend(*args, **options))
        )
        with pytest.raises(RuntimeError, match="flex, paged is off by"):
            list(measure_crossover(CPU, torch.float32, [24], [1], [8]))


def test_a_dtype_that_cannot_be_compiled_is_rejected():
    with pytest.raises(ValueError, match="float64"):
        list(measure_crossover(CPU, torch.float64, [24], [1], [8]))


@pytest.mark.parametrize("way", ["_sdpa", "_naive"])
def test_wrong_attention_on_gathered_pages_is_detected(way, monkeypatch):
    right = getattr(crossover, way)
    monkeypatch.setattr(crossover, way, lambda query, key, value: right(query, key.roll(1, dims=2), value))
    with pytest.raises(RuntimeError, match="is off by"):
        list(measure_crossover(CPU, torch.float32, [24], [1], [8]))
