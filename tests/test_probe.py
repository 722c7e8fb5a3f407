"""The probe: models are admitted by what they do, and a model that mixes tokens outside attention is rejected."""

import copy
from dataclasses import replace

import pytest
import torch
from engines import greedy, prompt_of, tokens_of
from tiny_models import CONFIGS, VOCABULARY, WINDOW, hf_generate
from tiny_models import tiny_model as supported_model

from examples.model_survey import Result, document, survey, tiny_model
from flex_nano_vllm import Inference
from flex_nano_vllm.masks import Causal, Chunked, SlidingWindow
from flex_nano_vllm.memory import kv_bytes
from flex_nano_vllm.models import spec_of
from flex_nano_vllm.patching import is_patched
from flex_nano_vllm.probe import Probe, observe, verify

# Of each kind of decoder one or two; the survey in docs/models.md has all.
WINDOW_IN_CONFIG = ["mixtral", "phi3", "starcoder2", "ministral"]
POST_NORM_OR_PARALLEL = ["olmo2", "exaone4", "cohere2", "gpt_neox", "phi"]
OTHER_LAYOUTS = ["gpt2", "opt", "stablelm", "nemotron"]
SINKS_OR_LATENT = ["gpt_oss", "deepseek_v3"]
EXPERTS = ["qwen3_moe", "granitemoe", "glm4_moe", "phimoe"]
SHARED_OR_CHUNKED = ["gemma3n_text", "llama4_text"]
FAMILIES = [*WINDOW_IN_CONFIG, *POST_NORM_OR_PARALLEL, *OTHER_LAYOUTS, *EXPERTS, *SHARED_OR_CHUNKED, *SINKS_OR_LATENT]


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
    """The MLP of a layer adds a hundredth of the token before. Logits hardly change."""
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


def test_a_wrong_record_is_found():
    """The second run computes attention from the record."""
    model = copy.deepcopy(supported_model("mistral", torch.float32))
    model.config.sliding_window = 3  # shorter than the sequences of the probe
    probe = Probe(model, 64, VOCABULARY)
    observation, *first_run = observe(probe)
    assert verify(probe, observation, *first_run).prunes_last_layer
    for wrong in (dict(mask=Causal()), dict(mask=SlidingWindow(4)), dict(keys_of=0)):
        layers = observation.layers[0], replace(observation.layers[1], **wrong)
        with pytest.raises(ValueError, match=r"layer 1 .MistralAttention.* computes a token from other"):
            verify(probe, replace(observation, layers=layers), *first_run)


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


def test_the_callers_modes_do_not_reach_the_probe():
    model = copy.deepcopy(supported_model("llama", torch.float32))
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        assert spec_of(model).prunes_last_layer


def test_llama4_limits_the_tokens_of_a_step():
    model = tiny_model("llama4_text")
    model.config.attn_temperature_tuning, model.config.floor_scale = True, 33
    with pytest.raises(ValueError, match="max_num_batched_tokens=33 is more than the 32 tokens"):
        Inference(model, None, max_num_batched_tokens=33, max_seq_length=32, compile=False)
    with pytest.raises(ValueError, match="max_seq_length=33 is more than the 32 positions"):
        Inference(model, None, max_num_batched_tokens=32, max_seq_length=33, compile=False)
    Inference(model, None, max_num_batched_tokens=32, compile=False).close()


@pytest.mark.compiled
@pytest.mark.parametrize("family", ["gpt_oss", "deepseek_v3"])
def test_a_compiled_family_generates_the_same_tokens(family):
    """Sinks in windows, with experts; keys and values of different sizes."""
    model = tiny_model(family)
    prompts = [prompt_of(40), prompt_of(19)]
    sizes = dict(max_batch_size=2, page_size=16, n_pages=12, max_num_batched_tokens=32, enable_cascade=False)
    with Inference(model, None, **sizes) as engine:
        assert engine.runner.compiled and engine.runner.prunes
        tokens = tokens_of(engine.generate(prompts, [greedy(6), greedy(6)], use_tqdm=False))
    assert tokens == [hf_generate(model, prompt, 6, ignore_eos=True) for prompt in prompts]


def test_the_document_counts_what_was_admitted():
    results = [Result("a", "exact"), Result("b", "wrong"), Result("c", "rejected", "x | y"), Result("d", "not tried")]
    text = document(results)
    assert text.endswith("\n2 of 4 admitted, 1 admitted and wrong.\n")
    assert "| c | rejected | x   y |" in text
