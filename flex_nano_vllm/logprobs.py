"""Log-probabilities of sampled tokens and of prompt tokens. Independent of how tokens are chosen."""

import numpy as np
import torch
from torch import Tensor

from flex_nano_vllm.device import upload
from flex_nano_vllm.scheduler import Chunk
from flex_nano_vllm.sequence import TokenLogprob

# Logits rows for each call of `logprobs_of`, which bounds its float32 copies.
LOGPROB_ROWS_AT_ONCE = 64

Logprobs = tuple[TokenLogprob, ...]


def with_logprobs(
    tokens: Tensor, logits: Tensor, chunks: list[Chunk]
) -> tuple[list[int], list[Logprobs], list[Logprobs]]:
    """Copy the sampled tokens of a step to the host, with the log-probabilities that its chunks ask for.

    Args:
        tokens: [C], the sampled token of each chunk; negative if it has none.
        logits: [W, V], `num_logits` logits rows for each chunk.
    Returns:
        Three lists with an entry for each chunk: its token, the log-probabilities of the token, and those of prompt
        tokens. They are empty if the chunk does not ask for them.
    """
    params, nothing = [chunk.sequence.params for chunk in chunks], [()] * len(chunks)
    if all(asked.logprobs is None and asked.prompt_logprobs is None for asked in params):
        return tokens.tolist(), nothing, nothing
    rows, index, token_ids, first = [], [], [], 0  # those of a chunk: prompt tokens, then the sampled token
    is_asked = [chunk.needs_sample and chunk.sequence.params.logprobs is not None for chunk in chunks]
    for i, chunk in enumerate(chunks):
        of_prompt = [chunk.sequence.token_ids[position + 1] for position in chunk.logprob_positions]
        rows += range(first, first + len(of_prompt))
        first += chunk.num_logits
        rows += [first - 1] * is_asked[i]
        token_ids += of_prompt + [-1] * is_asked[i]  # -1: the sampled token, which only the device knows yet
        index += [i] * (len(of_prompt) + is_asked[i])
    if not rows:
        return tokens.tolist(), nothing, nothing
    num_top = max(max(asked.logprobs or 0, asked.prompt_logprobs or 0) for asked in params)
    rows, index, token_ids = upload([np.array(rows), np.array(index), np.array(token_ids)], logits.device)
    token_ids = torch.where(token_ids < 0, tokens[index].clamp(min=0), token_ids)
    parts = zip(rows.split(LOGPROB_ROWS_AT_ONCE), token_ids.split(LOGPROB_ROWS_AT_ONCE))
    results = torch.cat([logprobs_of(logits[some_rows], some_ids, num_top) for some_rows, some_ids in parts])
    numbers = torch.cat([tokens.double(), results.flatten()]).cpu().numpy()
    results, sampled, prompt = iter(numbers[len(chunks) :].reshape(results.shape).tolist()), [], []
    for chunk, asked, of_sampled in zip(chunks, params, is_asked):
        prompt.append(tuple(_token_logprob(next(results), asked.prompt_logprobs) for _ in chunk.logprob_positions))
        sampled.append((_token_logprob(next(results), asked.logprobs),) if of_sampled else ())
    return numbers[: len(chunks)].astype(int).tolist(), sampled, prompt


def logprobs_of(logits: Tensor, token_ids: Tensor, num_top: int) -> Tensor:
    """Return log-probability and rank of one token for each logits row, and the most likely tokens.

    Args:
        logits: [S, V].
        token_ids: [S].
    Returns:
        [S, 2 + 2 * num_top] float64: the token's log-probability and rank (1: the most likely), then the ids of the
        `num_top` most likely tokens, then their log-probabilities.
    """
    logprobs = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(dim=-1)
    own = logprobs.gather(1, token_ids[:, None])
    rank = (logprobs > own).sum(dim=-1, keepdim=True, dtype=torch.int32) + 1
    top = logprobs.topk(num_top)
    return torch.cat([own.double(), rank.double(), top.indices.double(), top.values.double()], dim=1)


def _token_logprob(numbers: list[float], num_top: int) -> TokenLogprob:
    logprob, rank, *top = numbers
    half = len(top) // 2
    return TokenLogprob(
        logprob, int(rank), [(int(i), value) for i, value in zip(top[:num_top], top[half : half + num_top])]
    )
