"""Logit edits: which logits a request's parameters change, and how. Independent of the model and other requests."""

from dataclasses import dataclass

import numpy as np

from flex_nano_vllm.sampling_params import SamplingParams


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
