"""Which logits a request's parameters change, and by how much. Knows no model and no other request."""

from dataclasses import dataclass

import numpy as np

from flex_nano_vllm.sampling_params import SamplingParams


@dataclass(frozen=True)
class LogitEdits:
    """Changes of single logits of a row: `bias` is added, then the logit is divided by `divisor` (multiplied if it is
    negative), then `penalty` is subtracted. All [M]; no token comes twice."""

    token_ids: np.ndarray
    bias: np.ndarray
    divisor: np.ndarray
    penalty: np.ndarray


class Penalties:
    """The edits of one output, kept up to date token by token, so that a step's work does not grow with the text.

    A line for each token that may ever be edited: those of `logit_bias`, those that end the output if there are
    `min_tokens`, and those of prompt and output as far as they are penalised.

    Args:
        ends: the tokens that end the output.
        max_output_len: the most tokens that the output can have.
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
        """Count what is new in an output, given prompt and output."""
        if self.params.penalises:
            for token_id in token_ids[num_prompt_tokens + self._num_taken :]:
                line = self._line_of.setdefault(token_id, self._num_lines)
                self._num_lines = max(self._num_lines, line + 1)
                self._token_ids[line] = token_id
                self._is_known[line] = True
                self._counts[line] += 1
                self._num_taken += 1

    def edits(self, may_end: bool) -> LogitEdits | None:
        """What changes for the next token; None for nothing. `may_end`: whether the output may end with it."""
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
