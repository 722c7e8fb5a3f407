"""The probe: models are admitted by what they do, and a model that mixes tokens outside attention is rejected."""

import copy

import pytest
import torch
from engines import greedy, prompt_of, tokens_of
from tiny_models import CONFIGS, WINDOW, hf_generate
from tiny_models import tiny_model as supported_model

from examples.model_survey import Result, document, survey, tiny_model
from flex_nano_vllm import Inference, models
from flex_nano_vllm.masks import Causal, Chunked, SlidingWindow
from flex_nano_vllm.memory import kv_bytes
from flex_nano_vllm.models import spec_of
from flex_nano_vllm.patching import is_patched

# Of each kind of decoder one or two; the survey in docs/models.md has all.
WINDOW_IN_CONFIG = ["mixtral", "phi3", "starcoder2", "ministral"]
POST_NORM_OR_PARALLEL = ["olmo2", "exaone4", "cohere2", "gpt_neox", "phi"]
OTHER_LAYOUTS = ["gpt2", "opt", "stablelm", "nemotron"]
EXPERTS = ["qwen3_moe", "granitemoe", "glm4_moe", "phimoe"]
SHARED_OR_CHUNKED = ["gemma3n_text", "llama4_text"]
FAMILIES = [*WINDOW_IN_CONFIG, *POST_NORM_OR_PARALLEL, *OTHER_LAYOUTS, *EXPERTS, *SHARED_OR_CHUNKED]


@pytest.mark.flex
@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_of_a_family_equal_those_of_generate(family):
    """In chunks, under preemption, with cached prefixes, and beyond every window and chunk."""
    assert survey(family) == Result(family, "exact")


@pytest.mark.parametrize(
    ("family", "masks"),
    [
        ("phimoe", {SlidingWindow(12)}),  # its window is in the mask only
        ("olmoe", {Causal()}),  # passes a window to attention, and masks nothing
        ("cohere2", {SlidingWindow(12), Causal()}),
        ("llama4_text", {Chunked(12), Causal()}),
        ("vaultgemma", {SlidingWindow(12), Causal()}),  # its config has a window for some layers only
    ],
)
def test_the_mask_of_a_layer_is_what_the_model_masks(family, masks):
    assert {layer.mask for layer in spec_of(tiny_model(family)).layers} == masks


def test_layers_that_use_the_keys_of_another_layer_have_no_pool():
    spec = spec_of(tiny_model("gemma3n_text"))
    assert [layer.keys_of for layer in spec.layers] == [0, 1, 1, 1]
    assert spec.windows == (12, 12)
    with Inference(tiny_model("gemma3n_text"), None, n_pages=8, page_size=16, compile=False) as engine:
        caches = [attention.kv_cache for attention in engine.runner.attention_layers]
        assert caches[0] is not caches[1] and caches[1] is caches[2] is caches[3]
        num_bytes = sum(cache.k_cache.nbytes + cache.v_cache.nbytes for cache in set(caches))
        tables = 8 * 4 * (engine.kv.geometry.max_batch_size + 1)
        assert num_bytes + tables == kv_bytes(spec, engine.kv.geometry)


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        (
            "falcon_h1",
            r"FalconH1ForCausalLM layer 0 \(FalconH1Mixer, model.layers.0.mamba\) computes a token from",
        ),
        ("qwen3_next", r"layer 0 \(Qwen3NextGatedDeltaNet, model.layers.0.linear_attn\) computes a token from other"),
        ("lfm3", r"layer 0 \(Lfm3ShortConv, model.layers.0.conv\) computes a token from other"),
        ("minimax", r"layer 1 \(MiniMaxLightningAttention, model.layers.1.self_attn\) computes a token from other"),
        ("diffllama", r"layer 0 \(DiffLlamaAttention, model.layers.0.self_attn\) calls attention more than once"),
        (
            "doge",
            r"layer 0 \(DogeAttention, model.layers.0.self_attn\) has a mask that transformers' mask functions",
        ),
        ("bloom", "has no number of positions"),
        ("gpt_neox_japanese", "does not call attention through transformers' AttentionInterface"),
    ],
)
def test_a_family_that_cannot_be_packed_is_rejected_with_the_reason(family, reason):
    model = tiny_model(family)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    attributes = {name: set(vars(module)) for name, module in model.named_modules()}
    with pytest.raises(ValueError, match=reason):
        Inference(model, None, compile=False)
    assert not is_patched(model) and model.config._attn_implementation == "eager" and not model.training
    assert {name: set(vars(module)) for name, module in model.named_modules()} == attributes
    assert not any(module._forward_hooks for module in model.modules())
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])


