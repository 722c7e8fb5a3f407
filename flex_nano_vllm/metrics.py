"""Clocks and counts: what one request waited for, what one step did. Knows nothing of torch, pages or text."""

import time
from dataclasses import asdict, dataclass, field


@dataclass
class RequestMetrics:
    """Time stamps of one request, in seconds of `time.perf_counter()`; None until the event has happened."""

    arrival_time: float = field(default_factory=time.perf_counter)
    first_scheduled_time: float | None = None
    first_token_time: float | None = None
    finished_time: float | None = None
    num_preemptions: int = 0

    @property
    def ttft(self) -> float | None:
        """Time to first token, seconds from arrival."""
        return None if self.first_token_time is None else self.first_token_time - self.arrival_time

    def tpot(self, num_output_tokens: int) -> float | None:
        """Time per output token after the first, seconds. None where there is no second token."""
        if self.first_token_time is None or self.finished_time is None or num_output_tokens < 2:
            return None
        return (self.finished_time - self.first_token_time) / (num_output_tokens - 1)


@dataclass(frozen=True)
class StepMetrics:
    """One line of the per-step CSV. Counts are of tokens, sequences and pages; times are seconds."""

    step: int
    time: float  # at the end of the step, since the engine was built
    duration: float
    num_prefill_tokens: int  # tokens in chunks that catch up with a prompt (or with a preempted sequence)
    num_decode_tokens: int
    num_running: int
    num_waiting: int
    num_preemptions: int  # since the engine was built
    num_used_pages: int
    kv_usage: float  # used / usable pages, 0..1


@dataclass(frozen=True)
class EngineStats:
    """A snapshot of the engine. Shows itself as a table in a notebook."""

    num_running: int
    num_waiting: int
    num_used_pages: int
    num_free_pages: int
    kv_usage: float  # used / usable pages, 0..1
    num_preemptions: int
    num_steps: int
    num_computed_tokens: int  # tokens the model has run over, recomputed ones counted again
    num_generated_tokens: int
    num_finished_requests: int
    finish_reasons: dict[str, int] = field(hash=False)  # samples of these requests, by how they have ended
    num_evictable_pages: int  # free, but for tokens that may be found again
    num_prompt_tokens: int  # of the requests that have begun, each counted once, whatever its `n`
    num_cached_tokens: int  # of these, found computed by others
    cache_hit_rate: float  # the latter by the former, 0..1

    def _repr_html_(self) -> str:
        shown = {name: f"{value:g}" if name != "finish_reasons" else value for name, value in asdict(self).items()}
        rows = "".join(f"<tr><th>{name}</th><td>{value}</td></tr>" for name, value in shown.items())
        return f"<table>{rows}</table>"
