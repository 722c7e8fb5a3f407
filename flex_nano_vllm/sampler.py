"""Logits to token ids and log-probabilities. Knows nothing of sequences or of stopping."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from flex_nano_vllm.penalties import LogitEdits
from flex_nano_vllm.transfer import upload

NOT_FINITE = -1


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) that depends on nothing but (seed, position): the 53 leading bits of a hash.

    A running generator would depend on how many numbers others have drawn from it, and on whether a preempted request
    draws twice.
    """
    digest = hashlib.blake2b(f"{seed}:{position}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "big") >> 11) / 2**53


@dataclass(frozen=True)
class Draw:
    """How the token of one row is chosen. The default is the plain argmax."""

    temperature: float = 0.0  # 0: the argmax
    u: float = 0.0  # in [0, 1): which token of the distribution
    top_k: int = 0  # 0: of all
    top_p: float = 1.0
    min_p: float = 0.0
    edits: LogitEdits | None = None
    allowed: np.ndarray | None = None  # [ceil(V / 32)] int32: bit t % 32 of word t // 32 is set where token t may come

    @property
    def cuts(self) -> bool:
        """Whether tokens are cut off by their rank."""
        return self.temperature > 0 and (self.top_k > 0 or self.top_p < 1)


ARGMAX = Draw()


def choose(
    logits: Tensor,
    rows: Tensor,
    token_ids: Tensor,
    bias: Tensor,
    divisor: Tensor,
    penalty: Tensor,
    temperature: Tensor,
    u: Tensor,
    min_p: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    width: int,
) -> Tensor:
    """The tokens of S rows, with the edits [M] of (rows, token_ids). `width`: ranks that decide who is cut off, 0 if
    nobody is. What a compiler makes a graph of; the arguments are those of `Draw`."""
    edited = logits[rows, token_ids] + bias
    edited = torch.where(edited > 0, edited / divisor, edited * divisor) - penalty
    logits = logits.index_put((rows, token_ids), edited.to(logits.dtype))
    highest, likeliest = logits.max(dim=-1)
    # In float64: rounding in the sum over a vocabulary of 256,000 would shift the rare tokens.
    scaled = logits.double() / torch.where(temperature > 0, temperature, 1.0)[:, None]
    least = scaled.amax(dim=-1, keepdim=True) + min_p.log()[:, None]
    scaled = torch.where(scaled < least, -torch.inf, scaled)
    # Whoever is as likely as the last one stays too, here and below.
    if width > 0:
        ranked = scaled.topk(width).values  # [S, width]
        least = ranked.gather(1, top_k.clamp(1, width).long()[:, None] - 1)
        scaled = torch.where((top_k > 0)[:, None] & (scaled < least), -torch.inf, scaled)
    weight = (scaled - scaled.amax(dim=-1, keepdim=True)).exp()  # [S, V]
    if width > 0:
        probability = (ranked - ranked[:, :1]).exp() / weight.sum(dim=-1, keepdim=True)  # of what top_k has left
        before = probability.cumsum(dim=-1) - probability
        least = torch.where(before < top_p[:, None], ranked, torch.inf).amin(dim=-1, keepdim=True)
        weight = torch.where((top_p < 1)[:, None] & (scaled < least), 0, weight)
    cumulative = weight.cumsum(dim=-1)  # [S, V]
    exceeded = u[:, None] * cumulative[:, -1:]
    drawn = torch.searchsorted(cumulative, exceeded, right=True).squeeze(1).clamp(max=logits.shape[-1] - 1)
    return torch.where(highest.isfinite(), torch.where(temperature > 0, drawn, likeliest), NOT_FINITE)


def sample(logits: Tensor, draws: list[Draw], choose: Callable[..., Tensor] = choose) -> Tensor:
    """Choose a token for each row.

    A row of temperature 0 takes its argmax (the lowest id among equals). Any other takes the first token at which the
    cumulative probability of its distribution exceeds the row's u: the inverse of the distribution.

    Args:
        logits: [S, V].
        draws: S of them.
        choose: the function of that name, or what a compiler has made of it.
    Returns:
        [S] token ids, NOT_FINITE where a row has a NaN or an infinite maximum, or where no token is allowed: such a
        request fails, others go on.
    """
    if all(draw is ARGMAX for draw in draws):
        highest, tokens = logits.max(dim=-1)
        return torch.where(highest.isfinite(), tokens, NOT_FINITE)
    num_rows, vocabulary = logits.shape
    # A copy in any case: a view, or a dimension of size 1, would be a graph of its own.
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32), copy=True)
    if num_rows == 1:
        logits, draws = logits.repeat(2, 1), draws * 2
    logits = _only_allowed(logits, draws)
    width = 0
    if any(draw.cuts for draw in draws):
        width = min(vocabulary, max(2, *(draw.top_k or vocabulary for draw in draws if draw.cuts)))
    names = ("temperature", "u", "min_p", "top_k", "top_p")
    per_row = [np.array([getattr(draw, name) for draw in draws], dtype=np.float64) for name in names]
    arrays = upload([*_edits(draws), *per_row], logits.device, np.float64)
    rows, token_ids = (array.long() for array in arrays[:2])
    return choose(logits, rows, token_ids, *arrays[2:], width)[:num_rows]


def _only_allowed(logits: Tensor, draws: list[Draw]) -> Tensor:
    """Logits with -inf where a token is not allowed. A row that is not finite anywhere stays so."""
    rows = np.array([row for row, draw in enumerate(draws) if draw.allowed is not None], dtype=np.int64)
    if not len(rows):
        return logits
    words = np.stack([draws[row].allowed for row in rows])
    rows, words = upload([rows, words], logits.device)
    restricted = logits[rows]
    bits = words[:, :, None] >> torch.arange(32, device=logits.device) & 1  # [rows, words, 32]
    allowed = bits.flatten(1)[:, : logits.shape[1]] > 0
    is_sound = restricted.amax(dim=-1, keepdim=True).isfinite()
    restricted = torch.where(is_sound, torch.where(allowed, restricted, -torch.inf), torch.nan)
    return logits.index_put((rows,), restricted)


def _edits(draws: list[Draw]) -> list[np.ndarray]:
    """Rows, token ids, biases, divisors and penalties of all edits, [M] each, at least two."""
    parts = [
        (row, draw.edits) for row, draw in enumerate(draws) if draw.edits is not None and len(draw.edits.token_ids)
    ]
    if not parts:  # no edit is an edit that changes nothing
        zero = np.zeros(2)
        return [zero, zero, zero, zero + 1, zero]
    rows = np.repeat([row for row, _ in parts], [len(edits.token_ids) for _, edits in parts])
    names = ("token_ids", "bias", "divisor", "penalty")
    arrays = [rows, *(np.concatenate([getattr(edits, name) for _, edits in parts]) for name in names)]
    return arrays if len(rows) > 1 else [np.repeat(array, 2) for array in arrays]


def logprobs_of(logits: Tensor, token_ids: Tensor, num_top: int) -> Tensor:
    """How likely tokens are, and which would have been most likely.

    Args:
        logits: [L, V].
        token_ids: [L].
    Returns:
        [L, 2 + 2 * num_top] float64: the token's log-probability and rank (1: the most likely), then the ids of the
        most likely tokens, then their log-probabilities.
    """
    logprobs = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(dim=-1)
    own = logprobs.gather(1, token_ids[:, None])
    rank = (logprobs > own).sum(dim=-1, keepdim=True) + 1
    top = logprobs.topk(num_top)
    return torch.cat([own.double(), rank.double(), top.indices.double(), top.values.double()], dim=1)
