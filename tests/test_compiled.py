"""Compiled FlexAttention on this machine's CPU: results equal uncompiled ones, and nothing compiles after warm-up."""

import copy
import functools
import itertools
import logging
import random
import types
from dataclasses import replace
from unittest import mock

import pytest
import torch
from engines import (
    COMPILED,
    build_step,
    deficits,
    dense_flex,
    greedy,
    layout_of,
    make_sequence,
    num_graphs,
    prompt_of,
    tokens_of,
)
from tiny_models import VOCABULARY, hf_generate, tiny_model
from torch.torch_version import TorchVersion
from tqdm import tqdm

from flex_nano_vllm import Inference, SamplingParams, models, output_processor, patching, runner
from flex_nano_vllm.attention import PagedKVCache, Scores, step_in_progress
from flex_nano_vllm.compiling import DYNAMO_CONFIG, REPLACEMENTS, inductor
from flex_nano_vllm.device import TileKind, decode_buckets, kernel_options, tile_kinds, why_not_compiled
from flex_nano_vllm.geometry import Geometry
from flex_nano_vllm.kv_manager import KVManager
from flex_nano_vllm.runner import compile_flex_attention
from flex_nano_vllm.scheduler import Chunk
from flex_nano_vllm.step import StepBatch
from flex_nano_vllm.warmup import warm_up

pytestmark = pytest.mark.flex

rng = random.Random(0)
PROMPTS = [[rng.randrange(3, VOCABULARY) for _ in range(length)] for length in (5, 30, 1, 17, 140, 2, 64)]

# With these sizes few kernels are compiled: every chunk of the prompts fits the smaller bucket of large tiles.
ONE_BY_ONE = dict(max_batch_size=1, max_seq_length=96, page_size=16, n_pages=7, max_num_batched_tokens=64)
SHORT_PROMPTS = [prompt_of(length) for length in (5, 24, 1)]

OF_ALL_KINDS = [
    dict(top_k=1),
    dict(top_k=3, top_p=0.9, logprobs=2),
    dict(top_p=0.5, prompt_logprobs=3),
    dict(temperature=0, prompt_logprobs=0),
    dict(min_p=0.1, presence_penalty=1),
    dict(temperature=0, repetition_penalty=1.1, logprobs=0),
    dict(temperature=0, logit_bias={5: 1.0}),
    dict(allowed_token_ids=[5, 6], min_tokens=2),
]


@pytest.mark.compiled
def test_compiled_engine_equals_generate_and_never_compiles_after_warmup():
    """Steps of decodes and prompts, with preemption and any number of sequences, need only graphs of the warm-up."""
    model = tiny_model("gemma2", torch.float32)
    expected = [hf_generate(model, prompt, 12) for prompt in PROMPTS]
    with Inference(model, None, **COMPILED) as engine:
        assert engine.runner.compiled
        torch._dynamo.reset()  # discards the graphs of other tests
        before = num_graphs()
        engine.warmup()
        # One decode, and more; the model for any length; attention with 2 masks in tiles of one token, and in larger
        # tiles; the search of the sampler. (The last layer uses larger tiles only for prompt logprobs.)
        max_graphs = engine.runner.max_graphs + engine.sampler.max_graphs
        assert num_graphs() - before == max_graphs == 2 + 1 + 2 + 2 + 1
        after_warmup = num_graphs()
        outputs = engine.generate(PROMPTS, SamplingParams(temperature=0, max_tokens=12), use_tqdm=False)
        assert [output.outputs[0].token_ids for output in outputs] == expected
        assert engine.stats().num_preemptions > 0
        for size in range(1, len(PROMPTS)):
            engine.generate(PROMPTS[:size], SamplingParams(temperature=0.7, max_tokens=2), use_tqdm=False)
            for parameters in OF_ALL_KINDS:
                params = SamplingParams(max_tokens=3, **parameters)
                engine.generate(PROMPTS[-size:], params, use_tqdm=False)
        assert num_graphs() == after_warmup, "a step had a shape that the warm-up did not compile"


