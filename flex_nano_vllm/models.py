"""The Hugging Face model of an engine: loads it, checks whether it is supported and can be compiled, states its
properties, and detects changes of its weights. Independent of requests and steps.
"""

import functools
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from flex_nano_vllm.device import why_not_compiled
from flex_nano_vllm.linear import repack_weights
from flex_nano_vllm.masks import LayerMask
from flex_nano_vllm.probe import AttentionLayer, Probe, observe, verify
from flex_nano_vllm.sampling_params import is_int

logger = logging.getLogger(__name__)

# Trained for this package (examples/train_tiny_gemma2.py), and small enough to be included in it
EMBEDDED_MODELS = {"tiny-gemma2": Path(__file__).parent / "tiny_gemma2"}


@dataclass(frozen=True)
class ModelSpec:
    """The properties of a model that the engine depends on. `spec_of` reads them once."""

    layers: tuple[AttentionLayer, ...]
    masks: tuple[LayerMask, ...]  # of each layer
    takes_options: bool  # see `probe.Observation`
    prunes_last_layer: bool
    num_embeddings: int  # number of token ids that a prompt may contain
    num_logits: int  # number of token ids that can be generated
    max_positions: int  # most tokens of a sequence
    positions_limit: str  # why a sequence may not be longer, if the model could compute a longer one alone
    max_step_tokens: int | None  # most tokens of a step; None: no limit
    why_uncompiled: str | None  # why the model cannot be compiled; None: nothing is known
    eos_token_ids: frozenset[int]
    dtype: torch.dtype
    device: torch.device

    # Of every layer:

    @property
    def num_heads(self) -> int:
        return self.layers[0].num_heads

    @property
    def num_kv_heads(self) -> int:
        return self.layers[0].num_kv_heads

    @property
    def key_dim(self) -> int:
        return self.layers[0].key_dim

    @property
    def value_dim(self) -> int:
        return self.layers[0].value_dim

    @property
    def head_dim(self) -> int:
        """The larger one of the two."""
        return max(self.key_dim, self.value_dim)

    @property
    def has_sinks(self) -> bool:
        return self.layers[0].has_sinks

    @property
    def windows(self) -> tuple[int | None, ...]:
        """The window of each layer that has keys of its own."""
        return tuple(mask.window for i, (layer, mask) in enumerate(zip(self.layers, self.masks)) if layer.keys_of == i)


def check_supported(model: PreTrainedModel) -> None:
    """Check what a run of the model cannot show. Raises ValueError with the reason if the model is not supported."""
    if not isinstance(model, PreTrainedModel):
        got = f"model must be a loaded transformers model, not an object of type {type(model).__name__}"
        if hasattr(model, "get_base_model"):  # PEFT's wrapper; the layers of the base model contain the adapters
            raise ValueError(f"{got}: pass its get_base_model()")
        raise ValueError(f"{got}: see Inference.from_pretrained")
    name = type(model).__name__
    if model.get_output_embeddings() is None:
        raise ValueError(f"{name} has no language-model head: load it with AutoModelForCausalLM")
    if model.config.is_encoder_decoder:
        raise ValueError(f"{name} has an encoder: only decoders are supported")
    for module in model.modules():
        if type(module).__module__.startswith("torch.ao.nn.quantized.dynamic"):
            raise ValueError(
                f"{name} has {type(module).__name__} layers of quantize_dynamic, which use one scale for all tokens of "
                "a step, so that requests would change each other's tokens: quantize the weights only (torchao)"
            )
    if model.training:
        raise ValueError(f"{name} is in training mode: call model.eval() first")
    devices = {parameter.device for parameter in model.parameters()}
    if len(devices) != 1 or "meta" in {device.type for device in devices}:
        raise ValueError(f"{name} must be on one device, but its parameters are on {sorted(map(str, devices))}")


