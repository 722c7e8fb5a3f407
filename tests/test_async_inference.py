"""Many callers share one engine: they get the outputs of the engine alone, cancelled requests release their pages, and
a failure leaves no caller waiting."""

import asyncio
import gc
import math
import threading
from contextlib import asynccontextmanager

import pytest
from engines import assert_empty, greedy, raise_at_call
from serving import PATIENCE, Calls, Gate, new_engine, run, until

from benchmarks.random_models import byte_tokenizer
from flex_nano_vllm import SamplingParams, async_inference, inference
from flex_nano_vllm import output_processor as answers_module
from flex_nano_vllm.async_inference import AsyncInference, EngineBusy, EngineClosing, EngineDead, EngineError
from flex_nano_vllm.detokenizer import Detokenizer
from flex_nano_vllm.output_processor import Statistics
from flex_nano_vllm.page_table import PageTable
from flex_nano_vllm.runner import ModelRunner
from flex_nano_vllm.sampler import Sampler
from flex_nano_vllm.scheduler import Scheduler
from flex_nano_vllm.step import StepVectors

PARAMS = [
    greedy(9),
    SamplingParams(seed=5, max_tokens=7),
    SamplingParams(seed=1, n=3, max_tokens=6, temperature=1.3, logprobs=2),
    SamplingParams(seed=2, max_tokens=24, stop=["a", "x", "e"], logprobs=0),
    SamplingParams(temperature=0, max_tokens=5, repetition_penalty=3.0),
    SamplingParams(seed=8, max_tokens=1),
]
PROMPTS = ["abc", "the same beginning, 1", "the same beginning, 2", "x", [7, 8, 9, 10], "two\nlines"]


@pytest.fixture(scope="module")
def oracle():
    with new_engine() as engine:
        yield engine


@pytest.fixture
def engine():
    with new_engine() as engine:
        yield engine


@asynccontextmanager
async def sharing(engine, **options):
    """Share an engine. At the end, no request, page or mailbox is left."""
    async with AsyncInference(engine, **(dict(stream_interval=0) | options)) as shared:
        yield shared
        await shared.call(lambda: None)
    assert shared.num_waiting == 0 and not shared._mailboxes
    assert_empty(engine)


def answers_of(output):
    return [(c.index, c.text, c.token_ids, c.finish_reason, c.stop_reason) for c in output.outputs]


def expected_of(oracle, prompt, params):
    return answers_of(oracle.generate([prompt], params, use_tqdm=False)[0])


async def together(shared, *submissions):
    """Submit requests so that they can start in the same step."""
    is_set = threading.Event()
    blocking = asyncio.ensure_future(shared.call(lambda: is_set.wait(PATIENCE)))
    await asyncio.sleep(0)
    answers = [await submission for submission in submissions]
    is_set.set()
    await blocking
    return answers


async def last(answers):
    with answers:
        *_, (_, output) = [item async for news in answers for item in news]
        return output


# --- outputs -----------------------------------------------------------------------------------------------------


def test_many_concurrent_callers_get_the_same_outputs_as_alone(engine, oracle):
    pairs = [*zip(PROMPTS, PARAMS), *zip(PROMPTS[1:], PARAMS), *zip(PROMPTS[2:], PARAMS)]
    expected = [expected_of(oracle, prompt, params) for prompt, params in pairs]

    async def main():
        async with sharing(engine) as shared:
            return await asyncio.gather(*(shared.generate(prompt, params) for prompt, params in pairs))

    outputs = run(main())
    assert [answers_of(output) for output in outputs] == expected
    assert len({output.request_id for output in outputs}) == len(outputs)


def test_the_joined_deltas_of_concurrent_streams_equal_the_outputs_of_the_engine(engine, oracle):
    pairs = [*zip(PROMPTS, PARAMS), *zip(PROMPTS[1:], PARAMS)]
    expected = [oracle.generate([prompt], params, use_tqdm=False)[0].outputs for prompt, params in pairs]

    async def collected(shared, prompt, params):
        return [delta async for delta in shared.stream(prompt, params)]

    async def main():
        async with sharing(engine) as shared:
            return await asyncio.gather(*(collected(shared, *pair) for pair in pairs))

    for deltas, completions in zip(run(main()), expected, strict=True):
        for completion in completions:
            own = [delta for delta in deltas if delta.index == completion.index]
            assert "".join(delta.text for delta in own) == completion.text
            assert [token for delta in own for token in delta.token_ids] == completion.token_ids
            assert [delta.finish_reason for delta in own[:-1]] == [None] * (len(own) - 1)
            assert (own[-1].finish_reason, own[-1].stop_reason) == (completion.finish_reason, completion.stop_reason)
            if completion.logprobs is not None:
                rated = [logprob for delta in own for logprob in delta.logprobs]
                assert [list(entry) for entry in rated] == [list(entry) for entry in completion.logprobs]
            else:
                assert all(delta.logprobs is None for delta in own)


