"""Checks every kind of response against the types of the openai package, in strict mode.

A client can rely on each field that OpenAI promises, and receives only the extra fields in EXTRAS. The package itself
accepts responses in which a field is missing or has another type.
"""

import copy
import json
from functools import cache

import pytest
from engines import raise_at_call
from openai.pagination import SyncPage
from openai.types import Completion, ErrorObject, Model
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from openai.types.responses import Response, ResponseStreamEvent
from parrots import CALL_F, CALL_G, HERMES, f, g, say, written
from pydantic import BaseModel, TypeAdapter
from serving import MODEL
from test_responses import DAY, FLAT, LOGPROBS

CHATS, COMPLETIONS, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/responses"
# Fields of responses that OpenAI's types do not have, by type
EXTRAS = {
    "Choice": {"stop_reason"},  # from vLLM: the stop token or stop string that ended the output
    "CompletionChoice": {"stop_reason"},
    "Model": {"max_model_len"},  # from vLLM
    "Response": {"frequency_penalty", "presence_penalty", "store"},  # sent by OpenAI; in the schema of Open Responses
    "Logprob": {"bytes"},  # in a delta; OpenAI's types have it only in the item
    "LogprobTopLogprob": {"bytes"},
    "ResponseErrorEvent": {"error"},  # tells the openai package that a stream has failed
    "ResponseFunctionCallArgumentsDoneEvent": {"name"},  # documented by OpenAI
}


def extras_of(value, place=""):
    """Return the fields that are neither in their type nor in EXTRAS."""
    if isinstance(value, BaseModel):
        unknown = set(value.model_extra or ()) - EXTRAS.get(type(value).__name__, set())
        found = [f"{place}.{name}" for name in sorted(unknown)]
        for name in type(value).model_fields:
            found += extras_of(getattr(value, name), f"{place}.{name}")
        return found
    if isinstance(value, dict):
        return [found for key, child in value.items() for found in extras_of(child, f"{place}.{key}")]
    if isinstance(value, list | tuple):
        return [found for i, child in enumerate(value) for found in extras_of(child, f"{place}.{i}")]
    return []


@cache
def adapter(kind):
    return TypeAdapter(kind)


def fit(kind, value):
    """Parse a value as a type. Raises ValueError if a field is missing, has another type, or is unknown."""
    parsed = adapter(kind).validate_python(value, strict=True)
    unknown = extras_of(parsed)
    if unknown:
        raise ValueError(f"unknown fields {unknown}")
    return parsed


def ask(served, path, request):
    status, _, body = served.ask("POST", path, dict(model=MODEL, temperature=0) | request)
    assert status == 200, body
    return json.loads(body)


def events(served, path, request):
    """Return the data of each event of a stream, without [DONE]."""
    status, _, body = served.ask("POST", path, dict(model=MODEL, temperature=0, stream=True) | request)
    assert status == 200, body
    lines = [line.removeprefix("data: ") for line in body.decode().splitlines() if line.startswith("data: ")]
    assert lines.pop() == "[DONE]"
    return [json.loads(line) for line in lines]


CALLS = "I see. " + written(HERMES, CALL_F, CALL_G)
TEXTS = dict(
    plain=dict(prompt="SAY:é 😀"),
    several=dict(prompt=["SAY:a", "b"], n=2),
    logprobs=dict(prompt="SAY:é 😀", logprobs=2),
    echo=dict(prompt="SAY:é 😀", logprobs=2, echo=True),
    echo_only=dict(prompt="SAY:a", logprobs=0, echo=True, max_tokens=0),
    stop=dict(prompt="SAY:a b c", stop=[" b"]),
    cut_off=dict(prompt="SAY:a b c", max_tokens=2),
)
CHATTING = dict(
    plain=dict(messages=say("é 😀")),
    several=dict(messages=say("a"), n=2),
    empty=dict(messages=say("")),
    logprobs=dict(messages=say("é 😀"), logprobs=True, top_logprobs=2),
    own_logprobs=dict(messages=say("a"), logprobs=True),
    calls=dict(messages=say(CALLS), tools=[f, g]),
    calls_only=dict(messages=say(written(HERMES, CALL_F)), tools=[f, g], tool_choice="required"),
    rated_calls=dict(messages=say(CALLS), tools=[f, g], logprobs=True, top_logprobs=1),
    stop=dict(messages=say("a b c"), stop=[" b"]),
    cut_off=dict(messages=say(CALLS), tools=[f, g], max_tokens=40),
)
RESPONDING = dict(
    plain=dict(input="SAY:é 😀"),
    empty=dict(input="SAY:"),
    logprobs=dict(input="SAY:é 😀", include=LOGPROBS, top_logprobs=2),
    calls=dict(input=f"SAY:{CALLS}", tools=FLAT),
    named=dict(input="SAY:x", tools=FLAT, tool_choice={"type": "function", "name": "g"}),
    strict=dict(input="SAY:x", tools=[tool | {"strict": True} for tool in FLAT], tool_choice="none"),
    format=dict(input="SAY:x", text={"format": DAY, "verbosity": "low"}),
    json=dict(input="SAY:{}", text={"format": {"type": "json_object"}}),
    cut_off=dict(input=f"SAY:{CALLS}", tools=FLAT, max_output_tokens=40),
    told=dict(input="SAY:x", instructions="i", metadata={"a": "b"}, reasoning={"effort": "low"}, user="u", top_p=0.5),
)


