"""Examples for the scheduler: order of arrival, token budget, preemption, watermark, endings. They need no model.

The next token of the fake model depends only on the request and the position. Therefore the output of a request must
not depend on the other requests, as with greedy sampling. `check_scheduler` runs after every call.
"""

from collections.abc import Iterator

import pytest
from engines import make_sequence, samples_of

from flex_nano_vllm.geometry import Geometry
from flex_nano_vllm.invariants import check_scheduler
from flex_nano_vllm.kv_manager import KVManager
from flex_nano_vllm.sampling_params import SamplingParams
from flex_nano_vllm.scheduler import Chunk, Scheduler
from flex_nano_vllm.sequence import Sample, Sequence, TokenLogprob

EOS = 0


def fake_token(request_id: int, position: int) -> int:
    return 1 + (31 * request_id + 7 * position) % 97


def make_scheduler(
    usable_pages: int = 100, page_size: int = 1, rows: int = 8, budget: int = 64, watermark: int = 0
) -> Scheduler:
    geometry = Geometry(usable_pages + 1, page_size, rows, usable_pages * page_size, budget)
    return Scheduler(KVManager(geometry, prefix_caching=False), budget, watermark)


def submit(scheduler: Scheduler, request_id: int, prompt_len: int, max_tokens: int = 1000) -> Sequence:
    """Add a request like the engine: its output is limited to the tokens that fit into the pool."""
    room = scheduler.kv.primary.num_usable_pages * scheduler.kv.primary.page_size - prompt_len
    assert room >= 1, "the engine would reject this prompt"
    prompt = [fake_token(request_id, position) for position in range(prompt_len)]
    sequence = make_sequence(prompt, request_id, prompt_len + min(room, max_tokens), eos_token_ids=frozenset({EOS}))
    scheduler.add(sequence)
    check_scheduler(scheduler)
    return sequence


def schedule(scheduler: Scheduler) -> list[Chunk]:
    chunks = scheduler.schedule()
    check_scheduler(scheduler)
    assert sum(chunk.length for chunk in chunks) <= scheduler.max_num_batched_tokens
    assert all(chunk.length >= 1 for chunk in chunks)
    return chunks


def reply(chunk: Chunk, replies: dict[int, int]) -> int:
    """Return a token for any chunk. If the chunk does not sample, a token >= 0 must be ignored."""
    request_id = chunk.sequence.request_id
    return replies.get(request_id, fake_token(request_id, chunk.start + chunk.length))


def commit(scheduler: Scheduler, chunks: list[Chunk], replies: dict[int, int] | None = None) -> list[Sequence]:
    """Commit the tokens of the fake model, or of `replies` for the request ids in it."""
    finished = scheduler.commit(chunks, samples_of(reply(chunk, replies or {}) for chunk in chunks))
    check_scheduler(scheduler)
    return finished


def step(scheduler: Scheduler, replies: dict[int, int] | None = None) -> dict[int, int]:
    """Run one step. Returns the number of computed tokens by request id."""
    chunks = schedule(scheduler)
    commit(scheduler, chunks, replies)
    return lengths(chunks)


def lengths(chunks: list[Chunk]) -> dict[int, int]:
    return {chunk.sequence.request_id: chunk.length for chunk in chunks}


def ids(sequences) -> list[int]:
    return [sequence.request_id for sequence in sequences]


def until_done(scheduler: Scheduler, max_steps: int = 1000) -> Iterator[None]:
    """Yield once per step until all requests are finished. Raises AssertionError after `max_steps` steps."""
    for _ in range(max_steps):
        if not scheduler.has_unfinished_requests():
            return
        yield
    raise AssertionError(f"requests are unfinished after {max_steps} steps")


def run_until_done(scheduler: Scheduler) -> int:
    """Run steps until all requests are finished. Returns the number of computed tokens."""
    computed = sum(sum(step(scheduler).values()) for _ in until_done(scheduler))
    assert_empty(scheduler)
    return computed


def assert_empty(scheduler: Scheduler) -> None:
    table = scheduler.kv.primary
    assert not scheduler.has_unfinished_requests()
    assert schedule(scheduler) == []
    assert table.num_free_pages == table.num_usable_pages
    assert not table._pages