def test_a_chat_has_the_prompt_and_the_output_of_the_engines_chat(engine, oracle):
    messages = [{"role": "user", "content": "hi"}]
    (expected,) = oracle.chat(messages, greedy(5), use_tqdm=False)

    async def main():
        async with sharing(engine) as shared:
            return await shared.chat(messages, greedy(5)), await shared.chat_prompt(messages)

    output, prompt = run(main())
    assert answers_of(output) == answers_of(expected)
    assert prompt == output.prompt_token_ids == expected.prompt_token_ids


def test_requests_submitted_together_are_identified_by_their_index(engine, oracle):
    expected = [expected_of(oracle, prompt, greedy(4)) for prompt in PROMPTS]

    async def main():
        async with sharing(engine) as shared:
            with await shared.submit(PROMPTS, greedy(4), follow=False) as answers:
                return {index: output async for news in answers for index, output in news}

    outputs = run(main())
    assert [answers_of(outputs[index]) for index in range(len(PROMPTS))] == expected


@pytest.mark.parametrize(
    ("prompts", "params", "match"),
    [
        (["a", ""], greedy(2), "prompt 1 is empty"),
        ([[259]], greedy(2), "prompt holds 259"),
        (["x" * 64], greedy(2), "prompt "),
        (["a"], SamplingParams(stop_token_ids=[999]), "stop_token_ids"),
        (["a"], "greedy", "sampling_params"),
    ],
)
def test_an_invalid_request_raises_and_is_not_queued(engine, prompts, params, match):
    async def main():
        async with sharing(engine) as shared:
            with pytest.raises(ValueError, match=match):
                await shared.submit(prompts, params)
            assert shared.num_waiting == 0 and not shared._commands

    run(main())
    assert engine.stats().num_steps == 0


def test_an_engine_with_unfinished_requests_cannot_be_shared(engine):
    engine.add_request("a")
    with pytest.raises(ValueError, match="unfinished"):
        AsyncInference(engine)


# --- slow readers and cancelled requests -------------------------------------------------------------------------


def test_an_unread_stream_does_not_block_other_requests_and_loses_no_output(engine, oracle):
    (expected,) = oracle.generate(["slow"], greedy(20), use_tqdm=False)

    async def main():
        async with sharing(engine) as shared:
            slow = shared.stream("slow", greedy(20))
            first = await anext(slow)
            others = await asyncio.gather(*(shared.generate(prompt, greedy(20)) for prompt in PROMPTS))
            await until(lambda: not engine.has_unfinished_requests())
            await shared.call(lambda: None)
            return first, others, [delta async for delta in slow]

    first, others, (rest,) = run(main())  # the unread output is one delta
    assert len(others) == len(PROMPTS)
    assert first.token_ids + rest.token_ids == expected.outputs[0].token_ids
    assert first.text + rest.text == expected.outputs[0].text
    assert rest.finish_reason == "length"


def test_a_step_visits_only_the_streams_of_running_requests(engine, oracle, monkeypatch):
    num_streams, params = 40, greedy(3)
    expected = expected_of(oracle, "abc", params)

    async def main():
        async with sharing(engine) as shared:
            collected = Calls(monkeypatch, shared, "_collect")
            submissions = await together(shared, *[shared.submit(["abc"], params) for _ in range(num_streams)])
            outputs = await asyncio.gather(*map(last, submissions))
            return outputs, collected.number

    before = engine.stats().num_steps
    outputs, num_visits = run(main())
    assert [answers_of(output) for output in outputs] == [expected] * num_streams
    num_steps, num_rows = engine.stats().num_steps - before, engine.page_table.max_batch_size
    assert num_visits <= num_steps * num_rows + num_streams < num_steps * num_streams / 2


