"""A minimal vLLM-style inference engine in which all attention is PyTorch FlexAttention."""

from flex_nano_vllm.async_inference import AsyncInference
from flex_nano_vllm.attention import PagedKVCache
from flex_nano_vllm.inference import Inference
from flex_nano_vllm.llm import LLM
from flex_nano_vllm.outputs import CompletionDelta, CompletionOutput, Logprob, RequestOutput
from flex_nano_vllm.page_table import PageTable
from flex_nano_vllm.patching import patch_model, unpatch_model
from flex_nano_vllm.sampling_params import SamplingParams, StructuredOutputsParams

__all__ = [
    "LLM",
    "AsyncInference",
    "CompletionDelta",
    "CompletionOutput",
    "Inference",
    "Logprob",
    "PageTable",
    "PagedKVCache",
    "RequestOutput",
    "SamplingParams",
    "StructuredOutputsParams",
    "patch_model",
    "unpatch_model",
]
__version__ = "0.1.0"