def assert_complete(sequence: Sequence) -> None:
    """Assert that the output has the token of the fake model at every position up to the length limit."""
    positions = range(sequence.num_prompt_tokens, sequence.max_total_tokens)
    assert sequence.output_token_ids == [fake_token(sequence.request_id, position) for position in positions]
    assert sequence.finish_reason == "length"


# ---- one request, or none ----


def test_the_schedule_is_empty_without_requests():
    assert_empty(make_scheduler())


def test_a_prompt_is_one_chunk_then_each_step_computes_the_last_sampled_token():
    scheduler = make_scheduler()
    sequence = submit(scheduler, 0, prompt_len=5, max_tokens=3)
    seen = []
    for _ in until_done(scheduler):
        (chunk,) = schedule(scheduler)
        seen.append((chunk.start, chunk.length, chunk.needs_sample))
        commit(scheduler, [chunk])
    assert seen == [(0, 5, True), (5, 1, True), (6, 1, True)]
    assert_complete(sequence)
    assert_empty(scheduler)


def test_a_prompt_longer_than_the_budget_is_chunked_and_only_its_last_chunk_samples():
    scheduler = make_scheduler(budget=4)
    submit(scheduler, 0, prompt_len=10)
    seen = []
    for _ in range(4):
        (chunk,) = schedule(scheduler)
        seen.append((chunk.start, chunk.length, chunk.needs_sample))
        commit(scheduler, [chunk])
    assert seen == [(0, 4, False), (4, 4, False), (8, 2, True), (10, 1, True)]


def test_pages_are_reserved_for_the_chunk_only_not_for_the_whole_prompt():
    scheduler = make_scheduler(page_size=2, budget=3)
    submit(scheduler, 0, prompt_len=9)
    for used_pages in (2, 3, 5, 5, 6):  # 3, 6, 9, 10, 11 tokens
        step(scheduler)
        assert scheduler.kv.primary.num_used_pages == used_pages


@pytest.mark.parametrize("prompt_len", [1, 5, 11])
def test_a_single_request_can_fill_the_whole_pool_with_any_watermark(prompt_len):
    scheduler = make_scheduler(usable_pages=4, page_size=3, watermark=1000)
    sequence = submit(scheduler, 0, prompt_len)
    run_until_done(scheduler)
    assert sequence.num_tokens == 12
    assert_complete(sequence)
    assert scheduler.num_preemptions == 0, "a request that runs alone is never preempted"


@pytest.mark.parametrize(("usable_pages", "page_size"), [(100, 4), (5, 4), (20, 1)])
def test_a_token_budget_of_one_completes_all_requests(usable_pages, page_size):
    scheduler = make_scheduler(usable_pages, page_size, rows=3, budget=1)
    sequences = [submit(scheduler, i, prompt_len=4 + i, max_tokens=5) for i in range(4)]
    computed = run_until_done(scheduler)
    for sequence in sequences:
        assert_complete(sequence)
    assert computed == sum(sequence.num_tokens - 1 for sequence in sequences), "no token is computed twice"


# ---- order ----


def test_requests_are_admitted_strictly_in_order_of_arrival():
    """A large request at the head of the queue is not overtaken by small requests that would fit."""
    scheduler = make_scheduler(usable_pages=10, budget=64)
    submit(scheduler, 0, prompt_len=5, max_tokens=3)
    submit(scheduler, 1, prompt_len=8, max_tokens=1)
    submit(scheduler, 2, prompt_len=1, max_tokens=1)
    assert [list(step(scheduler)) for _ in range(4)] == [[0], [0], [0], [1, 2]]
    assert_empty(scheduler)


def test_requests_get_their_first_tokens_in_order_of_arrival():
    scheduler = make_scheduler(usable_pages=24, page_size=2, rows=3, budget=5, watermark=4)
    sequences = [submit(scheduler, i, prompt_len=1 + 5 * i % 7, max_tokens=1 + i % 4) for i in range(12)]
    answered: list[int] = []
    for _ in until_done(scheduler):
        step(scheduler)
        answered += [s.request_id for s in sequences if s.output_token_ids and s.request_id not in answered]
    assert answered == list(range(12))


def test_the_number_of_running_requests_is_limited_to_the_number_of_rows():
    scheduler = make_scheduler(rows=2)
    for i in range(4):
        submit(scheduler, i, prompt_len=1, max_tokens=2)
    assert [list(step(scheduler)) for _ in range(4)] == [[0, 1], [0, 1], [2, 3], [2, 3]]
    assert_empty(scheduler)


