"""Stop strings, structured output and text limits in the engine, with the expected texts written out."""

import re

import numpy as np
import pytest
from engines import SIZES, assert_empty, byte_model, drain, greedy, raise_at_call

from benchmarks.random_models import byte_tokenizer
from flex_nano_vllm import Inference, SamplingParams, StructuredOutputsParams, grammar

A, B = byte_tokenizer().convert_tokens_to_ids(["a", "b"])


@pytest.fixture(scope="module")
def engine():
    with Inference(byte_model(), byte_tokenizer(), **SIZES) as engine:
        yield engine


def only_a(**options):
    """Return parameters with which the model generates only "a"."""
    return SamplingParams(**{**dict(temperature=0, logit_bias={A: 100.0}), **options})


def structured(kind, **options):
    return SamplingParams(**{**dict(seed=1, max_tokens=12), **options}, structured_outputs=kind)


def one(engine, params):
    """Return (text, number of tokens, finish_reason, stop_reason) of the only completion. Check it against a stream."""
    (completion,) = engine.generate("x", params, use_tqdm=False)[0].outputs
    deltas = list(engine.stream("x", params))
    assert "".join(delta.text for delta in deltas) == completion.text
    assert (deltas[-1].finish_reason, deltas[-1].stop_reason) == (completion.finish_reason, completion.stop_reason)
    return completion.text, len(completion.token_ids), completion.finish_reason, completion.stop_reason


def test_a_stop_string_completed_by_the_last_token_is_the_stop_reason(engine):
    assert one(engine, only_a(max_tokens=3, stop="aaa")) == ("", 3, "stop", "aaa")
    assert one(engine, only_a(max_tokens=3, stop="aaaa")) == ("aaa", 3, "length", None)


def test_a_stop_string_within_min_tokens_does_not_count(engine):
    assert one(engine, only_a(max_tokens=8, stop="aa", min_tokens=4)) == ("aaa", 5, "stop", "aa")


def test_a_stop_string_may_be_the_replacement_of_an_incomplete_character(engine):
    """An incomplete character becomes a replacement character."""
    (half,) = byte_tokenizer()("Ã", add_special_tokens=False).input_ids[:1]
    ends = SamplingParams(
        temperature=0, max_tokens=4, logit_bias={half: 100.0, 1: 90.0}, stop="\ufffd", frequency_penalty=2.0
    )
    text, _, finish_reason, stop_reason = one(engine, ends)
    assert "\ufffd" not in text and (finish_reason, stop_reason) == ("stop", "\ufffd")


def test_an_aborted_request_returns_the_held_back_text(engine):
    request_id = engine.add_request("x", only_a(max_tokens=9, stop="aab"))
    for _ in range(3):
        engine.run_one_step()
    (completion,) = engine.abort(request_id).outputs
    assert (completion.text, completion.finish_reason) == ("aaa", "abort")
    assert_empty(engine)


def test_each_sample_follows_the_grammar_independently(engine):
    (output,) = engine.generate("x", structured(StructuredOutputsParams(regex="[a-z]{6}"), n=5), use_tqdm=False)
    texts = [completion.text for completion in output.outputs]
    assert all(re.fullmatch("[a-z]{6}", text) for text in texts) and len(set(texts)) == 5
    assert all(completion.finish_reason == "stop" for completion in output.outputs)


def test_allowed_token_ids_also_apply_to_structured_output(engine):
    params = structured(StructuredOutputsParams(regex="[abc]{4}"), allowed_token_ids=[B, 1])
    assert one(engine, params) == ("bbbb", 5, "stop", None)
    nothing = structured(StructuredOutputsParams(regex="[ac]{4}"), allowed_token_ids=[B, 1])
    with pytest.raises(ValueError, match="allowed_token_ids can begin a text that fits structured_outputs"):
        engine.generate("x", nothing, use_tqdm=False)
    ends_soon = structured(StructuredOutputsParams(regex="b[ac]{3}"), allowed_token_ids=[B, 1])
    (failed,) = engine.generate("x", ends_soon, use_tqdm=False)[0].outputs
    assert (failed.text, failed.finish_reason, failed.error.param) == ("b", "error", "structured_outputs")
    assert "allowed_token_ids continues the structured output after 1 tokens" in failed.error.message


def test_a_complete_structured_output_ends_even_before_min_tokens(engine):
    text, _, finish_reason, _ = one(engine, structured(StructuredOutputsParams(choice=["a", "b"]), min_tokens=9))
    assert text in ("a", "b") and finish_reason == "stop"
    longer = structured(StructuredOutputsParams(regex="a+"), min_tokens=9, logit_bias={1: 100.0})
    assert one(engine, longer) == ("a" * 9, 10, "stop", None)


def test_a_grammar_that_cannot_be_followed_further_ends_only_its_own_request(engine, monkeypatch, caplog):
    raise_at_call(monkeypatch, grammar.Follower, "allowed", 3, ValueError)
    structure = engine.add_request("canary", structured(StructuredOutputsParams(regex="[a-z]+")))
    other = engine.add_request("y", greedy(6))
    outputs = drain(engine)
    (failed,), (fine,) = outputs[structure].outputs, outputs[other].outputs
    assert (failed.finish_reason, len(failed.token_ids)) == ("error", 2)
    assert (fine.finish_reason, len(fine.token_ids)) == ("length", 6)
    assert "cannot be followed" in caplog.text and "canary" not in caplog.text
    assert_empty(engine)


def test_samples_that_end_together_count_as_one_request_and_one_finish_reason_each(engine):
    before = engine.stats()
    engine.generate("x", SamplingParams(seed=1, n=3, max_tokens=4, ignore_eos=True), use_tqdm=False)
    after = engine.stats()
    assert after.num_finished_requests - before.num_finished_requests == 1
    assert after.finish_reasons["length"] - before.finish_reasons.get("length", 0) == 3


def test_a_seed_may_be_a_numpy_integer(engine):
    numbers, plain = (SamplingParams(seed=seed, n=2, max_tokens=4) for seed in (np.int64(5), 5))
    assert engine.generate("x", numbers, False)[0].outputs == engine.generate("x", plain, False)[0].outputs


def test_a_stream_rejects_prompt_logprobs_because_deltas_do_not_contain_them(engine):
    with pytest.raises(ValueError, match="prompt_logprobs"):
        engine.stream("x", SamplingParams(prompt_logprobs=1))
