"""How many bytes there are, and how many a KV pool takes. Knows nothing of requests."""

import bisect
import contextlib
from collections import Counter
from dataclasses import replace
from pathlib import Path

import psutil
import torch
from transformers import PreTrainedModel

from flex_nano_vllm.geometry import Geometry
from flex_nano_vllm.patching import kv_shape

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
        limit, used = (int((cgroup / name).read_text(encoding="utf-8")) for name in ("memory.max", "memory.current"))
        statistics = dict(line.split() for line in (cgroup / "memory.stat").read_text(encoding="utf-8").splitlines())
        free = min(free, limit - used + int(statistics["file"]))  # the page cache gives way
    return free


def step_bytes(model: PreTrainedModel, geometry: Geometry) -> int:
    """Bytes that the largest temporaries of a step take: logits, and their probabilities and sums in float64; or, where
    prompts are rated, logits of all tokens of a step, and a copy."""
    of_samples = geometry.max_batch_size * 3 * 8
    num_tokens = min(geometry.max_num_batched_tokens, geometry.max_batch_size * geometry.max_seq_length)
    of_prompts = num_tokens * 2 * model.dtype.itemsize
    return max(of_samples, of_prompts) * model.get_input_embeddings().num_embeddings


def token_bytes(model: PreTrainedModel) -> int:
    """Bytes of a token's keys and values in one layer."""
    num_kv_heads, head_dim = kv_shape(model)
    return 2 * num_kv_heads * head_dim * model.dtype.itemsize


def kv_bytes(model: PreTrainedModel, geometry: Geometry) -> int:
    """Bytes of all pools: keys and values of their layers, and a column in the inverse page table for each page."""
    num_layers = Counter(map(geometry.pool_of, geometry.layer_windows))
    page_of_layer = geometry.page_size * token_bytes(model)
    column = 4 * (geometry.max_batch_size + 1)
    return sum(n_pages * (num_layers[window] * page_of_layer + column) for window, n_pages in geometry.pools.items())


def largest_pool(model: PreTrainedModel, geometry: Geometry, num_bytes: int) -> int:
    """The most pages, no more than `geometry` has, with which all pools fit into `num_bytes`; 1 if not even two do."""
    sizes = range(2, geometry.n_pages + 1)
    return 1 + bisect.bisect_right(sizes, num_bytes, key=lambda n: kv_bytes(model, replace(geometry, n_pages=n)))


def pool_size(model: PreTrainedModel, geometry: Geometry) -> int:
    """Default number of pages: what all rows need for sequences of `max_seq_length`, as far as memory allows."""
    device = model.device
    enough = 1 + geometry.max_batch_size * geometry.most_pages(geometry.max_seq_length)
    geometry = replace(geometry, n_pages=enough)
    share = DEFAULT_SHARE.get(device.type, DEFAULT_SHARE_ELSEWHERE)
    free = max(0, free_bytes(device) - step_bytes(model, geometry))
    affordable = largest_pool(model, geometry, int(share * free))
    if affordable < 2:
        per_page = kv_bytes(model, replace(geometry, n_pages=2)) / 2
        raise ValueError(
            f"no memory for a KV pool on {device}: a page of {geometry.page_size} tokens takes "
            f"{per_page / 1e9:,.3f} GB, {free / 1e9:,.3f} GB are free for it besides the logits of "
            f"max_batch_size={geometry.max_batch_size} "
            f"requests, and the default pool takes {share:.0%} of that"
        )
    return affordable


def check_pool_fits(model: PreTrainedModel, geometry: Geometry) -> None:
    """Raises ValueError, with the numbers and what would fit, when the pools are larger than free memory."""
    needed = kv_bytes(model, geometry)
    free = max(0, free_bytes(model.device) - step_bytes(model, geometry))
    if needed > free:
        raise ValueError(
            f"a KV pool of {geometry.n_pages:,} pages of {geometry.page_size} tokens needs {needed / 1e9:,.1f} GB, but "
            f"{free / 1e9:,.1f} GB are free for it on {model.device}: at most "
            f"n_pages={largest_pool(model, geometry, free):,} fits"
        )