def test_a_waiting_request_is_admitted_in_the_step_after_a_row_is_released():
    scheduler = make_scheduler(rows=1)
    submit(scheduler, 0, prompt_len=3, max_tokens=1)
    submit(scheduler, 1, prompt_len=3, max_tokens=1)
    assert [step(scheduler) for _ in range(2)] == [{0: 3}, {1: 3}]


def test_running_decodes_get_a_token_in_every_step_while_a_long_prompt_is_chunked():
    scheduler = make_scheduler(budget=8)
    for i in range(3):
        submit(scheduler, i, prompt_len=2)
    step(scheduler)
    submit(scheduler, 3, prompt_len=23)
    submit(scheduler, 4, prompt_len=1)
    seen = [step(scheduler) for _ in range(6)]
    assert seen[:4] == [{0: 1, 1: 1, 2: 1, 3: 5}] * 4
    assert seen[4] == {0: 1, 1: 1, 2: 1, 3: 3, 4: 1}, "the next request gets the rest of the budget"
    assert seen[5] == {0: 1, 1: 1, 2: 1, 3: 1, 4: 1}


def test_a_step_keeps_its_token_budget_and_admits_no_request_without_a_token():
    scheduler = make_scheduler(budget=4)
    for i in range(3):
        submit(scheduler, i, prompt_len=2)
    assert step(scheduler) == {0: 2, 1: 2}
    assert ids(scheduler.waiting) == [2]
    assert step(scheduler) == {0: 1, 1: 1, 2: 2}


# ---- preemption ----


def preemption_scene() -> tuple[Scheduler, list[Sequence]]:
    """Return a scheduler and its requests: 0, 1 and 2 run and fill the pool, 3 and 4 have never run."""
    scheduler = make_scheduler(usable_pages=12, rows=3)
    sequences = [submit(scheduler, i, prompt_len=3) for i in range(5)]
    step(scheduler)
    assert step(scheduler) == {0: 1, 1: 1, 2: 1}
    assert scheduler.kv.primary.num_free_pages == 0
    return scheduler, sequences


def test_the_newest_running_request_is_preempted_and_waits_ahead_of_newer_requests():
    scheduler, (_, _, newest, *_) = preemption_scene()
    output = list(newest.output_token_ids)
    assert len(output) == 2
    assert step(scheduler) == {0: 1, 1: 1}
    assert ids(scheduler.running) == [0, 1]
    assert ids(scheduler.waiting) == [2, 3, 4]
    assert newest.row is None
    assert newest.num_computed_tokens == 0
    assert newest.output_token_ids == output, "a preempted request keeps its output"
    assert newest.metrics.num_preemptions == scheduler.num_preemptions == 1


def test_a_preempted_request_runs_before_newer_ones_and_recomputes_prompt_and_output():
    scheduler, sequences = preemption_scene()
    step(scheduler)
    scheduler.abort(0)
    tokens_before = list(sequences[2].token_ids)
    chunks = schedule(scheduler)
    assert lengths(chunks) == {1: 1, 2: 5}  # request 3 needs more than the one free page
    assert (chunks[1].start, chunks[1].needs_sample) == (0, True)
    commit(scheduler, chunks)
    assert sequences[2].token_ids == [*tokens_before, fake_token(2, 5)]
    run_until_done(scheduler)
    for sequence in sequences[1:]:
        assert_complete(sequence)


def test_only_as_many_requests_as_needed_are_preempted_and_they_keep_their_order():
    scheduler = make_scheduler(usable_pages=4, page_size=4, rows=4)
    for i in range(4):
        submit(scheduler, i, prompt_len=3)
    step(scheduler)
    step(scheduler)  # four tokens and one page each: no request can grow any further
    assert step(scheduler) == {0: 1, 1: 1}  # request 0 takes the page of 3, and 1 takes the page of 2
    assert ids(scheduler.waiting) == [2, 3]
    assert scheduler.num_preemptions == 2


