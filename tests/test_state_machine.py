"""Hypothesis runs the page table, the scheduler and the building of steps through random requests and faults.

The model is fake in two ways. Its next token depends only on the request and the position. Therefore the output of a
request must not depend on other requests or on faults. Its KV pool is a dict from each slot to the last write. The
writes are labelled, so that the test detects a query that sees a slot of another request, of its own request before a
preemption, or of a failed step.

A second bookkeeping uses plain dicts and lists. It never computes a decision of the scheduler, but checks that each
decision was allowed. The assertions are numbered: I1-I6 pages and rows, I7-I8 isolation and writes, I9-I11 queues,
order and progress, I12 termination, I13 rejected requests, I14-I16 outputs, I17 the pool is empty at the end.
"""

import copy
from dataclasses import dataclass, field
from random import Random

import pytest
import torch
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
from flex_nano_vllm.policies import queue_key
from flex_nano_vllm.sampling_params import SamplingParams
from flex_nano_vllm.scheduler import Scheduler
from flex_nano_vllm.sequence import Sequence

EOS, NOT_FINITE = 0, -1
FAILED = "written by a step that failed"
KINDS = TileKind(1, None), TileKind(3, 2, page_buckets=(2, 11))
LAYOUT = layout_of(KINDS, 1, 1, windows=(None, 3), last_window=3, whole_pool=True)

PROMPTS = st.tuples(
    st.one_of(st.integers(0, 3), st.integers(0, 99)),  # gives the length of the prompt, see `submit`
    st.one_of(st.none(), st.none(), st.integers(1, 12)),  # max_tokens
    st.one_of(st.none(), st.none(), st.integers(-4, 9)),  # output index of the ending (negative: in the prompt), if any
    st.sampled_from([EOS, NOT_FINITE]),  # the ending
)


def key_of_a_user(sequence: Sequence) -> tuple[int, int]:
    """Put prompts of even lengths first, and among them those with a larger priority."""
    return sequence.num_prompt_tokens % 2, -sequence.params.priority


# By policy: what a request with this priority, number of prompt tokens and limit of tokens is sorted by
POLICIES = {
    "fcfs": lambda priority, num_prompt_tokens, max_total_tokens: 0,
    "priority": lambda priority, num_prompt_tokens, max_total_tokens: priority,
    "sjf": lambda priority, num_prompt_tokens, max_total_tokens: max_total_tokens,
    key_of_a_user: lambda priority, num_prompt_tokens, max_total_tokens: (num_prompt_tokens % 2, -priority),
}


def pages_for(num_tokens: int, page_size: int) -> int:
    pages = 0
    while pages * page_size < num_tokens:
        pages += 1
    return pages


@dataclass(eq=False)
class Request:
    """The expected state of a request, computed without the scheduler."""

    sequence: Sequence  # the object that the scheduler changes
    num_prompt_tokens: int
    max_total_tokens: int
    ends_at: int | None  # position of `ending`, if the request reaches it
    ending: int  # EOS or NOT_FINITE
    token_ids: list[int] = field(default_factory=list)
    num_computed: int = 0
    num_held: int = 0  # tokens that pages were reserved for
    life: int = 0  # number of preemptions so far

    @property
    def id(self) -> int:
        return self.sequence.request_id

    def token_at(self, position: int) -> int:
        stops_here = self.ending == EOS and position == self.ends_at
        return EOS if stops_here else 1 + (31 * self.id + 7 * position) % 97

    def is_broken_in(self, start: int, length: int) -> bool:
        """Return whether the chunk computes the token whose logits are not finite."""
        return self.ending == NOT_FINITE and self.ends_at is not None and start < self.ends_at <= start + length

    def expected_output(self) -> tuple[list[int], str]:
        """Return the output of the request when it runs alone, and its finish reason."""
        output: list[int] = []
        if self.is_broken_in(0, self.num_prompt_tokens):
            return output, "error"
        while self.num_prompt_tokens + len(output) < self.max_total_tokens:
            position = self.num_prompt_tokens + len(output)
            if self.is_broken_in(position - 1, 1):
                return output, "error"
            output.append(self.token_at(position))
            if output[-1] == EOS:
                return output, "stop"
        return output, "length"


