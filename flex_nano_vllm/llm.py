"""`LLM(path)`: the engine under the class name and the option names of vLLM and nano-vllm. Adds only these names."""

import torch
from transformers import PreTrainedTokenizerBase

from flex_nano_vllm.inference import Inference
from flex_nano_vllm.models import load

# Options of vLLM, and their names in `Inference`
RENAMED = {
    "max_model_len": "max_seq_length",
    "max_num_seqs": "max_batch_size",
    "num_gpu_blocks_override": "n_pages",
    "block_size": "page_size",
    "scheduling_policy": "policy",
}


class LLM(Inference):
    """An engine that loads its own model, so that scripts for vLLM and nano-vllm run with a changed import.

        llm = LLM("tiny-gemma2")
        outputs = llm.generate(["The 12 months are"], SamplingParams(temperature=0))
        print(outputs[0].outputs[0].text)  # as in vLLM; nano-vllm's outputs[0]["text"] works too

    Args:
        model: a folder, a hub id, or "tiny-gemma2".
        dtype, device: as in `Inference.from_pretrained`.
        enforce_eager: do not compile.
        tensor_parallel_size: must be 1, because an engine runs on one device.
        trust_remote_code: must be False; code that comes with a model is never run.
        options: options of `Inference`, under its names or vLLM's: max_model_len, max_num_seqs, block_size,
            num_gpu_blocks_override, max_num_batched_tokens, scheduling_policy, enable_prefix_caching.
    Raises:
        ValueError: `Inference` or `from_pretrained` rejects an argument, `tensor_parallel_size` is not 1, or
            `trust_remote_code` is set.
        TypeError: an option is unknown, or given under both of its names.
    """

    def __init__(
        self,
        model: str,
        *,
        dtype: torch.dtype | str = "auto",
        device: torch.device | str | None = None,
        enforce_eager: bool = False,
        tensor_parallel_size: int = 1,
        trust_remote_code: bool = False,
        **options: object,
    ):
        if tensor_parallel_size != 1:
            raise ValueError(f"tensor_parallel_size must be 1, got {tensor_parallel_size!r}")
        if trust_remote_code:
            raise ValueError("trust_remote_code: load the model yourself if you trust it, and build Inference on it")
        for name, ours in RENAMED.items():
            if name in options:
                if ours in options:
                    raise TypeError(f"{name} and {ours} are the same option: pass only one of them")
                options[ours] = options.pop(name)
        if enforce_eager:
            options.setdefault("compile", False)
        super().__init__(*load(model, dtype, device), **options)

    @classmethod
    def from_pretrained(cls, path_or_id: str, **options: object) -> "LLM":
        """Same as `LLM(path_or_id, ...)`."""
        return cls(path_or_id, **options)

    def get_tokenizer(self) -> PreTrainedTokenizerBase:
        """Return the tokenizer."""
        return self.tokenizer
