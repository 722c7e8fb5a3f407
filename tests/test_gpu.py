"""CUDA: compiled equals uncompiled, bfloat16 stays close to Hugging Face, and nothing is compiled after warm-up.

In float32 (with TF32 off) tokens must be equal except at near-ties. In bfloat16 the tests compare log-probabilities.
"""

import random

import pytest
import torch
from tiny_models import CONFIGS, VOCABULARY, hf_generate, tiny_model
from torch._dynamo.utils import counters

from flex_nano_vllm import Inference, SamplingParams, cascade
from flex_nano_vllm.sampler import BYTES_PER_LOGIT, Draw, Sampler, uniform

pytestmark = [pytest.mark.gpu, pytest.mark.flex]

rng = random.Random(0)
PROMPTS = [[rng.randrange(3, VOCABULARY) for _ in range(length)] for length in (5, 30, 1, 17, 140, 2, 64, 128)]
NUM_TOKENS = 16
GREEDY = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True)


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
    return [output.outputs[0].token_ids for output in outputs]


@torch.no_grad()
def deficits(model: torch.nn.Module, prompt: list[int], tokens: list[int]) -> torch.Tensor:
    """Return, for each token, by how many nats Hugging Face's own choice is more likely, given the preceding tokens."""
    logits = model(torch.tensor([prompt + tokens], device="cuda")).logits[0, len(prompt) - 1 : -1]
    logprobs = logits.double().log_softmax(-1)
    return logprobs.amax(-1) - logprobs.gather(1, torch.tensor(tokens, device="cuda")[:, None])[:, 0]


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
            before = counters["stats"]["unique_graphs"]
            tokens[packed] = [o.outputs[0].token_ids for o in engine.generate(prompts, GREEDY, use_tqdm=False)]
            assert counters["stats"]["unique_graphs"] == before
    for prompt, alone, together in zip(prompts, tokens[False], tokens[True]):
        assert alone == together or deficits(model, prompt, together).max() < 1e-2


def test_nothing_compiles_after_warmup(on_gpu):
    with Inference(
        on_gpu("gemma2", torch.bfloat16), None, max_batch_size=6, n_pages=16, page_size=16, max_num_batched_tokens=96
    ) as engine:
        engine.warmup()
        before = counters["stats"]["unique_graphs"]
        for size in range(1, len(PROMPTS) + 1):
            engine.generate(PROMPTS[:size], GREEDY, use_tqdm=False)
        assert counters["stats"]["unique_graphs"] == before
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
