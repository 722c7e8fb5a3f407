"""Hypothesis checks that every sequence sees its own text on shared pages, through random requests and faults.

The model is fake: its next token depends only on the text so far and the number of the sample. A page is correct for a
sequence if and only if the text up to each token on the page is the text of the sequence itself. The fake pool maps
each slot to the text up to the token that was written there last. This is the whole oracle. It does not use hashes,
reference counts or windows.
"""

import itertools
import zlib
from functools import partial
from random import Random

import pytest
from engines import (
    MACHINE,
    build_step,
    device_tables_kept,
    layout_of,
    make_sequence,
    num_cases,
    samples_of,
    visible_slots,
    windows_of,
)
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from flex_nano_vllm.device import TileKind
from flex_nano_vllm.geometry import Geometry
from flex_nano_vllm.invariants import check_scheduler
from flex_nano_vllm.kv_manager import KVManager
from flex_nano_vllm.policies import POLICIES, queue_key
from flex_nano_vllm.sampling_params import SamplingParams
from flex_nano_vllm.scheduler import Scheduler
from flex_nano_vllm.sequence import Sequence

EOS, NOT_FINITE, NEVER = 0, -1, 99
ZEROS = "zeros, because the values were not finite"
FAILED = "written by a step that failed"


def next_token(text: tuple[int, ...], sample: int) -> int:
    """Return the next token after the text, for the sample with this number."""
    return zlib.crc32(bytes(text) + bytes([sample])) % 5


def is_broken(text: tuple[int, ...]) -> bool:
    """Return whether the values of the last token of the text are not finite."""
    return zlib.crc32(b"broken" + bytes(text)) % 60 == 0


def expected_end(prompt: tuple[int, ...], sample: int, max_total_tokens: int) -> tuple[tuple[int, ...], str]:
    text = prompt
    while True:
        if any(is_broken(text[: end + 1]) for end in range(len(text))):
            return text, "error"
        text += (next_token(text, sample),)
        if text[-1] == EOS:
            return text, "stop"
        if len(text) == max_total_tokens:
            return text, "length"


def key_of(sequence: Sequence) -> tuple[int, int]:
    """Return the request id of a sample and its index in the request."""
    return sequence.request_id, sequence.group.index(sequence)


