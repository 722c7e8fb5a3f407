"""What a user asks for and gets back, and a request on its way. Knows nothing of torch, pages or queues."""

from dataclasses import dataclass, field, fields
from numbers import Real

from flex_nano_vllm.metrics import RequestMetrics

# Below this temperature the softmax is a spike: sampling is argmax (vLLM draws the line at the same value).
GREEDY_BELOW = 1e-5
MAX_SEED = 2**63 - 1
MAX_SAMPLES = 16_384  # vLLM's limit: more of them are a mistake, or an attack


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How to draw the next token and when to stop. Names and defaults are vLLM's.

    Implemented: `n` (samples of one prompt), `temperature` (0 is greedy), `seed`, `max_tokens` (None: as many as fit),
    `ignore_eos`. Any other parameter set to something else than its default raises `NotImplementedError` by name:
    nothing is accepted and ignored. A value out of range raises `ValueError`, and so do several greedy samples, which
    would all be the same.

    With a `seed`, the token drawn at a position depends on (seed, position, distribution) alone: never on the batch,
    the order of arrival, preemption or the page size. Sample i of a request is what another one gets with `seed + i`.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool = False
    max_tokens: int | None = 16
    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] | None = None
    allowed_token_ids: list[int] | None = None
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False

    _IMPLEMENTED = ("n", "temperature", "seed", "ignore_eos", "max_tokens")

    def __post_init__(self):
        for parameter in fields(self):
            value = getattr(self, parameter.name)
            is_default = value == parameter.default and isinstance(value, bool) == isinstance(parameter.default, bool)
            if parameter.name not in self._IMPLEMENTED and not is_default:
                raise NotImplementedError(f"SamplingParams({parameter.name}={value!r}) is not implemented yet")
        temperature = self.temperature
        if isinstance(temperature, bool) or not isinstance(temperature, Real) or not 0 <= temperature <= 2:
            raise ValueError(f"temperature must be a number in [0, 2], got {temperature!r}")
        if not (_is_int(self.n) and 1 <= self.n <= MAX_SAMPLES):
            raise ValueError(f"n must be an int in [1, {MAX_SAMPLES}], got {self.n!r}")
        if self.n > 1 and self.greedy:
            raise ValueError(f"n must be 1 with temperature=0, or all samples would be the same, got {self.n}")
        if self.max_tokens is not None and not (_is_int(self.max_tokens) and self.max_tokens >= 1):
            raise ValueError(f"max_tokens must be an int >= 1, or None for as many as fit, got {self.max_tokens!r}")
        if self.seed is not None and not (_is_int(self.seed) and 0 <= self.seed <= MAX_SEED):
            raise ValueError(f"seed must be None or an int in [0, 2**63 - 1], got {self.seed!r}")
        if not isinstance(self.ignore_eos, bool):
            raise ValueError(f"ignore_eos must be a bool, got {self.ignore_eos!r}")

    @property
    def greedy(self) -> bool:
        return self.temperature < GREEDY_BELOW


@dataclass(frozen=True)
class CompletionOutput:
    """One completion of a prompt."""

    index: int
    text: str | None  # special tokens left out; None where the engine has no tokenizer
    token_ids: list[int]  # every generated token, a final EOS included
    finish_reason: str  # "stop" (EOS), "length", "abort" or "error" (the logits were not finite)


@dataclass(frozen=True)
class RequestOutput:
    """The answer to one request, in vLLM's shape: `output.outputs[0].text`."""

    request_id: int
    prompt: str | None  # None where the caller gave token ids
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    metrics: RequestMetrics
    num_cached_tokens: int  # of the prompt, found computed by other requests


@dataclass(eq=False)
class Sequence:
    """A sample of a request on its way; of most requests the only one.

    `token_ids` is the prompt and what was generated; `num_computed_tokens` of them have their keys and values
    in the pool. Each step lets the second catch up with the first: a decode is a sequence one token behind, a
    prefill is one many tokens behind, a preempted sequence has computed nothing and holds nothing.
    """

    request_id: int
    prompt: str | None
    token_ids: list[int]
    num_prompt_tokens: int
    params: SamplingParams
    seed: int  # params.seed, or one drawn at arrival
    eos_token_ids: frozenset[int]  # empty with ignore_eos
    max_total_tokens: int  # prompt + output, as far as max_tokens, the model and the pool allow
    cache_salt: str | None = None  # shares pages with sequences of the same salt only
    num_computed_tokens: int = 0
    num_cached_tokens: int | None = None  # how many of the prompt's were found computed; None before its first step
    row: int | None = None  # of the page table, while running
    finish_reason: str | None = None
    metrics: RequestMetrics = field(default_factory=RequestMetrics)  # of the request: one for all of its samples
    group: list["Sequence"] = field(default_factory=list, repr=False)  # all samples of the request, in order

    def __post_init__(self):
        self.group.append(self)

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def output_token_ids(self) -> list[int]:
        return self.token_ids[self.num_prompt_tokens :]

    def append(self, token_id: int) -> None:
        """Take a sampled token and see whether it was the last."""
        self.token_ids.append(token_id)
        if token_id in self.eos_token_ids:
            self.finish_reason = "stop"
        elif self.num_tokens >= self.max_total_tokens:
            self.finish_reason = "length"
