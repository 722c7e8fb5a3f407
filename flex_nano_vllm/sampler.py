"""Turns logits into token ids and log-probabilities. Independent of sequences and stop conditions."""

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
    """Return a number in [0, 1) that depends only on (seed, position): the 53 leading bits of a hash.

    The state of a random generator would depend on the numbers drawn for other requests, and on draws that are repeated
    after preemption.
    """
    digest = hashlib.blake2b(f"{seed}:{position}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "big") >> 11) / 2**53


@dataclass(frozen=True)
class Draw:
    """How the token of one logits row is chosen. The default is the argmax."""

    temperature: float = 0.0  # 0: the argmax
    u: float = 0.0  # in [0, 1): selects the token of the distribution
    top_k: int = 0  # 0: no limit
    top_p: float = 1.0
    min_p: float = 0.0
    edits: LogitEdits | None = None
    allowed: np.ndarray | None = None  # [ceil(V / 32)] int32: bit t % 32 of word t // 32 is set if token t is allowed

    @property
    def cuts(self) -> bool:
        """Whether `top_k` or `top_p` removes tokens by their rank."""
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
    """Choose tokens for S logits rows. `ModelRunner` compiles this function.

    Args:
        logits: [S, V].
        rows: [M], the logits row of each edit. `token_ids`, `bias`, `divisor` and `penalty` are [M] too.
        temperature: [S]. `u`, `min_p`, `top_k` and `top_p` are [S] too, see `Draw`.
        width: how many of the most likely tokens `top_k` and `top_p` consider; 0 if no row uses them.
    Returns:
        [S] token ids, NOT_FINITE where the maximum of the edited logits is not finite.
    """
    edited = logits[rows, token_ids] + bias
    edited = torch.where(edited > 0, edited / divisor, edited * divisor) - penalty
    logits = logits.index_put((rows, token_ids), edited.to(logits.dtype))
    highest, likeliest = logits.max(dim=-1)
    # float64, because rounding in a sum over 256,000 tokens would change the probabilities of rare tokens.
    scaled = logits.double() / torch.where(temperature > 0, temperature, 1.0)[:, None]
    least = scaled.amax(dim=-1, keepdim=True) + min_p.log()[:, None]
    scaled = torch.where(scaled < least, -torch.inf, scaled)
    # Ties with the last kept token are kept, here and below.
    if width > 0:
        ranked = scaled.topk(width).values  # [S, width]
        least = ranked.gather(1, top_k.clamp(1, width).long()[:, None] - 1)
        scaled = torch.where((top_k > 0)[:, None] & (scaled < least), -torch.inf, scaled)
    weight = (scaled - scaled.amax(dim=-1, keepdim=True)).exp()  # [S, V]
    if width > 0:
        probability = (ranked - ranked[:, :1]).exp() / weight.sum(dim=-1, keepdim=True)  # among tokens kept by top_k
        before = probability.cumsum(dim=-1) - probability
        least = torch.where(before < top_p[:, None], ranked, torch.inf).amin(dim=-1, keepdim=True)
        weight = torch.where((top_p < 1)[:, None] & (scaled < least), 0, weight)
    cumulative = weight.cumsum(dim=-1)  # [S, V]
    exceeded = u[:, None] * cumulative[:, -1:]
    drawn = torch.searchsorted(cumulative, exceeded, right=True).squeeze(1).clamp(max=logits.shape[-1] - 1)
    return torch.where(highest.isfinite(), torch.where(temperature > 0, drawn, likeliest), NOT_FINITE)


def sample(logits: Tensor, draws: list[Draw], choose: Callable[..., Tensor] = choose) -> Tensor:
    """Choose a token for each logits row.

    With temperature 0 it is the argmax (the lowest id among equals). Otherwise it is the first token at which the
    cumulative probability exceeds the row's `u` (inverse transform sampling).

    Args:
        logits: [S, V].
        draws: one for each logits row.
        choose: the function `choose`, or its compiled form.
    Returns:
        [S] token ids, NOT_FINITE where a logits row has a NaN or an infinite maximum, or no allowed token. Only the
        requests of such rows fail.
    """
    if all(draw is ARGMAX for draw in draws):
        highest, tokens = logits.max(dim=-1)
        return torch.where(highest.isfinite(), tokens, NOT_FINITE)
    num_rows, vocabulary = logits.shape
    # Always a copy: a view, or a dimension of size 1, would need another graph.
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
    """Set the logits of tokens that are not allowed to -inf.

    Among these logits rows, one whose maximum is not finite becomes NaN, so that it still fails.
    """
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
    """Return logits rows, token ids, biases, divisors and penalties of all edits: [M] each, M >= 2."""
    parts = [
        (row, draw.edits) for row, draw in enumerate(draws) if draw.edits is not None and len(draw.edits.token_ids)
    ]
    if not parts:  # two edits that change nothing
        zero = np.zeros(2)
        return [zero, zero, zero, zero + 1, zero]
    rows = np.repeat([row for row, _ in parts], [len(edits.token_ids) for _, edits in parts])
    names = ("token_ids", "bias", "divisor", "penalty")
    arrays = [rows, *(np.concatenate([getattr(edits, name) for _, edits in parts]) for name in names)]
    return arrays if len(rows) > 1 else [np.repeat(array, 2) for array in arrays]


def logprobs_of(logits: Tensor, token_ids: Tensor, num_top: int) -> Tensor:
    """Return log-probability and rank of one token for each logits row, and the most likely tokens.

    Args:
        logits: [S, V].
        token_ids: [S].
    Returns:
        [S, 2 + 2 * num_top] float64: the token's log-probability and rank (1: the most likely), then the ids of the
        `num_top` most likely tokens, then their log-probabilities.
    """
    logprobs = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(dim=-1)
    own = logprobs.gather(1, token_ids[:, None])
    rank = (logprobs > own).sum(dim=-1, keepdim=True) + 1
    top = logprobs.topk(num_top)
    return torch.cat([own.double(), rank.double(), top.indices.double(), top.values.double()], dim=1)
