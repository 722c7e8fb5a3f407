"""An engine held to Hugging Face: the same greedy tokens in every company. Knows nothing of how the engine works.

Every token must be the one that the model, run by Hugging Face over the same tokens (teacher-forced), finds most
likely, or a near-tie: so little less likely that rounding decides. What is neither is a mismatch.
"""

from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from flex_nano_vllm.generation_defaults import plain_generation
from flex_nano_vllm.inference import Inference
from flex_nano_vllm.sampling_params import SamplingParams

# How much less likely, in nats, a token may be than Hugging Face's own choice: rounding decides between such two.
NEAR_TIE = {torch.float64: 1e-9, torch.float32: 1e-3, torch.float16: 0.1, torch.bfloat16: 0.25}


@dataclass(frozen=True)
class Comparison:
    """Outputs of an engine beside those of Hugging Face."""

    num_outputs: int
    num_equal: int  # token for token
    num_tokens: int
    near_ties: int
    mismatches: int
    largest_near_tie: float  # nats


def greedy_tokens(engine: Inference, prompts: list[list[int]], max_tokens: int) -> list[list[int]]:
    engine.reset_prefix_cache()  # what was computed in other company must not stand in for what is computed in this
    greedy = SamplingParams(temperature=0, max_tokens=max_tokens)
    return [output.outputs[0].token_ids for output in engine.generate(prompts, greedy, use_tqdm=False)]


def greedy_in_all_company(
    engine: Inference, prompts: list[list[int]], strangers: list[list[int]], max_tokens: int
) -> dict[str, list[list[int]]]:
    """The prompts' greedy tokens: alone, batched, in reverse order, among strangers, under preemption."""
    return {
        "alone": [greedy_tokens(engine, [prompt], max_tokens)[0] for prompt in prompts],
        "batched": greedy_tokens(engine, prompts, max_tokens),
        "reordered": greedy_tokens(engine, prompts[::-1], max_tokens)[::-1],
        "among strangers": greedy_tokens(engine, prompts + strangers, max_tokens)[: len(prompts)],
        "under preemption": greedy_under_preemption(engine, prompts, max_tokens),
    }


def greedy_under_preemption(engine: Inference, prompts: list[list[int]], max_tokens: int) -> list[list[int]]:
    """Greedy tokens when every other step the newest request loses its pages and has to start again, with what it finds
    of them if the engine caches prefixes."""
    engine.reset_prefix_cache()
    greedy = SamplingParams(temperature=0, max_tokens=max_tokens)
    request_ids, tokens = [], {}
    try:
        for prompt in prompts:
            request_ids.append(engine.add_request(prompt, greedy))
        while engine.has_unfinished_requests():
            for output in engine.run_one_step() + engine.run_one_step():
                tokens[output.request_id] = output.outputs[0].token_ids
            if len(engine.scheduler.running) > 1:  # the oldest must get on
                engine.scheduler.preempt_newest()
    finally:
        for request_id in request_ids:  # after an exception their pages are given back
            engine.abort(request_id)
    return [tokens[request_id] for request_id in request_ids]


def hf_generate(model: PreTrainedModel, prompt: list[int], max_tokens: int) -> list[int]:
    """Greedy tokens of one prompt, alone, by transformers. The model must not be an engine's (`Inference.close`)."""
    input_ids = torch.tensor([prompt], device=model.device)
    with plain_generation(model):
        output = model.generate(
            input_ids, attention_mask=torch.ones_like(input_ids), max_new_tokens=max_tokens, do_sample=False
        )
    return output[0, len(prompt) :].tolist()


@torch.no_grad()
def hf_deficits(model: PreTrainedModel, prompt: list[int], tokens: list[int]) -> list[float]:
    """For each token, by how many nats Hugging Face finds its own choice more likely, given the tokens before."""
    logits = model(torch.tensor([prompt + tokens], device=model.device)).logits[0, len(prompt) - 1 : -1]
    logprobs = logits.double().log_softmax(dim=-1)
    chosen = logprobs.gather(1, torch.tensor(tokens, device=model.device)[:, None])[:, 0]
    return (logprobs.amax(dim=-1) - chosen).tolist()


def compare(
    model: PreTrainedModel, prompts: list[list[int]], outputs: list[list[int]], expected: list[list[int]]
) -> Comparison:
    """Hold the engine's outputs to Hugging Face's; `expected` are the tokens of `hf_generate`."""
    tolerance = NEAR_TIE[model.dtype]
    mismatches, ties = 0, []
    for prompt, tokens, reference in zip(prompts, outputs, expected, strict=True):
        deficits = hf_deficits(model, prompt, tokens)
        mismatches += sum(not deficit <= tolerance for deficit in deficits)
        ties += [deficit for deficit in deficits if 0 < deficit <= tolerance]
        # As long as the tokens are the same, so must be the moment to stop.
        common = min(len(tokens), len(reference))
        mismatches += tokens[:common] == reference[:common] and len(tokens) != len(reference)
    return Comparison(
        num_outputs=len(outputs),
        num_equal=sum(tokens == reference for tokens, reference in zip(outputs, expected)),
        num_tokens=sum(map(len, outputs)),
        near_ties=len(ties),
        mismatches=mismatches,
        largest_near_tie=max(ties, default=0.0),
    )
