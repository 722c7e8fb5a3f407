"""Linear layers on a CPU: packed weights come back bit by bit, and cannot be read by mistake."""

import functools
import gc
import itertools

import pytest
import torch
from engines import COMPILED, deficits, greedy, prompt_of
from tiny_models import CONFIGS, tiny_model
from torch import nn
from torch.nn.functional import linear
from transformers import AutoModelForCausalLM

from flex_nano_vllm import Inference
from flex_nano_vllm import linear as linear_module
from flex_nano_vllm.device import uses_bfloat16
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
    assert not any({"forward", "refusals"} & vars(module).keys() for module in model.modules())
    assert not any("packed_handle" in name for name, _ in model.named_buffers())
    assert not linear_module._packed_by_handle


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
    subclass, float32 = Quantised(8, 8, dtype=torch.bfloat16), nn.Linear(8, 8)
    model = nn.ModuleList([wrapped, tied, embedding, other_type, subclass, float32])
    bits = {id(module): module.weight.clone() for module in model}
    forward = wrapped.forward
    pack_weights(model)
    unpack_weights(model)
    pack_weights(model)
    assert all(torch.equal(module.weight, bits[id(module)]) for module in model)
    assert wrapped.forward is forward and not linear_module._packed_by_handle
    assert not any("forward" in vars(module) for module in (tied, other_type, subclass, float32))


@packs
def test_packed_weights_cannot_be_saved_or_written(tmp_path):
    model = new_model()
    bits = bits_of(model)
    saved = {name: weight + 1 for name, weight in bits.items()}
    pack_weights(model)
    for attempt in (
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
@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (nn.Module, "register_buffer"),
        (nn.Module, "register_state_dict_pre_hook"),
        (nn.Module, "register_load_state_dict_pre_hook"),
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


def test_an_uncompiled_engine_and_other_types_do_not_pack():
    for dtype, compiled in ((torch.bfloat16, False), (torch.float32, False)):
        model = tiny_model("llama", dtype)
        with Inference(model, None, 2, 32, compile=compiled):
            assert not linear_module._packed_by_handle and model.state_dict()
    assert not uses_bfloat16(CPU, torch.float32)
    assert not uses_bfloat16(torch.device("cuda"), torch.bfloat16)
