"""The fields, headers and error codes that real clients send and expect, and the log line of a rejected request."""

import itertools
import json
import logging
import re
from types import SimpleNamespace

import pytest
from engines import assert_empty
from serving import MODEL, TEMPLATE, events_of, new_engine, serving

from flex_nano_vllm import Inference, SamplingParams, server_protocol
from flex_nano_vllm.server import server_defaults, valid_origins

COMPLETIONS, CHATS, RESPONSES = "/v1/completions", "/v1/chat/completions", "/v1/responses"
SMALL = dict(model=MODEL, prompt="hi", max_tokens=3, temperature=0, ignore_eos=True)
CHAT = dict(model=MODEL, messages=[{"role": "user", "content": "hi"}], max_tokens=3, temperature=0, ignore_eos=True)
ORIGIN = {"Origin": "https://app.example"}


@pytest.fixture(scope="module")
def served():
    with new_engine() as engine, serving(engine) as served:
        yield served
        served.wait_until_idle()
        served.between_steps(lambda: assert_empty(engine))


def error_of(served, path, body, headers=None):
    status, _, answer = served.ask("POST", path, body, headers)
    return status, json.loads(answer)["error"]


# --- fields ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("path", "body"), [(COMPLETIONS, SMALL), (CHATS, CHAT)])
def test_all_chunks_of_a_stream_have_the_same_creation_time_and_fingerprint(served, monkeypatch, path, body):
    clock = itertools.count()
    monkeypatch.setattr(server_protocol, "time", SimpleNamespace(time=lambda: 1000 + next(clock)))
    *chunks, _ = events_of(served.ask("POST", path, body | {"stream": True})[2])
    assert len({chunk["created"] for chunk in chunks}) == 1
    assert {chunk["system_fingerprint"][:15] for chunk in chunks} == {"flex-nano-vllm-"}


def test_the_served_model_has_a_plausible_creation_time(served):
    (model,) = json.loads(served.ask("GET", "/v1/models")[2])["data"]
    assert model["created"] > 1_700_000_000


@pytest.mark.parametrize(("path", "body"), [(COMPLETIONS, SMALL | {"n": 2}), (CHATS, CHAT)])
def test_every_chunk_contains_the_usage_so_far_if_the_client_requests_it(served, path, body):
    options = {"include_usage": True, "continuous_usage_stats": True}
    *chunks, _ = events_of(served.ask("POST", path, body | {"stream": True, "stream_options": options})[2])
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counts == sorted(counts) and counts[-1] == 3 * body.get("n", 1)
    assert len({chunk["usage"]["prompt_tokens"] for chunk in chunks}) == 1
    plain = events_of(served.ask("POST", path, body | {"stream": True})[2])
    assert not any("usage" in chunk for chunk in plain[:-1])


@pytest.mark.parametrize("stream", [False, True])
def test_max_tokens_0_with_echo_returns_the_prompt_with_its_log_probabilities(served, stream):
    body = SMALL | dict(max_tokens=0, echo=True, logprobs=1, prompt="hello", stream=stream)
    if stream:
        body |= {"stream_options": {"include_usage": True}}
    answer = served.ask("POST", COMPLETIONS, body)[2]
    first, *_, last = events_of(answer)[:-1] if stream else [json.loads(answer)] * 2
    (choice,) = first["choices"]
    assert (choice["text"], choice["finish_reason"]) == ("hello", "length")
    assert choice["logprobs"]["tokens"] == ["<bos>", *"hello"] and choice["logprobs"]["text_offset"] == [
        0,
        0,
        1,
        2,
        3,
        4,
    ]
    assert last["usage"]["completion_tokens"] == 0


def test_a_seed_is_any_signed_64_bit_number_and_greedy_samples_are_the_same(served):
    drawn = [
        json.loads(served.ask("POST", COMPLETIONS, SMALL | dict(temperature=1, seed=seed))[2])["choices"][0]["text"]
        for seed in (-1, 2**63 - 1, -(2**63), 0)
    ]
    assert drawn[0] == drawn[1] and drawn[2] == drawn[3]  # equal in the lower 63 bits
    choices = json.loads(served.ask("POST", COMPLETIONS, SMALL | dict(n=3))[2])["choices"]
    assert len({choice["text"] for choice in choices}) == 1 and len(choices) == 3