def max_positions(model: PreTrainedModel) -> tuple[int, str]:
    """Return the most positions of a sequence, and if a step of several sequences is the reason, an explanation.

    The number is `max_position_embeddings`, or more if RoPE is scaled. YaRN supports `factor` times
    `original_max_position_embeddings`. Linear scaling supports `factor` times the number in the config. If a config has
    one RoPE for each layer type (Gemma-3), its number already includes the scaling.

    Some models compute with the length of the longest sequence of a call, which a step of several sequences does not
    have. They are right up to the length where this begins.
    """
    config = model.config.get_text_config()
    rope = getattr(config, "rope_parameters", None) or {}
    number, kind = getattr(config, "max_position_embeddings", None), rope.get("rope_type")
    if number is None:
        raise ValueError(f"{type(model).__name__} has no number of positions in its config (max_position_embeddings)")
    if kind in ("yarn", "linear"):
        original = rope.get("original_max_position_embeddings") if kind == "yarn" else None
        number = max(number, int((original or number) * rope["factor"]))
    limits = {number: ""}
    for parameters in [entry for entry in rope.values() if isinstance(entry, dict)] or [rope]:
        kind = parameters.get("rope_type")
        if kind in ("dynamic", "longrope"):
            original = parameters.get("original_max_position_embeddings") if kind == "longrope" else None
            limits[original or config.max_position_embeddings] = (
                f"; beyond, its frequencies (rope_type {kind!r}) would depend on the other sequences of a step"
            )
    if (most := _max_step_tokens(config)) is not None:
        limits[most] = "; beyond, its attn_temperature_tuning would depend on the other sequences of a step"
    number = min(limits)
    return number, limits[number]


def _max_step_tokens(config: PreTrainedConfig) -> int | None:
    """Return how many tokens a call of Llama-4 may have. Its attention counts them instead of reading their positions.

    The count changes nothing up to `floor_scale`, so that a run on a few tokens does not show it.
    """
    tuned = getattr(config, "attn_temperature_tuning", False) and hasattr(config, "floor_scale")
    return config.floor_scale - 1 if tuned else None


def spec_of(model: PreTrainedModel, verified: bool = True) -> ModelSpec:
    """Observe the properties of a model, and verify them (`probe.verify`) if `verified`.

    Raises ValueError with the reason if the model is not supported.
    """
    check_supported(model)
    if "unpatched_implementations" in vars(model):
        raise ValueError(f"{type(model).__name__} is patched: close its engine, or call unpatch_model(model)")
    num_embeddings = model.get_input_embeddings().num_embeddings
    positions, limit = max_positions(model)
    probe = Probe(model, positions, num_embeddings)
    observation, *first_run = observe(probe)
    if verified:
        observation = verify(probe, observation, *first_run)
    layers = observation.layers
    for layer in layers:
        for what in ("num_heads", "num_kv_heads", "key_dim", "value_dim", "has_sinks"):
            if getattr(layer, what) != getattr(layers[0], what):
                raise ValueError(f"{probe.title(layer.name)} has another {what} than {probe.title(layers[0].name)}")
    return ModelSpec(
        layers=layers,
        masks=tuple(layer_masks(layers)),
        takes_options=observation.takes_options,
        prunes_last_layer=observation.prunes_last_layer,
        num_embeddings=num_embeddings,
        num_logits=observation.num_logits,
        max_positions=positions,
        positions_limit=limit,
        max_step_tokens=_max_step_tokens(model.config.get_text_config()),
        why_uncompiled="rope_type 'dynamic' cannot be compiled" if "'dynamic'" in limit else None,
        eos_token_ids=_eos_token_ids(model.generation_config, model.config, model.config.get_text_config()),
        dtype=model.dtype,
        device=model.device,
    )


def _eos_token_ids(*configs: object) -> frozenset[int]:
    """Return all EOS token ids of the configs. Chat models have more than one."""
    ids = [getattr(config, "eos_token_id", None) for config in configs]
    return frozenset(i for entry in ids if entry is not None for i in ([entry] if is_int(entry) else entry))