# ---- faults in a model that is admitted without them ----


def mixing(model):
    """The MLP of a layer adds a thousandth of the token before. Logits hardly change."""
    mlp = model.model.layers[1].mlp
    mlp.act_fn = Mixer()
    return "mlp.act_fn"


class Mixer(torch.nn.Module):
    def forward(self, x):
        return torch.nn.functional.silu(x) + 0.01 * x.roll(1, dims=-2)


def counting(model):
    """RoPE counts the tokens of a call."""
    forward = model.model.rotary_emb.forward
    model.model.rotary_emb.forward = lambda x, position_ids: forward(x, torch.arange(x.shape[1]).expand(x.shape[:2]))
    return "rotary_emb"


def scaling(model):
    """A layer scales its queries by the number of tokens of the call."""
    projection = model.model.layers[0].self_attn.q_proj
    forward = projection.forward
    projection.forward = lambda x: forward(x) * x.shape[0]
    return "self_attn.q_proj"


@pytest.mark.parametrize("fault", [mixing, counting, scaling])
def test_a_model_that_mixes_the_tokens_of_a_step_is_rejected_with_the_module(fault):
    model = copy.deepcopy(supported_model("llama", torch.float32))
    spec_of(model)
    name = fault(model)
    with pytest.raises(ValueError, match=f"{name}\\) computes a token from other"):
        Inference(model, None, compile=False)
    Inference(model, None, max_seq_length=32, compile=False, verify=False).close()


def test_a_window_in_the_mask_that_is_not_in_the_record_is_found():
    """The second run compares attention too, so that a wrong record is no silent error."""
    model = copy.deepcopy(supported_model("mistral"))
    model.config.sliding_window = 3  # shorter than the sequences of the probe
    assert {layer.mask for layer in spec_of(model).layers} == {SlidingWindow(3)}


def test_an_engine_without_verification_does_not_prune():
    model = copy.deepcopy(supported_model("llama", torch.float32))
    assert spec_of(model).prunes_last_layer and not spec_of(model, False).prunes_last_layer
    prompt = prompt_of(30)
    with Inference(model, None, max_seq_length=64, compile=False, verify=False) as engine:
        tokens = tokens_of(engine.generate(prompt, greedy(5), use_tqdm=False))
    assert tokens == [hf_generate(model, prompt, 5, ignore_eos=True)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("architecture", CONFIGS)
def test_supported_models_are_verified_in_every_dtype(architecture, dtype):
    spec = spec_of(supported_model(architecture, dtype), True)
    windows = {"gemma2": [WINDOW, None], "gemma3_text": [WINDOW, None], "mistral": [WINDOW, WINDOW]}
    assert [mask.window for mask in spec.masks] == windows.get(architecture, [None, None])
    assert spec.takes_options and spec.prunes_last_layer


def test_a_model_whose_weights_are_large_is_not_verified_by_default(monkeypatch):
    model = copy.deepcopy(supported_model("llama", torch.float32))
    mixing(model)
    monkeypatch.setattr(models, "MOST_BYTES_VERIFIED", 1000)
    Inference(model, None, max_seq_length=32, compile=False).close()
    with pytest.raises(ValueError, match="computes a token from other"):
        Inference(model, None, max_seq_length=32, compile=False, verify=True)


def test_the_document_counts_what_was_admitted():
    results = [Result("a", "exact"), Result("b", "wrong"), Result("c", "rejected", "x | y"), Result("d", "not tried")]
    text = document(results)
    assert text.endswith("\n2 of 4 admitted, 1 admitted and wrong.\n")
    assert "| c | rejected | x   y |" in text
