"""Results that the engine returns, time stamps of requests, and counters. Independent of how they are computed."""

import time
from dataclasses import asdict, dataclass, field
from typing import NamedTuple


@dataclass(frozen=True)
class RequestError:
    """The reason why a request ended with finish_reason "error"."""

    message: str
    param: str | None = None  # the request parameter that caused it; None: the model or the engine caused it


@dataclass
class RequestMetrics:
    """Time stamps of one request, in seconds of `time.perf_counter()`. None if the event has not happened yet."""

    arrival_time: float = field(default_factory=time.perf_counter)
    first_scheduled_time: float | None = None
    first_token_time: float | None = None
    finished_time: float | None = None
    num_preemptions: int = 0

    @property
    def ttft(self) -> float | None:
        """Time to first token, in seconds from arrival. None before the first token."""
        return None if self.first_token_time is None else self.first_token_time - self.arrival_time

    def tpot(self, num_output_tokens: int) -> float | None:
        """Return the time per output token after the first, in seconds.

        None if the request is not finished or has fewer than two output tokens.
        """
        if self.first_token_time is None or self.finished_time is None or num_output_tokens < 2:
            return None
        return (self.finished_time - self.first_token_time) / (num_output_tokens - 1)


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


@dataclass(frozen=True)
class StepMetrics:
    """One line of the per-step CSV. Counts are numbers of tokens, sequences or pages. Times are in seconds."""

    step: int
    time: float  # from the construction of the engine to the end of the step
    duration: float
    num_prefill_tokens: int  # tokens of prompts, and tokens recomputed after preemption
    num_decode_tokens: int
    num_running: int
    num_waiting: int
    num_preemptions: int  # since the construction of the engine
    num_used_pages: int
    kv_usage: float  # used / usable pages, 0..1


@dataclass(frozen=True)
class EngineStats:
    """A snapshot of the engine. A notebook displays it as a table."""

    num_running: int
    num_waiting: int
    num_used_pages: int
    num_free_pages: int
    kv_usage: float  # used / usable pages, 0..1
    num_preemptions: int
    num_steps: int
    num_computed_tokens: int  # tokens that the model has computed; recomputed tokens count again
    num_generated_tokens: int
    num_finished_requests: int
    finish_reasons: dict[str, int] = field(hash=False)  # number of samples of these requests by finish_reason
    num_evictable_pages: int  # free pages with cached tokens, which may still give a cache hit
    num_prompt_tokens: int  # of the requests that have started; each counts once, for any `n`
    num_cached_tokens: int  # prompt tokens among them that were cache hits
    cache_hit_rate: float  # num_cached_tokens / num_prompt_tokens, 0..1

    def _repr_html_(self) -> str:
        cells = {name: f"{value:g}" if name != "finish_reasons" else value for name, value in asdict(self).items()}
        rows = "".join(f"<tr><th>{name}</th><td>{value}</td></tr>" for name, value in cells.items())
        return f"<table>{rows}</table>"
