"""`/v1/responses` over HTTP: it gives the same answers as chats, in the form of items and of events.

Most engines here are parrots, see parrots.py.
"""

import itertools
import json
from concurrent.futures import ThreadPoolExecutor
from typing import Literal

import openai
import pydantic
import pytest
from engines import raise_at_call
from openai.types.responses import Response
from parrots import CALL_F, CALL_G, HERMES, f, g, gemma_tokenizer, new_parrot, object_of, parrot_of, say, written
from serving import MODEL, Gate, assert_is_error, client_of, new_engine, serving

from flex_nano_vllm import Inference
from flex_nano_vllm.input_processor import chat_token_ids

RESPONSES = "/v1/responses"
LOGPROBS = ["message.output_text.logprobs"]


def flat(tool):
    """Return a tool in the form of `/v1/responses`."""
    return {"type": "function", **tool["function"]}


FLAT = [flat(f), flat(g)]


def anonymous(value, names=()):
    """Return a response without its ids, its times and the fields in `names`."""
    if isinstance(value, dict):
        changing = ("id", "call_id", "created_at", "completed_at", *names)
        return {key: anonymous(child, names) for key, child in value.items() if key not in changing}
    return [anonymous(child, names) for child in value] if isinstance(value, list) else value


def raw_events(served, **request):
    """Request a stream and return (name, data) of each of its events."""
    body = dict(model=MODEL, temperature=0, stream=True) | request
    status, headers, body = served.ask("POST", RESPONSES, body)
    assert status == 200 and headers["content-type"].startswith("text/event-stream"), body
    *events, done, rest = body.decode().split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    pairs = []
    for event in events:
        name, data = event.split("\n")
        assert name.startswith("event: ") and data.startswith("data: ")
        pairs.append((name.removeprefix("event: "), json.loads(data.removeprefix("data: "))))
    return pairs


