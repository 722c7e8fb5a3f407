"""Linear layers on a CPU: packed weights come back bit by bit, and cannot be read by mistake."""

import copy
import functools
import gc
import itertools
import pickle

import pytest
import torch
from engines import COMPILED, deficits, greedy, prompt_of
from tiny_models import CONFIGS, hf_generate, tiny_model
from torch import nn
from torch.nn.functional import linear
from transformers import AutoModelForCausalLM

from flex_nano_vllm import Inference, device, patching
from flex_nano_vllm import linear as linear_module
from flex_nano_vllm.device import packs_weights, uses_bfloat16
from flex_nano_vllm.linear import TransposedProducts, pack_weights, unpack_weights

CPU = torch.device("cpu")
packs = pytest.mark.skipif(
    not uses_bfloat16(CPU, torch.bfloat16), reason="needs a CPU with bfloat16 instructions (avx512_bf16)"
)


def new_model(architecture="qwen2", **changes):
    """Return a model of bfloat16 weights that no other test has. Qwen-2 has biases."""
    config = CONFIGS[architecture]()
    config.update(changes)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="eager").eval()


def bits_of(model):
    return {name: weight.clone() for name, weight in model.named_parameters(remove_duplicate=False)}


def assert_has_bits(model, bits):
    for name, weight in model.named_parameters(remove_duplicate=False):
        assert torch.equal(weight, bits[name]) and weight.is_contiguous(), name
    assert model.state_dict().keys() >= bits.keys()
    attributes = {"forward", "__reduce_ex__", "packed_handle", "packed_layers", "refusals_of_packed"}
    assert not any(attributes & {*vars(module), *module._buffers} for module in model.modules())
    assert not linear_module._packed_of_handle


@packs
@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (2, 3, 4)])
@pytest.mark.parametrize("has_bias", [False, True])
def test_a_packed_layer_equals_its_definition(shape, has_bias):
    layer = nn.Linear(40, 24, has_bias, dtype=torch.bfloat16)
    rows = torch.randn(*shape, 40).bfloat16()
    bias = layer.bias.double() if has_bias else None
    expected = linear(rows.double(), layer.weight.double(), bias)
    model = nn.Sequential(layer)
    pack_weights(model)
    try:
        with torch.no_grad():
            output = model(rows)
        assert output.dtype == torch.bfloat16 and output.shape == (*shape, 24)
        assert ((output.double() - expected).abs() <= 2**-8 * expected.abs() + 1e-3).all()
    finally:
        unpack_weights(model)


@packs
def test_packed_weights_are_held_once_and_come_back_bit_by_bit():
    model = new_model()
    bits, parameters = bits_of(model), {id(parameter) for parameter in model.parameters()}
    pack_weights(model)
    layers = [module for module in model.modules() if type(module) is nn.Linear]
    assert len(layers) == 7 * model.config.num_hidden_layers + 1
    assert {layer.weight.untyped_storage().nbytes() for layer in layers} == {2}, "a single number is left"
    assert all(weight.shape == bits[name].shape for name, weight in model.named_parameters())
    assert all(layer.weight.isnan().all() for layer in layers)
    unpack_weights(model)
    assert_has_bits(model, bits)
    assert {id(parameter) for parameter in model.parameters()} == parameters, "an optimizer holds these objects"
    unpack_weights(model)
    assert_has_bits(model, bits)


@packs
def test_layers_that_are_not_plain_keep_their_weights():
    class Quantised(nn.Linear):
        pass

    class QuantisedWeight(nn.Parameter):
        pass

    wrapped, tied, other_type = (nn.Linear(8, 8, dtype=torch.bfloat16) for _ in range(3))
    wrapped.forward = functools.partial(linear, weight=wrapped.weight)  # as a library does
    embedding = nn.Embedding(8, 8, dtype=torch.bfloat16)
    tied.weight = embedding.weight
    other_type.weight = QuantisedWeight(other_type.weight.detach())
    subclass, float64 = Quantised(8, 8, dtype=torch.bfloat16), nn.Linear(8, 8, dtype=torch.float64)
    model = nn.ModuleList([wrapped, tied, embedding, other_type, subclass, float64])
    bits = {id(module): module.weight.clone() for module in model}
    forward = wrapped.forward
    pack_weights(model)
    unpack_weights(model)
    pack_weights(model)
    assert all(torch.equal(module.weight, bits[id(module)]) for module in model)
    assert wrapped.forward is forward and not linear_module._packed_of_handle
    assert not any("forward" in vars(module) for module in (tied, other_type, subclass, float64))


