"""Share an engine between asyncio callers: one thread owns the engine and runs its steps. Independent of HTTP.

    event loop                                       owner thread
    stream(prompt) ── checked, tokenized ─► command ─► engine.add(group)
        ▲                                             engine.run_one_step(), repeatedly
        └──────── mailbox ◄── new tokens of each step ─┘
    cancelled, or not read to its end ────► command ─► engine.abort(id)

A mailbox holds one delta for each sample: the output since the mailbox was last emptied. So a slow reader gets larger
deltas. The engine does not wait for slow readers, and a mailbox holds at most the output of its request.
"""

import asyncio
import ctypes
import logging
import math
import threading
import time
from collections import defaultdict, deque
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from flex_nano_vllm.inference import Inference
from flex_nano_vllm.input_processor import Prompt, check_streamed
from flex_nano_vllm.output_processor import OutputReader, request_output
from flex_nano_vllm.outputs import CompletionDelta, RequestOutput
from flex_nano_vllm.sampling_params import InvalidRequestError, SamplingParams, shortened
from flex_nano_vllm.sequence import Sequence

logger = logging.getLogger(__name__)

NOTIFY_SHARE = 0.02  # share of the time that notifying streams may take; above it, the stream interval grows
MAX_STREAM_INTERVAL = 0.25  # seconds; the stream interval grows no further
STEP_TIMEOUT = 30.0  # seconds that `close` waits for the last step


class EngineError(RuntimeError):
    """The request failed, for example because its step failed. The engine continues with other requests."""


class EngineDead(EngineError):
    """The engine can run no more steps."""


class EngineBusy(RuntimeError):
    """The waiting queue is full."""


class EngineClosing(RuntimeError):
    """The engine accepts no new requests."""


@dataclass(eq=False)
class Mailbox:
    """The output of one request that its caller has not read yet. The owner thread fills it."""

    group: list[Sequence]
    reader: OutputReader | None  # None: the caller needs the complete output only, no deltas
    loop: asyncio.AbstractEventLoop
    filled: asyncio.Event
    deltas: dict[int, CompletionDelta] = field(default_factory=dict)
    output: RequestOutput | None = None
    error: EngineError | None = None
    is_new: bool = True  # no delta has been put in yet
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def request_id(self) -> int:
        return self.group[0].request_id

    def take(self) -> list[CompletionDelta]:
        """Empty the mailbox and return its deltas."""
        with self.lock:
            deltas, self.deltas = list(self.deltas.values()), {}
        return deltas

    def put(self, deltas: list[CompletionDelta]) -> None:
        with self.lock:
            for delta in deltas:
                before = self.deltas.get(delta.index)
                self.deltas[delta.index] = delta if before is None else _joined(before, delta)


def _joined(first: CompletionDelta, second: CompletionDelta) -> CompletionDelta:
    return replace(
        second,
        text=None if second.text is None else first.text + second.text,
        token_ids=first.token_ids + second.token_ids,
        logprobs=None if second.logprobs is None else first.logprobs + second.logprobs,
    )


class Submission:
    """Requests that were submitted together, and the iterator over their output.

    The iterator yields lists of items that are new since the last list. An item is a pair of a request's index and a
    delta, or, when the request has ended, its complete output. The iterator raises `EngineError` if a request fails.

    Leaving the `with` block, or calling `abort()`, aborts the requests that have not ended.
    """

    def __init__(self, owner: "AsyncInference", mailboxes: list[Mailbox], filled: asyncio.Event):
        self._owner, self._mailboxes, self._filled = owner, mailboxes, filled
        self._unfinished = dict(enumerate(mailboxes))

    async def __aiter__(self) -> AsyncIterator[list[tuple[int, CompletionDelta | RequestOutput]]]:
        while not self.have_ended:
            await self._filled.wait()
            self._filled.clear()
            updates: list[tuple[int, CompletionDelta | RequestOutput]] = []
            for index, mailbox in list(self._unfinished.items()):
                if mailbox.error is not None:
                    raise mailbox.error
                output = mailbox.output  # read first: if there is an output, its deltas are in the mailbox
                updates += [(index, delta) for delta in mailbox.take()]
                if output is not None:
                    del self._unfinished[index]
                    updates.append((index, output))
            if updates:
                yield updates

    @property
    def num_prompt_tokens(self) -> int:
        """Number of prompt tokens of all requests. Each prompt is counted once, whatever its number of samples."""
        return sum(mailbox.group[0].num_prompt_tokens for mailbox in self._mailboxes)

    @property
    def request_ids(self) -> list[int]:
        """The engine's request ids, in the order of the prompts."""
        return [mailbox.request_id for mailbox in self._mailboxes]

    @property
    def have_ended(self) -> bool:
        """Whether the iterator yields nothing after the items that it has already yielded."""
        return not self._unfinished

    def so_far(self, index: int) -> RequestOutput:
        """Return the output of one request so far. Its data about the prompt is complete once there is a delta."""
        return request_output(self._mailboxes[index].group, self._owner.engine.tokenizer)

    def abort(self) -> None:
        """Abort the requests that have not ended."""
        for mailbox in self._mailboxes:
            if mailbox.output is None and mailbox.error is None:
                self._owner.abort(mailbox.request_id)

    def __enter__(self) -> "Submission":
        return self

    def __exit__(self, *exception: object) -> None:
        self.abort()


