"""Greedy tokens equal Hugging Face `generate(attn_implementation="eager")`, for all sizes of the engine.

In float64 all tokens are equal. In float32 tokens may differ at near-ties, which are counted. Prompts are on both sides
of the sliding window (12) and of every page boundary. The models are random, tiny, and untied, so that a token depends
on all of its visible past. The last test shows that a wrong mask, scale or softcap changes the tokens.
"""

import copy
import functools
import itertools
import random
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from engines import layer_mask
from tiny_models import CONFIGS, VOCABULARY, WINDOW, hf_generate, tiny_model
from transformers import AutoModelForCausalLM

from benchmarks.exactness import greedy_tokens, greedy_under_preemption
from flex_nano_vllm import Inference, SamplingParams, models

PROMPT_LENS = (1, 5, 16, 14, 15, 3 * WINDOW + 1)
NUM_TOKENS = 8
GREEDY = SamplingParams(temperature=0, max_tokens=NUM_TOKENS)

rng = random.Random(0)
PROMPTS = [[rng.randrange(3, VOCABULARY) for _ in range(length)] for length in PROMPT_LENS]
LONGEST = max(PROMPT_LENS) + NUM_TOKENS


@functools.cache
def expected(architecture: str, dtype: torch.dtype = torch.float64) -> list[list[int]]:
    return [hf_generate(tiny_model(architecture, dtype), prompt, NUM_TOKENS) for prompt in PROMPTS]


def generate(engine: Inference, prompts: list[list[int]]) -> list[list[int]]:
    outputs = engine.generate(prompts, GREEDY, use_tqdm=False)
    engine.check_invariants()
    assert engine.page_table.num_used_pages == 0
    return [output.outputs[0].token_ids for output in outputs]