@packs
def test_packed_weights_cannot_be_saved_or_written(tmp_path):
    model = new_model()
    bits = bits_of(model)
    saved = {name: weight + 1 for name, weight in bits.items()}
    pack_weights(model)
    for attempt in (
        functools.partial(copy.deepcopy, model),
        functools.partial(pickle.dumps, model),
        model.state_dict,
        model.model.layers[0].state_dict,
        functools.partial(model.load_state_dict, saved),
        functools.partial(model.save_pretrained, tmp_path / "saved"),
    ):
        with pytest.raises(RuntimeError, match="packed while an Inference engine uses it: close the engine"):
            attempt()
    with pytest.raises(RuntimeError, match="single memory location"), torch.no_grad():
        model.lm_head.weight.copy_(bits["lm_head.weight"])
    unpack_weights(model)
    assert_has_bits(model, bits)
    model.load_state_dict(saved)
    assert_has_bits(model, saved)


@packs
@pytest.mark.parametrize("how", ["another parameter", "another tensor", "in place"])
def test_weights_that_change_while_packed_are_packed_again(how):
    """An idle engine notices them before its next request. They stay when the engine is closed."""
    model, prompt = new_model("llama"), prompt_of(8)
    with Inference(model, None, 2, 32, compile=False) as engine:
        pack_weights(model)  # as a compiled engine does
        before = engine.generate(prompt, greedy(4), use_tqdm=False)
        layer = model.model.layers[0].mlp.up_proj
        new = (torch.zeros if how == "in place" else torch.randn)(96, 48).bfloat16()
        if how == "another parameter":
            layer.weight = nn.Parameter(new.clone())
        elif how == "another tensor":
            layer.weight.data = new.clone()
        else:
            layer.weight.data.zero_()
        after = engine.generate(prompt, greedy(4), use_tqdm=False)
        assert layer.weight.isnan().all()
    assert torch.equal(layer.weight, new) and not linear_module._packed_of_handle
    tokens = after[0].outputs[0].token_ids
    assert deficits(model, prompt, tokens).max() < 0.25 and tokens != before[0].outputs[0].token_ids


@packs
def test_a_weight_that_cannot_be_packed_is_refused_and_stays():
    model = new_model("llama")
    with Inference(model, None, 2, 32, compile=False) as engine:
        pack_weights(model)
        model.lm_head.weight = model.model.embed_tokens.weight  # tied
        bits = model.lm_head.weight.clone()
        with pytest.raises(RuntimeError, match=r"tied, or replaced by one of torch.bfloat16 with shape \[211, 48\]"):
            engine.generate([5], greedy(1), use_tqdm=False)
    assert model.lm_head.weight is model.model.embed_tokens.weight and torch.equal(model.lm_head.weight, bits)


@packs
@pytest.mark.parametrize("number", [0, 5])
def test_interrupted_unpacking_loses_no_weight(number, monkeypatch):
    model = new_model()
    bits, original, calls = bits_of(model), torch.Tensor.to_dense, itertools.count()
    pack_weights(model)

    def interrupt(tensor):
        if next(calls) == number:
            raise KeyboardInterrupt
        return original(tensor)

    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "to_dense", interrupt)
        with pytest.raises(KeyboardInterrupt):
            unpack_weights(model)
    with pytest.raises(RuntimeError, match="close the engine"):
        model.state_dict()
    unpack_weights(model)
    assert_has_bits(model, bits)


@packs
def test_weights_survive_inference_mode_and_conversions():
    """`to` replaces the buffers of a model, even if their type is the same."""
    model = new_model()
    bits, rows = bits_of(model), torch.randn(2, 48).bfloat16()
    with torch.inference_mode():
        pack_weights(model)
        output = model.lm_head(rows)
        model.to(torch.bfloat16)
        assert torch.equal(model.lm_head(rows), output)
        unpack_weights(model)
    assert_has_bits(model, bits)
    assert not any(weight.is_inference() for weight in model.parameters())
    with torch.inference_mode():
        made = nn.Sequential(nn.Linear(4, 4, dtype=torch.bfloat16))
    pack_weights(made)
    assert not made.packed_layers and not made[0].weight.isnan().any()


@packs
def test_layers_of_adapters_keep_their_weights():
    class Adapter(nn.Module):
        def __init__(self):
            super().__init__()
            self.base_layer, self.other = (nn.Linear(4, 4, dtype=torch.bfloat16) for _ in range(2))

        def __getattr__(self, name):  # as PEFT's wrappers do
            try:
                return super().__getattr__(name)
            except AttributeError:
                return getattr(self.other, name)

    model = nn.Sequential(Adapter())
    pack_weights(model)
    assert not model[0].base_layer.weight.isnan().any() and model[0].other.weight.isnan().all()
    unpack_weights(model)
    assert not model[0].other.weight.isnan().any()