class AsyncInference:
    """Share an engine between coroutines.

        async with AsyncInference(engine) as shared:
            async for delta in shared.stream("The 12 months are"):
                print(delta.text, end="")
            answers = await asyncio.gather(*(shared.generate(prompt) for prompt in prompts))

    Until it is closed, it owns the engine: other callers of the engine get a RuntimeError, except for `stats()` and
    `plan()`. Closing it leaves the engine open. A request is aborted, and its pages are freed, if its coroutine is
    cancelled or its stream is not read to its end.

    A failed step ends the requests that took part in it with `EngineError`, and the engine continues. If the engine
    cannot continue, `error` holds the exception, and every call raises `EngineDead`.

    Args:
        engine: an engine without unfinished requests.
        max_waiting: most sequences that may wait, including those just submitted; one more raises `EngineBusy`.
        stream_interval: minimum time between two deltas of a stream, in seconds. Notifying streams takes time from the
            steps. If it would take more than 2 % of the time, the interval grows, up to 0.25 s. The first and the last
            delta are sent without delay.
    """

    def __init__(self, engine: Inference, max_waiting: int = 1024, stream_interval: float = 0.04):
        if engine.owner is not None:
            raise ValueError("the engine belongs to another AsyncInference: close that one first")
        if engine.has_unfinished_requests():
            raise ValueError("the engine has unfinished requests: finish or abort them first")
        self.engine, self.max_waiting, self.stream_interval = engine, max_waiting, stream_interval
        self.error: BaseException | None = None
        self._commands: deque[Callable[[], None]] = deque()
        self._mailboxes: dict[int, Mailbox] = {}  # of requests in the engine, by id; owned by the owner thread
        self._num_pending = 0  # sequences that are accepted and not yet in the engine
        self._wake = threading.Condition()
        self._unread: dict[int, None] = {}  # requests that ran since all streams were notified
        self._notified_at = -math.inf  # when all streams were last notified
        self._notify_times = 0.0, 0.0  # seconds that the event loop took for the last two notifications
        self._is_closing = self._is_closed = False
        if engine.model.device.type == "cpu":
            release_openmp_threads()
        self._thread = engine.owner = threading.Thread(target=self._run, name="flex-nano-vllm engine", daemon=True)
        self._thread.start()

    # Called by coroutines

    async def generate(
        self, prompt: Prompt, sampling_params: SamplingParams | None = None, cache_salt: str | None = None
    ) -> RequestOutput:
        """Complete one prompt. Raises as `Inference.generate` does, or `EngineBusy`, `EngineClosing`, `EngineError`."""
        with await self.submit([prompt], sampling_params, cache_salt, follow=False) as submission:
            async for ((_, output),) in submission:
                return output

    async def stream(
        self, prompt: Prompt, sampling_params: SamplingParams | None = None, cache_salt: str | None = None
    ) -> AsyncIterator[CompletionDelta]:
        """Complete one prompt and yield deltas. Raises the errors of `generate`."""
        check_streamed(sampling_params)
        with await self.submit([prompt], sampling_params, cache_salt) as submission:
            async for updates in submission:
                for _, item in updates:
                    if isinstance(item, CompletionDelta):
                        yield item

    async def chat(
        self,
        messages: list[dict],
        sampling_params: SamplingParams | None = None,
        cache_salt: str | None = None,
        tools: list[dict] | None = None,
    ) -> RequestOutput:
        """Answer one conversation. Raises the errors of `Inference.chat` and of `generate`."""
        return await self.generate(await self.chat_prompt(messages, tools), sampling_params, cache_salt)

    async def chat_prompt(self, messages: list[dict], tools: list[dict] | None = None) -> list[int]:
        """Tokenize a conversation. Raises if the engine accepts no requests or the waiting queue is full."""
        self.check_open()
        self.check_room(1)
        return await asyncio.to_thread(self.engine.input_processor.chat_prompt, messages, tools)

    async def warmup(self) -> None:
        """Run `Inference.warmup` in the owner thread."""
        await self.call(self.engine.warmup)

    def abort(self, request_id: int) -> None:
        """Abort a request. Its caller gets the output so far, with finish_reason "abort"."""
        with suppress(EngineDead, EngineClosing):  # then the request has ended already
            self._command(partial(self._abort, request_id))

    async def call(self, function: Callable[[], Any]) -> Any:
        """Run a function in the owner thread, between two steps, and return its result."""
        self.check_open()
        future: Future = Future()

        def command() -> None:
            if not future.set_running_or_notify_cancel():  # the caller was cancelled
                return
            try:
                future.set_result(function())
            except BaseException as error:
                future.set_exception(error)

        self._command(command)
        return await asyncio.wrap_future(future)

    @property
    def num_waiting(self) -> int:
        """Number of accepted sequences that do not run."""
        return self._num_pending + len(self.engine.scheduler.waiting)

    async def close(self, timeout: float = 30.0) -> None:
        """Accept no new requests, let the accepted requests finish, and stop the thread.

        Requests that are unfinished after `timeout` seconds end with finish_reason "abort" after the current step. If
        this step does not finish within `STEP_TIMEOUT` seconds, their callers get `EngineDead`, and the thread is
        abandoned.
        """
        self._is_closing = True
        with suppress(EngineDead, EngineClosing):  # the thread has ended already
            self._command(lambda: None)
            await asyncio.to_thread(self._thread.join, timeout)
            self._command(self._abort_all)
        await asyncio.to_thread(self._thread.join, STEP_TIMEOUT)
        if self._thread.is_alive():
            self.error = TimeoutError("the current step did not finish in time")
            waiting = list(self._mailboxes.values())
            for mailbox in waiting:
                mailbox.error = self._refusal()
            self._notify(waiting)

    async def __aenter__(self) -> "AsyncInference":
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self.close()

    async def submit(
        self,
        prompts: list[Prompt],
        params: SamplingParams | None = None,
        cache_salt: str | None = None,
        follow: bool = True,
    ) -> "Submission":
        """Check requests outside the event loop, and submit all of them or none. Raises the errors of `generate`.

        Args:
            follow: yield deltas and complete outputs; otherwise complete outputs only, which takes less work.
        """
        params = SamplingParams() if params is None else params
        if not isinstance(params, SamplingParams):
            raise ValueError(f"sampling_params must be SamplingParams, got {shortened(params)}")
        num_sequences = len(prompts) * params.n
        self.check_open()
        self.check_room(num_sequences)
        self._pend(num_sequences)
        try:
            groups = await asyncio.to_thread(self._groups, prompts, params, cache_salt, follow)
            self.check_open()
        except BaseException:
            self._pend(-num_sequences)
            raise
        loop, filled, tokenizer = asyncio.get_running_loop(), asyncio.Event(), self.engine.tokenizer
        mailboxes = [
            Mailbox(group, OutputReader(group, tokenizer) if follow else None, loop, filled) for group in groups
        ]

        def add() -> None:
            self._pend(-num_sequences)
            for mailbox in mailboxes:
                self._mailboxes[mailbox.request_id] = mailbox
                self.engine.add(mailbox.group)

        try:
            self._command(add)
        except BaseException:
            self._pend(-num_sequences)
            raise
        return Submission(self, mailboxes, filled)

    def _groups(
        self, prompts: list[Prompt], params: SamplingParams, cache_salt: str | None, follow: bool
    ) -> list[list[Sequence]]:
        names = [f"prompt {i}" if len(prompts) > 1 else "prompt" for i in range(len(prompts))]
        request = self.engine.input_processor.request
        return [request(prompt, params, cache_salt, name, follow) for prompt, name in zip(prompts, names)]

    def _pend(self, change: int) -> None:
        with self._wake:
            self._num_pending += change

    def check_room(self, num_sequences: int) -> None:
        """Raise `EngineBusy` if `num_sequences` more cannot wait now, and ValueError if they never can."""
        if num_sequences > self.max_waiting:
            message = f"{num_sequences} sequences exceed max_waiting={self.max_waiting}: use fewer prompts or samples"
            raise InvalidRequestError(message)
        if self.num_waiting + num_sequences > self.max_waiting:
            raise EngineBusy(
                f"the queue has no room for {num_sequences} more: {self.num_waiting} of at most {self.max_waiting} "
                "sequences are waiting, try again later"
            )

    def check_open(self) -> None:
        """Raise `EngineDead` or `EngineClosing` if the engine accepts no requests."""
        if self.error is not None or self._is_closing:
            raise self._refusal()

    def _refusal(self) -> EngineDead | EngineClosing:
        if self.error is not None:
            return EngineDead(f"the engine has died: {self.error!r}")
        return EngineClosing("the engine is closing and accepts no new requests")

    def _command(self, command: Callable[[], None]) -> None:
        """Let the owner thread run a function before its next step.

        Raises `EngineDead` or `EngineClosing` if the thread has ended, also if it ended after the caller's own check.
        """
        with self._wake:
            if self._is_closed:
                raise self._refusal()
            self._commands.append(command)
            self._wake.notify()

    # Called by the owner thread

    def _run(self) -> None:
        try:
            if self.engine.model.device.type == "cuda":
                let_thread_use_cuda_graphs()
            while True:
                with self._wake:
                    while not (self._commands or self._mailboxes or self._is_closing):
                        self._wake.wait()
                while self._commands:
                    self._commands.popleft()()
                if self.engine.has_unfinished_requests():
                    self._step()
                elif self._is_closing and self._close_door():
                    return
        except BaseException as error:
            logger.exception("the engine has died")
            self.error = error  # rejects new requests; those already submitted fail below
            while not self._close_door():
                with suppress(Exception):
                    self._commands.popleft()()
            self._fail(list(self._mailboxes), EngineDead(f"the engine has died: {error!r}"))
        finally:
            self.engine.owner = None

    def _close_door(self) -> bool:
        """Accept no more commands if none is left, and return whether none was left."""
        with self._wake:
            self._is_closed = not self._commands
            return self._is_closed

    def _step(self) -> None:
        try:
            outputs = self.engine.run_one_step()
        except Exception as error:
            logger.exception("a step has failed")
            self.engine.abort_failed_step()
            # Requests the engine no longer knows: those it just aborted, and those that had finished but were not yet
            # reported
            queues = self.engine.scheduler.running, self.engine.scheduler.waiting
            left = {sequence.request_id for queue in queues for sequence in queue}
            ended = [request_id for request_id in self._mailboxes if request_id not in left]
            self._fail(ended, EngineError(f"the step has failed: {type(error).__name__}"))
            if self.engine.model.device.type == "cuda":
                torch.cuda.synchronize()  # raises again if the device accepts no more work: then no step can run
            self.engine.check_invariants()
            return
        updated, now = [], time.perf_counter()
        # Notify all streams at once: each run of the event loop takes a CPU core from the step.
        all_are_due = now - self._notified_at >= self._stream_interval()
        self._notified_at = now if all_are_due else self._notified_at
        for output in outputs:
            mailbox = self._mailboxes.pop(output.request_id)
            self._collect(mailbox)
            mailbox.output = output
            updated.append(mailbox)
        # Waiting requests have no new tokens, except those that ran since all streams were notified.
        running = dict.fromkeys(sequence.request_id for sequence in self.engine.scheduler.running)
        self._unread |= running
        for request_id in self._unread if all_are_due else running:
            mailbox = self._mailboxes.get(request_id)
            if mailbox is not None and (all_are_due or mailbox.is_new) and self._collect(mailbox):
                updated.append(mailbox)
        if all_are_due:
            self._unread = {}
        self._notify(updated, is_timed=all_are_due)

    def _collect(self, mailbox: Mailbox) -> bool:
        """Put new deltas into a mailbox, and return whether there are any, or an error."""
        if mailbox.reader is None:
            return False
        try:
            deltas = list(mailbox.reader.deltas())
        except Exception as error:  # concerns this request only
            logger.exception("the deltas of a request could not be built")
            mailbox.error = EngineError(f"the output could not be built: {type(error).__name__}")
            if self._mailboxes.pop(mailbox.request_id, None) is not None:
                self.engine.abort(mailbox.request_id)
            return True
        mailbox.put(deltas)
        mailbox.is_new &= not deltas
        return bool(deltas)

    def _stream_interval(self) -> float:
        """Return the seconds between two notifications of all streams."""
        seconds = min(self._notify_times)  # the longer one may include an unrelated pause
        return max(self.stream_interval, min(seconds / NOTIFY_SHARE, MAX_STREAM_INTERVAL))

    def _fail(self, request_ids: list[int], error: EngineError) -> None:
        failed = [self._mailboxes.pop(request_id) for request_id in request_ids]
        for mailbox in failed:
            mailbox.error = error
        self._notify(failed)

    def _notify(self, mailboxes: list[Mailbox], is_timed: bool = False) -> None:
        """Wake the readers of mailboxes, with one message for each event loop: it costs more than filling a mailbox."""
        by_loop: dict[asyncio.AbstractEventLoop, list[Mailbox]] = {}
        for mailbox in mailboxes:
            by_loop.setdefault(mailbox.loop, []).append(mailbox)
        for loop, group in by_loop.items():
            try:
                loop.call_soon_threadsafe(self._wake_all, group, is_timed)
            except RuntimeError:  # the loop is closed: its coroutines are gone and have not aborted their requests
                for mailbox in group:
                    self._commands.append(partial(self._abort, mailbox.request_id))

    def _abort(self, request_id: int) -> None:
        """Abort a request, and put its output so far into its mailbox."""
        mailbox = self._mailboxes.pop(request_id, None)
        if mailbox is None:
            return
        try:
            output = self.engine.abort(request_id)
            self._collect(mailbox)
            mailbox.output = output
        except Exception as error:  # the pages of the request are free nevertheless
            logger.exception("the output of an aborted request could not be built")
            mailbox.error = EngineError(f"the output could not be built: {type(error).__name__}")
        self._notify([mailbox])

    def _abort_all(self) -> None:
        for request_id in list(self._mailboxes):
            self._abort(request_id)

    # Called by event loops

    def _wake_all(self, mailboxes: list[Mailbox], is_timed: bool) -> None:
        started = time.perf_counter()
        for mailbox in mailboxes:
            mailbox.filled.set()
        if is_timed:  # runs after the woken readers, which read and send before they wait again
            mailboxes[0].loop.call_soon(self._note_notifying, started)

    def _note_notifying(self, started: float) -> None:
        self._notify_times = self._notify_times[1], time.perf_counter() - started