def check_stream(events):
    """Check the order of the events and their data. Return the response in the last event."""
    assert [data["sequence_number"] for _, data in events] == list(range(len(events)))
    assert all(name == data["type"] for name, data in events)
    (_, created), (_, begun), *items, (last, final) = events
    assert [created["type"], begun["type"]] == ["response.created", "response.in_progress"]
    for response in (created["response"], begun["response"]):
        assert (response["status"], response["output"], response["usage"]) == ("in_progress", [], None)
        assert response["completed_at"] is None and response["id"] == final["response"]["id"]
    assert last == f"response.{final['response']['status']}"
    groups = [list(group) for _, group in itertools.groupby(items, lambda event: event[1]["output_index"])]
    assert len(groups) == len(final["response"]["output"])
    for index, (group, item) in enumerate(zip(groups, final["response"]["output"])):
        assert all(data["output_index"] == index for _, data in group)
        names = [name.removeprefix("response.") for name, _ in group]
        first, *middle, (_, end) = [*(data for _, data in group[:-1]), group[-1]]
        assert end["item"] == item and first["item"]["id"] == item["id"]
        assert all(data["item_id"] == item["id"] for data in middle)
        assert first["item"]["status"] == "in_progress" and item["status"] in ("completed", "incomplete")
        if item["type"] == "message":
            (part,) = item["content"]
            num_deltas = len(names) - 5
            assert names == [
                *["output_item.added", "content_part.added", *["output_text.delta"] * num_deltas],
                *["output_text.done", "content_part.done", "output_item.done"],
            ]
            assert first["item"]["content"] == [] and all(data["content_index"] == 0 for data in middle)
            empty, *deltas, done, closed = middle
            assert empty["part"] == {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
            assert "".join(delta["delta"] for delta in deltas) == done["text"] == part["text"]
            assert all(delta["delta"] or delta["logprobs"] for delta in deltas)
            joined = [entry for delta in deltas for entry in delta["logprobs"]]
            assert joined == done["logprobs"] == part["logprobs"] and closed["part"] == part
        else:
            num_deltas = len(names) - 3
            assert names == [
                *["output_item.added", *["function_call_arguments.delta"] * num_deltas],
                *["function_call_arguments.done", "output_item.done"],
            ]
            *deltas, done = middle
            assert first["item"] == item | {"arguments": "", "status": "in_progress"}
            assert "".join(delta["delta"] for delta in deltas) == done["arguments"] == item["arguments"]
    return final["response"]


def one(client, served, input, **options):
    """Request a response with and without streaming, check that both are equal, and return it.

    The stream is checked twice: its raw events, and the events as parsed by the client.
    """
    request = dict(model=MODEL, input=input, temperature=0) | options
    whole = client.responses.create(**request)
    streamed = check_stream(raw_events(served, **request))
    assert anonymous(json.loads(whole.to_json()), ["cached_tokens"]) == anonymous(
        json.loads(Response.model_validate(streamed).to_json()), ["cached_tokens"]
    )
    events = list(client.responses.create(**request, stream=True))
    assert anonymous(events[-1].response.to_dict(), ["cached_tokens"]) == anonymous(whole.to_dict(), ["cached_tokens"])
    return whole


def calls_of(response):
    return [(item.name, item.arguments) for item in response.output if item.type == "function_call"]


def user(text):
    return {"role": "user", "content": text}


# --- text --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "input",
    [
        "SAY:hello\n\nzoë 😀",
        [user("SAY:hello\n\nzoë 😀")],
        [
            {
                "type": "message",
                **user([{"type": "input_text", "text": "SAY:hello\n\n"}, {"type": "input_text", "text": "zoë 😀"}]),
            }
        ],
    ],
    ids=["text", "item", "parts"],
)
def test_the_answer_to_a_text_is_one_message(client, parrot, input):
    response = one(client, parrot, input)
    assert (response.object, response.model, response.id[:5]) == ("response", MODEL, "resp_")
    (message,) = response.output
    assert (message.type, message.role, message.status, message.id[:4]) == ("message", "assistant", "completed", "msg_")
    assert response.output_text == "hello\n\nzoë 😀"
    assert (response.status, response.incomplete_details, response.error) == ("completed", None, None)
    assert response.created_at <= response.completed_at
    num_prompt = len(chat_token_ids(gemma_tokenizer(), say("hello\n\nzoë 😀")))
    num_said = len(gemma_tokenizer()("hello\n\nzoë 😀", add_special_tokens=False).input_ids) + 1
    usage = response.usage
    assert (usage.input_tokens, usage.output_tokens, usage.total_tokens) == (
        num_prompt,
        num_said,
        num_prompt + num_said,
    )


def test_an_answer_without_text_is_an_empty_message(client, parrot):
    response = one(client, parrot, "SAY:")
    assert response.output_text == "" and response.output[0].content[0].text == ""


def test_a_response_contains_the_fields_of_its_request(client, parrot):
    request = dict(
        instructions="Be brief.",
        max_output_tokens=7,
        metadata={"a": "b"},
        parallel_tool_calls=False,
        top_p=0.5,
        tools=FLAT,
        tool_choice="none",
        text={"format": {"type": "json_object"}, "verbosity": "low"},
        store=True,
        truncation="disabled",
        reasoning={"effort": "low"},
    )
    response = one(client, parrot, "SAY:x", **request).to_dict()
    for name in ("instructions", "max_output_tokens", "metadata", "parallel_tool_calls", "top_p", "tool_choice"):
        assert response[name] == request[name]
    assert (response["temperature"], response["text"], response["store"]) == (0, request["text"], False)
    assert response["tools"] == [tool | {"strict": None} for tool in FLAT]
    plain = client.responses.create(model=MODEL, input="SAY:x").to_dict()
    assert (plain["temperature"], plain["top_p"], plain["tool_choice"], plain["tools"]) == (1, 1, "auto", [])
    assert (plain["text"], plain["parallel_tool_calls"]) == ({"format": {"type": "text"}}, True)
    assert (plain["instructions"], plain["max_output_tokens"], plain["truncation"]) == (None, None, "disabled")


CALL = {"type": "function_call", "call_id": "c1", "name": "f", "arguments": '{"a": 1}'}
RESULT = {"type": "function_call_output", "call_id": "c1", "output": "SAY:It is 25."}
FUNCTION = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": {"a": 1}}}


