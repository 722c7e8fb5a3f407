"""CUDA: compiled equals uncompiled, bfloat16 stays close to Hugging Face, and nothing is compiled after warm-up.

In float32 (with TF32 off) tokens must be equal except at near-ties. In bfloat16 the tests compare log-probabilities.
"""

import asyncio
import random
from dataclasses import replace

import pytest
import torch
from engines import deficits, greedy, num_graphs, tokens_of
from test_sampler import random_row, sampled
from tiny_models import CONFIGS, VOCABULARY, hf_generate, tiny_model
from torch._dynamo.utils import counters
from transformers import AutoModelForCausalLM

from flex_nano_vllm import Inference, cascade
from flex_nano_vllm.async_inference import AsyncInference
from flex_nano_vllm.attention import PagedKVCache
from flex_nano_vllm.device import free_bytes
from flex_nano_vllm.sampler import BYTES_PER_LOGIT, Draw, Sampler, uniform

pytestmark = [pytest.mark.gpu, pytest.mark.flex]

rng = random.Random(0)
PROMPTS = [[rng.randrange(3, VOCABULARY) for _ in range(length)] for length in (5, 30, 1, 17, 140, 2, 64, 128)]
NUM_TOKENS = 16
GREEDY = greedy(NUM_TOKENS)
SIZES = dict(max_batch_size=6, n_pages=64, page_size=16, max_num_batched_tokens=96)


@pytest.fixture
def on_gpu():
    """Return a function that moves a shared CPU model to the device. The model is moved back after the test."""
    moved = []

    def move(architecture: str, dtype: torch.dtype) -> torch.nn.Module:
        moved.append(tiny_model(architecture, dtype).to("cuda"))
        return moved[-1]

    yield move
    for model in moved:
        model.to("cpu")


def generate(model: torch.nn.Module, **options: object) -> list[list[int]]:
    with Inference(model, None, max_batch_size=6, n_pages=64, max_num_batched_tokens=96, **options) as engine:
        outputs = engine.generate(PROMPTS, GREEDY, use_tqdm=False)
        engine.check_invariants()
    return tokens_of(outputs)


@pytest.mark.parametrize("page_size", [16, 128])
@pytest.mark.parametrize("architecture", CONFIGS)
def test_compiled_float32_equals_generate_except_at_near_ties(architecture, page_size, on_gpu):
    model = on_gpu(architecture, torch.float32)
    tokens = generate(model, page_size=page_size, compile=True)
    expected = [hf_generate(model, prompt, NUM_TOKENS, ignore_eos=True) for prompt in PROMPTS]
    for prompt, ours, reference in zip(PROMPTS, tokens, expected):
        assert ours == reference or deficits(model, prompt, ours).max() < 1e-2
    assert sum(ours == reference for ours, reference in zip(tokens, expected)) >= len(PROMPTS) - 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_equals_uncompiled(dtype, on_gpu):
    """Rounding differs between the two. Tokens may differ if Hugging Face's log-probabilities are close."""
    model = on_gpu("gemma2", dtype)
    compiled, uncompiled = (generate(model, page_size=16, compile=choice) for choice in (True, False))
    tolerance = 1e-2 if dtype == torch.float32 else 0.5
    for prompt, a, b in zip(PROMPTS, compiled, uncompiled):
        assert a == b or max(deficits(model, prompt, a).max(), deficits(model, prompt, b).max()) < tolerance


@pytest.mark.parametrize("architecture", CONFIGS)
def test_bfloat16_tokens_are_within_half_a_nat_of_hugging_faces_choice(architecture, on_gpu):
    model = on_gpu(architecture, torch.bfloat16)
    for prompt, tokens in zip(PROMPTS, generate(model, page_size=128)):
        assert deficits(model, prompt, tokens).max() < 0.5


def test_packed_decodes_get_the_same_tokens_as_unpacked_decodes_except_at_near_ties(on_gpu, monkeypatch):
    """Decodes are packed even if packing does not pay."""
    monkeypatch.setattr(cascade, "LEAST_SAVING", -(10**9))
    model = on_gpu("gemma2", torch.float32)
    prompts = [PROMPTS[4] + prompt[:20] for prompt in PROMPTS[:6]]
    tokens = {}
    for packed in (False, True):
        options = dict(max_num_batched_tokens=256, page_size=16, enable_cascade=packed)
        with Inference(model, None, max_batch_size=6, n_pages=128, **options) as engine:
            engine.warmup()
            before = num_graphs()
            tokens[packed] = tokens_of(engine.generate(prompts, GREEDY, use_tqdm=False))
            assert num_graphs() == before
    for prompt, alone, together in zip(prompts, tokens[False], tokens[True]):
        assert alone == together or deficits(model, prompt, together).max() < 1e-2


