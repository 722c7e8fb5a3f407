"""Loads models and tokenizers from folders and the hub, and rejects unsupported ones. Independent of the engine."""

from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

# Trained for this package (examples/train_tiny_gemma2.py), and small enough to be included in it
EMBEDDED_MODELS = {"tiny-gemma2": Path(__file__).parent / "tiny_gemma2"}


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