@pytest.mark.parametrize(
    ("request_", "messages"),
    [
        (dict(input="u", instructions="i"), [{"role": "system", "content": "i"}, user("u")]),
        (
            dict(input=[{"role": "developer", "content": "i"}, user("u")]),
            [{"role": "system", "content": "i"}, user("u")],
        ),
        (dict(input=[{"role": "system", "content": "i"}, user("u")]), [{"role": "system", "content": "i"}, user("u")]),
        (
            dict(input=[user("u"), {"role": "assistant", "content": "a"}, user("v")]),
            [user("u"), {"role": "assistant", "content": "a"}, user("v")],
        ),
        (
            dict(
                input=[
                    user("u"),
                    {
                        "type": "message",
                        "id": "msg_1",
                        "status": "completed",
                        "role": "assistant",
                        "phase": "final_answer",
                        "content": [
                            {"type": "output_text", "text": "a", "annotations": [], "logprobs": []},
                            {"type": "refusal", "refusal": "b"},
                        ],
                    },
                    {"type": "reasoning", "id": "rs_1", "summary": []},
                    user("v"),
                ]
            ),
            [user("u"), {"role": "assistant", "content": "ab"}, user("v")],
        ),
        (
            dict(input=[{"role": "assistant", "content": "a"}, {"role": "assistant", "content": "b"}, user("u")]),
            [{"role": "assistant", "content": "a"}, {"role": "assistant", "content": "b"}, user("u")],
        ),
        (
            dict(input=[user("u"), CALL, RESULT]),
            [
                user("u"),
                {"role": "assistant", "content": "", "tool_calls": [FUNCTION]},
                {"role": "tool", "content": "SAY:It is 25.", "tool_call_id": "c1"},
            ],
        ),
        (
            dict(
                input=[
                    user("u"),
                    {"role": "assistant", "content": "a"},
                    CALL | {"id": "fc_1", "status": "completed"},
                    CALL | {"call_id": "c2"},
                    RESULT | {"output": [{"type": "input_text", "text": "r"}, {"type": "input_text", "text": "s"}]},
                    RESULT | {"call_id": "c2", "id": None, "status": None},
                ],
                tools=[flat(f)],
            ),
            [
                user("u"),
                {"role": "assistant", "content": "a", "tool_calls": [FUNCTION, FUNCTION | {"id": "c2"}]},
                {"role": "tool", "content": "rs", "tool_call_id": "c1"},
                {"role": "tool", "content": "SAY:It is 25.", "tool_call_id": "c2"},
            ],
        ),
    ],
    ids=["instructions", "developer", "system", "turns", "output", "assistants", "call", "calls"],
)
def test_the_prompt_has_the_same_tokens_as_the_prompt_of_a_chat(parrot, client, monkeypatch, request_, messages):
    prompts = []
    chat_prompt = parrot.engine.input_processor.chat_prompt
    monkeypatch.setattr(
        parrot.engine.input_processor, "chat_prompt", lambda *args: prompts.append(chat_prompt(*args)) or prompts[-1]
    )
    client.responses.create(model=MODEL, temperature=0, max_output_tokens=1, **request_)
    tools = [f] if "tools" in request_ else None
    assert prompts == [chat_token_ids(gemma_tokenizer(), messages, tools)]


def test_the_output_items_can_be_sent_back_unchanged(client, parrot):
    first = one(client, parrot, "SAY:I see.\n" + written(HERMES, CALL_F, CALL_G), tools=FLAT)
    results = [
        {"type": "function_call_output", "call_id": item.call_id, "output": "SAY:done"}
        for item in first.output
        if item.type == "function_call"
    ]
    assert len(results) == 2
    second = client.responses.create(
        model=MODEL, input=[user("SAY:x"), *first.output, *results], temperature=0, tools=FLAT
    )
    assert second.output_text == "done"
    third = one(client, parrot, [user("SAY:x"), *(item.to_dict() for item in first.output), *results, user("SAY:more")])
    assert third.output_text == "more"