def layer_masks(layers: tuple[AttentionLayer, ...]) -> list[LayerMask]:
    """Return the mask of each layer. To try another mask, return it here."""
    return [layer.mask for layer in layers]


def resolve_compile(compile: bool | None, spec: ModelSpec, page_size: int) -> bool:
    """Return whether to compile, given the option of `Inference`. Raises ValueError if it is True but impossible."""
    obstacle = spec.why_uncompiled or why_not_compiled(spec.device, spec.dtype, page_size)
    if compile and obstacle:
        raise ValueError(f"compile=True, but {obstacle}")
    if compile is None and obstacle:
        _warn_uncompiled(obstacle)
    return obstacle is None if compile is None else compile


@functools.cache  # once per process and reason
def _warn_uncompiled(reason: str) -> None:
    logger.warning("FlexAttention runs uncompiled: %s", reason)


def load(
    path_or_id: str, dtype: torch.dtype | str = "auto", device: torch.device | str | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load model and tokenizer from a folder, a hub id, or "tiny-gemma2", the small trained model in this package.

    `device` defaults to the GPU if there is one. Weights are read from safetensors only. Code that comes with a model
    is never run: a repository with its own code raises ValueError.
    """
    path_or_id = str(EMBEDDED_MODELS.get(path_or_id, path_or_id))
    refusal = f"{path_or_id} contains its own code (auto_map): load the model yourself if you trust it"
    try:
        config = AutoConfig.from_pretrained(path_or_id, trust_remote_code=False)
    except ValueError as error:
        raise ValueError(refusal if "trust_remote_code" in str(error) else str(error)) from error
    if getattr(config, "auto_map", None):
        raise ValueError(refusal)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = AutoTokenizer.from_pretrained(path_or_id, trust_remote_code=False)
    if len(tokenizer) <= len(tokenizer.all_special_tokens):
        raise ValueError(
            f"{path_or_id} has no tokenizer, or one without tokens: load both yourself and pass them to Inference"
        )
    model = AutoModelForCausalLM.from_pretrained(
        path_or_id, dtype=dtype, device_map=device, use_safetensors=True, trust_remote_code=False
    )
    return model, tokenizer


class WeightsWatch:
    """Detects changes of a model between two checks.

    It detects parameters that were written to (`load_state_dict`, an optimizer step) or replaced, modules that were
    replaced, and PEFT adapters that were enabled, disabled, exchanged or scaled. Packed weights (`linear.py`) cannot be
    written to, but can be replaced.

    A check costs about a microsecond per parameter. It does not detect writes through `.data` or to buffers, writes to
    parameters that were created in inference mode, or forward hooks.
    """

    def __init__(self, model: nn.Module):
        self.model = model
        self._remember()

    def has_changed(self) -> bool:
        """Return whether the model has changed since the last check. If its weights are packed, packs changed ones."""
        if not repack_weights(self.model) and self._look() == self._seen:
            return False
        self._remember()
        return True

    def _remember(self) -> None:
        modules = list(self.model.modules())
        self._parts = [part for module in modules for part in (module._parameters, module._modules) if part]
        tensors = [member for part in self._parts for member in part.values() if isinstance(member, torch.Tensor)]
        self._versioned = [tensor for tensor in tensors if not tensor.is_inference()]
        self._adapters = [module for module in modules if hasattr(module, "_disable_adapters")]
        self._seen = self._look()

    def _look(self) -> tuple[list[Any], ...]:
        members = [id(member) for part in self._parts for member in part.values()]
        versions = [tensor._version for tensor in self._versioned]
        adapters = [
            (module._disable_adapters, list(module.active_adapters), dict(getattr(module, "scaling", {})))
            for module in self._adapters
        ]
        return members, versions, adapters