USAGE = [None, {"include_usage": True}, {"include_usage": True, "continuous_usage_stats": True}]


def as_ended(chunk):
    """Replace the null finish_reason of a chunk. OpenAI sends null before the end, but its type does not allow null."""
    for choice in chunk["choices"]:
        assert choice["finish_reason"] in (None, "stop", "length")
        choice["finish_reason"] = choice["finish_reason"] or "stop"
    return chunk


def told(answer):
    """Replace the null logprob of the first token of an echo.

    No token precedes it, so OpenAI sends null as its log-probability, but OpenAI's type does not allow null.
    """
    for choice in answer["choices"]:
        logprobs = choice["logprobs"]
        if logprobs and logprobs["text_offset"][:1] == [0] and logprobs["token_logprobs"][0] is None:
            assert logprobs["top_logprobs"][0] is None
            logprobs["token_logprobs"][0], logprobs["top_logprobs"][0] = 0.0, {}
    return answer


@pytest.mark.parametrize("name", TEXTS)
def test_a_completion_has_openais_type(parrot, name):
    answer = fit(Completion, told(ask(parrot, COMPLETIONS, TEXTS[name])))
    assert (answer.choices[0].logprobs is not None) == ("logprobs" in TEXTS[name]) and answer.usage


@pytest.mark.parametrize("options", USAGE)
@pytest.mark.parametrize("name", TEXTS)
def test_each_chunk_of_a_completion_has_openais_type(parrot, name, options):
    request = TEXTS[name] | {"stream_options": options}
    chunks = [fit(Completion, told(as_ended(chunk))) for chunk in events(parrot, COMPLETIONS, request)]
    assert bool(chunks[-1].usage) == bool(options)


@pytest.mark.parametrize("name", CHATTING)
def test_a_chat_completion_has_openais_type(parrot, name):
    answer = fit(ChatCompletion, ask(parrot, CHATS, CHATTING[name]))
    (message, *_) = (choice.message for choice in answer.choices)
    assert bool(message.tool_calls) == ("tools" in CHATTING[name]) and answer.usage


@pytest.mark.parametrize("options", USAGE)
@pytest.mark.parametrize("name", CHATTING)
def test_each_chunk_of_a_chat_completion_has_openais_type(parrot, name, options):
    chunks = [
        fit(ChatCompletionChunk, chunk) for chunk in events(parrot, CHATS, CHATTING[name] | {"stream_options": options})
    ]
    assert bool(chunks[-1].usage) == bool(options)
    assert any(choice.delta.tool_calls for chunk in chunks for choice in chunk.choices) == ("tools" in CHATTING[name])


@pytest.mark.parametrize("name", RESPONDING)
def test_a_response_has_openais_type(parrot, name):
    answer = fit(Response, ask(parrot, RESPONSES, RESPONDING[name]))
    assert answer.usage and answer.output and all(item.status for item in answer.output)


