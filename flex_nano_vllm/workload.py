"""The benchmark's requests: the same ones for every engine, on every machine. Knows only the standard library."""

import hashlib
import json
import random
from dataclasses import dataclass


@dataclass(frozen=True)
class WorkloadRequest:
    """A prompt and the exact number of tokens to generate for it."""

    prompt_token_ids: tuple[int, ...]
    max_tokens: int


def make_workload(
    num_requests: int,
    prompt_lens: tuple[int, int],
    output_lens: tuple[int, int],
    token_ids: range,
    seed: int,
) -> list[WorkloadRequest]:
    """Requests with lengths and tokens drawn uniformly, both ends of a length range included.

    Drawn by `random.Random`, whose sequence Python keeps stable across versions and processes (`hash()` of a text is
    salted per process and would give every run its own workload).
    """
    rng = random.Random(seed)
    return [
        WorkloadRequest(
            prompt_token_ids=tuple(rng.choices(token_ids, k=rng.randint(*prompt_lens))),
            max_tokens=rng.randint(*output_lens),
        )
        for _ in range(num_requests)
    ]


def digest(requests: list[WorkloadRequest]) -> str:
    """A short name for the workload: runs may be compared when it is the same."""
    content = json.dumps([[request.prompt_token_ids, request.max_tokens] for request in requests])
    return hashlib.sha256(content.encode()).hexdigest()[:16]
