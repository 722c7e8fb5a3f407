"""Turns sequences into outputs and deltas, and steps into statistics. Independent of how a step is computed."""

import time
from collections import Counter
from collections.abc import Iterator
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from itertools import islice

from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from flex_nano_vllm.detokenizer import has_text, text_of, token_bytes, token_name
from flex_nano_vllm.outputs import CompletionDelta, CompletionOutput, EngineStats, Logprob, RequestOutput, StepMetrics
from flex_nano_vllm.scheduler import Chunk, Scheduler
from flex_nano_vllm.sequence import Sequence, TokenLogprob


def request_output(group: list[Sequence], tokenizer: PreTrainedTokenizerBase | None) -> RequestOutput:
    """Return the output of a request, as far as its samples are generated."""
    first = group[0]
    prompt_token_ids = first.token_ids[: first.num_prompt_tokens]
    prompt_logprobs = None
    if first.wants_prompt_logprobs:
        prompt_logprobs = [None, *logprobs(first, 1, first.prompt_logprobs, tokenizer)]
    return RequestOutput(
        request_id=first.request_id,
        prompt=first.prompt,
        prompt_token_ids=prompt_token_ids,
        outputs=[_completion(index, sequence, tokenizer) for index, sequence in enumerate(group)],
        metrics=first.metrics,
        num_cached_tokens=first.num_cached_tokens or 0,
        prompt_logprobs=prompt_logprobs,
        finished=all(sequence.finish_reason for sequence in group),
    )


def _completion(index: int, sequence: Sequence, tokenizer: PreTrainedTokenizerBase | None) -> CompletionOutput:
    token_ids, ratings, params = sequence.output_token_ids, None, sequence.params
    if params.logprobs is not None:
        ratings = logprobs(sequence, sequence.num_prompt_tokens, sequence.logprobs, tokenizer)
    if sequence.text is not None:
        text = sequence.text.text[: sequence.text.num_shown]
    elif tokenizer is not None:
        prompt = sequence.token_ids[: sequence.num_prompt_tokens]
        has_own_start = sequence.grammar is not None
        text = text_of(
            tokenizer, prompt, token_ids, sequence.hidden_token_ids, params.skip_special_tokens, has_own_start
        )
    else:
        text = None
    return CompletionOutput(
        index=index,
        text=text,
        token_ids=token_ids,
        finish_reason=sequence.finish_reason,
        stop_reason=sequence.stop_reason,
        cumulative_logprob=None if ratings is None else sum(rating.logprob for rating in sequence.logprobs),
        logprobs=ratings,
        error=sequence.error,
    )


def logprobs(
    sequence: Sequence, first: int, ratings: SequenceOf[TokenLogprob], tokenizer: PreTrainedTokenizerBase | None
) -> list[dict[int, Logprob]]:
    """Return the log-probabilities for the tokens from position `first` on.

    The entry of each position lists the token itself first, then the most likely tokens in order.
    """
    is_of_prompt, skip = first < sequence.num_prompt_tokens, sequence.params.skip_special_tokens
    # The BOS before a text prompt is not part of the text: it does not count as the beginning of the text.
    skip_before = skip or (is_of_prompt and sequence.prompt is not None)
    begins_text = tokenizer is not None and (is_of_prompt or sequence.grammar is None)
    for token_id in islice(sequence.token_ids, first) if begins_text else ():
        if has_text(tokenizer, token_id, skip_before):
            begins_text = False
            break

    def named(token_id: int, logprob: float, rank: int, is_silent: bool) -> Logprob:
        if tokenizer is None:
            return Logprob(logprob, rank, None)
        name = token_name(token_bytes(tokenizer, token_id, skip_special_tokens=False, begins_text=begins_text))
        content = b"" if is_silent else token_bytes(tokenizer, token_id, skip, begins_text)
        return Logprob(logprob, rank, name, content)

    entries = []
    for position, rating in enumerate(ratings, start=first):
        token_id = sequence.token_ids[position]
        is_silent = position >= sequence.num_prompt_tokens and token_id in sequence.hidden_token_ids
        entry = {token_id: named(token_id, rating.logprob, rating.rank, is_silent)}
        for rank, (other, logprob) in enumerate(rating.top, start=1):
            if other != token_id:
                entry[other] = named(other, logprob, rank, False)
        entries.append(entry)
        begins_text = begins_text and not has_text(tokenizer, token_id, skip_before)
    return entries


