"""What a user gets back. Knows nothing of how it was made."""

from dataclasses import dataclass
from typing import NamedTuple

from flex_nano_vllm.metrics import RequestMetrics


@dataclass(frozen=True)
class RequestError:
    """Why a request has ended with finish_reason "error"."""

    message: str
    param: str | None = None  # the parameter of the request that led to it; None: a fault of the model or the engine


class Logprob(NamedTuple):
    """How likely the model found a token, before sampling parameters changed that."""

    logprob: float  # natural logarithm
    rank: int  # 1: the most likely one
    decoded_token: str | None  # None where the engine has no tokenizer; `bytes:\\xf0` for a part of a character
    token_bytes: bytes | None = None  # what the token adds to the text, b"" for a special token that is skipped


@dataclass(frozen=True)
class CompletionOutput:
    """One completion of a prompt."""

    index: int
    text: str | None  # None where the engine has no tokenizer
    token_ids: list[int]  # every generated token, a final EOS or stop token included
    finish_reason: str  # "stop", "length", "abort" or "error"
    stop_reason: int | str | None = None  # the stop token or text that was met; None of an EOS
    cumulative_logprob: float | None = None  # of the tokens; None unless `logprobs` were asked for
    logprobs: list[dict[int, Logprob]] | None = None  # by token id: the token's own, and the most likely ones
    error: RequestError | None = None  # why there was no next token, with finish_reason "error"


@dataclass(frozen=True)
class RequestOutput:
    """The answer to one request, in vLLM's shape: `output.outputs[0].text`."""

    request_id: int
    prompt: str | None  # None where the caller gave token ids
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    metrics: RequestMetrics
    num_cached_tokens: int  # of the prompt, found computed by other requests
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None  # the first token's is None
    finished: bool = True

    def __getitem__(self, name: str) -> object:
        """`output["text"]` and `output["token_ids"]` of the first completion: nano-vllm's shape."""
        if name not in ("text", "token_ids"):
            raise KeyError(name)
        return getattr(self.outputs[0], name)


@dataclass(frozen=True)
class CompletionDelta:
    """What has come to one completion since the delta before it. Joined, the texts are the completion's."""

    request_id: int
    index: int
    text: str | None  # may be empty: part of a character, or of what may become a stop text, is held back
    token_ids: list[int]
    logprobs: list[dict[int, Logprob]] | None = None
    finish_reason: str | None = None  # of the last delta of each completion
    stop_reason: int | str | None = None
    error: RequestError | None = None
