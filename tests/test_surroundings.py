"""The environment of an engine: the caller's torch modes, changes of the model, the model's configs, the locale."""

import copy
import os
import subprocess
import sys
import warnings

import pytest
import torch
from engines import PROMPTS, SIZES, greedy, own_model, prompt_of, tokens_of
from serving import run
from tiny_models import CONFIGS, hf_generate, tiny_model
from transformers import AutoModelForCausalLM, GenerationConfig

from benchmarks.exactness import hf_generate as neutral_generate
from benchmarks.exactness import plain_generation
from flex_nano_vllm import Inference, SamplingParams
from flex_nano_vllm.async_inference import AsyncInference
from flex_nano_vllm.models import WeightsWatch, max_positions
from flex_nano_vllm.sampling_params import default_params, not_expressed, sampling_defaults

# --- modes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", ["generate", "by hand", "drawn"])
def test_the_callers_autocast_changes_nothing(engine, expected, steps):
    engine.reset_prefix_cache()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        if steps == "generate":
            assert tokens_of(engine.generate(PROMPTS, greedy(8), use_tqdm=False)) == expected
        elif steps == "by hand":
            engine.add_request(PROMPTS[0], greedy(8))
            outputs = []
            while engine.has_unfinished_requests():
                outputs += engine.run_one_step()
            assert tokens_of(outputs) == expected[:1]
        else:
            drawn = SamplingParams(seed=3, max_tokens=6, top_p=0.9, logprobs=2, ignore_eos=True)
            within = engine.generate(PROMPTS, drawn, use_tqdm=False)
    if steps == "drawn":
        engine.reset_prefix_cache()
        outside = engine.generate(PROMPTS, drawn, use_tqdm=False)
        assert [output.outputs for output in within] == [output.outputs for output in outside]


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_the_callers_default_dtype_changes_nothing(engine, expected, dtype):
    engine.reset_prefix_cache()
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        assert tokens_of(engine.generate(PROMPTS, greedy(8), use_tqdm=False)) == expected
    finally:
        torch.set_default_dtype(before)


# --- weights that change -----------------------------------------------------------------------------------------

LONG = prompt_of(21, seed=5)


@pytest.fixture
def changing():
    with Inference(copy.deepcopy(tiny_model("gemma2")), None, **SIZES) as engine:
        engine.generate(LONG, greedy(4), use_tqdm=False)
        yield engine


def other_weights():
    with torch.random.fork_rng():
        torch.manual_seed(7)
        return AutoModelForCausalLM.from_config(CONFIGS["gemma2"](), dtype=torch.float64).state_dict()


def step_of_an_optimizer(model):
    weight = model.model.layers[0].mlp.up_proj.weight
    weight.grad = torch.ones_like(weight)
    torch.optim.SGD([weight], lr=0.5).step()
    weight.grad = None


CHANGES = {
    "load_state_dict": lambda model: model.load_state_dict(other_weights(), strict=False),
    "assigned": lambda model: model.load_state_dict(other_weights(), strict=False, assign=True),
    "an optimizer": step_of_an_optimizer,
    "a module": lambda model: setattr(model.model.layers[1].mlp, "act_fn", torch.nn.SiLU()),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_pages_computed_with_old_weights_are_not_reused(changing, change):
    assert changing.generate(LONG, greedy(4), use_tqdm=False)[0].num_cached_tokens > 0
    change(changing.model)
    (output,) = changing.generate(LONG, greedy(4), use_tqdm=False)
    assert output.num_cached_tokens == 0
    model = changing.model
    changing.close()
    assert output.outputs[0].token_ids == hf_generate(model, LONG, 4, ignore_eos=True)


def test_each_change_of_adapters_or_modules_is_detected_once():
    class Adapter(torch.nn.Linear):
        _disable_adapters, active_adapters, scaling = False, ["default"], {"default": 1.0}

    model = torch.nn.Sequential(Adapter(2, 2))
    watch = WeightsWatch(model)
    assert not watch.has_changed()
    for name, value in [("_disable_adapters", True), ("active_adapters", ["other"]), ("scaling", {"default": 2.0})]:
        setattr(model[0], name, value)
        assert watch.has_changed() and not watch.has_changed(), name
    with torch.inference_mode():
        model.append(torch.nn.Linear(2, 2))
    assert watch.has_changed() and not watch.has_changed()


# --- the model's configs -----------------------------------------------------------------------------------------


def stretched(rope_type, **rope):
    config = CONFIGS["qwen2"]()
    config.max_position_embeddings = 32
    config.rope_parameters = {"rope_type": rope_type, "rope_theta": 10000.0, "factor": 4.0} | rope
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float64, attn_implementation="eager")
    return model.eval()


