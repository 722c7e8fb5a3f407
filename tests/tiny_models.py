"""Tiny random models of every supported architecture, and Hugging Face's `generate` as the oracle."""

import functools

import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

VOCABULARY = 211
WINDOW = 12

_COMMON = dict(
    vocab_size=VOCABULARY,
    hidden_size=48,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=512,
    initializer_range=0.3,  # logits that differ, and attention scores large enough for a softcap to matter
    pad_token_id=0,
    eos_token_id=1,
    bos_token_id=2,
    tie_word_embeddings=False,  # tied and random, a model repeats its last token whatever its attention does
)

CONFIGS = {
    "gemma2": lambda: Gemma2Config(
        **_COMMON,
        head_dim=16,
        query_pre_attn_scalar=20,
        sliding_window=WINDOW,
        attn_logit_softcapping=5.0,
        final_logit_softcapping=10.0,
    ),
    "gemma3_text": lambda: Gemma3TextConfig(
        **_COMMON,
        head_dim=16,
        query_pre_attn_scalar=20,
        sliding_window=WINDOW,
        layer_types=["sliding_attention", "full_attention"],
    ),
    "llama": lambda: LlamaConfig(**_COMMON),
    "mistral": lambda: MistralConfig(**_COMMON, head_dim=16, sliding_window=WINDOW),
    "qwen2": lambda: Qwen2Config(**_COMMON),
    "qwen3": lambda: Qwen3Config(**_COMMON, head_dim=16),
}


@functools.cache
def tiny_model(architecture: str, dtype: torch.dtype = torch.float64) -> PreTrainedModel:
    """The same weights on every call, rounded to `dtype`. Shared between tests: engines must give it back."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(
            CONFIGS[architecture](), dtype=torch.float64, attn_implementation="eager"
        )
    return model.to(dtype).eval()


def hf_generate(model: PreTrainedModel, prompt: list[int], max_new_tokens: int, ignore_eos: bool = False) -> list[int]:
    """Greedy tokens of one prompt alone, by transformers."""
    options = dict(eos_token_id=None) if ignore_eos else {}
    input_ids = torch.tensor([prompt], device=model.device)
    output = model.generate(
        input_ids,
        attention_mask=torch.ones_like(input_ids),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        pad_token_id=0,
        **options,
    )
    return output[0, len(prompt) :].tolist()
