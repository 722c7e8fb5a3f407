"""Switches change the kernels or the graphs as their names say, and no token."""

import copy
from dataclasses import replace

import pytest
import torch
from engines import greedy, prompt_of
from test_triton import Case, check_decodes, num_copied_inputs
from tiny_models import hf_generate, tiny_model

from benchmarks import pretended_gpu, switches
from benchmarks.pretended_gpu import GPUS, Kernel, engines_on
from benchmarks.switches import SWITCHES
from flex_nano_vllm import Inference, runner

pytestmark = [pytest.mark.triton, pytest.mark.flex]


@pytest.fixture(autouse=True)
def few_processors(monkeypatch):
    """Torch splits the pages of decodes into parts that fill the processors. Few parts are interpreted sooner."""
    monkeypatch.setitem(GPUS, "small", replace(GPUS["RTX 3090"], num_processors=12))


@pytest.fixture
def kernels(monkeypatch):
    """The texts of the attention kernels that run."""
    texts, run = [], Kernel.run

    def noted(kernel, *args, **kwargs):
        if "_tem_" in kernel.name:
            texts.append(kernel.source)
        run(kernel, *args, **kwargs)

    monkeypatch.setattr(pretended_gpu.Kernel, "run", noted)
    return texts


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("AUTO", ["SPLIT_KV : tl.constexpr = 2", "HAS_FULL_BLOCKS : tl.constexpr = True"]),
        ("AUTO, all pages partial", ["SPLIT_KV : tl.constexpr = 2", "HAS_FULL_BLOCKS : tl.constexpr = False"]),
        ("all pages partial", ["HAS_FULL_BLOCKS : tl.constexpr = False"]),
        ("blocks of torch", ["HAS_FULL_BLOCKS : tl.constexpr = True"]),
        ("no checks of the pool's end", ["IS_DIVISIBLE : tl.constexpr = True"]),
    ],
)
def test_attention_of_decodes_equals_the_definition_with_another_kernel(name, expected, kernels):
    with SWITCHES[name]():
        check_decodes(Case("small", windows=(None,)), lengths=(33, 20, 1, 50))
    (text,) = kernels
    assert all(wanted in text for wanted in expected)
    assert ("SPLIT_KV : tl.constexpr" in text) == ("AUTO" in name)


@pytest.mark.parametrize("name", ["8 warps", "2 stages", "4 stages"])
def test_an_option_is_changed_for_the_tiles_of_decodes_only(name, monkeypatch):
    options = {16: dict(num_warps=4, num_stages=3), 128: dict(num_warps=8, num_stages=3)}
    monkeypatch.setattr(runner, "kernel_options", lambda device, all_rows, *sizes: options)
    number, option = name.split()
    with SWITCHES[name]():
        changed = runner.kernel_options("cuda", [16, 128], 64)
    assert changed == options | {16: options[16] | {f"num_{option}": int(number)}}
    with SWITCHES["blocks of torch"]():
        assert runner.kernel_options("cuda", [16, 128], 64) == {16: {"BACKEND": "TRITON"}, 128: {"BACKEND": "TRITON"}}


def test_tokens_with_split_decodes_and_static_tables_are_those_of_hugging_face(kernels):
    """The contexts have full pages. A CUDA graph copies the seven vectors of the step, and none of the four tables."""
    model, prompts = copy.deepcopy(tiny_model("gemma2", torch.float32)), [prompt_of(length) for length in (36, 18)]
    sizes = dict(max_batch_size=2, max_seq_length=48, page_size=16, max_num_batched_tokens=64, compile=True)
    with (
        engines_on(GPUS["small"]) as compiler,
        SWITCHES["AUTO, all pages partial"](),
        SWITCHES["static tables"](),
        Inference(model, None, **sizes) as engine,
    ):
        outputs = engine.generate(prompts, greedy(3), use_tqdm=False)
    for prompt, output in zip(prompts, outputs):
        assert output.outputs[0].token_ids == hf_generate(model, prompt, 3, ignore_eos=True)
    assert any("SPLIT_KV : tl.constexpr" in text for text in kernels)
    assert num_copied_inputs(compiler.graphs)[-1] == 7  # the last graph is that of decodes


def test_no_cuda_graphs_compiles_without_the_option_of_the_engine(monkeypatch):
    noted = []

    def compile_graph(graph, inputs, options=None):
        noted.append((options, torch._inductor.config.triton.cudagraphs))
        return graph.forward

    monkeypatch.setattr(torch._inductor, "compile", compile_graph)
    with SWITCHES["no CUDA graphs"]():
        backend = runner.inductor("cuda")
        assert runner.inductor("cpu") is not backend
    assert runner.inductor("cuda") == "inductor"
    double = torch.compile(lambda x: 2 * x, backend=backend, options={"triton.cudagraphs": True})
    assert double(torch.tensor([3.0])).tolist() == [6.0]
    assert noted == [(None, False)]


def test_decodes_are_launched_before_the_tokens_of_their_last_step_are_read(monkeypatch):
    """Two of three requests run at once, and they end at different times: then the launched decodes are not used."""
    model, prompts, events = copy.deepcopy(tiny_model("gemma2", torch.float64)), [[5, 6, 7], [8], [9, 10]], []
    copy_begun, forward = switches.copy_begun, runner.ModelRunner.forward

    def noted_copy(tokens):
        return lambda: events.append("read") or copy_begun(tokens)()

    def noted_forward(of_engine, chunks):
        events.append(len(chunks))
        return forward(of_engine, chunks)

    monkeypatch.setattr(switches, "copy_begun", noted_copy)
    monkeypatch.setattr(runner.ModelRunner, "forward", noted_forward)
    with SWITCHES["host one step behind"](), Inference(model, None, 2, 32, page_size=4, compile=False) as engine:
        ids = [engine.add_request(prompt, greedy(length)) for prompt, length in zip(prompts, (9, 4, 6))]
        outputs = {}
        while engine.has_unfinished_requests():
            outputs |= {output.request_id: output for output in engine.run_one_step()}
            engine.check_invariants()
        again = engine.generate(prompts[0] + outputs[ids[0]].outputs[0].token_ids, greedy(2), use_tqdm=False)
        assert again[0].num_cached_tokens == 8, "the pages of the first request are cached"
    for id_, prompt, length in zip(ids, prompts, (9, 4, 6)):
        assert outputs[id_].outputs[0].token_ids == hf_generate(model, prompt, length, ignore_eos=True)
    assert events[:8] == [2, 2, "read", 2, "read", 2, "read", "read"]
    assert events.count("read") == len([event for event in events if event != "read"])


def test_switches_need_a_gpu(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(switches.torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="they need a GPU"):
        switches.main()
