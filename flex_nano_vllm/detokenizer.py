"""Converts token ids to text incrementally, up to the first stop string. Independent of requests and of other stop
conditions.

Text is held back for two reasons. A token may be a part of a character, and the latest characters may become a stop
string, which must not be shown:

    stop "END"    tokens    "the E"      "N"       "emy E"      "ND of"
                  shown     "the "       ""        "ENemy "     ""       and the output ends before "END"
"""

import functools
import weakref
from collections import deque

from transformers import PreTrainedTokenizerBase

from flex_nano_vllm.vocabulary import TextWriter, decode, token_bytes


class StopMatcher:
    """Tracks how many characters of a stop string the latest characters match.

    The algorithm is that of Knuth, Morris and Pratt (https://doi.org/10.1137/0206024).
    """

    def __init__(self, stop: str):
        self.stop = stop
        self.num_matched = 0
        self._shorter = _shorter_matches(stop)

    def feed(self, char: str) -> bool:
        """Take one character. Return whether it completes the stop string."""
        if self.num_matched == len(self.stop):  # the complete match did not end the output
            self.num_matched = self._shorter[-1]
        self.num_matched = _next_match(self.stop, self._shorter, self.num_matched, char)
        return self.num_matched == len(self.stop)


@functools.lru_cache(1024)  # all samples of a request, which may be thousands, share the result
def _shorter_matches(stop: str) -> list[int]:
    """Return the failure function of a stop string.

    Entry i is the length of the longest proper suffix of `stop[: i + 1]` that is also a prefix of `stop`.
    """
    shorter = [0]
    for char in stop[1:]:
        shorter.append(_next_match(stop, shorter, shorter[-1], char))
    return shorter


def _next_match(stop: str, shorter: list[int], num_matched: int, char: str) -> int:
    while num_matched and stop[num_matched] != char:
        num_matched = shorter[num_matched - 1]
    return num_matched + (stop[num_matched] == char)


