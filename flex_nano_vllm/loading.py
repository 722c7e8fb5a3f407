"""Models and tokenizers from folders and the hub, and what is refused of them. Knows no engine."""

from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

# Trained for this package (examples/train_tiny_gemma2.py), and small enough to be part of it.
EMBEDDED_MODELS = {"tiny-gemma2": Path(__file__).parent / "tiny_gemma2"}


def load(
    path_or_id: str, dtype: torch.dtype | str = "auto", device: torch.device | str | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model and tokenizer of a folder, a hub id, or "tiny-gemma2", the little trained model in this package.

    `device` defaults to the GPU where there is one. Weights are read from safetensors only, and no code that comes with
    a model is run: a repository that asks for it is refused with a ValueError.
    """
    path_or_id = str(EMBEDDED_MODELS.get(path_or_id, path_or_id))
    refusal = f"{path_or_id} brings its own code (auto_map): load the model yourself if you trust it"
    try:
        config = AutoConfig.from_pretrained(path_or_id, trust_remote_code=False)
    except ValueError as error:
        raise ValueError(refusal if "trust_remote_code" in str(error) else str(error)) from error
    if getattr(config, "auto_map", None):
        raise ValueError(refusal)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = AutoTokenizer.from_pretrained(path_or_id, trust_remote_code=False)
    if len(tokenizer) <= len(tokenizer.all_special_tokens):
        raise ValueError(f"{path_or_id} has no tokenizer (or one that knows no tokens): pass model and tokenizer")
    model = AutoModelForCausalLM.from_pretrained(
        path_or_id, dtype=dtype, device_map=device, use_safetensors=True, trust_remote_code=False
    )
    return model, tokenizer
