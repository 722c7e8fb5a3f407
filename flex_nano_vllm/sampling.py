"""Samples tokens from the logits of a step, and computes log-probabilities. Independent of pages.

logits [W, V]: for each chunk the logits for the logprobs of its prompt tokens, then the logits of its last token
    ─► draws, one for each chunk ─► tokens
    ─► logprobs: of sampled tokens if `logprobs` is set, and of prompt tokens if `prompt_logprobs` is set
All results are copied to the host in one transfer, the only one from the device in a step.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from flex_nano_vllm.sampler import ARGMAX, Draw, logprobs_of, uniform
from flex_nano_vllm.scheduler import Chunk
from flex_nano_vllm.sequence import Sample, Sequence, TokenLogprob
from flex_nano_vllm.transfer import upload

# Logits rows for each call of `logprobs_of`: its float32 copies for a whole prompt would be several times the logits.
LOGPROB_ROWS_AT_ONCE = 128
MAX_TOP_K = 2**31  # larger than any vocabulary; an unlimited int could overflow a float


def draw_of(sequence: Sequence) -> Draw:
    """Return the draw for the next token of a sequence."""
    params, allowed = sequence.params, sequence.allowed_tokens()
    edits = None
    if sequence.penalties is not None:
        sequence.penalties.take(sequence.token_ids, sequence.num_prompt_tokens)
        may_end = sequence.output_len >= params.min_tokens or _has_to_end(sequence, allowed)
        edits = sequence.penalties.edits(may_end)
    if params.greedy:
        return ARGMAX if edits is None and allowed is None else Draw(edits=edits, allowed=allowed)
    return Draw(
        temperature=params.temperature,
        u=uniform(sequence.seed, sequence.num_tokens),
        top_k=min(max(0, params.top_k), MAX_TOP_K),
        top_p=params.top_p,
        min_p=params.min_p,
        edits=edits,
        allowed=allowed,
    )


def _has_to_end(sequence: Sequence, allowed: np.ndarray | None) -> bool:
    """Return whether the grammar allows stop tokens only, so that the output must end, even before `min_tokens`."""
    if sequence.grammar is None:
        return False
    others = np.unpackbits(allowed.view(np.uint8), bitorder="little")
    others[list(sequence.stop_token_ids)] = 0
    return not others.any()


def take_samples(logits: Tensor, chunks: list[Chunk], sample: Callable[[Tensor, list[Draw]], Tensor]) -> list[Sample]:
    """Return a `Sample` for each chunk, given the logits [W, V] of the step.

    `sample` is `sampler.sample` or `ModelRunner.sample`.
    """
    draws = [draw_of(chunk.sequence) if chunk.needs_sample else ARGMAX for chunk in chunks]
    with_logprobs = [
        index for index, chunk in enumerate(chunks) if chunk.needs_sample and chunk.sequence.params.logprobs is not None
    ]
    if not with_logprobs and not any(chunk.logprob_positions for chunk in chunks):
        return [Sample(_tokens(token_id)) for token_id in sample(logits, draws).tolist()]

    num_logits = np.array([chunk.num_logits for chunk in chunks])
    ends = np.cumsum(num_logits) - 1
    firsts = ends + 1 - num_logits
    prompt_rows = [firsts[i] + j for i, chunk in enumerate(chunks) for j in range(len(chunk.logprob_positions))]
    prompt_tokens = [chunk.sequence.token_ids[position + 1] for chunk in chunks for position in chunk.logprob_positions]
    asked = [chunk.sequence.params for chunk in chunks]
    num_top = max(params.logprobs or 0 for params in asked), max(params.prompt_logprobs or 0 for params in asked)
    arrays = [np.array(numbers, dtype=np.int64) for numbers in (ends, with_logprobs, prompt_rows, prompt_tokens)]
    ends, logprob_rows, prompt_rows, prompt_tokens = upload(arrays, logits.device)
    at_ends = logits[ends]
    tokens = sample(at_ends, draws)
    parts = [tokens.double(), _rate(at_ends, logprob_rows, tokens[logprob_rows].clamp(min=0), num_top[0])]
    parts.append(_rate(logits, prompt_rows, prompt_tokens, num_top[1]))
    numbers = torch.cat([part.flatten() for part in parts]).cpu().numpy()  # here the host waits for the step
    token_ids, *numbers = np.split(numbers, np.cumsum([part.numel() for part in parts[:2]]))
    of_tokens, of_prompts = (iter(rows.reshape(-1, 2 + 2 * k).tolist()) for rows, k in zip(numbers, num_top))

    samples = []
    for index, chunk in enumerate(chunks):
        params = chunk.sequence.params
        logprobs = (_token_logprob(next(of_tokens), params.logprobs),) if index in with_logprobs else ()
        prompt_logprobs = tuple(
            _token_logprob(next(of_prompts), params.prompt_logprobs) for _ in chunk.logprob_positions
        )
        samples.append(Sample(_tokens(int(token_ids[index])), logprobs, prompt_logprobs))
    return samples


def _tokens(token_id: int) -> list[int] | None:
    """Return the tokens of a `Sample`, given a result of `sampler.sample`, which is negative if there is no token."""
    return None if token_id < 0 else [token_id]


def _rate(logits: Tensor, rows: Tensor, token_ids: Tensor, num_top: int) -> Tensor:
    """Apply `logprobs_of` to the given logits rows, `LOGPROB_ROWS_AT_ONCE` rows at a time."""
    parts = zip(rows.split(LOGPROB_ROWS_AT_ONCE), token_ids.split(LOGPROB_ROWS_AT_ONCE))
    return torch.cat([logprobs_of(logits[some], tokens, num_top) for some, tokens in parts])


def _token_logprob(numbers: list[float], num_top: int) -> TokenLogprob:
    logprob, rank, *top = numbers
    half = len(top) // 2
    return TokenLogprob(
        logprob, int(rank), [(int(i), value) for i, value in zip(top[:num_top], top[half : half + num_top])]
    )