def test_reasoning_effort_is_accepted(served):
    for effort in ("minimal", "high"):
        assert served.ask("POST", CHATS, CHAT | dict(reasoning_effort=effort))[0] == 200


@pytest.mark.parametrize("response_format", [{"type": "json_object", "schema": {"enum": [7]}}])
def test_an_answer_fits_the_schema_of_a_json_object_format(served, response_format):
    body = CHAT | dict(response_format=response_format, max_tokens=8, ignore_eos=False)
    assert json.loads(served.ask("POST", CHATS, body)[2])["choices"][0]["message"]["content"] == "7"


@pytest.mark.parametrize(
    ("response_format", "words"),
    [
        ({"type": "text", "schema": {}}, "schema is not a field of type text"),
        ({"type": "regex", "regex": "a", "json_schema": {"schema": {}}}, "json_schema is not a field of type regex"),
        ({"type": "json_object", "strict": True}, "response_format.strict: Extra inputs"),
        ({"type": "json_schema"}, "type json_schema needs the field json_schema"),
    ],
)
def test_an_unused_or_missing_field_of_a_response_format_is_named_in_the_error(served, response_format, words):
    status, error = error_of(served, CHATS, CHAT | dict(response_format=response_format))
    assert (status, error["param"]) == (400, "response_format") and words in error["message"]


def test_whitespace_in_json_is_one_space_unless_the_response_format_has_a_pattern(served):
    tokenizer = served.engine.tokenizer
    spaces = {str(tokenizer.convert_tokens_to_ids(token)): 100 for token in "ĠĊ"}
    schema = {"type": "array", "items": {"enum": [1]}, "minItems": 2, "maxItems": 2}
    body = CHAT | dict(max_tokens=40, ignore_eos=False, logit_bias=spaces)
    for more, expected in [({}, "[ 1 , 1 ]"), ({"whitespace_pattern": r"\n{2}"}, "[\n\n1\n\n,\n\n1\n\n]")]:
        form = {"type": "json_schema", "json_schema": {"schema": schema}} | more
        answer = json.loads(served.ask("POST", CHATS, body | {"response_format": form})[2])
        assert answer["choices"][0]["message"]["content"] == expected


# --- HTTP --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/health", "/v1/models", "/", "/version"])
def test_a_head_request_has_the_content_length_of_a_get_request_and_no_body(served, path):
    status, headers, body = served.ask("HEAD", path)
    assert (status, body) == (200, b"")
    assert headers["content-length"] == served.ask("GET", path)[1]["content-length"]


def test_the_models_path_with_a_trailing_slash_is_redirected(served):
    status, headers, _ = served.ask("GET", "/v1/models/")
    assert status == 307 and headers["location"].endswith("/v1/models")


@pytest.mark.parametrize(
    ("headers", "words"),
    [
        ({"Content-Type": "text/plain"}, "'text/plain'"),
        ({"Content-Type": ""}, "it is missing"),
        ({"Content-Type": "multipart/form-data; boundary=x"}, "'multipart/form-data'"),
        ({"Content-Encoding": "gzip"}, "Content-Encoding 'gzip'"),
    ],
    ids=str,
)
def test_an_unsupported_content_type_or_encoding_is_rejected_with_status_415(served, headers, words):
    status, error = error_of(served, COMPLETIONS, SMALL, headers)
    assert (status, error["code"]) == (415, "unsupported_media_type") and words in error["message"]


@pytest.mark.parametrize("kind", ["application/json; charset=utf-8", "application/vnd.api+json", "Application/JSON"])
def test_other_content_types_of_json_are_accepted(served, kind):
    assert served.ask("POST", COMPLETIONS, SMALL, {"Content-Type": kind})[0] == 200


