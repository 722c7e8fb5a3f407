"""Samples tokens from the logits of a step. Independent of pages and of the model.

logits [W, V]: for each chunk the logits for the logprobs of its prompt tokens, then the logits of its last token
    ─► draws, one for each chunk ─► weights [S, V] ─► tokens
    ─► logprobs: of sampled tokens if `logprobs` is set, and of prompt tokens if `prompt_logprobs` is set
All results are copied to the host in one transfer, the only one from the device in a step.
"""

import hashlib
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from flex_nano_vllm.compiling import UNGUARDED, compile_settings, inductor
from flex_nano_vllm.device import upload
from flex_nano_vllm.geometry import cdiv
from flex_nano_vllm.logprobs import with_logprobs
from flex_nano_vllm.scheduler import Chunk
from flex_nano_vllm.sequence import LogitEdits, Sample, Sequence

NOT_FINITE = -1
# Weights are summed in float32 in blocks of this size, and the sums of blocks are added in float64. The rounding of
# a float32 sum over 256,000 tokens would change the probabilities of rare tokens.
BLOCK = 512
BYTES_PER_LOGIT = 16  # most temporaries at once, for each logit of the rows that are sampled
MAX_TOP_K = 2**31  # larger than any vocabulary; an unlimited int could overflow a float