class Interrupted(BaseException):
    """Like KeyboardInterrupt, but raised only by this test."""


class Engine(RuleBasedStateMachine):
    @initialize(
        n_pages=st.integers(2, 12),
        page_size=st.integers(1, 4),
        rows=st.sampled_from([3, 4, 5, 2, 1]),
        budget=st.sampled_from([4, 5, 6, 7, 8, 3, 2, 1]),
        watermark=st.sampled_from([0, 0, 0, 1, 2, 4, 8]),  # mostly small, because a large one prevents preemptions
        max_seq_length=st.sampled_from([1000, 1000, 2, 7, 12, 20]),
        prompts=st.lists(PROMPTS, min_size=2, max_size=8),
        policy=st.sampled_from([*POLICIES]),
    )
    def build(self, n_pages, page_size, rows, budget, watermark, max_seq_length, prompts, policy):
        self.policy = policy
        self.page_size, self.rows, self.budget, self.watermark = page_size, rows, budget, watermark
        self.usable_pages = n_pages - 1
        self.limit = min(max_seq_length, self.usable_pages * page_size)
        geometry = Geometry(n_pages, page_size, rows, max_seq_length, budget, windows_of(LAYOUT), window_release=False)
        self.kv = KVManager(geometry, prefix_caching=False)
        self.table = self.kv.primary
        self.scheduler = Scheduler(self.kv, budget, watermark)
        self.num_submitted = self.num_preemptions = 0
        self.keys: dict[int, object] = {}  # request id -> key of the policy
        self.live: dict[int, Request] = {}  # in order of arrival
        self.ended: dict[int, tuple[Request, str, tuple[int, ...]]] = {}  # with final finish reason and output
        self.kv_pool: dict[int, object] = {}  # slot -> (request, life, position, token) of the last write
        self.submit(prompts)

    # ---- rules ----

    @rule(prompts=st.lists(PROMPTS, min_size=1, max_size=4))
    def submit(self, prompts):
        for pick, max_tokens, ends_after, ending in prompts:
            prompt_len = 1 + pick % min(self.limit + 1, 12)
            if prompt_len + 1 > self.limit:
                continue  # I13: the engine rejects this prompt; only the scheduler is tested here
            room = self.limit - prompt_len
            prompt = [1 + (31 * self.num_submitted + 7 * position) % 97 for position in range(prompt_len)]
            total = prompt_len + (room if max_tokens is None else min(room, max_tokens))
            priority = 0 if self.policy in ("fcfs", "sjf") else pick % 3 - 1
            fields = dict(eos_token_ids=frozenset({EOS}), params=SamplingParams(priority=priority))
            sequence = make_sequence(prompt, self.num_submitted, total, **fields)
            sequence.queue_key = queue_key(self.policy)(sequence)
            ends_at = None if ends_after is None else max(1, prompt_len + ends_after)
            request = Request(sequence, prompt_len, total, ends_at, ending, prompt)
            self.num_submitted += 1
            self.live[request.id] = request
            self.keys[request.id] = POLICIES[self.policy](priority, prompt_len, total)
            self.scheduler.add(sequence)

    # Hypothesis disables rules for whole runs. Steps are in two rules, and requests in three, so that some remain.

    @rule(prompts=st.lists(PROMPTS, max_size=1))
    def step(self, prompts=()):
        self.submit(prompts)
        chunks = self.schedule()
        self.forward(chunks)
        self.commit(chunks)

    @rule(num_steps=st.integers(2, 8))
    def several_steps(self, num_steps):
        for _ in range(num_steps):
            self.step()
            self.holds()

    @rule(num_written=st.integers(0, 8))
    def fail_step(self, num_written):
        """The forward pass raises after it has written some tokens, or some layers of them. Their slots are invalid."""
        chunks = self.schedule()
        if chunks:
            for slot in build_step(chunks, self.kv, LAYOUT).slots[0].tolist()[:num_written]:
                self.kv_pool[slot] = FAILED

    @rule(pick=st.integers(0, 30))
    def abort(self, pick):
        request_id = pick % (self.num_submitted + 1)  # of a live request, of an ended request, or unknown
        aborted = self.scheduler.abort(request_id)
        if request_id in self.live:
            request = self.live.pop(request_id)
            assert aborted == [request.sequence]
            self.end(request, "abort")
        else:
            assert aborted == []

    @rule(pick=st.integers(0, 5), num_tokens=st.integers(0, 9))
    def use_a_row_that_is_not_allocated(self, pick, num_tokens):
        taken = [request.sequence.row for request in self.live.values()]
        rows = [row for row in range(self.rows + 2) if row not in taken]  # includes row 0 and a row that does not exist
        row = rows[pick % len(rows)]
        before = self.state_of_table()
        with pytest.raises(ValueError, match=f"row {row} "):
            self.table.erase(row)
        with pytest.raises(ValueError, match=f"row {row} "):
            self.table.reserve(row, num_tokens)
        assert self.state_of_table() == before

    @rule(pick=st.integers(0, 30))
    def erase_twice(self, pick):
        """A row is allocated between steps and erased twice.

        The second `erase` raises. Neither changes the pages of other rows.
        """
        if len(self.table._pages) == self.rows:
            with pytest.raises(RuntimeError, match=f"all {self.rows} rows"):
                self.table.allocate()
            return
        row = self.table.allocate()
        num_tokens = pick % (self.table.max_pages_per_row * self.page_size + 1)
        before = self.state_of_table()
        if pages_for(num_tokens, self.page_size) <= self.table.num_free_pages:
            assert self.table.reserve(row, num_tokens)
        else:
            assert not self.table.reserve(row, num_tokens)
            assert self.state_of_table() == before
        self.table.erase(row)
        before = self.state_of_table()
        with pytest.raises(ValueError, match=f"row {row} "):
            self.table.erase(row)
        assert self.state_of_table() == before

    @rule()
    def preempt_last(self):
        """The scheduler decides to preempt, but a caller may also preempt between two steps."""
        if self.scheduler.running:
            request = self.live[self.scheduler.running[-1].request_id]
            assert self.scheduler.preempt_last() is request.sequence
            request.num_computed = request.num_held = 0
            request.life += 1
            self.num_preemptions += 1

    @rule()
    def reset(self):
        self.scheduler.reset()
        self.live.clear()
        assert not self.scheduler.has_unfinished_requests()

    @rule(
        method=st.sampled_from(["allocate", "reserve", "erase", "_map"]),
        call=st.integers(1, 4),
        before=st.booleans(),
    )
    def interrupt_schedule_and_reset(self, method, call, before):
        """Interrupt `schedule`, as Ctrl-C does, and then reset the scheduler, as `generate` does."""
        original, calls = getattr(self.table, method), 0

        def interrupted(*args):
            nonlocal calls
            calls += 1
            if calls == call and before:
                raise Interrupted
            result = original(*args)
            if calls == call:
                raise Interrupted
            return result

        setattr(self.table, method, interrupted)
        try:
            self.scheduler.schedule()
        except Interrupted:
            pass
        finally:
            delattr(self.table, method)
            self.scheduler.reset()
        self.live.clear()
        self.num_preemptions = self.scheduler.num_preemptions  # preemptions before the interrupt are not predicted

    # ---- one step, with checks ----

    def schedule(self):
        scheduler, page_size = self.scheduler, self.page_size
        running_before = [self.live[sequence.request_id] for sequence in scheduler.running]
        waiting_before = [self.live[sequence.request_id] for sequence in scheduler.waiting]
        chunks = scheduler.schedule()
        running = [self.live[sequence.request_id] for sequence in scheduler.running]
        waiting = [self.live[sequence.request_id] for sequence in scheduler.waiting]

        assert bool(chunks) == bool(self.live), "I11: a step computes tokens exactly if there are unfinished requests"
        self.requests_are_in_order(running, waiting)
        stayed = [request for request in running_before if request in running]
        preempted = [request for request in running_before if request not in running]
        admitted = [request for request in running if request not in running_before]
        assert stayed + preempted == running_before, "I11: the last requests are preempted first"
        assert stayed[:1] == running_before[:1], "I11: the first request is never preempted"
        assert admitted == waiting_before[: len(admitted)], "I10: requests are admitted strictly in order"
        assert not (preempted and admitted), "a step both preempted and admitted requests"
        self.num_preemptions += len(preempted)
        preempted_had = [(request.num_computed, request.num_held) for request in preempted]
        for request in preempted:
            request.num_computed = request.num_held = 0
            request.life += 1

        left = self.budget
        scheduled = stayed + admitted
        assert [chunk.sequence for chunk in chunks] == [request.sequence for request in scheduled]
        for i, (chunk, request) in enumerate(zip(chunks, scheduled)):
            assert chunk.start == request.num_computed, "I8: no position is skipped or computed twice"
            # Each request that ran before the step has a token of the budget, which only matters if several have a
            # part of their prompt left: not in order of arrival.
            kept = 0 if self.policy == "fcfs" else max(0, len(running_before) - i - 1)
            assert chunk.length == min(len(request.token_ids) - request.num_computed, left - kept) >= 1
            assert chunk.needs_sample == (chunk.start + chunk.length == len(request.token_ids))
            left -= chunk.length
            request.num_held = max(request.num_held, chunk.start + chunk.length)

        def pages_when_grown(requests: list[Request]) -> int:
            return sum(
                pages_for(min(len(request.token_ids) + self.watermark, request.max_total_tokens), page_size)
                for request in requests
            )

        for request in admitted:
            beside = scheduled[: scheduled.index(request) + 1]
            assert len(beside) == 1 or pages_when_grown(beside) <= self.usable_pages, (
                "admitted without room to grow by the watermark"
            )
        if waiting and not preempted and left and len(running) < self.rows:
            assert pages_when_grown([*running, waiting[0]]) > self.usable_pages, "not admitted although there is room"
        if preempted:
            num_computed, num_held = preempted_had[0]  # the first of the preempted requests, which was preempted last
            end = num_computed + min(len(preempted[0].token_ids) - num_computed, left)
            staying = sum(pages_for(request.num_held, page_size) for request in stayed)
            assert staying + pages_for(max(num_held, end), page_size) > self.usable_pages, (
                "preempted although enough pages were free"
            )
        return chunks

    def forward(self, chunks):
        """Write every token of the step into the fake pool, then check what each query sees."""
        if not chunks:
            return
        batch = build_step(chunks, self.kv, LAYOUT)
        slots = batch.slots[0].tolist()
        tokens = [  # (request, position) of each token of the step
            (self.live[chunk.sequence.request_id], position)
            for chunk in chunks
            for position in range(chunk.start, chunk.start + chunk.length)
        ]
        vectors = batch.vectors
        assert vectors.input_ids.tolist() == [request.token_ids[position] for request, position in tokens]
        assert vectors.positions.tolist() == [position for _, position in tokens]
        ends = [(self.live[chunk.sequence.request_id], chunk.start + chunk.length - 1) for chunk in chunks]
        assert [tokens[i] for i in vectors.chunk_ends.tolist()] == ends
        assert len(set(slots)) == len(slots), "I8: two tokens in one slot"
        assert min(slots) >= self.page_size, "I1: a token on page 0"
        for slot, (request, position) in zip(slots, tokens):
            self.kv_pool[slot] = self.entry(request, position)

        for chunk in chunks:  # I8: all computed tokens are in the slots of the host's page table
            self.assert_written(self.live[chunk.sequence.request_id], chunk.start + chunk.length)
        # I7: through the device tables, each query sees the tokens of its window and nothing else
        for index, window in enumerate(windows_of(LAYOUT)):
            seen = visible_slots(batch, index)
            for i, (request, position) in enumerate(tokens):
                first = 0 if window is None else max(0, position - window + 1)
                expected = [self.entry(request, past) for past in range(first, position + 1)]
                assert sorted((self.kv_pool.get(slot) for slot in seen[i]), key=str) == sorted(expected, key=str)

    def commit(self, chunks):
        replies, expected = [], []  # sampled tokens; requests that should end, with their finish reasons
        for chunk in chunks:
            request = self.live[chunk.sequence.request_id]
            request.num_computed += chunk.length
            if request.is_broken_in(chunk.start, chunk.length):
                replies.append(NOT_FINITE)
                expected.append((request, "error"))
            elif request.num_computed < len(request.token_ids):
                replies.append(EOS)  # must be ignored, because the chunk does not sample
            else:
                token = request.token_at(len(request.token_ids))
                replies.append(token)
                request.token_ids.append(token)
                if token == EOS:
                    expected.append((request, "stop"))
                elif len(request.token_ids) == request.max_total_tokens:
                    expected.append((request, "length"))
        finished = self.scheduler.commit(chunks, samples_of(replies))
        assert finished == [request.sequence for request, _ in expected]
        for request, reason in expected:
            del self.live[request.id]
            self.end(request, reason)
            assert (request.sequence.output_token_ids, reason) == request.expected_output()  # I14, I15, I16

    def end(self, request: Request, reason: str) -> None:
        output = request.sequence.output_token_ids
        assert output == request.expected_output()[0][: len(output)]
        self.ended[request.id] = (request, reason, tuple(output))

    def entry(self, request: Request, position: int) -> tuple[int, int, int, int]:
        return request.id, request.life, position, request.token_ids[position]

    def assert_written(self, request: Request, num_tokens: int) -> None:
        row = torch.full((num_tokens,), request.sequence.row)
        for position, slot in enumerate(self.table.slots(row, torch.arange(num_tokens)).tolist()):
            assert self.kv_pool.get(slot) == self.entry(request, position)

    # ---- checks after every rule ----

    def state_of_table(self) -> dict:
        tensors = ("table", "host_table", "physical_to_logical")
        state = copy.deepcopy({name: value for name, value in vars(self.table).items() if name not in tensors})
        return {**state, **{name: getattr(self.table, name).tolist() for name in tensors}}

    @invariant()
    def holds(self):
        self.requests_are_where_they_belong()
        with device_tables_kept(self.kv):
            check_scheduler(self.scheduler)
            self.pages_are_where_they_belong()

    def requests_are_where_they_belong(self):
        """Check I9, I10, I14 and I15."""
        scheduler = self.scheduler
        queues = scheduler.running, scheduler.waiting
        self.requests_are_in_order(*([self.live[sequence.request_id] for sequence in queue] for queue in queues))
        assert scheduler.has_unfinished_requests() == bool(self.live)
        assert len(scheduler.running) <= self.rows
        assert scheduler.num_preemptions == self.num_preemptions
        for request in self.live.values():
            sequence = request.sequence
            assert sequence.finish_reason is None
            assert sequence.token_ids == request.token_ids
            assert sequence.num_computed_tokens == request.num_computed < len(request.token_ids)
            assert len(request.token_ids) < request.max_total_tokens <= self.limit
            assert sequence.metrics.num_preemptions == request.life
            if sequence.row is None:
                assert request.num_computed == request.num_held == 0
            else:
                self.assert_written(request, request.num_computed)
        for request, reason, output in self.ended.values():
            sequence = request.sequence
            assert (sequence.finish_reason, tuple(sequence.output_token_ids)) == (reason, output), (
                "an ended request has changed"
            )
            assert sequence.row is None

    def requests_are_in_order(self, running: list[Request], waiting: list[Request]) -> None:
        """Check I10: the queues hold every request once, each in the order of the policy and of arrival."""
        everything = sorted(self.live.values(), key=lambda request: self.keys[request.id])  # stable: by arrival
        assert [request for request in everything if request in running] == running
        assert [request for request in everything if request not in running] == waiting
        if self.policy == "fcfs":
            assert running + waiting == list(self.live.values()), "a newer request runs while an older one waits"

    def pages_are_where_they_belong(self):
        """Check I1 to I6 on the device tables, which must be up to date."""
        running = [request for request in self.live.values() if request.sequence.row is not None]
        rows = {request.sequence.row: pages_for(request.num_held, self.page_size) for request in running}
        assert len(rows) == len(running) and 0 not in rows
        owned = []
        for row in range(self.rows + 1):
            listed, num_pages = self.table.table[row].tolist(), rows.get(row, 0)
            pages = listed[:num_pages]
            assert not any(listed[num_pages:])
            inverse = self.table.physical_to_logical[row].tolist()
            assert inverse == [pages.index(page) if page in pages else -1 for page in range(self.usable_pages + 1)]
            owned += pages
        assert len(set(owned)) == len(owned) and 0 not in owned
        assert self.table.num_used_pages == len(owned)
        assert self.table.num_free_pages == self.usable_pages - len(owned)

    def teardown(self):
        """Check I12 and I17: without new requests all requests end, and then all rows and pages are free.

        The first running request computes at least one token in every step. A request that runs again after a
        preemption computes its tokens again, so the number of steps is bounded by the tokens of all prefixes.
        """
        if not hasattr(self, "scheduler"):
            return  # Hypothesis stopped before `build`
        steps_left = sum(request.max_total_tokens for request in self.live.values())
        steps_left *= 1 if self.policy == "fcfs" else len(self.live)
        while self.live:
            assert steps_left > 0, "I12: requests do not end"
            steps_left -= 1
            self.step()
            self.holds()
        assert self.scheduler.schedule() == []
        assert self.table.num_free_pages == self.table.num_usable_pages == self.usable_pages
        assert not self.table._pages


