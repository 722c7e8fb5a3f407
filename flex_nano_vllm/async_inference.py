"""An engine for many callers under asyncio: one thread owns it and runs its steps. Knows nothing of HTTP.

    event loop                                       owner thread
    stream(prompt) ── checked, tokenized ─► command ─► engine.add(group)
        ▲                                             engine.run_one_step(), again and again
        └──────── mailbox ◄── what each step brought ──┘
    cancelled, or not read to its end ────► command ─► engine.abort(id)

A mailbox holds one delta for each sample: what has come since it was last emptied. So a reader that is slow gets larger
deltas, nobody waits for it, and what it can make pile up is the length of its own answer.
"""

import asyncio
import logging
import math
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch

from flex_nano_vllm.inference import Inference
from flex_nano_vllm.input_processor import Prompt, check_streamed
from flex_nano_vllm.output_processor import OutputReader, request_output
from flex_nano_vllm.outputs import CompletionDelta, RequestOutput
from flex_nano_vllm.runner import let_thread_use_cuda_graphs, release_openmp_threads
from flex_nano_vllm.sampling_params import SamplingParams
from flex_nano_vllm.sequence import Sequence

logger = logging.getLogger(__name__)

NOTIFY_SHARE = 0.02  # of the time; the most that goes into telling streams what is new,
MAX_STREAM_INTERVAL = 0.25  # unless they would wait longer for it, in seconds
STEP_TIMEOUT = 30.0  # seconds after which nobody waits for the last step any more


class EngineError(RuntimeError):
    """A step has failed, and the request with it. The engine goes on with others."""


class EngineDead(EngineError):
    """No step can be run any more."""


class EngineBusy(RuntimeError):
    """As many requests wait as may."""


class EngineClosing(RuntimeError):
    """No more requests are taken."""


@dataclass(eq=False)
class Mailbox:
    """What one request has brought and its caller has not yet taken. Filled by the owner thread."""

    group: list[Sequence]
    reader: OutputReader | None  # None: the caller wants the answer, and not how it comes
    loop: asyncio.AbstractEventLoop
    filled: asyncio.Event
    deltas: dict[int, CompletionDelta] = field(default_factory=dict)
    output: RequestOutput | None = None
    error: EngineError | None = None
    is_new: bool = True  # nothing has been put in
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def request_id(self) -> int:
        return self.group[0].request_id

    def take(self) -> list[CompletionDelta]:
        """Empty the mailbox."""
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
    """What requests that were handed over together bring: lists of what is new since the last one, pairs of a request's
    index and a delta, or, when it has ended, its whole answer. Raises `EngineError` if one of them fails.

    Leaving the `with` block, or `abort()`, ends the requests that have not ended.
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
                output = mailbox.output  # looked at first: what came before it is in the box
                updates += [(index, delta) for delta in mailbox.take()]
                if output is not None:
                    del self._unfinished[index]
                    updates.append((index, output))
            if updates:
                yield updates

    @property
    def num_prompt_tokens(self) -> int:
        """Of all requests, each counted once."""
        return sum(mailbox.group[0].num_prompt_tokens for mailbox in self._mailboxes)

    @property
    def request_ids(self) -> list[int]:
        """The engine's ids of the requests, in order."""
        return [mailbox.request_id for mailbox in self._mailboxes]

    @property
    def have_ended(self) -> bool:
        """Whether nothing will come any more."""
        return not self._unfinished

    def so_far(self, index: int) -> RequestOutput:
        """The answer to one of the requests as far as it has come. Its prompt is whole once there is a delta."""
        return request_output(self._mailboxes[index].group, self._owner.engine.tokenizer)

    def abort(self) -> None:
        """End the requests that have not ended."""
        for mailbox in self._mailboxes:
            if mailbox.output is None and mailbox.error is None:
                self._owner.abort(mailbox.request_id)

    def __enter__(self) -> "Submission":
        return self

    def __exit__(self, *exception: object) -> None:
        self.abort()