@dataclass
class OutputReader:
    """Turns the samples of a request into deltas: new tokens and text since the previous call of `deltas`."""

    group: list[Sequence]
    tokenizer: PreTrainedTokenizerBase | None

    def __post_init__(self):
        self._read = [(0, 0)] * len(self.group)  # tokens and characters already returned
        self._ended = [False] * len(self.group)

    def deltas(self) -> Iterator[CompletionDelta]:
        """Yield a delta for each sample that has new tokens or has just ended."""
        for index, sequence in enumerate(self.group):
            num_tokens, num_chars = self._read[index]
            reached = sequence.output_len
            if self._ended[index] or (reached == num_tokens and sequence.finish_reason is None):
                continue
            token_ids, text, ratings = sequence.token_ids[sequence.num_prompt_tokens + num_tokens :], None, None
            if sequence.text is not None:
                text = sequence.text.text[num_chars : sequence.text.num_shown]
            if sequence.params.logprobs is not None:
                first = sequence.num_prompt_tokens + num_tokens
                ratings = logprobs(sequence, first, sequence.logprobs[num_tokens:], self.tokenizer)
            self._read[index] = reached, num_chars + len(text or "")
            self._ended[index] = sequence.finish_reason is not None
            yield CompletionDelta(
                sequence.request_id,
                index,
                text,
                token_ids,
                ratings,
                sequence.finish_reason,
                sequence.stop_reason,
                sequence.error,
            )

    @property
    def has_ended(self) -> bool:
        """Whether the last delta of every sample has been returned."""
        return all(self._ended)


class ProgressBar:
    """The progress bar of `generate`: finished requests, and generated tokens per second. Use it in a `with` block."""

    def __init__(self, num_requests: int, is_shown: bool):
        self._bar = tqdm(total=num_requests, unit="req", dynamic_ncols=True, disable=not is_shown)
        self._started, self._num_tokens = time.perf_counter(), 0

    def __enter__(self) -> "ProgressBar":
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.close()

    def announce(self, notice: str) -> None:
        """Show a notice until the step ends."""
        self._bar.set_description(notice)

    def count(self, outputs: list[RequestOutput]) -> list[RequestOutput]:
        """Count the requests that a step has finished, and return them."""
        if getattr(self._bar, "desc", ""):  # a disabled bar has none
            self._bar.set_description()
        for output in outputs:
            self._num_tokens += sum(len(completion.token_ids) for completion in output.outputs)
            rate = self._num_tokens / (time.perf_counter() - self._started)
            self._bar.set_postfix_str(f"{rate:.0f} tok/s", refresh=False)
            self._bar.update()
        return outputs


class Statistics:
    """Counts steps, tokens and requests, and sets the time stamps of requests.

    Args:
        record_steps: append a `StepMetrics` for every step to `steps`.
    """

    def __init__(self, scheduler: Scheduler, record_steps: bool):
        self.scheduler, self.record_steps = scheduler, record_steps
        self.steps: list[StepMetrics] = []
        self._start_time = time.perf_counter()
        self._num_steps = self._num_computed_tokens = self._num_finished = 0
        self._num_prompt_tokens = self._num_cached_tokens = 0  # totals of requests that have computed a chunk
        self._finish_reasons = Counter()

    def count_step(self, chunks: list[Chunk], started: float) -> None:
        """Count a committed step that began at `started`, and set the time stamps of its requests."""
        now = time.perf_counter()
        for chunk in chunks:
            metrics = chunk.sequence.metrics
            if metrics.first_scheduled_time is None:  # the first sample: a fork's shared prompt is no cache hit
                metrics.first_scheduled_time = started
                self._num_prompt_tokens += chunk.sequence.num_prompt_tokens
                self._num_cached_tokens += chunk.start
            if metrics.first_token_time is None and chunk.sequence.output_len:
                metrics.first_token_time = now
        num_tokens = sum(chunk.length for chunk in chunks)
        num_decode_tokens = sum(
            chunk.length == 1 and chunk.start >= chunk.sequence.num_prompt_tokens for chunk in chunks
        )
        self._num_steps += 1
        self._num_computed_tokens += num_tokens
        if self.record_steps:
            stats = self.stats()
            self.steps.append(
                StepMetrics(
                    step=self._num_steps,
                    time=now - self._start_time,
                    duration=now - started,
                    num_prefill_tokens=num_tokens - num_decode_tokens,
                    num_decode_tokens=num_decode_tokens,
                    num_running=stats.num_running,
                    num_waiting=stats.num_waiting,
                    num_preemptions=stats.num_preemptions,
                    num_used_pages=stats.num_used_pages,
                    kv_usage=stats.kv_usage,
                )
            )

    def count_request(self, group: list[Sequence]) -> None:
        """Count a request that has ended."""
        group[0].metrics.finished_time = time.perf_counter()
        self._num_finished += 1
        self._finish_reasons.update(sequence.finish_reason for sequence in group)

    def stats(self) -> EngineStats:
        """Return the current state and the counters."""
        table = self.scheduler.kv.primary
        return EngineStats(
            num_running=len(self.scheduler.running),
            num_waiting=len(self.scheduler.waiting),
            num_used_pages=table.num_used_pages,
            num_free_pages=table.num_free_pages,
            kv_usage=table.num_used_pages / table.num_usable_pages,
            num_preemptions=self.scheduler.num_preemptions,
            num_steps=self._num_steps,
            num_computed_tokens=self._num_computed_tokens,
            num_generated_tokens=self.scheduler.num_generated_tokens,
            num_finished_requests=self._num_finished,
            finish_reasons=dict(self._finish_reasons),
            num_evictable_pages=table.num_evictable_pages,
            num_prompt_tokens=self._num_prompt_tokens,
            num_cached_tokens=self._num_cached_tokens,
            cache_hit_rate=self._num_cached_tokens / max(1, self._num_prompt_tokens),
        )
