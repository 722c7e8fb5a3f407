"""Engines, workloads and injected faults that several test files share."""

import bisect
import copy
import functools
import inspect
import itertools
import math
import os
import random
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import torch
from hypothesis import HealthCheck, settings
from tiny_models import CONFIGS, VOCABULARY, tiny_model
from torch._dynamo.utils import counters
from transformers import AutoModelForCausalLM

from benchmarks.random_models import BYTE_VOCABULARY
from flex_nano_vllm import SamplingParams
from flex_nano_vllm.masks import Causal, LayerMask, SlidingWindow
from flex_nano_vllm.sampler import NOT_FINITE
from flex_nano_vllm.sequence import Sample, Sequence
from flex_nano_vllm.step import StepBatch, StepVectors, TiledQueries, TileLayout, num_pages

# Settings of both state machines, whose steps take long
MACHINE = dict(
    stateful_step_count=40,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
SIZES = dict(max_batch_size=3, max_seq_length=32, n_pages=25, page_size=4, compile=False)
# Seven usable pages for sequences of up to 4, 2 and 4 pages, in steps of at most 8 tokens. This causes preemptions.
TIGHT = dict(SIZES, n_pages=8, max_num_batched_tokens=8, watermark=0)
# Tests that compile the small Gemma-2 share these sizes, so that later tests find the kernels of the first one on disk.
# The pool has room for the longest request alone, so that other requests are preempted.
COMPILED = dict(max_batch_size=5, page_size=16, n_pages=11, max_num_batched_tokens=80, watermark=0)
TEXTS = ["abcdefg", "hi", "xyz0123456"]
LENGTHS = [6, 3, 5]  # tokens of the outputs for TEXTS
MAX_STEPS = 200  # of any workload here; a workload with more steps hangs


def num_cases(in_ci):
    """Return how many random cases a test runs: `in_ci` in the profile `ci`, and more in others, see conftest.py."""
    return in_ci * settings().max_examples // settings.get_profile("ci").max_examples


def make_sequence(token_ids, request_id=0, max_total_tokens=None, **fields):
    """Return a sequence whose prompt is `token_ids`. By default it has one output token, and no token ends it."""
    return Sequence(
        request_id=request_id,
        prompt=None,
        token_ids=list(token_ids),
        num_prompt_tokens=len(token_ids),
        max_total_tokens=len(token_ids) + 1 if max_total_tokens is None else max_total_tokens,
        **dict(params=SamplingParams(), seed=0, eos_token_ids=frozenset()) | fields,
    )


def greedy(max_tokens):
    return SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)


def prompt_of(length, seed=0):
    return random.Random(1000 * seed + length).choices(range(3, VOCABULARY), k=length)


def byte_model():
    """Return a model with the vocabulary of the byte tokenizer, and the same weights on every call."""
    config = CONFIGS["gemma2"]()
    config.vocab_size = BYTE_VOCABULARY
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config, dtype=torch.float64, attn_implementation="eager").eval()


@functools.cache
def own_model(name):
    """Return a copy of the tiny Gemma-2 that only the engines of tests with this `name` patch."""
    return copy.deepcopy(tiny_model("gemma2"))


def samples_of(token_ids):
    """Return a `Sample` of one token for each of the tokens; -1: no token could be sampled."""
    return [Sample(None if token_id == -1 else [token_id]) for token_id in token_ids]


def tokens_of(outputs):
    return [output.outputs[0].token_ids for output in outputs]


def drain(engine, max_steps=MAX_STEPS):
    """Run steps until all requests are finished. Returns the outputs by request id."""
    outputs = {}
    for _ in range(max_steps):
        if not engine.has_unfinished_requests():
            return outputs
        for output in engine.run_one_step():
            assert output.request_id not in outputs, "a request was returned twice"
            outputs[output.request_id] = output
    raise AssertionError(f"requests are unfinished after {max_steps} steps")


def assert_empty(engine):
    engine.check_invariants()
    stats = engine.stats()
    assert (stats.num_running, stats.num_waiting, stats.num_used_pages) == (0, 0, 0)
    assert stats.num_free_pages == engine.page_table.num_usable_pages
    assert not engine.has_unfinished_requests()