@pytest.mark.parametrize(
    "rope", [dict(rope_type="yarn", original_max_position_embeddings=32), dict(rope_type="linear")], ids=str
)
def test_a_model_with_scaled_rope_supports_the_scaled_number_of_positions(rope):
    model, prompt = stretched(**rope), prompt_of(60)
    with pytest.raises(ValueError, match="max_seq_length=129 is more than the 128 positions"):
        Inference(model, None, max_batch_size=1, max_seq_length=129, page_size=4, compile=False)
    with Inference(model, None, max_batch_size=1, max_seq_length=128, page_size=4, compile=False) as engine:
        tokens = tokens_of(engine.generate(prompt, greedy(6), use_tqdm=False))
    assert tokens == [hf_generate(model, prompt, 6, ignore_eos=True)]


@pytest.mark.parametrize(
    ("rope", "positions"),
    [
        (dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=16), 64),
        (dict(rope_type="yarn", factor=1.5, original_max_position_embeddings=16), 32),  # the config has more positions
        (dict(rope_type="yarn", factor=4.0), 128),
        (dict(rope_type="default"), 32),
    ],
    ids=str,
)
def test_the_number_of_positions_is_the_larger_of_the_config_and_its_scaled_rope(rope, positions):
    assert max_positions(stretched(**rope)) == (positions, "")


def test_layers_that_quantize_all_tokens_together_are_rejected_by_name():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = torch.ao.quantization.quantize_dynamic(
            copy.deepcopy(tiny_model("qwen2", torch.float32)), {torch.nn.Linear}, torch.qint8
        )
    with pytest.raises(ValueError, match=r"Linear layers of quantize_dynamic.*weights only"):
        Inference(model, None, **SIZES)


def test_a_head_without_a_weight_tensor_is_supported():
    class Hidden(torch.nn.Module):
        def __init__(self, linear):
            super().__init__()
            self.out_features, self.packed = linear.out_features, [linear]

        def weight(self):
            raise AssertionError("unpacked")

        def forward(self, x):
            return self.packed[0](x)

    model = copy.deepcopy(tiny_model("qwen2"))
    expected = hf_generate(model, PROMPTS[0], 4, ignore_eos=True)
    model.lm_head = Hidden(model.lm_head)
    with Inference(model, None, **SIZES) as engine:
        assert tokens_of(engine.generate(PROMPTS[0], greedy(4), use_tqdm=False)) == [expected]


def test_a_peft_wrapper_is_rejected_with_a_short_message_that_names_the_remedy():
    class PeftModelForCausalLM(torch.nn.Module):
        def get_base_model(self):
            return tiny_model("gemma2")

    with pytest.raises(ValueError, match="type PeftModelForCausalLM: pass its get_base_model") as error:
        Inference(PeftModelForCausalLM(), None, **SIZES)
    assert len(str(error.value)) < 200


# --- the model's generation config -------------------------------------------------------------------------------


@pytest.fixture
def repetitive():
    """A model whose generation config sets a temperature and two options that also change greedy decoding."""
    model = copy.deepcopy(tiny_model("gemma2"))
    model.generation_config.repetition_penalty = 1.5
    model.generation_config.no_repeat_ngram_size = 2
    model.generation_config.temperature = 0.7
    return model


def warnings_of(caplog):
    return [record.getMessage() for record in caplog.records if "generation_config" in record.getMessage()]