def release_openmp_threads() -> None:
    """Release the OpenMP threads of the calling thread, before another thread runs the model.

    Each computing thread gets its own OpenMP threads and keeps them. If a process has more of them than processors,
    GNU's OpenMP lets all of them sleep between two parallel regions. Every operator then takes 70 microseconds more,
    and decode steps of a small model take 50 % longer. The calling thread gets new OpenMP threads if it needs them.
    """
    try:
        mapped = {line.split()[-1] for line in Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()}
    except OSError:
        return  # not Linux: no effect of the threads is known there
    for path in mapped:
        if Path(path).name.startswith(("libgomp", "libiomp")):
            pause = getattr(ctypes.CDLL(path), "omp_pause_resource_all", None)  # since OpenMP 5.0 and GCC 9
            if pause is not None:
                pause(1)  # 1: a soft pause, which keeps the settings


def let_thread_use_cuda_graphs() -> None:
    """Let the calling thread record CUDA graphs.

    Torch stores CUDA graphs for each thread. Before torch 2.15, only one thread has the storage for them
    (https://github.com/pytorch/pytorch/issues/123177).
    """
    from torch._inductor import cudagraph_trees as trees

    if not hasattr(trees.local, "tree_manager_containers"):
        trees.local.tree_manager_containers = {}
        trees.local.tree_manager_locks = defaultdict(threading.Lock)