def test_a_prompt_is_preempted_if_it_is_the_newest_and_its_next_chunk_does_not_fit():
    scheduler = make_scheduler(usable_pages=12, budget=4)
    sequences = [submit(scheduler, 0, prompt_len=2, max_tokens=5), submit(scheduler, 1, prompt_len=8, max_tokens=2)]
    assert [step(scheduler) for _ in range(3)] == [{0: 2, 1: 2}, {0: 1, 1: 3}, {0: 1, 1: 3}]  # 4 + 8 pages
    assert step(scheduler) == {0: 1}
    assert ids(scheduler.waiting) == [1]
    run_until_done(scheduler)
    for sequence in sequences:
        assert_complete(sequence)


def test_the_oldest_request_is_never_preempted_and_advances_in_every_step():
    scheduler = make_scheduler(usable_pages=7, page_size=2, rows=4, budget=6)
    sequences = [submit(scheduler, i, prompt_len=1 + i % 3, max_tokens=4 + i) for i in range(9)]
    for _ in until_done(scheduler):
        oldest = [*scheduler.running, *scheduler.waiting][0]
        before = oldest.num_computed_tokens
        assert next(iter(step(scheduler))) == oldest.request_id
        assert oldest.num_computed_tokens > before
    assert scheduler.num_preemptions > 5, "the pool is too large: this test needs preemptions"
    assert sequences[0].metrics.num_preemptions == 0
    for sequence in sequences:
        assert_complete(sequence)


def test_a_step_that_preempts_admits_no_request():
    """Pages are free after the preemption: 2 held four, 0 and 1 take two of them, and 3 needs only one."""
    scheduler = make_scheduler(usable_pages=10, rows=8)
    for i, prompt_len in enumerate([3, 3, 4]):
        submit(scheduler, i, prompt_len)
    step(scheduler)
    submit(scheduler, 3, prompt_len=1)
    assert step(scheduler) == {0: 1, 1: 1}
    assert (ids(scheduler.running), ids(scheduler.waiting)) == ([0, 1], [2, 3])
    assert scheduler.kv.primary.num_free_pages == 2
    assert step(scheduler) == {0: 1, 1: 1}, "3 is not admitted while 2 is ahead of it and does not fit"


def test_no_preempting_step_of_a_tight_workload_admits_a_request():
    scheduler = make_scheduler(usable_pages=6, page_size=2, rows=4, budget=5)
    for i in range(10):
        submit(scheduler, i, prompt_len=1 + 3 * i % 5, max_tokens=6)
    preempting_steps = 0
    for _ in until_done(scheduler):
        running, preemptions = ids(scheduler.running), scheduler.num_preemptions
        chunks = schedule(scheduler)
        if scheduler.num_preemptions > preemptions:
            preempting_steps += 1
            assert ids(scheduler.running) == running[: len(scheduler.running)]
        commit(scheduler, chunks)
    assert preempting_steps > 5


@pytest.mark.parametrize("watermark", [0, 3, 16])
@pytest.mark.parametrize("budget", [1, 3, 64])
@pytest.mark.parametrize("usable_pages", [4, 5, 9])
def test_outputs_do_not_depend_on_preemption_budget_or_watermark(usable_pages, budget, watermark):
    scheduler = make_scheduler(usable_pages, page_size=3, rows=4, budget=budget, watermark=watermark)
    sequences = [submit(scheduler, i, prompt_len=1 + 4 * i % 7, max_tokens=1 + i % 5) for i in range(8)]
    run_until_done(scheduler)
    for sequence in sequences:
        assert_complete(sequence)


# ---- watermark ----


def test_a_request_is_admitted_exactly_if_all_requests_can_then_grow_by_the_watermark():
    """Request 0 has 4 tokens and can grow to 6. Request 1 has 2 tokens and can grow to 10."""
    for usable_pages in range(11, 20):
        for watermark in range(12):
            scheduler = make_scheduler(usable_pages, watermark=watermark)
            submit(scheduler, 0, prompt_len=3, max_tokens=3)
            step(scheduler)
            submit(scheduler, 1, prompt_len=2, max_tokens=8)
            needed = min(4 + watermark, 6) + min(2 + watermark, 10)
            assert (1 in step(scheduler)) == (needed <= usable_pages)


def test_admission_counts_all_tokens_of_a_request_with_a_chunked_prompt():
    """In the step with the last chunk of a prompt, admission of the next request counts the whole prompt."""
    scheduler = make_scheduler(usable_pages=10, budget=4)
    submit(scheduler, 0, prompt_len=9, max_tokens=1)
    submit(scheduler, 1, prompt_len=3, max_tokens=1)
    assert [step(scheduler) for _ in range(3)] == [{0: 4}, {0: 4}, {0: 1}]
    assert scheduler.num_preemptions == 0
    assert step(scheduler) == {1: 3}