TestEngine = Engine.TestCase
TestEngine.settings = settings(max_examples=num_cases(100), **MACHINE)


@pytest.mark.parametrize(
    ("policy", "seed"),
    [(policy, seed) for policy in POLICIES for seed in range(num_cases(100 if policy == "fcfs" else 30))],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_random_operations_keep_all_invariants(policy, seed):
    """Run the same machine without Hypothesis. Each seed has another pool, with more requests than the pool can hold.

    Hypothesis varies a pool that it has found instead of trying another pool.
    """
    random = Random(seed)

    def prompts(most: int) -> list[tuple]:
        return [
            (
                random.choice([random.randint(0, 3), random.randint(0, 99)]),
                random.choice([None, None, random.randint(1, 12)]),
                random.choice([None, None, random.randint(-4, 9)]),
                random.choice([EOS, NOT_FINITE]),
            )
            for _ in range(random.randint(0, most))
        ]

    engine = Engine()
    engine.build(
        n_pages=random.randint(3, 12),
        page_size=random.randint(1, 4),
        rows=random.randint(2, 5),
        budget=random.randint(1, 8),
        watermark=random.choice([0, 0, 1, 3, 8]),
        max_seq_length=random.choice([1000, 1000, 20, 7]),
        prompts=prompts(8),
        policy=policy,
    )
    for _ in range(60):
        move = random.randrange(20)
        if move < 14:
            engine.step(prompts(2) if len(engine.live) < 6 else [])
        elif move < 16:
            engine.fail_step(random.randint(0, 8))
        elif move < 18:
            engine.abort(random.randint(0, 30))
        elif move < 19:
            random.choice([engine.preempt_last, lambda: engine.erase_twice(random.randint(0, 30))])()
        elif random.random() < 0.3:
            engine.interrupt_schedule_and_reset(
                random.choice(["allocate", "reserve", "erase", "_map"]), random.randint(1, 4), random.random() < 0.5
            )
        engine.holds()
    engine.teardown()
