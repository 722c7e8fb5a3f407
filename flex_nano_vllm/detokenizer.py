"""Token ids to text, as they come, up to the first stop string. Knows nothing of requests or of other ends.

Two things hold text back. A token may be a part of a character, and the latest characters may become a stop string,
which must not be shown:

    stop "END"    tokens    "the E"      "N"       "emy E"      "ND of"
                  shown     "the "       ""        "ENemy "     ""       and the output ends before "END"
"""

import functools
import weakref
from collections import deque

from transformers import PreTrainedTokenizerBase

from flex_nano_vllm.vocabulary import TextWriter, decode, token_bytes


class StopMatcher:
    """How much of a stop string the latest characters are (Knuth, Morris and Pratt, https://doi.org/10.1137/0206024)."""

    def __init__(self, stop: str):
        self.stop = stop
        self.num_matched = 0
        self._shorter = _shorter_matches(stop)

    def feed(self, char: str) -> bool:
        """Whether the stop string ends with this character."""
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
        prompt_token_ids: what the output continues.
        hidden_token_ids: tokens without text: EOS and stop tokens, unless the text is to end with them.
        stops: the output ends where one of these begins. If several end with the same character, the longest counts.
            One that names a special token is looked for in the text with special tokens, even if the output skips them.
        include_stop: let the text end with the stop string.
        min_tokens: stop strings that end within so many tokens do not count.
        has_own_start: see `TextWriter`.
    Raises:
        ValueError: for a tokenizer whose tokens have no bytes of their own.
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
        self.text = ""  # everything decoded, with what is held back; up to the stop string
        self.stop_reason: str | None = None
        names = special_token_names(tokenizer) if stops and skip_special_tokens else ()
        self._matchers = [StopMatcher(stop) for stop in stops if not any(name in stop for name in names)]
        # These see special tokens too. Of the latest characters that they saw, which ones are part of the text?
        self._matchers_of_all = [StopMatcher(stop) for stop in stops if any(name in stop for name in names)]
        self._is_in_text: deque[bool] = deque(maxlen=max(map(len, stops), default=0))
        self._writer = TextWriter(tokenizer, skip_special_tokens, prompt_token_ids or (), has_own_start)
        self._num_tokens = 0
        self._is_complete = False

    def update(self, token_ids: list[int], is_complete: bool = False) -> bool:
        """Take what is new in an output's tokens. `is_complete`: no more will come, so nothing is held back. Returns
        whether a stop string has been met; what comes after it has no text."""
        while self._num_tokens < len(token_ids) and self.stop_reason is None:
            token_id = token_ids[self._num_tokens]
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
        """Add characters to the text, up to the end of a stop string."""
        if not (self._matchers or self._matchers_of_all):
            self.text += new
            return
        for char in new:
            self.text += char
            self._is_in_text.append(True)
            if self._ends_with(char, self._matchers + self._matchers_of_all):
                return

    def _take_hidden(self, name: str) -> None:
        """Let those stop strings that name a special token see one that the text does not show."""
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
        """Characters of the text that are part of what a matcher has matched."""
        if matcher in self._matchers:
            return matcher.num_matched
        return sum(self._is_in_text[-i] for i in range(1, matcher.num_matched + 1))

    @property
    def num_shown(self) -> int:
        """Characters of `text` that will stay, whatever comes."""
        if self._is_complete or self.stop_reason is not None:
            return len(self.text)
        matchers = self._matchers + self._matchers_of_all
        return len(self.text) - max(map(self._num_in_text, matchers), default=0)


def special_token_names(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The contents of all special tokens. Remembered until tokens are added: of thousands it takes milliseconds."""
    size, names = _special_names.get(tokenizer, (None, []))
    if size != len(tokenizer):
        added = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
        names = [*added, *tokenizer.all_special_tokens]
        _special_names[tokenizer] = len(tokenizer), names
    return names


# By tokenizer: the number of its tokens, and the names of the special ones.
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
    """The text of an output that was not decoded token by token: what a `Detokenizer` shows in the end."""
    if not tokenizer.is_fast:  # its tokens may have no bytes of their own
        output = [token_id for token_id in token_ids if token_id not in hidden_token_ids]
        before = decode(tokenizer, prompt_token_ids, skip_special_tokens)
        return decode(tokenizer, prompt_token_ids + output, skip_special_tokens).removeprefix(before)
    writer = TextWriter(tokenizer, skip_special_tokens, prompt_token_ids, has_own_start)
    return "".join(
        [*(writer.write(token_id) for token_id in token_ids if token_id not in hidden_token_ids), writer.finish()]
    )