def test_nothing_compiles_after_warmup(on_gpu):
    with Inference(
        on_gpu("gemma2", torch.bfloat16), None, max_batch_size=6, n_pages=16, page_size=16, max_num_batched_tokens=96
    ) as engine:
        engine.warmup()
        before = num_graphs()
        for size in range(1, len(PROMPTS) + 1):
            engine.generate(PROMPTS[:size], GREEDY, use_tqdm=False)
        assert num_graphs() == before
        assert not counters["inductor"]["cudagraph_skips"], "decodes did not run as CUDA graphs"


@pytest.mark.parametrize("vocabulary", [513, 50_000])
def test_the_compiled_sampler_draws_the_tokens_of_the_uncompiled_one_in_the_counted_memory(vocabulary):
    """A token may differ if `u` is within rounding of a boundary between two tokens."""
    logits = 3 * torch.randn(64, vocabulary, generator=torch.Generator().manual_seed(0))
    kinds = [dict(), dict(top_k=50), dict(top_p=0.9), dict(top_k=50, top_p=0.9), dict(min_p=0.1), dict(temperature=0.0)]
    draws = [Draw(**{"temperature": 1.0, "u": uniform(i, 0), **kinds[i % len(kinds)]}) for i in range(64)]
    expected = Sampler(compiled=False, device_type="cpu").choose(logits, draws)
    compiled, logits = Sampler(compiled=True, device_type="cuda"), logits.cuda()
    compiled.warmup(vocabulary, logits.device)
    before, graphs = torch.cuda.memory_allocated(), counters["stats"]["unique_graphs"]
    torch.cuda.reset_peak_memory_stats()
    tokens = compiled.choose(logits, draws)
    if vocabulary == 50_000:
        assert torch.cuda.max_memory_allocated() - before <= BYTES_PER_LOGIT * logits.numel()
    assert counters["stats"]["unique_graphs"] == graphs
    assert (tokens.cpu() == expected).sum() >= 63


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_compiled_sampler_on_the_device_chooses_the_tokens_of_the_cpu_and_of_the_oracle(dtype, on_gpu):
    rng = random.Random(0)
    with Inference(on_gpu("gemma2", dtype), None, **SIZES) as engine:
        assert engine.runner.compiled

        def on_device(logits, draws):
            return engine.sampler.choose(logits.cuda(), draws)

        for num_rows, vocabulary in ((1, 33), (2, 33), (9, 33), (1, 1000), (9, 1000), (3, 100_003)):
            rows = [random_row(rng, vocabulary) for _ in range(num_rows)]
            tokens, wanted = sampled(rows, dtype, sample_tokens=on_device)
            on_cpu, _ = sampled(rows, dtype)
            clear = [i for i, token in enumerate(wanted) if token is not None]
            assert [tokens[i] for i in clear] == [on_cpu[i] for i in clear] == [wanted[i] for i in clear]


def test_pages_are_copied_at_once_on_the_device():
    """Page 3 is copied to page 5, and page 5 to page 2: page 2 gets the contents of page 5 from before."""
    cache = PagedKVCache(0, (2, 8 * 16, 32, 32), torch.bfloat16, torch.device("cuda"))
    for pool in (cache.k_cache, cache.v_cache):
        pool.normal_(generator=torch.Generator("cuda").manual_seed(0))
    before = [pool.clone().unflatten(2, (8, 16)) for pool in (cache.k_cache, cache.v_cache)]
    cache.copy_pages(torch.tensor([3, 5], device="cuda"), torch.tensor([5, 2], device="cuda"), page_size=16)
    for pool, old in zip((cache.k_cache, cache.v_cache), before):
        assert torch.equal(pool.unflatten(2, (8, 16)), old[:, :, [0, 1, 5, 3, 4, 3, 6, 7]])


