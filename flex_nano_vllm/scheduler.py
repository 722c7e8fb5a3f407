"""Which tokens run in the next step. Knows nothing of torch, masks, text or the model.

There is no prefill phase and no decode phase (vLLM V1's idea): each step lets `num_computed_tokens` of the
running sequences catch up with their `token_ids`, within a budget of tokens. Chunked prefill, steps that mix
prompts with decodes, and recomputation after preemption are all that one line of arithmetic.

    waiting: [oldest … newest]  ──admit──►  running: [oldest … newest]  ──finish──►
                  ▲                                              │
                  └───────────── preempt the newest ─────────────┘

Both queues are in order of arrival, and everybody who runs is older than everybody who waits. Hence:
- the oldest running sequence always gets its tokens, so every step makes progress;
- a decode never starves behind a long prompt: who was here before the prompt is served before it, and nobody is
  admitted after the prompt while it still eats the budget.
"""

from collections import deque
from dataclasses import dataclass

from flex_nano_vllm.kv_manager import KVManager
from flex_nano_vllm.sequence import Sequence


@dataclass(frozen=True)
class Chunk:
    """Tokens `start` to `start + length` of a sequence, to be computed in one step."""

    sequence: Sequence
    start: int
    length: int

    @property
    def needs_sample(self) -> bool:
        """Whether the chunk ends at the sequence's last token, so that its logits give the next one."""
        return self.start + self.length == self.sequence.num_tokens

    @property
    def logprob_positions(self) -> range:
        """Positions whose logits rate the prompt token that follows."""
        sequence, end = self.sequence, self.start + self.length
        if not sequence.wants_prompt_logprobs:
            return range(0)
        return range(max(self.start, len(sequence.prompt_logprobs)), min(end, sequence.num_prompt_tokens - 1))

    @property
    def num_logits(self) -> int:
        """Of how many of its last tokens the logits are wanted: the last one at least."""
        positions = self.logprob_positions
        return max(1, self.start + self.length - positions.start) if positions else 1


