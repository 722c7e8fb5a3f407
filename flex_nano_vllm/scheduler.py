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

from flex_nano_vllm.page_table import PageTable
from flex_nano_vllm.sequence import Sequence


@dataclass(frozen=True)
class Chunk:
    """Tokens `start` to `start + length` of a sequence, to be computed in one step."""

    sequence: Sequence
    start: int
    length: int

    @property
    def samples(self) -> bool:
        """Whether the chunk ends at the sequence's last token, so that its logits give the next one."""
        return self.start + self.length == self.sequence.num_tokens


class Scheduler:
    """Owns `waiting` and `running`, and asks the page table for room.

    Args:
        page_table: rows and pages; only the scheduler takes them and gives them back.
        max_num_batched_tokens: the token budget of a step, at least 1.
        watermark: tokens by which every running request must still be able to grow before another one is admitted.
            Admitting up to the last page would preempt at once, and recompute what was just computed.
    """

    def __init__(self, page_table: PageTable, max_num_batched_tokens: int, watermark: int):
        self.page_table = page_table
        self.max_num_batched_tokens = max_num_batched_tokens
        self.watermark = watermark
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.num_preemptions = 0

    def has_unfinished_requests(self) -> bool:
        return bool(self.waiting or self.running)

    def add(self, sequence: Sequence) -> None:
        self.waiting.append(sequence)

    def schedule(self) -> list[Chunk]:
        """Reserve pages for the next step and say what it computes. Empty only when there is nothing left to do.

        Reserving is all that happens: until `commit`, no sequence has moved, so a step that fails can be scheduled
        again.
        """
        chunks: list[Chunk] = []
        budget = self.max_num_batched_tokens
        for sequence in tuple(self.running):
            chunk = self._chunk(sequence, budget)
            if sequence.row is None or not self._reserve(chunk):  # preempted for the sake of an older one, or itself
                break
            chunks.append(chunk)
            budget -= chunk.length

        # Who was preempted in this step does not come back in the same step: fewer pages are free than it has lost.
        while self.waiting and budget and self._can_admit(self.waiting[0]):
            sequence = self.waiting[0]
            sequence.row = self.page_table.allocate()
            self.running.append(self.waiting.popleft())
            chunk = self._chunk(sequence, budget)
            reserved = self._reserve(chunk)
            assert reserved, "admitted without room"
            chunks.append(chunk)
            budget -= chunk.length

        assert chunks or not self.has_unfinished_requests(), f"stalled: {self.waiting=}, {self.running=}"
        return chunks

    def _chunk(self, sequence: Sequence, budget: int) -> Chunk:
        start = sequence.num_computed_tokens
        return Chunk(sequence, start, min(sequence.num_tokens - start, budget))

    def _can_admit(self, sequence: Sequence) -> bool:
        """Whether there is a row, room for all of the sequence, and for everybody to grow by the watermark.

        Alone, a request needs no watermark: the engine refuses at the door whatever does not fit into the pool.
        """
        if len(self.running) == self.page_table.max_batch_size:
            return False
        needed = 0
        for other in (*self.running, sequence):
            grown = min(other.num_tokens + self.watermark, other.max_total_tokens)
            held = 0 if other.row is None else self.page_table.num_pages(other.row)
            needed += self.page_table.pages_for(grown) - held
        return not self.running or needed <= self.page_table.num_free_pages

    def _reserve(self, chunk: Chunk) -> bool:
        """Get the pages of a chunk, preempting the newest while there are too few. False when it came to the chunk's
        own sequence."""
        end = chunk.start + chunk.length
        while not self.page_table.reserve(chunk.sequence.row, end):
            if self.preempt_newest() is chunk.sequence:
                return False
        return True

    def preempt_newest(self) -> Sequence:
        """Send the newest running sequence back to the head of the queue, without its pages: it keeps its tokens and
        will compute them again."""
        victim = self.running[-1]
        self._release(victim)
        self.waiting.appendleft(victim)
        victim.num_computed_tokens = 0
        victim.metrics.num_preemptions += 1
        self.num_preemptions += 1
        return victim

    def _release(self, sequence: Sequence) -> None:
        self.page_table.erase(sequence.row)
        self.running.remove(sequence)
        sequence.row = None

    def commit(self, chunks: list[Chunk], token_ids: list[int]) -> list[Sequence]:
        """Take a step's result: for each chunk the token that follows it, or a negative number if there was none to
        sample, because the numbers were not finite. Returns who has finished, and gives their pages back."""
        finished = []
        for chunk, token_id in zip(chunks, token_ids, strict=True):
            sequence = chunk.sequence
            samples = chunk.samples  # before the token is appended
            sequence.num_computed_tokens += chunk.length
            if token_id < 0:
                sequence.finish_reason = "error"
            elif samples:
                sequence.append(token_id)
            if sequence.finish_reason is not None:
                self._release(sequence)
                finished.append(sequence)
        return finished

    def abort(self, request_id: int) -> Sequence | None:
        """Take a request out, wherever it is. None when there is no unfinished request of that id."""
        for sequence in (*self.running, *self.waiting):
            if sequence.request_id == request_id:
                if sequence.row is None:
                    self.waiting.remove(sequence)
                else:
                    self._release(sequence)
                sequence.finish_reason = "abort"
                return sequence
        return None

    def reset(self) -> None:
        """Forget every request and start from an empty pool. Works from any state, even one left by an interrupt."""
        self.waiting.clear()
        self.running.clear()
        self.page_table.reset()

    def check_invariants(self) -> None:
        """Raises AssertionError when a request is in two places, out of order, or holds what it should not."""
        assert len(self.running) <= self.max_num_batched_tokens, "more sequences run than a step has tokens"
        everyone = [*self.running, *self.waiting]
        ids = [sequence.request_id for sequence in everyone]
        assert ids == sorted(set(ids)), f"not in order of arrival: running and waiting are {ids}"
        assert all(sequence.finish_reason is None for sequence in everyone), "a finished request is still queued"
        assert all(s.row is None and s.num_computed_tokens == 0 for s in self.waiting), "a waiting request holds pages"
        rows = sorted(sequence.row for sequence in self.running)
        assert rows == sorted(self.page_table.allocated_rows), "rows held by nobody, or by somebody who does not run"
        for sequence in self.running:
            held = self.page_table.num_pages(sequence.row) * self.page_table.page_size
            assert sequence.num_computed_tokens <= held, "tokens were computed into pages that are not held"
        self.page_table.check_invariants()