class Texts(RuleBasedStateMachine):
    @initialize(
        n_pages=st.integers(2, 14),
        page_size=st.integers(1, 3),
        rows=st.sampled_from([3, 4, 5, 2, 1]),
        budget=st.sampled_from([4, 5, 6, 8, 3, 2, 1]),
        watermark=st.sampled_from([0, 0, 1, 4]),
        max_seq_length=st.sampled_from([24, 24, 9]),
        windows=st.sampled_from([(None,), (None, 3), (2,), (5, 2, None), (4, 1)]),
        caching=st.sampled_from([True, True, True, False]),
        release=st.sampled_from([True, True, True, False]),
        policy=st.sampled_from([*POLICIES]),
    )
    def build(self, n_pages, page_size, rows, budget, watermark, max_seq_length, windows, caching, release, policy):
        self.policy, self.queue_key = policy, queue_key(policy)
        self.geometry = Geometry(n_pages, page_size, rows, max_seq_length, budget, windows, release)
        self.kv = KVManager(self.geometry, prefix_caching=caching)
        self.scheduler = Scheduler(self.kv, budget, watermark)
        self.sent_back: list[tuple[str | None, list[int]]] = []  # texts that wait for pages of the current step
        allocate = self.kv.allocate

        def recorded(token_ids, salt, find):
            row = allocate(token_ids, salt, find)
            if row is None:
                self.sent_back.append((salt, token_ids))
            return row

        self.kv.allocate = recorded
        kinds = (TileKind(1, None), TileKind(3, None, page_buckets=(4, 24)))
        windows = self.geometry.layer_windows
        self.layout = layout_of(kinds, 1, 1, tuple(dict.fromkeys(windows)), windows[-1], whole_pool=True)
        self.texts: list[tuple[int, ...]] = [()]  # all prompts and finished texts, whose prefixes start new prompts
        self.live: dict[tuple[int, int], tuple[Sequence, tuple[int, ...], str | None]] = {}
        self.num_submitted = 0
        self.written = {window: {} for window in windows_of(self.layout)}  # slot -> text up to its token
        self.faulty: set[tuple[int, int]] = set()  # samples whose next chunk has values that are not finite

    @rule(
        which=st.integers(0, 50),
        cut=st.integers(0, 20),
        more=st.lists(st.integers(1, 2), max_size=4),
        max_tokens=st.integers(1, 12),
        salt=st.sampled_from([None, None, None, "a", "b"]),
        times=st.sampled_from([1, 1, 2, 3]),
        samples=st.sampled_from([1, 1, 2, 4]),
        priority=st.integers(-1, 1),
    )
    def submit(self, which, cut, more, max_tokens, salt, times, samples, priority=0):
        """Add `times` equal requests, with `samples` samples each."""
        text = self.texts[which % len(self.texts)]
        prompt = (text[: cut % (len(text) + 1)] + tuple(more) or (1,))[: self.geometry.max_request_tokens - 1]
        if not prompt:
            return  # no room for a prompt and an output
        for _ in range(times):
            group = []
            for _ in range(samples):
                total = min(self.geometry.max_request_tokens, len(prompt) + max_tokens)
                fields = dict(eos_token_ids=frozenset({EOS}), cache_salt=salt, group=group)
                fields["params"] = SamplingParams(priority=priority if self.policy == "priority" else 0)
                sequence = make_sequence(prompt, self.num_submitted, total, **fields)
                sequence.queue_key = self.queue_key(sequence)
                self.live[key_of(sequence)] = (sequence, prompt, salt)
                self.scheduler.add(sequence)
            self.num_submitted += 1
        self.texts.append(prompt)

    @rule(num_steps=st.integers(1, 6))
    def steps(self, num_steps):
        for _ in range(num_steps):
            self.step()

    @rule(num_written=st.integers(0, 8), copies=st.booleans())
    def fail_step(self, num_written, copies):
        """The forward pass raises before it copies pages, or after it has written some tokens, which are invalid."""
        chunks = self.schedule()
        if chunks and copies:
            self.copy_pages()
            batch = build_step(chunks, self.kv, self.layout)
            for window, slots in zip(windows_of(self.layout), batch.slots):
                self.written[window] |= dict.fromkeys(slots.tolist()[:num_written], FAILED)

    @rule(pick=st.integers(0, 30))
    def abort(self, pick):
        if self.live:
            sequence = list(self.live.values())[pick % len(self.live)][0]
            aborted = self.scheduler.abort(sequence.request_id)
            assert aborted == [sample for sample in sequence.group if self.live.pop(key_of(sample), None)]

    @rule(pick=st.integers(0, 30))
    def break_the_next_chunk_of_one(self, pick):
        """Make the values of one chunk not finite, independent of its text."""
        if self.live:
            self.faulty.add(list(self.live)[pick % len(self.live)])

    @rule()
    def preempt_last(self):
        if self.scheduler.running:
            self.scheduler.preempt_last()

    @rule()
    def reset(self):
        self.scheduler.reset()
        self.live.clear()

    # ---- one step, with checks ----

    def copy_pages(self):
        """Copy all pages at once: every copy has the content from before this call."""
        written = {window: dict(texts) for window, texts in self.written.items()}
        targets = set()
        for table, source, target in itertools.chain(*self.kv.copies.values()):
            assert source and target and (table, target) not in targets, "a copy uses page 0 or has a repeated target"
            targets.add((table, target))
            for window in windows_of(self.layout):
                for offset in range(self.geometry.page_size if self.kv.table(window) is table else 0):
                    text = written[window].get(source * self.geometry.page_size + offset)
                    self.written[window][target * self.geometry.page_size + offset] = text
        self.kv.copies.clear()

    def schedule(self):
        self.sent_back.clear()
        chunks = self.scheduler.schedule()
        page_size = self.geometry.page_size
        for salt, text in self.sent_back:
            assert any(
                (salt, text[:end]) == (chunk.sequence.cache_salt, chunk.sequence.token_ids[:end])
                for chunk in chunks
                for end in range(page_size, len(text), page_size)
                if chunk.start < end <= chunk.start + chunk.length
            ), "a request waits for a page that no chunk of the step fills"
        return chunks

    def step(self):
        chunks = self.schedule()
        assert bool(chunks) == bool(self.live), "a step computes tokens exactly if there are unfinished requests"
        if not chunks:
            return
        self.copy_pages()
        batch = build_step(chunks, self.kv, self.layout)
        tokens = []  # (chunk, text up to the token)
        for chunk in chunks:
            text = tuple(chunk.sequence.token_ids)
            tokens += [(chunk, text[: position + 1]) for position in range(chunk.start, chunk.start + chunk.length)]
        broken = {
            key_of(chunk.sequence) for chunk, text in tokens if is_broken(text) or key_of(chunk.sequence) in self.faulty
        }
        for index, window in enumerate(windows_of(self.layout)):
            table, slots = self.kv.table(window), batch.slots[index].tolist()
            assert len(set(slots)) == len(slots), "two tokens in one slot"
            for (chunk, text), slot in zip(tokens, slots):
                page = slot // self.geometry.page_size
                users = [row for row in table._pages if page in map(partial(table.page, row), range(24))]
                assert page and users == [chunk.sequence.row], "a page is shared before it is full"
                spoilt = is_broken(text) or key_of(chunk.sequence) in self.faulty
                self.written[window][slot] = ZEROS if spoilt else (chunk.sequence.cache_salt, *text)

        for index, window in enumerate(windows_of(self.layout)):
            for (chunk, text), slots in zip(tokens, visible_slots(batch, index)):
                key = key_of(chunk.sequence)
                salt = self.live[key][2]
                first = 0 if window is None else max(0, len(text) - window)
                expected = [(salt, *text[:end]) for end in range(first + 1, len(text) + 1)]
                seen = [self.written[window].get(slot) for slot in slots]
                if key not in broken:
                    assert sorted(seen, key=str) == sorted(expected, key=str)

        said = {}
        for chunk in chunks:
            key, text = key_of(chunk.sequence), tuple(chunk.sequence.token_ids)
            token = next_token(text, sample=key[1]) if chunk.needs_sample else NEVER
            said[key] = NOT_FINITE if key in broken else token
        finished = self.scheduler.commit(chunks, samples_of(said.values()))
        for sequence in finished:
            key = key_of(sequence)
            _, prompt, _ = self.live.pop(key)
            if key not in self.faulty:
                text, reason = expected_end(prompt, key[1], sequence.max_total_tokens)
                assert (tuple(sequence.token_ids), sequence.finish_reason) == (text, reason)
                self.texts.append(text)
            else:
                assert sequence.finish_reason == "error"
        self.faulty -= broken

    @invariant()
    def holds(self):
        if hasattr(self, "scheduler"):
            with device_tables_kept(self.kv):
                check_scheduler(self.scheduler)
            queued = list(map(key_of, (*self.scheduler.running, *self.scheduler.waiting)))
            assert list(self.live) == (queued if self.policy == "fcfs" else sorted(queued))
            assert all(NEVER not in sequence.token_ids for sequence, _, _ in self.live.values())

    def teardown(self):
        if not hasattr(self, "scheduler"):
            return
        self.faulty.clear()
        steps_left = 10 + 2 * sum(sequence.max_total_tokens for sequence, _, _ in self.live.values())
        steps_left *= 1 if self.policy == "fcfs" else max(1, len(self.live))
        while self.live:
            assert steps_left > 0, "requests do not end"
            steps_left -= 1
            self.step()
        for table in self.kv.pools.values():
            assert table.num_used_pages == 0 and not table._pages