def test_every_response_has_a_request_id_and_a_valid_id_of_the_client_is_kept(served):
    ids = [served.ask(*request)[1]["x-request-id"] for request in [("GET", "/health"), ("GET", "/nowhere")]]
    ids.append(served.ask("POST", COMPLETIONS, SMALL | {"stream": True})[1]["x-request-id"])
    assert len(set(ids)) == 3 and all(re.fullmatch("req_[0-9a-f]{32}", each) for each in ids)
    given = {"X-Request-Id": "my-own.1"}
    assert served.ask("GET", "/health", headers=given)[1]["x-request-id"] == "my-own.1"
    assert served.ask("GET", "/health", headers={"X-Request-Id": "x" * 200})[1]["x-request-id"].startswith("req_")


def test_an_internal_error_has_its_request_id_in_the_response_and_in_the_log(served, monkeypatch, caplog):
    monkeypatch.setattr(served.engine.input_processor, "request", None)
    status, headers, _ = served.ask("POST", COMPLETIONS, SMALL, {"X-Request-Id": "mine"})
    assert (status, headers["x-request-id"]) == (500, "mine")
    assert "'/v1/completions': 500 internal error (mine)" in caplog.text


@pytest.mark.parametrize(
    "origin", ["app.example", "https://", "https://app.example/page", "", "https://*.example", "https://u@h"]
)
def test_an_origin_that_browsers_never_send_is_rejected(origin):
    with pytest.raises(ValueError, match=r"must be scheme://host\[:port\], null or \*, got "):
        valid_origins([origin])


def test_origins_are_written_as_browsers_send_them():
    given = ["https://App.Example/", "http://a:80", "https://a:443", "http://[::1]:3000", "null", "*"]
    assert valid_origins(given) == ["https://app.example", "http://a", "https://a", "http://[::1]:3000", "null", "*"]