def test_each_event_of_a_response_has_openais_type(parrot, monkeypatch):
    kinds = set()
    for request in RESPONDING.values():
        kinds |= {fit(ResponseStreamEvent, event).type for event in events(parrot, RESPONSES, request)}
    raise_at_call(monkeypatch, parrot.engine.runner, "forward", 3, OSError)
    kinds |= {fit(ResponseStreamEvent, event).type for event in events(parrot, RESPONSES, RESPONDING["plain"])}
    of_response = {"created", "in_progress", "completed", "incomplete"}
    of_items = {"output_item.added", "output_item.done", "content_part.added", "content_part.done"}
    of_text = {"output_text.delta", "output_text.done", "function_call_arguments.delta", "function_call_arguments.done"}
    assert kinds == {"error"} | {f"response.{name}" for name in of_response | of_items | of_text}


def test_models_have_openais_type(parrot):
    status, _, body = parrot.ask("GET", "/v1/models")
    (model,) = fit(SyncPage[Model], json.loads(body)).data
    assert status == 200 and fit(Model, json.loads(parrot.ask("GET", f"/v1/models/{MODEL}")[2])) == model


@pytest.mark.parametrize(
    ("method", "path", "body", "expected"),
    [
        ("POST", CHATS, {}, 400),
        ("POST", CHATS, dict(model=MODEL, messages=say("x"), tool_choice="required"), 400),
        ("POST", COMPLETIONS, dict(model="other", prompt="x"), 404),
        ("POST", RESPONSES, dict(model=MODEL, input="x", background=True), 400),
        ("POST", RESPONSES, "{", 400),
        ("GET", "/v1/models/other", None, 404),
        ("GET", "/v1/nothing", None, 404),
        ("DELETE", CHATS, None, 405),
    ],
)
def test_an_error_has_openais_type(parrot, method, path, body, expected):
    status, _, answer = parrot.ask(method, path, body)
    assert status == expected
    answer = json.loads(answer)
    assert set(answer) == {"error"} and fit(ErrorObject, answer["error"]).message


@pytest.mark.parametrize(
    ("path", "request_"), [(COMPLETIONS, TEXTS["plain"]), (CHATS, CHATTING["plain"])], ids=["completion", "chat"]
)
def test_an_error_in_a_stream_has_openais_type(parrot, monkeypatch, path, request_):
    raise_at_call(monkeypatch, parrot.engine.runner, "forward", 3, OSError)
    last = events(parrot, path, request_)[-1]
    assert set(last) == {"error"} and "OSError" in fit(ErrorObject, last["error"]).message


# --- the check itself --------------------------------------------------------------------------------------------


def places(value, place=()):
    """Yield each dict in a JSON value, as the keys that lead to it."""
    if isinstance(value, dict):
        yield place
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in children:
        yield from places(child, (*place, key))


def at(value, place):
    for key in place:
        value = value[key]
    return value


# Objects whose keys the client chooses
FREE = {"metadata", "parameters", "schema", "properties"}


@pytest.mark.parametrize(
    ("path", "kind", "request_", "least"),
    [
        (COMPLETIONS, Completion, TEXTS["echo"], 15),
        (CHATS, ChatCompletion, CHATTING["rated_calls"], 20),
        (RESPONSES, Response, RESPONDING["calls"], 30),
        (RESPONSES, Response, RESPONDING["logprobs"], 30),
    ],
)
def test_the_check_detects_unknown_and_missing_fields_and_wrong_types(parrot, path, kind, request_, least):
    answer = ask(parrot, path, request_)
    answer = told(answer) if kind is Completion else answer
    fit(kind, answer)
    num_seen, kinds = 0, {}
    for place in places(answer):  # one dict of each list
        kinds.setdefault(tuple("" if isinstance(key, int) else key for key in place), place)
    for place in kinds.values():
        if FREE & set(map(str, place)) or (kind is Completion and "top_logprobs" in place):
            continue
        wrong = copy.deepcopy(answer)
        at(wrong, place)["nobodys"] = 1
        with pytest.raises(ValueError):
            fit(kind, wrong)
        for key in at(answer, place):
            for change in ("drop", "retype"):
                wrong = copy.deepcopy(answer)
                if change == "drop":
                    del at(wrong, place)[key]
                else:
                    at(wrong, place)[key] = {"nobodys": "type"}
                try:
                    fit(kind, wrong)
                except ValueError:
                    num_seen += 1
    assert num_seen >= least
