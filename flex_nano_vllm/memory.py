"""An engine's options: their defaults and checks, sizes that fit into memory, and plans. Independent of requests."""

import bisect
from collections import Counter
from dataclasses import dataclass, replace

import torch

from flex_nano_vllm.device import free_bytes
from flex_nano_vllm.gather import page_buckets
from flex_nano_vllm.geometry import Geometry, cdiv
from flex_nano_vllm.logprobs import LOGPROB_ROWS_AT_ONCE
from flex_nano_vllm.models import ModelSpec
from flex_nano_vllm.sampler import BYTES_PER_LOGIT
from flex_nano_vllm.sampling_params import is_int, shortened
from flex_nano_vllm.scheduler import MAX_PROMPT_LOGITS

# Share of the free memory that the default pool takes. On a CPU, other processes need memory too.
DEFAULT_SHARE = {"cuda": 0.9}
DEFAULT_SHARE_ELSEWHERE = 0.5


def step_bytes(spec: ModelSpec, geometry: Geometry) -> int:
    """Return the bytes of the largest temporaries of a step: the logits, a copy of them, and those of the sampler.

    If pages are gathered, also the keys and values of the longest row in one layer, copied and packed.
    """
    num_rows = min(geometry.max_batch_size + MAX_PROMPT_LOGITS, geometry.max_num_batched_tokens)
    of_logits = num_rows * 2 * spec.dtype.itemsize
    of_sampler = max(geometry.max_batch_size, min(num_rows, LOGPROB_ROWS_AT_ONCE)) * BYTES_PER_LOGIT
    sizes = geometry.page_size, geometry.max_pages_per_row, spec.has_sinks
    of_copies = 2 * geometry.max_row_tokens * token_bytes(spec) if page_buckets(spec.device, spec.dtype, *sizes) else 0
    return (of_logits + of_sampler) * spec.num_embeddings + of_copies


def token_bytes(spec: ModelSpec) -> int:
    """Return the bytes of keys and values of one token in one layer."""
    return spec.num_kv_heads * (spec.key_dim + spec.value_dim) * spec.dtype.itemsize


def kv_bytes(spec: ModelSpec, geometry: Geometry) -> int:
    """Return the bytes of all pools: keys and values of their layers, and one inverse page table column per page."""
    num_layers = Counter(map(geometry.pool_of, geometry.layer_windows))
    page_of_layer = geometry.page_size * token_bytes(spec)
    column = 4 * (geometry.max_batch_size + 1)
    return sum(n_pages * (num_layers[window] * page_of_layer + column) for window, n_pages in geometry.pools.items())


def largest_pool(spec: ModelSpec, geometry: Geometry, num_bytes: int) -> int:
    """Return the largest `n_pages`, at most that of `geometry`, with which all pools fit into `num_bytes`.

    Returns 1 if two pages do not fit.
    """
    sizes = range(2, geometry.n_pages + 1)
    return 1 + bisect.bisect_right(sizes, num_bytes, key=lambda n: kv_bytes(spec, replace(geometry, n_pages=n)))


