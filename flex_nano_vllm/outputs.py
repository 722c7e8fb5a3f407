"""Results that the engine returns. Independent of how they are computed."""

from dataclasses import dataclass
from typing import NamedTuple

from flex_nano_vllm.metrics import RequestMetrics


@dataclass(frozen=True)
class RequestError:
    """The reason why a request ended with finish_reason "error"."""

    message: str
    param: str | None = None  # the request parameter that caused it; None: the model or the engine caused it


class Logprob(NamedTuple):
    """Log-probability of a token, computed from the logits of the model before sampling parameters change them."""

    logprob: float  # natural logarithm
    rank: int  # 1: the most likely token
    decoded_token: str | None  # None if the engine has no tokenizer; `bytes:\\xf0` for a part of a character
    token_bytes: bytes | None = None  # what the token adds to the text; b"" for a skipped special token


@dataclass(frozen=True)
class CompletionOutput:
    """One completion of a prompt."""

    index: int
    text: str | None  # None if the engine has no tokenizer
    token_ids: list[int]  # every generated token, including a final EOS or stop token
    finish_reason: str  # "stop", "length", "abort" or "error"
    stop_reason: int | str | None = None  # the stop token or stop string that was found; None for an EOS
    cumulative_logprob: float | None = None  # sum over the tokens; None unless `logprobs` is set
    logprobs: list[dict[int, Logprob]] | None = None  # by token id: the token, and the most likely tokens
    error: RequestError | None = None  # set with finish_reason "error"


@dataclass(frozen=True)
class RequestOutput:
    """The output of one request, with the fields of vLLM: `output.outputs[0].text`."""

    request_id: int
    prompt: str | None  # None if the caller passed token ids
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    metrics: RequestMetrics
    num_cached_tokens: int  # prompt tokens that were cache hits
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None  # None for the first token
    finished: bool = True

    def __getitem__(self, name: str) -> object:
        """Return `output["text"]` or `output["token_ids"]` of the first completion, as in nano-vllm."""
        if name not in ("text", "token_ids"):
            raise KeyError(name)
        return getattr(self.outputs[0], name)


@dataclass(frozen=True)
class CompletionDelta:
    """New tokens and text of one completion since its previous delta.

    The concatenated texts of all deltas are the text of the completion.
    """

    request_id: int
    index: int
    text: str | None  # may be empty: part of a character or of a possible stop string is held back
    token_ids: list[int]
    logprobs: list[dict[int, Logprob]] | None = None
    finish_reason: str | None = None  # set in the last delta of each completion
    stop_reason: int | str | None = None
    error: RequestError | None = None
