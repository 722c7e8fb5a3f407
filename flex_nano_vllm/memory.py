"""How many bytes there are, and how many a KV pool takes. Knows nothing of requests."""

import contextlib
from pathlib import Path

import psutil
import torch
from transformers import PreTrainedModel

from flex_nano_vllm.patching import attention_layers, kv_shape

# A pool may fill a GPU; on a CPU the rest of the machine wants to live too.
DEFAULT_SHARE = {"cuda": 0.9}
DEFAULT_SHARE_ELSEWHERE = 0.5


def free_bytes(device: torch.device) -> int:
    """Bytes that can still be allocated on the device, within the limit of a container where there is one."""
    if device.type == "cuda":
        # What torch's caching allocator holds but does not use counts as free.
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    free = psutil.virtual_memory().available
    cgroup = Path("/sys/fs/cgroup")  # version 2, as Docker and Kubernetes mount it
    with contextlib.suppress(OSError, ValueError):  # no cgroup, or its limit is "max"
        limit, used = (int((cgroup / name).read_text()) for name in ("memory.max", "memory.current"))
        statistics = dict(line.split() for line in (cgroup / "memory.stat").read_text().splitlines())
        free = min(free, limit - used + int(statistics["file"]))  # the page cache gives way
    return free


def step_bytes(model: PreTrainedModel, max_batch_size: int) -> int:
    """Bytes that the largest temporaries of a step take: logits, and their probabilities and sums in float64."""
    return max_batch_size * model.get_input_embeddings().num_embeddings * 3 * 8


def page_bytes(model: PreTrainedModel, page_size: int, num_rows: int) -> int:
    """Bytes that one page costs: keys and values of every layer, and its column in the inverse page table."""
    num_kv_heads, head_dim = kv_shape(model)
    kv_bytes = 2 * len(attention_layers(model)) * num_kv_heads * head_dim * page_size * model.dtype.itemsize
    return kv_bytes + 4 * num_rows


def pool_size(model: PreTrainedModel, page_size: int, max_batch_size: int, max_seq_length: int) -> int:
    """Default number of pages: what `max_batch_size` sequences of `max_seq_length` need, as far as memory allows."""
    device = model.device
    share = DEFAULT_SHARE.get(device.type, DEFAULT_SHARE_ELSEWHERE)
    free = max(0, free_bytes(device) - step_bytes(model, max_batch_size))
    per_page = page_bytes(model, page_size, max_batch_size + 1)
    affordable = int(share * free) // per_page
    if affordable < 2:
        raise ValueError(
            f"no memory for a KV pool on {device}: a page of {page_size} tokens takes {per_page / 1e9:,.3f} GB, "
            f"{free / 1e9:,.3f} GB are free for it besides the logits of max_batch_size={max_batch_size} "
            f"requests, and the default pool takes {share:.0%} of that"
        )
    return min(affordable, 1 + max_batch_size * -(-max_seq_length // page_size))


def check_pool_fits(model: PreTrainedModel, n_pages: int, page_size: int, max_batch_size: int) -> None:
    """Raises ValueError, with the numbers and what would fit, when a pool is larger than free memory."""
    per_page = page_bytes(model, page_size, max_batch_size + 1)
    free = max(0, free_bytes(model.device) - step_bytes(model, max_batch_size))
    if n_pages * per_page > free:
        raise ValueError(
            f"a KV pool of {n_pages:,} pages of {page_size} tokens needs {n_pages * per_page / 1e9:,.1f} GB, but "
            f"{free / 1e9:,.1f} GB are free for it on {model.device}: at most n_pages={free // per_page:,} fits"
        )
