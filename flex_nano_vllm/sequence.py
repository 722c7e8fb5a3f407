"""The state of one sample of a request, and its logit edits. Independent of torch, pages and queues."""

import logging
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import numpy as np

from flex_nano_vllm.detokenizer import Detokenizer
from flex_nano_vllm.grammar import Follower, has_others
from flex_nano_vllm.outputs import RequestError, RequestMetrics
from flex_nano_vllm.sampling_params import SamplingParams

logger = logging.getLogger(__name__)


class TokenLogprob(NamedTuple):
    """Log-probability and rank of a token at its position, with the most likely alternatives."""

    logprob: float
    rank: int  # 1 for the most likely token
    top: list[tuple[int, float]]  # the most likely tokens at this position and their log-probabilities


class Sample(NamedTuple):
    """What a step has computed for a chunk: the tokens that follow it, and log-probabilities."""

    token_ids: list[int] | None  # None: no token could be sampled (values were not finite, or no token was allowed)
    logprobs: tuple[TokenLogprob, ...] = ()  # of these tokens, if `logprobs` is set
    prompt_logprobs: tuple[TokenLogprob, ...] = ()  # of prompt tokens, in prompt order


@dataclass(frozen=True)
class LogitEdits:
    """Changes of single logits of one logits row, all [M]. Each token occurs at most once.

    `bias` is added, then the logit is divided by `divisor` (multiplied if it is negative), then `penalty` is
    subtracted.
    """

    token_ids: np.ndarray
    bias: np.ndarray
    divisor: np.ndarray
    penalty: np.ndarray


class Penalties:
    """The logit edits of one sequence, updated token by token, so that a step does not count the whole output again.

    The arrays have a line for each token that can be edited: tokens in `logit_bias`, stop tokens if `min_tokens` is
    set, prompt tokens if `repetition_penalty` is set, and output tokens if any penalty is set.

    Args:
        ends: the tokens that end the output.
        max_output_len: the largest number of output tokens.
    """

    def __init__(self, params: SamplingParams, prompt: list[int], ends: frozenset[int], max_output_len: int):
        self.params = params
        bias = params.logit_bias or {}
        repeated = prompt if params.repetition_penalty != 1 else []
        ends = ends if params.min_tokens else ()
        lines = np.unique(np.array([*bias, *ends, *repeated], dtype=np.int64))
        size = len(lines) + (max_output_len if params.penalises else 0)
        self._num_lines, self._line_of = len(lines), {token_id: line for line, token_id in enumerate(lines.tolist())}
        self._token_ids, self._bias, self._counts = np.zeros(size, np.int64), np.zeros(size), np.zeros(size)
        self._is_known, self._is_end = np.zeros(size, bool), np.zeros(size, bool)
        self._token_ids[: len(lines)] = lines
        self._bias[[self._line_of[token_id] for token_id in bias]] = list(bias.values())
        self._is_end[[self._line_of[token_id] for token_id in ends]] = True
        self._is_known[: len(lines)] = np.isin(lines, repeated)
        self._num_taken = 0

    def take(self, token_ids: list[int], num_prompt_tokens: int) -> None:
        """Count the new output tokens. `token_ids` are the tokens of prompt and output."""
        if self.params.penalises:
            for token_id in token_ids[num_prompt_tokens + self._num_taken :]:
                line = self._line_of.setdefault(token_id, self._num_lines)
                self._num_lines = max(self._num_lines, line + 1)
                self._token_ids[line] = token_id
                self._is_known[line] = True
                self._counts[line] += 1
                self._num_taken += 1

    def edits(self, may_end: bool) -> LogitEdits | None:
        """Return the edits for the next token, or None. `may_end`: the next token may be a stop token."""
        params, lines = self.params, slice(self._num_lines)
        if may_end and not params.logit_bias and not params.penalises:
            return None
        counts = self._counts[lines]
        return LogitEdits(
            token_ids=self._token_ids[lines],
            bias=self._bias[lines] if may_end else np.where(self._is_end[lines], -np.inf, self._bias[lines]),
            divisor=np.where(self._is_known[lines], params.repetition_penalty, 1.0),
            penalty=params.frequency_penalty * counts + params.presence_penalty * (counts > 0),
        )