@pytest.mark.parametrize("pool", ["ample", "tight"])
@pytest.mark.parametrize("budget", [1, 5, pytest.param(64, marks=pytest.mark.flex)])
@pytest.mark.parametrize("page_size", [1, 4, 16, 128])
def test_gemma2_equals_generate_for_every_page_size_budget_and_pool(page_size, budget, pool):
    """A tight pool has one page more than the longest request needs, so that requests compete for pages."""
    n_pages = 2 + -(-LONGEST // page_size) if pool == "tight" else 1 + 4 * -(-LONGEST // page_size)
    with Inference(
        tiny_model("gemma2"),
        None,
        max_batch_size=4,
        page_size=page_size,
        n_pages=n_pages,
        max_num_batched_tokens=budget,
        watermark=0,
        compile=False,
    ) as engine:
        assert generate(engine, PROMPTS) == expected("gemma2")
        if pool == "tight" and page_size < 16 and budget == 64:
            assert engine.stats().num_preemptions > 0, "the tight pool must cause preemptions"


@pytest.mark.parametrize("max_batch_size", [1, 2, 3])
@pytest.mark.parametrize("order", [(0, 1, 2, 5), (5, 1, 0, 2)])
def test_gemma2_equals_generate_for_every_batch_size_and_order(max_batch_size, order):
    with Inference(
        tiny_model("gemma2"), None, max_batch_size, page_size=4, max_num_batched_tokens=16, compile=False
    ) as engine:
        assert generate(engine, [PROMPTS[i] for i in order]) == [expected("gemma2")[i] for i in order]


@pytest.mark.flex
@pytest.mark.parametrize("architecture", [name for name in CONFIGS if name != "gemma2"])
@pytest.mark.parametrize(("page_size", "n_pages", "budget"), [(4, 2 + -(-LONGEST // 4), 7), (16, 20, 64)])
def test_every_architecture_equals_generate(architecture, page_size, n_pages, budget):
    with Inference(
        tiny_model(architecture),
        None,
        max_batch_size=4,
        page_size=page_size,
        n_pages=n_pages,
        max_num_batched_tokens=budget,
        watermark=0,
        compile=False,
    ) as engine:
        assert generate(engine, PROMPTS) == expected(architecture)


@pytest.mark.flex
@pytest.mark.parametrize("architecture", CONFIGS)
def test_in_float32_only_near_ties_differ(architecture):
    """A token may differ if Hugging Face's two most likely tokens are closer than float32 rounding in two layers."""
    model = tiny_model(architecture, torch.float32)
    with Inference(model, None, max_batch_size=4, page_size=4, max_num_batched_tokens=7, compile=False) as engine:
        tokens = generate(engine, PROMPTS)
    near_ties = 0
    for prompt, ours, reference in zip(PROMPTS, tokens, expected(architecture, torch.float32)):
        differ = [i for i, (a, b) in enumerate(itertools.zip_longest(ours, reference)) if a != b]
        if differ:
            with torch.no_grad():
                logits = model(torch.tensor([prompt + reference[: differ[0]]])).logits[0, -1]
            best, second = logits.topk(2).values
            assert best - second < 1e-3, f"{ours} differs from {reference} at {differ[0]}, which is not a near-tie"
            near_ties += 1
    assert near_ties <= 1, f"{near_ties} of {len(PROMPTS)} prompts have a near-tie, too many for rounding"


@pytest.mark.parametrize(
    ("architecture", "changes"),
    [
        ("qwen2", dict(num_key_value_heads=4)),
        ("mistral", dict(sliding_window=None)),
        ("llama", dict(num_key_value_heads=1, head_dim=20)),
        ("gemma2", dict(num_hidden_layers=3, num_attention_heads=6, tie_word_embeddings=True)),
    ],
)
def test_unusual_configs_equal_generate(architecture, changes):
    config = CONFIGS[architecture]()
    for name, value in changes.items():
        setattr(config, name, value)
    if "num_hidden_layers" in changes:
        config.layer_types = ["sliding_attention", "full_attention", "sliding_attention"]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float64, attn_implementation="eager").eval()
    reference = [hf_generate(model, prompt, NUM_TOKENS) for prompt in PROMPTS]
    with Inference(model, None, max_batch_size=4, page_size=4, max_num_batched_tokens=32, compile=False) as engine:
        assert generate(engine, PROMPTS) == reference


@pytest.mark.flex
def test_a_process_can_serve_models_of_different_softcaps_from_any_thread():
    """By default, Dynamo makes a second softcap a symbolic float, which FlexAttention does not accept.

    Each thread has its own Dynamo settings.
    """
    for cap in (9.0, 2.0):
        model = copy.deepcopy(tiny_model("gemma2"))
        for layer in model.model.layers:
            layer.self_attn.attn_logit_softcapping = cap
        reference = [hf_generate(model, prompt, NUM_TOKENS) for prompt in PROMPTS]
        with (
            Inference(model, None, max_batch_size=4, page_size=4, compile=False) as engine,
            ThreadPoolExecutor() as pool,
        ):
            assert pool.submit(generate, engine, PROMPTS).result() == reference


def test_sequences_that_cross_pages_of_128_tokens_equal_generate():
    """Two prompts are longer than a page, chunks do not end at page boundaries, and decodes cross a boundary.

    128 is the default page size on a GPU.
    """
    prompts = [rng.choices(range(3, VOCABULARY), k=length) for length in (300, 126, 260)]
    reference = [hf_generate(tiny_model("gemma2"), prompt, NUM_TOKENS) for prompt in prompts]
    with Inference(
        tiny_model("gemma2"), None, 3, n_pages=8, page_size=128, max_num_batched_tokens=100, compile=False
    ) as engine:
        assert generate(engine, prompts) == reference


def test_a_request_that_arrives_while_others_decode_changes_no_tokens():
    with Inference(tiny_model("gemma2"), None, 4, page_size=4, max_num_batched_tokens=6, compile=False) as engine:
        ids, tokens = [], {}
        for prompt in PROMPTS:
            ids.append(engine.add_request(prompt, GREEDY))
            for output in engine.run_one_step() + engine.run_one_step():
                tokens[output.request_id] = output.outputs[0].token_ids
        while engine.has_unfinished_requests():
            engine.check_invariants()
            for output in engine.run_one_step():
                tokens[output.request_id] = output.outputs[0].token_ids
    assert [tokens[i] for i in ids] == expected("gemma2")


@pytest.mark.parametrize("run", [greedy_tokens, greedy_under_preemption])
def test_the_exactness_check_has_no_cache_hits_from_earlier_batches(run):
    with Inference(tiny_model("gemma2"), None, 4, page_size=4, compile=False) as engine:
        prompts = [prompt[:10] for prompt in PROMPTS[1:3]]
        run(engine, prompts, 4)
        found = engine.stats().num_cached_tokens
        run(engine, prompts, 4)
        assert engine.stats().num_cached_tokens == found


@pytest.mark.flex
@pytest.mark.parametrize(
    ("attribute", "wrong"),
    [("window", None), ("window", WINDOW - 1), ("attn_logit_softcapping", None), ("scaling", 0.2)],
)
def test_the_tokens_depend_on_window_softcap_and_scale(attribute, wrong, monkeypatch):
    """If the tokens did not change with the window, the softcap and the scale, equality would prove nothing."""
    model = tiny_model("gemma2")
    right = expected("gemma2")
    if attribute == "window":
        masks = [layer_mask(layer.mask.window and wrong) for layer in models.spec_of(model).layers]
        monkeypatch.setattr(models, "layer_masks", lambda layers: masks)
    else:
        for layer in model.model.layers:
            monkeypatch.setattr(layer.self_attn, attribute, wrong)
    with Inference(model, None, max_batch_size=4, page_size=4, compile=False) as engine:
        assert generate(engine, PROMPTS) != right
