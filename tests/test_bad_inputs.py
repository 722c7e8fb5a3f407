"""Bad inputs to the offline API: the constructor, `generate`, `add_request`, `abort` and `SamplingParams`.

A bad input raises an error that names the values, before any page is allocated. After all tests of an engine, its
fixture generates from a good prompt, which checks that the engine still works.
"""

import copy
import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch
from engines import greedy, prompt_of
from tiny_models import CONFIGS, VOCABULARY, hf_generate, tiny_model
from torch.torch_version import TorchVersion
from transformers import AttentionInterface, AutoModel, AutoModelForCausalLM, MambaConfig

from benchmarks.random_models import BYTE_VOCABULARY, byte_tokenizer
from flex_nano_vllm import (
    Inference,
    SamplingParams,
    StructuredOutputsParams,
    inference,
    memory,
    models,
    patching,
    runner,
)
from flex_nano_vllm.attention import PagedKVCache
from flex_nano_vllm.geometry import Geometry
from flex_nano_vllm.models import spec_of
from flex_nano_vllm.patching import is_patched

GOOD_PROMPT = [5, 6, 7, 8, 9]
GREEDY = greedy(3)
SIZES = dict(max_batch_size=2, max_seq_length=16, n_pages=9, page_size=4, compile=False)
NAN, INFINITY = math.nan, math.inf


def fresh_model(architecture="llama", **config_changes):
    """Return a model that no other engine uses."""
    if not config_changes:
        return copy.deepcopy(tiny_model(architecture))
    config = CONFIGS[architecture]()
    for name, value in config_changes.items():
        setattr(config, name, value)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float64, attn_implementation="eager").eval()


def generate(engine, prompts, sampling_params=GREEDY):
    return engine.generate(prompts, sampling_params, use_tqdm=False)


def completion(engine, prompt, sampling_params=GREEDY):
    (output,) = generate(engine, [prompt], sampling_params)
    return output.outputs[0]


def assert_empty(engine):
    engine.check_invariants()
    stats = engine.stats()
    assert (stats.num_running, stats.num_waiting, stats.num_used_pages) == (0, 0, 0)
    assert not engine.has_unfinished_requests()


def assert_refused(engine, call, match, error=ValueError):
    """Check that `call` raises, and that the engine is unchanged: no step, no page, no request, no count."""
    before = engine.stats()
    with pytest.raises(error, match=match):
        call()
    assert engine.stats() == before
    assert_empty(engine)


def assert_untouched(model):
    assert not is_patched(model)
    assert model.config._attn_implementation == "eager"
    assert not any("forward" in vars(layer) for layer in model.get_decoder().layers)


def engine_that_must_survive(model, tokenizer, **sizes):
    expected = hf_generate(model, GOOD_PROMPT, 3, ignore_eos=True)
    with Inference(model, tokenizer, **{**SIZES, **sizes}) as engine:
        yield engine
        assert_empty(engine)
        assert completion(engine, GOOD_PROMPT).token_ids == expected


@pytest.fixture(scope="module")
def engine():
    """An engine limited by max_seq_length=16; its pool holds 32 tokens."""
    yield from engine_that_must_survive(fresh_model(), None)


@pytest.fixture(scope="module")
def small_pool_engine():
    """An engine limited by its pool of 3 usable pages of 4 tokens; max_seq_length=64."""
    yield from engine_that_must_survive(fresh_model(), None, max_seq_length=64, n_pages=4)


@pytest.fixture(scope="module")
def text_engine():
    """An engine with a byte tokenizer."""
    model = fresh_model(vocab_size=BYTE_VOCABULARY)
    yield from engine_that_must_survive(model, byte_tokenizer(), max_seq_length=64, n_pages=33)


@pytest.fixture(scope="module")
def bare_model():
    """A model without an engine. A test that builds an engine on it must close that engine."""
    return fresh_model()


# --- prompts -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompts", "match"),
    [
        (None, "None"),
        ([], "an empty list"),
        ((), "an empty tuple"),
        ([[]], "prompt 0 is empty"),
        ([()], "prompt 0 is empty"),
        ([None], "prompt 0 .*NoneType"),
        ([[None]], "prompt 0 holds None"),
        (5, "of type int"),
        (b"abc", "of type bytes"),
        ({"prompt": "abc"}, "prompt 0 is a text.*no tokenizer"),
        ({"prompt": [5]}, "prompt 0: prompt must be a text"),
        ({"prompt_token_ids": "abc"}, "prompt 0: prompt_token_ids must be a list"),
        ({"prompt_token_ids": []}, "prompt 0 is empty"),
        ({}, "prompt 0 must have one key, prompt or prompt_token_ids"),
        ({"prompt": "abc", "multi_modal_data": 1}, "prompt 0 must have one key"),
        ([{5: 6}], "prompt 0 must have one key"),
        ({5, 6}, "of type set"),
        (torch.tensor([5, 6]), "of type Tensor"),
        ([torch.tensor([5, 6])], "prompt 0 .*Tensor"),
        ([np.array([5, 6])], "prompt 0 .*ndarray"),
        ([b"abc"], "prompt 0 .*bytes"),
    ],
    ids=repr,
)
def test_a_value_that_is_not_a_prompt_is_rejected(engine, prompts, match):
    assert_refused(engine, lambda: generate(engine, prompts), match)


