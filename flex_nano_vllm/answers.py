"""What users see of sequences: texts, log-probabilities, what is new since they last looked. Knows nothing of steps."""

import re
import weakref
from collections.abc import Iterator
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from flex_nano_vllm.detokenizer import decode, whole_text
from flex_nano_vllm.outputs import CompletionDelta, CompletionOutput, Logprob, RequestOutput
from flex_nano_vllm.sequence import Rating, Sequence

_names: "weakref.WeakKeyDictionary[PreTrainedTokenizerBase, dict[int, str]]" = weakref.WeakKeyDictionary()


def request_output(group: list[Sequence], tokenizer: PreTrainedTokenizerBase | None) -> RequestOutput:
    """The answer that the samples of a request have come to."""
    first = group[0]
    prompt_token_ids = first.token_ids[: first.num_prompt_tokens]
    prompt_logprobs = None
    if first.rates_prompt:
        rated = zip(prompt_token_ids[1:], first.prompt_ratings)
        prompt_logprobs = [None, *(logprobs(token_id, rating, tokenizer) for token_id, rating in rated)]
    return RequestOutput(
        request_id=first.request_id,
        prompt=first.prompt,
        prompt_token_ids=prompt_token_ids,
        outputs=[_completion(index, sequence, tokenizer) for index, sequence in enumerate(group)],
        metrics=first.metrics,
        num_cached_tokens=first.num_cached_tokens or 0,
        prompt_logprobs=prompt_logprobs,
        finished=all(sequence.finish_reason for sequence in group),
    )


def _completion(index: int, sequence: Sequence, tokenizer: PreTrainedTokenizerBase | None) -> CompletionOutput:
    token_ids, ratings, params = sequence.output_token_ids, None, sequence.params
    if params.logprobs is not None:
        ratings = [logprobs(token_id, rating, tokenizer) for token_id, rating in zip(token_ids, sequence.ratings)]
    if sequence.text is not None:
        text = sequence.text.text[: sequence.text.num_shown]
    elif tokenizer is not None:
        silent = frozenset() if params.include_stop_str_in_output else sequence.stop_token_ids
        text = whole_text(tokenizer, token_ids, silent, params.skip_special_tokens)
    else:
        text = None
    return CompletionOutput(
        index=index,
        text=text,
        token_ids=token_ids,
        finish_reason=sequence.finish_reason,
        stop_reason=sequence.stop_reason,
        cumulative_logprob=None if ratings is None else sum(rating.logprob for rating in sequence.ratings),
        logprobs=ratings,
    )


def logprobs(token_id: int, rating: Rating, tokenizer: PreTrainedTokenizerBase | None) -> dict[int, Logprob]:
    """The token first, then the most likely ones in order."""
    named = {token_id: Logprob(rating.logprob, rating.rank, token_text(token_id, tokenizer))}
    for rank, (other, logprob) in enumerate(rating.top, start=1):
        if other != token_id:
            named[other] = Logprob(logprob, rank, token_text(other, tokenizer))
    return named


def token_text(token_id: int, tokenizer: PreTrainedTokenizerBase | None) -> str | None:
    """A name for a token by itself: its text, or what the vocabulary calls it where it is part of a character."""
    if tokenizer is None:
        return None
    names = _names.setdefault(tokenizer, {})  # a prompt's log-probabilities name thousands
    if token_id not in names:
        names[token_id] = _token_text(token_id, tokenizer)
    return names[token_id]


def _token_text(token_id: int, tokenizer: PreTrainedTokenizerBase) -> str:
    text = decode(tokenizer, [token_id], skip_special_tokens=False)
    name = tokenizer.convert_ids_to_tokens(token_id)
    if name is None:  # beyond the tokenizer's vocabulary, in the padding of the model's
        return ""
    if "\ufffd" in text or re.fullmatch("<0x[0-9A-F]{2}>", name):
        return name
    # Some decoders take one space from the first token of a text.
    spaces = " " * (len(name) - len(name.lstrip("▁")))
    return text if text.startswith((spaces, "▁")) else spaces + text.lstrip(" ")


@dataclass
class Reader:
    """Follows the samples of a request, and tells what has come since it was last asked."""

    group: list[Sequence]
    tokenizer: PreTrainedTokenizerBase | None

    def __post_init__(self):
        self._read = [(0, 0)] * len(self.group)  # tokens and characters that were told
        self._ended = [False] * len(self.group)

    def news(self) -> Iterator[CompletionDelta]:
        """A delta of each sample that has something new."""
        for index, sequence in enumerate(self.group):
            num_tokens, num_chars = self._read[index]
            reached = sequence.output_len
            if self._ended[index] or (reached == num_tokens and sequence.finish_reason is None):
                continue
            token_ids, text, ratings = sequence.output_token_ids[num_tokens:], None, None
            if sequence.text is not None:
                text = sequence.text.text[num_chars : sequence.text.num_shown]
            if sequence.params.logprobs is not None:
                new = zip(token_ids, sequence.ratings[num_tokens:])
                ratings = [logprobs(token_id, rating, self.tokenizer) for token_id, rating in new]
            self._read[index] = reached, num_chars + len(text or "")
            self._ended[index] = sequence.finish_reason is not None
            yield CompletionDelta(
                sequence.request_id, index, text, token_ids, ratings, sequence.finish_reason, sequence.stop_reason
            )

    @property
    def has_ended(self) -> bool:
        """Whether the last word has been told."""
        return all(self._ended)