class Detokenizer:
    """Decodes the text of one output token by token.

    Args:
        tokenizer: a fast tokenizer.
        prompt_token_ids: the tokens before the output.
        hidden_token_ids: tokens that add no text: EOS and stop tokens, unless the text should end with them.
        stops: stop strings; the output ends where one begins. If several end with the same character, the longest
            counts. A stop string that contains the name of a special token is searched in the text with special tokens,
            even if the output skips them.
        include_stop: keep the stop string at the end of the text.
        min_tokens: stop strings that end within the first `min_tokens` tokens do not count.
        has_own_start: see `TextWriter`.
    Raises:
        ValueError: the tokenizer is not a fast one, so its tokens may have no bytes of their own.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        prompt_token_ids: list[int] | None = None,
        hidden_token_ids: frozenset[int] = frozenset(),
        skip_special_tokens: bool = True,
        stops: tuple[str, ...] = (),
        include_stop: bool = False,
        min_tokens: int = 0,
        has_own_start: bool = False,
    ):
        if not tokenizer.is_fast:
            raise ValueError(f"stop strings and streams need a fast tokenizer, not a {type(tokenizer).__name__}")
        self.tokenizer, self.hidden_token_ids, self.skip_special_tokens = (
            tokenizer,
            hidden_token_ids,
            skip_special_tokens,
        )
        self.include_stop, self.min_tokens = include_stop, min_tokens
        self.text = ""  # all decoded text, held-back characters included, up to the stop string
        self.stop_reason: str | None = None
        names = special_token_names(tokenizer) if stops and skip_special_tokens else ()
        self._matchers = [StopMatcher(stop) for stop in stops if not any(name in stop for name in names)]
        # These matchers also take the names of skipped special tokens. `_is_in_text` holds, for each of the latest
        # characters that they took, whether it is part of the text.
        self._matchers_of_all = [StopMatcher(stop) for stop in stops if any(name in stop for name in names)]
        self._is_in_text: deque[bool] = deque(maxlen=max(map(len, stops), default=0))
        self._writer = TextWriter(tokenizer, skip_special_tokens, prompt_token_ids or (), has_own_start)
        self._num_tokens = 0
        self._is_complete = False

    def update(self, token_ids: list[int], is_complete: bool = False, start: int = 0) -> bool:
        """Decode the new tokens of an output. Return whether a stop string was found.

        Tokens after the stop string add no text.

        Args:
            token_ids: all tokens, of which the output begins at `start`. They are not copied: outputs are long.
            is_complete: no more tokens follow, so no text is held back.
        """
        while start + self._num_tokens < len(token_ids) and self.stop_reason is None:
            token_id = token_ids[start + self._num_tokens]
            self._num_tokens += 1
            if token_id in self.hidden_token_ids:
                continue
            self._take(self._writer.write(token_id))
            if self._matchers_of_all and not token_bytes(self.tokenizer, token_id, skip_special_tokens=True):
                self._take_hidden(self.tokenizer.convert_ids_to_tokens(token_id) or "")
        if is_complete and not self._is_complete and self.stop_reason is None:
            self._take(self._writer.finish())
        self._is_complete |= is_complete
        return self.stop_reason is not None

    def _take(self, new: str) -> None:
        """Append characters to the text, up to the end of a stop string."""
        if not (self._matchers or self._matchers_of_all):
            self.text += new
            return
        for char in new:
            self.text += char
            self._is_in_text.append(True)
            if self._ends_with(char, self._matchers + self._matchers_of_all):
                return

    def _take_hidden(self, name: str) -> None:
        """Feed the name of a special token that the text skips to the stop strings that contain such names."""
        for char in name:
            self._is_in_text.append(False)
            if self._ends_with(char, self._matchers_of_all):
                return

    def _ends_with(self, char: str, matchers: list["StopMatcher"]) -> bool:
        met = [matcher for matcher in matchers if matcher.feed(char)]
        if not met or self._num_tokens <= self.min_tokens:
            return False
        longest = max(met, key=lambda matcher: len(matcher.stop))
        self.text = self.text[: len(self.text) - self._num_in_text(longest)]
        self.stop_reason = longest.stop
        if self.include_stop:
            self.text += longest.stop
        return True

    def _num_in_text(self, matcher: "StopMatcher") -> int:
        """Return how many of the characters that a matcher has matched are part of the text."""
        if matcher in self._matchers:
            return matcher.num_matched
        return sum(self._is_in_text[-i] for i in range(1, matcher.num_matched + 1))

    @property
    def num_shown(self) -> int:
        """Number of characters of `text` that no later token can remove."""
        if self._is_complete or self.stop_reason is not None:
            return len(self.text)
        matchers = self._matchers + self._matchers_of_all
        return len(self.text) - max(map(self._num_in_text, matchers), default=0)


def special_token_names(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Return the names of all special tokens, cached until tokens are added. Thousands of tokens take milliseconds."""
    size, names = _special_names.get(tokenizer, (None, []))
    if size != len(tokenizer):
        added = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
        names = [*added, *tokenizer.all_special_tokens]
        _special_names[tokenizer] = len(tokenizer), names
    return names


# By tokenizer: the number of its tokens, and the names of its special tokens
_special_names: "weakref.WeakKeyDictionary[PreTrainedTokenizerBase, tuple[int, list[str]]]"
_special_names = weakref.WeakKeyDictionary()


def text_of(
    tokenizer: PreTrainedTokenizerBase,
    prompt_token_ids: list[int],
    token_ids: list[int],
    hidden_token_ids: frozenset[int],
    skip_special_tokens: bool,
    has_own_start: bool,
) -> str:
    """Return the text of an output that was not decoded token by token. A `Detokenizer` gives the same text."""
    if not tokenizer.is_fast:  # its tokens may have no bytes of their own
        output = [token_id for token_id in token_ids if token_id not in hidden_token_ids]
        before = decode(tokenizer, prompt_token_ids, skip_special_tokens)
        return decode(tokenizer, prompt_token_ids + output, skip_special_tokens).removeprefix(before)
    writer = TextWriter(tokenizer, skip_special_tokens, prompt_token_ids, has_own_start)
    return "".join(
        [*(writer.write(token_id) for token_id in token_ids if token_id not in hidden_token_ids), writer.finish()]
    )