@pytest.mark.parametrize(
    ("prompts", "match"),
    [
        ([VOCABULARY], "prompt 0 holds 211, .*0 to 210"),
        ([-1], "prompt 0 holds -1, .*0 to 210"),
        ([2**40], "prompt 0 holds 1099511627776, .*0 to 210"),
        ([5, 10**400], "prompt 0 holds 1000.*0 to 210"),
        ([True], "prompt 0 .*bool"),
        ([5, True], "prompt 0 holds True"),
        ([[False]], "prompt 0 holds False"),
        ([1.5], "prompt 0 .*float"),
        ([5, 1.5], "prompt 0 holds 1.5"),
        ([[NAN]], "prompt 0 holds nan"),
        ([5.0, 6.0], "prompt 0 .*float"),
        ([5, "6"], "prompt 0 holds '6'"),
        ([["6"]], "prompt 0 holds '6'"),
        ([5, None], "prompt 0 holds None"),
        ([5, [6]], r"prompt 0 holds \[6\]"),
        ([[5], 6], "prompt 1 .*int"),
        ([[[5]]], r"prompt 0 holds \[5\]"),
    ],
    ids=lambda value: repr(value)[:20],
)
def test_a_value_that_is_not_a_token_id_is_rejected(engine, prompts, match):
    assert_refused(engine, lambda: generate(engine, prompts), match)


@pytest.mark.parametrize(
    ("prompt", "match"),
    [
        ([], "empty"),
        (None, "NoneType"),
        (5, "int"),
        ([VOCABULARY], "holds 211, .*0 to 210"),
        ([-1], "holds -1"),
        ([2**40], "holds 1099511627776"),
        ([True], "holds True"),
        ([1.5], "holds 1.5"),
        (["6"], "holds '6'"),
        ([[5, 6]], r"holds \[5, 6\]"),
        ("six", "no tokenizer"),
        ([5] * 16, r"16 tokens.*max_seq_length=16"),
    ],
    ids=lambda value: repr(value)[:20],
)
def test_add_request_rejects_the_prompts_that_generate_rejects(engine, prompt, match):
    assert_refused(engine, lambda: engine.add_request(prompt, GREEDY), match)


@pytest.mark.parametrize("bad", [[], [VOCABULARY], [True], "text", [5] * 16, None], ids=lambda bad: repr(bad)[:20])
@pytest.mark.parametrize("index", [0, 1, 2])
def test_an_error_names_the_index_of_a_bad_prompt_and_no_other_prompt_is_queued(engine, bad, index):
    prompts = [[5, 6], [7, 8]]
    prompts.insert(index, bad)
    assert_refused(engine, lambda: generate(engine, prompts), f"^prompt {index} ")


def test_numpy_integers_are_token_ids(engine):
    assert completion(engine, list(np.array(GOOD_PROMPT))) == completion(engine, GOOD_PROMPT)


@pytest.mark.parametrize("request_id", [-1, 10**9, None, "0", 1.5])
def test_abort_of_an_unknown_request_does_nothing(engine, request_id):
    before = engine.stats()
    assert engine.abort(request_id) is None
    assert engine.stats() == before


# --- lengths -----------------------------------------------------------------------------------------------------


def test_a_prompt_one_token_shorter_than_max_seq_length_gets_one_token(engine):
    answer = completion(engine, [5] * 15)
    assert (len(answer.token_ids), answer.finish_reason) == (1, "length")


@pytest.mark.parametrize("length", [16, 17, 1000])
def test_a_prompt_of_max_seq_length_or_more_is_rejected_with_the_numbers(engine, length):
    match = rf"prompt 0 has {length} tokens.*length is 16 .*max_seq_length=16.*raise max_seq_length"
    assert_refused(engine, lambda: generate(engine, [[5] * length]), match)


def test_a_prompt_that_leaves_one_slot_of_the_pool_gets_one_token(small_pool_engine):
    answer = completion(small_pool_engine, [5] * 11)
    assert (len(answer.token_ids), answer.finish_reason) == (1, "length")


@pytest.mark.parametrize("length", [12, 13, 63])
def test_a_prompt_that_fits_max_seq_length_but_not_the_pool_is_rejected_with_the_numbers(small_pool_engine, length):
    match = rf"prompt 0 has {length} tokens.*length is 12 .*max_seq_length=64.*3 usable pages x 4.*raise n_pages"
    assert_refused(small_pool_engine, lambda: generate(small_pool_engine, [[5] * length]), match)


