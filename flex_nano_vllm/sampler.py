"""Logits to token ids. Knows nothing of sequences or of stopping."""

import hashlib

import torch
from torch import Tensor

NOT_FINITE = -1


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) that depends on nothing but (seed, position): the 53 leading bits of a hash.

    A running generator would depend on how many numbers others have drawn from it, and on whether a preempted request
    draws twice.
    """
    digest = hashlib.blake2b(f"{seed}:{position}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "big") >> 11) / 2**53


def sample(logits: Tensor, temperatures: list[float], uniforms: list[float]) -> list[int]:
    """Draw a token for each row.

    A row of temperature 0 takes its argmax (the lowest id among equals). Any other takes the first token at which the
    cumulative probability of softmax(logits / temperature) exceeds the row's number: the inverse of its distribution.

    Args:
        logits: [C, V].
        temperatures: C numbers >= 0.
        uniforms: C numbers in [0, 1); ignored where the temperature is 0.
    Returns:
        C token ids, NOT_FINITE where a row has a NaN or an infinite maximum: such a request fails, others go on.
    """
    highest, tokens = logits.max(dim=-1)  # [C]
    drawn = [row for row, temperature in enumerate(temperatures) if temperature > 0]
    if drawn:
        # In float64: rounding in the sum over a vocabulary of 256,000 would shift the rare tokens.
        scale = torch.tensor([temperatures[row] for row in drawn], dtype=torch.float64, device=logits.device)
        level = torch.tensor([uniforms[row] for row in drawn], dtype=torch.float64, device=logits.device)
        cumulative = (logits[drawn].double() / scale[:, None]).softmax(dim=-1).cumsum(dim=-1)  # [drawn, V]
        level = level[:, None] * cumulative[:, -1:]  # the last entry is 1 up to rounding
        token = torch.searchsorted(cumulative, level, right=True).squeeze(1)
        tokens[drawn] = token.clamp(max=logits.shape[-1] - 1)
    tokens = torch.where(highest.isfinite(), tokens, NOT_FINITE)
    return tokens.tolist()  # here the host waits for the step
