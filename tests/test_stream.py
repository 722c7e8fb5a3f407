"""Streams: the joined deltas equal the output of `generate`, whatever else the engine computes at the same time."""

import gc
import itertools

import pytest
from engines import SIZES, TIGHT, assert_empty, byte_model, drain, raise_at_call

from benchmarks.random_models import byte_tokenizer
from flex_nano_vllm import Inference, SamplingParams
from flex_nano_vllm.attention import PagedKVCache
from flex_nano_vllm.detokenizer import Detokenizer

PROMPTS = ["abcdefg", "hi", "xyz0123456"]
LETTERS = byte_tokenizer()("ABCD0123456789:", add_special_tokens=False).input_ids


@pytest.fixture(scope="module")
def engine():
    with Inference(byte_model(), byte_tokenizer(), **SIZES) as engine:
        yield engine


def drawn(**options):
    return SamplingParams(**{**dict(seed=3, max_tokens=8, ignore_eos=True), **options})


def generated(engine, prompt, params):
    return engine.generate(prompt, params, use_tqdm=False)[0]


def joined(deltas):
    """Join deltas to completions: (text, token_ids, logprobs, finish_reason, stop_reason) by index.

    Checks that each delta has something new, and that no delta follows the end of its completion.
    """
    by_index, request_ids = {}, set()
    for delta in deltas:
        request_ids.add(delta.request_id)
        text, token_ids, logprobs, finish_reason, _ = by_index.get(delta.index, ("", [], [], None, None))
        assert finish_reason is None, "a delta follows the end of its completion"
        assert delta.token_ids or delta.finish_reason, "a delta has nothing new"
        if delta.logprobs is not None:
            assert [next(iter(named)) for named in delta.logprobs] == delta.token_ids
        by_index[delta.index] = (
            text + delta.text,
            token_ids + delta.token_ids,
            logprobs + (delta.logprobs or []),
            delta.finish_reason,
            delta.stop_reason,
        )
    assert len(request_ids) == 1
    return by_index


def completed(output):
    return {c.index: (c.text, c.token_ids, c.logprobs or [], c.finish_reason, c.stop_reason) for c in output.outputs}


def check(engine, prompt, params):
    deltas = list(engine.stream(prompt, params))
    assert_empty(engine)
    assert joined(deltas) == completed(generated(engine, prompt, params))
    return deltas


WAYS = [
    dict(temperature=0),
    dict(n=5),  # more samples than the three rows
    dict(n=3, logprobs=2),
    dict(n=3, max_tokens=20, stop=["é", "a", "�", "\x00"], top_k=200),
    dict(n=4, max_tokens=20, stop=["�"], include_stop_str_in_output=True, min_tokens=3, logprobs=0),
    dict(max_tokens=12, ignore_eos=False, logit_bias={1: 9.0}, skip_special_tokens=False, n=4),
    dict(max_tokens=12, stop_token_ids=[*range(3, 40)], include_stop_str_in_output=True, n=3),
    dict(max_tokens=20, allowed_token_ids=LETTERS, stop=["AA", "AB", "B", "9:"], n=3),
    dict(max_tokens=None),
]


@pytest.mark.parametrize("params", WAYS, ids=str)
def test_the_joined_deltas_equal_the_output_of_generate(engine, params):
    for prompt in PROMPTS:
        check(engine, prompt, drawn(**params))


def test_each_token_has_a_delta_that_is_yielded_after_its_step(engine):
    seen = []
    before = engine.stats().num_steps
    for delta in engine.stream("hi", drawn(max_tokens=4)):
        seen.append((len(delta.token_ids), engine.stats().num_steps - before, delta.finish_reason))
    assert seen == [(1, 1, None), (1, 2, None), (1, 3, None), (1, 4, "length")]


def test_a_preempted_stream_repeats_no_tokens():
    with Inference(byte_model(), byte_tokenizer(), **TIGHT) as engine:
        params = drawn(n=3, max_tokens=9, logprobs=1)
        check(engine, "abcdef", params)
        assert engine.stats().num_preemptions > 0


def test_without_a_tokenizer_deltas_have_tokens_and_no_text():
    with Inference(byte_model(), None, **SIZES) as engine:
        deltas = list(engine.stream([5, 6, 7], drawn(max_tokens=3)))
        assert [delta.text for delta in deltas] == [None] * 3
        answer = generated(engine, [5, 6, 7], drawn(max_tokens=3)).outputs[0]
        assert [token for delta in deltas for token in delta.token_ids] == answer.token_ids