@pytest.mark.parametrize("max_tokens", [8, 10**12, None])
def test_a_request_that_would_exceed_the_pool_ends_at_the_limit_without_preempting_itself(
    small_pool_engine, max_tokens
):
    params = greedy(max_tokens)
    answer = completion(small_pool_engine, [5] * 5, params)
    assert (len(answer.token_ids), answer.finish_reason) == (12 - 5, "length")
    assert small_pool_engine.stats().num_preemptions == 0


@pytest.mark.parametrize("max_tokens", [12, 10**12, None])
def test_a_request_that_would_exceed_max_seq_length_ends_at_the_limit(engine, max_tokens):
    answer = completion(engine, [5] * 5, greedy(max_tokens))
    assert (len(answer.token_ids), answer.finish_reason) == (16 - 5, "length")
    assert engine.stats().num_preemptions == 0


def test_max_tokens_that_just_fit_are_all_generated(engine):
    params = greedy(3)
    assert len(completion(engine, [5] * 13, params).token_ids) == 3


def test_max_seq_length_need_not_be_a_multiple_of_the_page_size(bare_model):
    with Inference(bare_model, None, **{**SIZES, "max_seq_length": 10}) as engine:
        params = greedy(None)
        assert len(completion(engine, [5] * 7, params).token_ids) == 3
        assert_refused(engine, lambda: generate(engine, [[5] * 10]), "10 tokens.*max_seq_length=10")


# --- texts -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("prompts", "name"), [("", "prompt 0"), ([""], "prompt 0"), (["a", ""], "prompt 1")])
def test_an_empty_text_is_rejected_even_if_the_tokenizer_adds_a_bos(text_engine, prompts, name):
    assert_refused(text_engine, lambda: generate(text_engine, prompts), f"{name} is empty")


@pytest.mark.parametrize(("prompts", "index"), [("a", 0), (["a"], 0), ([[5], "a"], 1)])
def test_a_text_prompt_is_rejected_without_a_tokenizer(engine, prompts, index):
    assert_refused(engine, lambda: generate(engine, prompts), f"prompt {index} is a text.*no tokenizer")


@pytest.mark.parametrize("text", ["\ud800", "a\udfffb", "\udc80\ud800"], ids=ascii)
def test_a_lone_surrogate_is_rejected(text_engine, text):
    assert_refused(text_engine, lambda: generate(text_engine, ["a", text]), "prompt 1 is not valid Unicode.*surrogate")
    assert_refused(text_engine, lambda: text_engine.add_request(text, GREEDY), "not valid Unicode")


@pytest.mark.parametrize("text", ["\0", "a\0b", "\U0001f600", "שלום עולם", "\u202eabc", "e\u0301", "\r\n\t ", "�"])
def test_unusual_texts_are_tokenized_byte_by_byte(text_engine, text):
    (output,) = generate(text_engine, text)
    assert output.prompt == text
    assert len(output.prompt_token_ids) == 1 + len(text.encode())  # a BOS and one token per byte
    assert text_engine.tokenizer.decode(output.prompt_token_ids, skip_special_tokens=True) == text
    assert len(output.outputs[0].token_ids) == 3


def test_a_text_longer_than_max_seq_length_is_rejected_with_its_number_of_tokens(text_engine):
    assert_refused(text_engine, lambda: generate(text_engine, "é" * 40), "prompt 0 has 81 tokens.*max_seq_length=64")
    assert_refused(text_engine, lambda: generate(text_engine, " " * 100_000), "prompt 0 has 100001 tokens")


def test_a_prompt_that_begins_with_bos_gets_no_second_bos(text_engine):
    plain, with_bos = generate(text_engine, ["hello", "<bos>hello"])
    assert plain.prompt_token_ids == with_bos.prompt_token_ids
    assert with_bos.prompt_token_ids.count(text_engine.tokenizer.bos_token_id) == 1
    assert with_bos.prompt == "<bos>hello"
    assert with_bos.outputs == plain.outputs


def test_a_token_that_only_the_tokenizer_has_is_rejected(bare_model):
    # The model has 211 embeddings, but the tokenizer's id of a blank is 223.
    with Inference(bare_model, byte_tokenizer(), **SIZES) as engine:
        assert_refused(engine, lambda: generate(engine, ["ok", "not ok"]), "prompt 1 holds 223, .*0 to 210")


def test_a_tokenizer_without_special_tokens_works(bare_model):
    tokenizer = byte_tokenizer()
    tokenizer.bos_token = tokenizer.eos_token = tokenizer.pad_token = None
    with Inference(bare_model, tokenizer, **SIZES) as engine:
        (output,) = generate(engine, "<bos>")
        assert len(output.outputs[0].token_ids) == 3


