"""The server over HTTP: with the openai package as the client, and with clients that send invalid requests."""

import asyncio
import importlib.metadata
import json
import logging
import math
import os
import re
import signal
import socket
import subprocess
import sys
import threading

import openai
import psutil
import pytest
import typer
from engines import assert_empty, greedy, raise_at_call
from prometheus_client.parser import text_string_to_metric_families
from pydantic import ValidationError
from serving import MODEL, PATIENCE, Calls, Gate, assert_is_error, client_of, events_of, new_engine, serving
from starlette.testclient import TestClient
from typer.testing import CliRunner

from flex_nano_vllm import SamplingParams, server
from flex_nano_vllm import server_guard as guard
from flex_nano_vllm import server_protocol as protocol
from flex_nano_vllm.server_guard import Guard, Limits
from flex_nano_vllm.server_protocol import ChatCompletionRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest

KEY = "the-key-that-nobody-logs"
COMPLETIONS, CHATS = "/v1/completions", "/v1/chat/completions"
SMALL = dict(model=MODEL, prompt="hi", max_tokens=2, temperature=0)
CHAT = dict(model=MODEL, messages=[{"role": "user", "content": "hi"}], max_tokens=2, temperature=0)


@pytest.fixture(scope="module")
def oracle():
    with new_engine() as engine:
        yield engine


@pytest.fixture(scope="module")
def running():
    with new_engine() as engine, serving(engine) as served:
        yield served


@pytest.fixture
def served(running):
    """A server that tests share. After each test, no request, page or mailbox is left."""
    yield running
    running.wait_until_idle()
    running.between_steps(lambda: assert_empty(running.engine))
    assert running.shared.num_waiting == 0 and not running.shared._mailboxes


@pytest.fixture(scope="module")
def locked():
    with new_engine() as engine, serving(engine, api_key=KEY) as served:
        yield served


def params_of(request):
    names = {**request, **request.get("extra_body", {})}
    names.pop("extra_body", None)
    if "logit_bias" in names:
        names["logit_bias"] = {int(token_id): bias for token_id, bias in names["logit_bias"].items()}
    return SamplingParams(**names)


# --- responses ---------------------------------------------------------------------------------------------------

REQUESTS = [
    dict(max_tokens=9, temperature=0),
    dict(max_tokens=7, seed=5),
    dict(max_tokens=5, seed=1, n=3, temperature=1.3),
    dict(max_tokens=24, seed=2, stop=["a", "x", "e"]),
    dict(max_tokens=6, temperature=0, presence_penalty=1.5, frequency_penalty=0.5, logit_bias={"70": 3.0}),
    dict(max_tokens=8, seed=3, extra_body=dict(top_k=5, min_p=0.05, repetition_penalty=1.3, min_tokens=4)),
    dict(max_tokens=4, seed=3, top_p=0.5, extra_body=dict(allowed_token_ids=[70, 71, 72], ignore_eos=True)),
]


@pytest.mark.parametrize("request_", REQUESTS)
def test_a_completion_equals_the_output_of_the_engine_streamed_or_not(served, oracle, request_):
    expected = oracle.generate(["hello"], params_of(request_), use_tqdm=False)[0]
    client = client_of(served)
    whole = client.completions.create(model=MODEL, prompt="hello", **request_)
    assert (whole.object, whole.model, whole.id[:5]) == ("text_completion", MODEL, "cmpl-")
    assert [(c.index, c.text, c.finish_reason, c.stop_reason) for c in whole.choices] == [
        (c.index, c.text, c.finish_reason, c.stop_reason) for c in expected.outputs
    ]
    assert whole.usage.prompt_tokens == len(expected.prompt_token_ids)
    assert whole.usage.completion_tokens == sum(len(c.token_ids) for c in expected.outputs)
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens

    stream = client.completions.create(
        model=MODEL, prompt="hello", stream=True, stream_options={"include_usage": True}, **request_
    )
    *chunks, last = list(stream)
    assert {chunk.id for chunk in chunks} == {last.id} and last.id != whole.id
    assert all(chunk.usage is None and len(chunk.choices) == 1 for chunk in chunks)
    for completion in expected.outputs:
        own = [chunk.choices[0] for chunk in chunks if chunk.choices[0].index == completion.index]
        assert "".join(choice.text for choice in own) == completion.text
        assert [choice.finish_reason for choice in own] == [None] * (len(own) - 1) + [completion.finish_reason]
    assert last.choices == []
    counted = ("prompt_tokens", "completion_tokens", "total_tokens")
    assert [getattr(last.usage, name) for name in counted] == [getattr(whole.usage, name) for name in counted]


@pytest.mark.parametrize("request_", [REQUESTS[0], REQUESTS[2], REQUESTS[3]])
def test_a_chat_completion_equals_the_output_of_the_engine_streamed_or_not(served, oracle, request_):
    messages = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": "hi"}]},
    ]
    (expected,) = oracle.chat(messages, params_of(request_), use_tqdm=False)
    client = client_of(served)
    whole = client.chat.completions.create(model=MODEL, messages=messages, **request_)
    assert (whole.object, whole.id[:9]) == ("chat.completion", "chatcmpl-")
    assert [(c.index, c.message.content, c.message.role, c.finish_reason) for c in whole.choices] == [
        (c.index, c.text, "assistant", c.finish_reason) for c in expected.outputs
    ]
    assert whole.usage.prompt_tokens == len(expected.prompt_token_ids)
    *chunks, last = list(
        client.chat.completions.create(
            model=MODEL, messages=messages, stream=True, stream_options={"include_usage": True}, **request_
        )
    )
    assert all(chunk.object == "chat.completion.chunk" for chunk in [*chunks, last])
    for completion in expected.outputs:
        own = [chunk.choices[0] for chunk in chunks if chunk.choices[0].index == completion.index]
        assert own[0].delta.role == "assistant" and all(choice.delta.role is None for choice in own[1:])
        assert "".join(choice.delta.content or "" for choice in own) == completion.text
        assert [choice.finish_reason for choice in own] == [None] * (len(own) - 1) + [completion.finish_reason]
    assert last.choices == [] and last.usage.completion_tokens == whole.usage.completion_tokens


def test_max_completion_tokens_limits_a_chat_and_by_default_a_chat_may_fill_the_context(served):
    client, messages = client_of(served), CHAT["messages"]
    ask = client.chat.completions.create
    assert ask(model=MODEL, messages=messages, temperature=0, max_completion_tokens=3).usage.completion_tokens == 3
    free = ask(model=MODEL, messages=messages, temperature=0, extra_body={"ignore_eos": True})
    assert free.usage.total_tokens == served.engine.max_seq_length
    assert ask(model=MODEL, messages=messages, temperature=0, max_tokens=10**12).choices[0].finish_reason == "length"


def test_many_concurrent_clients_get_their_own_outputs(served, oracle):
    prompts = [f"prompt number {i}" for i in range(8)]
    expected = [output.outputs[0].text for output in oracle.generate(prompts, greedy(6), use_tqdm=False)]

    async def main():
        async with openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key="x", max_retries=0) as client:

            async def ask(prompt, stream):
                answer = await client.completions.create(
                    model=MODEL,
                    prompt=prompt,
                    max_tokens=6,
                    temperature=0,
                    stream=stream,
                    extra_body={"ignore_eos": True},
                )
                return "".join([c.choices[0].text async for c in answer]) if stream else answer.choices[0].text

            return await asyncio.gather(*(ask(prompt, stream) for prompt in prompts for stream in (False, True)))

    texts = asyncio.run(main())
    assert texts[::2] == texts[1::2] == expected


@pytest.mark.parametrize("prompt", [["ab", "hello"], [[70, 71], [72]], [70, 71, 72]], ids=["texts", "lists", "tokens"])
def test_choices_are_numbered_prompt_by_prompt_and_sample_by_sample(served, oracle, prompt):
    params = SamplingParams(n=2, seed=4, max_tokens=4)
    outputs = oracle.generate(prompt, params, use_tqdm=False)
    expected = [completion.text for output in outputs for completion in output.outputs]
    client = client_of(served)
    whole = client.completions.create(model=MODEL, prompt=prompt, n=2, seed=4, max_tokens=4)
    assert [(choice.index, choice.text) for choice in whole.choices] == list(enumerate(expected))
    assert whole.usage.prompt_tokens == sum(len(output.prompt_token_ids) for output in outputs)
    texts = [""] * len(expected)
    for chunk in client.completions.create(model=MODEL, prompt=prompt, n=2, seed=4, max_tokens=4, stream=True):
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == expected


