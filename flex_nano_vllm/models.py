"""The Hugging Face model of an engine: loads it, reads its properties, checks whether it is supported and can be
compiled, and detects changes of its weights. Independent of requests and steps.
"""

import functools
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from flex_nano_vllm.device import why_not_compiled
from flex_nano_vllm.linear import repack_weights
from flex_nano_vllm.masks import LayerMask, layer_mask
from flex_nano_vllm.sampling_params import is_int

logger = logging.getLogger(__name__)

# Trained for this package (examples/train_tiny_gemma2.py), and small enough to be included in it
EMBEDDED_MODELS = {"tiny-gemma2": Path(__file__).parent / "tiny_gemma2"}
# tests/test_exactness.py compares the tokens of each of these types with Hugging Face's `generate`.
SUPPORTED_MODEL_TYPES = ("gemma2", "gemma3_text", "llama", "mistral", "qwen2", "qwen3")


@dataclass(frozen=True)
class ModelSpec:
    """The properties of a model that the engine depends on. `spec_of` reads them once."""

    masks: tuple[LayerMask, ...]  # of each layer
    num_heads: int
    num_kv_heads: int
    head_dim: int  # the same in every layer, as are the numbers of heads
    num_embeddings: int  # number of token ids that a prompt may contain
    num_logits: int  # number of token ids that can be generated
    max_positions: int  # most tokens of a sequence
    eos_token_ids: frozenset[int]
    dtype: torch.dtype
    device: torch.device


def check_supported(model: PreTrainedModel) -> None:
    """Check that paged attention computes the model correctly. Raises ValueError with the reason if it does not."""
    if not isinstance(model, PreTrainedModel):
        got = f"model must be a loaded transformers model, not an object of type {type(model).__name__}"
        if hasattr(model, "get_base_model"):  # PEFT's wrapper; the layers of the base model contain the adapters
            raise ValueError(f"{got}: pass its get_base_model()")
        raise ValueError(f"{got}: see Inference.from_pretrained")
    name, config = type(model).__name__, model.config
    if config.model_type not in SUPPORTED_MODEL_TYPES:
        supported = ", ".join(SUPPORTED_MODEL_TYPES)
        raise ValueError(f"{name} (model_type {config.model_type!r}) is not supported; supported are {supported}")
    if model.get_output_embeddings() is None:
        raise ValueError(f"{name} has no language-model head: load it with AutoModelForCausalLM")
    if getattr(config, "use_bidirectional_attention", False):
        raise ValueError(f"{name} uses bidirectional attention (use_bidirectional_attention), which cannot be paged")
    rope = config.rope_parameters
    for parameters in [entry for entry in rope.values() if isinstance(entry, dict)] or [rope]:
        # Both types choose their frequencies by the longest sequence of a call, and a call contains many sequences.
        if parameters.get("rope_type") in ("dynamic", "longrope"):
            raise ValueError(f"{name} uses rope_type {parameters['rope_type']!r}, which depends on the batch")
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


def max_positions(model: PreTrainedModel) -> int:
    """Return the number of positions of a model: `max_position_embeddings`, or more if RoPE is scaled.

    YaRN supports `factor` times `original_max_position_embeddings`. Linear scaling supports `factor` times the number
    in the config. If a config has one RoPE for each layer type (Gemma-3), its number already includes the scaling.
    """
    config, rope = model.config, model.config.rope_parameters
    stated, kind = config.max_position_embeddings, rope.get("rope_type")
    if kind not in ("yarn", "linear"):
        return stated
    original = rope.get("original_max_position_embeddings") if kind == "yarn" else None
    return max(stated, int((original or stated) * rope["factor"]))


def attention_layers(model: PreTrainedModel) -> list[nn.Module]:
    return [layer.self_attn for layer in model.get_decoder().layers]


def layer_windows(model: PreTrainedModel) -> list[int | None]:
    """Return the sliding window of each layer, as the model passes it to its attention function.

    None means full attention.
    """
    # Mistral's layers have no `sliding_window` attribute and read the config. Llama's layers do not read it.
    default = model.config.sliding_window if model.config.model_type == "mistral" else None
    return [getattr(attention, "sliding_window", default) for attention in attention_layers(model)]


def spec_of(model: PreTrainedModel) -> ModelSpec:
    """Read the properties of a model. Raises ValueError with the reason if `check_supported` rejects the model."""
    check_supported(model)
    config, head = model.config, model.get_output_embeddings()
    weight = getattr(head, "weight", None)  # a quantised head may not have it as a tensor
    return ModelSpec(
        masks=tuple(layer_masks(model)),
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        num_embeddings=model.get_input_embeddings().num_embeddings,
        num_logits=len(weight) if isinstance(weight, Tensor) else head.out_features,
        max_positions=max_positions(model),
        eos_token_ids=_eos_token_ids(model.generation_config, config),
        dtype=model.dtype,
        device=model.device,
    )


def _eos_token_ids(*configs: object) -> frozenset[int]:
    """Return all EOS token ids of the configs. Chat models have more than one."""
    ids = [getattr(config, "eos_token_id", None) for config in configs]
    return frozenset(i for entry in ids if entry is not None for i in ([entry] if is_int(entry) else entry))


def layer_masks(model: PreTrainedModel) -> list[LayerMask]:
    """Return the mask of each layer. To try another mask, return it here."""
    return [layer_mask(window) for window in layer_windows(model)]


def resolve_compile(compile: bool | None, spec: ModelSpec, page_size: int) -> bool:
    """Return whether to compile, given the option of `Inference`. Raises ValueError if it is True but impossible."""
    obstacle = why_not_compiled(spec.device, spec.dtype, page_size)
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