def thrash(watermark: int) -> tuple[int, int]:
    """Run 24 requests of 8 + 24 tokens in a pool that holds three. Returns (computed tokens, preemptions)."""
    scheduler = make_scheduler(usable_pages=24, page_size=4, rows=24, budget=64, watermark=watermark)
    sequences = [submit(scheduler, i, prompt_len=8, max_tokens=24) for i in range(24)]
    computed = run_until_done(scheduler)
    for sequence in sequences:
        assert_complete(sequence)
    return computed, scheduler.num_preemptions


def test_the_watermark_prevents_thrashing():
    necessary = 24 * (8 + 24 - 1)  # the last token of a request is never computed
    without, preemptions_without = thrash(watermark=0)
    some, preemptions_some = thrash(watermark=8)
    ample, preemptions_ample = thrash(watermark=24)
    assert (ample, preemptions_ample) == (necessary, 0), "a request that can grow to its end is never preempted"
    assert some <= 1.25 * necessary, "a watermark of a third of the output saves most of the recomputation"
    assert 1.5 * necessary <= without <= 2 * necessary, "the pool is tight, but recomputation is bounded"
    assert preemptions_some < preemptions_without


# ---- endings ----


def test_eos_ends_a_request_with_reason_stop_and_is_its_last_token():
    scheduler = make_scheduler()
    sequence = submit(scheduler, 0, prompt_len=2, max_tokens=5)
    step(scheduler)
    chunks = schedule(scheduler)
    assert commit(scheduler, chunks, {0: EOS}) == [sequence]
    assert sequence.finish_reason == "stop"
    assert sequence.output_token_ids == [fake_token(0, 2), EOS]
    assert_empty(scheduler)


def test_eos_at_the_length_limit_ends_a_request_with_reason_stop():
    scheduler = make_scheduler()
    sequence = submit(scheduler, 0, prompt_len=2, max_tokens=1)
    step(scheduler, {0: EOS})
    assert sequence.finish_reason == "stop"


def test_eos_in_the_prompt_does_not_end_the_request():
    scheduler = make_scheduler()
    sequence = submit(scheduler, 0, prompt_len=3, max_tokens=2)
    sequence.token_ids[1] = EOS
    run_until_done(scheduler)
    assert_complete(sequence)


@pytest.mark.parametrize("max_tokens", [1, 2, 7])
def test_a_request_ends_with_reason_length_after_exactly_max_tokens_tokens(max_tokens):
    scheduler = make_scheduler()
    sequence = submit(scheduler, 0, prompt_len=4, max_tokens=max_tokens)
    assert run_until_done(scheduler) == 4 + max_tokens - 1
    assert len(sequence.output_token_ids) == max_tokens
    assert_complete(sequence)


def test_commit_returns_finished_requests_in_order_and_releases_their_pages():
    scheduler = make_scheduler(usable_pages=20, page_size=2)
    a, b, c = (submit(scheduler, i, prompt_len=3, max_tokens=max_tokens) for i, max_tokens in enumerate([1, 9, 1]))
    chunks = schedule(scheduler)
    assert scheduler.kv.primary.num_used_pages == 6
    assert commit(scheduler, chunks) == [a, c]
    assert scheduler.running == [b]
    assert scheduler.kv.primary.num_used_pages == 2
    assert (a.row, c.row) == (None, None)


def test_token_minus_one_ends_only_its_own_request_with_reason_error():
    scheduler = make_scheduler()
    sequences = [submit(scheduler, i, prompt_len=2, max_tokens=4) for i in range(3)]
    step(scheduler)
    chunks = schedule(scheduler)
    assert commit(scheduler, chunks, {1: -1}) == [sequences[1]]
    assert sequences[1].finish_reason == "error"
    assert sequences[1].output_token_ids == [fake_token(1, 2)], "-1 is not a token of the output"
    assert ids(scheduler.running) == [0, 2]
    run_until_done(scheduler)
    assert_complete(sequences[0])
    assert_complete(sequences[2])


