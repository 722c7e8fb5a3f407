"""Tokens to text: the bytes of a token, and text that is decoded token by token up to the first stop string.
Independent of requests and of other stop conditions.

The bytes of tokens determine the text of an output, the offsets and `bytes` of its log-probabilities, and the position
where a stop string ends. Therefore these cannot disagree.

    Llama-2      "▁fox"      b" fox"   (b"fox" at the beginning of a text: the decoder drops one space)
    Gemma        "<0xF0>"    b"\\xf0"   (the first byte of an emoji)
    GPT-2, Qwen  "Ġfox"      b" fox"
    all          "<eos>"     b"<eos>", or b"" if special tokens are skipped

Text is held back for two reasons. A token may be a part of a character, and the latest characters may become a stop
string, which must not be shown:

    stop "END"    tokens    "the E"      "N"       "emy E"      "ND of"
                  shown     "the "       ""        "ENemy "     ""       and the output ends before "END"
"""

import codecs
import functools
import itertools
import re
import weakref
from collections import deque
from collections.abc import Sequence as SequenceOf

from transformers import PreTrainedTokenizerBase

MAX_DRIFT = 3  # characters that a tokenizer may remove from a text or add to it, such as spaces
REPLACEMENT = "\ufffd"  # written by a decoder for bytes that are not UTF-8
# By tokenizer: (token id, skip_special_tokens, begins_text) to bytes
_bytes_of_token: "weakref.WeakKeyDictionary[PreTrainedTokenizerBase, dict[tuple[int, bool, bool], bytes]]"
_bytes_of_token = weakref.WeakKeyDictionary()


def decode(tokenizer: PreTrainedTokenizerBase, token_ids: list[int], skip_special_tokens: bool) -> str:
    """Decode tokens with the tokenizer, without `clean_up_tokenization_spaces`.

    Some tokenizers enable this option. It was made for English word pieces and removes spaces from code.
    """
    return tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False)


def token_bytes(
    tokenizer: PreTrainedTokenizerBase, token_id: int, skip_special_tokens: bool, begins_text: bool = False
) -> bytes:
    """Return the UTF-8 bytes that a token adds to a text.

    Args:
        skip_special_tokens: special tokens add nothing.
        begins_text: no token before this one has text. Some decoders then drop a leading space.
    """
    cached = _bytes_of_token.setdefault(tokenizer, {})
    key = token_id, skip_special_tokens, begins_text
    if key not in cached:
        text = _token_bytes(tokenizer, *key)
        if not text and tokenizer.convert_ids_to_tokens(token_id) is None:
            return b""  # id outside the vocabulary; not cached, because tokens can be added later
        cached[key] = text
    return cached[key]


def has_text(tokenizer: PreTrainedTokenizerBase, token_id: int, skip_special_tokens: bool) -> bool:
    """Return whether a token adds anything to a text, at its beginning or later."""
    return any(token_bytes(tokenizer, token_id, skip_special_tokens, begins_text) for begins_text in (False, True))


def _token_bytes(
    tokenizer: PreTrainedTokenizerBase, token_id: int, skip_special_tokens: bool, begins_text: bool
) -> bytes:
    text = alone = decode(tokenizer, [token_id], skip_special_tokens)
    if not begins_text:  # decode the token twice and remove the first copy
        text = decode(tokenizer, [token_id, token_id], skip_special_tokens).removeprefix(alone)
    if REPLACEMENT in alone + text:  # part of a character: only the token's name contains the bytes
        name = tokenizer.convert_ids_to_tokens(token_id)
        if re.fullmatch("<0x[0-9A-F]{2}>", name):  # byte fallback: Llama, Gemma
            return bytes([int(name[3:5], 16)])
        if all(char in BYTE_OF_CHAR for char in name):  # byte level: GPT-2, Llama 3, Qwen
            return bytes(BYTE_OF_CHAR[char] for char in name)
    return text.encode()


def _byte_of_char() -> dict[str, int]:
    """Return GPT-2's alphabet, in which byte-level vocabularies are written, as a map from character to byte.

    Printable bytes are Latin-1 characters. The other bytes, in order, are the characters from 256 on
    (https://github.com/openai/gpt-2/blob/master/src/encoder.py).
    """
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


BYTE_OF_CHAR = _byte_of_char()


def token_name(content: bytes) -> str:
    """Return the name of a token in log-probabilities.

    The name is the token's text, or `bytes:\\xf0\\x9f` (OpenAI's form) if the token is part of a character.
    """
    try:
        return content.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in content)


class TextWriter:
    """Converts the tokens of a text to characters, each as soon as its last byte is known.

    Args:
        prompt_token_ids: the tokens before the text. A character that the prompt leaves unfinished is part of the text.
        has_own_start: the first token keeps its leading space, even if the prompt has no text.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        skip_special_tokens: bool = True,
        prompt_token_ids: SequenceOf[int] = (),
        has_own_start: bool = False,
    ):
        self.tokenizer, self.skip_special_tokens = tokenizer, skip_special_tokens
        self.begins_text = not has_own_start
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        end = b""
        for token_id in reversed(prompt_token_ids):
            end = token_bytes(tokenizer, token_id, skip_special_tokens) + end
            self.begins_text = self.begins_text and not has_text(tokenizer, token_id, skip_special_tokens)
            if len(end) >= 3:  # an unfinished character has at most three bytes
                break
        self._utf8.decode(end)

    def write(self, token_id: int) -> str:
        """Take one token and return the characters that it completes."""
        content = token_bytes(self.tokenizer, token_id, self.skip_special_tokens, self.begins_text)
        if self.begins_text:
            self.begins_text = not has_text(self.tokenizer, token_id, self.skip_special_tokens)
        return self._utf8.decode(content)

    def finish(self) -> str:
        """Return the replacement character for an unfinished last character; "" if the text is complete."""
        return self._utf8.decode(b"", final=True)


class OffsetCounter:
    """Computes where tokens begin in a text, starting at a position."""

    def __init__(self, writer: TextWriter, position: int = 0):
        self.writer, self.position = writer, position

    def take(self, token_ids: SequenceOf[int]) -> list[int]:
        """Take more tokens and return their offsets in characters."""
        offsets = []
        for token_id in token_ids:
            offsets.append(self.position)
            self.position += len(self.writer.write(token_id))
        return offsets


def echo(
    tokenizer: PreTrainedTokenizerBase, prompt: str | None, token_ids: list[int], skip_special_tokens: bool
) -> tuple[str, list[int]]:
    """Return the text of a prompt and the offset of each of its tokens.

    A prompt given as a string is returned unchanged. Tokens that it does not contain (BOS) have no width. If the
    tokenizer normalizes its input, offsets within the prompt are only as accurate as the widths of its tokens allow.
    """
    writer = TextWriter(tokenizer, skip_special_tokens or prompt is not None)
    if prompt is None:
        pieces = [writer.write(token_id) for token_id in token_ids]
        return "".join(pieces), list(itertools.accumulate(map(len, pieces[:-1]), initial=0))
    position, offsets = 0, []
    for token_id in token_ids:
        piece, start = writer.write(token_id), position
        name = tokenizer.convert_ids_to_tokens(token_id)
        # A special token is in the prompt or was added by the tokenizer.
        if name and not has_text(tokenizer, token_id, skip_special_tokens=True):
            last = position and position + MAX_DRIFT
            found = prompt.find(name, max(0, position - MAX_DRIFT), last + len(name))
            piece, start = ("", position) if found < 0 else (name, max(found, offsets[-1] if offsets else 0))
        offsets.append(start)
        position = min(start + len(piece), len(prompt))
    return prompt, offsets


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