# --- sampling parameters -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *itertools.product(["max_tokens"], [0, -1, -(10**12), "5", True, False, 1.5, 5.0, NAN, INFINITY, [5]]),
        *itertools.product(["temperature"], [-1, -1e-9, NAN, INFINITY, -INFINITY, 3, 2.01, "hot", None, True, 1j]),
        *itertools.product(["seed"], [-(2**63) - 1, 2**63, 10**30, 1.5, 0.0, True, "0", NAN]),
        *itertools.product(["ignore_eos"], [None, 0, 1, "yes"]),
    ],
)
def test_a_sampling_parameter_out_of_range_is_rejected_with_its_value(name, value):
    with pytest.raises(ValueError, match=name) as error:
        SamplingParams(**{name: value})
    assert repr(value) in str(error.value)


@pytest.mark.parametrize(
    "parameters",
    [
        dict(max_tokens=1),
        dict(max_tokens=None),
        dict(max_tokens=10**12),
        dict(temperature=0),
        dict(temperature=2),
        dict(temperature=1e-9),
        dict(seed=0),
        dict(seed=-(2**63)),
        dict(seed=2**63 - 1),
        dict(seed=None),
    ],
    ids=str,
)
def test_the_limits_of_the_ranges_are_accepted(parameters):
    SamplingParams(**parameters)


@pytest.mark.parametrize("n", [True, 0, -1, 1.0, "2", None, 16_385, 10**9])
def test_a_number_of_samples_out_of_range_is_rejected(n):
    with pytest.raises(ValueError, match=r"n must be an int in \[1, 16384\]"):
        SamplingParams(n=n)


def test_greedy_samples_of_one_request_are_equal(engine):
    (output,) = generate(engine, [[5, 6]], SamplingParams(n=2, temperature=0, max_tokens=4))
    assert output.outputs[0].token_ids == output.outputs[1].token_ids


BAD_PARAMETERS = dict(
    top_p=[0, -0.1, 1.0001, NAN, INFINITY, "0.5", None, True],
    top_k=[-2, 1.5, True, "5", None, NAN],
    priority=[-(2**63) - 1, 2**63, 0.0, True, None, "0"],
    min_p=[-0.1, 1.1, NAN, INFINITY, None, True],
    stop=["", ["a", ""], 5, [5], [None], ["a"] * 65, "a" * 1025, b"a", {"a"}],
    stop_token_ids=[5, "5", [-1], [1.5], [True], ["5"], [None], {5}],
    min_tokens=[-1, 17, 1.5, True, None, "1"],  # max_tokens is 16
    logprobs=[-1, -2, 21, 10**6, 1.5, True, "1"],
    prompt_logprobs=[-1, 21, 1.5, True],
    presence_penalty=[-2.1, 2.1, NAN, INFINITY, None, True],
    frequency_penalty=[-2.1, 2.1, NAN, "0"],
    repetition_penalty=[0, 5e-324, -1, 10.1, NAN, INFINITY, None, False],
    logit_bias=[
        dict.fromkeys(range(1025), 0.0),
        5,
        [5],
        {5: 101},
        {5: -101},
        {5: NAN},
        {5: INFINITY},
        {-1: 1},
        {"5": 1},
        {5: True},
        {True: 1.0},
    ],
    allowed_token_ids=[[], (), 5, [-1], [True], "5", [1.5]],
    skip_special_tokens=[None, 0, "yes"],
    include_stop_str_in_output=[None, 1],
    structured_outputs=["{}", {"json": {}}, True],
)
GOOD_PARAMETERS = dict(
    top_p=[1e-9, 0.5, 1],
    top_k=[-1, 0, 1, 10**12],
    priority=[0],  # the default policy ignores other values, and so rejects them
    min_p=[0, 0.5, 1],
    stop=["a", [], None, ["a"] * 64, "a" * 1024, ("a", "b")],
    stop_token_ids=[None, [], [5], (5, 6), [np.int64(5)]],
    min_tokens=[0, 16],
    logprobs=[None, 0, 20],
    prompt_logprobs=[None, 0, 20],
    presence_penalty=[-2, 2],
    frequency_penalty=[-2, 2],
    repetition_penalty=[1e-3, 10],
    logit_bias=[None, {}, {5: -100}, {5: 100.0}],
    allowed_token_ids=[None, [5]],
    skip_special_tokens=[False],
    include_stop_str_in_output=[True],
    structured_outputs=[None, StructuredOutputsParams(regex="a")],
)


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, values in BAD_PARAMETERS.items() for value in values]
)
def test_a_parameter_out_of_range_is_rejected_with_its_name(name, value):
    with pytest.raises(ValueError, match=name) as error:
        SamplingParams(**{name: value})
    assert len(str(error.value)) < 300


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, values in GOOD_PARAMETERS.items() for value in values]
)
def test_a_parameter_in_range_is_accepted(name, value):
    assert getattr(SamplingParams(**{name: value}), name) is value


