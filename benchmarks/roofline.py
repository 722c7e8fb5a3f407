"""Comparison of an engine's steps with the limits of the machine: memory bandwidth and matmul rate.

The roofline model (Williams, Waterman, Patterson, 2009): a step takes at least the longer of (bytes moved / bandwidth)
and (operations / rate). This module measures bandwidth and rate instead of taking them from a specification.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

from benchmarks.overhead import decoding_together
from flex_nano_vllm.inference import Inference
from flex_nano_vllm.models import ModelSpec


@dataclass(frozen=True)
class Machine:
    """Measured limits of the machine, in bytes and floating-point operations per second."""

    copy_bandwidth: float
    matmul_rate: float


def measure_machine(device: torch.device, dtype: torch.dtype) -> Machine:
    """Measure a copy of 256 MB (counted twice: read and written) and a product of two square matrices.

    Each is the best of several runs.
    """
    source = torch.ones(2**26, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    size = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return Machine(
        copy_bandwidth=2 * source.nbytes / _best_seconds(lambda: target.copy_(source), device),
        matmul_rate=2 * size**3 / _best_seconds(lambda: a @ b, device),
    )


def _best_seconds(call: Callable[[], object], device: torch.device) -> float:
    seconds = []
    for _ in range(8):
        started = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return min(seconds)


@dataclass(frozen=True)
class StepCost:
    """Lower bound of the cost of a step."""

    num_bytes: int
    num_operations: int

    def seconds(self, machine: Machine) -> float:
        return max(self.num_bytes / machine.copy_bandwidth, self.num_operations / machine.matmul_rate)


def step_cost(model: PreTrainedModel, spec: ModelSpec, chunks: list[tuple[int, int]]) -> StepCost:
    """Return the lower bound of the cost of a step of (start, length) chunks.

    The step reads every weight once. For each chunk it reads once all keys and values that the chunk's queries may see,
    writes the chunk's own keys and values, and computes the logits of the last token. For the other tokens, the last
    layer computes only keys and values (see `pruning.pruned_forward`).
    """
    layers = model.get_decoder().layers
    in_layers, in_last = num_weights(layers), num_weights(layers[-1])
    keys_in_last = num_weights(layers[-1].self_attn.k_proj) + num_weights(layers[-1].self_attn.v_proj)
    head = spec.num_logits * model.config.hidden_size
    num_tokens, num_ends = sum(length for _, length in chunks), len(chunks)
    num_bytes = (in_layers + head) * spec.dtype.itemsize
    num_operations = 2 * (in_layers - in_last + keys_in_last) * num_tokens
    num_operations += 2 * (in_last - keys_in_last + head) * num_ends
    *windows, last_window = (mask.window for mask in spec.masks)
    layer_chunks = [(window, chunk, chunk) for window in windows for chunk in chunks]
    layer_chunks += [(last_window, (start, length), (start + length - 1, 1)) for start, length in chunks]
    for window, (_, num_written), (start, length) in layer_chunks:
        seen = start + length if window is None else min(start + length, window - 1 + length)
        num_bytes += 2 * (seen + num_written) * spec.num_kv_heads * spec.key_dim * spec.dtype.itemsize
        positions = range(start + 1, start + length + 1)
        scores = sum(position if window is None else min(position, window) for position in positions)
        num_operations += 4 * scores * spec.num_heads * spec.key_dim
    return StepCost(num_bytes, num_operations)


def num_weights(module: nn.Module) -> int:
    return sum(weight.numel() for weight in module.parameters())


@dataclass(frozen=True)
class Share:
    """Measured time of the steps of one kind, and its lower bound."""

    phase: str  # "prefill" or "decode"
    batch_size: int
    num_tokens: int  # in all steps together
    seconds: float
    limit_seconds: float

    @property
    def share(self) -> float:
        return self.limit_seconds / self.seconds


def measure_shares(
    engine: Inference, machine: Machine, batch_size: int, prompt_len: int, num_decode_steps: int = 16
) -> list[Share]:
    """Measure the prefill of `batch_size` prompts, and `num_decode_steps` steps in which all of them decode.

    The engine must be idle, and is idle again afterwards. Raises ValueError for requests that do not fit.
    """
    phases: dict[str, list[tuple[int, float, float]]] = {"prefill": [], "decode": []}
    with decoding_together(engine, batch_size, prompt_len, num_decode_steps) as step:
        while len(phases["decode"]) < num_decode_steps:
            sequences = [*engine.scheduler.running, *engine.scheduler.waiting]
            before = [sequence.num_computed_tokens for sequence in sequences]
            started = time.perf_counter()
            step()
            seconds = time.perf_counter() - started
            after = [sequence.num_computed_tokens for sequence in sequences]
            chunks = [(start, end - start) for start, end in zip(before, after) if end > start]
            limit = step_cost(engine.model, engine.spec, chunks).seconds(machine)
            phase = "decode" if min(before) >= prompt_len else "prefill"
            phases[phase].append((sum(length for _, length in chunks), seconds, limit))
    return [Share(phase, batch_size, *map(sum, zip(*steps))) for phase, steps in phases.items()]