@pytest.mark.parametrize(
    "text", ["SAY:zoë 😀\n", "SAY:" + written(HERMES, CALL_F), "SAY:a b " + written(HERMES, CALL_F, CALL_G)]
)
def test_a_chat_with_the_same_messages_has_the_same_answer(client, parrot, text):
    response = one(client, parrot, text, tools=FLAT, instructions="Be brief.")
    messages = [{"role": "system", "content": "Be brief."}, user(text)]
    chat = client.chat.completions.create(model=MODEL, messages=messages, temperature=0, tools=[f, g])
    message = chat.choices[0].message
    assert response.output_text == (message.content or "")
    calls = [(call.function.name, call.function.arguments) for call in message.tool_calls or []]
    assert calls_of(response) == calls
    usage, of_chat = response.usage, chat.usage
    assert (usage.input_tokens, usage.output_tokens) == (of_chat.prompt_tokens, of_chat.completion_tokens)


def test_the_trained_model_answers_a_response_request():
    requests = [dict(), dict(stream=True), dict(include=LOGPROBS)]
    sizes = dict(max_batch_size=4, max_seq_length=128, page_size=16, compile=False)
    with Inference.from_pretrained("tiny-gemma2", **sizes) as engine, serving(engine) as served:
        ask, options = client_of(served).responses.create, dict(model=MODEL, input="What is 17 plus 8?", temperature=0)
        with ThreadPoolExecutor(3) as pool:
            whole, stream, rated = pool.map(lambda request: ask(**options, **request), requests)
            stream = list(stream)
    assert whole.output_text == rated.output_text == stream[-1].response.output_text == "25."
    assert "".join(event.delta for event in stream if event.type == "response.output_text.delta") == "25."


# --- structures and tools ----------------------------------------------------------------------------------------

DAY = {"type": "json_schema", "name": "day", "schema": object_of(day={"enum": ["mon", "tue"]}), "strict": True}


class Day(pydantic.BaseModel):
    day: Literal["mon", "tue"]
    hour: Literal[1, 22]


def test_a_text_has_the_requested_format(client, parrot):
    assert one(client, parrot, 'SAY:{"day": "tue"}', text={"format": DAY}).output_text == '{"day": "tue"}'
    other = one(client, parrot, "SAY:hello", text={"format": DAY})
    assert json.loads(other.output_text)["day"] in ("mon", "tue")
    echoed = other.to_dict()["text"]["format"]
    assert {key: echoed[key] for key in DAY} == DAY
    anything = one(client, parrot, 'SAY:{"x": [1]}', text={"format": {"type": "json_object"}})
    assert anything.output_text == '{"x": [1]}'


def test_an_answer_is_parsed_as_a_pydantic_model(client):
    request = dict(model=MODEL, input='SAY:{"day": "tue", "hour": 22}', temperature=0, text_format=Day)
    assert client.responses.parse(**request).output_parsed == Day(day="tue", hour=22)
    with client.responses.stream(**request) as stream:
        assert stream.get_final_response().output_parsed == Day(day="tue", hour=22)


@pytest.mark.parametrize("call", [CALL_F, CALL_G], ids=["f", "g"])
def test_a_call_is_an_item(client, parrot, call):
    response = one(client, parrot, "SAY:" + written(HERMES, call), tools=FLAT)
    (item,) = response.output
    assert (item.type, item.name, item.arguments, item.status) == ("function_call", *call, "completed")
    assert item.id[:3] == "fc_" and len(item.call_id) == 9 and response.status == "completed"


def test_text_and_calls_are_items_in_the_order_of_the_output(client, parrot):
    response = one(client, parrot, "SAY:I see.\n" + written(HERMES, CALL_F, CALL_G), tools=FLAT)
    assert [item.type for item in response.output] == ["message", "function_call", "function_call"]
    assert response.output_text == "I see." and calls_of(response) == [CALL_F, CALL_G]
    assert len({item.id for item in response.output} | {item.call_id for item in response.output[1:]}) == 5


@pytest.mark.parametrize("text", ["hello", written(HERMES, CALL_F)])
def test_tool_choice_determines_the_called_tool(client, parrot, text):
    def calls(choice, **options):
        response = one(client, parrot, f"SAY:{text}", tools=FLAT, tool_choice=choice, **options)
        assert response.to_dict()["tool_choice"] == choice
        return [(name, json.loads(arguments)) for name, arguments in calls_of(response)]

    expected = [] if text == "hello" else [(CALL_F[0], json.loads(CALL_F[1]))]
    assert calls("auto") == expected and calls("none") == []
    assert [name for name, _ in calls("required")] in (["f"], ["g"])
    assert [name for name, _ in calls({"type": "function", "name": "g"})] == ["g"]