def test_the_stream_interval_delays_all_deltas_except_the_first_and_the_last(engine, oracle):
    (expected,) = oracle.generate(["fast"], greedy(12), use_tqdm=False)

    async def main():
        async with sharing(engine, stream_interval=math.inf) as shared:
            return [delta async for delta in shared.stream("fast", greedy(12))]

    first, rest = run(main())
    assert len(first.token_ids) == 1
    assert first.token_ids + rest.token_ids == expected.outputs[0].token_ids
    assert first.text + rest.text == expected.outputs[0].text


def test_streams_are_notified_less_often_if_notifying_takes_long(engine, monkeypatch):
    async def main():
        async with sharing(engine) as shared:
            deltas = [delta async for delta in shared.stream("fast", greedy(12))]
            await asyncio.sleep(0)  # the event loop notes the last time after the stream was read
            assert len(deltas) > 2 and min(shared._notify_times) > 0
            monkeypatch.setattr(shared, "_note_notifying", lambda started: None)
            shared._notify_times = 3600.0, 3600.0
            monkeypatch.setattr(async_inference, "MAX_STREAM_INTERVAL", math.inf)
            return [delta async for delta in shared.stream("fast", greedy(12))]

    assert len(run(main())) == 2


@pytest.mark.parametrize(
    ("telling_times", "stream_interval", "expected"),
    [((0.0, 0.0), 0.04, 0.04), ((0.002, 0.001), 0.04, 0.05), ((9.0, 0.0001), 0.04, 0.04), ((9.0, 9.0), 0.04, 0.25)],
    ids=["few streams", "many streams", "a pause", "above the maximum interval"],
)
def test_the_stream_interval_grows_with_the_time_of_notifying_up_to_the_maximum(
    engine, telling_times, stream_interval, expected
):
    async def main():
        async with sharing(engine, stream_interval=stream_interval) as shared:
            shared._notify_times = telling_times
            return shared._stream_interval()

    assert run(main()) == pytest.approx(expected)


def test_a_request_cancelled_before_it_starts_runs_no_step(engine):
    async def main():
        async with sharing(engine) as shared:
            task = asyncio.create_task(shared.generate("a", greedy(5)))
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            stream = shared.stream("a", greedy(5))  # never iterated
            del stream

    run(main())
    assert engine.stats().num_steps == 0


def test_a_request_cancelled_during_tokenization_never_reaches_the_engine(engine, monkeypatch):
    begun, may_go_on = threading.Event(), threading.Event()
    request = engine.input_processor.request

    def slow(*args, **kwargs):
        begun.set()
        assert may_go_on.wait(PATIENCE)
        return request(*args, **kwargs)

    monkeypatch.setattr(engine.input_processor, "request", slow)
    added = Calls(monkeypatch, engine, "add")

    async def main():
        async with sharing(engine) as shared:
            task = asyncio.create_task(shared.generate("a", greedy(5)))
            await asyncio.to_thread(begun.wait, PATIENCE)
            assert shared.num_waiting == 1
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert shared.num_waiting == 0
            may_go_on.set()
            await shared.generate("b", greedy(1))

    run(main())
    assert added.number == 1


@pytest.mark.parametrize("streams", [False, True])
def test_a_request_cancelled_while_waiting_leaves_the_queue_before_the_next_step(oracle, monkeypatch, streams):
    with new_engine(max_batch_size=1) as engine:
        gate, aborted = Gate(engine), Calls(monkeypatch, engine, "abort")

        async def main():
            async with sharing(engine) as shared:
                first = asyncio.create_task(shared.generate("first", greedy(6)))
                await gate.arrival()
                second = asyncio.create_task(consumed(shared, "second", greedy(6), streams))
                await until(lambda: shared._commands)
                gate.let_pass()
                await gate.arrival()
                assert [s.prompt for s in engine.scheduler.waiting] == ["second"]
                second.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await second
                gate.let_pass()
                await gate.arrival()
                assert not engine.scheduler.waiting and len(engine.scheduler.running) == 1
                gate.open()
                return await first

        assert answers_of(run(main())) == expected_of(oracle, "first", greedy(6))
    assert aborted.number == 1


async def consumed(shared, prompt, params, streams):
    if not streams:
        return await shared.generate(prompt, params)
    return [delta async for delta in shared.stream(prompt, params)]


