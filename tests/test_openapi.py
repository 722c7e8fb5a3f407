"""The server's OpenAPI description is valid, and responses to valid and invalid requests conform to it."""

import json

import pytest
import schemathesis
from engines import num_cases
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.strategies import one_of
from schemathesis import GenerationMode
from schemathesis.checks import (
    allow_header_conformance,
    content_type_conformance,
    not_a_server_error,
    response_schema_conformance,
    status_code_conformance,
    unsupported_method,
)
from serving import MODEL, new_engine, serving

ABSENT = """tools tool_choice functions function_call modalities audio prediction web_search_options reasoning_effort
    chat_template chat_template_kwargs best_of suffix""".split()
OPERATIONS = {
    *[("post", path) for path in ("/v1/completions", "/v1/chat/completions", "/v1/responses")],
    *[("post", path) for path in ("/tokenize", "/detokenize")],
    *[("get", path) for path in ("/v1/models", "/v1/models/{name}", "/health", "/metrics", "/version", "/state")],
}
# Fields to fix in generated requests: with random values, nearly all requests would be rejected
FIELDS = {
    "/v1/completions": dict(model=MODEL, prompt="a", logit_bias=None) | dict.fromkeys(ABSENT),
    "/v1/chat/completions": dict(model=MODEL, messages=[{"role": "user", "content": "a"}], logit_bias=None)
    | dict.fromkeys(ABSENT),
    "/v1/responses": dict(model=MODEL, input="a", logit_bias=None) | dict.fromkeys(ABSENT),
    "/tokenize": dict(model=MODEL),
    "/detokenize": dict(model=MODEL),
}
CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
    allow_header_conformance,
    unsupported_method,
]


@pytest.fixture(scope="module")
def served():
    with new_engine(max_seq_length=16, max_batch_size=16) as engine, serving(engine) as served:
        yield served
        served.wait_until_idle()
        served.between_steps(engine.check_invariants)
        assert engine.stats().num_used_pages == 0


@pytest.fixture(scope="module")
def description(served):
    status, _, body = served.ask("GET", "/openapi.json")
    assert status == 200
    return json.loads(body)


@pytest.fixture(scope="module")
def schema(served):
    return schemathesis.openapi.from_url(f"{served.url}/openapi.json")


def test_the_description_is_valid_and_lists_all_operations(description, schema):
    schema.validate()
    offered = {(method, path) for path, methods in description["paths"].items() for method in methods}
    assert offered == OPERATIONS


def test_the_description_has_a_schema_for_every_json_response(description):
    answers = [
        op["responses"]["200"]["content"] for methods in description["paths"].values() for op in methods.values()
    ]
    schemas = [content["application/json"]["schema"] for content in answers if "application/json" in content]
    assert len(schemas) == len(OPERATIONS) - 1 and all("$ref" in schema for schema in schemas), (
        "every operation except /metrics has a schema"
    )


def test_the_description_has_the_error_schema_for_every_error_status(description):
    for path, methods in description["paths"].items():
        for operation in methods.values():
            for status in ("400", "401", "404", "413", "415", "429", "500", "503"):
                content = operation["responses"][status]["content"]["application/json"]
                assert content["schema"]["$ref"].endswith("/ErrorResponse"), path


def answers_as_described(operation, modes, **fields):
    """Generate requests of an operation, with some fixed fields, and check the responses against the description.

    Returns the status codes of the responses.
    """
    statuses = set()

    @settings(
        max_examples=num_cases(30),
        derandomize=True,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(one_of([operation.as_strategy(generation_mode=mode) for mode in modes]))
    def ask(case):
        if isinstance(case.body, dict):
            case.body.update(fields)
        statuses.add(case.call_and_validate(checks=CHECKS).status_code)

    ask()
    return statuses


@pytest.mark.parametrize("path", sorted(path for method, path in OPERATIONS if method == "get"))
def test_responses_to_get_requests_conform_to_the_description(schema, path):
    expected = {404} if "{" in path else {200}  # a generated name is never the name of the model
    assert answers_as_described(schema[path]["GET"], [GenerationMode.POSITIVE]) == expected


@pytest.mark.parametrize("path", FIELDS)
@pytest.mark.parametrize("mode", GenerationMode)
def test_responses_to_generated_requests_conform_to_the_description(schema, path, mode):
    assert answers_as_described(schema[path]["POST"], [mode]) <= {200, 400, 404}


@pytest.mark.parametrize("path", FIELDS)
def test_responses_to_generated_requests_with_model_and_prompt_conform_to_the_description(schema, path):
    assert answers_as_described(schema[path]["POST"], GenerationMode, **FIELDS[path]) <= {200, 400}
