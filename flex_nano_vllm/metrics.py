"""Time stamps of requests, and counters of steps and of the engine. Independent of torch, pages and text."""

import time
from dataclasses import asdict, dataclass, field


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
        shown = {name: f"{value:g}" if name != "finish_reasons" else value for name, value in asdict(self).items()}
        rows = "".join(f"<tr><th>{name}</th><td>{value}</td></tr>" for name, value in shown.items())
        return f"<table>{rows}</table>"