def test_without_parallel_calls_a_response_has_one_call(client, parrot):
    text = "SAY:" + written(HERMES, CALL_F, CALL_G)
    assert calls_of(one(client, parrot, text, tools=FLAT, parallel_tool_calls=False)) == [CALL_F]
    assert calls_of(one(client, parrot, text, tools=FLAT, tool_choice="required", parallel_tool_calls=True)) == [
        CALL_F,
        CALL_G,
    ]


def test_arguments_are_parsed_as_a_pydantic_model(client):
    tool = openai.pydantic_function_tool(Day)
    response = client.responses.parse(
        model=MODEL,
        input="SAY:" + written(HERMES, ("Day", '{"day": "mon", "hour": 1}')),
        temperature=0,
        tools=[flat(tool)],
    )
    (item,) = response.output
    assert item.name == "Day" and Day.model_validate_json(item.arguments) == Day(day="mon", hour=1)


# --- limits and log-probabilities --------------------------------------------------------------------------------


def test_a_response_truncated_by_the_token_limit_is_incomplete(client, parrot):
    response = one(client, parrot, "SAY:a b c d e f", max_output_tokens=4)
    assert (response.status, response.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert response.output[0].status == "incomplete" and "a b c d".startswith(response.output_text)
    assert response.usage.output_tokens == 4 and response.output_text


def test_a_call_truncated_by_the_token_limit_is_incomplete(client, parrot):
    text = written(HERMES, CALL_F)
    num_tokens = len(gemma_tokenizer()(text[: text.index('"dd"')], add_special_tokens=False).input_ids)
    response = one(client, parrot, f"SAY:{text}", tools=FLAT, max_output_tokens=num_tokens)
    (item,) = response.output
    assert (response.status, item.type, item.status) == ("incomplete", "function_call", "incomplete")
    assert CALL_F[1].startswith(item.arguments) and item.arguments.startswith('{"a": 22, "b":')


@pytest.mark.parametrize("text", ["ab", "a b\n", "é😀"])
def test_log_probabilities_are_returned_if_requested(client, parrot, text):
    plain = one(client, parrot, f"SAY:{text}")
    assert plain.output[0].content[0].logprobs == []
    for options, num_top in ((dict(include=LOGPROBS), 0), (dict(include=LOGPROBS, top_logprobs=2), 2)):
        response = one(client, parrot, f"SAY:{text}x", **options)
        entries = response.output[0].content[0].logprobs
        assert b"".join(bytes(entry.bytes) for entry in entries).decode() == response.output_text == f"{text}x"
        assert all(len(entry.top_logprobs) == num_top for entry in entries)
        chat = client.chat.completions.create(
            model=MODEL, messages=say(f"{text}x"), temperature=0, logprobs=True, top_logprobs=num_top
        )
        expected = [entry.token for entry in chat.choices[0].logprobs.content]
        assert [entry.token for entry in entries] == expected
        assert response.top_logprobs == num_top


def test_log_probabilities_with_tools_are_rejected_because_calls_have_no_field_for_them(client):
    with pytest.raises(openai.BadRequestError, match="cannot be combined with tools") as error:
        client.responses.create(model=MODEL, input="x", tools=FLAT, include=LOGPROBS)
    assert error.value.param == "top_logprobs"


# --- errors ------------------------------------------------------------------------------------------------------


def image(kind="input_image"):
    return [user([{"type": "input_text", "text": "x"}, {"type": kind, "image_url": "data:image/png;base64,AA=="}])]


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        (dict(previous_response_id="resp_1"), "previous_response_id", "not supported"),
        (dict(background=True), "background", "not supported"),
        (dict(conversation="conv_1"), "conversation", "not supported"),
        (dict(conversation={"id": "conv_1"}), "conversation", "not supported"),
        (dict(prompt={"id": "p"}), "prompt", "not supported"),
        (dict(truncation="auto"), "truncation", "not supported"),
        (dict(max_tool_calls=1), "max_tool_calls", "not supported"),
        (dict(n=2), "n", "not supported"),
        (dict(response_format={"type": "json_object"}), "response_format", "not supported"),
        *[
            (dict(tools=[tool]), "tools", "tools.0.type")
            for tool in (
                {"type": "web_search"},
                {"type": "file_search", "vector_store_ids": ["v"]},
                {"type": "code_interpreter", "container": {"type": "auto"}},
                {"type": "mcp", "server_label": "x", "server_url": "http://127.0.0.1/"},
                {"type": "custom", "name": "x"},
            )
        ],
        (dict(tools=[f]), "tools", "tools.0"),
        (dict(tools=[flat(f) | {"name": "a b"}]), "tools", "name"),
        (dict(tools=[flat(f), flat(f)]), "tools", "two tools have the name f"),
        (dict(tools=[flat(f) | {"parameters": {"x-guidance": {}}}]), "tools", "the parameters of f"),
        (dict(tool_choice="required"), (None, "tool_choice", "tools"), "needs tools"),
        (dict(tool_choice={"type": "function", "name": "h"}, tools=FLAT), (None, "tool_choice", "tools"), "names h"),
        (dict(tool_choice={"type": "web_search"}, tools=FLAT), "tool_choice", ""),
        (dict(input=image()), "input", "type"),
        (dict(input=image("input_file")), "input", "type"),
        (dict(input=[user([{"type": "input_text"}])]), "input", "text"),
        (dict(input=[]), "input", "input"),
        (dict(input=None), "input", "input"),
        (dict(input=[user("x"), {"type": "item_reference", "id": "msg_1"}]), "input", "item_reference"),
        (dict(input=[{"role": "critic", "content": "x"}]), "input", ""),
        (dict(input=[user("x"), CALL | {"arguments": "[1]"}, RESULT]), "input", "arguments must be a JSON object"),
        (dict(input=[{"role": "system", "content": "x"}]), "input", "after the system message comes no turn"),
        (dict(input="x" * 40_000), "input", "maximum context length"),
        (dict(input="x" * 100_000), "input", "characters"),
        (dict(input="\ud800"), "input", "Unicode"),
        (dict(instructions="\ud800"), "instructions", "Unicode"),
        (dict(max_output_tokens=0), "max_output_tokens", "max_output_tokens"),
        (dict(max_output_tokens="5"), "max_output_tokens", "max_output_tokens"),
        (dict(top_logprobs=21), "top_logprobs", "20"),
        (dict(include=["file_search_call.results"]), "include", "include"),
        (dict(text={"format": {"type": "xml"}}), "text", "text.format.type"),
        (dict(text={"format": DAY | {"schema": {"type": "nothing"}}}), "text", ""),
        (dict(text={"format": {"type": "json_schema", "name": "x", "schema": None}}), "text", ""),
        (dict(text={"verbosity": "enormous"}), "text", "verbosity"),
        (dict(temperature=3), "temperature", "temperature"),
        (dict(metadata={"a": 1}), "metadata", "metadata"),
        (dict(model=None), "model", "model"),
    ],
    ids=lambda value: str(value)[:50] if isinstance(value, dict) else "",
)
def test_an_invalid_request_is_rejected_with_the_name_of_the_field(parrot, fields, param, words):
    request = dict(model=MODEL, input="x", temperature=0) | fields
    before = parrot.engine.stats().num_steps
    for stream in (False, True):
        status, headers, body = parrot.ask("POST", RESPONSES, json.dumps(request | {"stream": stream}))
        assert status == 400 and headers["content-type"] == "application/json", body
        error = assert_is_error(status, body)
        assert error["param"] in (param if isinstance(param, tuple) else (param,)) and words in error["message"], error
        assert not error["message"].startswith("messages"), "the message names a field that the request does not have"
    assert parrot.engine.stats().num_steps == before


