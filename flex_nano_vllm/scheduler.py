"""The scheduler chooses the tokens of the next step. Independent of torch, masks, text and the model.

Like vLLM V1, the scheduler has no prefill phase and no decode phase. Each step advances `num_computed_tokens` of the
running sequences towards the length of their `token_ids`, within a token budget. This rule covers chunked prefill,
steps that mix prefills with decodes, and recomputation after preemption.

    waiting: [first … last]  ──admit the first──►  running: [first … last]  ──finish──►
                  ▲                                              │
                  └────────────── preempt the last ──────────────┘

Both queues are in the order of the policy: by a key that each request gets on arrival, then by arrival. A sequence is
admitted only when it is the first waiting one, and never in a step that preempts. Hence:
- Every step makes progress. The first running sequence is never preempted: the others are preempted before it, and
  alone it fits, because requests that exceed the pool were rejected on arrival. If no sequence runs, the first waiting
  one is admitted, because rows and pages are free, and no other sequence computes anything that it could share.
- A long prompt never starves a decode, because a step computes at least one token of every sequence that it does not
  preempt.
- A request is overtaken only by requests that the policy puts before it. While it is the first waiting one, it starts
  at the latest when all running sequences have ended.

`policies.py` states for each policy which requests can starve.
"""

import bisect
from dataclasses import dataclass, replace
from itertools import repeat
from operator import attrgetter

from flex_nano_vllm.kv_manager import KVManager
from flex_nano_vllm.sequence import Sample, Sequence

_place = attrgetter("place")

# Most logits rows of a step besides the last one of each chunk. Only prompt logprobs need them. Without this limit,
# memory for the logits of `max_num_batched_tokens` tokens would have to stay free.
MAX_PROMPT_LOGITS = 256


@dataclass(frozen=True)
class Chunk:
    """Tokens `start` to `start + length` of a sequence, which one step computes."""

    sequence: Sequence
    start: int
    length: int

    @property
    def needs_sample(self) -> bool:
        """Whether the chunk ends at the last token of the sequence, so that its logits give the next token."""
        return self.start + self.length == self.sequence.num_tokens

    @property
    def logprob_positions(self) -> range:
        """Positions in the chunk whose logits give the logprob of the next prompt token, where it is still missing."""
        sequence, end = self.sequence, self.start + self.length
        if not sequence.wants_prompt_logprobs:
            return range(0)
        return range(max(self.start, len(sequence.prompt_logprobs)), min(end, sequence.num_prompt_tokens - 1))

    @property
    def num_logits(self) -> int:
        """Number of tokens at the end of the chunk whose logits are computed; at least 1."""
        positions = self.logprob_positions
        return max(1, self.start + self.length - positions.start) if positions else 1