class Scheduler:
    """Owns `waiting` and `running`, and asks the KV manager for room.

    Args:
        kv: rows and pages; only the scheduler takes them and gives them back.
        max_num_batched_tokens: the token budget of a step, at least 1.
        watermark: tokens by which every running request must still be able to grow before another one is admitted.
            Admitting up to the last page would preempt at once, and recompute what was just computed.
    """

    def __init__(self, kv: KVManager, max_num_batched_tokens: int, watermark: int):
        self.kv = kv
        self.max_num_batched_tokens = max_num_batched_tokens
        self.watermark = watermark
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.num_preemptions = 0
        self.num_prompt_tokens = self.num_cached_tokens = 0  # of requests that have begun

    def has_unfinished_requests(self) -> bool:
        return bool(self.waiting or self.running)

    def add(self, sequence: Sequence) -> None:
        self.waiting.append(sequence)

    def schedule(self) -> list[Chunk]:
        """Reserve pages for the next step and say what it computes. Empty only when there is nothing left to do.

        Reserving is all that happens: until `commit`, no sequence has moved, so a step that fails can be scheduled
        again.
        """
        self._undo()
        chunks: list[Chunk] = []
        budget = self.max_num_batched_tokens
        for sequence in tuple(self.running):
            if sequence.row is None:  # preempted for the sake of an older one
                break
            chunk = self._chunk(sequence, budget)
            if not self._reserve(chunk):  # preempted itself
                break
            chunks.append(chunk)
            budget -= chunk.length

        # Who was preempted in this step does not come back in the same step: fewer pages are free than it has lost.
        while self.waiting and budget and self._admit(self.waiting[0]):
            chunk = self._chunk(self.running[-1], budget)
            reserved = self._reserve(chunk)
            assert reserved, "admitted without room"
            chunks.append(chunk)
            budget -= chunk.length

        assert chunks or not self.has_unfinished_requests(), f"stalled: {self.waiting=}, {self.running=}"
        return chunks

    def _undo(self) -> None:
        """Forget what a step was to compute that failed: whoever was admitted in it may have counted on pages that
        nobody has filled, and waits again."""
        for sequence in tuple(self.running):
            self.kv.discard(sequence.row)
        while self.running and self.running[-1].num_computed_tokens == 0:
            self._send_back()

    def _chunk(self, sequence: Sequence, budget: int) -> Chunk:
        start = sequence.num_computed_tokens or self.kv.num_cached_tokens(sequence.row)
        return Chunk(sequence, start, min(sequence.num_tokens - start, budget))

    def _admit(self, sequence: Sequence) -> bool:
        """Let the first of those who wait run, with the pages it shares with others, if there is a row for it, and room
        for all of it and for everybody to grow by the watermark.

        Alone, a request needs no watermark: the engine refuses at the door whatever does not fit into the pool.
        """
        needed = sum(map(self._growth, self.running))
        if len(self.running) == self.kv.geometry.max_batch_size or (self.running and needed >= self.kv.num_free_pages):
            return False
        siblings = [sibling for sibling in sequence.group if sibling.row is not None]
        if siblings and sequence.num_tokens == sequence.num_prompt_tokens:
            # Who has come least far has given back the fewest pages of the prompt.
            done = [s for s in siblings if s.num_computed_tokens >= sequence.num_prompt_tokens]
            if not done:
                return False  # their prompt is computed once
            nearest = min(done, key=lambda sibling: sibling.num_computed_tokens)
            sequence.row = self.kv.fork(nearest.row, sequence.num_prompt_tokens - 1, sequence.token_ids)
        if sequence.row is None:
            # Cached tokens have no logits, so a prompt that still needs log-probabilities is computed.
            may_hit = (
                not sequence.wants_prompt_logprobs or len(sequence.prompt_logprobs) == sequence.num_prompt_tokens - 1
            )
            sequence.row = self.kv.allocate(sequence.token_ids, sequence.cache_salt, find=may_hit)
        if self.running and needed + self._growth(sequence) > self.kv.num_free_pages:
            self.kv.erase(sequence.row)
            sequence.row = None
            return False
        self.running.append(self.waiting.popleft())
        return True

    def _growth(self, sequence: Sequence) -> int:
        """Pages that a sequence with a row may need until it has grown by the watermark."""
        grown = min(sequence.num_tokens + self.watermark, sequence.max_total_tokens)
        return self.kv.geometry.most_pages(grown) - self.kv.num_pages(sequence.row)

    def _reserve(self, chunk: Chunk) -> bool:
        """Get the pages of a chunk, preempting the newest while there are too few. False when it came to the chunk's
        own sequence."""
        end = chunk.start + chunk.length
        while not self.kv.reserve(chunk.sequence.row, end):
            if self.preempt_newest() is chunk.sequence:
                return False
        return True

    def preempt_newest(self) -> Sequence:
        """Send the newest running sequence back to the head of the queue, without its pages: it keeps its tokens and
        will compute them again."""
        victim = self._send_back()
        victim.metrics.num_preemptions += 1
        self.num_preemptions += 1
        return victim

    def _send_back(self) -> Sequence:
        newest = self.running[-1]
        self._release(newest)
        self.waiting.appendleft(newest)
        newest.num_computed_tokens = 0
        return newest

    def _release(self, sequence: Sequence) -> None:
        self.kv.erase(sequence.row)
        self.running.remove(sequence)
        sequence.row = None

    def commit(self, chunks: list[Chunk], token_ids: list[int]) -> list[Sequence]:
        """Take a step's result: for each chunk the token that follows it, or a negative number if there was none to
        sample, because the numbers were not finite. Returns who has finished, and gives their pages back."""
        invalidated = set()  # by what somebody in whose part of the step a number was not finite was to fill
        for chunk, token_id in zip(chunks, token_ids, strict=True):
            if token_id < 0:
                invalidated |= self.kv.discard(chunk.sequence.row)
        while invalidated & {sequence.row for sequence in self.running}:
            self._send_back()
        finished = []
        for chunk, token_id in zip(chunks, token_ids):
            sequence = chunk.sequence
            if sequence.row is None:  # it waits again
                continue
            needs_sample = chunk.needs_sample  # before the token is appended
            if sequence.num_cached_tokens is None:
                sequence.num_cached_tokens = chunk.start
                if sequence.index == 0:  # forks share by right, not by luck
                    self.num_prompt_tokens += sequence.num_prompt_tokens
                    self.num_cached_tokens += chunk.start
            sequence.num_computed_tokens = chunk.start + chunk.length
            self.kv.commit(sequence.row, sequence.num_computed_tokens)
            if token_id < 0:
                sequence.fail()
            elif needs_sample:
                sequence.append(token_id)
            if sequence.finish_reason is not None:
                self._release(sequence)
                finished.append(sequence)
        return finished

    def finish(self, sequence: Sequence, reason: str) -> None:
        """End a sequence, wherever it is."""
        if sequence.row is None:
            self.waiting.remove(sequence)
        else:
            self._release(sequence)
        sequence.finish_reason = reason

    def abort(self, request_id: int, reason: str = "abort") -> list[Sequence]:
        """Take a request's samples out, wherever they are. Returns those that were unfinished."""
        aborted = [sequence for sequence in (*self.running, *self.waiting) if sequence.request_id == request_id]
        for sequence in aborted:
            self.finish(sequence, reason)
        return aborted

    def reset(self) -> None:
        """Forget every request and start from an empty pool. Works from any state, even one left by an interrupt."""
        self.waiting.clear()
        self.running.clear()
        self.kv.reset()

    def check_invariants(self) -> None:
        """Raises AssertionError when a request is in two places, out of order, or holds what it should not."""
        assert len(self.running) <= self.max_num_batched_tokens, "more sequences run than a step has tokens"
        everyone = [*self.running, *self.waiting]
        ids = [(sequence.request_id, sequence.index) for sequence in everyone]
        assert ids == sorted(set(ids)), f"not in order of arrival: running and waiting are {ids}"
        assert all(sequence.finish_reason is None for sequence in everyone), "a finished request is still queued"
        assert all(s.row is None and s.num_computed_tokens == 0 for s in self.waiting), "a waiting request holds pages"
        rows = sorted(sequence.row for sequence in self.running)
        assert rows == sorted(self.kv.primary.allocated_rows), "rows held by nobody, or by somebody who does not run"
        for sequence in self.running:
            assert sequence.num_computed_tokens <= self.kv.primary.num_tokens(sequence.row), (
                "tokens were computed into pages that are not held"
            )
        self.kv.check_invariants()