@pytest.mark.parametrize("streams", [False, True])
def test_a_request_cancelled_while_running_is_not_part_of_the_next_step(engine, oracle, monkeypatch, streams):
    gate, aborted = Gate(engine), Calls(monkeypatch, engine, "abort")

    async def main():
        async with sharing(engine) as shared:
            task = asyncio.create_task(consumed(shared, "leaves", greedy(30), streams))
            await gate.arrival()
            other = asyncio.create_task(shared.generate("stays", greedy(6)))
            await until(lambda: shared._commands)
            gate.let_pass()
            await gate.arrival()
            assert [s.prompt for s in engine.scheduler.running] == ["leaves", "stays"]
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            gate.let_pass()
            await gate.arrival()
            assert [s.prompt for s in engine.scheduler.running] == ["stays"]
            gate.open()
            return await other

    assert answers_of(run(main())) == expected_of(oracle, "stays", greedy(6))
    assert aborted.number == 1


def test_a_finished_request_is_not_aborted(engine, monkeypatch):
    aborted = Calls(monkeypatch, engine, "abort")

    async def main():
        async with sharing(engine) as shared:
            commands = Calls(monkeypatch, shared, "abort")
            for streams in (False, True):
                await asyncio.gather(*(consumed(shared, *pair, streams) for pair in zip(PROMPTS, PARAMS)))
            await shared.chat([{"role": "user", "content": "hi"}], greedy(3))
            task = asyncio.create_task(shared.generate("a", greedy(2)))
            await task
            task.cancel()
            await shared.call(lambda: None)
            return commands.number

    assert run(main()) == 0
    assert aborted.number == 0


def test_breaking_out_of_a_stream_aborts_its_request(engine, monkeypatch):
    gate, aborted = Gate(engine), Calls(monkeypatch, engine, "abort")

    async def main():
        async with sharing(engine) as shared:
            gate.let_pass()
            async for delta in shared.stream("a", greedy(30)):
                assert delta.token_ids
                break
            await until(lambda: len(shared._commands) == 1)  # deleting the generator sends the abort
            gate.open()
            await shared.call(lambda: None)
            assert aborted.number == 1
            assert_empty(engine)

    run(main())
    assert engine.stats().num_generated_tokens <= 2


def test_a_stream_deleted_by_the_garbage_collector_aborts_its_request(engine, monkeypatch):
    gate, aborted = Gate(engine), Calls(monkeypatch, engine, "abort")

    async def main():
        async with sharing(engine) as shared:
            gate.let_pass()
            stream = shared.stream("a", greedy(30))
            cycle = [stream]
            cycle.append(cycle)
            await anext(stream)
            del stream, cycle
            gc.collect()
            await until(lambda: len(shared._commands) == 1)
            gate.open()
            await shared.call(lambda: None)
            assert aborted.number == 1
            assert_empty(engine)

    run(main())


def test_an_aborted_request_returns_its_output_so_far(engine, oracle):
    (expected,) = oracle.generate(["abc"], greedy(30), use_tqdm=False)
    gate = Gate(engine)

    async def main():
        async with sharing(engine) as shared:
            gate.let_pass()
            answers = await shared.submit(["abc"], greedy(30))
            news = aiter(answers)
            ((_, first),) = await anext(news)
            shared.abort(first.request_id)
            shared.abort(first.request_id)
            shared.abort(12345)
            gate.open()
            return [first] + [item async for items in news for _, item in items]

    *deltas, output = run(main())
    assert output.outputs[0].finish_reason == deltas[-1].finish_reason == "abort"
    assert output.outputs[0].token_ids == [token for delta in deltas for token in delta.token_ids]
    assert 1 <= len(output.outputs[0].token_ids) <= 2
    assert expected.outputs[0].text.startswith(output.outputs[0].text)


# --- limits and closing ------------------------------------------------------------------------------------------