@pytest.mark.parametrize("token", [EOS, 5])
def test_the_token_of_a_chunk_that_does_not_sample_is_ignored(token):
    scheduler = make_scheduler(budget=8)
    short = submit(scheduler, 0, prompt_len=2, max_tokens=1)
    long = submit(scheduler, 1, prompt_len=10, max_tokens=2)
    chunks = schedule(scheduler)
    assert [chunk.needs_sample for chunk in chunks] == [True, False]
    assert commit(scheduler, chunks, {1: token}) == [short]
    assert_complete(short)
    assert (long.output_token_ids, long.num_computed_tokens, long.finish_reason) == ([], 6, None)
    run_until_done(scheduler)
    assert_complete(long)


def test_token_minus_one_in_the_middle_of_a_prompt_ends_the_request_and_frees_its_pages():
    scheduler = make_scheduler(budget=8)
    other = submit(scheduler, 0, prompt_len=2, max_tokens=3)
    broken = submit(scheduler, 1, prompt_len=20)
    chunks = schedule(scheduler)
    assert commit(scheduler, chunks, {1: -1}) == [broken]
    assert (broken.finish_reason, broken.output_token_ids, broken.row) == ("error", [], None)
    assert scheduler.kv.primary.num_used_pages == 2
    run_until_done(scheduler)
    assert_complete(other)


def test_a_request_that_finishes_does_not_affect_later_requests_of_the_step():
    scheduler = make_scheduler()
    sequences = [submit(scheduler, i, prompt_len=2, max_tokens=1 + i) for i in range(4)]
    run_until_done(scheduler)
    for sequence in sequences:
        assert_complete(sequence)


def test_a_step_may_give_a_sequence_several_tokens_and_the_next_step_computes_them():
    scheduler = make_scheduler(page_size=2, budget=10)
    several, one, none = (submit(scheduler, i, prompt_len, max_tokens=9) for i, prompt_len in enumerate((3, 3, 9)))
    chunks = schedule(scheduler)
    scheduler.commit(chunks, [Sample([5, 6, 7]), Sample([8]), Sample([])])
    check_scheduler(scheduler)
    assert [s.output_token_ids for s in (several, one, none)] == [[5, 6, 7], [8], []]
    assert [s.num_computed_tokens for s in (several, one, none)] == [3, 3, 4]
    assert scheduler.num_generated_tokens == 4
    expected = [(3, 3, True), (3, 1, True), (4, 5, True)]
    assert [(chunk.start, chunk.length, chunk.needs_sample) for chunk in schedule(scheduler)] == expected


@pytest.mark.parametrize(
    ("tokens", "max_tokens", "output", "reason"),
    [([5, EOS, 6], 9, [5, EOS], "stop"), ([5, 6, 7], 2, [5, 6], "length"), ([5, 44, 6], 9, [5, 44], "stop")],
)
def test_a_sequence_that_ends_within_the_tokens_of_a_step_ignores_the_rest(tokens, max_tokens, output, reason):
    scheduler = make_scheduler()
    sequence = submit(scheduler, 0, prompt_len=3, max_tokens=max_tokens)
    sequence.params = SamplingParams(stop_token_ids=[44], logprobs=0)
    logprobs = tuple(TokenLogprob(-1.0 - i, 1, []) for i in range(3))
    assert scheduler.commit(schedule(scheduler), [Sample(tokens, logprobs)]) == [sequence]
    assert (sequence.output_token_ids, sequence.finish_reason) == (output, reason)
    assert sequence.stop_reason == (44 if 44 in output else None)
    assert sequence.logprobs == list(logprobs[:2])
    assert scheduler.num_generated_tokens == 2
    assert_empty(scheduler)


# ---- abort ----


def test_abort_removes_a_waiting_request_from_the_queue():
    scheduler = make_scheduler(rows=1)
    sequences = [submit(scheduler, i, prompt_len=2, max_tokens=3) for i in range(3)]
    step(scheduler)
    assert scheduler.abort(1) == [sequences[1]]
    check_scheduler(scheduler)
    assert (sequences[1].finish_reason, sequences[1].output_token_ids) == ("abort", [])
    assert (ids(scheduler.running), ids(scheduler.waiting)) == ([0], [2])
    run_until_done(scheduler)
    assert_complete(sequences[0])
    assert_complete(sequences[2])