# --- the boundary between prompt and output ----------------------------------------------------------------------


def test_a_character_that_is_incomplete_in_the_prompt_belongs_to_the_output(engine):
    tokens = byte_tokenizer()("ñ", add_special_tokens=False).input_ids
    bias = {tokens[1]: 100}  # the second byte, which completes the character of the prompt
    (delta,) = engine.stream([2, tokens[0]], drawn(logit_bias=bias, max_tokens=1))
    assert (delta.token_ids, delta.text) == ([tokens[1]], "ñ")


def test_a_stop_string_that_starts_in_the_prompt_is_ignored(engine):
    token = byte_tokenizer()("g", add_special_tokens=False).input_ids[0]
    params = drawn(logit_bias={token: 100}, max_tokens=5, stop=["abc", "fg", "fgg"])
    deltas = check(engine, "abcdef", params)
    assert "".join(delta.text for delta in deltas) == "ggggg"


# --- several requests --------------------------------------------------------------------------------------------


def test_two_interleaved_streams_equal_their_outputs_alone(engine):
    params = [drawn(max_tokens=6, logprobs=1), drawn(max_tokens=9, n=2)]
    alone = [completed(generated(engine, prompt, p)) for prompt, p in zip(PROMPTS, params)]
    streams = [engine.stream(prompt, p) for prompt, p in zip(PROMPTS, params)]
    both = list(itertools.zip_longest(*streams))
    assert [joined(delta for delta in deltas if delta is not None) for deltas in zip(*both)] == alone
    assert_empty(engine)


def test_a_stream_misses_nothing_of_steps_that_its_caller_runs(engine):
    stream = engine.stream("abcdefg", drawn(max_tokens=6))
    first = next(stream)
    outputs = []
    while engine.has_unfinished_requests():
        outputs += engine.run_one_step()
    rest = list(stream)
    assert len(rest) == 1 and len(rest[0].token_ids) == 5
    alone = generated(engine, "abcdefg", drawn(max_tokens=6))
    assert joined([first, *rest]) == completed(alone)
    assert [completed(output) for output in outputs] == [completed(alone)], (
        "run_one_step returns the requests that finished in its step"
    )


def test_a_stream_loses_no_outputs_of_other_requests(engine):
    lengths = {2: "abcdefg", 12: "hi"}
    ids = {engine.add_request(text, drawn(max_tokens=n)): (text, n) for n, text in lengths.items()}
    deltas = list(engine.stream("xyz", drawn(max_tokens=5)))
    outputs = drain(engine)
    assert outputs.keys() == ids.keys()
    for request_id, (text, n) in ids.items():
        assert completed(outputs[request_id]) == completed(generated(engine, text, drawn(max_tokens=n)))
    assert joined(deltas) == completed(generated(engine, "xyz", drawn(max_tokens=5)))


def test_generate_raises_during_an_open_stream_and_does_not_affect_it(engine):
    stream = engine.stream("hi", drawn(max_tokens=4))
    deltas = [next(stream)]
    with pytest.raises(RuntimeError, match="unfinished requests"):
        generated(engine, "hi", drawn())
    deltas += stream
    assert joined(deltas) == completed(generated(engine, "hi", drawn(max_tokens=4)))


# --- ends of streams ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_read", [0, 1, 3])
@pytest.mark.parametrize("how", ["close", "delete", "break"])
def test_a_stream_that_is_not_read_to_its_end_frees_its_pages(engine, how, num_read):
    stream = engine.stream("abcdefg", drawn(n=3, max_tokens=20))
    for _ in range(num_read):
        next(stream)
    if how == "close":
        stream.close()
    elif how == "delete":
        del stream
        gc.collect()
    else:
        for _ in stream:
            break
        del stream
    assert_empty(engine)


def test_a_stream_that_is_never_iterated_queues_no_request(engine):
    stream = engine.stream("abcdefg", drawn())
    assert not engine.has_unfinished_requests()
    del stream
    assert_empty(engine)


def test_a_stream_that_is_not_read_to_its_end_does_not_affect_other_requests(engine):
    request_id = engine.add_request("hi", drawn(max_tokens=9))
    for _, _ in zip(range(3), engine.stream("abcdefg", drawn(max_tokens=20))):
        pass
    gc.collect()
    outputs = drain(engine)
    assert outputs.keys() == {request_id}
    assert completed(outputs[request_id]) == completed(generated(engine, "hi", drawn(max_tokens=9)))


