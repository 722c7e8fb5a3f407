"""A request on its way through the engine. Knows nothing of torch, pages or queues."""

import logging
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import numpy as np

from flex_nano_vllm.detokenizer import Detokenizer
from flex_nano_vllm.grammar import Follower
from flex_nano_vllm.metrics import RequestMetrics
from flex_nano_vllm.outputs import RequestError
from flex_nano_vllm.penalties import Penalties
from flex_nano_vllm.sampling_params import SamplingParams

logger = logging.getLogger(__name__)


class TokenLogprob(NamedTuple):
    """How likely the model found a token at its place."""

    logprob: float
    rank: int  # 1: the most likely
    top: list[tuple[int, float]]  # the most likely tokens and their log-probabilities


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
    stop_string_ids: frozenset[int] = frozenset()  # special tokens that are a stop string by themselves
    cache_salt: str | None = None  # shares pages with sequences of the same salt only
    text: Detokenizer | None = None  # of the output, where somebody follows it token by token
    allowed: np.ndarray | None = None  # bits of the tokens that may come, see `sampler.Draw`
    grammar: Follower | None = None  # says the same anew for each token
    num_computed_tokens: int = 0
    num_cached_tokens: int | None = None  # how many of the prompt's were found computed; None before its first step
    row: int | None = None  # of the page table, while running
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    error: RequestError | None = None  # why there is no next token
    logprobs: list[TokenLogprob] = field(default_factory=list)  # of the output, if `logprobs` were asked for
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)  # from the second token on, as far as computed
    metrics: RequestMetrics = field(default_factory=RequestMetrics)  # of the request: one for all of its samples
    # All samples of the request, in order, until all have ended: then nobody needs the circle, which only the collector
    # could free, and the collector comes late where there are as many objects as torch has.
    group: list["Sequence"] = field(default_factory=list, repr=False)

    def __post_init__(self):
        self.index = len(self.group)
        self.group.append(self)

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def output_token_ids(self) -> list[int]:
        return self.token_ids[self.num_prompt_tokens :]

    @property
    def output_len(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def stop_token_ids(self) -> frozenset[int]:
        """All tokens that end the output."""
        return self.eos_token_ids.union(self.params.stop_token_ids or (), self.stop_string_ids)

    @property
    def hidden_token_ids(self) -> frozenset[int]:
        """Tokens without text: those that end the output, unless the text is to show what ended it."""
        ends = self.eos_token_ids.union(self.params.stop_token_ids or ())
        return frozenset() if self.params.include_stop_str_in_output else ends

    @property
    def wants_prompt_logprobs(self) -> bool:
        """Whether its prompt's tokens are rated: of a request's samples the first one does that for all."""
        return self.params.prompt_logprobs is not None and self.index == 0

    @cached_property
    def penalties(self) -> Penalties | None:
        """What keeps account of the logits that its parameters change; None if there are none."""
        params = self.params
        if not (params.logit_bias or params.penalises or (params.min_tokens and self.stop_token_ids)):
            return None
        prompt = self.token_ids[: self.num_prompt_tokens]
        return Penalties(params, prompt, self.stop_token_ids, self.max_total_tokens - self.num_prompt_tokens)

    def allowed_tokens(self) -> np.ndarray | None:
        """Bits of the tokens that may come next, None if all may. Where the structure leaves none, no bit is set, and
        `error` says why: the request ends there."""
        if self.grammar is None:
            return self.allowed
        try:
            allowed = self.grammar.allowed(self.output_token_ids)
        except ValueError as error:
            logger.warning("request %s: its structure cannot be followed any further: %s", self.request_id, error)
            self._note(f"the structure cannot be followed after {self.output_len} tokens: {error}")
            return np.zeros(self.grammar.num_words, dtype=np.int32)
        if self.allowed is not None:
            allowed = allowed & self.allowed
            if not allowed.any():
                self._note(f"no token of allowed_token_ids continues the structure after {self.output_len} tokens")
        return allowed

    def _note(self, message: str) -> None:
        self.error = RequestError(message, "structured_outputs")

    def fail(self) -> None:
        """End for want of a next token. Where `allowed_tokens` has not said why, the model's numbers are the reason."""
        self.finish_reason = "error"
        self.error = self.error or RequestError("the model's numbers were not finite")

    def append(self, token_id: int) -> None:
        """Take a sampled token and see whether it was the last."""
        self.token_ids.append(token_id)
        if token_id in self.eos_token_ids:
            self.finish_reason = "stop"
        elif token_id in (self.params.stop_token_ids or ()):
            self.finish_reason, self.stop_reason = "stop", token_id
        elif self.num_tokens >= self.max_total_tokens:
            self.finish_reason = "length"