def test_abort_in_the_middle_of_a_prefill_releases_the_pages():
    scheduler = make_scheduler(budget=4, usable_pages=20)
    sequence, other = submit(scheduler, 0, prompt_len=10), submit(scheduler, 1, prompt_len=3, max_tokens=2)
    step(scheduler)
    assert scheduler.kv.primary.num_used_pages == 4
    assert scheduler.abort(0) == [sequence]
    check_scheduler(scheduler)
    assert scheduler.kv.primary.num_used_pages == 0
    assert (sequence.finish_reason, sequence.row) == ("abort", None)
    run_until_done(scheduler)
    assert_complete(other)


def test_abort_of_a_running_request_keeps_its_output_and_does_not_affect_others():
    scheduler = make_scheduler()
    sequences = [submit(scheduler, i, prompt_len=3, max_tokens=5) for i in range(3)]
    step(scheduler)
    step(scheduler)
    assert scheduler.abort(1) == [sequences[1]]
    check_scheduler(scheduler)
    assert sequences[1].finish_reason == "abort"
    assert sequences[1].output_token_ids == [fake_token(1, 3), fake_token(1, 4)]
    assert ids(scheduler.running) == [0, 2]
    assert 1 not in step(scheduler)
    run_until_done(scheduler)
    assert_complete(sequences[0])
    assert_complete(sequences[2])


def test_preempt_last_between_two_steps_changes_no_output():
    """A caller may preempt the newest request although enough pages are free."""
    scheduler = make_scheduler()
    sequences = [submit(scheduler, i, prompt_len=3, max_tokens=4) for i in range(3)]
    step(scheduler)
    assert scheduler.preempt_last() is sequences[2]
    check_scheduler(scheduler)
    assert (ids(scheduler.running), ids(scheduler.waiting)) == ([0, 1], [2])
    assert (sequences[2].row, sequences[2].num_computed_tokens, len(sequences[2].output_token_ids)) == (None, 0, 1)
    assert step(scheduler) == {0: 1, 1: 1, 2: 4}
    run_until_done(scheduler)
    for sequence in sequences:
        assert_complete(sequence)


def test_abort_of_a_preempted_request_keeps_its_output():
    scheduler, sequences = preemption_scene()
    step(scheduler)
    assert scheduler.abort(2) == [sequences[2]]
    check_scheduler(scheduler)
    assert len(sequences[2].output_token_ids) == 2
    assert ids(scheduler.waiting) == [3, 4]


def test_abort_after_a_failed_step_does_not_affect_other_requests():
    scheduler = make_scheduler()
    sequences = [submit(scheduler, i, prompt_len=3, max_tokens=2) for i in range(2)]
    schedule(scheduler)  # then the forward pass raises
    assert scheduler.abort(0) == [sequences[0]]
    check_scheduler(scheduler)
    assert step(scheduler) == {1: 3}
    run_until_done(scheduler)
    assert_complete(sequences[1])


@pytest.mark.parametrize("ending", ["finished", "aborted", "unknown"])
def test_abort_of_an_ended_or_unknown_request_returns_an_empty_list_and_changes_nothing(ending):
    scheduler = make_scheduler()
    ended, other = submit(scheduler, 0, prompt_len=2, max_tokens=1), submit(scheduler, 1, prompt_len=2, max_tokens=3)
    step(scheduler, None)
    if ending == "aborted":
        ended = other
        assert scheduler.abort(1) == [other]
    target = {"finished": 0, "aborted": 1, "unknown": 99}[ending]
    before = (ended.finish_reason, list(ended.token_ids), ids(scheduler.running), scheduler.kv.primary.num_free_pages)
    assert scheduler.abort(target) == []
    check_scheduler(scheduler)
    assert before == (
        ended.finish_reason,
        list(ended.token_ids),
        ids(scheduler.running),
        scheduler.kv.primary.num_free_pages,
    )
    run_until_done(scheduler)


# ---- failure and reset ----


def test_a_failed_step_can_be_scheduled_again_with_the_same_chunks():
    scheduler, _ = preemption_scene()  # the next step also preempts
    first = schedule(scheduler)
    pages = scheduler.kv.primary.host_table.copy()
    again = schedule(scheduler)
    assert first == again
    assert (scheduler.kv.primary.host_table == pages).all()
    assert scheduler.num_preemptions == 1, "the preemption of the failed step is not repeated"