@pytest.mark.compiled
def test_packed_decodes_need_one_more_graph(num_packed):
    model = tiny_model("gemma2", torch.float32)
    prompts = [prompt_of(40) + prompt_of(3, seed) for seed in range(4)]  # the outputs end on fourth pages
    expected = [hf_generate(model, prompt, 12, ignore_eos=True) for prompt in prompts]
    with Inference(model, None, **COMPILED) as engine:
        torch._dynamo.reset()  # discards the graphs of other tests
        before = num_graphs()
        engine.warmup()
        after_warmup = num_graphs()
        max_graphs = engine.runner.max_graphs + engine.sampler.max_graphs
        assert after_warmup - before == max_graphs == 2 + 1 + 1 + 2 + 2 + 1, "packing adds one graph"
        assert tokens_of(engine.generate(prompts, greedy(12), use_tqdm=False)) == expected
        assert num_packed[0] > 5
        counted = num_packed[0]
        # Three decodes are too few for the graph of packed decodes.
        assert tokens_of(engine.generate(prompts[:3], greedy(12), use_tqdm=False)) == expected[:3]
        assert num_packed[0] == counted and num_graphs() == after_warmup


@pytest.mark.compiled
def test_layers_of_different_windows_have_their_own_masks_in_one_graph_at_batch_size_1():
    """Without a softcap, torch treated the attention of the second layer as equal to that of the first layer."""
    model = tiny_model("gemma3_text", torch.float32)
    expected = [hf_generate(model, prompt, 24) for prompt in SHORT_PROMPTS]
    with Inference(model, None, **ONE_BY_ONE) as engine:
        assert len(set(engine.runner.layout.masks)) == 2
        for prompt, tokens in zip(SHORT_PROMPTS, expected):
            (output,) = engine.generate([prompt], SamplingParams(temperature=0, max_tokens=24), use_tqdm=False)
            assert output.outputs[0].token_ids == tokens
        assert engine.runner.max_graphs == 1 + 1 + 2 + 2


@pytest.mark.compiled
@pytest.mark.parametrize("architecture", ["mistral", "qwen2"])
def test_compiled_tokens_of_other_architectures_equal_generate(architecture, monkeypatch, caplog):
    """Mistral has a window in every layer, and Qwen2 has none. The first steps announce that they compile."""
    model = tiny_model(architecture, torch.float32)
    expected = [hf_generate(model, prompt, 24) for prompt in SHORT_PROMPTS]
    descriptions = []

    class Bar(tqdm):
        def set_description(self, desc=None, refresh=True):
            descriptions.append(desc)
            super().set_description(desc, refresh)

    monkeypatch.setattr(output_processor, "tqdm", Bar)
    with caplog.at_level(logging.INFO), Inference(model, None, **ONE_BY_ONE) as engine:
        for use_tqdm in (True, False):
            outputs = engine.generate(SHORT_PROMPTS, SamplingParams(temperature=0, max_tokens=24), use_tqdm)
            assert [output.outputs[0].token_ids for output in outputs] == expected
        number = engine.runner.max_graphs
        notice = f"compiling up to {number} graphs of the model: 2-3 minutes the first time, seconds later"
    assert caplog.messages.count(notice) == 1 and "runner" in caplog.text
    assert set(descriptions) == {notice, None} and descriptions[-1] is None
    assert len(descriptions) < 10, "a step that compiles nothing changes the description"


@pytest.mark.compiled
def test_a_nan_ends_only_its_own_request_among_compiled_decodes():
    model = tiny_model("gemma2", torch.float32)
    expected = [hf_generate(model, prompt, 6, ignore_eos=True) for prompt in PROMPTS[:3]]
    with Inference(model, None, **COMPILED) as engine:
        ids = [engine.add_request(prompt, greedy(6)) for prompt in PROMPTS[:3]]
        engine.run_one_step()
        assert all(sequence.output_len for sequence in engine.scheduler.running)  # all later steps are decodes
        broken = engine.scheduler.running[1]
        with torch.no_grad():
            row = model.get_input_embeddings().weight[broken.token_ids[-1]]
            good, _ = row.clone(), row.fill_(torch.nan)
            outputs = {output.request_id: output for output in engine.run_one_step()}
            row.copy_(good)
        while engine.has_unfinished_requests():
            outputs |= {output.request_id: output for output in engine.run_one_step()}
        assert outputs[ids[1]].outputs[0].finish_reason == "error"
        for index in (0, 2):
            assert outputs[ids[index]].outputs[0].token_ids == expected[index]
        assert all(buffer.isfinite().all() for buffer in model.buffers())


