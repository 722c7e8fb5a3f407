"""The benchmark's workload on Hugging Face transformers alone, as a baseline. Does not use the engine."""

import time

import torch
from transformers import ContinuousBatchingConfig, GenerationConfig, PreTrainedModel, StoppingCriteria

from benchmarks.exactness import compare, plain_generation
from benchmarks.report import FinishedRequest
from benchmarks.workload import WorkloadRequest

NUM_CHECKED = 4  # outputs of continuous batching that are compared with the model's own choices


class _Clock(StoppingCriteria):
    """Records the time of each token of a batch. Never stops generation."""

    def __init__(self):
        self.times: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: object) -> torch.Tensor:
        self.times.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def padded_batches(
    model: PreTrainedModel, requests: list[WorkloadRequest], batch_size: int
) -> tuple[list[FinishedRequest], float]:
    """Call `generate` on batches in the order of the requests, with prompts padded on the left.

    A batch runs until its longest output is complete, as in a script without an engine. Tokens of a request beyond its
    `max_tokens` are not counted. Returns the requests and the seconds of the whole run.
    """
    finished = []
    started = time.perf_counter()
    for first in range(0, len(requests), batch_size):
        batch = requests[first : first + batch_size]
        longest = max(len(request.prompt_token_ids) for request in batch)
        padding = [longest - len(request.prompt_token_ids) for request in batch]
        input_ids = torch.tensor([[0] * n + list(r.prompt_token_ids) for n, r in zip(padding, batch)])
        mask = torch.tensor([[0] * n + [1] * (longest - n) for n in padding])
        num_tokens = max(request.max_tokens for request in batch)
        clock = _Clock()
        with plain_generation(model):
            model.generate(
                input_ids.to(model.device),
                attention_mask=mask.to(model.device),
                max_new_tokens=num_tokens,
                min_new_tokens=num_tokens,
                do_sample=False,
                stopping_criteria=[clock],
            )
        for request in batch:
            answer_times = clock.times[: request.max_tokens]
            finished.append(_finished(request, [t - started for t in answer_times]))
    return finished, time.perf_counter() - started


def continuous_batching(
    model: PreTrainedModel, requests: list[WorkloadRequest], batch_size: int
) -> tuple[list[FinishedRequest], float]:
    """Run the requests with transformers' own continuous batching. Returns the requests and the seconds.

    Raises RuntimeError if its first outputs differ from the model's own choices. Without CUDA, it ignores the attention
    softcap of a model (transformers 5.17 to 5.23), and the throughput of wrong tokens is no baseline.
    """
    batching = ContinuousBatchingConfig(max_requests_per_batch=batch_size, allow_block_sharing=False)
    greedy = GenerationConfig(do_sample=False, pad_token_id=0, eos_token_id=-1)
    results = {}
    with (
        plain_generation(model),
        model.continuous_batching_context_manager(
            generation_config=greedy, continuous_batching_config=batching, block=True
        ) as manager,
    ):
        started = time.perf_counter()
        ids = [
            manager.add_request(
                list(request.prompt_token_ids), max_new_tokens=request.max_tokens, record_timestamps=True
            )
            for request in requests
        ]
        while len(results) < len(requests):
            result = manager.get_result(timeout=1)
            if result is not None and result.is_finished():
                results[result.request_id] = result
            elif result is None and not manager.is_running():
                raise RuntimeError("transformers' continuous batching stopped before all requests were finished")
        seconds = time.perf_counter() - started
    answers = [results[id_].generated_tokens for id_ in ids]
    prompts, checked = [list(request.prompt_token_ids) for request in requests[:NUM_CHECKED]], answers[:NUM_CHECKED]
    mismatches = compare(model, prompts, checked, checked).mismatches
    if mismatches:
        raise RuntimeError(
            f"no figures: {mismatches} of {sum(map(len, checked))} tokens of transformers' continuous batching differ "
            "from the model's own choices"
        )
    return [_finished(r, [t - started for t in results[i].timestamps]) for r, i in zip(requests, ids)], seconds


def _finished(request: WorkloadRequest, token_times: list[float]) -> FinishedRequest:
    """Return counts and latencies of a request. `token_times` are seconds since the start, when all requests arrive."""
    assert len(token_times) == request.max_tokens
    first, last = token_times[0], token_times[-1]
    tpot = (last - first) / (len(token_times) - 1) if len(token_times) > 1 else None
    return FinishedRequest(len(request.prompt_token_ids), request.max_tokens, first, tpot)