def test_every_parameter_is_tested_at_its_limits():
    names = {field.name for field in dataclasses.fields(SamplingParams)}
    assert names == BAD_PARAMETERS.keys() | {"n", "temperature", "seed", "max_tokens", "ignore_eos"}
    assert BAD_PARAMETERS.keys() == GOOD_PARAMETERS.keys()


@pytest.mark.parametrize("given", [{}, dict(json={}, regex="a"), dict(json_object=False)], ids=str)
def test_structured_outputs_need_exactly_one_structure(given):
    with pytest.raises(ValueError, match="exactly one"):
        StructuredOutputsParams(**given)


@pytest.mark.parametrize(
    ("parameters", "match"),
    [
        (dict(stop_token_ids=[VOCABULARY]), "stop_token_ids holds 211, .*0 to 210"),
        (dict(allowed_token_ids=[5, 2**40]), "allowed_token_ids holds 1099511627776, .*0 to 210"),
        (dict(logit_bias={VOCABULARY: 1.0}), "logit_bias holds 211, .*0 to 210"),
        (dict(stop="a"), "stop is a string, but the engine has no tokenizer"),
        (dict(structured_outputs=StructuredOutputsParams(regex="a")), "the engine has no tokenizer"),
        (dict(allowed_token_ids=[5, 6], stop_token_ids=[5, 6, 7], min_tokens=1), "holds stop tokens only"),
    ],
    ids=str,
)
def test_parameters_that_the_engine_cannot_apply_are_rejected_on_arrival(engine, parameters, match):
    assert_refused(engine, lambda: generate(engine, [[5], [6]], SamplingParams(**parameters)), f"prompt 0.*{match}")


def test_an_unknown_parameter_is_rejected_with_its_name():
    with pytest.raises(TypeError, match="best_of"):
        SamplingParams(best_of=2)


def test_parameters_are_immutable_and_a_changed_copy_is_validated():
    with pytest.raises(dataclasses.FrozenInstanceError):
        GREEDY.max_tokens = 0
    with pytest.raises(ValueError, match=r"max_tokens.*0"):
        dataclasses.replace(GREEDY, max_tokens=0)


@pytest.mark.parametrize("temperature", [1e-9, 9e-6, 0.0, -0.0])
def test_a_temperature_next_to_zero_is_greedy(engine, temperature):
    params = SamplingParams(temperature=temperature, max_tokens=3, ignore_eos=True)
    assert completion(engine, GOOD_PROMPT, params) == completion(engine, GOOD_PROMPT)


@pytest.mark.parametrize("count", [0, 1, 3])
def test_generate_needs_as_many_sampling_params_as_prompts(engine, count):
    match = f"2 prompts but {count} sampling_params"
    assert_refused(engine, lambda: generate(engine, [[5], [6]], [GREEDY] * count), match)


@pytest.mark.parametrize("params", [5, 0, "x", {"temperature": 0}, {}, [None], [{}]], ids=repr)
def test_generate_rejects_values_that_are_not_sampling_params(engine, params):
    assert_refused(engine, lambda: generate(engine, [[5, 6]], params), "sampling_params")


@pytest.mark.parametrize(
    "params", [5, 0, "x", {"temperature": 0}, {}, [], [GREEDY]], ids=lambda value: repr(value)[:20]
)
def test_add_request_rejects_values_that_are_not_sampling_params(engine, params):
    try:
        assert_refused(engine, lambda: engine.add_request([5, 6], params), "sampling_params")
    finally:
        engine.scheduler.reset()  # so that a request accepted by mistake fails this test only


# --- sizes -------------------------------------------------------------------------------------------------------


BAD_SIZES = [
    *itertools.product(
        ["max_batch_size", "max_seq_length", "page_size", "n_pages", "max_num_batched_tokens"],
        [0, -1, True, 1.5, "4", NAN],
    ),
    ("max_seq_length", 1),  # a sequence needs a prompt token and a generated token
    ("n_pages", 1),  # page 0 is reserved
    *itertools.product(["watermark"], [-1, True, 1.5, None]),
]


@pytest.mark.parametrize(("name", "value"), BAD_SIZES)
def test_a_size_out_of_range_is_rejected_with_its_name_and_value(bare_model, name, value):
    with pytest.raises(ValueError, match=rf"{name} must be an int >= \d.*got {value!r}"):
        Inference(bare_model, None, **{**SIZES, name: value})
    assert_untouched(bare_model)


