"""A minimal vLLM-style inference engine in which all attention is PyTorch FlexAttention."""

from flex_nano_vllm.attention import PagedKVCache
from flex_nano_vllm.inference import Inference
from flex_nano_vllm.page_table import PageTable
from flex_nano_vllm.patching import patch_model, unpatch_model
from flex_nano_vllm.sequence import CompletionOutput, RequestOutput, SamplingParams

__all__ = [
    "CompletionOutput",
    "Inference",
    "PageTable",
    "PagedKVCache",
    "RequestOutput",
    "SamplingParams",
    "patch_model",
    "unpatch_model",
]
__version__ = "0.1.0"
