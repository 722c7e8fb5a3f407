"""The sampling settings in a model's `generation_config`: those that `SamplingParams` can express, and the others.
Independent of the engine.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import GenerationConfig, PreTrainedModel

from flex_nano_vllm.sampling_params import SamplingParams

# Fields of GenerationConfig, their names in SamplingParams, and the values that have no effect. No table contains
# `max_length`, which also counts the prompt: the request and the engine's limit determine the length of an output.
EXPRESSED = {
    "temperature": ("temperature", 1.0),
    "top_k": ("top_k", 0),
    "top_p": ("top_p", 1.0),
    "min_p": ("min_p", 0.0),
    "repetition_penalty": ("repetition_penalty", 1.0),
    "min_new_tokens": ("min_tokens", 0),
    "max_new_tokens": ("max_tokens", None),
}
OF_DRAWS = ("temperature", "top_k", "top_p", "min_p")  # no effect on greedy decoding
# Fields that change the tokens of `generate` and have no counterpart here, with the values that have no effect
NOT_EXPRESSED = {
    "no_repeat_ngram_size": 0,
    "encoder_repetition_penalty": 1.0,
    "encoder_no_repeat_ngram_size": 0,
    "bad_words_ids": None,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
    "sequence_bias": None,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "exponential_decay_length_penalty": None,
    "min_length": 0,
    "stop_strings": None,
    "num_beams": 1,
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "top_h": None,
    "penalty_alpha": None,
    "dola_layers": None,
    "guidance_scale": 1.0,
    "token_healing": False,
    "watermarking_config": None,
}


def sampling_defaults(config: GenerationConfig) -> dict[str, Any]:
    """Return the arguments of `SamplingParams` that a model's config sets.

    An explicit `do_sample=False` becomes temperature 0.

    Raises:
        ValueError: `SamplingParams` rejects a value.
    """
    stated = {ours: getattr(config, theirs, None) for theirs, (ours, _) in EXPRESSED.items()}
    defaults = {name: value for name, value in stated.items() if value is not None}
    if config.do_sample is False:
        defaults = {name: value for name, value in defaults.items() if name not in OF_DRAWS} | {"temperature": 0.0}
    SamplingParams(**{"max_tokens": None} | defaults)
    return defaults


def default_params(config: GenerationConfig) -> SamplingParams:
    """Return the parameters that a model's config sets. The default `max_tokens` is raised to the config's minimum."""
    defaults = sampling_defaults(config)
    if defaults.get("min_tokens", 0) > SamplingParams.max_tokens:
        defaults.setdefault("max_tokens", defaults["min_tokens"])
    return SamplingParams(**defaults)


def not_expressed(config: GenerationConfig) -> dict[str, Any]:
    """Return the settings of a model's config that no parameter here can express."""
    stated = {name: getattr(config, name, None) for name in NOT_EXPRESSED}
    return {name: value for name, value in stated.items() if value not in (None, [], NOT_EXPRESSED[name])}


def not_applied(config: GenerationConfig, params: SamplingParams) -> dict[str, Any]:
    """Return the settings that `model.generate` applies and a request with these parameters does not, by name."""
    missing = not_expressed(config)
    of_draws = OF_DRAWS if params.greedy or config.do_sample is False else ()
    for theirs, (ours, neutral) in EXPRESSED.items():
        value = getattr(config, theirs, None)
        is_chosen = getattr(params, ours) != neutral  # the request sets its own value
        if theirs not in ("max_new_tokens", *of_draws) and value not in (None, neutral) and not is_chosen:
            missing[theirs] = value
    return missing


@contextmanager
def plain_generation(model: PreTrainedModel) -> Iterator[None]:
    """Make `model.generate` ignore the model's generation config in this context, except for its special token ids."""
    config = model.generation_config
    names = ("eos_token_id", "bos_token_id", "pad_token_id")
    model.generation_config = GenerationConfig(**{name: getattr(config, name) for name in names})
    try:
        yield
    finally:
        model.generation_config = config