@pytest.mark.parametrize(("name", "value"), [("page_size", 0), ("n_pages", 0), ("n_pages", 1), ("max_seq_length", 513)])
def test_a_rejected_size_does_not_disturb_the_engine_that_uses_the_model(bare_model, name, value):
    with Inference(bare_model, None, **SIZES) as engine:
        with pytest.raises(ValueError, match=name):
            Inference(bare_model, None, **{**SIZES, name: value})
        assert len(completion(engine, GOOD_PROMPT).token_ids) == 3


def test_a_pool_of_one_token_is_rejected(bare_model):
    with pytest.raises(ValueError, match="n_pages=2 of page_size=1 cannot hold a prompt token and a generated token"):
        Inference(bare_model, None, **{**SIZES, "n_pages": 2, "page_size": 1})
    assert_untouched(bare_model)


def test_max_seq_length_is_at_most_the_number_of_the_models_positions(bare_model):
    with pytest.raises(ValueError, match=r"max_seq_length=513 .*512 positions"):
        Inference(bare_model, None, **{**SIZES, "max_seq_length": 513})
    assert_untouched(bare_model)
    with Inference(bare_model, None, **{**SIZES, "max_seq_length": 512}) as engine:
        assert engine.max_seq_length == 512
    with Inference(bare_model, None, **{**SIZES, "max_seq_length": None}) as engine:
        assert engine.max_seq_length == 512


def test_the_smallest_possible_engine_generates(bare_model):
    smallest = dict(max_batch_size=1, max_seq_length=2, n_pages=2, page_size=2, max_num_batched_tokens=1, watermark=0)
    expected = hf_generate(bare_model, [5], 1, ignore_eos=True)
    with Inference(bare_model, None, compile=False, **smallest) as engine:
        assert completion(engine, [5]).token_ids == expected
        assert_refused(engine, lambda: generate(engine, [[5, 6]]), "2 tokens.*max_seq_length=2")


# --- memory ------------------------------------------------------------------------------------------------------


def test_a_pool_larger_than_memory_is_rejected_in_gb_and_another_engine_can_be_built(bare_model):
    with pytest.raises(ValueError, match=r"1,000,000,000,000 pages of 4 .*[\d,]+\.\d GB.*[\d,]+\.\d GB .*n_pages="):
        Inference(bare_model, None, **{**SIZES, "n_pages": 10**12})
    assert_untouched(bare_model)
    with Inference(bare_model, None, **SIZES) as engine:
        assert len(completion(engine, GOOD_PROMPT).token_ids) == 3


def pool_bytes(engine):
    caches = [layer.kv_cache for layer in engine.runner.attention_layers]
    kv_bytes = sum(cache.k_cache.nbytes + cache.v_cache.nbytes for cache in caches)
    return kv_bytes + sum(table.physical_to_logical.nbytes for table in engine.kv.pools.values())


def test_the_n_pages_that_the_error_names_is_the_largest_that_fits(bare_model, monkeypatch):
    free = 100_000
    monkeypatch.setattr(memory, "free_bytes", lambda device: free)
    sizes = SIZES | dict(max_num_batched_tokens=8)
    with pytest.raises(ValueError, match=r"n_pages=\d+ fits") as error:
        Inference(bare_model, None, **{**sizes, "n_pages": 10_000})
    fits = int(str(error.value).split("n_pages=")[1].split(" ")[0])
    with Inference(bare_model, None, **{**sizes, "n_pages": fits}) as engine:
        assert pool_bytes(engine) <= free
    with pytest.raises(ValueError, match=f"{fits + 1} pages.*n_pages={fits} fits"):
        Inference(bare_model, None, **{**sizes, "n_pages": fits + 1})
    assert_untouched(bare_model)


def test_the_default_pool_leaves_half_of_the_memory_free(bare_model, monkeypatch):
    free = 1_000_000
    monkeypatch.setattr(memory, "free_bytes", lambda device: free)
    sizes = dict(n_pages=None, max_batch_size=50, max_num_batched_tokens=64)
    with Inference(bare_model, None, **{**SIZES, **sizes}) as engine:
        assert engine.page_table.n_pages < 1 + 50 * 4, "memory must limit the pool, or this test checks nothing"
        assert free / 4 < pool_bytes(engine) <= free / 2
        assert completion(engine, GOOD_PROMPT).finish_reason == "length"


def limited_pool(spec, monkeypatch, free):
    """Return the default number of pages, the largest that fits, and the number that requests can need."""
    monkeypatch.setattr(memory, "free_bytes", lambda device: free)
    wanted = 1 + 5_000 * 4
    geometry = Geometry(wanted, 4, 5_000, 16, 64, (None,))
    usable = int(memory.DEFAULT_SHARE_ELSEWHERE * (free - memory.step_bytes(spec, geometry)))
    return memory.pool_size(spec, geometry), memory.largest_pool(spec, geometry, usable), wanted