class Scheduler:
    """Owns the queues `waiting` and `running`, and allocates rows and pages from the KV manager.

    Args:
        kv: rows and pages, which only the scheduler allocates and releases.
        max_num_batched_tokens: the token budget of a step, at least 1.
        watermark: tokens that every running sequence must still be able to grow by when another sequence is admitted.
            Admission up to the last free page would soon cause a preemption, and the tokens that were just computed
            would be computed again.
    """

    def __init__(self, kv: KVManager, max_num_batched_tokens: int, watermark: int):
        self.kv = kv
        self.max_num_batched_tokens = max_num_batched_tokens
        self.watermark = watermark
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self.num_preemptions = 0
        self.num_generated_tokens = 0

    def has_unfinished_requests(self) -> bool:
        return bool(self.waiting or self.running)

    def add(self, sequence: Sequence) -> None:
        bisect.insort(self.waiting, sequence, key=_place)

    def schedule(self) -> list[Chunk]:
        """Choose the chunks of the next step and reserve their pages.

        Returns an empty list only if there are no unfinished requests. A failed step can be scheduled again, because
        only `commit` advances the sequences.
        """
        chunks: list[Chunk] = []
        budget = self.max_num_batched_tokens - len(self.running)  # besides the one token of every running sequence
        num_logits = MAX_PROMPT_LOGITS
        for sequence in tuple(self.running):
            if sequence.row is None:  # preempted to free pages for a sequence before it
                break
            chunk = self._chunk(sequence, 1 + budget, num_logits)
            if not self._reserve(chunk):  # the sequence itself was preempted
                break
            chunks.append(chunk)
            budget, num_logits = budget - (chunk.length - 1), num_logits - (chunk.num_logits - 1)
        else:  # nothing was preempted
            while self.waiting and budget and self._admit(sequence := self.waiting[0]):
                chunk = self._chunk(sequence, budget, num_logits)
                reserved = self._reserve(chunk)
                assert reserved, "too few pages are free for the chunk of an admitted sequence"
                chunks.append(chunk)
                budget, num_logits = budget - chunk.length, num_logits - (chunk.num_logits - 1)

        assert chunks or not self.has_unfinished_requests(), f"no chunk was scheduled: {self.waiting=}, {self.running=}"
        return chunks

    def _chunk(self, sequence: Sequence, budget: int, num_logits: int) -> Chunk:
        """Return the next chunk, with at most `budget` tokens, and `num_logits` logits rows besides the last one."""
        start = sequence.num_computed_tokens or self.kv.num_cached_tokens(sequence.row)
        chunk = Chunk(sequence, start, min(sequence.num_tokens - start, budget))
        return replace(chunk, length=chunk.length - max(0, chunk.num_logits - 1 - num_logits))

    def _admit(self, sequence: Sequence) -> bool:
        """Admit the first waiting sequence. Returns False if it has to wait:

        - for a free row,
        - for pages: if other sequences run, the pool must have room for all tokens of the sequence, and for it and all
          running sequences to grow by `watermark` tokens each,
        - until another sample of its request has computed the prompt, which they share, or
        - until the current step has computed pages that it can share.
        """
        needed, pool = sum(map(self._growth, self.running)), self.kv.primary
        if len(self.running) == pool.max_batch_size or (self.running and needed >= pool.num_free_pages):
            return False
        siblings = [sibling for sibling in sequence.group if sibling.row is not None]
        if siblings and sequence.num_tokens == sequence.num_prompt_tokens:
            # The sibling with the fewest computed tokens has released the fewest pages of the prompt.
            done = [s for s in siblings if s.num_computed_tokens >= sequence.num_prompt_tokens]
            if not done:
                return False  # wait until a sibling has computed the prompt, which is computed only once
            nearest = min(done, key=lambda sibling: sibling.num_computed_tokens)
            sequence.row = self.kv.fork(nearest.row, sequence.num_prompt_tokens - 1, sequence.token_ids)
        if sequence.row is None:
            # Cached tokens have no logits, so a prompt whose logprobs are still missing is computed.
            may_hit = not Chunk(sequence, 0, sequence.num_tokens).logprob_positions
            sequence.row = self.kv.allocate(sequence.token_ids, sequence.cache_salt, find=may_hit)
            if sequence.row is None:
                return False  # wait until the current step has computed pages that the sequence can share
        if self.running and needed + self._growth(sequence) > pool.num_free_pages:
            self.kv.erase(sequence.row)
            sequence.row = None
            return False
        bisect.insort(self.running, self.waiting.pop(0), key=_place)
        return True

    def _growth(self, sequence: Sequence) -> int:
        """Return how many more pages a sequence with a row may need to grow by the watermark."""
        grown = min(sequence.num_tokens + self.watermark, sequence.max_total_tokens)
        return self.kv.geometry.most_pages(grown) - self.kv.primary.num_pages(sequence.row)

    def _reserve(self, chunk: Chunk) -> bool:
        """Reserve the pages of a chunk; preempt the last running sequence while too few pages are free.

        Returns False if the sequence of the chunk itself was preempted.
        """
        end = chunk.start + chunk.length
        while not self.kv.reserve(chunk.sequence.row, end):
            if self.preempt_last() is chunk.sequence:
                return False
        return True

    def preempt_last(self) -> Sequence:
        """Preempt the last running sequence, and return it.

        It moves to the waiting queue, and its row and pages are released. It keeps its tokens. When it is admitted
        again, tokens on pages that are still cached are cache hits, and the others are computed again.
        """
        last = self.running[-1]
        self._release(last)
        self.add(last)
        last.num_computed_tokens = 0
        last.metrics.num_preemptions += 1
        self.num_preemptions += 1
        return last

    def _release(self, sequence: Sequence) -> None:
        self.kv.erase(sequence.row)
        self.running.remove(sequence)
        sequence.row = None

    def commit(self, chunks: list[Chunk], samples: list[Sample]) -> list[Sequence]:
        """Apply the result of a step, and return the sequences that finished. Their rows and pages are released.

        Args:
            chunks: the chunks of the step.
            samples: what the step has computed for each chunk. If the chunk needs a sample, its tokens, at least one,
                continue the sequence, up to the one that ends it; otherwise they are ignored. The step has computed the
                keys and values of the chunk only: the next chunk of the sequence begins with the first of these tokens.
        """
        finished = []
        for chunk, sample in zip(chunks, samples, strict=True):
            sequence = chunk.sequence
            if sequence.num_cached_tokens is None:
                sequence.num_cached_tokens = chunk.start
            sequence.prompt_logprobs += sample.prompt_logprobs
            if sample.token_ids is None:
                sequence.fail()  # its pages are released without being cached
            else:
                sequence.num_computed_tokens = chunk.start + chunk.length
                self.kv.commit(sequence.row, sequence.num_computed_tokens)
                new = zip(sample.token_ids, sample.logprobs or repeat(None)) if chunk.needs_sample else ()
                for token_id, logprob in new:
                    sequence.append(token_id, logprob)
                    self.num_generated_tokens += 1
                    if sequence.finish_reason is not None:
                        break
            if sequence.finish_reason is not None:
                self._release(sequence)
                finished.append(sequence)
        return finished

    def abort(self, request_id: int, reason: str = "abort") -> list[Sequence]:
        """End all unfinished samples of a request, running or waiting, and return them."""
        aborted = [sequence for sequence in (*self.running, *self.waiting) if sequence.request_id == request_id]
        for sequence in aborted:
            if sequence.row is None:
                self.waiting.remove(sequence)
            else:
                self._release(sequence)
            sequence.abort(reason)
        return aborted

    def reset(self) -> None:
        """Remove all requests and empty the pools. Works from any state, even one left by an interrupt."""
        self.waiting.clear()
        self.running.clear()
        self.kv.reset()