@packs
@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (nn.Module, "register_buffer"),
        (nn.Module, "register_state_dict_pre_hook"),
        (nn.Module, "register_load_state_dict_pre_hook"),
        (linear_module, "PackedLayer"),
        (linear_module, "_pack"),
        (functools, "partial"),
        (torch, "full"),
    ],
)
def test_interrupted_packing_is_undone(owner, name, monkeypatch):
    """Packing the second layer calls each of these functions, and one call is interrupted."""
    model = new_model()
    bits, original, calls = bits_of(model), getattr(owner, name), itertools.count()

    def interrupt(*args, **kwargs):
        if next(calls) == 1:
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, interrupt)
        with pytest.raises(KeyboardInterrupt):
            pack_weights(model)
    unpack_weights(model)
    assert_has_bits(model, bits)


@packs
@pytest.mark.compiled
@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": True}], ids=["own head", "tied head"])
def test_an_engine_packs_the_weights_of_its_model(changes):
    """Its tokens are the model's own choice, and the model gets its weights back, even when the engine is deleted."""
    model, prompts = new_model(**changes), [prompt_of(length) for length in (5, 24, 1)]
    bits = bits_of(model)
    engine = Inference(model, None, **COMPILED)
    outputs = engine.generate(prompts, greedy(5), use_tqdm=False)
    tokens = [output.outputs[0].token_ids for output in outputs]
    with pytest.raises(RuntimeError, match="close the engine"):
        model.state_dict()
    assert not model.get_input_embeddings().weight.isnan().any()
    assert model.lm_head.weight.isnan().any() != bool(changes)
    del engine, outputs
    gc.collect()
    assert_has_bits(model, bits)
    for prompt, of_prompt in zip(prompts, tokens):
        assert deficits(model, prompt, of_prompt).max() < 0.25


@pytest.mark.parametrize("has_bias", [False, True])
def test_transposed_products_equal_linear_layers(has_bias):
    layer = torch.nn.Linear(5, 3, has_bias, dtype=torch.float64)
    rows = torch.randn(2, 7, 5, dtype=torch.float64)
    with torch.no_grad():
        expected = layer(rows)
        with TransposedProducts():
            output = layer(rows)
    assert torch.allclose(output, expected, rtol=1e-12) and output.stride() == expected.stride()


def test_quantised_weights_keep_their_own_product():
    class Quantised(torch.Tensor):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            return "own product"

    with TransposedProducts():
        assert torch.nn.functional.linear(torch.ones(1, 4), torch.ones(3, 4).as_subclass(Quantised)) == "own product"


def test_an_uncompiled_engine_does_not_pack():
    model = tiny_model("llama", torch.bfloat16)
    with Inference(model, None, 2, 32, compile=False):
        assert not linear_module._packed_of_handle and model.state_dict()


@pytest.mark.parametrize(
    ("text", "expected"), [("vendor_id\t: AuthenticAMD", True), ("vendor_id\t: GenuineIntel", False)]
)
def test_float32_is_packed_on_cpus_of_amd_only(text, expected, monkeypatch):
    monkeypatch.setattr(device.Path, "read_text", lambda *args, **kwargs: text)
    device._is_made_by_amd.cache_clear()
    assert packs_weights(CPU, torch.float32) == expected
    device._is_made_by_amd.cache_clear()
    assert packs_weights(CPU, torch.bfloat16) == uses_bfloat16(CPU, torch.bfloat16)
    for dtype in (torch.float32, torch.bfloat16):
        assert not packs_weights(torch.device("cuda"), dtype)


@pytest.mark.compiled
@pytest.mark.parametrize("packs", [False, True])
def test_a_compiled_float32_engine_may_pack(packs, monkeypatch):
    model, prompts = copy.deepcopy(tiny_model("qwen2", torch.float32)), [prompt_of(length) for length in (5, 24, 1)]
    monkeypatch.setattr(patching, "packs_weights", lambda *args: packs)
    expected = [hf_generate(model, prompt, 5, ignore_eos=True) for prompt in prompts]
    with Inference(model, None, **COMPILED) as engine:
        assert bool(linear_module._packed_of_handle) == packs
        outputs = engine.generate(prompts, greedy(5), use_tqdm=False)
    assert [output.outputs[0].token_ids for output in outputs] == expected