def uniform(seed: int, position: int) -> float:
    """Return a number in [0, 1) that depends only on (seed, position): the 53 leading bits of a hash.

    `position` counts the tokens of prompt and output. The state of a random generator would depend on the numbers drawn
    for other requests, and on those drawn in a failed step that is run again.
    """
    digest = hashlib.blake2b(f"{seed}:{position}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "big") >> 11) / 2**53


@dataclass(frozen=True)
class Draw:
    """How the token of one logits row is chosen. The default is the argmax.

    They apply in this order: allowed tokens, logit edits, temperature, min_p, top_k, top_p (of the weight that
    is left), `u`.
    """

    temperature: float = 0.0  # 0: the argmax
    u: float = 0.0  # in [0, 1): selects the token of the distribution
    top_k: int = 0  # 0: no limit
    top_p: float = 1.0
    min_p: float = 0.0
    edits: LogitEdits | None = None
    allowed: np.ndarray | None = None  # [ceil(V / 32)] int32: bit t % 32 of word t // 32 is set if token t is allowed


ARGMAX = Draw()


def draw_of(sequence: Sequence) -> Draw:
    """Return the draw for the next token of a sequence."""
    params, allowed = sequence.params, sequence.allowed_tokens()
    edits = None
    if sequence.penalties is not None:
        sequence.penalties.take(sequence.token_ids, sequence.num_prompt_tokens)
        may_end = sequence.output_len >= params.min_tokens or sequence.must_end(allowed)
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


class Sampler:
    """Gives each chunk of a step its sample.

    The search for the thresholds of `top_k` and `top_p` can be compiled: one graph for any number of logits rows. All
    else runs operator by operator.
    """

    def __init__(self, compiled: bool, device_type: str):
        self.max_graphs = int(compiled)
        self._threshold = threshold
        if compiled:
            options, backend = dict(UNGUARDED), inductor(device_type)
            self._threshold = torch.compile(threshold, fullgraph=True, dynamic=True, backend=backend, options=options)

    def __call__(self, logits: Tensor, chunks: list[Chunk]) -> list[Sample]:
        """Return a `Sample` for each chunk, given the logits [W, V] of the step."""
        draws = [draw_of(chunk.sequence) if chunk.needs_sample else ARGMAX for chunk in chunks]
        last = logits
        if len(logits) > len(chunks):
            (ends,) = upload([np.cumsum([chunk.num_logits for chunk in chunks]) - 1], logits.device)
            last = logits[ends]
        # Here the host waits for the step.
        samples = zip(*with_logprobs(self.choose(last, draws), logits, chunks))
        return [Sample(None if token_id == NOT_FINITE else [token_id], *logprobs) for token_id, *logprobs in samples]

    @torch.inference_mode(False)  # graphs distinguish tensors that are made in that mode
    @torch.no_grad()
    def choose(self, logits: Tensor, draws: list[Draw]) -> Tensor:
        """Choose a token for each logits row.

        With temperature 0 it is the argmax (the lowest id among equals). Otherwise it is the first token at which the
        cumulative probability exceeds the row's `u` (inverse transform sampling).

        Args:
            logits: [S, V].
            draws: one for each logits row.
        Returns:
            [S] token ids, NOT_FINITE where a logits row has a NaN or an infinite maximum, or no allowed token. Only the
            requests of such rows fail.
        """
        if all(draw is ARGMAX for draw in draws):
            highest, tokens = logits.max(dim=-1)
            return torch.where(highest.isfinite(), tokens, NOT_FINITE)
        num_rows, vocabulary = logits.shape
        # At least two rows: a size of 1 would need another graph. The tokens that fill the last block have no weight.
        shape = max(2, num_rows), cdiv(vocabulary, BLOCK) * BLOCK
        dtype = torch.promote_types(logits.dtype, torch.float32)
        weights = logits.new_full(shape, -torch.inf, dtype=dtype)
        weights[:num_rows, :vocabulary] = logits
        _forbid(weights, draws)
        _edit(weights, draws)
        draws = [*draws, ARGMAX][: shape[0]]
        numbers = [(draw.temperature, draw.u, draw.min_p, draw.top_k, draw.top_p) for draw in draws]
        arrays = [*np.array(numbers, dtype=np.float64).T]
        temperature, u, min_p, top_k, top_p = upload(arrays, logits.device, np.float64)

        # From here on in place: the likeliest tokens have a weight of 1, and the others are in proportion to it.
        highest, likeliest = weights.max(dim=-1)
        divisor = torch.where(temperature > 0, temperature, 1.0).to(dtype)
        weights.sub_(highest[:, None]).div_(divisor[:, None]).exp_()
        if any(draw.min_p for draw in draws):
            _drop_below(weights, min_p.to(dtype))
        has_k, has_p = any(draw.top_k for draw in draws), any(draw.top_p < 1 for draw in draws)
        with compile_settings(logits.device.type) if has_k or has_p else nullcontext():
            if has_k:
                quota = torch.where(top_k > 0, top_k, torch.inf)
                _drop_below(weights, self._threshold(weights, quota, torch.full((), True, device=logits.device)))
            if has_p:
                quota = torch.where(top_p < 1, top_p, torch.inf) * block_sums(weights).sum(dim=-1)
                _drop_below(weights, self._threshold(weights, quota, torch.full((), False, device=logits.device)))
        tokens = torch.where(temperature > 0, inverse_cdf(weights, u), likeliest)
        return torch.where(highest.isfinite(), tokens, NOT_FINITE)[:num_rows]

    def warmup(self, num_logits: int, device: torch.device) -> None:
        """Compile the graph for logits rows of `num_logits` tokens."""
        self.choose(torch.zeros(2, num_logits, device=device), [Draw(temperature=1.0, top_k=1)] * 2)


def block_sums(weights: Tensor) -> Tensor:
    """Return the sums [..., blocks], in float64, of blocks of `BLOCK` weights."""
    return weights.unflatten(-1, (-1, BLOCK)).sum(dim=-1).double()


def threshold(weights: Tensor, quota: Tensor, by_count: Tensor) -> Tensor:
    """Return [S], the lowest weight that is kept if the likeliest tokens are kept until they fill a quota.

    It is the smallest number x for which the tokens of weights above x do not fill the quota. So tokens of equal
    weights are kept together. Floats from 0 to 1 are in the order of their bits, and the search finds the bits of x,
    the highest first. Unlike sorting, it takes little memory.

    Args:
        weights: [S, blocks * BLOCK], from 0 to 1.
        quota: [S] float64, of the number of tokens (`by_count`), or of their weights.
        by_count: [] bool.
    """
    num_bits = 8 * weights.itemsize - 2
    as_int = torch.int32 if weights.itemsize == 4 else torch.int64
    # A compiled pass compares with three numbers in the time of one. Uncompiled, each comparison is a pass of its own.
    bits_per_pass = 2 if torch.compiler.is_compiling() else 1
    amounts = torch.where(by_count, 1, weights)
    low = torch.zeros(len(weights), dtype=as_int, device=weights.device)  # all numbers below are too small to be x
    for shift in range(num_bits - bits_per_pass, -1, -bits_per_pass):
        bounds = [low + (digit << shift) for digit in range(1, 1 << bits_per_pass)]
        for bound in bounds:
            is_above = weights > (bound - 1).view(weights.dtype)[:, None]
            low = torch.where(block_sums(torch.where(is_above, amounts, 0)).sum(dim=-1) >= quota, bound, low)
    return low.view(weights.dtype)


def inverse_cdf(weights: Tensor, u: Tensor) -> Tensor:
    """Return [S], the first token at which the cumulative weight [S, blocks * BLOCK] exceeds the share u [S] of all.

    The block is found first, then the token in it. A token without weight is never returned.
    """
    sums = block_sums(weights).cumsum(dim=-1)
    exceeded = u[:, None] * sums[:, -1:]
    block = torch.searchsorted(sums, exceeded, right=True).clamp(max=sums.shape[1] - 1)  # [S, 1]
    exceeded -= torch.nn.functional.pad(sums, (1, 0)).gather(1, block)
    blocks = weights.unflatten(1, (-1, BLOCK))
    inner = blocks[torch.arange(len(u), device=u.device), block.squeeze(1)].double().cumsum(dim=-1)  # [S, BLOCK]
    # The sum of the block in float32 may be larger than the sum here. So limit the weight that must be exceeded.
    exceeded = torch.minimum(exceeded, inner[:, -1:] * (1 - 2**-52))
    return (block * BLOCK + torch.searchsorted(inner, exceeded, right=True)).squeeze(1)


def _drop_below(weights: Tensor, least: Tensor) -> None:
    """Set the weights of tokens that weigh less than `least` [S] to 0."""
    weights.masked_fill_(weights < least[:, None], 0)


def _forbid(logits: Tensor, draws: list[Draw]) -> None:
    """Set the logits of tokens that are not allowed to -inf.

    A logits row with a NaN or an infinite maximum becomes NaN as a whole. Otherwise the row would not fail if the bad
    logit is that of a forbidden token.
    """
    rows = np.array([row for row, draw in enumerate(draws) if draw.allowed is not None], dtype=np.int64)
    if not len(rows):
        return
    octets = np.stack([draws[row].allowed.view(np.uint8) for row in rows])
    (rows,), (octets,) = upload([rows], logits.device), upload([octets], logits.device, np.uint8)
    restricted = logits[rows]
    is_sound = restricted.amax(dim=-1, keepdim=True).isfinite()
    bits = octets[:, :, None] >> torch.arange(8, dtype=torch.uint8, device=logits.device) & 1
    is_forbidden = bits.flatten(1) == 0  # [rows, ceil(V / 32) * 32]
    restricted[:, : is_forbidden.shape[1]].masked_fill_(is_forbidden, -torch.inf)
    logits[rows] = restricted.masked_fill_(~is_sound, torch.nan)


def _edit(logits: Tensor, draws: list[Draw]) -> None:
    """Apply the logit edits of all rows."""
    parts = [(row, draw.edits) for row, draw in enumerate(draws) if draw.edits is not None]
    if not parts:
        return
    rows = np.repeat([row for row, _ in parts], [len(edits.token_ids) for _, edits in parts])
    names = ("token_ids", "bias", "divisor", "penalty")
    arrays = [rows, *(np.concatenate([getattr(edits, name) for _, edits in parts]) for name in names)]
    rows, token_ids, bias, divisor, penalty = upload(arrays, logits.device, np.float64)
    indices = rows.long(), token_ids.long()
    edited = logits[indices] + bias
    edited = torch.where(edited > 0, edited / divisor, edited * divisor) - penalty
    logits[indices] = edited.to(logits.dtype)