@pytest.mark.parametrize(
    "fields",
    [
        *[dict(previous_response_id=None, conversation=None, background=False, truncation="disabled")],
        *[dict(store=True), dict(user="u", safety_identifier="s", prompt_cache_key="k", service_tier="auto")],
        *[dict(reasoning={"effort": "low", "summary": "auto"}), dict(include=["reasoning.encrypted_content"])],
        *[
            dict(tools=[], tool_choice="auto"),
            dict(text={}),
            dict(text={"format": {"type": "text"}}),
            dict(top_logprobs=0),
        ],
        *[dict(stream_options=None), dict(metadata=None), dict(instructions=None), dict(max_output_tokens=10**9)],
    ],
    ids=str,
)
def test_fields_that_do_not_change_the_answer_are_accepted(parrot, fields):
    status, _, body = parrot.ask("POST", RESPONSES, dict(model=MODEL, input="SAY:x", temperature=0) | fields)
    assert status == 200 and json.loads(body)["output"][0]["content"][0]["text"] == "x", body


def test_tools_are_rejected_if_the_chat_template_does_not_support_them():
    with new_engine() as engine, serving(parrot_of(engine)) as served:
        status, _, body = served.ask("POST", RESPONSES, dict(model=MODEL, input="x", tools=FLAT))
    assert status == 400 and assert_is_error(status, body)["param"] == "tools"