@dataclass(eq=False)
class Sequence:
    """One sample of a request; most requests have only one.

    `token_ids` contains the prompt and the generated tokens. The keys and values of the first `num_computed_tokens`
    of them are computed. Each step advances `num_computed_tokens` towards `num_tokens`: a decode has one token left to
    compute, and a prefill has several. A preempted sequence has no computed tokens, no row and no pages.
    """

    request_id: int
    prompt: str | None
    token_ids: list[int]
    num_prompt_tokens: int
    params: SamplingParams
    seed: int  # params.seed, or one drawn on arrival, plus the index of the sample
    eos_token_ids: frozenset[int]  # empty with ignore_eos
    max_total_tokens: int  # limit of prompt + output, given by max_tokens, the model and the pool
    stop_string_ids: frozenset[int] = frozenset()  # special tokens whose text is a stop string
    queue_key: tuple[float, ...] = ()  # of the policy, equal for all samples of a request; smaller keys come first
    cache_salt: str | None = None  # pages are shared only between sequences with equal salts
    text: Detokenizer | None = None  # decodes the output token by token, for streams and stop strings
    allowed: np.ndarray | None = None  # bit mask of the allowed tokens, see `sampler.Draw`
    grammar: Follower | None = None  # computes such a bit mask for each next token
    num_computed_tokens: int = 0
    num_cached_tokens: int | None = None  # prompt tokens that were computed before its first step; None until then
    row: int | None = None  # of the page table; None unless running
    finish_reason: str | None = None  # "stop", "length", "error" or the reason given to `abort`; None: not ended
    stop_reason: int | str | None = None
    error: RequestError | None = None  # details of finish_reason "error"
    logprobs: list[TokenLogprob] = field(default_factory=list)  # of the output tokens, if `params.logprobs` is set
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)  # from the second prompt token on, if computed
    metrics: RequestMetrics = field(default_factory=RequestMetrics)  # of the request, shared by all of its samples
    # All samples of the request, in order. Replaced by an empty list when the request ends: the list and its members
    # refer to each other, so that only Python's cycle collector could free them, and the collector runs rarely in a
    # process with as many objects as torch creates.
    group: list["Sequence"] = field(default_factory=list, repr=False)

    def __post_init__(self):
        self.index = len(self.group)
        self.group.append(self)

    @property
    def place(self) -> tuple:
        """What the queues are sorted by: the key of the policy, then the order of arrival."""
        return self.queue_key, self.request_id, self.index

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
    def ending_token_ids(self) -> frozenset[int]:
        """All tokens that end the output: EOS tokens, stop tokens, and special tokens that are stop strings."""
        return self.eos_token_ids.union(self.params.stop_token_ids or (), self.stop_string_ids)

    @property
    def hidden_token_ids(self) -> frozenset[int]:
        """Tokens left out of the text: EOS tokens and stop tokens, unless `include_stop_str_in_output` is set."""
        ends = self.eos_token_ids.union(self.params.stop_token_ids or ())
        return frozenset() if self.params.include_stop_str_in_output else ends

    @property
    def wants_prompt_logprobs(self) -> bool:
        """Whether this sequence computes prompt logprobs. The first sample computes them for the whole request."""
        return self.params.prompt_logprobs is not None and self.index == 0

    @cached_property
    def penalties(self) -> Penalties | None:
        """Tracks the logit edits of this sequence; None if its parameters change no logits."""
        params = self.params
        if not (params.logit_bias or params.penalises or (params.min_tokens and self.ending_token_ids)):
            return None
        prompt = self.token_ids[: self.num_prompt_tokens]
        return Penalties(params, prompt, self.ending_token_ids, self.max_total_tokens - self.num_prompt_tokens)

    def allowed_tokens(self) -> np.ndarray | None:
        """Return the bit mask of the tokens that may come next, None if all may.

        If the structured output cannot continue, no bit is set and `error` has the reason. The sequence then fails.
        """
        if self.grammar is None:
            return self.allowed
        allowed, reason = self.grammar.allowed_of(self.token_ids, self.num_prompt_tokens, self.allowed)
        if reason is not None:
            logger.warning("request %s: %s", self.request_id, reason)
            self.error = RequestError(reason, "structured_outputs")
        return allowed

    def must_end(self, allowed: np.ndarray | None) -> bool:
        """Return whether the grammar allows stop tokens only, so that the output must end, even before `min_tokens`."""
        return self.grammar is not None and not has_others(allowed, self.ending_token_ids)

    def append(self, token_id: int, logprob: TokenLogprob | None = None) -> None:
        """Append a sampled token, and set `finish_reason` if it is the last one.

        The order of the checks: an EOS token ("stop"), a token in `params.stop_token_ids` ("stop"), `max_total_tokens`
        ("length"). Then `_detokenize` replaces the reason by "stop" if it finds a stop string, and by
        "error" if the text cannot be decoded.
        """
        self.token_ids.append(token_id)
        if logprob is not None:
            self.logprobs.append(logprob)
        if token_id in self.eos_token_ids:
            self.finish_reason = "stop"
        elif token_id in (self.params.stop_token_ids or ()):
            self.finish_reason, self.stop_reason = "stop", token_id
        elif self.num_tokens >= self.max_total_tokens:
            self.finish_reason = "length"
        self._detokenize()

    def fail(self) -> None:
        """End with finish_reason "error", because no next token could be sampled.

        If `allowed_tokens` has not set `error`, the reason is that values computed by the model were not finite.
        """
        self.error = self.error or RequestError("the model computed values that are not finite (NaN or infinite)")
        self.abort("error")

    def abort(self, reason: str) -> None:
        """End the output after the tokens so far."""
        self.finish_reason = reason
        self._detokenize()

    def _detokenize(self) -> None:
        """Decode the new tokens if there is a `Detokenizer`. A stop string or an error replaces the `finish_reason`."""
        if self.text is None:
            return
        try:
            if self.text.update(self.token_ids, self.finish_reason is not None, self.num_prompt_tokens):
                self.finish_reason, self.stop_reason = "stop", self.text.stop_reason
        except Exception:
            logger.exception("request %s: the text cannot be decoded", self.request_id)
            self.finish_reason, self.error = "error", RequestError("the text cannot be decoded")