@pytest.mark.parametrize("num_pages", [2, 15, 16, 17, 40, 100, 1_000, 1_100, 19_000])
def test_a_default_pool_that_memory_limits_is_rounded_down_by_less_than_a_sixteenth(bare_model, monkeypatch, num_pages):
    spec = spec_of(bare_model)
    geometry = Geometry(num_pages, 4, 5_000, 16, 64, (None,))
    free = 2 * memory.kv_bytes(spec, geometry) + memory.step_bytes(spec, geometry)
    n_pages, largest, _ = limited_pool(spec, monkeypatch, free)
    assert largest == num_pages and 15 / 16 * largest < n_pages <= largest
    multiple = {2: 1, 15: 1, 16: 1, 17: 1, 40: 2, 100: 4, 1_000: 32, 1_100: 64, 19_000: 64}[num_pages]
    assert n_pages == largest - largest % multiple
    # A slightly different amount of memory gives the same pool.
    more = memory.kv_bytes(spec, geometry) / num_pages * (multiple - 1 - largest % multiple)
    assert limited_pool(spec, monkeypatch, free + int(2 * more))[0] == n_pages


def test_a_default_pool_that_memory_does_not_limit_is_not_rounded(bare_model, monkeypatch):
    n_pages, _, wanted = limited_pool(spec_of(bare_model), monkeypatch, 10**12)
    assert n_pages == wanted == 20_001


@pytest.mark.parametrize(
    ("version", "rows", "page_size"), [("2.13.1", 1, 2**20), ("2.14.0", 1, 2**20), ("2.14.0", 9, 1)]
)
def test_a_pool_is_no_larger_than_the_offsets_of_cuda_kernels(bare_model, monkeypatch, version, rows, page_size):
    """Offsets are int32: those of keys before torch 2.14, and those of the page table."""
    spec = dataclasses.replace(spec_of(bare_model), device=torch.device("cuda"))
    monkeypatch.setattr(torch, "__version__", TorchVersion(version))
    monkeypatch.setattr(memory, "free_bytes", lambda device: 10**18)
    pages_per_row = 1_000 if page_size > 1 else 2**30
    geometry = Geometry(2, page_size, rows, pages_per_row * page_size, 64, (None,))
    enough = 1 + rows * pages_per_row
    n_pages = memory.pool_size(spec, geometry)
    memory.check_pool_fits(spec, dataclasses.replace(geometry, n_pages=n_pages))
    if version < "2.14":
        assert n_pages * page_size * spec.key_dim < 2**31 <= (n_pages + 1) * page_size * spec.key_dim
    elif page_size > 1:
        assert n_pages == enough and n_pages * page_size * spec.key_dim > 2**31
    else:
        assert n_pages * (rows + 1) < 2**31 <= (n_pages + 1) * (rows + 1) and n_pages < enough
    if n_pages < enough:
        with pytest.raises(ValueError, match=f"is more than the {n_pages:,} pages of {page_size} tokens"):
            memory.check_pool_fits(spec, dataclasses.replace(geometry, n_pages=n_pages + 1))


def test_a_larger_token_budget_keeps_no_more_memory_free_for_logits(bare_model):
    spec = spec_of(bare_model)
    small, large = (Geometry(9, 4, 32, 16, budget, (None,)) for budget in (512, 65_536))
    assert memory.step_bytes(spec, small) == memory.step_bytes(spec, large)


def test_the_default_pool_holds_a_full_batch_if_memory_allows(bare_model):
    with Inference(bare_model, None, **{**SIZES, "n_pages": None}) as engine:
        assert engine.page_table.num_usable_pages == 2 * 4  # two sequences of 16 tokens


def test_the_default_pool_raises_an_error_in_gb_if_memory_is_too_small(bare_model, monkeypatch):
    monkeypatch.setattr(memory, "free_bytes", lambda device: 1000)
    with pytest.raises(ValueError, match="GB"):
        Inference(bare_model, None, **{**SIZES, "n_pages": None})
    assert_untouched(bare_model)


def raise_at_call(monkeypatch, owner, name, number):
    original, calls = getattr(owner, name), itertools.count(1)

    def call(*args, **kwargs):
        if next(calls) == number:
            raise MemoryError("injected")
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, call)


@pytest.mark.parametrize(
    ("owner", "name", "number"),
    [
        (inference.PageTable, "__init__", 1),
        (PagedKVCache, "__init__", 1),
        (PagedKVCache, "__init__", 2),  # half of the layers have their caches
        (AttentionInterface, "register", 1),  # the first run of the probe
        (AttentionInterface, "register", 3),  # after both runs
        (models, "verify", 1),
        (runner, "patch_model", 1),
        (models, "_eos_token_ids", 1),
        (inference.InputProcessor, "__init__", 1),
    ],
)
def test_a_constructor_that_fails_leaves_the_model_unchanged(bare_model, monkeypatch, owner, name, number):
    raise_at_call(monkeypatch, owner, name, number)
    try:
        # The exception is kept, as in a notebook: its traceback keeps the half-built engine alive.
        with pytest.raises(MemoryError, match="injected") as kept:
            Inference(bare_model, None, **SIZES)
        monkeypatch.undo()
        assert_untouched(bare_model)
        with Inference(bare_model, None, **SIZES) as engine:
            assert len(completion(engine, GOOD_PROMPT).token_ids) == 3
        assert kept.tb is not None
    finally:
        patching.unpatch_model(bare_model)  # so that a failure affects this test only


