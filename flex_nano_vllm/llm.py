"""`LLM(path)`: the engine by the name and with the options of vLLM and nano-vllm. Knows nothing but those names."""

import torch
from transformers import PreTrainedTokenizerBase

from flex_nano_vllm.inference import Inference
from flex_nano_vllm.loading import load

# vLLM's names of options of `Inference`.
RENAMED = {
    "max_model_len": "max_seq_length",
    "max_num_seqs": "max_batch_size",
    "num_gpu_blocks_override": "n_pages",
    "block_size": "page_size",
}


class LLM(Inference):
    """Loads a model and is its engine, so that scripts for vLLM and nano-vllm run with the import changed.

        llm = LLM("tiny-gemma2")
        outputs = llm.generate(["The 12 months are"], SamplingParams(temperature=0))
        print(outputs[0].outputs[0].text)  # vLLM's shape; nano-vllm's outputs[0]["text"] is the same

    Args:
        model: a folder, a hub id, or "tiny-gemma2".
        dtype, device: as in `Inference.from_pretrained`.
        enforce_eager: do not compile.
        tensor_parallel_size: 1; there is no more than one device to an engine.
        trust_remote_code: False; no code that comes with a model is run.
        options: those of `Inference`, by its names or by vLLM's: max_model_len, max_num_seqs, block_size,
            num_gpu_blocks_override, max_num_batched_tokens, enable_prefix_caching.
    Raises:
        ValueError: for what `Inference` and `from_pretrained` refuse, more than one device, code of the model's.
        TypeError: for an option that neither knows.
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
                    raise TypeError(f"{name} and {ours} are the same option")
                options[ours] = options.pop(name)
        if enforce_eager:
            options.setdefault("compile", False)
        super().__init__(*load(model, dtype, device), **options)

    @classmethod
    def from_pretrained(cls, path_or_id: str, **options: object) -> "LLM":
        """The same as `LLM(path_or_id, ...)`."""
        return cls(path_or_id, **options)

    def get_tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer."""
        return self.tokenizer
