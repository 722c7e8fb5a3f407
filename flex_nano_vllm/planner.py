"""Computes the KV memory of requests, and how many requests fit, from an engine's geometry, before any step runs."""

from collections import Counter
from dataclasses import dataclass

from flex_nano_vllm.geometry import Geometry
from flex_nano_vllm.memory import token_bytes
from flex_nano_vllm.model_spec import ModelSpec


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
        fate = f"{self.num_new_tokens:,} new tokens each, {self.max_concurrent:,} requests at once"
        lines.append(f"  {fate}" if self.refusal is None else f"  rejected: the prompt {self.refusal}")
        return "\n".join(lines)


def make_plan(spec: ModelSpec, geometry: Geometry, prompt_len: int, max_tokens: int) -> Plan:
    """Compute the plan for requests of these lengths."""
    refusal = geometry.refusal(prompt_len)
    num_tokens = min(prompt_len + max_tokens, geometry.max_request_tokens)
    num_layers = Counter(geometry.layer_windows)
    kinds = []
    for window, layers in num_layers.items():
        pages = geometry.pages_held(window, num_tokens)
        per_token = layers * token_bytes(spec)
        usable = geometry.pools[geometry.pool_of(window)] - 1
        kinds.append(LayerKind(window, layers, per_token, usable, pages, pages * geometry.page_size * per_token))
    rows = min(geometry.max_batch_size, geometry.max_num_batched_tokens)  # each needs a token per step
    at_once = min(rows, (geometry.n_pages - 1) // geometry.most_pages(num_tokens))
    new_tokens = max(0, num_tokens - prompt_len)
    return Plan(prompt_len, max_tokens, tuple(kinds), new_tokens, 0 if refusal else at_once, refusal)