# --- compilation and models --------------------------------------------------------------------------------------


def test_compiling_for_float64_is_rejected(bare_model):
    with pytest.raises(ValueError, match=r"compile=True.*torch\.float64"):
        Inference(bare_model, None, **{**SIZES, "compile": True})
    assert_untouched(bare_model)


def test_float64_runs_uncompiled_by_default(bare_model):
    with Inference(bare_model, None, **{**SIZES, "compile": None}) as engine:
        assert not engine.runner.compiled
        assert len(completion(engine, GOOD_PROMPT).token_ids) == 3


def assert_model_refused(model, match):
    implementation = getattr(getattr(model, "config", None), "_attn_implementation", None)
    with pytest.raises(ValueError, match=match):
        Inference(model, None, **SIZES)
    assert getattr(getattr(model, "config", None), "_attn_implementation", None) == implementation


def test_an_unsupported_model_is_rejected_with_its_name():
    model = AutoModelForCausalLM.from_config(MambaConfig(hidden_size=16, num_hidden_layers=1, vocab_size=64)).eval()
    assert_model_refused(model, "MambaForCausalLM has no number of positions")


@pytest.mark.parametrize("model", [None, "google/gemma-2-2b"])
def test_a_value_that_is_not_a_model_is_rejected(model):
    assert_model_refused(model, "model")


def test_a_model_without_a_language_model_head_is_rejected():
    assert_model_refused(AutoModel.from_config(CONFIGS["gemma2"]()).eval(), "Gemma2Model has no language-model head")


def test_a_model_in_training_mode_is_rejected():
    assert_model_refused(fresh_model().train(), r"training mode.*model\.eval\(\)")


ROPE = dict(rope_theta=10_000.0, factor=2.0)
DYNAMIC = dict(ROPE, rope_type="dynamic")
LONG = dict(
    ROPE,
    rope_type="longrope",
    short_factor=[1.0] * 6,
    long_factor=[2.0] * 6,
    original_max_position_embeddings=48,
)
DEFAULT = dict(rope_type="default", rope_theta=10_000.0)


@pytest.mark.parametrize(
    ("architecture", "rope", "name"),
    [
        ("llama", DYNAMIC, "dynamic"),
        ("llama", LONG, "longrope"),
        ("gemma3_text", dict(sliding_attention=DEFAULT, full_attention=DYNAMIC), "dynamic"),
        ("gemma3_text", dict(sliding_attention=DYNAMIC, full_attention=DEFAULT), "dynamic"),
    ],
)
def test_rope_that_depends_on_the_batch_limits_the_length(architecture, rope, name):
    """Frequencies change beyond 48 positions: `original_max_position_embeddings`, or the positions of the config."""
    model = fresh_model(architecture, rope_parameters=rope, max_position_embeddings=192 if rope is LONG else 48)
    with pytest.raises(ValueError, match=f"=49 is more than the 48 positions of the model; .*rope_type '{name}'"):
        Inference(model, None, **{**SIZES, "max_seq_length": 49})
    prompts, params = [prompt_of(40), GOOD_PROMPT], SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    with Inference(model, None, **{**SIZES, "max_seq_length": None, "n_pages": 40}) as engine:
        outputs = engine.generate(prompts, params, use_tqdm=False)
    expected = [hf_generate(model, prompt, 8, ignore_eos=True) for prompt in prompts]
    assert [output.outputs[0].token_ids for output in outputs] == expected


def test_rope_that_does_not_depend_on_the_batch_is_accepted():
    model = fresh_model(rope_parameters=dict(ROPE, rope_type="linear"))
    expected = hf_generate(model, GOOD_PROMPT, 3, ignore_eos=True)
    with Inference(model, None, **SIZES) as engine:
        assert completion(engine, GOOD_PROMPT).token_ids == expected


def test_a_model_on_several_devices_is_rejected():
    model = fresh_model()
    model.lm_head.to("meta")
    assert_model_refused(model, r"one device.*\['cpu', 'meta'\]")


def test_a_model_without_weights_is_rejected():
    assert_model_refused(fresh_model().to("meta"), r"one device.*\['meta'\]")


def test_bidirectional_attention_is_rejected():
    assert_model_refused(
        fresh_model("gemma3_text", use_bidirectional_attention=True), "Gemma3Attention.*a mask that is not causal"
    )