def test_settings_of_the_model_that_a_request_does_not_apply_are_logged_once(repetitive, caplog):
    with Inference(repetitive, None, **SIZES) as engine:
        for _ in range(2):
            engine.generate(PROMPTS, greedy(2), use_tqdm=False)
            engine.add_request(PROMPTS[0], greedy(1))
            engine.run_one_step()
    (message,) = warnings_of(caplog)
    assert "no_repeat_ngram_size=2" in message and "repetition_penalty=1.5" in message
    assert "temperature" not in message, "temperature has no effect on a greedy request"


@pytest.mark.parametrize("warns", [True, False])
def test_a_shared_engine_logs_these_settings_unless_warns_of_defaults_is_false(repetitive, caplog, warns):
    with Inference(repetitive, None, **SIZES) as engine:
        engine.input_processor.warns_of_defaults = warns

        async def ask():
            async with AsyncInference(engine) as shared:
                await shared.generate(PROMPTS[0], greedy(1))

        run(ask())
    assert len(warnings_of(caplog)) == warns


def test_a_request_that_applies_the_settings_of_its_model_logs_nothing(caplog):
    model = copy.deepcopy(tiny_model("gemma2"))
    model.generation_config.repetition_penalty = 1.5
    expected = hf_generate(model, PROMPTS[1], 8, ignore_eos=True)
    with Inference(model, None, **SIZES) as engine:
        params = SamplingParams(temperature=0, repetition_penalty=1.5, max_tokens=8, ignore_eos=True)
        assert tokens_of(engine.generate(PROMPTS[1], params, use_tqdm=False)) == [expected]
    assert warnings_of(caplog) == []
    assert expected != hf_generate(own_model("plain"), PROMPTS[1], 8, ignore_eos=True)


def test_the_exactness_oracle_ignores_the_generation_config_and_restores_it(repetitive):
    config = repetitive.generation_config
    plain = hf_generate(own_model("plain"), PROMPTS[1], 8)
    assert neutral_generate(repetitive, PROMPTS[1], 8) == plain != hf_generate(repetitive, PROMPTS[1], 8)
    assert repetitive.generation_config is config
    with pytest.raises(OSError), plain_generation(repetitive):
        raise OSError
    assert repetitive.generation_config is config


@pytest.mark.parametrize(
    ("stated", "defaults"),
    [
        ({}, {}),
        (dict(do_sample=False), dict(temperature=0.0)),
        (
            dict(do_sample=False, temperature=0.6, top_p=0.9, repetition_penalty=1.1),
            dict(temperature=0.0, repetition_penalty=1.1),
        ),
        (dict(do_sample=True, temperature=0.6, top_p=0.9, top_k=20), dict(temperature=0.6, top_p=0.9, top_k=20)),
        (dict(max_new_tokens=7, min_new_tokens=2, min_p=0.1), dict(max_tokens=7, min_tokens=2, min_p=0.1)),
    ],
    ids=str,
)
def test_the_default_sampling_parameters_are_those_of_the_generation_config(stated, defaults):
    assert sampling_defaults(GenerationConfig(**stated)) == defaults


def test_the_engine_returns_the_default_sampling_parameters_of_its_model(repetitive):
    with Inference(repetitive, None, **SIZES) as engine:
        params = engine.get_default_sampling_params()
    assert (params.temperature, params.repetition_penalty) == (0.7, 1.5)
    assert not_expressed(repetitive.generation_config) == {"no_repeat_ngram_size": 2}


def test_a_minimum_of_tokens_beyond_the_default_maximum_raises_the_maximum():
    config = GenerationConfig(min_new_tokens=20)
    assert sampling_defaults(config) == {"min_tokens": 20}
    assert (default_params(config).min_tokens, default_params(config).max_tokens) == (20, 20)


# --- the locale --------------------------------------------------------------------------------------------------


def test_the_command_starts_in_an_ascii_locale():
    ascii_only = os.environ | dict(LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")
    command = [sys.executable, "-c", "from flex_nano_vllm.cli import main; main()", "--help"]
    run = subprocess.run(command, env=ascii_only, capture_output=True)
    assert run.returncode == 0, run.stderr.decode(errors="replace")
    assert b"serve" in run.stdout
