"""The CUDA path without a GPU: inductor's Triton kernels for a pretended GPU, interpreted on CPU tensors.

`benchmarks/pretended_gpu.py` makes inductor generate the code that a GPU would run. The oracle of attention computes
every query alone, in float64, over the list of its keys.
"""

import copy
import itertools
import os
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from engines import build_step, deficits, greedy, layout_of, make_sequence, prompt_of
from tiny_models import hf_generate, tiny_model
from torch import Tensor
from torch._inductor.exc import InductorError
from torch.nn.attention.flex_attention import BlockMask
from transformers.modeling_outputs import CausalLMOutput

pytest.importorskip("triton")
if torch.__version__ < "2.15":
    pytest.skip("inductor of older versions asks for more of a GPU than is pretended", allow_module_level=True)
from benchmarks.pretended_gpu import GPUS, Graph, engines_on
from flex_nano_vllm import Inference, attention, cascade, page_table, runner, step
from flex_nano_vllm.attention import PagedKVCache, Scores, attend
from flex_nano_vllm.compiling import compile_settings
from flex_nano_vllm.geometry import Geometry, cdiv
from flex_nano_vllm.kv_manager import KVManager
from flex_nano_vllm.masks import Causal, MaskMod, Pages
from flex_nano_vllm.page_table import PageList, PageTable, RowOf
from flex_nano_vllm.runner import decode_function, padding_chunk
from flex_nano_vllm.sampler import Draw, Sampler, uniform
from flex_nano_vllm.scheduler import Chunk
from flex_nano_vllm.step import StepBatch, StepVectors, TiledQueries, pack_decodes
from flex_nano_vllm.warmup import warm_up

pytestmark = [pytest.mark.triton, pytest.mark.flex]

ROOT = Path(__file__).parent.parent
K = 2  # kv heads
# The largest error of outputs near 1: keys, weights and outputs are rounded to the dtype.
TOLERANCES = {torch.float32: 5e-6, torch.float16: 4e-3, torch.bfloat16: 3e-2}
# Sequences of a mixed step: length, and how many of the last tokens are queries. The last one is a whole prompt.
MIXED = ((33, 1), (150, 20), (1, 1), (80, 80))


@dataclass(frozen=True)
class Case:
    """Attention of one model on one GPU. `shared`: pages that all sequences have in common."""

    gpu: str = "RTX 3090"
    dtype: torch.dtype = torch.float32
    head_dim: int = 64
    page_size: int = 16
    group_size: int = 2
    windows: tuple[int | None, ...] = (None, 40)
    cap: float | None = 2.0
    shared: int = 0

    def __str__(self) -> str:
        names = self.gpu, self.dtype, f"D{self.head_dim}", f"page{self.page_size}", f"G{self.group_size}", self.windows
        return " ".join(map(str, (*names, self.cap)))