TestTexts = Texts.TestCase
TestTexts.settings = settings(max_examples=num_cases(150), **MACHINE)


@pytest.mark.parametrize("seed", range(num_cases(100)))
def test_random_operations_keep_shared_pages_correct(seed):
    random = Random(seed)
    texts = Texts()
    texts.build(
        n_pages=random.randint(3, 14),
        page_size=random.randint(1, 3),
        rows=random.randint(2, 5),
        budget=random.randint(1, 8),
        watermark=random.choice([0, 0, 1, 4]),
        max_seq_length=random.choice([24, 9]),
        windows=random.choice([(None,), (None, 3), (2,), (5, 2, None), (4, 1)]),
        caching=random.random() < 0.9,
        release=random.random() < 0.8,
        policy=[*POLICIES][seed % len(POLICIES)],
    )
    for _ in range(60):
        move = random.randrange(20)
        if move < 6 and len(texts.live) < 8:
            more = [random.randint(1, 2) for _ in range(random.randint(0, 4))]
            salt = random.choice([None, None, None, "a"])
            samples = random.choice([1, 1, 2, 4])
            which, cut, max_tokens = random.randint(0, 50), random.randint(0, 20), random.randint(1, 12)
            texts.submit(which, cut, more, max_tokens, salt, 1 + move % 3, samples, random.randint(-1, 1))
        elif move < 15:
            texts.steps(random.randint(1, 3))
        elif move < 16:
            texts.fail_step(random.randint(0, 8), random.random() < 0.5)
        elif move < 17:
            texts.abort(random.randint(0, 30))
        elif move < 18:
            texts.break_the_next_chunk_of_one(random.randint(0, 30))
        elif move < 19:
            texts.preempt_last()
        elif random.random() < 0.1:
            texts.reset()
        texts.holds()
    texts.teardown()