POISON = 7

HEALTHY = [prompt_of(length) for length in (5, 20, 14, 3)]


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.compiled)])
def test_nan_in_one_request_does_not_affect_concurrent_and_later_requests(compiled):
    """The embedding of token 7 is NaN, so that its keys and values are NaN in every layer.

    Other requests decode in the same steps. Later requests get the pages of the failed requests, whose masked slots
    still contain what the failed requests wrote.
    """
    model = copy.deepcopy(tiny_model("gemma2", torch.float32 if compiled else torch.float64))
    expected = [hf_generate(model, prompt, 6) for prompt in HEALTHY]
    expected_single = hf_generate(model, [5], 6)
    with torch.no_grad():
        model.get_input_embeddings().weight[POISON] = torch.nan
    # Token 7 at the first position, at the second (where the CPU kernel once missed the NaN), in the middle, and alone
    bad = [[POISON, *HEALTHY[1]], [5, POISON, *HEALTHY[1]], HEALTHY[1] + [POISON] + HEALTHY[0], [POISON]]
    poisoned = [HEALTHY[0], bad[0], bad[1], HEALTHY[2], bad[2], HEALTHY[3], bad[3]]
    with Inference(model, None, **COMPILED, compile=compiled) as engine:
        outputs = engine.generate(poisoned, greedy(6), use_tqdm=False)
        failed = [output.outputs[0].finish_reason == "error" for output in outputs]
        assert failed == [prompt in bad for prompt in poisoned]
        healthy = [output.outputs[0].token_ids for output in outputs if output.outputs[0].finish_reason != "error"]
        assert healthy == [expected[0], expected[2], expected[3]]
        # A step of single tokens is a step of decodes, which has its own graph if compiled.
        first, single, last = engine.generate([[POISON], [5], [POISON]], greedy(6), use_tqdm=False)
        assert first.outputs[0].finish_reason == last.outputs[0].finish_reason == "error"
        assert single.outputs[0].token_ids == expected_single
        again = engine.generate(HEALTHY, greedy(6), use_tqdm=False)
        assert [output.outputs[0].token_ids for output in again] == expected
        engine.check_invariants()


