"""The bytes and the name of a token in a text. Independent of models and requests.

The bytes of tokens determine the text of an output, the offsets and `bytes` of its log-probabilities, and the position
where a stop string ends. Therefore these cannot disagree.

    Llama-2      "▁fox"      b" fox"   (b"fox" at the beginning of a text: the decoder drops one space)
    Gemma        "<0xF0>"    b"\\xf0"   (the first byte of an emoji)
    GPT-2, Qwen  "Ġfox"      b" fox"
    all          "<eos>"     b"<eos>", or b"" if special tokens are skipped
"""

import codecs
import itertools
import re
import weakref
from collections.abc import Sequence as SequenceOf

from transformers import PreTrainedTokenizerBase

MAX_DRIFT = 3  # characters that a tokenizer may remove from a text or add to it, such as spaces
REPLACEMENT = "\ufffd"  # written by a decoder for bytes that are not UTF-8
# By tokenizer: (token id, skip_special_tokens, begins_text) to bytes
_known: "weakref.WeakKeyDictionary[PreTrainedTokenizerBase, dict[tuple[int, bool, bool], bytes]]"
_known = weakref.WeakKeyDictionary()


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
    known = _known.setdefault(tokenizer, {})
    key = token_id, skip_special_tokens, begins_text
    if key not in known:
        text = _token_bytes(tokenizer, *key)
        if not text and tokenizer.convert_ids_to_tokens(token_id) is None:
            return b""  # id outside the vocabulary; not cached, because tokens can be added later
        known[key] = text
    return known[key]


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
