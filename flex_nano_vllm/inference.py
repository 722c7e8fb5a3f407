"""The engine's public interface: prompts in, texts out. Independent of page arithmetic and masks."""

import logging
import threading
import time
import weakref
from collections import deque
from collections.abc import Iterator
from collections.abc import Sequence as SequenceOf
from contextlib import contextmanager, suppress

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from flex_nano_vllm.input_processor import InputProcessor, Prompt, check_streamed
from flex_nano_vllm.invariants import check_scheduler
from flex_nano_vllm.kv_manager import KVManager
from flex_nano_vllm.memory import Plan, check_size, fitted_geometry, make_plan, requested_geometry
from flex_nano_vllm.models import WeightsWatch, check_supported, load, resolve_compile, spec_of
from flex_nano_vllm.output_processor import OutputReader, ProgressBar, Statistics, request_output
from flex_nano_vllm.outputs import CompletionDelta, EngineStats, RequestOutput
from flex_nano_vllm.page_table import PageTable
from flex_nano_vllm.patching import unpatch_model
from flex_nano_vllm.policies import Policy, queue_key
from flex_nano_vllm.runner import ModelRunner
from flex_nano_vllm.sampler import Sampler
from flex_nano_vllm.sampling_params import SamplingParams, default_params
from flex_nano_vllm.scheduler import Scheduler
from flex_nano_vllm.sequence import Sequence
from flex_nano_vllm.warmup import warm_up

logger = logging.getLogger(__name__)

# The engine that each model is patched for. A notebook may build a new engine while the old one still exists.
_engine_of_model: "weakref.WeakKeyDictionary[PreTrainedModel, weakref.ref[Inference]]" = weakref.WeakKeyDictionary()


