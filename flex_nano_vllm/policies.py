"""Policies: the order in which requests are admitted and preempted. Independent of pages.

The policies differ in which requests come before a request, and so in whether it can starve:
- "fcfs": older requests. No request starves.
- "priority": requests with a smaller `SamplingParams.priority`, and older ones with an equal priority. A request can
  starve while requests with a smaller priority keep arriving.
- "sjf": requests with fewer tokens (those of the prompt and `max_tokens` together), and older ones with equally many. A
  long request can starve while shorter ones keep arriving.
- A function that returns a number, or a tuple of numbers, for a `Sequence`: requests with a smaller result, and older
  ones with an equal result. It is called once for each request, so that keys never change.
"""

from collections.abc import Callable
from numbers import Real

from flex_nano_vllm.sampling_params import InvalidRequestError, shortened
from flex_nano_vllm.sequence import Sequence

Policy = str | Callable[[Sequence], float | tuple[float, ...]]
POLICIES: dict[str, Callable[[Sequence], float]] = {
    "fcfs": lambda sequence: 0,
    "priority": lambda sequence: sequence.params.priority,
    "sjf": lambda sequence: sequence.max_total_tokens,
}


def queue_key(policy: Policy) -> Callable[[Sequence], tuple[float, ...]]:
    """Return the function that computes the `queue_key` of a sequence. All of its results can be compared.

    Raises ValueError for an unknown policy. The function raises ValueError if a policy function returns anything but
    numbers, and for a `priority` that the policy would ignore.
    """
    if not callable(policy) and policy not in [*POLICIES]:
        names = ", ".join(map(repr, POLICIES))
        raise ValueError(f"policy must be one of {names}, or a function of a sequence, got {shortened(policy)}")

    def key_of(sequence: Sequence) -> tuple[float, ...]:
        if sequence.params.priority and policy in ("fcfs", "sjf"):
            message = f"priority={sequence.params.priority} needs policy='priority', but the engine has {policy!r}"
            raise InvalidRequestError(message, "priority")
        key = policy(sequence) if callable(policy) else POLICIES[policy](sequence)
        numbers = key if isinstance(key, tuple) else (key,)
        if not all(isinstance(number, Real) and number == number for number in numbers):  # NaN cannot be ordered
            raise ValueError(f"the policy function must return a number or a tuple of numbers, got {shortened(key)}")
        return numbers

    return key_of