@contextmanager
def device_tables_kept(kv):
    """Let a check of the page tables upload their changes, and undo the uploads afterwards.

    The device tables stay as outdated as they are in a run without checks. A deep copy for the check would take most
    of the time of a state machine.
    """
    kept = [(table, dict(vars(table))) for table in kv.pools.values()]
    for table, state in kept:
        for name, value in state.items():
            setattr(table, name, value.clone() if isinstance(value, torch.Tensor) else copy.copy(value))
    try:
        yield
    finally:
        for table, state in kept:
            vars(table).update(state)


def standard_python(module, program, **environment):
    """Run a program in a process after the contents of a module, with nothing but the standard library. Returns stdout.

    Importing the module from the package would also import torch and transformers, which takes seconds.
    """
    code = f"import runpy, sys; globals().update(runpy.run_path({module.__file__!r})); {program}"
    return subprocess.check_output([sys.executable, "-S", "-c", code], env=os.environ | environment, text=True)


def raise_at_call(monkeypatch, owner, name, number, exception, after=False):
    """Make the `number`-th call of `owner.name` raise, before its work or after it."""
    original = getattr(owner, name)
    calls = itertools.count(1)

    def call(*args, **kwargs):
        strikes = next(calls) == number
        if strikes and not after:
            raise exception("injected")
        result = original(*args, **kwargs)
        if strikes:
            raise exception("injected")
        return result

    is_bound = inspect.isclass(owner) and inspect.ismethod(original)  # a classmethod is already bound to its class
    monkeypatch.setattr(owner, name, staticmethod(call) if is_bound else call)


PROMPTS = [prompt_of(5), prompt_of(9), prompt_of(2)]


def inverse_cdf(logits, temperature, level):
    """The oracle of sampling: return a token, and the distance of `level` from the nearest boundary of a token.

    The token is the first at which the running sum of exp(logit / temperature) exceeds `level` times the total. The
    distance is in probability.
    """
    largest = max(logits)
    sums = list(itertools.accumulate(math.exp((logit - largest) / temperature) for logit in logits))
    token = bisect.bisect_right(sums, level * sums[-1])
    return token, min(abs(s / sums[-1] - level) for s in sums)


def token_of(logits, draw, changes, allowed, is_double, margin=1e-9):
    """The oracle of all changes to a distribution: return the token of a logits row, in the order of `SamplingParams`.

    Args:
        draw: its arrays `edits` and `allowed` are ignored, because they are given by the next arguments.
        changes: the logit edits, {token id: (bias, divisor, penalty)}.
        allowed: the set of allowed token ids; None: all tokens.
    Returns:
        NOT_FINITE if no token can be chosen; None if a probability is within `margin` of another result.
    """
    if any(math.isnan(logit) or logit == math.inf for logit in logits):
        return NOT_FINITE
    logits = [logit if allowed is None or i in allowed else -math.inf for i, logit in enumerate(logits)]
    for i, (bias, divisor, penalty) in changes.items():
        logit = logits[i] + bias
        logit = (logit / divisor if logit > 0 else logit * divisor) - penalty
        logits[i] = logit if is_double else float(np.float32(logit))
    highest = max(logits)
    if highest == -math.inf:
        return NOT_FINITE
    if draw.temperature == 0:
        return logits.index(highest)
    scaled = [logit / draw.temperature for logit in logits]
    weights = {i: math.exp(s - max(scaled)) for i, s in enumerate(scaled) if s > -math.inf}
    margins = [abs(weight - draw.min_p) for weight in weights.values() if draw.min_p > 0 and weight < 1]
    weights = {i: weight for i, weight in weights.items() if weight >= draw.min_p}
    if draw.top_k > 0:
        last = sorted((scaled[i] for i in weights), reverse=True)[: draw.top_k][-1]
        margins += [last - scaled[i] for i in weights if scaled[i] < last]
        weights = {i: weight for i, weight in weights.items() if scaled[i] >= last}
    if draw.top_p < 1:
        before, total, last = 0.0, math.fsum(weights.values()), math.inf
        for i in sorted(weights, key=lambda i: -scaled[i]):
            if before == 0 or scaled[i] < last:  # not a tie with the previous token
                margins += [abs(before / total - draw.top_p)] * (before > 0)
                if before / total >= draw.top_p:
                    break
            last = scaled[i]
            before += weights[i]
        margins += [last - scaled[i] for i in weights if scaled[i] < last]
        weights = {i: weight for i, weight in weights.items() if scaled[i] >= last}
    sums = list(itertools.accumulate(weights.values()))
    margins += [abs(s / sums[-1] - draw.u) for s in sums[:-1]]
    if min(margins, default=1) < margin:
        return None
    return next(i for i, s in zip(weights, sums) if s > draw.u * sums[-1])


