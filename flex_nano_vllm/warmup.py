"""Compiles every graph before the first request. Independent of scheduling and sampling."""

import gc
from collections.abc import Iterator

from flex_nano_vllm.cascade import PackedDecodes
from flex_nano_vllm.compiling import compile_settings
from flex_nano_vllm.runner import ModelRunner, padding_chunk
from flex_nano_vllm.scheduler import Chunk


def warm_up(runner: ModelRunner) -> None:
    """Compile every graph of the model by running each bucket with padding chunks.

    The padding is in row 0: its keys are written to page 0, and its output is not used.
    """
    if not runner.compiled:
        return
    device_type = runner.model.device.type
    with compile_settings(device_type):
        for chunks, packed in steps_of_all_graphs(runner):
            for _ in range(2 if device_type == "cuda" else 1):  # twice, to record CUDA graphs
                runner.run(chunks, packed)
    gc.collect()  # else garbage from compiling would soon pause a step for 0.3 s


def steps_of_all_graphs(runner: ModelRunner) -> Iterator[tuple[list[Chunk], PackedDecodes | None]]:
    """Yield steps that together need every graph."""
    layout, geometry = runner.layout, runner.kv.geometry
    for bucket in runner.decode_layouts:
        yield [padding_chunk(1)] * bucket, None
    if layout.cascade is not None:
        yield [padding_chunk(1)] * max(runner.decode_layouts), PackedDecodes.empty(layout.cascade)
    # Two tokens and a padding token: with as many tokens as chunks, dynamo would treat both sizes as one.
    yield [padding_chunk(2)], None
    small, large = layout.kinds
    shortest = small.tile_len + 1  # shortest chunk that is cut into large tiles
    # If only the last layer has its mask and is pruned, that mask is used with large tiles for prompt logprobs only.
    *others, last = (attention.kv_cache.mask for attention in runner.attention_layers)
    for bucket in large.page_buckets or (1,):
        # The last token alone on its page: then a window covers the most pages.
        end = min(max((bucket - 1) * geometry.page_size + 1, shortest), geometry.max_row_tokens)
        length = min(large.num_tiles * large.tile_len, geometry.max_num_batched_tokens, end)
        if shortest <= length:
            yield [padding_chunk(length, end - length, runner.prunes and last not in others)], None