def test_web_pages_of_allowed_origins_may_call_the_api():
    with new_engine() as engine, serving(engine, api_key="k", allowed_origins=("https://app.example/",)) as served:
        asked = ORIGIN | {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
        status, headers, _ = served.ask("OPTIONS", CHATS, headers=asked)  # without the key
        assert (status, headers["access-control-allow-origin"]) == (200, ORIGIN["Origin"])
        assert "authorization" in headers["access-control-allow-headers"]
        for key, expected in [({"Authorization": "Bearer k"}, 200), ({}, 401)]:
            status, headers, _ = served.ask("POST", CHATS, CHAT, ORIGIN | key)
            assert (status, headers["access-control-allow-origin"]) == (expected, ORIGIN["Origin"])
            assert "x-request-id" in headers["access-control-expose-headers"]
        other = served.ask("POST", CHATS, CHAT, {"Origin": "https://evil.example", "Authorization": "Bearer k"})
        assert "access-control-allow-origin" not in other[1]


# --- rejected requests -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        (COMPLETIONS, SMALL | dict(prompt="x" * 100), "prompt"),
        (COMPLETIONS, SMALL | dict(prompt="x" * 10_000), "prompt"),
        (CHATS, CHAT | dict(messages=[{"role": "user", "content": "x" * 100}]), "messages"),
        (CHATS, CHAT | dict(messages=[{"role": "user", "content": "x" * 10_000}]), "messages"),
        (CHATS, CHAT | dict(messages=[{"role": "user", "content": ""}] * 100), "messages"),
        (RESPONSES, dict(model=MODEL, input="x" * 100), "input"),
        (RESPONSES, dict(model=MODEL, input="x" * 10_000), "input"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_a_prompt_that_is_too_long_is_rejected_with_code_context_length_exceeded(served, path, body, param):
    status, error = error_of(served, path, body)
    assert (status, error["code"], error["param"]) == (400, "context_length_exceeded", param)
    assert "maximum context length is 64 tokens" in error["message"]


@pytest.mark.parametrize(
    ("path", "fields", "param", "code", "words"),
    [
        (COMPLETIONS, dict(stop=["x"] * 17), "stop", "invalid_value", "at most 16 items"),
        (COMPLETIONS, dict(stop=3), "stop", "invalid_value", "a valid string or a valid list, got 3"),
        (COMPLETIONS, dict(stop=["x", 3]), "stop", "invalid_value", "stop.1: Input should be a valid string, got 3"),
        (COMPLETIONS, dict(temperature="x", top_p="y"), "temperature", "invalid_value", "a valid number, got 'x'"),
        (COMPLETIONS, dict(response_format=3), "response_format", "invalid_value", "Input should be a valid object"),
        (COMPLETIONS, dict(stop="x" * 2000), "stop", "invalid_value", "1 to 1024 characters"),
        (COMPLETIONS, dict(temperature=3), "temperature", "invalid_value", "less than or equal to 2, got 3"),
        (COMPLETIONS, dict(suffix="canary"), "suffix", "unsupported_parameter", "suffix: is not supported"),
        (COMPLETIONS, dict(stream_options={}), "stream_options", "invalid_value", "needs stream=true"),
        (
            COMPLETIONS,
            dict(prompt=[1, -1]),
            "prompt",
            "invalid_value",
            "prompt.1: Input should be greater than or equal",
        ),
        (COMPLETIONS, dict(prompt=["a"] * 65), "prompt", "invalid_value", "at most 64 items after validation, not 65"),
        (COMPLETIONS, dict(max_tokens=0, min_tokens=2), "min_tokens", "invalid_value", "more than max_tokens=0"),
        (
            CHATS,
            dict(messages=[{"role": "user", "content": "a", "function_call": {}}]),
            "messages",
            "unsupported_parameter",
            "messages.0.function_call: is not supported",
        ),
        (COMPLETIONS, dict(best_of=4), "best_of", "unsupported_parameter", "best_of: is not supported, got 4"),
        (COMPLETIONS, dict(min_tokens=9), "min_tokens", "invalid_value", "min_tokens=9 is more than max_tokens=3"),
        (COMPLETIONS, dict(logit_bias={"9999": 1}), "logit_bias", "invalid_value", "holds 9999"),
        (COMPLETIONS, dict(stop_token_ids=[9999]), "stop_token_ids", "invalid_value", "holds 9999"),
        (COMPLETIONS, dict(model="other"), "model", "model_not_found", MODEL),
        (
            CHATS,
            dict(messages=[{"role": "user", "content": [{"type": "text"}]}]),
            "messages",
            "invalid_value",
            "has no text",
        ),
        (
            CHATS,
            dict(messages=[{"role": "user", "content": [{"type": "image_url"}]}]),
            "messages",
            "invalid_value",
            "'image_url'",
        ),
        (CHATS, dict(top_logprobs=3), "top_logprobs", "invalid_value", "needs logprobs=true"),
        (CHATS, dict(response_format={"type": "regex", "regex": "("}), "response_format", "invalid_value", "regex"),
        (
            RESPONSES,
            dict(input="a", previous_response_id="resp_1"),
            "previous_response_id",
            "unsupported_parameter",
            "resp_1",
        ),
        (RESPONSES, dict(input={}), "input", "invalid_value", "input: Input should be a valid string or a valid list"),
        (
            RESPONSES,
            dict(input=[{"role": "user", "content": 3}]),
            "input",
            "invalid_value",
            "input.0.content: Input should be a valid string or a valid list",
        ),
        (
            RESPONSES,
            dict(input="a", max_output_tokens=2, min_tokens=9),
            "min_tokens",
            "invalid_value",
            "min_tokens=9 is more than max_output_tokens=2",
        ),
        (RESPONSES, dict(input="a", max_tokens=4), "max_tokens", "unsupported_parameter", "is not supported, got 4"),
        (
            RESPONSES,
            dict(input="a", text={"format": {"type": "text", "schema": {}}}),
            "text",
            "invalid_value",
            "schema is not a field of type text",
        ),
        (RESPONSES, dict(input="a", text={"type": "json_object"}), "text", "invalid_value", "text.type: Extra inputs"),
        (RESPONSES, dict(input="a", max_output_tokens=0), "max_output_tokens", "invalid_value", "got 0"),
        (
            RESPONSES,
            dict(input=[{"role": "user", "content": [{"type": "input_image"}]}]),
            "input",
            "invalid_value",
            "'input_image'",
        ),
        (RESPONSES, dict(input="a", tools=[{"type": "web_search"}]), "tools", "invalid_value", "'web_search'"),
        (RESPONSES, dict(input="a", top_k=-3), "top_k", "invalid_value", "got -3"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_an_error_message_names_the_field_and_its_value_or_limit(served, path, fields, param, code, words):
    base = {COMPLETIONS: SMALL, CHATS: CHAT, RESPONSES: dict(model=MODEL)}[path]
    status, error = error_of(served, path, base | fields)
    assert (error["param"], error["code"]) == (param, code) and status in (400, 404)
    assert words in error["message"], error["message"]
    assert len(error["message"]) < 420


@pytest.mark.parametrize("body", [b'"{\\"prompt\\": \\"canary\\"}"', b"", b"[]", b"\xff", b"[" * 100_000, b"9" * 5000])
def test_a_body_that_is_no_json_object_is_an_error_without_its_text(served, body):
    status, _, answer = served.ask("POST", COMPLETIONS, body, {"Content-Type": "application/json"})
    error = json.loads(answer)["error"]
    assert (status, error["code"], error["param"]) == (400, "invalid_json", None)
    assert "canary" not in error["message"] and "the body" in error["message"]


@pytest.mark.parametrize("missing", ["model", "prompt"])
def test_a_missing_field_is_named_in_the_error(served, missing):
    _, error = error_of(served, COMPLETIONS, {name: value for name, value in SMALL.items() if name != missing})
    assert (error["param"], error["code"]) == (missing, "missing_required_parameter")


def test_allowed_tokens_that_cannot_begin_the_structured_output_are_a_client_error(served):
    body = CHAT | dict(response_format={"type": "regex", "regex": "[a-c]"}, allowed_token_ids=[100])
    status, error = error_of(served, CHATS, body)
    assert (status, error["param"]) == (400, "allowed_token_ids")
    assert "no token of allowed_token_ids can begin a text that fits response_format" in error["message"]
    form = {"format": {"type": "json_object"}}
    status, error = error_of(served, RESPONSES, dict(model=MODEL, input="a", text=form, allowed_token_ids=[100]))
    assert (status, error["param"]) == (400, "allowed_token_ids") and "begin a text that fits text" in error["message"]


@pytest.mark.parametrize("stream", [False, True])
def test_allowed_tokens_that_cannot_continue_the_structured_output_are_a_client_error(served, stream):
    (a,) = served.engine.tokenizer("a", add_special_tokens=False).input_ids
    body = CHAT | dict(response_format={"type": "regex", "regex": "a[bc]"}, allowed_token_ids=[a], stream=stream)
    status, _, answer = served.ask("POST", CHATS, body)
    error = events_of(answer)[-2]["error"] if stream else json.loads(answer)["error"]
    assert stream or status == 400
    assert (error["type"], error["param"]) == ("invalid_request_error", "response_format")
    assert "allowed_token_ids continues the structured output after 1 tokens" in error["message"]


def test_each_rejected_request_has_one_log_line_without_its_prompt(served, caplog):
    with caplog.at_level(logging.INFO):
        served.ask("POST", CHATS, CHAT | dict(messages=[{"role": "user", "content": "canary " * 40}]))
        served.ask("POST", COMPLETIONS, SMALL | dict(prompt=["canary", -1]))
        served.ask("GET", "/nowhere", headers={"X-Request-Id": "mine"})
        served.ask("POST", COMPLETIONS, SMALL)
    lines = [record.getMessage() for record in caplog.records if record.name == "flex_nano_vllm.server_guard"]
    assert [re.search(r": (\d+) ", line)[1] for line in lines] == ["400", "400", "404"]
    assert "maximum context length" in lines[0] and "(mine)" in lines[2] and "'/nowhere'" in lines[2]
    assert "canary" not in caplog.text


def test_a_stream_that_fails_is_one_line_of_the_log(served, caplog):
    (a,) = served.engine.tokenizer("a", add_special_tokens=False).input_ids
    body = CHAT | dict(response_format={"type": "regex", "regex": "a[bc]"}, allowed_token_ids=[a], stream=True)
    with caplog.at_level(logging.INFO):
        served.ask("POST", CHATS, body, {"X-Request-Id": "mine"})
    (line,) = [record.getMessage() for record in caplog.records if record.name == "flex_nano_vllm.server_guard"]
    assert "'/v1/chat/completions': 400 no token of allowed_token_ids" in line and line.endswith("(mine)")


# --- the model's defaults ----------------------------------------------------------------------------------------


@pytest.fixture
def opinionated():
    """An engine whose model has sampling settings in its generation config."""
    with new_engine() as engine:
        config = engine.model.generation_config
        config.do_sample, config.temperature, config.top_k, config.repetition_penalty = True, 0.5, 7, 1.3
        config.no_repeat_ngram_size = 3
        yield engine


def test_fields_that_a_request_does_not_set_have_the_models_defaults(opinionated, caplog):
    with caplog.at_level(logging.INFO):
        defaults = server_defaults(opinionated)
    assert defaults == dict(temperature=0.5, top_k=7, repetition_penalty=1.3)
    assert "no_repeat_ngram_size" in caplog.text
    say = dict(model=MODEL, prompt="hello", seed=3, max_tokens=6, ignore_eos=True)
    with new_engine() as oracle:
        expected = [
            oracle.generate("hello", SamplingParams(seed=3, max_tokens=6, ignore_eos=True, **stated), False)[0]
            .outputs[0]
            .text
            for stated in (defaults, defaults | {"temperature": 1.5}, {})
        ]
    assert len(set(expected)) == 3
    with serving(opinionated, defaults=defaults) as served:
        texts = [served.ask("POST", COMPLETIONS, say | more)[2] for more in ({}, {"temperature": 1.5})]
        given = json.loads(served.ask("POST", RESPONSES, dict(model=MODEL, input="a", max_output_tokens=1))[2])
    assert given["temperature"] == 0.5
    with new_engine() as engine, serving(engine) as served:
        texts.append(served.ask("POST", COMPLETIONS, say)[2])
    assert [json.loads(text)["choices"][0]["text"] for text in texts] == expected


def test_the_models_max_tokens_applies_if_the_request_has_none():
    with new_engine() as engine, serving(engine, defaults={"max_tokens": 2}) as served:
        for path, body in [(COMPLETIONS, SMALL), (CHATS, CHAT)]:
            body = {name: value for name, value in body.items() if name != "max_tokens"}
            assert json.loads(served.ask("POST", path, body)[2])["usage"]["completion_tokens"] == 2
            assert json.loads(served.ask("POST", path, body | {"max_tokens": 4})[2])["usage"]["completion_tokens"] == 4


def test_the_models_minimum_of_tokens_raises_the_default_maximum():
    with new_engine() as engine, serving(engine, defaults={"min_tokens": 20}) as served:
        for stated, expected in [({}, 20), ({"max_tokens": 3}, 3)]:
            request = dict(model=MODEL, prompt="hi", temperature=0, ignore_eos=True) | stated
            assert json.loads(served.ask("POST", COMPLETIONS, request)[2])["usage"]["completion_tokens"] == expected


def test_the_bundled_model_answers_a_chat_with_a_system_message():
    with Inference.from_pretrained("tiny-gemma2", max_batch_size=1, max_seq_length=64, compile=False) as engine:
        messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is 17 plus 8?"}]
        (output,) = engine.chat(messages, SamplingParams(temperature=0, max_tokens=8), use_tqdm=False)
        assert output.outputs[0].text == "25."
        assert "Be brief." in engine.tokenizer.decode(output.prompt_token_ids)
    assert "system" not in TEMPLATE  # the template of the other tests in this file