def test_a_forward_pass_that_fails_every_second_time_changes_no_output():
    scheduler = make_scheduler(usable_pages=8, page_size=2, rows=3, budget=5)
    sequences = [submit(scheduler, i, prompt_len=1 + i, max_tokens=6) for i in range(6)]
    for _ in until_done(scheduler):
        before = [(list(s.token_ids), s.finish_reason) for s in sequences]
        schedule(scheduler)  # then the forward pass raises
        assert before == [(list(s.token_ids), s.finish_reason) for s in sequences]
        step(scheduler)
    for sequence in sequences:
        assert_complete(sequence)


def test_a_request_that_arrives_after_a_failed_step_joins_the_next_step():
    scheduler = make_scheduler()
    submit(scheduler, 0, prompt_len=3)
    schedule(scheduler)
    submit(scheduler, 1, prompt_len=2)
    assert step(scheduler) == {0: 3, 1: 2}


class Interrupted(BaseException):
    """Like KeyboardInterrupt, but raised only by this test."""


@pytest.mark.parametrize("method", ["allocate", "reserve", "erase", "_map"])
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("call", [1, 2, 3])
def test_reset_cleans_up_after_an_interrupt_in_a_method_of_the_page_table(monkeypatch, method, when, call):
    """The steps preempt, admit, grow and finish requests. The interrupt is raised in the n-th call of a method."""
    scheduler, _ = preemption_scene()
    table, calls = scheduler.kv.primary, 0
    original = getattr(table, method)

    def interrupted(*args):
        nonlocal calls
        calls += 1
        if calls == call and when == "before":
            raise Interrupted
        result = original(*args)
        if calls == call:
            raise Interrupted
        return result

    monkeypatch.setattr(table, method, interrupted)
    with pytest.raises(Interrupted):
        for _ in until_done(scheduler):
            chunks = scheduler.schedule()
            scheduler.commit(chunks, samples_of(reply(chunk, {}) for chunk in chunks))
    monkeypatch.undo()
    scheduler.reset()
    check_scheduler(scheduler)
    assert_empty(scheduler)
    again = submit(scheduler, 100, prompt_len=3, max_tokens=9)  # needs the whole pool
    run_until_done(scheduler)
    assert_complete(again)


def test_reset_removes_requests_from_inconsistent_queues_and_rows():
    scheduler, sequences = preemption_scene()
    scheduler.waiting.append(sequences[0])  # in both queues
    scheduler.running.append(sequences[3])  # runs without a row
    scheduler.kv.primary.erase(sequences[1].row)  # runs in a row that is not allocated
    with pytest.raises(AssertionError):
        check_scheduler(scheduler)
    scheduler.reset()
    check_scheduler(scheduler)
    assert_empty(scheduler)


# ---- check_scheduler itself ----


def corrupt_order(scheduler, sequences):
    scheduler.running.reverse()


def corrupt_queue_order(scheduler, sequences):
    scheduler.waiting.reverse()


def put_into_both_queues(scheduler, sequences):
    scheduler.waiting.append(sequences[0])


def finish_without_leaving(scheduler, sequences):
    sequences[1].finish_reason = "stop"


def keep_computed_tokens_while_waiting(scheduler, sequences):
    sequences[3].num_computed_tokens = 1


def keep_row_while_waiting(scheduler, sequences):
    sequences[3].row = 1


def share_a_row(scheduler, sequences):
    sequences[1].row = sequences[0].row


def leak_a_row(scheduler, sequences):
    scheduler.running.remove(sequences[2])


def compute_beyond_pages(scheduler, sequences):
    sequences[0].num_computed_tokens += 2


def lose_a_page(scheduler, sequences):
    scheduler.kv.primary._pages[1].popitem()


@pytest.mark.parametrize(
    "corrupt",
    [
        corrupt_order,
        corrupt_queue_order,
        put_into_both_queues,
        finish_without_leaving,
        keep_computed_tokens_while_waiting,
        keep_row_while_waiting,
        share_a_row,
        leak_a_row,
        compute_beyond_pages,
        lose_a_page,
    ],
)
def test_check_invariants_detects_corruption(corrupt):
    scheduler, sequences = preemption_scene()
    check_scheduler(scheduler)
    corrupt(scheduler, sequences)
    with pytest.raises(AssertionError):
        check_scheduler(scheduler)
