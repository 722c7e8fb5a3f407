"""The benchmark's workload: the same requests for every engine on every machine. Uses only the standard library."""

import hashlib
import json
import random
from dataclasses import dataclass, field

TOKEN_IDS = range(5, 259)  # ordinary tokens of every vocabulary; tiny-gemma2 has five special tokens before them


@dataclass(frozen=True)
class WorkloadRequest:
    """A prompt and the exact number of tokens to generate for it."""

    prompt_token_ids: tuple[int, ...]
    max_tokens: int


def make_workload(
    num_requests: int,
    prompt_lens: tuple[int, int],
    output_lens: tuple[int, int],
    token_ids: range,
    seed: int,
) -> list[WorkloadRequest]:
    """Return requests with uniformly drawn lengths and tokens. Length ranges include both ends.

    `random.Random` gives the same sequence in all Python versions and processes. (`hash()` of a string is salted per
    process and would give every run another workload.)
    """
    rng = random.Random(seed)
    return [
        WorkloadRequest(
            prompt_token_ids=tuple(rng.choices(token_ids, k=rng.randint(*prompt_lens))),
            max_tokens=rng.randint(*output_lens),
        )
        for _ in range(num_requests)
    ]


def digest(requests: list[WorkloadRequest]) -> str:
    """Return a short hash of the workload. Two runs can be compared only if their hashes are equal."""
    content = json.dumps([[request.prompt_token_ids, request.max_tokens] for request in requests])
    return hashlib.sha256(content.encode()).hexdigest()[:16]


DEFAULT_MODELS = {"cuda": "google/gemma-2-2b", "cpu": "tiny-gemma2"}


@dataclass
class RunOptions:
    """Options that the benchmarks of all engines share. The default of a size that is None depends on the device, see
    `fill_in`.
    """

    model: str | None = field(
        default=None,
        metadata={
            "help": "folder, hub id, tiny-gemma2, or a shape with random weights (gemma2-tiny, gemma2-small, "
            "qwen3-tiny, gemma-2-2b); default: google/gemma-2-2b on a GPU, tiny-gemma2 on a CPU"
        },
    )
    dtype: str | None = field(default=None, metadata={"help": "default: bfloat16 on a GPU, float32 on a CPU"})
    num_requests: int | None = field(default=None, metadata={"help": "default: 512 on a GPU, 64 on a CPU"})
    min_prompt_len: int = 1
    max_prompt_len: int = 512
    min_new_tokens: int | None = field(default=None, metadata={"help": "default: 128 on a GPU, 32 on a CPU"})
    max_new_tokens: int | None = field(default=None, metadata={"help": "default: 512 on a GPU, 128 on a CPU"})
    max_batch_size: int | None = field(default=None, metadata={"help": "default: 256 on a GPU, 32 on a CPU"})
    max_seq_length: int = 1024
    n_pages: int | None = field(
        default=None, metadata={"help": "pages of the KV pool; default: what the batch can need"}
    )
    page_size: int | None = field(default=None, metadata={"help": "default: 128 on a GPU, 64 on a CPU"})
    max_num_batched_tokens: int | None = field(default=None, metadata={"help": "token budget of a step"})
    compile: bool = True
    seed: int = 0

    def fill_in(self, device_type: str) -> None:
        """Set `dtype` and the sizes that are None to the defaults for a device type, "cuda" or "cpu".

        Raises:
            SystemExit: the longest request does not fit into `max_seq_length`.
        """
        on_gpu = device_type == "cuda"
        for name, gpu_default, cpu_default in (
            ("dtype", "bfloat16", "float32"),
            ("num_requests", 512, 64),
            ("min_new_tokens", 128, 32),
            ("max_new_tokens", 512, 128),
            ("max_batch_size", 256, 32),
            ("page_size", 128, 64),
        ):
            if getattr(self, name) is None:
                setattr(self, name, gpu_default if on_gpu else cpu_default)
        if self.max_prompt_len + self.max_new_tokens > self.max_seq_length:
            raise SystemExit(f"max_prompt_len + max_new_tokens must be at most max_seq_length={self.max_seq_length}")

    def requests(self) -> list[WorkloadRequest]:
        return make_workload(
            self.num_requests,
            prompt_lens=(self.min_prompt_len, self.max_prompt_len),
            output_lens=(self.min_new_tokens, self.max_new_tokens),
            token_ids=TOKEN_IDS,
            seed=self.seed,
        )
