"""The bounds of every mask are compared with its `mask_mod` at every position, and a new mask is tried in an engine."""

import math
from dataclasses import dataclass

import pytest
import torch
from engines import SIZES, greedy, prompt_of, tokens_of
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import tiny_model
from transformers import AttentionInterface

from flex_nano_vllm import Inference, models
from flex_nano_vllm.masks import Causal, Chunked, LayerMask, SlidingWindow, first_page
from flex_nano_vllm.step import logical_block_mask

LONGEST = 40


@dataclass(frozen=True)
class SinkWindow(LayerMask):
    """A query sees the first `sinks` tokens and the last `recent` ones (StreamingLLM, arXiv:2309.17453)."""

    sinks: int
    recent: int

    def mask_mod(self, b, h, q_pos, kv_pos):
        return (kv_pos <= q_pos) & ((kv_pos < self.sinks) | (q_pos - kv_pos < self.recent))

    def visible_pages(self, first, last, page_size):
        sinks = torch.zeros_like(first), torch.full_like(first, math.ceil(self.sinks / page_size))
        return [sinks, (first_page(self.recent, first, page_size), last // page_size + 1)]

    def full_pages(self, first, last, page_size):
        return first_page(self.recent, last + page_size - 1, page_size), (first + 1) // page_size


@dataclass(frozen=True)
class EveryOther(LayerMask):
    """A query sees every other token. This mask states no bounds."""

    def mask_mod(self, b, h, q_pos, kv_pos):
        return (kv_pos <= q_pos) & ((q_pos - kv_pos) % 2 == 0)


@dataclass(frozen=True)
class Alibi(Causal):
    """A causal mask with a linear bias for each head (ALiBi, arXiv:2108.12409)."""

    def score_mod(self, score, b, h, q_pos, kv_pos):
        return score - 2.0 ** -(h + 1.0) * (q_pos - kv_pos)


masks = st.one_of(
    st.just(Causal()),
    st.just(EveryOther()),
    st.just(Alibi()),
    st.builds(SlidingWindow, st.integers(1, LONGEST)),
    st.builds(Chunked, st.integers(1, LONGEST)),
    st.builds(SinkWindow, st.integers(0, 9), st.integers(1, 12)),
)


@settings(max_examples=400, deadline=None, database=None)
@given(
    mask=masks,
    page_size=st.integers(1, 8),
    tiles=st.lists(st.tuples(st.integers(0, LONGEST - 1), st.integers(1, 9)), min_size=1, max_size=5),
    slack=st.integers(0, 3),
)
def test_listed_pages_have_each_visible_key_once_and_full_pages_only_visible_keys(mask, page_size, tiles, slack):
    tile_len = max(length for _, length in tiles)
    q_pos = torch.full((len(tiles) + 1, tile_len), -1, dtype=torch.int32)  # the last tile is padding
    for tile, (first, length) in enumerate(tiles):
        q_pos[tile, :length] = torch.arange(first, first + length)
    width = int(q_pos.max()) // page_size + 1 + slack
    block_mask = logical_block_mask(q_pos, mask, 1, page_size, width)
    exact = type(mask) in (Causal, SlidingWindow, Chunked, Alibi)  # the other masks list pages that no query needs
    for tile, positions in enumerate(q_pos.tolist()):
        partial, full = (
            lists[tile, 0, 0, : counts[tile, 0, 0]].tolist()
            for counts, lists in (
                (block_mask.kv_num_blocks, block_mask.kv_indices),
                (block_mask.full_kv_num_blocks, block_mask.full_kv_indices),
            )
        )
        assert len(set(partial + full)) == len(partial) + len(full), "a page is listed twice"
        needed = set()
        for position in filter(lambda position: position >= 0, positions):
            seen = [
                key for key in range(position + 1) if mask.mask_mod(0, 0, torch.tensor(position), torch.tensor(key))
            ]
            needed |= {key // page_size for key in seen}
            for page in full:
                assert set(range(page * page_size, (page + 1) * page_size)) <= set(seen), "a full page has a hidden key"
            if mask.window is not None:
                assert min(seen) > position - mask.window, "a key before the window is visible"
        assert needed <= set(partial + full), "a visible key is on no listed page"
        assert not exact or needed == set(partial + full), "a listed page has no visible key"
        assert max(positions) >= 0 or not partial + full, "a tile of padding lists pages"


def test_the_drawing_in_the_docstring_of_masks_holds():
    """A query at position 14 with a window of 9 and pages of 4 tokens."""
    block_mask = logical_block_mask(torch.tensor([[14]], dtype=torch.int32), SlidingWindow(9), 1, 4, 4)
    assert block_mask.kv_num_blocks.item() == 2 and block_mask.kv_indices[0, 0, 0, :2].tolist() == [1, 3]
    assert block_mask.full_kv_num_blocks.item() == 1 and block_mask.full_kv_indices[0, 0, 0, 0] == 2


@pytest.mark.parametrize("kind", [SlidingWindow, Chunked])
@pytest.mark.parametrize("window", [None, 1, 7, 40, 41])
def test_a_mask_within_a_length_equals_the_mask(kind, window):
    mask = Causal() if window is None else kind(window)
    simpler = mask.within(LONGEST)
    assert (simpler == Causal()) == (window is None or window >= LONGEST)
    q_pos, kv_pos = torch.arange(LONGEST)[:, None], torch.arange(LONGEST)
    assert torch.equal(mask.mask_mod(0, 0, q_pos, kv_pos), simpler.mask_mod(0, 0, q_pos, kv_pos))


# ---- a new mask in an engine ----

FEW_GRAPHS = dict(max_batch_size=2, page_size=16, n_pages=12, max_num_batched_tokens=16, enable_cascade=False)


def greedy_tokens(model, masks, prompt, num_tokens):
    """Generate with an attention function that evaluates the mask of each layer for every pair of tokens."""

    def attention(module, query, key, value, attention_mask, scaling, softcap=None, **kwargs):
        mask, groups = masks[module.layer_idx], query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        scores = query @ key.transpose(-1, -2) * scaling
        head, q_pos, kv_pos = torch.arange(query.shape[1])[:, None, None], *map(torch.arange, scores.shape[-2:])
        if mask.score_mod is not None:
            scores = mask.score_mod(scores, 0, head, q_pos[:, None], kv_pos)
        scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
        scores = scores.masked_fill(~mask.mask_mod(0, head, q_pos[:, None], kv_pos), -torch.inf)
        return (scores.softmax(dim=-1) @ value).transpose(1, 2), None

    AttentionInterface.register("oracle", attention)
    implementation = model.config._attn_implementation
    tokens = list(prompt)
    try:
        model.set_attn_implementation("oracle")
        for _ in range(num_tokens):
            tokens.append(model(torch.tensor([tokens]), use_cache=False).logits[0, -1].argmax().item())
    finally:
        model.set_attn_implementation(implementation)
    return tokens[len(prompt) :]


MASKS = {
    "sinks": [SinkWindow(4, 6)],
    "every other": [EveryOther()],
    "bias": [Alibi()],
    "in turns": [SinkWindow(4, 6), Alibi()],
}
COMPILED_IN_TURNS = pytest.param(True, "in turns", marks=pytest.mark.compiled)


@pytest.mark.parametrize(("compiled", "name"), [*((False, name) for name in MASKS), COMPILED_IN_TURNS])
def test_a_new_mask_is_right_compiled_and_uncompiled(compiled, name, monkeypatch):
    """The reference evaluates the masks for every pair of tokens. The engine skips pages that the masks exclude."""
    model = tiny_model("gemma2", torch.float32 if compiled else torch.float64)
    masks = [MASKS[name][layer % len(MASKS[name])] for layer in range(len(model.model.layers))]
    # Compiled, the steps need few graphs: every chunk of a prompt is two or three tiles, and both outputs end together.
    sizes = ((60, 10), (31, 8)) if compiled else ((13, 8), (5, 8), (2, 8), (20, 8))
    prompts = [(prompt_of(length), num_tokens) for length, num_tokens in sizes]
    with torch.no_grad():
        expected = [greedy_tokens(model, masks, *prompt) for prompt in prompts]
        causal = [greedy_tokens(model, [Causal()] * len(masks), *prompt) for prompt in prompts]
    assert expected != causal, "the mask changes no token, so the test cannot fail"
    monkeypatch.setattr(models, "layer_masks", lambda model: masks)
    with Inference(model, None, **(FEW_GRAPHS if compiled else SIZES)) as engine:
        assert engine.runner.compiled == compiled
        token_ids, lengths = zip(*prompts)
        outputs = engine.generate(list(token_ids), [greedy(length) for length in lengths], use_tqdm=False)
        assert tokens_of(outputs) == expected
        engine.check_invariants()