def test_a_request_that_exceeds_the_queue_is_rejected_and_takes_no_place_in_it():
    with new_engine(max_batch_size=1) as engine:
        gate = Gate(engine)

        async def main():
            async with sharing(engine, max_waiting=2) as shared:
                running = asyncio.create_task(shared.generate("runs", greedy(3)))
                await gate.arrival()
                for too_many in (shared.submit(["a", "b", "c"], greedy(2)), shared.generate("a", SamplingParams(n=3))):
                    with pytest.raises(ValueError, match="3 sequences exceed max_waiting=2"):
                        await too_many
                assert shared.num_waiting == 0
                two = await shared.submit(["a", "b"], greedy(2))
                assert shared.num_waiting == 2
                with pytest.raises(EngineBusy, match="2 of at most 2"):
                    await shared.generate("c", greedy(2))
                with pytest.raises(EngineBusy, match="2 of at most 2"):
                    await shared.chat_prompt([{"role": "user", "content": "c"}])
                assert shared.num_waiting == 2
                gate.open()
                await last(two)
                await running
                await shared.generate("c", greedy(2))

        run(main())
        assert engine.stats().num_finished_requests == 4


def test_close_lets_accepted_requests_finish_and_rejects_new_requests(engine, oracle):
    gate = Gate(engine)

    async def main():
        shared = AsyncInference(engine, stream_interval=0)
        streaming = asyncio.create_task(consumed(shared, "abc", greedy(6), True))
        await gate.arrival()
        waiting = asyncio.create_task(shared.generate("x", greedy(4)))
        await until(lambda: shared._commands)
        closing = asyncio.create_task(shared.close())
        await until(lambda: shared._is_closing)
        for refused in (shared.generate("a"), anext(shared.stream("a")), shared.call(lambda: None), shared.warmup()):
            with pytest.raises(EngineClosing):
                await refused
        gate.open()
        await closing
        await shared.close()  # a second call does nothing
        return await streaming, await waiting

    deltas, output = run(main())
    assert_empty(engine)
    assert "".join(delta.text for delta in deltas) == expected_of(oracle, "abc", greedy(6))[0][1]
    assert answers_of(output) == expected_of(oracle, "x", greedy(4))


def test_a_request_unfinished_at_the_close_timeout_returns_its_output_so_far(engine):
    gate = Gate(engine)

    async def main():
        shared = AsyncInference(engine, stream_interval=0)
        task = asyncio.create_task(shared.generate("abc", greedy(30)))
        await gate.arrival()
        closing = asyncio.create_task(shared.close(timeout=0))
        await until(lambda: len(shared._commands) == 2)
        gate.open()
        await closing
        return await task

    (completion,) = run(main()).outputs
    assert (completion.finish_reason, len(completion.token_ids)) == ("abort", 1)
    assert_empty(engine)


def test_close_does_not_wait_forever_for_a_step(engine, monkeypatch):
    gate = Gate(engine)
    monkeypatch.setattr(async_inference, "STEP_TIMEOUT", 0.0)

    async def main():
        shared = AsyncInference(engine, stream_interval=0)
        task = asyncio.create_task(shared.generate("abc", greedy(30)))
        await gate.arrival()
        await shared.close(timeout=0)
        with pytest.raises(EngineDead, match="did not finish in time"):
            await task
        gate.open()
        await asyncio.to_thread(shared._thread.join, PATIENCE)
        assert not shared._thread.is_alive()

    run(main())
    assert_empty(engine)


def test_a_shared_engine_rejects_calls_of_other_callers(engine):
    gate = Gate(engine)

    async def main():
        async with sharing(engine) as shared:
            task = asyncio.create_task(shared.generate("abc", greedy(3)))
            await gate.arrival()
            with pytest.raises(ValueError, match="belongs to another AsyncInference"):
                AsyncInference(engine)
            for call in (lambda: engine.generate("x"), engine.run_one_step, engine.close):
                with pytest.raises(RuntimeError, match="belongs to an AsyncInference"):
                    call()
            gate.open()
            return await task

    assert len(run(main()).outputs[0].token_ids) == 3
    engine.generate("x", greedy(1), use_tqdm=False)  # other callers can use it again


@pytest.mark.parametrize("number", [1, 3])
def test_deltas_that_cannot_be_built_fail_only_their_request(engine, oracle, monkeypatch, number):
    async def main():
        async with sharing(engine) as shared:
            rated = SamplingParams(temperature=0, max_tokens=6, logprobs=1, ignore_eos=True)
            answers = await together(shared, shared.submit(["abc"], rated), shared.submit(["xyz"], greedy(6)))
            return await asyncio.gather(*(last(answer) for answer in answers), return_exceptions=True)

    raise_at_call(monkeypatch, answers_module, "logprobs", number, OSError)
    failed, other = run(main())
    assert type(failed) is EngineError and "OSError" in str(failed)
    assert answers_of(other) == expected_of(oracle, "xyz", greedy(6))