@pytest.mark.parametrize(
    ("method", "path"),
    [("POST", "/v1/responses/compact"), ("GET", "/v1/responses/resp_1"), ("POST", "/v1/responses/resp_1/cancel")],
)
def test_endpoints_for_stored_or_compacted_responses_are_not_found(parrot, method, path):
    body = dict(model=MODEL, input=[user("x")]) if method == "POST" else None
    status, _, body = parrot.ask(method, path, body)
    assert status == 404
    assert_is_error(404, body)


def test_an_unknown_model_is_not_found(client):
    with pytest.raises(openai.NotFoundError, match="has the model") as caught:
        client.responses.create(model="gpt-9", input="x")
    assert caught.value.param == "model"


@pytest.mark.parametrize("number", [1, 3], ids=["before the first token", "after the first token"])
def test_an_engine_error_ends_a_stream_with_an_error_event(client, parrot, monkeypatch, number):
    raise_at_call(monkeypatch, parrot.engine.runner, "forward", number, OSError)
    events = raw_events(parrot, input="SAY:a b c d")
    monkeypatch.undo()
    (name, last), names = events[-1], [name for name, _ in events]
    assert name == last["type"] == "error" and names.count("error") == 1
    assert names[:2] == ["response.created", "response.in_progress"]
    assert not {"response.completed", "response.failed", "response.incomplete"}.intersection(names)
    assert [data["sequence_number"] for _, data in events] == list(range(len(events)))
    assert last["code"] == "engine_error" and "OSError" in last["message"] and last["param"] is None

    raise_at_call(monkeypatch, parrot.engine.runner, "forward", number, OSError)
    came = []
    with pytest.raises(openai.APIError, match="OSError"):
        came += client.responses.create(model=MODEL, input="SAY:a b c d", temperature=0, stream=True)
    monkeypatch.undo()
    assert client.responses.create(model=MODEL, input="SAY:fine", temperature=0).output_text == "fine"


def test_an_engine_error_is_returned_as_an_internal_server_error(client, parrot, monkeypatch):
    raise_at_call(monkeypatch, parrot.engine.runner, "forward", 2, OSError)
    with pytest.raises(openai.InternalServerError, match="OSError"):
        client.responses.create(model=MODEL, input="SAY:a b c d", temperature=0)


def test_a_client_that_disconnects_aborts_its_response():
    """The gate holds the steps until the client has disconnected, so the response cannot finish earlier."""
    with new_parrot() as engine:
        gate = Gate(engine)
        with serving(engine) as served:
            stream = client_of(served).responses.create(model=MODEL, input="SAY:" + "a b " * 100, stream=True)
            gate.wait()
            for _ in range(3):
                gate.let_pass()
                gate.wait()
            kinds = []
            for event in stream:
                kinds.append(event.type)
                if event.type == "response.output_text.delta":
                    break
            assert kinds[:2] == ["response.created", "response.in_progress"] and len(kinds) == 5
            stream.close()
            gate.open()
            served.wait_until_idle()
        assert engine.stats().finish_reasons == {"abort": 1} and engine.stats().num_used_pages == 0
