"""What a model asks of attention, observed while it runs on a few tokens. Independent of pages and steps.

A list of supported models cannot keep up with transformers, and a model's name proves nothing. So `observe` runs two
short sequences through the model and records how every layer calls attention. The engine knows a model by this record
only. A model whose attention is something else than the record can say is rejected, with its layer and the reason.

`verify` then packs the two sequences into steps, in chunks, as an engine does, and computes attention from the record
by its definition. It compares the result of every module with the first run. If the inputs of a module agree and its
results do not, then the module mixes tokens outside attention (a convolution, a recurrence, an index that counts the
tokens of the step), or asks of attention what the record does not say.

Comparing modules instead of logits finds a fault that hardly changes the logits of a model with random weights. Engines
that list models met such faults one by one: vllm-project/vllm#49795 masked full layers by the window of the config.
"""

import inspect
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig, PreTrainedModel
from transformers.masking_utils import eager_mask

from flex_nano_vllm.masks import Causal, Chunked, LayerMask, SlidingWindow
from flex_nano_vllm.pruning import pruned

logger = logging.getLogger(__name__)

NUM_TOKENS = 7  # of each of the two sequences
# Chunks of two steps, which together contain both sequences: sequence, first token, end.
STEPS = (((0, 0, 4), (1, 0, 3)), ((1, 3, 7), (0, 4, 7)))
# Results for one token agree if their distance, relative to their norm, is at most this. (Norms and RoPE compute in
# float32 in a float64 model, too.)
TOLERANCES = {torch.float64: 1e-4, torch.float32: 1e-3, torch.float16: 0.05, torch.bfloat16: 0.2}

# What may be passed to attention besides numbers, flags and names. (`sliding_window` is a hint: the mask counts.)
KNOWN_OPTIONS = ("position_ids", "s_aux")

MaskFunction = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class AttentionLayer:
    """What one layer asks of attention."""

    name: str  # path in the model of the module that calls attention
    mask: LayerMask
    num_heads: int
    num_kv_heads: int
    key_dim: int  # of queries and keys, per head
    value_dim: int
    keys_of: int  # index of the layer whose keys and values it uses: its own index, unless layers share them
    has_sinks: bool  # a learned logit per head takes part in the softmax


@dataclass(frozen=True)
class Observation:
    """What a model did in the run of `observe`."""

    layers: tuple[AttentionLayer, ...]
    num_logits: int  # number of token ids that can be generated
    takes_options: bool  # whether keyword arguments of the model that it does not know reach its attention function
    prunes_last_layer: bool = False  # see `pruned_forward`; only `verify` finds it out


class Probe:
    """Runs a model that is not patched. Its attention implementation is restored after each run.

    Args:
        num_positions: the most tokens of a sequence.
        num_embeddings: number of token ids that a prompt may contain.
    """

    def __init__(self, model: PreTrainedModel, num_positions: int, num_embeddings: int):
        if num_positions < NUM_TOKENS:
            raise ValueError(f"{type(model).__name__} has {num_positions} positions: {NUM_TOKENS} are needed to try it")
        self.model, self.num_positions = model, num_positions
        # Unique, because threads may build engines at once. It must not contain the name of an implementation in
        # transformers, which tests names by prefix and substring.
        self.implementation = f"probe_{id(self)}"
        self.names = {module: name for name, module in model.named_modules()}
        self.configs = configs_of(model)
        numbers = torch.arange(2 * NUM_TOKENS, device=model.device).view(2, NUM_TOKENS)
        self.input_ids = numbers * 7919 % num_embeddings
        # The second sequence is at the last positions.
        self.positions = numbers % NUM_TOKENS
        self.positions[1] += num_positions - NUM_TOKENS

    def title(self, name: str) -> str:
        """Return how an error names a module: the layer, the class and the path."""
        layer = next((f" layer {part}" for part in name.split(".") if part.isdigit()), "")
        return f"{type(self.model).__name__}{layer} ({type(self.model.get_submodule(name)).__name__}, {name})"

    @contextmanager
    def attention_by(self, attention: Callable[..., object], mask: Callable[..., Tensor] | None) -> Iterator[None]:
        """Let the model call these functions for attention and for masks. Without the second, its masks are None."""
        before = [config._attn_implementation_internal for config in self.configs]
        AttentionInterface.register(self.implementation, attention)
        if mask is not None:
            AttentionMaskInterface.register(self.implementation, mask)
        try:
            for config in self.configs:
                config._attn_implementation_internal = self.implementation
            # The caller may have set any of these.
            with torch.inference_mode(False), torch.no_grad(), torch.autocast(self.model.device.type, enabled=False):
                yield
        finally:
            for config, implementation in zip(self.configs, before):
                config._attn_implementation_internal = implementation
            for interface in (AttentionInterface, AttentionMaskInterface):
                interface._global_mapping.pop(self.implementation, None)

    def run(self, sequences: Tensor, indices: Tensor, **options: object) -> tuple[Tensor, "Rows"]:
        """Run the model on tokens [B, T] of the two sequences. Returns logits [B, T, V], and what its modules did."""
        inputs = dict(input_ids=self.input_ids[sequences, indices], position_ids=self.positions[sequences, indices])
        rows = Rows(tuple(sequences.shape))
        with rows.recorded(self.names):
            logits = self.model(**inputs, use_cache=False, **options).logits
        return logits, rows