class Inference:
    """Continuous batching over paged FlexAttention, for a Hugging Face model that is already loaded.

        engine = Inference(model, tokenizer, max_batch_size=16, max_seq_length=2048)
        outputs = engine.generate(["The 12 months are"], SamplingParams(temperature=0, max_tokens=64))
        print(outputs[0].outputs[0].text)

    The engine patches the model (see `patching.patch_model`), and on a CPU it may pack its weights (`linear.py`).
    `close()`, the end of a `with` block, or deletion of the engine restores the model. Building another engine on the
    model does too, if this engine has no unfinished requests.
    Only one thread at a time may call the engine. Calls from a second thread raise RuntimeError.

    Args:
        model: a decoder of transformers (docs/models.md), in eval mode, on one device; its dtype is the pool's dtype.
        tokenizer: None if all prompts are token ids; outputs then have no text.
        max_batch_size: the most sequences that run at once, limited to the number of usable pages. Others wait.
        max_seq_length: most tokens of one request, prompt and output together. Default: the positions of the model.
        n_pages: pages of the KV pool, including the reserved page 0. Default: enough for `max_batch_size` sequences of
            `max_seq_length`, but at most half of the free memory (nine tenths on a GPU).
        page_size: tokens per page. Default: 64 on a CPU, 128 on a GPU.
        max_num_batched_tokens: token budget of a step. Default: 1,024 on a CPU, 2,048 on a GPU.
        watermark: tokens by which every running sequence must still be able to grow when another one is admitted.
        policy: which request is admitted first and preempted last: "fcfs", "priority", "sjf", or a key function of
            `Sequence`, see `policies.py`.
        enable_prefix_caching: share cached pages of a common prefix instead of computing them again.
        enable_window_release: release pages that are out of a layer's sliding window.
        enable_cascade: put decodes that share many pages into packed tiles, which read each page once.
        compile: whether to compile the model and FlexAttention. Default: True if possible; otherwise the reason is
            logged once.
        verify: compare two packed sequences with the unpatched model, and reject the model if its results differ
            (`probe.verify`). This takes the time of two to four steps. False also stops pruning (`pruning.py`).
        record_steps: append a `StepMetrics` for every step to `engine.steps`.
    Raises:
        ValueError: for an unsupported model, for a size that is out of range or does not fit into memory, or for
            `compile=True` if FlexAttention cannot be compiled. The model is not changed.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None,
        max_batch_size: int = 32,
        max_seq_length: int | None = None,
        n_pages: int | None = None,
        page_size: int | None = None,
        *,
        max_num_batched_tokens: int | None = None,
        watermark: int = 32,
        policy: Policy = "fcfs",
        enable_prefix_caching: bool = True,
        enable_window_release: bool = True,
        enable_cascade: bool = True,
        compile: bool | None = None,
        verify: bool = True,
        record_steps: bool = False,
    ):
        check_supported(model)
        check_size("watermark", watermark, 0)
        key = queue_key(policy)
        sizes = max_batch_size, max_seq_length, n_pages, page_size, max_num_batched_tokens, enable_window_release
        if (owner := _owner(model)) is not None:
            # An error in the options leaves that engine open.
            resolve_compile(compile, owner.spec, requested_geometry(owner.spec, *sizes).page_size)
            if owner.has_unfinished_requests():
                raise ValueError("the model belongs to an engine with unfinished requests: finish or abort them first")
            owner.close()  # before free memory is measured, and before the probe
        spec = spec_of(model, verify)
        geometry = requested_geometry(spec, *sizes)
        compiled = resolve_compile(compile, spec, geometry.page_size)
        geometry = fitted_geometry(spec, geometry, n_pages)
        self.model, self.spec, self.tokenizer = model, spec, tokenizer
        self.max_seq_length, self.max_request_tokens = geometry.max_seq_length, geometry.max_request_tokens
        self.input_processor = InputProcessor(spec, tokenizer, geometry, key)
        self.sampler = Sampler(compiled, spec.device.type)
        self._unreported: dict[int, list[Sequence]] = {}  # finished requests, not yet returned
        self._abandoned: deque[int] = deque()  # requests of closed streams, aborted by the next call
        self._in_use = threading.Lock()
        self.owner: threading.Thread | None = None  # set by `AsyncInference`: the only thread that may call
        with torch.inference_mode(False):  # buffers made in that mode cannot be written outside of it
            self.kv = KVManager(geometry, spec.device, enable_prefix_caching)
            self.scheduler = Scheduler(self.kv, geometry.max_num_batched_tokens, watermark)
            self.statistics = Statistics(self.scheduler, record_steps)
            self.steps = self.statistics.steps
            self.runner = ModelRunner(model, spec, self.kv, compiled, enable_cascade)  # last: it patches the model
        self._weights = WeightsWatch(model)  # of the patched model
        self._give_back = weakref.finalize(self, unpatch_model, model)
        logger.info("KV memory for %s", self.plan(self.max_request_tokens - 1, 1))
        _engine_of_model[model] = weakref.ref(self)

    @property
    def page_table(self) -> PageTable:
        """The page table of the primary pool. `kv` has the page tables of the secondary pools too."""
        return self.kv.primary

    @classmethod
    def from_pretrained(
        cls,
        path_or_id: str,
        *,
        dtype: torch.dtype | str = "auto",
        device: torch.device | str | None = None,
        **engine_options: object,
    ) -> "Inference":
        """Load model and tokenizer from a folder or a hub id, and build an engine with the given options.

        "tiny-gemma2" is the small trained model in this package, which needs no network. `device` defaults to the GPU
        if there is one. Weights are read from safetensors only. Code in a model repository is never run: a repository
        that needs it raises ValueError.
        """
        model, tokenizer = load(path_or_id, dtype, device)
        return cls(model, tokenizer, **engine_options)

    def generate(
        self,
        prompts: Prompt | SequenceOf[Prompt],
        sampling_params: SamplingParams | SequenceOf[SamplingParams] | None = None,
        use_tqdm: bool = True,
        cache_salt: str | None = None,
    ) -> list[RequestOutput]:
        """Complete one or more prompts, and return the outputs in the order of the prompts.

        Args:
            prompts: a text, a list of token ids, or a list whose entries are either.
            sampling_params: one for all prompts, or a list with one for each prompt. Default: `SamplingParams()`.
            use_tqdm: show a progress bar.
            cache_salt: share cached pages only with requests of the same salt. Then response times do not reveal the
                prompts of requests with another salt.
        Raises:
            ValueError: for a prompt that is empty, contains an unknown token id, or can never fit, and for lists of
                different lengths. All prompts are checked before the first one is queued.
            RuntimeError: while other requests are unfinished (from `add_request`, or from another thread).

        After any later error, an interrupt included, all pages are free and the engine is usable.
        """
        with self._exclusively():
            requests = self.input_processor.requests(prompts, sampling_params, cache_salt)
            if self.has_unfinished_requests():
                raise RuntimeError(
                    "the engine has unfinished requests: call run_one_step() until they finish, or abort them"
                )
            outputs: dict[int, RequestOutput] = {}
            try:
                for group in requests:
                    self._add(group)
                with ProgressBar(len(requests), use_tqdm) as bar:
                    self.runner.on_compile = bar.announce
                    while self.has_unfinished_requests():
                        self._step()
                        for output in bar.count(self._report()):
                            outputs[output.request_id] = output
            except BaseException:
                self._forget_requests()
                raise
            finally:
                self.runner.on_compile = None
            return [outputs[group[0].request_id] for group in requests]

    def stream(
        self, prompt: Prompt, sampling_params: SamplingParams | None = None, cache_salt: str | None = None
    ) -> Iterator[CompletionDelta]:
        """Complete one prompt, and yield new tokens and text after each step.

            for delta in engine.stream("The 12 months are", SamplingParams(max_tokens=64)):
                print(delta.text, end="")

        The call itself raises the errors of `generate`. The request is queued when the first delta is requested.
        Breaking out of the loop, or closing the iterator, aborts the request and frees its pages. Between two deltas,
        `add_request` can queue other requests, whose outputs `run_one_step` returns later.
        """
        with self._exclusively():
            check_streamed(sampling_params)
            group = self.input_processor.request(prompt, sampling_params, cache_salt, follow=True)
        return self._stream(group)

    def _stream(self, group: list[Sequence]) -> Iterator[CompletionDelta]:
        reader, request_id = OutputReader(group, self.tokenizer), group[0].request_id
        try:
            with self._exclusively():
                self._add(group)
            while not reader.has_ended:
                with self._exclusively():
                    if not all(sequence.finish_reason for sequence in group):
                        self._step()
                    self._unreported.pop(request_id, None)
                    deltas = list(reader.deltas())
                yield from deltas
        finally:
            if not reader.has_ended:
                # A stream may be closed in the middle of a step, or by another thread: then the next call aborts it.
                self._abandoned.append(request_id)
                with suppress(RuntimeError), self._exclusively():
                    pass

    def stream_chat(
        self,
        messages: list[dict],
        sampling_params: SamplingParams | None = None,
        cache_salt: str | None = None,
        tools: list[dict] | None = None,
    ) -> Iterator[CompletionDelta]:
        """Stream the answer to one conversation, see `stream`."""
        return self.stream(self.input_processor.chat_prompt(messages, tools), sampling_params, cache_salt)

    def chat(
        self,
        messages: list[dict] | list[list[dict]],
        sampling_params: SamplingParams | SequenceOf[SamplingParams] | None = None,
        use_tqdm: bool = True,
        cache_salt: str | None = None,
        tools: list[dict] | None = None,
    ) -> list[RequestOutput]:
        """Answer one conversation or a list of conversations, formatted by the tokenizer's chat template.

            engine.chat([{"role": "user", "content": "What is 17 plus 8?"}])[0].outputs[0].text

        Control tokens in messages are tokenized as plain text. `tools`, in OpenAI's form, are passed to the template.
        Tool calls are returned as text in the form of the model (`server_tools.CallParser` parses them). Raises the
        errors of `generate`, and ValueError for malformed messages or messages that the template rejects.
        """
        is_list = isinstance(messages, list | tuple)
        conversations = messages if is_list and messages and isinstance(messages[0], list | tuple) else [messages]
        prompts = [self.input_processor.chat_prompt(conversation, tools) for conversation in conversations]
        return self.generate(prompts, sampling_params, use_tqdm, cache_salt)

    def add_request(
        self, prompt: Prompt, sampling_params: SamplingParams | None = None, cache_salt: str | None = None
    ) -> int:
        """Queue one request and return its id. Raises ValueError for an invalid request, which is not queued."""
        with self._exclusively():
            return self._add(self.input_processor.request(prompt, sampling_params, cache_salt))

    def add(self, group: list[Sequence]) -> None:
        """Queue a request made by `input_processor`. Callers can thus validate prompts while a step runs."""
        with self._exclusively():
            self._add(group)

    def has_unfinished_requests(self) -> bool:
        """Return whether there is a request whose output has not been returned."""
        return self.scheduler.has_unfinished_requests() or bool(self._unreported)

    def abort(self, request_id: int) -> RequestOutput | None:
        """Abort a waiting or running request, and return its output so far, with finish_reason "abort".

        Does nothing and returns None if the request has ended or does not exist.
        """
        with self._exclusively():
            group = self._abort(request_id)
            return None if group is None else request_output(group, self.tokenizer)

    def _abort(self, request_id: int, reason: str = "abort") -> list[Sequence] | None:
        aborted = self.scheduler.abort(request_id, reason)
        if not aborted:
            return None
        self._close(aborted[0].group)
        return self._unreported.pop(request_id)

    def abort_failed_step(self) -> None:
        """Abort the requests of a failed step. Call it after `run_one_step` raised.

        The requests end with finish_reason "error", their pages are freed, and their outputs are not returned. If the
        step itself succeeded and only building outputs failed, only the finished requests are dropped.
        """
        with self._exclusively():
            if not self._unreported:
                failed = self.scheduler.running or self.scheduler.waiting  # waiting: nothing was admitted yet
                for request_id in {sequence.request_id for sequence in failed}:
                    self._abort(request_id, "error")
            self._unreported.clear()

    def run_one_step(self) -> list[RequestOutput]:
        """Compute one step and return the requests that finished in it.

        After an exception, the step can be run again, or its requests can be aborted. (This does not hold for an
        interrupt during bookkeeping: `generate` then drops all requests; callers of this method must call `close()`.)
        """
        with self._exclusively():
            self._step()
            return self._report()

    def _add(self, group: list[Sequence]) -> int:
        if not self.has_unfinished_requests() and self._weights.has_changed():
            logger.info("the model's weights have changed: dropping all cached pages")
            self.kv.reset()
        for sequence in group:
            self.scheduler.add(sequence)
        self.input_processor.warn_of_defaults(self.model.generation_config, group[0].params)
        return group[0].request_id

    def get_default_sampling_params(self) -> SamplingParams:
        """Return the parameters stated in the model's `generation_config`, as in vLLM."""
        return default_params(self.model.generation_config)

    def _step(self) -> None:
        started = time.perf_counter()
        chunks = self.scheduler.schedule()
        if chunks:
            samples = self.sampler(self.runner.forward(chunks), chunks)
            for sequence in self.scheduler.commit(chunks, samples):
                self._close(sequence.group)
            self.statistics.count_step(chunks, started)

    def _close(self, group: list[Sequence]) -> None:
        """Record that a request has ended, if all of its samples have. Its output is built when it is returned."""
        if group and all(sequence.finish_reason for sequence in group):  # empty: already recorded
            self.statistics.count_request(group)
            self._unreported[group[0].request_id] = group
            for sequence in group:
                sequence.group = []

    def _report(self) -> list[RequestOutput]:
        outputs = [request_output(group, self.tokenizer) for group in self._unreported.values()]
        self._unreported.clear()
        return outputs

    def warmup(self) -> None:
        """Compile all graphs that serving can need, so that requests do not wait for the compiler."""
        with self._exclusively():
            self.sampler.warmup(self.spec.num_logits, self.spec.device)
            warm_up(self.runner)

    def reset_prefix_cache(self) -> None:
        """Empty the prefix cache.

        Use it for measurements, or after a change of the model that the engine does not detect (see
        `models.WeightsWatch`). A change that it detects empties the cache when an idle engine gets its next request.

        Raises RuntimeError while there are unfinished requests.
        """
        with self._exclusively():
            if self.has_unfinished_requests():
                raise RuntimeError("the engine has unfinished requests, whose pages are in use")
            self.kv.reset()

    def plan(self, prompt_len: int, max_tokens: int) -> Plan:
        """Return the KV memory that requests of these lengths hold, and how many of them fit at once.

        If the engine would reject such a request, the plan has the reason. Raises ValueError for lengths less than 1.
        """
        return make_plan(self.spec, self.kv.geometry, prompt_len, max_tokens)

    def stats(self) -> EngineStats:
        """Return the current state and the counters of the engine."""
        return self.statistics.stats()

    def check_invariants(self) -> None:
        """Check the bookkeeping of requests, rows and pages. Raises AssertionError if it is inconsistent."""
        check_scheduler(self.scheduler)

    def close(self) -> None:
        """Restore the model and free the pool. Drops unfinished requests. A second call does nothing."""
        if self._give_back.alive:
            with self._exclusively():
                self._forget_requests()
                self._give_back()

    def __enter__(self) -> "Inference":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _forget_requests(self) -> None:
        self.scheduler.reset()
        self._unreported.clear()

    @contextmanager
    def _exclusively(self) -> Iterator[None]:
        """Allow one call at a time. A call from another thread or from inside a step raises RuntimeError."""
        if not self._give_back.alive:
            raise RuntimeError("this engine is closed: its model was restored, or another engine was built on it")
        if self.owner not in (None, threading.current_thread()):
            raise RuntimeError("the engine belongs to an AsyncInference: call the AsyncInference, or close it first")
        if not self._in_use.acquire(blocking=False):
            raise RuntimeError("the engine is busy with another call, from another thread or from inside a step")
        try:
            while self._abandoned:
                request_id = self._abandoned.popleft()
                self._abort(request_id)
                self._unreported.pop(request_id, None)
            yield
        finally:
            self._in_use.release()


def _owner(model: PreTrainedModel) -> Inference | None:
    """Return the engine that the model belongs to, None if there is none or it is closed."""
    engine = _engine_of_model[model]() if isinstance(model, PreTrainedModel) and model in _engine_of_model else None
    return engine if engine is not None and engine._give_back.alive else None
