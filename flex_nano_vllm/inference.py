"""The engine as its user sees it: prompts in, texts out. Knows nothing of page arithmetic or masks."""

import functools
import logging
import threading
import time
import weakref
from collections import Counter, deque
from collections.abc import Iterator
from collections.abc import Sequence as SequenceOf
from contextlib import contextmanager, suppress
from dataclasses import replace

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from flex_nano_vllm.generation_defaults import not_applied, sampling_defaults
from flex_nano_vllm.geometry import Geometry, cdiv
from flex_nano_vllm.input_processor import InputProcessor, Prompt, check_streamed
from flex_nano_vllm.kv_manager import KVManager
from flex_nano_vllm.loading import load
from flex_nano_vllm.memory import check_pool_fits, pool_size
from flex_nano_vllm.metrics import EngineStats, StepMetrics
from flex_nano_vllm.output_processor import OutputReader, request_output
from flex_nano_vllm.outputs import CompletionDelta, RequestError, RequestOutput
from flex_nano_vllm.page_table import PageTable
from flex_nano_vllm.patching import check_supported, layer_windows, max_positions, num_logits, unpatch_model
from flex_nano_vllm.planner import Plan, make_plan
from flex_nano_vllm.runner import ModelRunner, why_not_compiled
from flex_nano_vllm.sampling import take_samples
from flex_nano_vllm.sampling_params import SamplingParams, is_int
from flex_nano_vllm.scheduler import Chunk, Scheduler
from flex_nano_vllm.sequence import Sequence
from flex_nano_vllm.weights import WeightsWatch

logger = logging.getLogger(__name__)

# The engine that a model is patched for. A notebook runs its constructor cell again while the old engine still lives.
_engine_of_model: "weakref.WeakKeyDictionary[PreTrainedModel, weakref.ref[Inference]]" = weakref.WeakKeyDictionary()