def configs_of(model: nn.Module) -> list[PreTrainedConfig]:
    """Return the configs of all modules. Each of them names an attention implementation."""
    configs = [getattr(module, "config", None) for module in model.modules()]
    return list({id(config): config for config in configs if isinstance(config, PreTrainedConfig)}.values())


class Rows:
    """What modules received and returned for each token of a run with [B, T] tokens."""

    def __init__(self, shape: tuple[int, int]):
        self.shape = shape
        self.of_calls: dict[tuple[str, int], tuple[list[Tensor], list[Tensor]]] = {}  # by module, and number of call

    @contextmanager
    def recorded(self, names: dict[nn.Module, str]) -> Iterator[None]:
        counts = dict.fromkeys(names.values(), 0)

        def record(module: nn.Module, args: tuple, kwargs: dict[str, object], output: object) -> None:
            name = names[module]
            self.of_calls[name, counts[name]] = self._of((args, kwargs)), self._of(output)
            counts[name] += 1

        with ExitStack() as stack:
            for module in (module for module, name in names.items() if name):
                stack.callback(module.register_forward_hook(record, with_kwargs=True).remove)
            yield

    def _of(self, value: object) -> list[Tensor]:
        """Return the tensors in a value that have a row for each token, as [B * T, numbers]."""
        if isinstance(value, Tensor):
            num_tokens = self.shape[0] * self.shape[1]
            has_rows = value.shape[:2] == self.shape or value.shape[:1] == (num_tokens,)
            return [value.reshape(num_tokens, -1).to("cpu", copy=True)] if has_rows else []
        members = value.values() if isinstance(value, dict) else value if isinstance(value, tuple | list) else ()
        return [rows for member in members for rows in self._of(member)]


def observe(probe: Probe) -> tuple[Observation, Tensor, Rows]:
    """Run two sequences as the rows of a batch, with the model's own attention, and record what its layers ask for.

    Returns the observation, and logits [2, NUM_TOKENS, V] and modules of the run, for `verify`. Raises ValueError with
    the layer and the reason if paged attention does not compute the model.
    """
    calls: list[tuple[nn.Module, Tensor, Tensor, Tensor, Tensor | None, dict[str, object]]] = []
    masks: dict[int, tuple[Tensor, MaskFunction]] = {}  # by address: layers may receive a slice of a mask

    def build_mask(*args: object, mask_function: MaskFunction, **kwargs: object) -> Tensor | None:
        mask = eager_mask(*args, mask_function=mask_function, **kwargs)
        if mask is not None:
            masks[mask.untyped_storage().data_ptr()] = mask, mask_function
        return mask

    def attend(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: object
    ) -> tuple[Tensor, object]:
        calls.append((module, query, key, value, attention_mask, options))
        files = [vars(sys.modules[cls.__module__]) for cls in type(module).__mro__]  # the class may be a subclass
        own = next(file["eager_attention_forward"] for file in files if "eager_attention_forward" in file)
        return own(module, query, key, value, attention_mask, **options)

    model_name = type(probe.model).__name__
    sequences = torch.arange(2, device=probe.positions.device)[:, None].expand(2, NUM_TOKENS)
    takes_any = any(p.kind is p.VAR_KEYWORD for p in inspect.signature(probe.model.forward).parameters.values())
    try:
        with probe.attention_by(attend, build_mask):
            options = dict(step=None) if takes_any else {}
            logits, rows = probe.run(sequences, torch.arange(NUM_TOKENS).to(sequences).expand(2, NUM_TOKENS), **options)
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise ValueError(f"{model_name} cannot run on token ids and positions without a cache: {error}") from error
    layers: list[AttentionLayer] = []
    keys = [(key.data_ptr(), value.data_ptr()) for _, _, key, value, _, _ in calls]
    for number, (module, query, key, value, mask, options) in enumerate(calls):
        name, title = probe.names[module], probe.title(probe.names[module])
        if name in [layer.name for layer in layers]:
            raise ValueError(f"{title} calls attention more than once per token")
        plain = (bool, int, float, str, type(None))
        unknown = [name for name, it in options.items() if not isinstance(it, plain) and name not in KNOWN_OPTIONS]
        if unknown:
            raise ValueError(f"{title} passes {', '.join(unknown)} to attention, which paged attention does not know")
        if key.shape[2] != NUM_TOKENS or not key.dtype == value.dtype == probe.model.dtype:
            raise ValueError(
                f"{title} has {key.shape[2]} keys of {key.dtype} for {NUM_TOKENS} tokens of {probe.model.dtype}"
            )
        if mask is None or mask.untyped_storage().data_ptr() not in masks:
            raise ValueError(f"{title} has a mask that transformers' mask functions did not build")
        _, mask_function = masks[mask.untyped_storage().data_ptr()]
        observed = mask_of(mask_function, query.shape[1], probe.num_positions, query.device)
        if observed is None:
            raise ValueError(f"{title} has a mask that is not causal, a sliding window, or chunks")
        shape = query.shape[1], key.shape[1], query.shape[3], value.shape[3]
        has_sinks = options.get("s_aux") is not None
        keys_of = keys.index(keys[number])
        if keys_of < number and layers[keys_of].mask != observed:
            raise ValueError(f"{title} uses the keys of {probe.title(layers[keys_of].name)} with another mask")
        layers.append(AttentionLayer(name, observed, *shape, keys_of, has_sinks))
    if not layers:
        raise ValueError(f"{model_name} does not call attention through transformers' AttentionInterface")
    takes_options = all("step" in options for *_, options in calls)
    return Observation(tuple(layers), logits.shape[-1], takes_options), logits, rows