@pytest.mark.parametrize("caching", [False, True])
def test_samples_of_one_prompt_equal_generate_except_at_near_ties(caching, on_gpu):
    """At temperature 0 the samples are equal. All of them except the first continue on a copy of the last page."""
    model = on_gpu("gemma2", torch.float32)
    prompts = [PROMPTS[1], PROMPTS[4]]  # 30 and 140 tokens: the last pages are partial
    with Inference(model, None, **SIZES, enable_prefix_caching=caching) as engine:
        outputs = engine.generate(prompts, replace(GREEDY, n=4), use_tqdm=False)
        engine.check_invariants()
    for prompt, output in zip(prompts, outputs):
        assert len(output.outputs) == 4
        for completion in output.outputs:
            assert len(completion.token_ids) == NUM_TOKENS
            assert deficits(model, prompt, completion.token_ids).max() < 1e-2


def test_cached_pages_give_the_same_tokens_except_at_near_ties(on_gpu):
    model = on_gpu("gemma2", torch.float32)
    prompts = [PROMPTS[4] + prompt[:9] for prompt in PROMPTS[:6]]  # 140 tokens in common: 8 pages
    with Inference(model, None, **SIZES) as engine:
        first = tokens_of(engine.generate(prompts[:1], GREEDY, use_tqdm=False))
        assert engine.stats().num_cached_tokens == 0
        tokens = tokens_of(engine.generate(prompts, GREEDY, use_tqdm=False))
        assert engine.stats().num_cached_tokens >= len(prompts) * 128
        engine.check_invariants()
    for prompt, output in zip([prompts[0], *prompts], first + tokens):
        assert deficits(model, prompt, output).max() < 1e-2


def test_concurrent_streams_replay_cuda_graphs_in_the_thread_that_owns_the_engine(on_gpu):
    """Torch stores CUDA graphs for each thread, and the thread that steps is not the one that built the engine."""
    model = on_gpu("gemma2", torch.float32)

    async def stream(shared, prompt):
        return [token async for delta in shared.stream(prompt, GREEDY) for token in delta.token_ids]

    async def main(engine):
        async with AsyncInference(engine, stream_interval=0) as shared:
            await shared.warmup()
            before = num_graphs()
            streams = await asyncio.gather(*(stream(shared, prompt) for prompt in PROMPTS))
            assert num_graphs() == before
            return streams

    skips = counters["inductor"]["cudagraph_skips"]
    with Inference(model, None, **SIZES) as engine:
        streams = asyncio.run(main(engine))
    assert counters["inductor"]["cudagraph_skips"] == skips, "decodes did not run as CUDA graphs"
    for prompt, tokens in zip(PROMPTS, streams):
        assert len(tokens) == NUM_TOKENS and deficits(model, prompt, tokens).max() < 1e-2


def wide_model(num_kv_heads: int, dtype: torch.dtype) -> torch.nn.Module:
    """Return a random model with the head dim of Gemma-2 on the device."""
    config = CONFIGS["gemma2"]()
    config.head_dim, config.query_pre_attn_scalar, config.num_key_value_heads = 256, 256, num_kv_heads
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager")
    return model.to(device="cuda", dtype=dtype).eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("page_size", [16, 128])
def test_a_head_dim_of_256_as_in_gemma2_compiles_and_is_exact(page_size, dtype):
    """The largest head dim of a supported model needs the most shared memory in the kernel."""
    model = wide_model(2, dtype)
    for prompt, tokens in zip(PROMPTS, generate(model, page_size=page_size, compile=True)):
        assert deficits(model, prompt, tokens).max() < (1e-2 if dtype == torch.float32 else 0.5)


def test_a_default_pool_limited_by_memory_leaves_room_for_steps():
    """Other tensors take all memory except 4 GB, and a pool for all rows would need 8 GB."""
    model = wide_model(4, torch.float32)
    occupied = torch.empty(free_bytes(model.device) - 4 * 10**9, dtype=torch.uint8, device="cuda")
    try:
        with Inference(model, None, max_batch_size=1024, page_size=16) as engine:
            assert 1000 < engine.page_table.n_pages < 1024 * 512 // 16, "memory does not limit the pool"
            engine.warmup()
            params = [GREEDY, replace(GREEDY, temperature=1.0, top_p=0.9, seed=0, prompt_logprobs=1)]
            tokens = tokens_of(engine.generate(PROMPTS * 2, [params[0]] * 8 + [params[1]] * 8, use_tqdm=False))
            engine.check_invariants()
    finally:
        del occupied
        torch.cuda.empty_cache()
    for prompt, output in zip(PROMPTS, tokens):
        assert deficits(model, prompt, output).max() < 1e-2
