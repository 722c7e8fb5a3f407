"""Models of known shapes with random weights, and a byte tokenizer, for machines without access to a model hub.

Random weights generate noise, but reproducible noise. They cost as much as trained weights, and are as suitable to
check that two engines give equal outputs.
"""

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
)

SPECIAL_TOKENS = ("<pad>", "<eos>", "<bos>")
BYTE_VOCABULARY = len(SPECIAL_TOKENS) + 256

TINY = dict(
    vocab_size=8192,
    hidden_size=256,
    intermediate_size=1024,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=64,
    max_position_embeddings=8192,
)
GEMMA_2_2B = dict(
    vocab_size=256_000,
    hidden_size=2304,
    intermediate_size=9216,
    num_hidden_layers=26,
    num_attention_heads=8,
    num_key_value_heads=4,
    head_dim=256,
    query_pre_attn_scalar=256,
    sliding_window=4096,
    max_position_embeddings=8192,
)
MINI = dict(
    vocab_size=512,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=16,
    query_pre_attn_scalar=16,
    sliding_window=128,
    max_position_embeddings=512,
)
# By name: the model's configuration class and its sizes. A Gemma-2 model for interpreted kernels, two for two CPU
# cores, one model without the special features of Gemma-2, the shape of google/gemma-2-2b, and eight layers of that
# shape with a small vocabulary.
SHAPES = {
    "gemma2-mini": (Gemma2Config, MINI),
    "gemma2-tiny": (Gemma2Config, TINY | dict(query_pre_attn_scalar=64, sliding_window=512)),
    "gemma2-small": (
        Gemma2Config,
        dict(
            vocab_size=32_000,
            hidden_size=768,
            intermediate_size=3072,
            num_hidden_layers=12,
            num_attention_heads=8,
            num_key_value_heads=4,
            head_dim=128,
            query_pre_attn_scalar=128,
            sliding_window=512,
            max_position_embeddings=8192,
        ),
    ),
    "qwen3-tiny": (Qwen3Config, TINY | dict(tie_word_embeddings=True)),
    "gemma-2-2b": (Gemma2Config, GEMMA_2_2B),
    "gemma-2-2b-short": (Gemma2Config, GEMMA_2_2B | dict(num_hidden_layers=8, vocab_size=8192)),
}
# Smaller than Gemma's 50 for attention: random scores are small, and an engine without the cap must give other tokens.
SOFTCAPS = dict(attn_logit_softcapping=4.0, final_logit_softcapping=30.0)


def random_model(shape: str, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> PreTrainedModel:
    """Return a model of a named shape in eval mode. The weights are the same every time on devices of one kind."""
    config_class, sizes = SHAPES[shape]
    config = config_class(
        **sizes,
        **(SOFTCAPS if config_class is Gemma2Config else {}),
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=2,
        initializer_range=1.3 / sizes["hidden_size"] ** 0.5,  # large enough that attention prefers some tokens
    )
    with torch.random.fork_rng(devices=[device] if torch.device(device).type == "cuda" else []), torch.device(device):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="eager")
    # With tied embeddings, the last token has the highest logit in a random model, which repeats it forever. With small
    # embeddings, the layers determine the next token. The final norm compensates for the smaller logits.
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(0.1)
        model.get_decoder().norm.weight.fill_(15.0)
    return model.eval()


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer with one token per UTF-8 byte after `<pad>`, `<eos>`, `<bos>`. It adds BOS like Gemma's."""
    alphabet = [*SPECIAL_TOKENS, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 2)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", bos_token="<bos>")