def test_an_output_that_cannot_be_built_does_not_fail_requests_that_continue(engine, oracle, monkeypatch):
    async def main():
        async with sharing(engine) as shared:
            answers = await together(shared, shared.submit(["abc"], greedy(2)), shared.submit(["xyz"], greedy(6)))
            return await asyncio.gather(*(last(answer) for answer in answers), return_exceptions=True)

    raise_at_call(monkeypatch, inference, "request_output", 1, OSError)
    failed, other = run(main())
    assert type(failed) is EngineError
    assert answers_of(other) == expected_of(oracle, "xyz", greedy(6))


def test_a_request_tokenized_while_the_engine_closes_is_rejected(engine, monkeypatch):
    begun, may_go_on = threading.Event(), threading.Event()
    request = engine.input_processor.request

    def slow(*args, **kwargs):
        begun.set()
        assert may_go_on.wait(PATIENCE)
        return request(*args, **kwargs)

    monkeypatch.setattr(engine.input_processor, "request", slow)

    async def main():
        shared = AsyncInference(engine)
        task = asyncio.create_task(shared.generate("abc", greedy(3)))
        await asyncio.to_thread(begun.wait, PATIENCE)
        await shared.close()
        may_go_on.set()
        with pytest.raises(EngineClosing):
            await task
        assert shared.num_waiting == 0

    run(main())


# --- failures ----------------------------------------------------------------------------------------------------

TOKENIZER = type(byte_tokenizer())
SEAMS = [
    (Scheduler, "schedule", 1),
    (Scheduler, "schedule", 3),
    (PageTable, "reserve", 2),
    (StepVectors, "build", 1),
    (StepVectors, "build", 3),
    (ModelRunner, "forward", 1),
    (ModelRunner, "forward", 3),
    (Sampler, "__call__", 1),
    (Sampler, "choose", 4),  # in the last step
    (Scheduler, "commit", 1),
    (Scheduler, "commit", 4),
    (Scheduler, "_release", 1),
    (Scheduler, "_release", 2),
    (inference.Inference, "_close", 1),
    (inference.Inference, "_close", 2),
    (Statistics, "count_step", 1),
    (Statistics, "count_step", 4),
    (inference, "request_output", 1),
    (inference, "request_output", 2),
]