def mask_of(function: MaskFunction, num_heads: int, num_positions: int, device: torch.device) -> LayerMask | None:
    """Return the mask that equals a mask function of transformers up to `num_positions`; None if none does.

    The first position that does not see position 0 gives the size of a window or chunk. The mask is then compared with
    the function at the first positions, around multiples of this size, and at positions in between.
    """
    positions, zero = torch.arange(num_positions, device=device), torch.zeros((), dtype=torch.int64, device=device)
    hidden = (~function(zero, zero, positions, zero).expand(num_positions)).nonzero()[:, 0]
    mask: LayerMask = Causal()
    compared = [positions[:70], positions[:: -(-num_positions // 200)], positions[-2:]]
    if len(hidden):
        size = hidden[0]
        sees_previous = function(zero, zero, size, size - 1)
        mask = (SlidingWindow if sees_previous else Chunked)(int(size))
        around = torch.arange(1, 4, device=device)[:, None] * size + torch.arange(-2, 3, device=device)
        compared.append(around[(around >= 0) & (around < num_positions)])
    q_pos = torch.cat(compared)[:, None]
    for head in (zero, zero + num_heads - 1):
        if not torch.equal(function(zero, head, q_pos, q_pos.T), mask.mask_mod(zero, head, q_pos, q_pos.T)):
            return None
    return mask


def verify(probe: Probe, observation: Observation, logits: Tensor, rows: Rows) -> Observation:
    """Run the sequences packed and in chunks, and compare modules and logits with the run of `observe`.

    Returns the observation, with `prunes_last_layer`. Raises ValueError with the module and the reason.
    """
    if observation.takes_options:
        try:
            with pruned(last_layer(probe.model, observation.layers)):
                _run_packed(probe, observation, logits, rows, prune=True)
            return replace(observation, prunes_last_layer=True)
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            logger.info("the last layer is not pruned: %s", error)
    _run_packed(probe, observation, logits, rows, prune=False)
    return observation


def last_layer(model: nn.Module, layers: tuple[AttentionLayer, ...]) -> nn.Module:
    """Return the layer that contains the last call of attention."""
    return model.get_submodule(layers[-1].name.rpartition(".")[0])


def _run_packed(probe: Probe, observation: Observation, logits: Tensor, rows: Rows, prune: bool) -> None:
    tolerance, device = TOLERANCES.get(probe.model.dtype, 0.2), logits.device
    packed = PackedAttention(observation.layers, probe.names)
    with probe.attention_by(packed.attend, None):
        for chunks in STEPS:
            sequences = torch.cat([torch.full((end - first,), number) for number, first, end in chunks]).to(device)
            indices = torch.cat([torch.arange(first, end) for _, first, end in chunks]).to(device)
            ends = torch.tensor([end - first for _, first, end in chunks]).cumsum(0).to(device) - 1
            packed.start(sequences, indices, ends)
            options = dict(logits_indices=ends) if prune else {}
            got, got_rows = probe.run(sequences[None], indices[None], **options)
            _compare(probe, got_rows, rows, (sequences * NUM_TOKENS + indices).cpu(), tolerance)
            expected = logits[sequences, indices]
            expected = expected[ends] if prune else expected
            distance = (got[0].float().softmax(-1) - expected.float().softmax(-1)).abs().sum(-1).max().item() / 2
            if not distance <= tolerance:
                raise ValueError(
                    f"{type(probe.model).__name__} computes other probabilities for packed sequences: {distance:.3g} "
                    f"of a distribution differs, and rounding may change {tolerance:g}"
                )


def _compare(probe: Probe, got: Rows, expected: Rows, tokens: Tensor, tolerance: float) -> None:
    """Raise ValueError for the first module whose inputs agree, and whose results do not, for some token.

    Inputs must agree much better than results, because a module may enlarge the distance.
    """
    undecided = torch.zeros(len(tokens), dtype=torch.bool)  # tokens that rounding routes to other experts
    for call, of_call in got.of_calls.items():
        pairs = [list(zip(a, b)) for a, b in zip(of_call, expected.of_calls.get(call, ([], [])))]
        lengths = [(len(a), len(b)) for a, b in zip(of_call, expected.of_calls.get(call, ([], [])))]
        inputs, results = ([(a, b[tokens]) for a, b in pair] for pair in pairs)
        if any(a != b or a == 0 for a, b in lengths) or any(a.shape != b.shape for a, b in inputs + results):
            continue
        for a, b in inputs + results:
            if not (a.is_floating_point() or a.is_complex()):
                undecided |= (a != b).any(dim=1)
        agree = torch.stack([_agree(a, b, tolerance / 10) for a, b in inputs]).all(dim=0) & ~undecided
        if (agree & ~torch.stack([_agree(a, b, tolerance) for a, b in results]).all(dim=0)).any():
            raise ValueError(
                f"{probe.title(call[0])} computes a token from other tokens of the step than attention gives it: a "
                "step contains tokens of several requests, so they would change each other"
            )


def _agree(a: Tensor, b: Tensor, tolerance: float) -> Tensor:
    """Return which rows are equal, up to a tolerance relative to their norm."""
    a, b = (torch.view_as_real(x).flatten(1) if x.is_complex() else x.double() for x in (a, b))
    return (a - b).norm(dim=1) <= tolerance * b.norm(dim=1) + 1e-9


class PackedAttention:
    """Attention of packed sequences by its definition, over the keys and values of this step and of earlier ones."""

    def __init__(self, layers: tuple[AttentionLayer, ...], names: dict[nn.Module, str]):
        self.layers, self.names = layers, names
        self.index_of = {layer.name: index for index, layer in enumerate(layers)}
        self.kept: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}  # [1, K, N, D] by layer and sequence

    def start(self, sequences: Tensor, indices: Tensor, ends: Tensor) -> None:
        """Begin a step with tokens `indices` [T] of `sequences` [T]. `ends`: tokens whose logits are needed."""
        self.sequences, self.indices, self.ends = sequences, indices, ends

    def attend(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        softcap: float | None = None,
        s_aux: Tensor | None = None,
        part: str | None = None,
        **options: object,
    ) -> tuple[Tensor, None]:
        index = self.index_of[self.names[module]]
        layer = self.layers[index]
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        queries = torch.arange(len(self.indices), device=query.device) if part != "ends" else self.ends
        output = query.new_zeros(1, query.shape[2], query.shape[1], value.shape[3])
        for sequence in range(2):
            place = layer.keys_of, sequence
            if part != "ends" and layer.keys_of == index:
                new = [x[:, :, self.sequences == sequence] for x in (key, value)]
                old = self.kept.get(place, [x[:, :, :0] for x in new])
                self.kept[place] = tuple(torch.cat(pair, dim=2) for pair in zip(old, new))
            keys, values = (x.repeat_interleave(layer.num_heads // x.shape[1], dim=1) for x in self.kept[place])
            of_sequence = self.sequences[queries] == sequence
            q_pos, kv_pos = self.indices[queries][of_sequence][:, None], torch.arange(keys.shape[2], device=keys.device)
            scores = query[:, :, of_sequence].float() @ keys.float().mT * scale
            if softcap is not None:
                scores = softcap * torch.tanh(scores / softcap)
            scores = scores.masked_fill(~layer.mask.mask_mod(0, 0, q_pos, kv_pos), -torch.inf)
            if s_aux is not None:
                sinks = s_aux.to(scores.dtype).view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
                scores = torch.cat([scores, sinks], dim=-1)
            weights = scores.softmax(dim=-1)[..., : keys.shape[2]]
            output[:, of_sequence] = (weights @ values.float()).transpose(1, 2).to(output.dtype)
        return output, None