def joined_logprobs(chunks, index=0):
    lists = {}
    for chunk in chunks:
        choice = chunk.choices[0]
        if choice.index == index:
            for name, values in choice.logprobs.to_dict().items():
                lists.setdefault(name, []).extend(values)
    return lists


@pytest.mark.parametrize("prompt", ["hello", [70, 71, 72]], ids=["text", "tokens"])
@pytest.mark.parametrize("echo", [False, True])
def test_logprobs_of_a_completion_equal_those_of_the_engine(served, oracle, prompt, echo):
    params = SamplingParams(seed=3, max_tokens=5, logprobs=2, prompt_logprobs=2 if echo else None)
    output = oracle.generate([prompt], params, use_tqdm=False)[0]
    (completion,) = output.outputs
    rated, token_ids = completion.logprobs, completion.token_ids
    prefix = ""
    if echo:
        rated, token_ids = output.prompt_logprobs + rated, output.prompt_token_ids + token_ids
        prefix = "hello" if prompt == "hello" else oracle.tokenizer.decode(prompt)
    client = client_of(served)
    request = dict(model=MODEL, prompt=prompt, seed=3, max_tokens=5, logprobs=2, echo=echo)
    choice = client.completions.create(**request).choices[0]
    assert choice.text == prefix + completion.text
    logprobs = choice.logprobs
    assert len(logprobs.tokens) == len(token_ids)
    for token_id, entry, token, value, top in zip(
        token_ids, rated, logprobs.tokens, logprobs.token_logprobs, logprobs.top_logprobs
    ):
        if entry is None:
            assert value is None and top is None
            continue
        assert token == entry[token_id].decoded_token
        assert value == pytest.approx(entry[token_id].logprob)
        assert top == pytest.approx({other.decoded_token: other.logprob for other in entry.values()})
        assert len(top) in (2, 3)
    assert logprobs.text_offset == sorted(logprobs.text_offset)
    for offset, token in zip(logprobs.text_offset, logprobs.tokens):
        has_text = not token.startswith(("bytes:", "<bos>", "<eos>", "<pad>"))
        assert not has_text or choice.text.startswith(token, offset)

    chunks = list(client.completions.create(**request, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == choice.text
    streamed = joined_logprobs(chunks)
    assert streamed["tokens"] == logprobs.tokens and streamed["text_offset"] == logprobs.text_offset
    assert [v for v in streamed["token_logprobs"] if v is not None] == pytest.approx(
        [v for v in logprobs.token_logprobs if v is not None]
    )
    assert [top and set(top) for top in streamed["top_logprobs"]] == [top and set(top) for top in logprobs.top_logprobs]


def test_echo_without_logprobs_puts_the_prompt_once_before_each_choice(served, oracle):
    expected = oracle.generate(["hello"], SamplingParams(n=2, seed=4, max_tokens=4), use_tqdm=False)[0].outputs
    client = client_of(served)
    request = dict(model=MODEL, prompt="hello", n=2, seed=4, max_tokens=4, echo=True)
    assert [c.text for c in client.completions.create(**request).choices] == ["hello" + c.text for c in expected]
    texts = ["", ""]
    for chunk in client.completions.create(**request, stream=True):
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == ["hello" + c.text for c in expected]


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs_of_a_chat_equal_those_of_the_engine(served, oracle, stream):
    (expected,) = oracle.chat(CHAT["messages"], SamplingParams(seed=3, max_tokens=5, logprobs=3), use_tqdm=False)
    (completion,) = expected.outputs
    answer = client_of(served).chat.completions.create(
        model=MODEL, messages=CHAT["messages"], seed=3, max_tokens=5, logprobs=True, top_logprobs=3, stream=stream
    )
    choices = [chunk.choices[0] for chunk in answer] if stream else [answer.choices[0]]
    content = [entry for choice in choices if choice.logprobs for entry in choice.logprobs.content]
    assert len(content) == len(completion.token_ids) == 5
    for entry, token_id, rated in zip(content, completion.token_ids, completion.logprobs):
        assert (entry.token, bytes(entry.bytes)) == (rated[token_id].decoded_token, rated[token_id].token_bytes)
        assert entry.logprob == pytest.approx(rated[token_id].logprob)
        best = sorted((other for other in rated.values() if other.rank <= 3), key=lambda other: other.rank)
        assert [top.token for top in entry.top_logprobs] == [other.decoded_token for other in best]


def test_chat_logprobs_without_top_logprobs_have_empty_top_lists(served):
    answer = client_of(served).chat.completions.create(
        model=MODEL, messages=CHAT["messages"], seed=3, max_tokens=2, logprobs=True
    )
    assert [entry.top_logprobs for entry in answer.choices[0].logprobs.content] == [[], []]


SCHEMA = {
    "type": "object",
    "properties": {"a": {"enum": [1, 22]}, "b": {"enum": ["x", "yy"]}},
    "required": ["a", "b"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("response_format", "fits"),
    [
        ({"type": "json_object"}, lambda text: isinstance(json.loads(text), dict)),
        (
            {"type": "json_schema", "json_schema": {"name": "pair", "schema": SCHEMA, "strict": True}},
            lambda text: json.loads(text)["a"] in (1, 22) and json.loads(text)["b"] in ("x", "yy"),
        ),
        ({"type": "regex", "regex": "[a-c]{3}-[0-9]{2}"}, lambda text: re.fullmatch("[a-c]{3}-[0-9]{2}", text)),
    ],
    ids=["json_object", "json_schema", "regex"],
)
def test_a_structured_output_matches_its_response_format(served, response_format, fits, stream):
    token_id = served.engine.tokenizer.convert_tokens_to_ids("}")
    spaces = [served.engine.tokenizer.convert_tokens_to_ids(token) for token in "ĠĊĉč"]
    bias = {str(token_id): 100.0} | {str(space): -100.0 for space in spaces}
    request = CHAT | dict(max_tokens=50, seed=1, temperature=1, logit_bias=bias, response_format=response_format)
    answer = client_of(served).chat.completions.create(**request, stream=stream)
    choices = [chunk.choices[0] for chunk in answer] if stream else [answer.choices[0]]
    assert choices[-1].finish_reason == "stop"
    text = "".join(choice.delta.content or "" for choice in choices) if stream else choices[0].message.content
    assert fits(text), text


def test_without_llguidance_structured_outputs_are_rejected_and_other_requests_work(monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with new_engine() as engine, serving(engine) as served:
        status, _, body = served.ask("POST", COMPLETIONS, SMALL | {"response_format": {"type": "json_object"}})
        error = assert_is_error(status, body)
        assert (status, error["param"]) == (400, "response_format") and "llguidance" in error["message"]
        assert served.ask("POST", COMPLETIONS, SMALL)[0] == 200


def test_events_available_at_the_same_time_are_sent_together(served):
    """The role is sent with the first delta of a chat, the usage and [DONE] with the last delta."""
    body = json.dumps(CHAT | dict(max_tokens=2, stream=True, ignore_eos=True, stream_options={"include_usage": True}))
    head = f"POST {CHATS} HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nConnection: close\r\n"
    answer = served.raw(f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode())
    *chunks, end = answer.partition(b"\r\n\r\n")[2].split(b"\r\n")[1::2]
    assert end == b"" and [chunk.count(b"data: ") for chunk in chunks] in ([1, 3], [2, 3], [4], [5])


def test_echo_with_more_logprobs_than_a_response_may_contain_is_rejected(served, monkeypatch):
    monkeypatch.setattr(protocol, "MAX_ECHOED", 2 * 6 * 3)
    request = SMALL | dict(prompt=[[5, 6, 7, 8, 9, 10]] * 2, echo=True, logprobs=2)
    for stream in (False, True):
        assert served.ask("POST", COMPLETIONS, request | dict(stream=stream))[0] == 200
        status, _, body = served.ask("POST", COMPLETIONS, request | dict(logprobs=3, stream=stream))
        error = assert_is_error(status, body)
        assert (status, error["param"]) == (400, "logprobs") and "48 log-probabilities" in error["message"]
    served.wait_until_idle()
    served.between_steps(lambda: assert_empty(served.engine))


def test_an_event_stream_ends_with_done_and_is_not_cached(served):
    status, headers, body = served.ask("POST", COMPLETIONS, SMALL | {"stream": True})
    assert status == 200 and headers["content-type"].startswith("text/event-stream")
    assert headers["cache-control"] == "no-cache"
    *chunks, done = events_of(body)
    assert done == "[DONE]" and 0 < len(chunks) <= 2


# --- errors ------------------------------------------------------------------------------------------------------


def test_errors_raise_the_matching_exceptions_in_openais_client(served, locked):
    client = client_of(served)
    with pytest.raises(openai.BadRequestError, match="temperature") as error:
        client.completions.create(model=MODEL, prompt="a", temperature=3)
    assert error.value.param == "temperature"
    with pytest.raises(openai.NotFoundError) as error:
        client.completions.create(model="gpt-99", prompt="a")
    assert (error.value.code, error.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.NotFoundError):
        client.embeddings.create(model=MODEL, input="a")
    with pytest.raises(openai.AuthenticationError) as error:
        client_of(locked, "wrong").models.list()
    assert error.value.code == "invalid_api_key"
    (model,) = client_of(locked, KEY).models.list().data
    assert model.id == MODEL and model.max_model_len == 64


LONG = "z" * 50_000
FIELDS = [
    *[dict(prompt=p) for p in ("", [], [[]], None, ["a", ""], [259], [-1], [2**40], [True], [1.5], [1, "a"], ["a", 1])],
    *[dict(prompt=p) for p in ({"prompt": "a"}, ["a"] * 65, "x" * 64, "x" * 100_000, "\ud800", [[70], []], 5)],
    *[dict(max_tokens=m) for m in (-1, "5", 1.5, True)],
    *[dict(temperature=t) for t in (-1, 3, "1", math.nan, math.inf, -math.inf, True)],
    *[dict(top_p=p) for p in (0, 1.0001, math.nan, -1)],
    *[dict(top_k=k) for k in (-2, 1.5, "3")],
    *[dict(min_p=p) for p in (-0.1, 1.1)],
    *[dict(n=n) for n in (0, -1, 17, 10**9, True)],
    *[dict(logprobs=n) for n in (-2, 21, 10**6, True)],
    *[dict(stop=s) for s in ("", [""], ["x"] * 1000, "x" * 1_000_000, 5, [5])],
    *[
        dict(logit_bias=b)
        for b in ({"259": 1}, {"-1": 1}, {"a": 1}, {"70": 101}, {"70": "1"}, {LONG: 1}, {"9" * 4000: 1})
    ],
    *[dict(logit_bias=b) for b in ({"\ud800": 1}, {LONG: "a"}, [1], {"70": math.nan})],
    *[dict(stop_token_ids=i) for i in ([259], [-1], ["a"], [1] * 65)],
    *[dict(allowed_token_ids=i) for i in ([], [259], [-1], [True])],
    *[dict(seed=s) for s in (-(2**63) - 1, 2**63, 1.5, "1")],
    *[dict(min_tokens=m) for m in (-1, 3, 10**4000)],
    *[dict(presence_penalty=3), dict(frequency_penalty=-3), dict(repetition_penalty=0), dict(repetition_penalty=11)],
    *[dict(best_of=2), dict(suffix="x"), dict(stream="yes"), dict(stream_options={"include_usage": True})],
    *[dict(cache_salt=""), dict(cache_salt="\ud800"), dict(cache_salt=5), dict(echo=1)],
    *[dict(stop="\ud800"), dict(stop=["a", "\ud800"]), dict(user="\ud800"), dict(add_special_tokens=False)],
    *[dict(length_penalty=2), dict(return_tokens_as_token_ids=True), dict(prompt_embeds="AAAA")],
    *[dict(response_format={"type": t}) for t in ("xml", LONG, "json_schema", "regex", None)],
    *[dict(response_format=f) for f in ("json", {"type": "regex", "regex": "("}, {"type": "regex", "regex": "\ud800"})],
    dict(response_format={"type": "regex", "regex": "(" + "a" * 3000}),
    *[
        dict(response_format={"type": "json_schema", "json_schema": {"schema": schema}})
        for schema in (False, {"type": LONG}, {"type": "nothing"}, {"$ref": "#/nowhere"}, {"const": math.nan}, "text")
    ],
    dict(response_format={"type": "json_schema", "json_schema": {"schema": {"const": "\ud800"}}}),
    dict(response_format={"type": "json_schema", "json_schema": {"schema": {"not": {"type": LONG[:20_000]}}}}),
    dict(model=None),
    dict(model=5),
    dict(prompt=["a"] * 64, n=16, temperature=1),
    dict(logit_bias={str(i): 0.0 for i in range(1025)}),
    *[{name: "x"} for name in ("structured_outputs", "guided_json", "guided_regex", "guided_choice", "guided_grammar")],
    *[dict(prompt_logprobs=1), dict(truncate_prompt_tokens=5), dict(use_beam_search=True), dict(bad_words=["a"])],
]
MESSAGES = [
    *[[], None, "hi", [None], ["hi"], [{}], [{"role": "user"}], [{"role": "nobody", "content": "x"}]],
    *[[{"role": "user", "content": content}] for content in (None, 5, "\ud800", {"text": "a"}, [5], [{"text": "a"}])],
    [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://127.0.0.1/"}}]}],
    [{"role": "user", "content": [{"type": LONG, "text": "a"}]}],
    [{"role": LONG, "content": "a"}],
    [{"role": "critic", "content": "a"}],
    [{"role": "user", "content": LONG}],
]
CHAT_FIELDS = [
    *[dict(messages=messages) for messages in MESSAGES],
    *[dict(tools=[{"type": "function"}]), dict(tool_choice="required"), dict(functions=[{}]), dict(function_call={})],
    *[
        dict(modalities=["text", "audio"]),
        dict(audio={"voice": "x"}),
        dict(prediction={}),
        dict(reasoning_effort="enormous"),
    ],
    *[dict(chat_template="{{ 1 }}"), dict(chat_template_kwargs={"a": 1}), dict(web_search_options={})],
    *[dict(logprobs=3), dict(top_logprobs=3), dict(logprobs=True, top_logprobs=21), dict(max_completion_tokens=0)],
]


def json_of(fields):
    return json.dumps(fields)  # writes NaN and Infinity, which JSON does not have


@pytest.mark.parametrize(
    ("path", "fields"),
    [(COMPLETIONS, fields) for fields in FIELDS] + [(CHATS, fields) for fields in CHAT_FIELDS],
    ids=lambda value: value[-11:] if isinstance(value, str) else str(value)[:40],
)
def test_an_invalid_field_is_rejected_with_400_and_never_reaches_the_engine(served, path, fields):
    request = (SMALL if path == COMPLETIONS else CHAT) | fields
    before = served.engine.stats().num_steps
    status, _, body = served.ask("POST", path, json_of(request))
    assert status == 400, body
    error = assert_is_error(status, body)
    assert error["param"] in (None, *fields)
    assert served.engine.stats().num_steps == before, "the engine has run a step"
    request["stream"] = fields.get("stream", True)
    if "stream_options" not in fields:
        assert served.ask("POST", path, json_of(request))[0] == 400  # not a stream that contains an error


@pytest.mark.parametrize(
    "fields",
    [
        *[dict(stop=[]), dict(stop=None), dict(temperature=1e-9), dict(top_k=10**30), dict(max_tokens=10**12)],
        *[dict(seed=-1), dict(n=2), dict(max_tokens=0)],
        *[dict(logprobs=0), dict(seed=2**63 - 1, temperature=1), dict(n=16, temperature=1), dict(prompt=["a"] * 64)],
        *[dict(prompt=p) for p in ("\x00", "😀", "שלום", "x" * 62, "<eos>", "\ue000", "a\u2028b\x85c")],
        *[dict(best_of=1), dict(suffix=None), dict(unknown=LONG), dict(user="me"), dict(metadata={"a": "b"})],
        *[dict(stream=True, stream_options={"include_usage": False}), dict(stop_token_ids=[70] * 64)],
        dict(response_format={"type": "text"}),
    ],
    ids=lambda fields: str(fields)[:40],
)
def test_unusual_but_valid_fields_are_accepted(served, fields):
    status, _, body = served.ask("POST", COMPLETIONS, SMALL | fields)
    assert status == 200, body
    if fields.get("stream"):
        assert events_of(body)[-1] == "[DONE]"


@pytest.mark.parametrize(
    ("path", "request_"),
    [
        (COMPLETIONS, SMALL | dict(prompt="a" * 2049)),
        (COMPLETIONS, SMALL | dict(prompt=["a", "a" * 2049])),
        (CHATS, CHAT | dict(messages=[{"role": "user", "content": "a" * 1100}] * 2)),
        (CHATS, CHAT | dict(messages=[{"role": "user", "content": [{"type": "text", "text": "a" * 1100}] * 2}])),
        ("/tokenize", dict(prompt="a" * 2049)),
    ],
)
def test_a_text_above_the_character_limit_is_rejected_without_being_tokenized(served, monkeypatch, path, request_):
    """The limit is 32 characters for each of the 64 tokens of the context."""

    def fail(*args, **kwargs):
        raise AssertionError("tokenized")

    monkeypatch.setattr(served.engine.input_processor, "token_ids", fail)
    monkeypatch.setattr(served.engine.input_processor, "chat_prompt", fail)
    status, _, body = served.ask("POST", path, request_)
    assert status == 400 and b"characters exceeds the limit of 2048" in body


def test_the_error_for_a_prompt_of_another_type_lists_the_valid_forms(served):
    for prompt in (5, {}, [], [None], [["a"]]):
        status, _, body = served.ask("POST", COMPLETIONS, SMALL | dict(prompt=prompt))
        assert status == 400 and b"prompt must be a text or a list of token ids" in body, prompt
    status, _, body = served.ask("POST", "/tokenize", dict(prompt=["a"]))
    assert status == 400 and b"prompt: Input should be a valid string" in body


NUMBERS = ["NaN", "Infinity", "-Infinity", "1e400", "-1e400"]
RAW = {
    "empty": b"",
    "a list": b"[]",
    "null": b"null",
    "a number": b"1",
    "a text": b'"x"',
    "a truncated object": b'{"model": "m", "prompt',
    "not JSON": b"model=tiny&prompt=x",
    "invalid UTF-8": b'{"model": "tiny-random", "prompt": "\xff"}',
    "truncated UTF-16": b"\xff\xfe{",
    "100,000 brackets": b"[" * 100_000,
    "100,000 objects": b'{"a":' * 100_000,
    "a deeply nested prompt": b'{"model": "tiny-random", "prompt": ' + b"[" * 900 + b"1" + b"]" * 900 + b"}",
    "5,000 digits": b'{"model": "tiny-random", "prompt": "a", "max_tokens": ' + b"9" * 5000 + b"}",
    "two values": b'{"model": "tiny-random", "prompt": "a"} {}',
}


@pytest.mark.parametrize("path", [COMPLETIONS, CHATS, "/tokenize", "/detokenize"])
@pytest.mark.parametrize("name", RAW)
def test_a_body_that_is_not_a_request_is_rejected_with_400(served, path, name):
    status, _, body = served.ask("POST", path, RAW[name], {"Content-Type": "application/json"})
    assert status == 400, body
    error = assert_is_error(status, body)
    assert error["param"] is None or error["param"].isidentifier()


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize("field", ["temperature", "top_p", "min_p", "max_tokens", "seed", "n", "top_k", "prompt"])
def test_a_number_that_is_not_finite_is_rejected_with_400(served, field, number):
    body = f'{{"model": "{MODEL}", "prompt": "a", "{field}": {number}}}'
    status, _, body = served.ask("POST", COMPLETIONS, body)
    assert status == 400 and assert_is_error(status, body)["param"] == field


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        *[(CompletionRequest, {"prompt": [item] * 1000}) for item in (True, 1.5, -1, "", [], None)],
        *[
            (CompletionRequest, {"prompt": "a", name: [True] * 1000})
            for name in ("allowed_token_ids", "stop_token_ids")
        ],
        *[(ChatCompletionRequest, {"messages": [item] * 1000}) for item in (1, {})],
        (ChatCompletionRequest, {"messages": [{"role": "user", "content": [{}] * 1000}]}),
        (CompletionRequest, {"prompt": "a", "logit_bias": {str(i): [] for i in range(5000)}}),
        (ChatCompletionRequest, {"messages": [{"role": "user", "content": "a"}] * 5000}),
        (ChatCompletionRequest, {"messages": [{"role": "user", "content": [{"type": "text"}] * 5000}]}),
        (TokenizeRequest, {"messages": [{}] * 1000}),
        (DetokenizeRequest, {"tokens": [-1] * 1000}),
    ],
)
def test_validation_stops_at_the_first_of_many_errors(kind, fields):
    """A body can contain a million errors. Listing all of them took seconds, in which no other request was served."""
    with pytest.raises(ValidationError) as error:
        kind.model_validate({"model": MODEL} | fields)
    assert error.value.error_count() <= 70  # empty texts are valid items; only the limit of 64 items is an error


def test_a_repeated_field_has_its_last_value(served):
    """The same as in Python's json module. No other parser reads the body first, so none can see another value."""
    body = b'{"model": "nobody", "model": "tiny-random", "prompt": "a", "max_tokens": 0, "max_tokens": 1}'
    assert served.ask("POST", COMPLETIONS, body)[0] == 200


@pytest.mark.parametrize("content_type", ["text/plain", "multipart/form-data", "application/x-www-form-urlencoded", ""])
def test_another_content_type_is_rejected(served, content_type):
    status, _, body = served.ask("POST", COMPLETIONS, SMALL, {"Content-Type": content_type})
    assert 400 <= status < 500
    assert_is_error(status, body)


@pytest.mark.parametrize(
    ("method", "path", "expected"),
    [
        *[("GET", "/nothing", 404), ("GET", "//v1/models", 404), ("GET", "/V1/models", 404), ("GET", "/docs", 404)],
        *[("GET", COMPLETIONS, 405), ("DELETE", "/v1/models", 405), ("OPTIONS", COMPLETIONS, 405), ("PUT", "/", 405)],
        *[("POST", "/metrics", 405), ("GET", "/%00", 404), ("GET", "/v1/models/../../etc/passwd", 404)],
    ],
)
def test_a_wrong_path_or_method_returns_an_error_in_openais_format(served, method, path, expected):
    status, headers, body = served.ask(method, path)
    assert status == expected
    assert_is_error(status, body)
    assert ("allow" in headers) == (expected == 405)


def send_in_parts(served, headers, parts):
    """Send a body part by part. Returns the status, the response body, and the memory growth in bytes."""
    process = psutil.Process()
    before = most = process.memory_info().rss
    connection = served.connection()
    connection.putrequest("POST", COMPLETIONS)
    for name, value in headers.items():
        connection.putheader(name, value)
    connection.endheaders()
    for part in parts:
        connection.send(part)
        most = max(most, process.memory_info().rss)
    response = connection.getresponse()
    body = response.read()
    connection.close()
    return response.status, body, most - before


@pytest.mark.parametrize("is_chunked", [False, True])
def test_a_body_of_60_mib_is_rejected_and_not_kept_in_memory(served, is_chunked):
    part = b" " * 2**20
    if is_chunked:
        headers = {"Transfer-Encoding": "chunked"}
        parts = [f"{len(part):x}\r\n".encode() + part + b"\r\n"] * 60 + [b"0\r\n\r\n"]
    else:
        headers, parts = {"Content-Length": str(60 * 2**20)}, [part] * 60
    status, body, growth = send_in_parts(served, {"Content-Type": "application/json"} | headers, parts)
    assert status == 413
    assert assert_is_error(status, body)["code"] == "body_too_large"
    assert growth < 20 * 2**20


def test_a_body_of_exactly_the_limit_is_accepted_and_one_byte_more_is_rejected(served):
    request = json_of(SMALL).encode()
    most = Limits().max_body_bytes
    assert served.ask("POST", COMPLETIONS, request + b" " * (most - len(request)))[0] == 200
    assert served.ask("POST", COMPLETIONS, request + b" " * (most - len(request) + 1))[0] == 413


@pytest.mark.parametrize(
    "request_", [b"nonsense\r\n\r\n", b"GET / HTTP/1.1\r\n\r\n", b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n"]
)
def test_invalid_http_is_rejected(served, request_):
    assert served.raw(request_).startswith(b"HTTP/1.1 400")


@pytest.mark.parametrize(
    "headers",
    [b"X-Big: " + b"x" * 2**20 + b"\r\n", b"".join(b"X-%d: x\r\n" % i for i in range(20_000))],
    ids=["1 MB", "20,000"],
)
def test_headers_that_are_too_large_are_rejected(served, headers):
    answer = served.raw(b"GET /health HTTP/1.1\r\nHost: x\r\n" + headers + b"\r\n")
    assert answer == b"" or answer.startswith((b"HTTP/1.1 400", b"HTTP/1.1 431"))
    assert served.ask("GET", "/health")[0] == 200


@pytest.mark.parametrize("length", [b"-1", b"1e3", b"abc", b"5, 6"])
def test_an_invalid_content_length_is_rejected(served, length):
    answer = served.raw(
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: "
        + length
        + b"\r\n\r\n{}"
    )
    assert answer.startswith(b"HTTP/1.1 4")


def test_more_messages_than_context_tokens_are_rejected_before_tokenization(served, monkeypatch):
    monkeypatch.setattr(served.engine.input_processor, "chat_prompt", None)
    status, _, body = served.ask("POST", CHATS, CHAT | {"messages": [{"role": "user", "content": ""}] * 65})
    assert status == 400 and "65 messages" in assert_is_error(status, body)["message"]


def test_more_samples_than_the_queue_can_hold_are_rejected_with_400():
    with new_engine() as engine, serving(engine, max_waiting=2) as served:
        status, _, body = served.ask("POST", COMPLETIONS, SMALL | dict(n=3, temperature=1))
        assert status == 400 and "3 sequences" in assert_is_error(status, body)["message"]


@pytest.mark.parametrize("sent", [b"", b"GET /health HTTP/1.1\r\nHost: a\r\n", b"GET"], ids=["nothing", "most", "some"])
def test_a_connection_that_does_not_send_a_complete_head_in_time_is_closed(monkeypatch, sent):
    monkeypatch.setattr(guard, "HEAD_TIMEOUT", 0.05)
    with new_engine() as engine, serving(engine, keep_alive=0.05) as served:
        assert served.raw(sent) == b""
        whole = b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n"
        answer = served.raw(whole + sent)  # the second request on a connection that has had a response
    assert answer.startswith(b"HTTP/1.1 200") and answer.endswith(b'{"status":"ok"}')


def test_the_head_timeout_does_not_limit_a_complete_request(monkeypatch):
    monkeypatch.setattr(guard, "HEAD_TIMEOUT", 0.05)
    with new_engine() as engine, serving(engine) as served:
        gate = Gate(engine)
        connection = served.begin(COMPLETIONS, SMALL)
        gate.wait()
        assert served.raw(b"GET") == b""  # waits for the head timeout of another connection
        gate.open()
        assert connection.getresponse().status == 200


# --- the API key -------------------------------------------------------------------------------------------------

LOCKED = [
    *[("GET", path) for path in ("/v1/models", "/metrics", "/state", "/version", "/openapi.json", "/docs", "/nothing")],
    *[("POST", path) for path in (COMPLETIONS, CHATS, "/tokenize", "/detokenize")],
    *[("OPTIONS", COMPLETIONS), ("OPTIONS", "/v1/models"), ("HEAD", "/v1/models"), ("TRACE", "/metrics")],
    *[
        ("GET", path)
        for path in ("//v1/models", "/V1/models", "/v1/%6dodels", "/v1/models/", "//", "/health/", "//health")
    ],
    *[
        ("GET", path)
        for path in ("/health/../v1/models", "/%2e%2e/metrics", "/metrics?x=/health", "/metrics%3F/health")
    ],
]
WRONG = [
    {},
    {"Authorization": "Bearer wrong"},
    {"Authorization": KEY},
    {"Authorization": f"Basic {KEY}"},
    {"Authorization": "Bearer"},
    {"Authorization": "Bearer "},
    {"Authorization": f"Bearer   {KEY}"},
    {"Authorization": f"Bearer {KEY}x"},
    {"Authorization": f"Bearer {KEY[:-1]}"},
    {"Authorization": f"Bearer {KEY.upper()}"},
    {"X-Api-Key": KEY},
    {"Host": "x/health?"},
    {"Host": "x/?"},
    {"X-Forwarded-Prefix": "/health", "X-Original-URL": "/health"},
]


@pytest.mark.parametrize("headers", WRONG, ids=str)
def test_without_the_api_key_every_path_except_two_returns_401(locked, headers):
    for method, path in LOCKED:
        status, _, body = locked.ask(method, path, SMALL if method == "POST" else None, headers)
        assert status == 401, (method, path)
        if method != "HEAD":
            assert_is_error(status, body)
    assert locked.engine.stats().num_steps == 0


def test_the_page_and_health_need_no_api_key(locked):
    for path in ("/", "/health", "/%68ealth"):
        assert locked.ask("GET", path)[0] == 200


def test_an_unusual_request_target_does_not_bypass_the_api_key(locked):
    for target in (b"http://x/health@/v1/models", b"http://x/health/../v1/models", b"/health;/../v1/models"):
        answer = locked.raw(b"GET " + target + b" HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        assert answer.startswith((b"HTTP/1.1 401", b"HTTP/1.1 400"))


@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "BEARER"])
def test_a_request_with_the_api_key_is_accepted(locked, scheme):
    assert locked.ask("GET", "/v1/models", headers={"Authorization": f"{scheme} {KEY}"})[0] == 200


def test_keys_are_compared_as_digests_in_constant_time(locked, monkeypatch):
    compared = []

    def compare_digest(a, b):
        compared.append((a, b))
        return a == b

    monkeypatch.setattr(guard.hmac, "compare_digest", compare_digest)
    assert locked.ask("GET", "/v1/models", headers={"Authorization": "Bearer x"})[0] == 401
    assert locked.ask("GET", "/v1/models", headers={"Authorization": f"Bearer {KEY}"})[0] == 200
    assert [(len(a), len(b), a == b) for a, b in compared] == [(32, 32, False), (32, 32, True)]


def test_an_empty_api_key_is_rejected(served):
    with pytest.raises(ValueError, match="empty"):
        server.create_app(served.shared, MODEL, api_key="")


def test_the_api_key_is_checked_before_the_size_of_the_body(locked):
    status, _, _ = locked.ask("POST", COMPLETIONS, b" " * 4 * 2**20)
    assert status == 401


# --- clients that disconnect, and slow clients -------------------------------------------------------------------


def hang_up(connection):
    connection.sock.shutdown(socket.SHUT_RDWR)
    connection.sock.close()


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("path", [COMPLETIONS, CHATS])
def test_a_disconnect_before_the_first_token_frees_the_pages_after_the_step(monkeypatch, path, stream):
    with new_engine() as engine, serving(engine) as served:
        gate, aborted = Gate(engine), Calls(monkeypatch, served.shared, "abort")
        request = (SMALL if path == COMPLETIONS else CHAT) | dict(max_tokens=40, stream=stream, ignore_eos=True)
        connection = served.begin(path, request)
        gate.wait()
        hang_up(connection)
        aborted.wait()
        gate.let_pass()
        served.between_steps(lambda: assert_empty(engine))
        assert engine.stats().num_steps == aborted.number == 1
        assert b'request_success_total{finished_reason="abort"} 1.0' in served.ask("GET", "/metrics")[2]
        gate.open()


def test_a_disconnect_in_the_middle_of_a_stream_frees_the_pages(monkeypatch, oracle):
    with new_engine() as engine, serving(engine) as served:
        gate, aborted = Gate(engine), Calls(monkeypatch, served.shared, "abort")
        leaving = served.begin(COMPLETIONS, SMALL | dict(max_tokens=40, stream=True, ignore_eos=True))
        gate.wait()
        added = Calls(monkeypatch, engine, "add")
        staying = served.begin(COMPLETIONS, SMALL | dict(prompt="stays", max_tokens=6, ignore_eos=True))
        gate.let_pass()
        gate.wait()
        if not added.number:
            gate.let_pass()
            added.wait()
        response = leaving.getresponse()
        assert response.readline().startswith(b"data: ")
        response.fp.raw._sock.shutdown(socket.SHUT_RDWR)
        response.close()
        aborted.wait()
        gate.open()
        body = json.loads(staying.getresponse().read())
        served.wait_until_idle()
        served.between_steps(lambda: assert_empty(engine))
        assert body["choices"][0]["text"] == oracle.generate(["stays"], greedy(6), use_tqdm=False)[0]["text"]
        assert aborted.number == 1
        assert engine.stats().num_generated_tokens <= 6 + 4


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_a_disconnect_while_waiting_removes_the_request_from_the_queue_before_the_next_step(
    monkeypatch, oracle, stream
):
    with new_engine(max_batch_size=1) as engine, serving(engine) as served:
        gate, aborted = Gate(engine), Calls(monkeypatch, served.shared, "abort")
        first = served.begin(COMPLETIONS, SMALL | dict(prompt="first", max_tokens=6, ignore_eos=True))
        gate.wait()
        handed_over = Calls(monkeypatch, served.shared, "_command")
        second = served.begin(COMPLETIONS, SMALL | dict(prompt="second", stream=stream))
        handed_over.wait()
        gate.let_pass()
        gate.wait()
        assert [s.prompt for s in engine.scheduler.waiting] == ["second"]
        hang_up(second)
        aborted.wait()
        gate.let_pass()
        gate.wait()
        assert not engine.scheduler.waiting and [s.prompt for s in engine.scheduler.running] == ["first"]
        gate.open()
        body = json.loads(first.getresponse().read())
        assert body["choices"][0]["text"] == oracle.generate(["first"], greedy(6), use_tqdm=False)[0]["text"]
        assert aborted.number == 1


def test_a_request_that_gets_its_response_is_not_aborted(served, monkeypatch):
    aborted = Calls(monkeypatch, served.shared, "abort")
    for path, request in ((COMPLETIONS, SMALL), (CHATS, CHAT)):
        for stream in (False, True):
            assert served.ask("POST", path, request | {"stream": stream})[0] == 200
    assert served.ask("POST", COMPLETIONS, SMALL | dict(prompt=["a", "b"], n=2, temperature=1, stream=True))[0] == 200
    assert aborted.number == 0


def test_a_client_that_does_not_read_its_stream_does_not_block_other_requests(oracle):
    sizes = dict(max_seq_length=400, n_pages=301)
    with new_engine(**sizes) as engine, serving(engine, send_buffer=4096) as served:
        slow = socket.socket()
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        slow.connect(("127.0.0.1", served.port))
        slow.settimeout(PATIENCE)
        request = json_of(SMALL | dict(max_tokens=150, ignore_eos=True, logprobs=20, stream=True)).encode()
        head = f"POST {COMPLETIONS} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nConnection: close\r\n"
        slow.sendall(f"{head}Content-Length: {len(request)}\r\n\r\n".encode() + request)
        answers = [served.ask("POST", COMPLETIONS, SMALL)[0] for _ in range(3)]
        assert answers == [200] * 3
        served.wait_until_idle()  # the request of the slow client has finished too
        parts = []
        while part := slow.recv(65536):
            parts.append(part)
        slow.close()
        data = re.findall(rb"data: (\{.*\})\n", b"".join(parts))
        chunks = [json.loads(chunk)["choices"][0] for chunk in data]
        assert b"data: [DONE]" in parts[-1] or b"data: [DONE]" in b"".join(parts)
        tokens = sum(len(chunk["logprobs"]["tokens"]) for chunk in chunks)
        assert tokens == 150 and len(chunks) < 150  # deltas that the client did not read in time are joined


# --- limits and failures -----------------------------------------------------------------------------------------


def test_a_request_that_exceeds_the_queue_gets_429_with_retry_after(monkeypatch):
    with new_engine(max_batch_size=1) as engine, serving(engine, max_waiting=1) as served:
        gate = Gate(engine)
        first = served.begin(COMPLETIONS, SMALL)
        gate.wait()
        handed_over = Calls(monkeypatch, served.shared, "_command")
        second = served.begin(COMPLETIONS, SMALL)
        handed_over.wait()
        for stream in (False, True):
            with pytest.raises(openai.RateLimitError) as error:
                client_of(served).completions.create(**SMALL, stream=stream)
            assert error.value.code == "queue_full"
            assert int(error.value.response.headers["retry-after"]) > 0
        gate.open()
        assert first.getresponse().status == second.getresponse().status == 200


def spoil(engine, prompt, num_good_tokens):
    forward = engine.runner.forward

    def spoiled(chunks):
        logits = forward(chunks)
        for row, chunk in zip(logits, chunks):
            if chunk.sequence.prompt == prompt and chunk.sequence.output_len >= num_good_tokens:
                row.fill_(math.nan)
        return logits

    engine.runner.forward = spoiled


def test_logits_that_are_not_finite_fail_only_their_requests(oracle):
    with new_engine() as engine, serving(engine) as served:
        spoil(engine, "bad", 2)
        bad = served.begin(COMPLETIONS, SMALL | dict(prompt="bad", max_tokens=6, ignore_eos=True))
        streamed = served.begin(COMPLETIONS, SMALL | dict(prompt="bad", max_tokens=6, ignore_eos=True, stream=True))
        good = served.begin(COMPLETIONS, SMALL | dict(prompt="good", max_tokens=6, ignore_eos=True))
        response = bad.getresponse()
        assert response.status == 500
        assert assert_is_error(500, response.read())["code"] == "engine_error"
        *chunks, error, done = events_of(streamed.getresponse().read())
        before = "".join(chunk["choices"][0]["text"] for chunk in chunks)  # a slow reader gets both tokens in one chunk
        (delta, *_) = oracle.stream("bad", greedy(6))
        assert before.startswith(delta.text) and 0 < len(chunks) <= 2 and done == "[DONE]"
        assert_is_error(500, json.dumps(error))
        text = json.loads(good.getresponse().read())["choices"][0]["text"]
        assert text == oracle.generate(["good"], greedy(6), use_tqdm=False)[0]["text"]
        assert served.ask("GET", "/health")[0] == 200
        assert b'request_success_total{finished_reason="error"} 2.0' in served.ask("GET", "/metrics")[2]
        served.wait_until_idle()
        served.between_steps(lambda: assert_empty(engine))


def test_a_failed_step_fails_its_requests_and_the_server_continues(monkeypatch, caplog):
    with new_engine() as engine, serving(engine) as served:
        for stream in (False, True):
            raise_at_call(monkeypatch, engine.runner, "forward", 2, OSError)
            status, _, body = served.ask("POST", COMPLETIONS, SMALL | {"stream": stream})
            monkeypatch.undo()
            if stream:
                *_, error, done = events_of(body)
                assert (status, done) == (200, "[DONE]")
                body = json.dumps(error)
            else:
                assert status == 500
            assert assert_is_error(500, body)["code"] == "engine_error" and "injected" not in str(body)
            assert served.ask("POST", COMPLETIONS, SMALL)[0] == served.ask("GET", "/health")[0] == 200
        served.between_steps(lambda: assert_empty(engine))


def test_openais_client_raises_an_error_that_is_sent_in_the_middle_of_a_stream():
    with new_engine() as engine, serving(engine) as served:
        spoil(engine, "bad", 2)
        stream = client_of(served).completions.create(**SMALL | dict(prompt="bad", max_tokens=6), stream=True)
        with pytest.raises(openai.APIError, match="not finite"):
            list(stream)


def test_when_the_engine_dies_streams_end_with_an_error_and_health_returns_503(monkeypatch):
    with new_engine(max_batch_size=1) as engine, serving(engine) as served:
        gate = Gate(engine)
        raise_at_call(monkeypatch, engine.runner, "forward", 2, KeyboardInterrupt)
        streamed = served.begin(COMPLETIONS, SMALL | dict(max_tokens=30, stream=True, ignore_eos=True))
        gate.wait()
        handed_over = Calls(monkeypatch, served.shared, "_command")
        whole = served.begin(COMPLETIONS, SMALL)
        handed_over.wait()
        gate.open()
        *chunks, error, done = events_of(streamed.getresponse().read())
        assert done == "[DONE]" and all("choices" in chunk for chunk in chunks)
        assert assert_is_error(503, json.dumps(error))["code"] == "engine_dead"
        response = whole.getresponse()
        assert response.status == 503
        assert_is_error(503, response.read())
        for method, path, body in (
            *[("GET", "/health", None), ("GET", "/state", None)],
            *[("POST", COMPLETIONS, SMALL), ("POST", COMPLETIONS, SMALL | {"stream": True}), ("POST", CHATS, CHAT)],
        ):
            status, headers, body = served.ask(method, path, body)
            assert (status, assert_is_error(status, body)["code"]) == (503, "engine_dead")
            assert "retry-after" in headers
        assert served.ask("GET", "/metrics")[0] == served.ask("GET", "/v1/models")[0] == 200
        engine.scheduler.reset()


def test_a_request_above_the_time_limit_is_aborted(monkeypatch):
    with new_engine() as engine, serving(engine, limits=Limits(request_timeout=0.2)) as served:
        gate, aborted = Gate(engine), Calls(monkeypatch, served.shared, "abort")
        status, _, body = served.ask("POST", COMPLETIONS, SMALL | dict(max_tokens=40))
        assert status == 503 and assert_is_error(status, body)["code"] == "timeout"
        aborted.wait()
        gate.let_pass()
        served.between_steps(lambda: assert_empty(engine))
        gate.wait()
        streamed = served.begin(COMPLETIONS, SMALL | dict(max_tokens=40, stream=True))
        gate.wait()
        aborted.wait()
        *_, error, end = streamed.getresponse().read().decode().strip().split("\n\n")
        assert json.loads(error.removeprefix("data: "))["error"]["code"] == "timeout" and end == "data: [DONE]"
        gate.open()


def test_a_timeout_does_not_wait_for_a_client_that_does_not_read(monkeypatch):
    monkeypatch.setattr(guard, "ERROR_EVENT_TIMEOUT", 0.01)

    async def stream(scope, receive, send):
        headers = [(b"content-type", b"text/event-stream; charset=utf-8")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await asyncio.Event().wait()

    async def nobody_reads(message):
        sent.append(message["type"])
        if message["type"] == "http.response.body":
            await asyncio.Event().wait()

    async def receive():
        return {"type": "http.request", "body": b"", "more_body": False}

    sent, scope = [], {"type": "http", "method": "GET", "path": "/", "headers": []}
    guarded = Guard(stream, None, Limits(request_timeout=0.01))
    asyncio.run(asyncio.wait_for(guarded(scope, receive, nobody_reads), PATIENCE))
    assert sent == ["http.response.start", "http.response.body"]


def test_a_request_with_an_incomplete_body_gets_503_at_the_time_limit():
    with new_engine() as engine, serving(engine, limits=Limits(request_timeout=0.2)) as served:
        answer = served.raw(
            b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            b"Content-Length: 100\r\nConnection: close\r\n\r\n{"
        )
        assert answer.startswith(b"HTTP/1.1 503")


# --- other endpoints, headers and logs ---------------------------------------------------------------------------


def families_of(served):
    status, headers, body = served.ask("GET", "/metrics")
    assert status == 200 and headers["content-type"].startswith("text/plain; version=0.0.4")
    return {family.name: family for family in text_string_to_metric_families(body.decode())}


def test_the_metrics_equal_the_counters_of_the_engine():
    with new_engine() as engine, serving(engine) as served:
        assert served.ask("POST", COMPLETIONS, SMALL | dict(n=2, temperature=1, seed=1, max_tokens=5))[0] == 200
        assert served.ask("POST", CHATS, CHAT | {"stream": True})[0] == 200
        assert served.ask("POST", COMPLETIONS, SMALL | dict(max_tokens=30, stop_token_ids=list(range(3, 60))))[0] == 200
        families = families_of(served)
        stats = engine.stats()
        values = {name: family.samples[0].value for name, family in families.items() if family.samples}
        assert values["flex_nano_vllm_num_requests_running"] == values["flex_nano_vllm_num_requests_waiting"] == 0
        assert values["flex_nano_vllm_kv_cache_usage_perc"] == 0
        assert values["flex_nano_vllm_prompt_tokens"] == stats.num_prompt_tokens > 0
        assert values["flex_nano_vllm_generation_tokens"] == stats.num_generated_tokens >= 13
        assert values["flex_nano_vllm_prefix_cache_hits"] == stats.num_cached_tokens
        assert values["flex_nano_vllm_num_preemptions"] == stats.num_preemptions
        finished = families["flex_nano_vllm_request_success"]
        by_reason = {s.labels["finished_reason"]: s.value for s in finished.samples if s.name.endswith("_total")}
        assert sum(by_reason.values()) == 4
        assert set(by_reason) <= {"stop", "length", "abort", "error"}
        for name in ("time_to_first_token_seconds", "time_per_output_token_seconds", "e2e_request_latency_seconds"):
            samples = families[f"flex_nano_vllm_{name}"].samples
            counts = [sample.value for sample in samples if sample.name.endswith("_bucket")]
            (total,) = [sample.value for sample in samples if sample.name.endswith("_count")]
            assert counts == sorted(counts) and counts[-1] == total == 3


def test_clients_cannot_create_new_metric_series(served):
    def series():
        return {(s.name, *sorted(s.labels.items())) for f in families_of(served).values() for s in f.samples}

    served.ask("POST", COMPLETIONS, SMALL)
    served.ask("POST", COMPLETIONS, SMALL | dict(max_tokens=30, stop_token_ids=list(range(3, 259))))
    before = series()
    for i in range(5):
        served.ask(
            "POST", COMPLETIONS, SMALL | dict(model=f"model-{i}\n", user=f"user-{i}", stop=f"{i}", cache_salt=f"{i}")
        )
        served.ask("POST", COMPLETIONS, SMALL | dict(user=f"user-{i}", stop=f"{i}", cache_salt=f"{i}"))
        served.ask("GET", f"/path-{i}")
    assert series() == before


def test_the_state_shows_the_queues_and_the_pools_but_no_prompts(monkeypatch):
    with new_engine(max_batch_size=1) as engine, serving(engine) as served:
        gate = Gate(engine)
        first = served.begin(COMPLETIONS, SMALL | dict(prompt="the first", max_tokens=3, ignore_eos=True))
        gate.wait()
        answer, queued = {}, Calls(monkeypatch, served.shared, "_command")
        asking = threading.Thread(target=lambda: answer.update(state=served.ask("GET", "/state")))
        asking.start()
        queued.wait()  # the engine answers between two steps
        gate.let_pass()
        asking.join(PATIENCE)
        gate.open()
        status, _, body = answer["state"]
        state = json.loads(body)
        assert status == 200 and set(state) == {"stats", "pools", "running", "waiting"}
        assert state["stats"]["num_running"] == len(state["running"]) == 1 and state["waiting"] == []
        (shown,) = state["running"]
        assert shown["num_prompt_tokens"] == 10 and shown["num_tokens"] == 11
        assert len(state["pools"]) == len(engine.kv.pools)
        for pool in state["pools"]:
            assert pool["page_size"] == 4 and len(pool["pages"]) <= pool["num_pages"]
        assert b"the first" not in body
        assert first.getresponse().status == 200


@pytest.mark.parametrize("text", ["hello", "ä€😀", "a<eos>b", "two\nlines\t\x00"])
def test_detokenize_reverses_tokenize(served, text):
    status, _, body = served.ask("POST", "/tokenize", {"prompt": text})
    answer = json.loads(body)
    assert status == 200 and answer["count"] == len(answer["tokens"]) and answer["max_model_len"] == 64
    assert answer["tokens"] == served.engine.input_processor.tokenize(text)
    status, _, body = served.ask("POST", "/detokenize", {"model": MODEL, "tokens": answer["tokens"]})
    assert (status, json.loads(body)) == (200, {"prompt": "<bos>" + text})


def test_tokenize_returns_the_prompt_tokens_of_a_chat(served, oracle):
    status, _, body = served.ask("POST", "/tokenize", {"messages": CHAT["messages"]})
    (output,) = oracle.chat(CHAT["messages"], greedy(1), use_tqdm=False)
    assert status == 200 and json.loads(body)["tokens"] == output.prompt_token_ids


@pytest.mark.parametrize(
    ("path", "request_", "expected"),
    [
        ("/tokenize", {}, 400),
        ("/tokenize", {"prompt": "a", "messages": CHAT["messages"]}, 400),
        ("/tokenize", {"prompt": ""}, 400),
        ("/tokenize", {"prompt": "\ud800"}, 400),
        ("/tokenize", {"prompt": "a", "model": "other"}, 404),
        ("/detokenize", {"tokens": [259]}, 400),
        ("/detokenize", {"tokens": [-1]}, 400),
        ("/detokenize", {"tokens": "abc"}, 400),
        ("/detokenize", {"tokens": [2**40]}, 400),
        ("/detokenize", {"tokens": [1], "model": "other"}, 404),
    ],
)
def test_invalid_tokenize_and_detokenize_requests_are_rejected(served, path, request_, expected):
    status, _, body = served.ask("POST", path, request_)
    assert status == expected
    assert_is_error(status, body)


def test_the_page_loads_nothing_from_other_origins(served):
    status, headers, body = served.ask("GET", "/")
    policy = headers["content-security-policy"]
    assert status == 200 and headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in policy and "connect-src 'self'" in policy and "http" not in policy
    assert not re.search(rb"(src|href)\s*=\s*[\"']?(https?:)?//", body)
    assert b"innerHTML" not in body


def test_a_model_is_found_by_its_name(served):
    client = client_of(served)
    assert client.models.retrieve(MODEL).id == MODEL == client.models.list().data[0].id
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("org/other")


def test_the_developer_role_is_treated_as_the_system_role(served):
    answers = [
        served.ask("POST", "/tokenize", {"messages": [{"role": role, "content": "be kind"}, *CHAT["messages"]]})
        for role in ("developer", "system")
    ]
    assert answers[0][0] == 200 and answers[0][2] == answers[1][2]


def test_the_usage_contains_the_cached_tokens(served):
    request = SMALL | dict(prompt="a beginning that is known", cache_salt="of this test")
    cached = [
        json.loads(served.ask("POST", COMPLETIONS, request)[2])["usage"]["prompt_tokens_details"]["cached_tokens"]
        for _ in range(2)
    ]
    assert cached == [0, 24]  # filled pages of 4 tokens; at least one token is computed


def test_the_version_is_that_of_the_package(served):
    status, _, body = served.ask("GET", "/version")
    assert (status, json.loads(body)) == (200, {"version": importlib.metadata.version("flex-nano-vllm")})


def test_headers_do_not_name_the_server_and_allow_no_other_origin(served):
    _, headers, _ = served.ask("GET", "/health", headers={"Origin": "http://evil.example"})
    assert "server" not in headers and not [name for name in headers if name.startswith("access-control")]


def test_logs_contain_neither_prompts_nor_keys(monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    canary = "canary-of-the-prompt"
    with new_engine() as engine, serving(engine, api_key=KEY) as served:
        auth = {"Authorization": f"Bearer {KEY}"}
        request = SMALL | dict(prompt=canary, max_tokens=3)
        assert served.ask("POST", COMPLETIONS, request, auth)[0] == 200
        assert served.ask("POST", COMPLETIONS, request | {"temperature": 9}, auth)[0] == 400
        assert served.ask("POST", CHATS, CHAT | {"messages": [{"role": canary, "content": canary}]}, auth)[0] == 400
        assert served.ask("POST", COMPLETIONS, request, {"Authorization": f"Bearer {KEY}-{canary}"})[0] == 401
        raise_at_call(monkeypatch, engine.runner, "forward", 1, OSError)
        assert served.ask("POST", COMPLETIONS, request, auth)[0] == 500
        monkeypatch.setattr(engine.input_processor, "request", None)  # simulates a bug in the server
        status, _, body = served.ask("POST", COMPLETIONS, request, auth)
        assert status == 500 and assert_is_error(status, body)["message"] == "internal error"
    assert "a step has failed" in caplog.text and "an unexpected error" in caplog.text
    assert canary not in caplog.text and KEY not in caplog.text


# --- the process -------------------------------------------------------------------------------------------------


def run_serve(*arguments):
    app = typer.Typer()
    app.command()(server.serve)
    return CliRunner().invoke(app, arguments)


def test_the_command_passes_its_options_to_the_engine_and_the_server(monkeypatch):
    """Check the arguments of `from_pretrained` and `uvicorn.run`, and send requests to the application."""
    served, loaded = {}, {}

    def from_pretrained(model, **options):
        loaded.update(options, model=model)
        return new_engine(max_seq_length=32, n_pages=9)

    monkeypatch.setattr(server.Inference, "from_pretrained", from_pretrained)
    monkeypatch.setattr(server.uvicorn, "run", lambda app, **options: served.update(options, app=app))
    names = "--model m --host 127.0.0.9 --port 81 --served-model-name s --dtype float64 --max-batch-size 3"
    sizes = "--max-seq-length 32 --n-pages 9 --page-size 4 --max-num-batched-tokens 64 --policy sjf --no-compile"
    limits = f"--max-waiting 2 --request-timeout 7 --drain-timeout 9 --api-key {KEY}"
    result = run_serve(*f"{names} {sizes} {limits}".split())
    assert result.exit_code == 0, result.output
    numbers = dict(max_batch_size=3, max_seq_length=32, n_pages=9, page_size=4, max_num_batched_tokens=64)
    assert loaded == dict(model="m", dtype="float64", compile=False, policy="sjf") | numbers
    app = served.pop("app")
    assert served.pop("http") is guard.HeaderTimeoutH11 and served["limit_concurrency"] < 10_000
    assert served.items() >= dict(host="127.0.0.9", port=81, timeout_graceful_shutdown=9, access_log=False).items()
    (middleware,) = [m for m in app.user_middleware if m.cls is guard.Guard]
    assert middleware.kwargs["limits"].request_timeout == 7
    with TestClient(app) as client:
        assert client.get("/v1/models").status_code == 401
        client.headers["Authorization"] = f"Bearer {KEY}"
        assert client.get("/v1/models").json()["data"][0]["id"] == "s"
        answer = client.post(COMPLETIONS, json=SMALL | dict(model="s", n=3, temperature=1))
        assert answer.status_code == 400 and "max_waiting=2" in answer.text


def test_a_model_that_cannot_be_loaded_exits_with_a_message():
    result = run_serve("--model", "/no/such/folder")
    assert result.exit_code == 1 and isinstance(result.exception, SystemExit)
    assert "/no/such/folder" in str(result.exception)


def test_after_sigterm_streams_finish_and_the_process_ends():
    command = [sys.executable, "-m", "flex_nano_vllm.server", "--model", "tiny-gemma2", "--no-compile", "--port", "0"]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=env)
    try:
        lines = []
        for line in process.stderr:
            lines.append(line)
            if found := re.search(r"running on http://127\.0\.0\.1:(\d+)", line):
                break
        else:
            raise AssertionError("".join(lines))
        port = int(found[1])
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="x", max_retries=0, timeout=PATIENCE)
        stream = client.completions.create(
            model="tiny-gemma2",
            prompt="The 12 months are",
            max_tokens=40,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
            extra_body={"ignore_eos": True},
        )
        chunks = iter(stream)
        next(chunks)
        process.send_signal(signal.SIGTERM)
        *_, last = list(chunks)
        assert last.usage.completion_tokens == 40
        client.close()
        _, rest = process.communicate(timeout=PATIENCE)
        assert "Traceback" not in rest
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", port)).close()
    finally:
        process.kill()
    assert process.returncode == -signal.SIGTERM  # uvicorn raises the signal again after its shutdown