@pytest.mark.parametrize("streams", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize(
    ("owner", "name", "number"), SEAMS, ids=lambda value: getattr(value, "__name__", str(value)).rpartition(".")[2]
)
def test_a_failed_step_fails_its_requests_and_the_next_request_works(
    engine, oracle, monkeypatch, owner, name, number, after, streams
):
    raise_at_call(monkeypatch, owner, name, number, OSError, after)

    async def main():
        async with sharing(engine) as shared:
            submissions = [shared.submit([prompt], greedy(4), follow=streams) for prompt in ("abc", "xyz")]
            answers = await together(shared, *submissions)
            results = await asyncio.gather(*(last(answer) for answer in answers), return_exceptions=True)
            monkeypatch.undo()
            errors = [result for result in results if isinstance(result, Exception)]
            assert type(results[0]) is EngineError  # the second request may not have been scheduled yet
            assert all(type(e) is EngineError and "OSError" in str(e) and "injected" not in str(e) for e in errors)
            for output in results[len(errors) :]:
                assert answers_of(output) == expected_of(oracle, "xyz", greedy(4))
            return await shared.generate("abc", greedy(4))

    assert answers_of(run(main())) == expected_of(oracle, "abc", greedy(4))


def test_a_request_that_waits_during_a_failed_step_is_not_affected(oracle, monkeypatch):
    with new_engine(max_batch_size=1) as engine:
        raise_at_call(monkeypatch, ModelRunner, "forward", 2, OSError)

        async def main():
            async with sharing(engine) as shared:
                first, second = await together(
                    shared, shared.submit(["abc"], greedy(4)), shared.submit(["xyz"], greedy(4))
                )
                with pytest.raises(EngineError):
                    await last(first)
                return await last(second)

        assert answers_of(run(main())) == expected_of(oracle, "xyz", greedy(4))


def test_a_failed_request_ends_all_requests_submitted_with_it(oracle, monkeypatch):
    with new_engine(max_batch_size=1) as engine:
        raise_at_call(monkeypatch, ModelRunner, "forward", 2, OSError)

        async def main():
            async with sharing(engine) as shared:
                with pytest.raises(EngineError):
                    await last(await shared.submit(["abc", "xyz"], greedy(20)))

        run(main())
        assert engine.stats().num_generated_tokens < 20


def test_a_text_that_cannot_be_decoded_fails_only_its_request(engine, oracle, monkeypatch):
    async def main():
        async with sharing(engine) as shared:
            answers = await together(shared, shared.submit(["abc"], greedy(6)), shared.submit(["xyz"], greedy(6)))
            return await asyncio.gather(*(last(answer) for answer in answers))

    raise_at_call(monkeypatch, Detokenizer, "update", 3, OverflowError)
    first, second = run(main())
    assert first.outputs[0].finish_reason == "error"
    assert answers_of(second) == expected_of(oracle, "xyz", greedy(6))


def test_logits_that_are_not_finite_fail_only_their_request(engine, oracle, monkeypatch):
    forward = engine.runner.forward

    def spoiled(chunks):
        logits = forward(chunks)
        for row, chunk in zip(logits, chunks):
            if chunk.sequence.prompt == "bad" and chunk.sequence.output_len == 2:
                row.fill_(math.nan)
        return logits

    monkeypatch.setattr(engine.runner, "forward", spoiled)

    async def main():
        async with sharing(engine) as shared:
            bad, *good = [shared.generate(prompt, greedy(6)) for prompt in ("bad", "abc", "xyz")]
            return await asyncio.gather(bad, *good)

    bad, *good = run(main())
    assert (bad.outputs[0].finish_reason, len(bad.outputs[0].token_ids)) == ("error", 2)
    assert [answers_of(output) for output in good] == [expected_of(oracle, p, greedy(6)) for p in ("abc", "xyz")]


def kill_with_interrupt(monkeypatch, engine):
    raise_at_call(monkeypatch, engine.runner, "forward", 2, KeyboardInterrupt)


def kill_with_broken_books(monkeypatch, engine):
    def broken():
        raise AssertionError("injected")

    raise_at_call(monkeypatch, engine.runner, "forward", 2, OSError)
    monkeypatch.setattr(engine, "check_invariants", broken)


def kill_by_closing_it(monkeypatch, engine):
    forward = engine.runner.forward

    def closing(chunks):
        engine._give_back()
        return forward(chunks)

    monkeypatch.setattr(engine.runner, "forward", closing)


@pytest.mark.parametrize("kill", [kill_with_interrupt, kill_with_broken_books, kill_by_closing_it])
def test_when_the_engine_dies_every_caller_gets_an_error_and_none_hangs(monkeypatch, kill):
    with new_engine(max_batch_size=1) as engine:
        kill(monkeypatch, engine)

        async def main():
            shared = AsyncInference(engine, stream_interval=0)
            answers = await together(
                shared,
                shared.submit(["runs"], greedy(9)),
                shared.submit(["waits"], greedy(9), follow=False),
                shared.submit(["a", "b"], greedy(9)),
            )
            results = await asyncio.gather(*(last(answer) for answer in answers), return_exceptions=True)
            assert all(isinstance(result, EngineError) for result in results)
            # The first request may have failed before the engine died.
            assert all(isinstance(result, EngineDead) for result in results[1:])
            assert shared.error is not None
            for late in (shared.generate("a"), anext(shared.stream("a")), shared.call(lambda: None), shared.warmup()):
                with pytest.raises(EngineDead):
                    await late
            shared.abort(0)
            assert shared.num_waiting <= len(engine.scheduler.waiting)
            await shared.close()

        run(main())
        engine.scheduler.reset()


@pytest.mark.parametrize("is_dead", [False, True], ids=["closed", "dead"])
def test_a_call_that_passed_the_check_before_the_engine_ended_raises(monkeypatch, is_dead):
    """Another thread may end the engine between `check_open` and the command."""
    with new_engine() as engine:

        async def main():
            shared = AsyncInference(engine)
            if is_dead:
                raise_at_call(monkeypatch, engine.runner, "forward", 1, KeyboardInterrupt)
                with pytest.raises(EngineDead):
                    await shared.generate("a", greedy(2))
            await shared.close()
            monkeypatch.setattr(shared, "check_open", lambda: None)
            error = EngineDead if is_dead else EngineClosing
            with pytest.raises(error):
                await shared.generate("a", greedy(2))
            with pytest.raises(error):
                await shared.call(lambda: None)
            assert shared.num_waiting == len(engine.scheduler.waiting)

        run(main())
        engine.scheduler.reset()


# --- event loops, and functions that run between steps -----------------------------------------------------------


def test_two_event_loops_in_two_threads_share_an_engine(engine, oracle):
    expected = [expected_of(oracle, prompt, greedy(8)) for prompt in PROMPTS]
    shared = AsyncInference(engine, stream_interval=0)
    results = {}

    async def main():
        whole = [shared.generate(prompt, greedy(8)) for prompt in PROMPTS]
        streams = [consumed(shared, prompt, greedy(8), True) for prompt in PROMPTS]
        return await asyncio.gather(*whole), await asyncio.gather(*streams)

    def work(name):
        results[name] = run(main())

    threads = [threading.Thread(target=work, args=(name,)) for name in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    run(shared.close())
    assert sorted(results) == ["a", "b"]
    for outputs, streams in results.values():
        assert [answers_of(output) for output in outputs] == expected
        assert ["".join(d.text for d in deltas) for deltas in streams] == [answer[0][1] for answer in expected]
    assert_empty(engine)


@pytest.mark.parametrize("follow", [False, True])
def test_requests_of_a_closed_event_loop_end_and_others_are_not_affected(engine, oracle, follow):
    gate = Gate(engine)
    shared = AsyncInference(engine, stream_interval=0)
    loop = asyncio.new_event_loop()
    loop.run_until_complete(shared.submit(["gone"], greedy(40), follow=follow))
    gate.wait()
    loop.run_until_complete(loop.shutdown_default_executor())
    loop.close()

    async def main():
        answers = await shared.submit(["abc"], greedy(6))
        gate.open()
        output = await last(answers)
        await shared.close()
        return output

    assert answers_of(run(main())) == expected_of(oracle, "abc", greedy(6))
    assert_empty(engine)
    # The engine notices the closed loop at the first delta if it follows the request, otherwise at the complete output.
    assert engine.stats().num_generated_tokens == 6 + (1 if follow else 40)


def test_call_runs_a_function_between_steps_and_returns_its_result_or_raises_its_error(engine, oracle):
    async def main():
        async with sharing(engine) as shared:
            running = [asyncio.create_task(shared.generate(prompt, greedy(20))) for prompt in PROMPTS]
            thread = await shared.call(threading.current_thread)
            assert thread is shared._thread
            assert await shared.call(lambda: 17) == 17
            with pytest.raises(ZeroDivisionError):
                await shared.call(lambda: 1 / 0)
            with pytest.raises(SystemExit):
                await shared.call(lambda: exec("raise SystemExit"))
            await shared.warmup()
            for _ in range(20):
                stats = engine.stats()
                assert 0 <= stats.kv_usage <= 1 and stats.num_running <= 4
                await shared.call(engine.check_invariants)
            return await asyncio.gather(*running)

    expected = [expected_of(oracle, prompt, greedy(20)) for prompt in PROMPTS]
    assert [answers_of(output) for output in run(main())] == expected


def test_a_function_is_not_run_if_its_caller_is_cancelled_first(engine, oracle):
    gate = Gate(engine)

    async def main():
        async with sharing(engine) as shared:
            running = asyncio.create_task(shared.generate("abc", greedy(4)))
            await gate.arrival()
            called = []
            task = asyncio.create_task(shared.call(lambda: called.append(1)))
            await until(lambda: shared._commands)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            gate.open()
            assert await shared.call(lambda: 17) == 17
            assert called == []
            return await running

    assert answers_of(run(main())) == expected_of(oracle, "abc", greedy(4))


def test_an_idle_engine_runs_no_steps(engine):
    async def main():
        async with sharing(engine) as shared:
            await shared.generate("abc", greedy(2))
            before = engine.stats().num_steps
            for _ in range(50):
                await shared.call(lambda: None)
            assert engine.stats().num_steps == before == 2

    run(main())