class Scene:
    """Sequences with interleaved pages, pools of random numbers, and queries. Built and used under `engines_on`."""

    def __init__(self, case: Case, chunks: tuple[tuple[int, int], ...]):
        self.case, page_size, cpu = case, case.page_size, torch.device("cpu")
        lengths, numbers = zip(*chunks)
        per_row, budget = cdiv(max(lengths), page_size) + 1, sum(numbers)
        n_pages, max_batch_size = 1 + len(chunks) * per_row, len(chunks) + 1
        sizes = n_pages, page_size, max_batch_size, per_row * page_size, budget
        geometry = Geometry(*sizes, case.windows, window_release=False)
        self.kv = kv = KVManager(geometry, prefix_caching=False)
        self.table = table = kv.primary
        rows = [kv.allocate([]) for _ in chunks]
        kv.reserve(rows[0], case.shared * page_size)
        for row in rows[1:]:
            table.share(row, [table.page(rows[0], i) for i in range(case.shared)])
        for end in range(case.shared * page_size + 1, max(lengths) + 1):  # token by token, to interleave the pages
            for row, length in zip(rows, lengths):
                kv.reserve(row, min(end, length))
        sequences = [make_sequence([0] * length, row, row=row) for row, length in zip(rows, lengths)]
        self.chunks = [Chunk(s, s.num_tokens - n, n) for s, n in zip(sequences, numbers)]

        generator = torch.Generator().manual_seed(0)
        self.caches = []
        for index in range(len(case.windows)):
            cache = PagedKVCache(index, (K, n_pages * page_size, case.head_dim, case.head_dim), case.dtype, cpu)
            for pool in (cache.k_cache, cache.v_cache):
                pool.copy_(torch.randn(pool.shape, generator=generator))
            self.caches.append(cache)
        shapes = [(1, heads, budget + 1, case.head_dim) for heads in (K * case.group_size, K, K)]  # with padding
        self.inputs = [torch.randn(shape, generator=generator).to(case.dtype) for shape in shapes]
        self.scale = 2 * case.head_dim**-0.5  # so that a softcap of 2 changes many scores

        kinds = runner.tile_kinds(case.group_size, max_batch_size, budget, "cpu")
        rows = [kind.tile_len * case.group_size for kind in kinds]
        options = runner.kernel_options(cpu, rows, page_size, case.head_dim, case.dtype)
        rule = cascade.cascade_rule(K, case.group_size, geometry, cpu) if case.shared else None
        layout = layout_of(kinds, K, case.group_size, case.windows, case.windows[-1], whole_pool=True, cascade=rule)
        self.layout = replace(layout, tables=(table,) * len(case.windows), kernel_options=options)
        self.decode_layout = replace(self.layout, kinds=(replace(kinds[0], num_tiles=None),))

    def slot(self, chunk: Chunk, position: int) -> int:
        page_size = self.case.page_size
        return self.table.page(chunk.sequence.row, position // page_size) * page_size + position % page_size

    def expected(self, index: int) -> Tensor:
        """The definition: a query at p attends to the positions max(0, p - window + 1) .. p of its sequence."""
        case, outputs, token = self.case, [], 0
        pools = self.caches[index].k_cache, self.caches[index].v_cache
        keys, values = (pool[0].double().repeat_interleave(case.group_size, dim=0) for pool in pools)
        for chunk in self.chunks:
            for position in range(chunk.start, chunk.start + chunk.length):
                first = 0 if case.windows[index] is None else max(0, position - case.windows[index] + 1)
                slots = [self.slot(chunk, p) for p in range(first, position + 1)]
                scores = torch.einsum("hd,hkd->hk", self.inputs[0][0, :, token].double(), keys[:, slots]) * self.scale
                if case.cap is not None:
                    scores = case.cap * torch.tanh(scores / case.cap)
                outputs.append(torch.einsum("hk,hkd->hd", scores.softmax(-1), values[:, slots]))
                token += 1
        return torch.stack(outputs)

    def assert_close(self, output: Tensor, expected: Tensor) -> None:
        assert output.dtype == self.case.dtype and output.shape == expected.shape
        assert expected.abs().max() > 0.5, "outputs near zero would be equal for any attention"
        assert (output.double() - expected).abs().max() < TOLERANCES[self.case.dtype], "wrong output"


def check_attention(case: Case) -> None:
    """Compare FlexAttention, compiled for the tiles of a mixed step, with the definition."""
    with engines_on(GPUS[case.gpu]), compile_settings("cpu"):
        scene = Scene(case, MIXED)
        flex = runner.compile_flex_attention("cpu", compiled=True)
        batch = build_step(scene.chunks, scene.kv, scene.layout)
        query, num_tokens = scene.inputs[0], len(batch.vectors.positions)
        for cache, queries in zip(scene.caches, batch.queries):
            assert len({tiles.query_rows.shape for tiles in queries.tiles}) == 2, "the step has small and large tiles"
            masks = [tiles.block_mask for tiles in queries.tiles]
            assert any((mask.kv_num_blocks + mask.full_kv_num_blocks == 0).any() for mask in masks), "no padded tile"
            assert any(mask.kv_num_blocks.max() > 0 and mask.full_kv_num_blocks.max() > 0 for mask in masks)
            pools = cache.k_cache, cache.v_cache
            output = attend(queries, flex, query[:, :, :num_tokens], *pools, Scores(scene.scale, case.cap))
            scene.assert_close(output[0], scene.expected(cache.mask))


def check_decodes(case: Case, lengths: tuple[int, ...] = (33, 150, 1, 64, 97)) -> None:
    """Compare a graph of decodes, which contains the building of the step, with the definition.

    One key of the first decode is NaN, and one value of the third is infinite. After the decodes comes padding.
    """
    with engines_on(GPUS[case.gpu]) as compiler, compile_settings("cpu"):
        scene = Scene(case, tuple((length, 1) for length in lengths))
        chunks = [*scene.chunks, padding_chunk(1)]
        layout = scene.decode_layout
        (query, key, value), failed = scene.inputs, [0, 2]
        key[0, -1, 0, 3], value[0, 0, 2, 5] = torch.nan, torch.inf

        def model(step: StepBatch, **inputs: object) -> CausalLMOutput:
            args = query, key, value, Scores(scene.scale, case.cap)
            return CausalLMOutput(logits=torch.stack([c.attend_in_graph(step, *args) for c in scene.caches])[None])

        model.dtype, model.device = case.dtype, torch.device("cpu")
        scene.kv.sync()
        packed = pack_decodes(scene.chunks, layout) if case.shared else None
        assert (packed is not None) == bool(case.shared)
        vectors = StepVectors.build(chunks, layout, scene.kv.device)
        queries = packed and TiledQueries.of_packed(packed, chunks, layout)
        pools = [pool for cache in scene.caches for pool in (cache.k_cache, cache.v_cache)]
        written = [pool.clone() for pool in pools]
        decode = torch.compile(decode_function(model, layout), backend=compiler, fullgraph=True, dynamic=False)
        outputs = decode(vectors, queries)[:, 0]  # [masks, T, H, D]

    for pool, numbers in zip(written, itertools.cycle((key, value))):
        for token, chunk in enumerate(scene.chunks):
            pool[:, :, scene.slot(chunk, chunk.start)] = 0 if token in failed else numbers[:, :, token]
    for pool, wanted in zip(pools, written):
        assert pool.isfinite().all(), "the pool is not finite"
        assert torch.equal(pool[:, :, case.page_size :], wanted[:, :, case.page_size :]), "wrong numbers in the pool"
    healthy = [token for token in range(len(scene.chunks)) if token not in failed]
    assert outputs[:, failed].isnan().all()
    for cache, output in zip(scene.caches, outputs):
        scene.assert_close(output[healthy], scene.expected(cache.mask)[healthy])
    (graph,) = compiler.graphs
    assert_recordable(graph)


def assert_recordable(graph: Graph) -> None:
    """Inductor would record the graph as a CUDA graph, which may change only tensors whose addresses stay the same."""
    assert graph.why_no_cuda_graph is None
    assert set(graph.mutated_inputs) <= set(graph.static_inputs)


@pytest.mark.parametrize(
    "case",
    [
        Case(group_size=1, head_dim=128),
        Case(head_dim=256, page_size=128, windows=(None,)),
        Case("H100", group_size=4, head_dim=128, page_size=64, windows=(100,), cap=None),
        Case(dtype=torch.bfloat16, head_dim=256),
        Case(dtype=torch.bfloat16, head_dim=128, page_size=128, group_size=4, windows=(None,), cap=None),
        Case("H100", torch.bfloat16, page_size=64, group_size=7, windows=(None,)),
        Case("H100", torch.bfloat16, head_dim=256, page_size=64, windows=(100,)),
        Case(dtype=torch.float16, group_size=1, windows=(40,), cap=None),
        Case("H100", torch.float16, head_dim=128, page_size=64, group_size=4, windows=(None,)),
    ],
    ids=str,
)
def test_attention_of_decodes_and_prompts_equals_the_definition(case):
    check_attention(case)


@pytest.mark.parametrize(
    "case",
    [
        Case(),
        Case("H100", torch.bfloat16, head_dim=256, page_size=64, group_size=4, windows=(None, 100)),
        Case(dtype=torch.float16, head_dim=128, group_size=1, cap=None),
    ],
    ids=str,
)
def test_decodes_in_a_graph_that_builds_the_step_equal_the_definition(case):
    check_decodes(case)


ALL_SHARE = (33, 150, 49, 64, 97)  # longer than two pages


@pytest.fixture
def always_packed(monkeypatch):
    """Pack decodes even if it does not pay: so few decodes have a processor each."""
    monkeypatch.setattr(cascade, "LEAST_SAVING", -(10**9))


@pytest.mark.parametrize(
    "case", [Case(group_size=4, shared=2), Case("H100", torch.bfloat16, head_dim=128, cap=None, shared=2)], ids=str
)
def test_packed_decodes_in_a_graph_equal_the_definition(case, always_packed):
    check_decodes(case, ALL_SHARE)


def broadcast_counts(
    partial: PageList, full: PageList, block_size: tuple[int, int], mask_mod: MaskMod, kv_len: int
) -> BlockMask:
    """Return the mask that inductor compiles wrongly: its numbers of pages get a stride of 0."""
    lists = [part[:, None, None] for part in (*partial, *full)]
    sizes = dict(BLOCK_SIZE=block_size, seq_lengths=(block_size[0], kv_len))
    return BlockMask.from_kv_blocks(*lists, mask_mod=mask_mod, compute_q_blocks=False, **sizes)


def mask_of_all_pages(table: PageTable, logical_mask: MaskMod, row_of: RowOf) -> MaskMod:
    position_of = table._position_of()
    return lambda tile, h, q_idx, slot: logical_mask(tile, h, q_idx, position_of(row_of(tile, q_idx), slot))


def mask_of_own_pages(table: PageTable, logical_mask: MaskMod, row_of: RowOf, sinks: bool = False) -> MaskMod:
    position_of = table._position_of()
    return lambda tile, h, q_idx, slot: position_of(row_of(tile, q_idx), slot) >= 0


def next_slots(table: PageTable, rows: Tensor, positions: Tensor) -> Tensor:
    return slots(table, rows, positions) + 1


def too_many_full_pages(mask: Causal, first: Tensor, last: Tensor, page_size: int) -> Pages:
    return torch.zeros_like(first), first // page_size + 1


def everything_finite(key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return key, value, torch.ones_like(key[0, 0, :, 0], dtype=torch.bool)


def blocks_of_two_pages(device: object, all_rows: list[int], page_size: int, *args: object) -> dict[int, object]:
    return {rows: dict(BACKEND="TRITON", BLOCK_M=16, BLOCK_N=2 * page_size) for rows in all_rows}


slots = PageTable.slots
WINDOW, SHARED = Case(windows=(40,)), Case(windows=(None,), shared=2)
ALL = Case(windows=(None,))


@pytest.mark.parametrize(
    ("owners", "name", "wrong", "check", "message"),
    [
        ((page_table, step), "mask_of_tiles", broadcast_counts, lambda: check_decodes(ALL), "wrong output"),
        ((PageTable,), "physical_mask", mask_of_all_pages, lambda: check_decodes(SHARED, ALL_SHARE), "wrong output"),
        ((PageTable,), "physical_mask", mask_of_own_pages, lambda: check_attention(WINDOW), "wrong output"),
        ((Causal,), "full_pages", too_many_full_pages, lambda: check_attention(ALL), "wrong output"),
        ((PageTable,), "slots", next_slots, lambda: check_decodes(ALL), "wrong numbers in the pool"),
        ((attention,), "_only_finite", everything_finite, lambda: check_decodes(ALL), "the pool is not finite"),
        ((runner,), "kernel_options", blocks_of_two_pages, lambda: check_attention(ALL), "BLOCK_N|wrong output"),
    ],
    ids=lambda value: value.__name__ if callable(value) and value.__name__ != "<lambda>" else "",
)
def test_a_wrong_program_is_noticed(owners, name, wrong, check, message, always_packed, monkeypatch):
    for owner in owners:
        monkeypatch.setattr(owner, name, wrong)
    with pytest.raises((AssertionError, InductorError), match=message):
        check()


def test_the_compiled_sampler_chooses_the_tokens_of_the_uncompiled_one():
    logits = 3 * torch.randn(12, 700, generator=torch.Generator().manual_seed(0))
    kinds = [dict(), dict(top_k=50), dict(top_p=0.9), dict(top_k=50, top_p=0.9), dict(min_p=0.1), dict(temperature=0.0)]
    draws = [Draw(**{"temperature": 1.0, "u": uniform(i, 0), **kinds[i % len(kinds)]}) for i in range(len(logits))]
    expected = Sampler(compiled=False, device_type="cpu").choose(logits, draws)
    with engines_on(GPUS["RTX 3090"]) as compiler:
        tokens = Sampler(compiled=True, device_type="cpu").choose(logits, draws)
    (graph,) = compiler.graphs
    assert graph.kernels and all(kernel.launches for kernel in graph.kernels.values())
    assert torch.equal(tokens, expected)


BROKEN = 2  # a token that no prompt contains


def num_copied_inputs(graphs: list[Graph]) -> list[int]:
    """Return the numbers of inputs that CUDA graphs would copy in every step, for the graphs of decodes."""
    of_decodes = [graph for graph in graphs if graph.static_inputs and any("_tem_" in name for name in graph.kernels)]
    return [graph.num_inputs - len(graph.static_inputs) for graph in of_decodes]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_tokens_of_an_engine_are_those_of_hugging_face(dtype, monkeypatch):
    """A prompt is computed in two chunks, two samples of a prompt get a copy of its last page, and a request has a NaN.

    The two layers have different masks and pools. Every token is the model's choice, given the tokens before it. In
    bfloat16 `generate` differs from that: its cache rounds in another way.
    """
    model, prompts = copy.deepcopy(tiny_model("gemma2", dtype)), [prompt_of(length) for length in (3, 45, 21)]
    with torch.no_grad():
        model.get_input_embeddings().weight[BROKEN] = torch.nan
    copied, copy_pages = [], PagedKVCache.copy_pages
    monkeypatch.setattr(PagedKVCache, "copy_pages", lambda *args: copied.append(args) or copy_pages(*args))
    sizes = dict(max_batch_size=4, max_seq_length=96, page_size=16, max_num_batched_tokens=60, compile=True)
    params = [greedy(1), greedy(5), greedy(5), replace(greedy(3), n=2)]
    with engines_on(GPUS["RTX 3090"]) as compiler, Inference(model, None, **sizes) as engine:
        broken, *outputs = engine.generate([[3, BROKEN], *prompts], params, use_tqdm=False)
        engine.check_invariants()
    assert broken.outputs[0].finish_reason == "error"
    assert len(copied) == 2, "a page is copied in both layers"
    for prompt, output in zip(prompts, outputs):
        for sample in output.outputs:
            assert deficits(model, prompt, sample.token_ids).max() == 0
            tokens = hf_generate(model, prompt, len(sample.token_ids), ignore_eos=True)
            assert sample.token_ids == tokens or dtype == torch.bfloat16
    for graph in compiler.graphs:
        assert_recordable(graph)
    assert num_copied_inputs(compiler.graphs) == [11]  # seven vectors of the step, and two tables of each pool


def test_a_warm_engine_compiles_nothing_and_its_tokens_equal_generate(always_packed):
    """Both layers have the same mask, and decodes are packed. The prompts share a page."""
    model, common = tiny_model("qwen3", torch.float32), prompt_of(20)
    prompts = [[*common, 5], [*common, 6, 7]]
    sizes = dict(max_batch_size=2, max_seq_length=64, page_size=16, max_num_batched_tokens=32, compile=True)
    with engines_on(GPUS["H100"]) as compiler, Inference(model, None, **sizes) as engine:
        warm_up(engine.runner)
        assert len(compiler.graphs) == engine.runner.max_graphs
        outputs = engine.generate(prompts, [greedy(5), greedy(3)], use_tqdm=False)
        engine.check_invariants()
        assert engine.stats().num_cached_tokens == 16
        assert len(compiler.graphs) == engine.runner.max_graphs
    for prompt, output in zip(prompts, outputs):
        (sample,) = output.outputs
        assert sample.token_ids == hf_generate(model, prompt, len(sample.token_ids), ignore_eos=True)
    for graph in compiler.graphs:
        assert_recordable(graph)
    # Seven vectors of the step, and two tables. Packed tiles replace four of the vectors by eight tensors.
    assert num_copied_inputs(compiler.graphs) == [9, 9, 13]


def kernels(*arguments: str) -> subprocess.CompletedProcess:
    """Run Python without Triton's interpreter, with which Triton cannot compile."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, *arguments]
    return subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)


@pytest.mark.timeout(600)  # two minutes on an idle machine with no kernels on disk
@pytest.mark.parametrize(
    "options",
    [
        [],
        ["--dtype", "float32", "--gpus", "RTX 3090"],
        ["--all-kernels", "--models", "gemma-2-2b", "--gpus", "RTX 3090"],
    ],
    ids=["bfloat16", "float32", "all kernels of an engine"],
)
def test_the_kernels_fit_the_gpus(options):
    run = kernels("-m", "benchmarks.gpu_kernels", *options)
    assert run.returncode == 0, run.stdout + run.stderr


def test_blocks_that_torch_chooses_do_not_fit_an_rtx_3090():
    """The check of the last test can fail."""
    program = """
import torch
from benchmarks.gpu_kernels import GPUS, resources
from flex_nano_vllm import runner
runner.kernel_options = lambda device, all_rows, *args: {rows: {"BACKEND": "TRITON"} for rows in all_rows}
print([need.fits for need in resources("gemma-2-2b", torch.bfloat16, GPUS["RTX 3090"])])
"""
    run = kernels("-c", program)
    assert run.stdout.endswith("[False, False]\n"), run.stdout + run.stderr
