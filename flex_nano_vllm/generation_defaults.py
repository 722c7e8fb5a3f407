"""What a model's `generation_config` says about sampling: what `SamplingParams` can express, and what it cannot.
Knows no engine.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import GenerationConfig, PreTrainedModel

from flex_nano_vllm.sampling_params import SamplingParams

# Fields of GenerationConfig by their names in SamplingParams, and the values that change nothing. `max_length`, which
# counts the prompt too, is in no table: how long an output may be is the request's choice and the engine's limit.
EXPRESSED = {
    "temperature": ("temperature", 1.0),
    "top_k": ("top_k", 0),
    "top_p": ("top_p", 1.0),
    "min_p": ("min_p", 0.0),
    "repetition_penalty": ("repetition_penalty", 1.0),
    "min_new_tokens": ("min_tokens", 0),
    "max_new_tokens": ("max_tokens", None),
}
OF_DRAWS = ("temperature", "top_k", "top_p", "min_p")  # they matter only where tokens are drawn
# What changes the tokens of `generate` and has no counterpart here, and the values that change nothing.
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
    """The arguments of `SamplingParams` that a model's config states. `do_sample=False` is temperature 0, if it is
    stated.

    Raises:
        ValueError: for a value that `SamplingParams` refuses.
    """
    stated = {ours: getattr(config, theirs, None) for theirs, (ours, _) in EXPRESSED.items()}
    defaults = {name: value for name, value in stated.items() if value is not None}
    if config.do_sample is False:
        defaults = {name: value for name, value in defaults.items() if name not in OF_DRAWS} | {"temperature": 0.0}
    SamplingParams(**defaults)
    return defaults


def not_expressed(config: GenerationConfig) -> dict[str, Any]:
    """What a model's config states that no parameter here can do."""
    stated = {name: getattr(config, name, None) for name in NOT_EXPRESSED}
    return {name: value for name, value in stated.items() if value not in (None, [], NOT_EXPRESSED[name])}


def not_applied(config: GenerationConfig, params: SamplingParams) -> dict[str, Any]:
    """What `model.generate` does and a request with these parameters does not: names and values in the config."""
    missing = not_expressed(config)
    of_draws = OF_DRAWS if params.greedy or config.do_sample is False else ()
    for theirs, (ours, neutral) in EXPRESSED.items():
        value = getattr(config, theirs, None)
        is_chosen = getattr(params, ours) != neutral  # by the request
        if theirs not in ("max_new_tokens", *of_draws) and value not in (None, neutral) and not is_chosen:
            missing[theirs] = value
    return missing


@contextmanager
def plain_generation(model: PreTrainedModel) -> Iterator[None]:
    """Let `model.generate` choose tokens by the model alone: its EOS, and nothing else of its generation config."""
    config = model.generation_config
    names = ("eos_token_id", "bos_token_id", "pad_token_id")
    model.generation_config = GenerationConfig(**{name: getattr(config, name) for name in names})
    try:
        yield
    finally:
        model.generation_config = config