class Scene:
    """Four sequences with interleaved pages, a random pool, and queries for the last tokens of each sequence."""

    def __init__(self, page_size, num_heads, num_kv_heads, head_dim, window, dtype, lengths):
        self.num_kv_heads, self.group_size, self.window = num_kv_heads, num_heads // num_kv_heads, window
        geometry = Geometry(1 + 4 * -(-64 // page_size), page_size, 4, 64 * page_size, 64, window_release=False)
        self.kv = kv = KVManager(geometry, prefix_caching=False)
        sequences = []
        for length in (40, 1, 9, 23):
            row = kv.allocate([])
            sequences.append(make_sequence([0] * length, row, row=row))
        for end in range(1, 41):  # token by token, so that the pages of a sequence are not adjacent
            for sequence in sequences:
                kv.reserve(sequence.row, min(end, sequence.num_tokens))
        self.chunks = [Chunk(s, s.num_tokens - n, n) for s, n in zip(sequences, lengths)]
        num_slots = geometry.n_pages * page_size
        self.cache = PagedKVCache(0, (num_kv_heads, num_slots, head_dim, head_dim), dtype, torch.device("cpu"))
        generator = torch.Generator().manual_seed(0)
        self.query = torch.randn(1, num_heads, sum(lengths), head_dim, generator=generator).to(dtype)
        for pool in (self.cache.k_cache, self.cache.v_cache):
            pool.copy_(torch.randn(pool.shape, generator=generator))

    def step(self, kinds: tuple[TileKind, ...], whole_pool: bool) -> StepBatch:
        layout = layout_of(kinds, self.num_kv_heads, self.group_size, (self.window,), self.window, whole_pool)
        return build_step(self.chunks, self.kv, layout)


SHAPE = ("page_size", "num_heads", "num_kv_heads", "head_dim", "window", "dtype")
SMALL_SHAPES = [(1, 4, 4, 16, None, torch.float32), (4, 6, 2, 16, 7, torch.float32)]


@pytest.mark.compiled
@pytest.mark.parametrize(SHAPE, [*SMALL_SHAPES, (16, 4, 1, 128, 7, torch.bfloat16)])
def test_attention_of_decodes_compiled_in_a_larger_graph_equals_uncompiled(
    page_size, num_heads, num_kv_heads, head_dim, window, dtype
):
    scene = Scene(page_size, num_heads, num_kv_heads, head_dim, window, dtype, lengths=(1, 1, 1, 1))
    small, _ = tile_kinds(scene.group_size, 4, 32, "cpu")
    step, reference = scene.step((small,), True), scene.step((TileKind(1, None),), False)

    query, cache = scene.query, scene.cache
    key, value = query[:, :num_kv_heads] + 1, query[:, -num_kv_heads:] - 1
    key[0, -1, 1, 3] = torch.nan  # one number of one head
    value[0, 0, 2, 5] = torch.inf

    def around(query: torch.Tensor, step: StepBatch) -> torch.Tensor:
        return cache.attend_in_graph(step, query * 2, key, value, Scores(0.3)) / 2

    with torch.no_grad(), torch._dynamo.config.patch(DYNAMO_CONFIG):
        compiled = torch.compile(around, fullgraph=True, dynamic=False, backend=inductor("cpu"))(query, step)
        with step_in_progress(reference, compile_flex_attention("cpu", compiled=False)) as finite:
            written = cache.k_cache.clone(), cache.v_cache.clone()
            cache.update(key, value)
            expected = cache.attend(query * 2, Scores(0.3)) / 2
    assert torch.equal(written[0], cache.k_cache) and torch.equal(written[1], cache.v_cache)
    assert cache.k_cache.isfinite().all() and cache.v_cache.isfinite().all()
    assert finite.tolist() == [True, False, False, True] and compiled[0, 1:3].isnan().all()
    compiled, expected = compiled[:, finite], expected[:, finite]
    assert (compiled - expected).abs().max() < (1e-5 if dtype == torch.float32 else 2e-2)
    assert expected.abs().max() > 0.5


@pytest.mark.compiled
def test_a_kernel_compiled_for_another_number_of_threads_is_not_used():
    """A kernel has buffers for a fixed number of threads. `test_compiled_attention_equals_uncompiled` uses it too."""
    scene = Scene(*SMALL_SHAPES[0], lengths=(1, 1, 1, 1))
    step, flex = scene.step(tile_kinds(1, 4, 32, "cpu"), True), compile_flex_attention("cpu", compiled=True)
    num_threads = torch.get_num_threads()
    try:
        for threads in (num_threads, num_threads, num_threads + 1):
            torch.set_num_threads(threads)
            before = num_graphs()
            with torch.no_grad(), torch._dynamo.config.patch(DYNAMO_CONFIG), step_in_progress(step, flex):
                scene.cache.attend(scene.query, Scores(0.3, 5.0))
        assert num_graphs() == before + 1
    finally:
        torch.set_num_threads(num_threads)


@pytest.mark.compiled
@pytest.mark.parametrize(
    SHAPE,
    [
        *SMALL_SHAPES,
        (16, 4, 1, 16, 7, torch.bfloat16),
        (128, 4, 2, 16, None, torch.bfloat16),
        # The kernel multiplies 8 query rows with one algorithm up to a head dim of 191, and with another above.
        (16, 4, 2, 128, None, torch.float32),
        (16, 4, 2, 256, 7, torch.float32),
    ],
)
def test_compiled_attention_equals_uncompiled(page_size, num_heads, num_kv_heads, head_dim, window, dtype):
    """The step has one layer, a random pool, small and large tiles, and interleaved pages of four rows."""
    scene = Scene(page_size, num_heads, num_kv_heads, head_dim, window, dtype, lengths=(1, 1, 9, 20))
    outputs = {}
    for compiled, kinds in ((True, tile_kinds(scene.group_size, 4, 32, "cpu")), (False, (TileKind(1, None),))):
        step, flex = scene.step(kinds, compiled), compile_flex_attention("cpu", compiled)
        with torch.no_grad(), torch._dynamo.config.patch(DYNAMO_CONFIG), step_in_progress(step, flex):
            outputs[compiled] = scene.cache.attend(scene.query, Scores(0.3, 5.0)).double()
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    assert (outputs[True] - outputs[False]).abs().max() < tolerance
    assert outputs[False].abs().max() > 0.5, "outputs near zero would be equal for any attention"


@pytest.mark.compiled
@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_attention_over_gathered_pages_equals_uncompiled(dtype, window):
    """In bfloat16, the kernel packs the pages, on a CPU that multiplies packed numbers."""
    scene = Scene(16, 4, 2, 64, window, dtype, lengths=(40, 1, 9, 20))
    packing_rows = 32 if torch.cpu._is_avx512_bf16_supported() else 0
    small, large = tile_kinds(scene.group_size, 4, 256, "cpu", page_buckets=(2, 9))
    assert large.tile_len * scene.group_size == 32
    outputs = []
    for kinds, compiled in (((small, large), True), ((TileKind(1, None),), False)):
        step, flex = scene.step(kinds, compiled), compile_flex_attention("cpu", compiled, packing_rows)
        if compiled:
            shapes = [len(tiles.pages) for tiles in step.queries[0].tiles if tiles.pages is not None]
            assert shapes == [9, 2], "five of the six tiles and their pages, and the last tile with two pages"
        with torch.no_grad(), torch._dynamo.config.patch(DYNAMO_CONFIG), step_in_progress(step, flex):
            outputs.append(scene.cache.attend(scene.query, Scores(0.3, 5.0)).double())
    assert (outputs[0] - outputs[1]).abs().max() < (1e-5 if dtype == torch.float32 else 2e-2)
    assert outputs[1].abs().max() > 0.5


@pytest.mark.parametrize("cap", [None, 5.0])
@pytest.mark.parametrize(SHAPE, SMALL_SHAPES)
def test_the_dense_attention_of_other_tests_equals_flex_attention(
    page_size, num_heads, num_kv_heads, head_dim, window, dtype, cap
):
    scene = Scene(page_size, num_heads, num_kv_heads, head_dim, window, dtype, lengths=(1, 1, 9, 20))
    step, outputs = scene.step((TileKind(1, None),), False), []
    for flex in (dense_flex, compile_flex_attention("cpu", compiled=False)):
        with torch.no_grad(), torch._dynamo.config.patch(DYNAMO_CONFIG), step_in_progress(step, flex):
            outputs.append(scene.cache.attend(scene.query, Scores(0.3, cap)))
    assert (outputs[0] - outputs[1]).abs().max() < 1e-6 and outputs[0].abs().max() > 0.5


@pytest.mark.compiled
@pytest.mark.parametrize(
    ("dtype", "has_avx512", "of_values"),
    [(torch.float32, True, (8, 16)), (torch.bfloat16, True, (4, 64)), (torch.bfloat16, False, (8, 16))],
)
def test_the_cpu_backend_widens_register_tiles_in_its_own_graphs_and_starts_no_processes(
    dtype, has_avx512, of_values, monkeypatch
):
    # Import order matters: the template cannot be imported first.
    import torch._inductor.lowering
    from torch._inductor import async_compile, compile_fx
    from torch._inductor.codegen import cpp_flex_attention_template as template

    seen = []

    def compile_graph(graph, inputs, config_patches, fails=False):
        tiles = [template.GemmBlocking(1, 16, 1) for _ in range(4)]  # of two kernels
        seen.append((tiles, torch.compiler.config.cache_key_tag))
        if fails:
            raise RuntimeError("injected")
        return graph

    monkeypatch.setattr(torch.cpu, "_is_avx512_supported", lambda: has_avx512)
    monkeypatch.setattr(async_compile, "maybe_warm_pool", lambda: pytest.fail("worker processes were started"))
    blocking, tag = template.GemmBlocking, torch.compiler.config.cache_key_tag
    for fails in (False, True):
        monkeypatch.setattr(compile_fx, "compile_fx", functools.partial(compile_graph, fails=fails))
        torch._dynamo.reset()
        compiled = torch.compile(lambda x: x + 1, backend=inductor("cpu"))
        if fails:
            with pytest.raises(Exception, match="injected"):
                compiled(torch.ones(2, dtype=dtype))
        else:
            assert compiled(torch.ones(2, dtype=dtype)).tolist() == [2, 2]
        tiles = [blocking(8, 16, 1), blocking(*of_values, 1)] * 2
        assert seen.pop() == (tiles, f"{tag} {torch.get_num_threads()} threads, {tiles[:2]} {REPLACEMENTS} 0")
        assert template.GemmBlocking is blocking and torch.compiler.config.cache_key_tag == tag


@pytest.mark.parametrize(("version", "is_known"), [("2.15.0+cpu", True), ("2.16.0a0", False)])
def test_the_text_of_kernels_is_changed_in_known_torch_versions(version, is_known, monkeypatch):
    """`is_known`: slow headers are replaced, decodes in bfloat16 multiply weights and values in the kernel, and the
    engine chooses which kernels pack."""
    import torch._inductor.lowering
    from torch._inductor import compile_fx
    from torch._inductor.codegen import cpp_flex_attention_template as template

    def present() -> list[bool]:
        texts = [text for text in vars(template).values() if isinstance(text, str)]
        return [any(old in text for text in texts) for old in REPLACEMENTS]

    torch_version = torch.__version__
    monkeypatch.setattr(torch, "__version__", TorchVersion(version))
    monkeypatch.setattr(compile_fx, "compile_fx", lambda graph, inputs, config_patches: present())
    before = present()
    assert all(before) or (before == [True, False, True, True] and torch_version < TorchVersion("2.15"))
    assert inductor("cpu")(None, []) == ([False] * len(REPLACEMENTS) if is_known else before)
    assert present() == before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_only_the_graphs_of_float32_decodes_have_transposed_products(dtype, monkeypatch):
    monkeypatch.setattr(patching, "packs_weights", lambda *args: False)  # packed weights have an operator instead
    numbers = []

    def uncompiled(graph, inputs):
        operations = [node.target for node in graph.graph.nodes]
        if torch.nn.functional.embedding in operations:  # a graph of the model, not of FlexAttention
            numbers.append(operations.count(torch._C._nn.linear))
        return graph.forward

    monkeypatch.setattr(runner, "inductor", lambda *args: uncompiled)
    with Inference(tiny_model("gemma2", dtype), None, **ONE_BY_ONE, compile=True) as engine:
        num_layers = engine.model.config.num_hidden_layers
        engine.generate(SHORT_PROMPTS[:1], greedy(2), use_tqdm=False)
    # The last layer runs twice (`pruning.py`). Inductor removes what is not used.
    assert numbers == [7 * num_layers + 7 + 1, 0 if dtype == torch.float32 else 7 * num_layers + 1]


def test_one_graph_takes_any_number_of_decodes_from_two_on(monkeypatch):
    num_graphs = 0

    def uncompiled(graph, inputs):
        nonlocal num_graphs
        num_graphs += torch.nn.functional.embedding in [node.target for node in graph.graph.nodes]
        return graph.forward

    monkeypatch.setattr(runner, "inductor", lambda *args: uncompiled)
    sizes = dict(max_batch_size=20, max_seq_length=16, page_size=16, max_num_batched_tokens=64)
    with Inference(tiny_model("gemma2", torch.float32), None, **sizes, compile=True) as engine:
        for number, expected in ((2, 2), (20, 2), (3, 2), (16, 2), (1, 3), (17, 3)):  # with that of any length
            engine.generate([prompt_of(3, seed) for seed in range(number)], greedy(3), use_tqdm=False)
            assert num_graphs == expected


@pytest.mark.parametrize("buckets", [(2, 5, 24), (1, 2, 4, 6, 24), (2, 9, 24), (24,)], ids=str)
def test_the_warm_up_reaches_every_bucket_of_gathered_pages(buckets, monkeypatch):
    """Rows have up to 24 pages, and the window of the other mask covers up to ten of them. Nothing is compiled."""
    sizes = dict(max_batch_size=3, max_seq_length=96, page_size=4, max_num_batched_tokens=24)
    with Inference(tiny_model("gemma2", torch.float64), None, **sizes, compile=False) as engine:
        vocabulary, of_engine = engine.spec.num_logits, engine.runner
        kinds = tile_kinds(2, 3, 24, "cpu", buckets)
        of_engine.compiled, of_engine.layout = True, replace(of_engine.layout, kinds=kinds, whole_pool=True)
        kind = kinds[0]
        of_engine.decode_layouts = {n: replace(of_engine.layout, kinds=(replace(kind, num_tiles=n),)) for n in (1, 3)}
        of_engine.model_of_decodes = lambda vectors, packed: torch.zeros(len(vectors.chunk_ends), vocabulary)
        warm_up(engine.runner)
        monkeypatch.setattr(of_engine, "_announce_compilation", lambda: pytest.fail("a step needs another graph"))
        rng = random.Random(0)
        for _ in range(40):
            prompts = [prompt_of(rng.randint(1, 95), rng.random()) for _ in range(rng.randint(1, 5))]
            engine.generate(prompts, greedy(1), use_tqdm=False)
        assert len(of_engine._compiled_shapes) <= of_engine.max_graphs


def test_default_sizes_of_a_cpu():
    with Inference(tiny_model("llama"), None, 2, 64) as engine:
        assert engine.page_table.page_size == 64 and engine.scheduler.max_num_batched_tokens == 1024


@pytest.mark.parametrize(("max_seq_length", "num_masks"), [(12, 1), (13, 2)])
def test_a_window_of_at_least_max_seq_length_needs_no_kernel_of_its_own(max_seq_length, num_masks):
    """The window is 12. In a sequence of 12 tokens, the last token still sees the first one."""
    model = tiny_model("gemma2")
    prompt = PROMPTS[0]
    with Inference(model, None, 2, max_seq_length, page_size=1, max_num_batched_tokens=8, compile=False) as engine:
        (output,) = engine.generate([prompt], SamplingParams(temperature=0, max_tokens=99), use_tqdm=False)
        kinds = tile_kinds(2, 2, 8, "cpu")
        runner = engine.runner
        runner.compiled, runner.layout = True, replace(runner.layout, kinds=kinds)
        runner.decode_layouts = dict.fromkeys((1, 2))
        assert runner.max_graphs == 2 + 1 + num_masks * 2
    num_tokens = max_seq_length - len(prompt)
    assert output.outputs[0].token_ids == hf_generate(model, prompt, num_tokens)


@pytest.mark.compiled
def test_compiled_bfloat16_tokens_are_within_half_a_nat_of_hugging_faces_choice():
    """bfloat16 has about three decimal digits, too few to order two tokens within 0.5 nats reliably."""
    model = tiny_model("qwen3", torch.bfloat16)
    with Inference(model, None, max_batch_size=4, page_size=16, n_pages=64) as engine:
        outputs = engine.generate(PROMPTS, greedy(12), use_tqdm=False)
    for prompt, output in zip(PROMPTS, outputs):
        tokens = output.outputs[0].token_ids
        assert deficits(model, prompt, tokens).max() < 0.5


def test_engines_without_a_compiler_warn_once_and_run_uncompiled(caplog):
    model = tiny_model("llama", torch.float32)
    models._warn_uncompiled.cache_clear()
    with mock.patch("shutil.which", return_value=None):
        Inference(model, None, n_pages=8, page_size=16)
        engine = Inference(model, None, n_pages=8, page_size=16)
        (warning,) = caplog.messages
        assert "runs uncompiled" in warning and "C++ compiler" in warning
        assert not engine.runner.compiled
        (output,) = engine.generate([PROMPTS[0]], SamplingParams(temperature=0, max_tokens=3), use_tqdm=False)
        engine.close()
        assert output.outputs[0].token_ids == hf_generate(model, PROMPTS[0], 3)
        with pytest.raises(ValueError, match=r"compile=True, but there is no C\+\+ compiler"):
            Inference(model, None, n_pages=8, page_size=16, compile=True)


def test_missing_python_headers_prevent_compilation(tmp_path):
    with mock.patch("sysconfig.get_path", return_value=str(tmp_path)):
        assert "python3-dev" in why_not_compiled(torch.device("cpu"), torch.float32, 16)


@pytest.mark.parametrize(
    ("device", "dtype", "page_size", "reason"),
    [
        ("cpu", torch.float64, 16, "float64"),
        ("cuda", torch.bfloat16, 8, "at least 16"),
        ("cuda", torch.bfloat16, 48, "power of two"),
        ("mps", torch.float32, 128, "mps"),
    ],
)
def test_the_reason_why_attention_cannot_be_compiled_is_reported(device, dtype, page_size, reason):
    assert reason in why_not_compiled(torch.device(device), dtype, page_size)


@pytest.mark.parametrize("page_size", [16, 32, 64, 128, 256])
@pytest.mark.parametrize("group_size", [1, 2, 3, 4, 5, 6, 7, 8, 12, 16])
def test_the_block_sizes_of_the_cuda_kernel_divide_the_blocks_of_the_mask(group_size, page_size, monkeypatch):
    """The sizes also fit the shared memory of the GPU. 64 KB is the least of a GPU that Triton supports."""
    for limit, head_dim, dtype in itertools.product(
        (65_536, 101_376, 232_448), (16, 64, 96, 128, 256), (torch.float32, torch.bfloat16)
    ):
        properties = types.SimpleNamespace(shared_memory_per_block_optin=limit, shared_memory_per_block=49_152)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device, properties=properties: properties)
        for kind in tile_kinds(group_size, 8, 512, "cuda"):
            rows = kind.tile_len * group_size
            options = kernel_options(torch.device("cuda"), [rows], page_size, head_dim, dtype)[rows]
            assert rows % options["BLOCK_M"] == page_size % options["BLOCK_N"] == 0
            assert options["BLOCK_M"] >= 16 and options["BLOCK_N"] >= 16
            row_bytes = dtype.itemsize * (128 if head_dim == 96 else head_dim)
            keys_and_values = 2 * (options["num_stages"] - 1) * options["BLOCK_N"] * row_bytes
            assert options["BLOCK_M"] * row_bytes + keys_and_values < limit


@pytest.mark.parametrize("device_type", ["cpu", "cuda"])
@pytest.mark.parametrize("group_size", [1, 2, 3, 4, 6, 7, 8, 16])
@pytest.mark.parametrize(("max_batch_size", "budget"), [(1, 1), (1, 512), (5, 64), (20, 100), (256, 2048)])
def test_steps_have_at_most_four_calls_for_prompts(device_type, group_size, max_batch_size, budget):
    """The worst steps have chunks of one token, chunks of one token more than a tile, or one chunk of all tokens."""
    kinds = tile_kinds(group_size, max_batch_size, budget, device_type)
    most = min(max_batch_size, budget)
    assert decode_buckets(most, device_type)[-1] == most
    layout = layout_of(kinds, 1, group_size, (None,), None, whole_pool=True)
    assert [kind.tile_len for kind in kinds] == sorted(kind.tile_len for kind in kinds)
    for chunk_len in {1, *(kind.tile_len + 1 for kind in kinds), budget}:
        num_chunks = min(max_batch_size, budget // chunk_len)
        if num_chunks:
            kind = kinds[layout.kind_index(chunk_len)]
            num_tiles = num_chunks * -(-chunk_len // kind.tile_len)
            assert num_tiles <= kind.num_tiles * (1 if kind is kinds[0] else 4)
            if device_type == "cuda":
                assert kind.tile_len * group_size % 16 == 0, "a CUDA tile must have a multiple of 16 query rows"
