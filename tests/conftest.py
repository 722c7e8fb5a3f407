"""Markers that skip what a machine cannot do, and a clean slate of compiled graphs for every test file."""

from dataclasses import replace

import pytest
import torch
from engines import PROMPTS, SIZES, dense_flex, own_model
from parrots import new_parrot
from serving import client_of, serving
from tiny_models import hf_generate, tiny_model

from flex_nano_vllm import Inference, cascade, runner, step
from flex_nano_vllm.cascade import pack
from flex_nano_vllm.runner import why_not_compiled


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    obstacle = why_not_compiled(torch.device("cpu"), torch.float32, page_size=16)
    for item in items:
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
        if "compiled" in item.keywords and obstacle:
            item.add_marker(pytest.mark.skip(reason=obstacle))
    # Files that compile first: none of them is left to one process in the end.
    slow = {item.path for item in items if "compiled" in item.keywords}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(autouse=True, scope="module")
def forget_graphs():
    """Graphs of one file would only slow the look-ups of the next, and count against the process's limit."""
    yield
    torch.compiler.reset()


@pytest.fixture(autouse=True, scope="module")
def dense(request):
    """Engines that are not compiled compute attention densely, except in files marked `flex`."""
    with pytest.MonkeyPatch.context() as patch:
        if request.node.get_closest_marker("flex") is None:
            original = runner.compile_flex_attention
            patch.setattr(
                runner,
                "compile_flex_attention",
                lambda device_type, compiled: original(device_type, compiled) if compiled else dense_flex,
            )
        yield


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """Matrices of 48 columns gain nothing from threads, and on a busy machine threads wait for each other."""
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def expected():
    """Eight greedy tokens of each of PROMPTS, by Hugging Face."""
    return [hf_generate(tiny_model("gemma2"), prompt, 8, ignore_eos=True) for prompt in PROMPTS]


@pytest.fixture(scope="module")
def engine():
    """Room for everybody."""
    with Inference(own_model("roomy"), None, **SIZES) as engine:
        yield engine


@pytest.fixture(scope="module")
def parrot():
    """A server whose model says what it is told, see parrots.py."""
    with new_parrot() as engine, serving(engine) as served:
        yield served


@pytest.fixture
def client(parrot):
    """OpenAI's client of that server."""
    yield client_of(parrot)
    parrot.wait_until_idle()
    assert parrot.engine.stats().num_used_pages == 0


@pytest.fixture
def any_saving(monkeypatch):
    """Decodes are packed whatever little that saves."""
    monkeypatch.setattr(cascade, "LEAST_SAVING", 0)


@pytest.fixture
def num_packed(any_saving, monkeypatch):
    """Packs whatever shares a page; counts the steps."""
    counted = [0]

    def counting(*args):
        packed = pack(*args[:-1], replace(args[-1], full_cost=0.0, partial_cost=0.0))
        counted[0] += packed is not None
        return packed

    monkeypatch.setattr(step, "pack", counting)
    return counted