class AsyncInference:
    """Shares an engine between coroutines.

        async with AsyncInference(engine) as shared:
            async for delta in shared.stream("The 12 months are"):
                print(delta.text, end="")
            answers = await asyncio.gather(*(shared.generate(prompt) for prompt in prompts))

    Until it is closed the engine is its own: whoever else calls it gets a RuntimeError, but for `stats()` and `plan()`.
    Closing it leaves the engine open. A coroutine that is cancelled, or a stream that is not read to its end, ends its
    request and frees its pages.

    A step that fails ends the requests that took part in it, with `EngineError`; the engine goes on. If it cannot,
    `error` says why, and everything raises `EngineDead`.

    Args:
        engine: without unfinished requests.
        max_waiting: sequences that may wait to be run, those just handed over included; one more raises `EngineBusy`.
        stream_interval: seconds that the deltas of a stream are apart at least. Where there are so many streams that
            telling them would take more than a fiftieth of the time, which is taken from the steps, they are further
            apart, up to 0.25. The first delta and the last one do not wait.
    """

    def __init__(self, engine: Inference, max_waiting: int = 1024, stream_interval: float = 0.04):
        if engine.owner is not None:
            raise ValueError("the engine belongs to another AsyncInference: close that one first")
        if engine.has_unfinished_requests():
            raise ValueError("the engine has unfinished requests: finish or abort them first")
        self.engine, self.max_waiting, self.stream_interval = engine, max_waiting, stream_interval
        self.error: BaseException | None = None
        self._commands: deque[Callable[[], None]] = deque()
        self._mailboxes: dict[int, Mailbox] = {}  # of the requests that the engine has; the owner thread's
        self._num_pending = 0  # requests taken and not yet with the engine
        self._wake = threading.Condition()
        self._notified_at = -math.inf  # when all streams were told what is new
        self._notify_times = 0.0, 0.0  # seconds that the event loop took for the last two times
        self._is_closing = self._is_closed = False
        if engine.model.device.type == "cpu":
            release_openmp_threads()
        self._thread = engine.owner = threading.Thread(target=self._run, name="flex-nano-vllm engine", daemon=True)
        self._thread.start()

    # What coroutines call.

    async def generate(
        self, prompt: Prompt, sampling_params: SamplingParams | None = None, cache_salt: str | None = None
    ) -> RequestOutput:
        """Complete one prompt. Raises what `Inference.generate` does, `EngineBusy`, `EngineClosing`, `EngineError`."""
        with await self.submit([prompt], sampling_params, cache_salt, follow=False) as submission:
            async for ((_, output),) in submission:
                return output

    async def stream(
        self, prompt: Prompt, sampling_params: SamplingParams | None = None, cache_salt: str | None = None
    ) -> AsyncIterator[CompletionDelta]:
        """Complete one prompt, and give what is new as it comes. Raises what `generate` does."""
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
        """Answer one conversation. Raises what `Inference.chat` does, and what `generate` does."""
        return await self.generate(await self.chat_prompt(messages, tools), sampling_params, cache_salt)

    async def chat_prompt(self, messages: list[dict], tools: list[dict] | None = None) -> list[int]:
        """The tokens of a conversation, if there is room for its request."""
        self.check_open()
        self.check_room(1)
        return await asyncio.to_thread(self.engine.input_processor.chat_prompt, messages, tools)

    async def warmup(self) -> None:
        """`Inference.warmup`, in the thread that needs it."""
        await self.call(self.engine.warmup)

    def abort(self, request_id: int) -> None:
        """End a request; whoever waits for it gets what it has, with finish_reason "abort"."""
        with suppress(EngineDead, EngineClosing):  # then it has ended already
            self._command(partial(self._abort, request_id))

    async def call(self, function: Callable[[], Any]) -> Any:
        """Run a function between two steps, and return what it returns."""
        self.check_open()
        future: Future = Future()

        def command() -> None:
            if not future.set_running_or_notify_cancel():  # nobody waits any more
                return
            try:
                future.set_result(function())
            except BaseException as error:
                future.set_exception(error)

        self._command(command)
        return await asyncio.wrap_future(future)

    @property
    def num_waiting(self) -> int:
        """Sequences that are taken and do not run yet."""
        return self._num_pending + len(self.engine.scheduler.waiting)

    async def close(self, timeout: float = 30.0) -> None:
        """Take no more requests, let those that are there finish, and stop the thread. After `timeout` seconds what is
        left is ended with finish_reason "abort", as soon as the step is done; if it does not come to its end, whoever
        waits gets `EngineDead`, and the thread is left to itself."""
        self._is_closing = True
        with suppress(EngineDead, EngineClosing):  # the thread has ended already
            self._command(lambda: None)
            await asyncio.to_thread(self._thread.join, timeout)
            self._command(self._abort_all)
        await asyncio.to_thread(self._thread.join, STEP_TIMEOUT)
        if self._thread.is_alive():
            self.error = TimeoutError("a step does not come to its end")
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
        """Check requests, off the event loop, and hand them over, all or none. Raises what `generate` does.

        Args:
            follow: tell what is new as it comes; otherwise whole answers only, which takes less work.
        """
        params = SamplingParams() if params is None else params
        if not isinstance(params, SamplingParams):
            raise ValueError(f"sampling_params must be SamplingParams, got {params!r}")
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
        """Raises `EngineBusy` where so many more cannot wait now, and ValueError where they never can."""
        if num_sequences > self.max_waiting:
            raise ValueError(f"{num_sequences} sequences are more than the {self.max_waiting} that may wait at once")
        if self.num_waiting + num_sequences > self.max_waiting:
            raise EngineBusy(
                f"{self.num_waiting} of at most {self.max_waiting} sequences wait already, and {num_sequences} more "
                "would be too many: try again later"
            )

    def check_open(self) -> None:
        """Raises `EngineDead` or `EngineClosing` where no requests are taken."""
        if self.error is not None or self._is_closing:
            raise self._refusal()

    def _refusal(self) -> EngineDead | EngineClosing:
        if self.error is not None:
            return EngineDead(f"the engine has died: {self.error!r}")
        return EngineClosing("the engine is closing and takes no more requests")

    def _command(self, command: Callable[[], None]) -> None:
        """Let the owner thread do something before its next step. Raises `EngineDead` or `EngineClosing` if the thread
        has ended, be it since the caller has looked."""
        with self._wake:
            if self._is_closed:
                raise self._refusal()
            self._commands.append(command)
            self._wake.notify()

    # What the owner thread does.

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
            self.error = error  # from here on nobody comes any more; those who have come are told
            while not self._close_door():
                with suppress(Exception):
                    self._commands.popleft()()
            self._fail(list(self._mailboxes), EngineDead(f"the engine has died: {error!r}"))
        finally:
            self.engine.owner = None

    def _close_door(self) -> bool:
        """Take no more commands, if none is left."""
        with self._wake:
            self._is_closed = not self._commands
            return self._is_closed

    def _step(self) -> None:
        try:
            outputs = self.engine.run_one_step()
        except Exception as error:
            logger.exception("a step has failed")
            self.engine.abort_failed_step()
            # Whoever it does not have: those it gave up, and who was between its queues and its answer.
            queues = self.engine.scheduler.running, self.engine.scheduler.waiting
            left = {sequence.request_id for queue in queues for sequence in queue}
            ended = [request_id for request_id in self._mailboxes if request_id not in left]
            self._fail(ended, EngineError(f"the step has failed: {type(error).__name__}"))
            if self.engine.model.device.type == "cuda":
                torch.cuda.synchronize()  # raises again where the device takes no more work: then nothing can go on
            self.engine.check_invariants()
            return
        updated, now = [], time.perf_counter()
        # All streams at once: each time that the event loop runs, it takes a processor from the step.
        all_are_due = now - self._notified_at >= self._stream_interval()
        self._notified_at = now if all_are_due else self._notified_at
        for output in outputs:
            mailbox = self._mailboxes.pop(output.request_id)
            self._collect(mailbox)
            mailbox.output = output
            updated.append(mailbox)
        for mailbox in list(self._mailboxes.values()):
            if (all_are_due or mailbox.is_new) and self._collect(mailbox):
                updated.append(mailbox)
        self._notify(updated, is_timed=all_are_due)

    def _collect(self, mailbox: Mailbox) -> bool:
        """Put what is new into a mailbox. Whether there is something."""
        if mailbox.reader is None:
            return False
        try:
            deltas = list(mailbox.reader.deltas())
        except Exception as error:  # of this request alone
            logger.exception("the news of a request cannot be told")
            mailbox.error = EngineError(f"the answer cannot be made: {type(error).__name__}")
            if self._mailboxes.pop(mailbox.request_id, None) is not None:
                self.engine.abort(mailbox.request_id)
            return True
        mailbox.put(deltas)
        mailbox.is_new &= not deltas
        return bool(deltas)

    def _stream_interval(self) -> float:
        """Seconds until all streams are told again."""
        seconds = min(self._notify_times)  # the longer one may have been a pause for something else
        return max(self.stream_interval, min(seconds / NOTIFY_SHARE, MAX_STREAM_INTERVAL))

    def _fail(self, request_ids: list[int], error: EngineError) -> None:
        failed = [self._mailboxes.pop(request_id) for request_id in request_ids]
        for mailbox in failed:
            mailbox.error = error
        self._notify(failed)

    def _notify(self, mailboxes: list[Mailbox], is_timed: bool = False) -> None:
        """Wake those who wait, with one message for each loop: to send one costs more than to fill a mailbox."""
        by_loop: dict[asyncio.AbstractEventLoop, list[Mailbox]] = {}
        for mailbox in mailboxes:
            by_loop.setdefault(mailbox.loop, []).append(mailbox)
        for loop, group in by_loop.items():
            try:
                loop.call_soon_threadsafe(self._wake_all, group, is_timed)
            except RuntimeError:  # the loop is closed: its coroutines are gone, and nobody has said so
                for mailbox in group:
                    self._commands.append(partial(self._abort, mailbox.request_id))

    def _abort(self, request_id: int) -> None:
        """End a request that somebody has left, or that takes too long."""
        mailbox = self._mailboxes.pop(request_id, None)
        if mailbox is None:
            return
        try:
            output = self.engine.abort(request_id)
            self._collect(mailbox)
            mailbox.output = output
        except Exception as error:  # its pages are free all the same
            logger.exception("the answer of an aborted request cannot be made")
            mailbox.error = EngineError(f"the answer cannot be made: {type(error).__name__}")
        self._notify([mailbox])

    def _abort_all(self) -> None:
        for request_id in list(self._mailboxes):
            self._abort(request_id)

    # What an event loop does for it.

    def _wake_all(self, mailboxes: list[Mailbox], is_timed: bool) -> None:
        started = time.perf_counter()
        for mailbox in mailboxes:
            mailbox.filled.set()
        if is_timed:  # behind those who wait, who read and send before they wait again
            mailboxes[0].loop.call_soon(self._note_notifying, started)

    def _note_notifying(self, started: float) -> None:
        self._notify_times = self._notify_times[1], time.perf_counter() - started