class Inference:
    """Continuous batching over paged FlexAttention, for a Hugging Face model that is already loaded.

        engine = Inference(model, tokenizer, max_batch_size=16, max_seq_length=2048)
        outputs = engine.generate(["The 12 months are"], SamplingParams(temperature=0, max_tokens=64))
        print(outputs[0].outputs[0].text)

    While the engine lives, the model belongs to it (see `patching.patch_model`); `close()`, leaving a `with` block, or
    deleting the engine gives it back as it was, and so does building another engine on the model, if this one has no
    unfinished requests. One thread at a time may call it; another one gets a RuntimeError.

    Args:
        model: of a supported architecture, in eval mode, on one device; its dtype is the pool's dtype.
        tokenizer: None if all prompts are token ids; outputs then have no text.
        max_batch_size: sequences that run at once, and no more than there are pages. More may wait.
        max_seq_length: prompt and output of one request, in tokens. Default: what the model was made for.
        n_pages: pages of the KV pool, the reserved page 0 included. Default: what `max_batch_size` sequences of
            `max_seq_length` need, but at most half of the free memory (nine tenths on a GPU).
        page_size: tokens per page. Default: 64 on a CPU, 128 on a GPU.
        max_num_batched_tokens: token budget of a step. Default: 1,024 on a CPU, 2,048 on a GPU.
        watermark: tokens by which every running request can still grow when another one is admitted.
        enable_prefix_caching: compute of a request only what no other one with the same beginning has computed.
        enable_window_release: give pages back that are out of a layer's sliding window.
        enable_cascade: let decodes that share many pages read them together.
        compile: whether to compile the model and FlexAttention. Default: where that is possible; otherwise the reason
            is logged once.
        record_steps: keep a `StepMetrics` of every step in `engine.steps`.
    Raises:
        ValueError: for a model that is not supported, a size that is out of range or does not fit into memory, or
            `compile=True` where FlexAttention cannot be compiled. The model is left as it was.
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
        enable_prefix_caching: bool = True,
        enable_window_release: bool = True,
        enable_cascade: bool = True,
        compile: bool | None = None,
        record_steps: bool = False,
    ):
        check_supported(model)
        model_max = max_positions(model)
        max_seq_length = model_max if max_seq_length is None else max_seq_length
        on_cpu = model.device.type == "cpu"
        if page_size is None:
            page_size = 64 if on_cpu else 128
        if max_num_batched_tokens is None:
            max_num_batched_tokens = 1024 if on_cpu else 2048
        _check_size("max_batch_size", max_batch_size, 1)
        _check_size("max_seq_length", max_seq_length, 2, "a prompt token and a generated one")
        _check_size("page_size", page_size, 1)
        _check_size("max_num_batched_tokens", max_num_batched_tokens, 1)
        _check_size("watermark", watermark, 0)
        if n_pages is not None:
            _check_size("n_pages", n_pages, 2, "page 0 is reserved")
        if max_seq_length > model_max:
            raise ValueError(f"max_seq_length={max_seq_length} is more than the {model_max} positions the model has")
        obstacle = why_not_compiled(model.device, model.dtype, page_size)
        if compile and obstacle:
            raise ValueError(f"compile=True, but {obstacle}")
        if compile is None and obstacle:
            _warn_uncompiled(obstacle)
        _release_model(model)  # before memory is looked at
        geometry = Geometry(
            1 + max_batch_size * cdiv(max_seq_length, page_size) if n_pages is None else n_pages,
            page_size,
            max_batch_size,
            max_seq_length,
            max_num_batched_tokens,
            tuple(layer_windows(model)),
            enable_window_release,
        )
        if n_pages is None:
            n_pages = pool_size(model, geometry)
        # Whoever runs holds a page.
        geometry = replace(geometry, n_pages=n_pages, max_batch_size=min(max_batch_size, n_pages - 1))
        check_pool_fits(model, geometry)

        self.model, self.tokenizer = model, tokenizer
        with torch.inference_mode(False):  # buffers of that mode could not be written outside of it
            self.kv = KVManager(geometry, model.device, enable_prefix_caching)
        self.max_seq_length, self.max_request_tokens = max_seq_length, geometry.max_request_tokens
        if self.max_request_tokens < 2:
            raise ValueError(f"n_pages={n_pages} of page_size={page_size} hold no prompt token and a generated one")
        self.scheduler = Scheduler(self.kv, max_num_batched_tokens, watermark)
        self.input_processor = InputProcessor(model, tokenizer, geometry, num_logits(model))
        self.warns_of_defaults = bool(not_applied(model.generation_config, SamplingParams()))  # until it has, once
        self.steps: list[StepMetrics] = []
        self._record_steps = record_steps
        self._start_time = time.perf_counter()
        self._num_finished = self._num_steps = 0
        self._finish_reasons = Counter()
        self._num_computed_tokens = self._num_generated_tokens = 0
        self._unreported: dict[int, list[Sequence]] = {}  # requests that have ended and were not yet returned
        self._abandoned: deque[int] = deque()  # requests of streams that were thrown away while the engine was in use
        self._in_use = threading.Lock()
        self.owner: threading.Thread | None = None  # the only one that may call, if there is one (`AsyncInference`)
        compiled = obstacle is None if compile is None else compile
        with torch.inference_mode(False):
            self.runner = ModelRunner(model, self.kv, compiled, enable_cascade)
        self._weights = WeightsWatch(model)  # as it is now, with its caches
        self._give_back = weakref.finalize(self, unpatch_model, model)
        logger.info("KV memory for %s", self.plan(self.max_request_tokens - 1, 1))
        _engine_of_model[model] = weakref.ref(self)

    @property
    def page_table(self) -> PageTable:
        """Of the layers with the widest window, the one whose pool can run out; `kv` has those of the others."""
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

        "tiny-gemma2" is the little trained model in this package, and needs no network. `device` defaults to the GPU
        where there is one. Weights are read from safetensors only, and no code that comes with a model is run: a
        repository that asks for it is refused with a ValueError.
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
        """Complete one prompt or many, and return the outputs in the order of the prompts.

        Args:
            prompts: a text, a list of token ids, or a list whose entries are either.
            sampling_params: for all prompts, or a list with one for each. Default: `SamplingParams()`.
            use_tqdm: show a progress bar.
            cache_salt: share computed prefixes only with requests of the same salt. For users who must not learn, from
                how fast they are answered, what others have asked.
        Raises:
            ValueError: for any prompt that is empty, holds an unknown token id, or can never fit; for lists of
                different lengths. All prompts are checked before the first one is taken.
            RuntimeError: while other requests are unfinished (of `add_request`, or of another thread).

        Whatever goes wrong later, an interrupt included, all pages are free again afterwards and the engine is usable.
        """
        with self._exclusively():
            requests = self.input_processor.requests(prompts, sampling_params, cache_salt)
            if self.has_unfinished_requests():
                raise RuntimeError(
                    "the engine has unfinished requests: run_one_step() until it has none, or abort them"
                )
            outputs: dict[int, RequestOutput] = {}
            try:
                for group in requests:
                    self._add(group)
                with tqdm(total=len(requests), unit="req", dynamic_ncols=True, disable=not use_tqdm) as bar:
                    started, num_tokens = time.perf_counter(), 0
                    while self.has_unfinished_requests():
                        self._step()
                        for output in self._report():
                            outputs[output.request_id] = output
                            num_tokens += sum(len(completion.token_ids) for completion in output.outputs)
                            rate = num_tokens / (time.perf_counter() - started)
                            bar.set_postfix_str(f"{rate:.0f} tok/s", refresh=False)
                            bar.update()
            except BaseException:
                self._forget_requests()
                raise
            return [outputs[group[0].request_id] for group in requests]

    def stream(
        self, prompt: Prompt, sampling_params: SamplingParams | None = None, cache_salt: str | None = None
    ) -> Iterator[CompletionDelta]:
        """Complete one prompt, and give what is new after each step.

            for delta in engine.stream("The 12 months are", SamplingParams(max_tokens=64)):
                print(delta.text, end="")

        Raises what `generate` does, when called. The request is taken when the first delta is asked for; to break off,
        or to close the iterator, ends it and frees its pages. In between, the engine takes other requests of
        `add_request`, whose outputs `run_one_step` returns later.
        """
        with self._exclusively():
            params = SamplingParams() if sampling_params is None else sampling_params
            check_streamed(params)
            group = self.input_processor.request(prompt, params, cache_salt, follow=True)
        return self._stream(group)

    def _stream(self, group: list[Sequence]) -> Iterator[CompletionDelta]:
        reader = OutputReader(group, self.tokenizer)
        request_id = group[0].request_id
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
                # A stream may be thrown away in the middle of a step, or by another thread: then the next call ends it.
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
        """Answer one conversation, as `stream` does a prompt."""
        return self.stream(self.input_processor.chat_prompt(messages, tools), sampling_params, cache_salt)

    def chat(
        self,
        messages: list[dict] | list[list[dict]],
        sampling_params: SamplingParams | SequenceOf[SamplingParams] | None = None,
        use_tqdm: bool = True,
        cache_salt: str | None = None,
        tools: list[dict] | None = None,
    ) -> list[RequestOutput]:
        """Answer one conversation, or a list of them, in the form of the tokenizer's chat template.

            engine.chat([{"role": "user", "content": "What is 17 plus 8?"}])[0].outputs[0].text

        Control tokens in messages are read as text. `tools`, in OpenAI's form, are given to the template; calls come as
        text, in the model's own form (`tools.CallParser` finds them). Raises what `generate` does, and ValueError for
        messages of another form, or that the template refuses.
        """
        is_list = isinstance(messages, list | tuple)
        conversations = messages if is_list and messages and isinstance(messages[0], list | tuple) else [messages]
        prompts = [self.input_processor.chat_prompt(conversation, tools) for conversation in conversations]
        return self.generate(prompts, sampling_params, use_tqdm, cache_salt)

    def add_request(
        self, prompt: Prompt, sampling_params: SamplingParams | None = None, cache_salt: str | None = None
    ) -> int:
        """Queue one request and return its id. Raises ValueError, before anything is taken, for what can never run."""
        with self._exclusively():
            params = SamplingParams() if sampling_params is None else sampling_params
            return self._add(self.input_processor.request(prompt, params, cache_salt))

    def add(self, group: list[Sequence]) -> None:
        """Queue a request that `input_processor` has made, for callers that check prompts while a step runs."""
        with self._exclusively():
            self._add(group)

    def has_unfinished_requests(self) -> bool:
        """Whether there is a request whose output has not been returned."""
        return self.scheduler.has_unfinished_requests() or bool(self._unreported)

    def abort(self, request_id: int) -> RequestOutput | None:
        """End a request, wherever it is, and return what it has so far, with finish_reason "abort".

        None, and no harm, if it has ended already or never was.
        """
        with self._exclusively():
            group = self._abort(request_id)
            return None if group is None else request_output(group, self.tokenizer)

    def _abort(self, request_id: int) -> list[Sequence] | None:
        aborted = self.scheduler.abort(request_id)
        if not aborted:
            return None
        self._follow_texts(aborted)
        self._close(aborted[0].group)
        return self._unreported.pop(request_id)

    def abort_failed_step(self) -> list[int]:
        """After a step that has failed: end the requests that took part in it with finish_reason "error", and return
        their ids. Nobody gets an answer of them; their pages are free. Where the step has gone well, and only answers
        could not be made, those are all that is given up."""
        with self._exclusively():
            if self._unreported:
                request_ids = sorted(self._unreported)
                self._unreported.clear()
                return request_ids
            queue = self.scheduler.running or self.scheduler.waiting  # all, if it did not come to choosing them
            groups = {sequence.request_id: sequence.group for sequence in queue}
            for request_id, group in groups.items():
                self.scheduler.abort(request_id, "error")
                self._count(group)
            return sorted(groups)

    def run_one_step(self) -> list[RequestOutput]:
        """Compute one step and return the requests that finished in it.

        If it raises an exception, nothing is lost: the step can be run again, or its requests aborted. (An interrupt in
        the middle of bookkeeping is another matter: `generate` then starts afresh, by hand `close()` does.)
        """
        with self._exclusively():
            self._step()
            return self._report()

    def _add(self, group: list[Sequence]) -> int:
        if not self.has_unfinished_requests() and self._weights.has_changed():
            logger.info("the model's weights have changed: forgetting the pages computed with the old ones")
            self.kv.reset()
        for sequence in group:
            self.scheduler.add(sequence)
        if self.warns_of_defaults:
            self._warn_of_defaults(group[0].params)
        return group[0].request_id

    def get_default_sampling_params(self) -> SamplingParams:
        """The parameters that the model's own `generation_config` states, as vLLM's method of this name."""
        return SamplingParams(**sampling_defaults(self.model.generation_config))

    def _warn_of_defaults(self, params: SamplingParams) -> None:
        """Say once what `model.generate` does by the model's `generation_config`, and a request does not."""
        missing = not_applied(self.model.generation_config, params)
        if missing:
            self.warns_of_defaults = False
            stated = ", ".join(f"{name}={value!r}" for name, value in missing.items())
            logger.warning(
                "the model's generation_config states %s: model.generate applies that, this request does not "
                "(get_default_sampling_params() has what can be applied)",
                stated[:400],
            )

    def _step(self) -> None:
        started = time.perf_counter()
        chunks = self.scheduler.schedule()
        if chunks:
            samples = take_samples(self.runner.forward(chunks), chunks, self.runner.sample)
            had_token = [chunk.needs_sample and sample.token_id >= 0 for chunk, sample in zip(chunks, samples)]
            finished = self.scheduler.commit(chunks, [sample.token_id for sample in samples])
            sampled = []
            for chunk, sample, has_token in zip(chunks, samples, had_token):
                sequence = chunk.sequence
                # Who has been sent back, because it had counted on numbers that were not finite, has computed nothing.
                if not sequence.num_computed_tokens:
                    continue
                sequence.prompt_logprobs += sample.prompt_logprobs
                if has_token:
                    sampled.append(sequence)
                    if sample.logprob is not None:
                        sequence.logprobs.append(sample.logprob)
            finished += self._follow_texts([*finished, *(s for s in sampled if s.finish_reason is None)])
            for group in {sequence.request_id: sequence.group for sequence in finished}.values():
                if all(sequence.finish_reason for sequence in group):
                    self._close(group)
            self._measure(chunks, sampled, started)

    def _follow_texts(self, sequences: list[Sequence]) -> list[Sequence]:
        """Decode what has come, where somebody wants to see it, and end those whose text has met a stop text. Returns
        who would have gone on."""
        ended = []
        for sequence in sequences:
            if sequence.text is None:
                continue
            is_last = sequence.finish_reason is not None
            try:
                reason = "stop" if sequence.text.update(sequence.output_token_ids, is_last) else None
            except Exception:
                logger.exception("request %s: its text cannot be decoded", sequence.request_id)
                reason, sequence.error = "error", RequestError("the text cannot be decoded")
            if reason is not None:
                if not is_last:
                    self.scheduler.finish(sequence, reason)
                    ended.append(sequence)
                sequence.finish_reason, sequence.stop_reason = reason, sequence.text.stop_reason
        return ended

    def _close(self, group: list[Sequence]) -> None:
        """Note that a request has ended. Its answer is made when it is asked for."""
        group[0].metrics.finished_time = time.perf_counter()
        self._count(group)
        self._unreported[group[0].request_id] = group

    def _count(self, group: list[Sequence]) -> None:
        self._num_finished += 1
        self._finish_reasons.update(sequence.finish_reason for sequence in group)
        for sequence in group:
            sequence.group = []

    def _report(self) -> list[RequestOutput]:
        outputs = [request_output(group, self.tokenizer) for group in self._unreported.values()]
        self._unreported.clear()
        return outputs

    def warmup(self) -> None:
        """Compile everything that serving can need, so that no request waits for the compiler."""
        with self._exclusively():
            self.runner.warmup()

    def reset_prefix_cache(self) -> None:
        """Forget what was computed for earlier requests: to measure, or after a change of the model that the engine
        does not see (see `weights.WeightsWatch`). One that it sees empties the cache when the next request comes to
        an idle engine.

        Raises RuntimeError while there are unfinished requests.
        """
        with self._exclusively():
            if self.has_unfinished_requests():
                raise RuntimeError("the engine has unfinished requests, whose pages are in use")
            self.kv.reset()

    def plan(self, prompt_len: int, max_tokens: int) -> Plan:
        """What requests of such lengths would hold of the KV memory, how many of them fit at once, and why one would be
        refused. Raises ValueError for lengths less than 1."""
        _check_size("prompt_len", prompt_len, 1)
        _check_size("max_tokens", max_tokens, 1)
        return make_plan(self.model, self.kv.geometry, prompt_len, max_tokens)

    def stats(self) -> EngineStats:
        """What the engine holds and has done so far."""
        table = self.page_table
        return EngineStats(
            num_running=len(self.scheduler.running),
            num_waiting=len(self.scheduler.waiting),
            num_used_pages=table.num_used_pages,
            num_free_pages=table.num_free_pages,
            kv_usage=table.num_used_pages / table.num_usable_pages,
            num_preemptions=self.scheduler.num_preemptions,
            num_steps=self._num_steps,
            num_computed_tokens=self._num_computed_tokens,
            num_generated_tokens=self._num_generated_tokens,
            num_finished_requests=self._num_finished,
            finish_reasons=dict(self._finish_reasons),
            num_evictable_pages=table.num_evictable_pages,
            num_prompt_tokens=self.scheduler.num_prompt_tokens,
            num_cached_tokens=self.scheduler.num_cached_tokens,
            cache_hit_rate=self.scheduler.num_cached_tokens / max(1, self.scheduler.num_prompt_tokens),
        )

    def check_invariants(self) -> None:
        """Raises AssertionError when the bookkeeping of requests, rows and pages does not add up."""
        self.scheduler.check_invariants()

    def close(self) -> None:
        """Give the model back as it was, and free the pool. Forgets unfinished requests. Closing twice is fine."""
        if self._give_back.alive:
            with self._exclusively():
                self._forget_requests()
                self._give_back()

    def __enter__(self) -> "Inference":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _measure(self, chunks: list[Chunk], sampled: list[Sequence], started: float) -> None:
        """Stamp the sequences of a step that began at `started`, and count it."""
        now = time.perf_counter()
        for chunk in chunks:
            if chunk.sequence.metrics.first_scheduled_time is None:
                chunk.sequence.metrics.first_scheduled_time = started
        for sequence in sampled:
            if sequence.metrics.first_token_time is None:
                sequence.metrics.first_token_time = now
        num_tokens = sum(chunk.length for chunk in chunks)
        num_decode_tokens = sum(
            chunk.length == 1 and chunk.start >= chunk.sequence.num_prompt_tokens for chunk in chunks
        )
        self._num_steps += 1
        self._num_computed_tokens += num_tokens
        self._num_generated_tokens += len(sampled)
        if self._record_steps:
            stats = self.stats()
            self.steps.append(
                StepMetrics(
                    step=self._num_steps,
                    time=now - self._start_time,
                    duration=now - started,
                    num_prefill_tokens=num_tokens - num_decode_tokens,
                    num_decode_tokens=num_decode_tokens,
                    num_running=stats.num_running,
                    num_waiting=stats.num_waiting,
                    num_preemptions=stats.num_preemptions,
                    num_used_pages=stats.num_used_pages,
                    kv_usage=stats.kv_usage,
                )
            )

    def _forget_requests(self) -> None:
        self.scheduler.reset()
        self._unreported.clear()

    @contextmanager
    def _exclusively(self) -> Iterator[None]:
        """One caller at a time: neither another thread nor a callback of this one can step in between."""
        if not self._give_back.alive:
            raise RuntimeError("this engine is closed: its model was given back, or another engine was built on it")
        if self.owner not in (None, threading.current_thread()):
            raise RuntimeError("the engine belongs to an AsyncInference: call that one, or close it first")
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


@functools.cache  # once per process and reason
def _warn_uncompiled(reason: str) -> None:
    logger.warning("FlexAttention runs uncompiled: %s", reason)


def _check_size(name: str, value: int, least: int, reason: str = "") -> None:
    if not is_int(value) or value < least:
        raise ValueError(f"{name} must be an int >= {least}{f' ({reason})' if reason else ''}, got {value!r}")


def _release_model(model: PreTrainedModel) -> None:
    """Close the idle engine that the model belongs to, if any: its pool must not stand beside the new one."""
    engine = _engine_of_model.get(model, lambda: None)()
    if engine is None:
        return
    if engine.has_unfinished_requests():
        raise ValueError("the model belongs to an engine with unfinished requests: finish or abort them, or close it")
    engine.close()