def most_pages_of_kernels(spec: ModelSpec, geometry: Geometry) -> int | None:
    """Return the largest `n_pages` for which CUDA kernels read the right keys; None: no limit.

    The kernels compute offsets as int32: that of a key within its head before torch 2.14 (vllm-project/vllm#50427,
    pytorch/pytorch#185264), and that of an entry of the page table in every version.
    """
    if spec.device.type != "cuda":
        return None
    limit = (2**31 - 1) // (geometry.max_batch_size + 1)
    return min(limit, (2**31 - 1) // (geometry.page_size * spec.head_dim)) if torch.__version__ < "2.14" else limit


def pool_size(spec: ModelSpec, geometry: Geometry) -> int:
    """Return the default number of pages: enough for `max_batch_size` sequences of `max_seq_length`, if memory allows.

    A number that memory limits is rounded down, by less than a sixteenth. Two starts with slightly different free
    memory then get pools of the same size. The size is a constant of compiled graphs, so the second start finds the
    graphs in the cache on disk. Raises ValueError if not even two pages fit.
    """
    device = spec.device
    enough = 1 + geometry.max_batch_size * geometry.most_pages(geometry.max_seq_length)
    enough = min(enough, most_pages_of_kernels(spec, geometry) or enough)
    geometry = replace(geometry, n_pages=enough)
    share = DEFAULT_SHARE.get(device.type, DEFAULT_SHARE_ELSEWHERE)
    free = max(0, free_bytes(device) - step_bytes(spec, geometry))
    affordable = largest_pool(spec, geometry, int(share * free))
    if affordable < 2:
        per_page = kv_bytes(spec, replace(geometry, n_pages=2)) / 2
        raise ValueError(
            f"not enough memory for a KV pool on {device}: a page of {geometry.page_size} tokens takes "
            f"{per_page / 1e9:,.3f} GB, {free / 1e9:,.3f} GB are free besides the logits of "
            f"max_batch_size={geometry.max_batch_size} requests, and the default pool takes at most "
            f"{share:.0%} of the free memory: reduce page_size or max_batch_size"
        )
    if affordable < enough:
        affordable -= affordable % min(64, 1 << max(0, (affordable // 16).bit_length() - 1))
    return affordable


def check_size(name: str, value: int, least: int, reason: str = "") -> None:
    """Raise ValueError unless an option is an int of at least `least`."""
    if not is_int(value) or value < least:
        raise ValueError(f"{name} must be an int >= {least}{f' ({reason})' if reason else ''}, got {shortened(value)}")


def requested_geometry(
    spec: ModelSpec,
    max_batch_size: int,
    max_seq_length: int | None,
    n_pages: int | None,
    page_size: int | None,
    max_num_batched_tokens: int | None,
    window_release: bool,
) -> Geometry:
    """Return the sizes that these options of `Inference` ask for (None: the default).

    Raises ValueError for an option that is out of range.
    """
    on_cpu = spec.device.type == "cpu"
    max_seq_length = spec.max_positions if max_seq_length is None else max_seq_length
    page_size = (64 if on_cpu else 128) if page_size is None else page_size
    budget = (1024 if on_cpu else 2048) if max_num_batched_tokens is None else max_num_batched_tokens
    check_size("max_batch_size", max_batch_size, 1)
    check_size("max_seq_length", max_seq_length, 2, "a prompt token and a generated token")
    if spec.has_sinks:
        check_size("page_size", page_size, 2, "attention sinks take a slot of page 0")
    check_size("page_size", page_size, 1)
    check_size("max_num_batched_tokens", budget, 1)
    if spec.max_step_tokens is not None and budget > spec.max_step_tokens:
        raise ValueError(
            f"max_num_batched_tokens={budget} is more than the {spec.max_step_tokens} tokens up to which the model's "
            "attn_temperature_tuning does not depend on the other sequences of a step"
        )
    if n_pages is not None:
        check_size("n_pages", n_pages, 2, "page 0 is reserved")
    if max_seq_length > spec.max_positions:
        raise ValueError(
            f"max_seq_length={max_seq_length} is more than the {spec.max_positions} positions of the model"
            f"{spec.positions_limit}"
        )
    enough = 1 + max_batch_size * cdiv(max_seq_length, page_size)
    sizes = (page_size, max_batch_size, max_seq_length, budget, spec.windows, window_release)
    return Geometry(enough if n_pages is None else n_pages, *sizes)


def fitted_geometry(spec: ModelSpec, geometry: Geometry, n_pages: int | None) -> Geometry:
    """Return the sizes with `n_pages` pages, None: as many as memory allows. Raises ValueError if they do not fit."""
    if n_pages is None:
        n_pages = pool_size(spec, geometry)
    # Every running sequence holds a page.
    geometry = replace(geometry, n_pages=n_pages, max_batch_size=min(geometry.max_batch_size, n_pages - 1))
    check_pool_fits(spec, geometry)
    if geometry.max_request_tokens < 2:
        raise ValueError(
            f"n_pages={n_pages} of page_size={geometry.page_size} cannot hold a prompt token and a generated token"
        )
    return geometry


def check_pool_fits(spec: ModelSpec, geometry: Geometry) -> None:
    """Check that the pools fit into free memory, and that kernels can read them.

    Raises ValueError with the sizes and the largest n_pages.
    """
    limit = most_pages_of_kernels(spec, geometry)
    if limit is not None and geometry.n_pages > limit:
        raise ValueError(
            f"n_pages={geometry.n_pages:,} is more than the {limit:,} pages of {geometry.page_size} tokens that the "
            f"kernels of torch {torch.__version__} can read with max_batch_size={geometry.max_batch_size}"
        )
    needed = kv_bytes(spec, geometry)
    free = max(0, free_bytes(spec.device) - step_bytes(spec, geometry))
    if needed > free:
        raise ValueError(
            f"a KV pool of {geometry.n_pages:,} pages of {geometry.page_size} tokens needs {needed / 1e9:,.1f} GB, but "
            f"only {free / 1e9:,.1f} GB are free for it on {spec.device}: at most "
            f"n_pages={largest_pool(spec, geometry, free):,} fits"
        )


@dataclass(frozen=True)
class LayerKind:
    """The layers of one window, and the pages that a request holds for them."""

    window: int | None  # tokens that a query sees; None: all previous tokens
    num_layers: int
    bytes_per_token: int  # of keys and values, summed over these layers
    pool_pages: int  # usable pages, without page 0
    request_pages: int  # pages that one request holds at its end
    request_bytes: int


@dataclass(frozen=True)
class Plan:
    """KV memory for requests of `prompt_len` tokens that generate `max_tokens` tokens. `str` gives a table."""

    prompt_len: int
    max_tokens: int
    kinds: tuple[LayerKind, ...]
    num_new_tokens: int  # tokens that it can generate: max_tokens, or fewer if max_seq_length or the pool is smaller
    max_concurrent: int  # requests that run at once without shared pages
    refusal: str | None  # why the engine rejects such a request; None if it accepts it

    @property
    def request_bytes(self) -> int:
        """Bytes that one request holds at its end."""
        return sum(kind.request_bytes for kind in self.kinds)

    def __str__(self) -> str:
        sizes = f"{self.prompt_len:,} + {self.max_tokens:,} tokens"
        lines = [f"requests of {sizes}: {self.request_bytes / 1e6:,.2f} MB of KV each"]
        for kind in self.kinds:
            sees = "full attention" if kind.window is None else f"window {kind.window:,}"
            pages = f"{kind.request_pages:,} of {kind.pool_pages:,} pages"
            lines.append(f"  {kind.num_layers} layers, {sees}: {kind.bytes_per_token:,} bytes a token, {pages}")
        result = f"{self.num_new_tokens:,} new tokens each, {self.max_concurrent:,} requests at once"
        lines.append(f"  {result}" if self.refusal is None else f"  rejected: the prompt {self.refusal}")
        return "\n".join(lines)


def refusal(geometry: Geometry, prompt_len: int) -> str | None:
    """Return why a prompt of `prompt_len` tokens is rejected, None if it is accepted."""
    if prompt_len < geometry.max_request_tokens:
        return None
    pool = f"{geometry.n_pages - 1} usable pages x {geometry.page_size}"
    to_raise = "max_seq_length" if geometry.max_request_tokens == geometry.max_seq_length else "n_pages"
    return (
        f"has {prompt_len} tokens, but the maximum context length is {geometry.max_request_tokens} tokens, prompt and "
        f"output together (max_seq_length={geometry.max_seq_length}; the pool has {pool} tokens): shorten the prompt "
        f"or raise {to_raise}"
    )


def pages_held(geometry: Geometry, window: int | None, num_tokens: int) -> int:
    """Return how many pages a row of `num_tokens` tokens holds while its last token is computed.

    The pages are those in the pool for the layers of `window`.
    """
    retained = geometry.pool_of(window)
    first = 0 if retained is None else max(0, num_tokens - 1 - retained) // geometry.page_size
    return cdiv(num_tokens, geometry.page_size) - first


def make_plan(spec: ModelSpec, geometry: Geometry, prompt_len: int, max_tokens: int) -> Plan:
    """Compute the plan for requests of these lengths. Raises ValueError for lengths less than 1."""
    check_size("prompt_len", prompt_len, 1)
    check_size("max_tokens", max_tokens, 1)
    reason = refusal(geometry, prompt_len)
    num_tokens = min(prompt_len + max_tokens, geometry.max_request_tokens)
    num_layers = Counter(geometry.layer_windows)
    kinds = []
    for window, layers in num_layers.items():
        pages = pages_held(geometry, window, num_tokens)
        per_token = layers * token_bytes(spec)
        usable = geometry.pools[geometry.pool_of(window)] - 1
        kinds.append(LayerKind(window, layers, per_token, usable, pages, pages * geometry.page_size * per_token))
    rows = min(geometry.max_batch_size, geometry.max_num_batched_tokens)  # each needs a token per step
    at_once = min(rows, (geometry.n_pages - 1) // geometry.most_pages(num_tokens))
    new_tokens = max(0, num_tokens - prompt_len)
    return Plan(prompt_len, max_tokens, tuple(kinds), new_tokens, 0 if reason else at_once, reason)
