"""Token ids to text, as they come, up to the first stop text. Knows nothing of requests or of other ends.

Two things keep text back. A token may be part of a character, and what has come so far of a text may become one that
ends the output, so that nobody must see it:

    stop "END"    tokens    "the E"      "N"       "emy E"      "ND of"
                  shown     "the "       ""        "ENemy "     ""       and the output ends before "END"
"""

import functools

from tokenizers.decoders import DecodeStream
from transformers import PreTrainedTokenizerBase


def decode(tokenizer: PreTrainedTokenizerBase, token_ids: list[int], skip_special_tokens: bool) -> str:
    """The text of tokens. Without `clean_up_tokenization_spaces`, which some tokenizers have switched on: made for
    English word pieces, it takes spaces out of whatever looks like them, code included."""
    return tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False)


class StopMatcher:
    """How much of a stop text the latest characters are (Knuth, Morris and Pratt, https://doi.org/10.1137/0206024)."""

    def __init__(self, stop: str):
        self.stop = stop
        self.num_matched = 0
        self._shorter = _shorter_matches(stop)

    def feed(self, char: str) -> bool:
        """Whether the stop text ends with this character."""
        if self.num_matched == len(self.stop):  # it was not to end the output
            self.num_matched = self._shorter[-1]
        self.num_matched = _next_match(self.stop, self._shorter, self.num_matched, char)
        return self.num_matched == len(self.stop)


@functools.lru_cache(1024)  # the samples of a request, thousands perhaps, share them
def _shorter_matches(stop: str) -> list[int]:
    """By number of matched characters - 1: the longest match that is left without its first."""
    shorter = [0]
    for char in stop[1:]:
        shorter.append(_next_match(stop, shorter, shorter[-1], char))
    return shorter


def _next_match(stop: str, shorter: list[int], num_matched: int, char: str) -> int:
    while num_matched and stop[num_matched] != char:
        num_matched = shorter[num_matched - 1]
    return num_matched + (stop[num_matched] == char)


class Detokenizer:
    """The text of one output, token by token.

    Args:
        tokenizer: a fast one.
        silent: tokens that have no text: EOS and stop tokens, unless the text is to end with them.
        stops: the output ends where one of these begins. If several end with the same character, the longest counts.
        include_stop: let the text end with the stop text.
        min_tokens: stop texts that end within so many tokens do not count.
    Raises:
        ValueError: for a tokenizer that cannot decode a stream of tokens.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        silent: frozenset[int] = frozenset(),
        skip_special_tokens: bool = True,
        stops: tuple[str, ...] = (),
        include_stop: bool = False,
        min_tokens: int = 0,
    ):
        if not tokenizer.is_fast:
            raise ValueError(f"stop texts and streams need a fast tokenizer, not a {type(tokenizer).__name__}")
        self.tokenizer, self.silent, self.skip_special_tokens = tokenizer, silent, skip_special_tokens
        self.include_stop, self.min_tokens = include_stop, min_tokens
        self.text = ""  # all that is decoded, what is held back included; up to the stop text
        self.stop_reason: str | None = None
        self._matchers = [StopMatcher(stop) for stop in stops]
        self._stream = DecodeStream(skip_special_tokens=skip_special_tokens)
        self._num_tokens = self._num_decoded = 0  # the latter have their characters in `text`
        self._is_complete = False

    def update(self, token_ids: list[int], is_complete: bool = False) -> bool:
        """Take what is new in an output's tokens. `is_complete`: no more will come, so nothing is held back. Returns
        whether a stop text has been met; what comes after it has no text."""
        while self._num_tokens < len(token_ids) and self.stop_reason is None:
            self._num_tokens += 1
            self._take(self._step(token_ids))
        if is_complete and not self._is_complete and self.stop_reason is None:
            # A character that has not come to its end: the decoder's signs for what is missing.
            whole = self._decode(token_ids)
            is_longer = whole.startswith(self.text)  # if not: see `_step`
            self._take(whole[len(self.text) :] if is_longer else self._decode(token_ids[self._num_decoded :]))
        self._is_complete |= is_complete
        return self.stop_reason is not None

    def _step(self, token_ids: list[int]) -> str:
        """The characters that are complete with the latest token."""
        latest = token_ids[self._num_tokens - 1]
        if latest in self.silent:
            return ""
        try:
            new = self._stream.step(self.tokenizer.backend_tokenizer, latest)
        except Exception as error:
            if "Invalid prefix" not in str(error):
                raise
            # Where single bytes are tokens (Llama, Gemma), and those in a row are no text, all of them are decoded as
            # errors, even the letters among them. What was shown stays.
            self._stream = DecodeStream(ids=[latest], skip_special_tokens=self.skip_special_tokens)
            new = self._decode(token_ids[self._num_decoded : self._num_tokens])
        if new is None:
            return ""
        self._num_decoded = self._num_tokens
        return new

    def _decode(self, token_ids: list[int]) -> str:
        spoken = [token_id for token_id in token_ids if token_id not in self.silent]
        return decode(self.tokenizer, spoken, self.skip_special_tokens)

    def _take(self, new: str) -> None:
        for end, char in enumerate(new, start=1) if self._matchers else ():
            met = [matcher.stop for matcher in self._matchers if matcher.feed(char)]
            if met and self._num_tokens > self.min_tokens:
                self.stop_reason = max(met, key=len)
                self.text += new[:end]
                if not self.include_stop:
                    self.text = self.text[: -len(self.stop_reason)]
                return
        self.text += new

    @property
    def num_shown(self) -> int:
        """Characters of `text` that will stay, whatever comes."""
        if self._is_complete or self.stop_reason is not None:
            return len(self.text)
        return len(self.text) - max((matcher.num_matched for matcher in self._matchers), default=0)


def whole_text(
    tokenizer: PreTrainedTokenizerBase, token_ids: list[int], silent: frozenset[int], skip_special_tokens: bool
) -> str:
    """The text that a `Detokenizer` would have shown of the tokens, which costs less if nobody has followed them."""
    text = decode(tokenizer, [token_id for token_id in token_ids if token_id not in silent], skip_special_tokens)
    if "\ufffd" in text and tokenizer.is_fast:  # decoded one by one, bytes that are no text may make other signs
        detokenizer = Detokenizer(tokenizer, silent, skip_special_tokens)
        detokenizer.update(token_ids, is_complete=True)
        return detokenizer.text
    return text