def test_a_stream_whose_request_is_aborted_ends_with_finish_reason_abort(engine):
    stream = engine.stream("abcdefg", drawn(n=2, max_tokens=20))
    deltas = [next(stream), next(stream)]
    output = engine.abort(deltas[0].request_id)
    deltas += stream
    assert joined(deltas) == completed(output)
    assert {c.finish_reason for c in output.outputs} == {"abort"}
    assert_empty(engine)


@pytest.mark.parametrize(
    ("prompt", "options"),
    [
        ("", {}),
        ("x" * 40, {}),
        ([5, 10**6], {}),
        ({"text": "hi"}, {}),
        ("hi", dict(stop_token_ids=[10**6])),
        (["hi", "ho"], {}),
    ],
)
def test_an_invalid_request_raises_at_the_call_of_stream(engine, prompt, options):
    with pytest.raises(ValueError):
        engine.stream(prompt, drawn(**options))
    assert_empty(engine)


@pytest.mark.parametrize("exception", [OSError, KeyboardInterrupt])
@pytest.mark.parametrize("number", [1, 4])
def test_a_failed_step_ends_the_stream_and_frees_its_pages(engine, monkeypatch, exception, number):
    other = engine.add_request("hi", drawn(max_tokens=4))
    stream = engine.stream("abcdefg", drawn(max_tokens=6))
    with monkeypatch.context() as patch:
        raise_at_call(patch, PagedKVCache, "attend", number, exception)
        with pytest.raises(exception, match="injected"):
            list(stream)
    assert list(stream) == []
    outputs = drain(engine)
    assert completed(outputs[other]) == completed(generated(engine, "hi", drawn(max_tokens=4)))
    assert_empty(engine)


@pytest.mark.parametrize("num_good_tokens", [0, 2, 4])
def test_a_text_that_cannot_be_decoded_ends_only_its_own_request(engine, monkeypatch, num_good_tokens):
    params = drawn(max_tokens=5)
    alone = [completed(generated(engine, prompt, params)) for prompt in PROMPTS]
    streams = [engine.stream(prompt, params) for prompt in PROMPTS]
    deltas = [[next(stream)] if num_good_tokens else [] for stream in streams]
    update = Detokenizer.update

    def spoiled(text, token_ids, is_complete=False, start=0):
        output = token_ids[start:]
        if output[:1] == alone[1][0][1][:1] and len(output) > num_good_tokens:
            raise OverflowError("injected")
        return update(text, token_ids, is_complete, start)

    monkeypatch.setattr(Detokenizer, "update", spoiled)
    for came, stream in zip(deltas, streams):
        came += stream
    first, middle, last = map(joined, deltas)
    assert [first, last] == [alone[0], alone[2]]
    text, token_ids, _, finish_reason, stop_reason = middle[0]
    assert (token_ids, finish_reason, stop_reason) == (alone[1][0][1][: num_good_tokens + 1], "error", None)
    assert alone[1][0][0].startswith(text)
    assert_empty(engine)


def test_a_stream_of_a_closed_engine_raises_and_ends():
    engine = Inference(byte_model(), byte_tokenizer(), **SIZES)
    begun, fresh = engine.stream("hi", drawn()), engine.stream("hi", drawn())
    next(begun)
    engine.close()
    for stream in (begun, fresh):
        with pytest.raises(RuntimeError, match="closed"):
            next(stream)
        assert list(stream) == []
    with pytest.raises(RuntimeError, match="closed"):
        engine.stream("hi", drawn())


def test_a_stream_deleted_in_the_middle_of_a_step_frees_its_pages(engine, monkeypatch):
    """The garbage collector may delete a stream at any time."""
    streams = [engine.stream("abcdefg", drawn(max_tokens=20)), engine.stream("hi", drawn(max_tokens=6))]
    deltas = [next(stream) for stream in streams][1:]
    step = engine._step

    def step_and_collect():
        streams[0] = None
        step()

    monkeypatch.setattr(engine, "_step", step_and_collect)
    deltas += streams[1]
    monkeypatch.undo()
    assert_empty(engine)
    assert joined(deltas) == completed(generated(engine, "hi", drawn(max_tokens=6)))