@torch.no_grad()
def deficits(model, prompt, tokens):
    """Return, for each token, by how many nats Hugging Face's own choice is more likely, given the preceding tokens."""
    logits = model(torch.tensor([prompt + tokens], device=model.device)).logits[0, len(prompt) - 1 : -1]
    logprobs = logits.double().log_softmax(-1)
    return logprobs.amax(-1) - logprobs.gather(1, torch.tensor(tokens, device=model.device)[:, None])[:, 0]


def num_graphs() -> int:
    return counters["stats"]["unique_graphs"]


def dense_flex(query, key, value, score_mod=None, block_mask=None, scale=None, kernel_options=None):
    """Compute `flex_attention` as documented, with scores for every query and every slot.

    PyTorch's own uncompiled function is traced again for each size of the pool. This takes half a second in the first
    steps of a test.
    """
    batch, heads, rows, slots = *query.shape[:3], key.shape[2]
    b, h = torch.arange(batch)[:, None, None, None], torch.arange(heads)[:, None, None]
    q, kv = torch.arange(rows)[:, None], torch.arange(slots)
    # einsum multiplies all tiles with one pool. A product with broadcasting would copy the pool for each tile.
    scores = torch.einsum("bhqd,hkd->bhqk", query, key[0]) * scale
    if score_mod is not None:
        scores = score_mod(scores, b, h, q, kv)
    weights = scores.masked_fill(~block_mask.mask_mod(b, h, q, kv), -torch.inf).softmax(dim=-1)
    return torch.einsum("bhqk,hkd->bhqd", weights.nan_to_num(0), value[0])  # zeros for a query that sees nothing


def layer_mask(window: int | None) -> LayerMask:
    return Causal() if window is None else SlidingWindow(window)


def layout_of(kinds, num_kv_heads, group_size, windows, last_window, whole_pool, cascade=None):
    """Return the layout of a model whose layers have these windows."""
    masks, last = tuple(map(layer_mask, windows)), windows.index(last_window)
    return TileLayout(kinds, num_kv_heads, group_size, masks, (), last, whole_pool, cascade)


def build_step(chunks, kv, layout, packed=None):
    """Build the step of chunks whose pages are reserved. `packed`: decodes in packed tiles."""
    layout = replace(layout, tables=tuple(kv.table(mask.window) for mask in layout.masks))
    kv.sync()
    vectors, width = StepVectors.build(chunks, layout, kv.device), num_pages(chunks, kv.geometry.page_size)
    return StepBatch.build(vectors, width, layout, packed and TiledQueries.of_packed(packed, chunks, layout))


def windows_of(layout):
    return [mask.window for mask in layout.masks]


def visible_slots(batch, index):
    """Return the slots that the kernel visits and does not mask, for each token of a step. For layouts of one head."""
    seen = []
    zero = torch.zeros((), dtype=torch.int32)
    queries = batch.queries[index]
    in_tiles = queries.output_rows[:, 0].tolist()  # one head: each query row is a token
    for tiles in queries.tiles:
        mask = tiles.block_mask
        tile_len, page_size = mask.BLOCK_SIZE
        all_slots = torch.arange(mask.seq_lengths[1], dtype=torch.int32)
        page_at = range(len(all_slots) // page_size) if tiles.pages is None else tiles.pages.tolist()
        queries = torch.arange(tiles.query_rows.numel(), dtype=torch.int32)[:, None]
        allowed = mask.mask_mod(queries // tile_len, zero, queries % tile_len, all_slots[None]).tolist()
        masked = (mask.kv_num_blocks, mask.kv_indices)
        whole = (mask.full_kv_num_blocks, mask.full_kv_indices)
        for query in range(tiles.query_rows.numel()):
            slots = []
            for counts, lists in (masked, whole):
                pages = lists[query // tile_len, 0, 0, : counts[query // tile_len, 0, 0]].tolist()
                visited = [(page, offset) for page in pages for offset in range(page_size)]
                slots += [
                    page_at[page] * page_size + offset
                    for page, offset in visited
                    if lists is whole[1] or allowed[query][page * page_size + offset]
                ]
            seen.append(slots)
            is_padding = len(seen) - 1 not in in_tiles
            assert not (is_padding and any(allowed[query])), "a padding query sees a slot"
    return [seen[query] for query in in_tiles]
