"""Incremental detokenization compared with decoding all tokens at once; stop strings compared with a simple search."""

import itertools
import random

import pytest
from engines import num_cases
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from benchmarks.random_models import byte_tokenizer
from flex_nano_vllm.detokenizer import Detokenizer, StopMatcher, decode
from flex_nano_vllm.models import EMBEDDED_MODELS
from flex_nano_vllm.sampling_params import SamplingParams
from flex_nano_vllm.sequence import Sequence

SPECIAL = ["<unk>", "<s>", "</s>"]
BYTES = [f"<0x{i:02X}>" for i in range(256)]
PIECES = ["▁", "▁▁", "▁the", "a", "b", "ab", "aab", "é", "END", "E", "ND", "你", "�", "▁END"]


def fast(model, decoder):
    tokenizer = Tokenizer(model)
    if decoder is not None:
        tokenizer.decoder = decoder
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def with_byte_fallback(*last):
    """Return a tokenizer with a token for each byte in addition to pieces, like Llama's and Gemma's tokenizers."""
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, *BYTES, *PIECES])}
    model = models.BPE(vocabulary, merges=[], byte_fallback=True, unk_token="<unk>")
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *last]
    return fast(model, decoders.Sequence(steps))


def word_pieces():
    words = [*SPECIAL, "hello", "##ing", "##s", "world", ",", "do", "n't", "'s", "##é", "##", "a", "b"]
    return fast(models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="<unk>"), decoders.WordPiece())


def whole_words():
    words = {word: i for i, word in enumerate([*SPECIAL, "hello", "world"])}
    return fast(models.WordLevel(words, unk_token="<unk>"), None)


TOKENIZERS = {
    "bytes": byte_tokenizer(),
    "tiny-gemma2": AutoTokenizer.from_pretrained(EMBEDDED_MODELS["tiny-gemma2"]),
    "llama": with_byte_fallback(decoders.Strip(" ", 1, 0)),
    "gemma": with_byte_fallback(),
    "word pieces": word_pieces(),
    "whole words": whole_words(),
}
IS_BYTES = TOKENIZERS["bytes"]


def follow(tokenizer, token_ids, **options):
    """Return (the detokenizer, the text shown after each token, the number of decoded tokens)."""
    text = Detokenizer(tokenizer, **options)
    shown = []
    for end in range(1, len(token_ids) + 1):
        has_stopped = text.update(token_ids[:end], is_complete=end == len(token_ids))
        assert has_stopped == (text.stop_reason is not None)
        shown.append(text.text[: text.num_shown])
        if has_stopped:
            return text, shown, end
    return text, shown, len(token_ids)


def check_growth(shown, final):
    """Check that shown text is never removed, and that the last shown text is `final`."""
    assert all(later.startswith(earlier) for earlier, later in itertools.pairwise(shown))
    assert shown[-1] == final


def of_valid_text(tokenizer, rng):
    """Return tokens of a text with many kinds of characters, some split into bytes if the tokenizer has byte tokens."""
    chars = [rng.choice("aé你😀 \n▁bEND�\u0301") for _ in range(rng.randint(1, 12))]
    vocabulary, token_ids = tokenizer.get_vocab(), []
    for char in chars:
        if rng.random() < 0.5 and char in vocabulary:
            token_ids.append(vocabulary[char])
        elif "<0x00>" in vocabulary:
            token_ids += [vocabulary[f"<0x{byte:02X}>"] for byte in char.encode()]
        else:
            token_ids += tokenizer(char, add_special_tokens=False).input_ids
    return token_ids


@pytest.mark.parametrize("skip_special_tokens", [True, False])
@pytest.mark.parametrize("name", ["bytes", "tiny-gemma2", "word pieces", "whole words"])
def test_the_pieces_of_any_tokens_join_to_the_text_of_all_tokens(name, skip_special_tokens):
    """The tokens include incomplete characters, special tokens, and ids outside the vocabulary.

    A replacement character is shown only if the final text contains it: the shown text is always a prefix of the final
    text.
    """
    tokenizer = TOKENIZERS[name]
    rng = random.Random(name)
    for _ in range(num_cases(160)):
        token_ids = rng.choices(range(len(tokenizer) + 3), k=rng.randint(1, 14))
        text, shown, _ = follow(tokenizer, token_ids, skip_special_tokens=skip_special_tokens)
        assert text.text == decode(tokenizer, token_ids, skip_special_tokens)
        check_growth(shown, text.text)


@pytest.mark.parametrize("skip_special_tokens", [True, False])
@pytest.mark.parametrize("name", list(TOKENIZERS))
def test_the_pieces_of_a_valid_text_join_to_the_text(name, skip_special_tokens):
    tokenizer = TOKENIZERS[name]
    rng = random.Random(name)
    for _ in range(num_cases(100)):
        token_ids = of_valid_text(tokenizer, rng)
        if rng.random() < 0.5:
            token_ids.append(tokenizer.eos_token_id)
        text, shown, _ = follow(tokenizer, token_ids, skip_special_tokens=skip_special_tokens)
        assert text.text == decode(tokenizer, token_ids, skip_special_tokens)
        check_growth(shown, text.text)


@pytest.mark.parametrize("name", ["llama", "gemma"])
@pytest.mark.parametrize("skip_special_tokens", [True, False])
def test_invalid_bytes_neither_remove_shown_text_nor_lose_other_text(name, skip_special_tokens):
    """If a run of byte tokens is not UTF-8, these decoders replace all of its bytes, even the letters among them."""
    tokenizer = TOKENIZERS[name]
    rng = random.Random(name)
    odd = [*(tokenizer.convert_tokens_to_ids(f"<0x{byte:02X}>") for byte in b"\nA\xe2\xff\xe4\xbd\xa0"), 1, 2, 9999]
    odd += tokenizer.convert_tokens_to_ids(["a", "▁the", "▁"])
    num_contradictions, num_sequences = 0, num_cases(330)
    for _ in range(num_sequences):
        token_ids = rng.choices(odd, k=rng.randint(1, 14))
        text, shown, _ = follow(tokenizer, token_ids, skip_special_tokens=skip_special_tokens)
        whole = decode(tokenizer, token_ids, skip_special_tokens)
        check_growth(shown, text.text)
        num_contradictions += text.text != whole
        pieces = ["a", " the", "<s>", "</s>"]
        assert [text.text.count(piece) for piece in pieces] == [whole.count(piece) for piece in pieces]
    assert num_contradictions > num_sequences / 20


def test_a_newline_byte_before_an_incomplete_character_stays_a_newline():
    tokenizer = TOKENIZERS["llama"]
    tokens = ["▁the", "<0x0A>", "<0xE2>", "▁the", "▁END", "<0xE4>", "<0xBD>", "<0xA0>"]
    _, shown, _ = follow(tokenizer, tokenizer.convert_tokens_to_ids(tokens))
    new = [later.removeprefix(earlier) for earlier, later in zip(["", *shown], shown)]
    assert new == ["the", "\n", "", "� the", " END", "", "", "你"]


def test_an_incomplete_last_character_is_shown_only_at_the_end():
    token_ids = IS_BYTES("añ", add_special_tokens=False).input_ids
    text, shown, _ = follow(IS_BYTES, token_ids[:2])
    assert shown == ["a", "a�"] and text.num_shown == 2


def test_a_text_can_be_completed_without_a_new_token_and_more_than_once():
    text = Detokenizer(IS_BYTES, stops=("bc",))
    token_ids = IS_BYTES("ab", add_special_tokens=False).input_ids
    assert not text.update(token_ids) and text.text[: text.num_shown] == "a"
    for _ in range(2):
        assert not text.update(token_ids, is_complete=True) and text.text[: text.num_shown] == "ab"


def test_a_text_can_be_completed_before_the_first_token():
    text = Detokenizer(IS_BYTES, stops=("b",))
    assert not text.update([], is_complete=True) and (text.text, text.num_shown) == ("", 0)


def test_several_tokens_may_be_decoded_at_once():
    token_ids = IS_BYTES("x y 你 END z", add_special_tokens=False).input_ids
    text = Detokenizer(IS_BYTES, stops=("END",))
    assert text.update(token_ids) and (text.text, text.stop_reason) == ("x y 你 ", "END")


def test_hidden_tokens_add_no_text_whether_special_or_not():
    token_ids = IS_BYTES("ab", add_special_tokens=False).input_ids
    text, *_ = follow(
        IS_BYTES, [*token_ids, 1], hidden_token_ids=frozenset([1, token_ids[1]]), skip_special_tokens=False
    )
    assert text.text == "a"
    text, *_ = follow(IS_BYTES, [*token_ids, 1], skip_special_tokens=False)
    assert text.text == "ab<eos>"


def test_spaces_that_the_tokenizer_would_clean_up_are_kept():
    tokenizer = byte_tokenizer()
    tokenizer.clean_up_tokenization_spaces = True
    token_ids = tokenizer("x [ 1 , 2 ] . y", add_special_tokens=False).input_ids
    text, *_ = follow(tokenizer, token_ids)
    assert text.text == decode(tokenizer, token_ids, True) == "x [ 1 , 2 ] . y"


def test_a_slow_tokenizer_is_rejected():
    class Slow:
        is_fast = False

    with pytest.raises(ValueError, match="fast tokenizer, not a Slow"):
        Detokenizer(Slow())


# --- stop strings --------------------------------------------------------------------------------------------------


def first_stop(pieces, stops, min_tokens):
    """Return the oracle: (the text up to the end of the stop string, the stop string, the number of tokens).

    The first stop string that ends after the first `min_tokens` tokens counts. If several end with the same character,
    the longest counts.
    """
    text = ""
    for num_tokens, piece in enumerate(pieces, start=1):
        for char in piece:
            text += char
            met = [stop for stop in stops if text.endswith(stop)]
            if met and num_tokens > min_tokens:
                return text, max(met, key=len), num_tokens
    return text, None, len(pieces)


def check_stops(tokenizer, token_ids, stops, include_stop, min_tokens, pieces=None):
    if pieces is None:  # from a detokenizer without stop strings
        _, shown, _ = follow(tokenizer, token_ids)
        pieces = [later[len(earlier) :] for earlier, later in zip(["", *shown], shown)]
    reached, stop, num_tokens = first_stop(pieces, stops, min_tokens)
    text, shown, num_taken = follow(tokenizer, token_ids, stops=stops, include_stop=include_stop, min_tokens=min_tokens)
    wanted = reached if stop is None or include_stop else reached[: -len(stop)]
    assert (text.text, text.stop_reason, num_taken) == (wanted, stop, num_tokens)
    check_growth(shown, text.text)
    # Text is held back only if it may become a stop string.
    for num_tokens, piece in enumerate(shown[:-1], start=1):
        come = "".join(pieces[:num_tokens])
        assert any(stop.startswith(come[len(piece) :]) for stop in stops) or piece == come


texts = st.text("aab你", min_size=1, max_size=4)


@settings(max_examples=num_cases(150))
@given(
    text=st.text("aab你c", min_size=1, max_size=20),
    stops=st.lists(texts, min_size=1, max_size=4).map(tuple),
    include_stop=st.booleans(),
    min_tokens=st.just(0) | st.integers(0, 12),
)
def test_the_output_ends_at_the_first_stop_string(text, stops, include_stop, min_tokens):
    """Stop strings may overlap, be prefixes of each other, or end with the same character. Tokens are single bytes."""
    pieces = [piece for char in text for piece in [*[""] * (len(char.encode()) - 1), char]]
    token_ids = IS_BYTES(text, add_special_tokens=False).input_ids
    check_stops(IS_BYTES, token_ids, stops, include_stop, min_tokens, pieces)


@pytest.mark.parametrize("name", ["bytes", "tiny-gemma2", "llama", "word pieces"])
def test_stop_strings_may_begin_and_end_within_tokens_of_any_kind(name):
    """Two of the stop strings are parts of the text itself and may contain replacement characters."""
    tokenizer = TOKENIZERS[name]
    rng = random.Random(name)
    num_stopped, num_texts = 0, num_cases(130)
    for _ in range(num_texts):
        token_ids = rng.choices(range(len(tokenizer) + 2), k=rng.randint(1, 12))
        whole = follow(tokenizer, token_ids)[0].text
        places = [rng.randrange(len(whole)) for _ in range(2)] if whole else []
        stops = (*(whole[place : place + rng.randint(1, 4)] for place in places), "never", "ing")
        check_stops(tokenizer, token_ids, stops, rng.random() < 0.5, rng.choice([0, 0, 3]))
        num_stopped += follow(tokenizer, token_ids, stops=stops)[0].stop_reason is not None
    assert num_stopped > 3 / 8 * num_texts


@pytest.mark.parametrize(
    ("text", "stops", "left", "reason"),
    [
        ("aaab", ("aab",), "a", "aab"),
        ("ENENDx", ("END",), "EN", "END"),
        ("abc", ("abcd", "b"), "a", "b"),
        ("abcd", ("abcd", "bcd", "cd"), "", "abcd"),
        ("abc", ("ab", "abc"), "", "ab"),
        ("a\nb", ("\n",), "a", "\n"),
        ("x😀y", ("😀",), "x", "😀"),
    ],
)
def test_the_stop_string_that_ends_first_counts_and_the_longest_if_several_do(text, stops, left, reason):
    result, *_ = follow(IS_BYTES, IS_BYTES(text, add_special_tokens=False).input_ids, stops=stops)
    assert (result.text, result.stop_reason) == (left, reason)


def test_a_stop_string_may_end_with_the_replacement_of_an_incomplete_character():
    token_ids = IS_BYTES("añ", add_special_tokens=False).input_ids[:2]
    text, shown, _ = follow(IS_BYTES, token_ids, stops=("a�",))
    assert (shown, text.stop_reason) == (["", ""], "a�")


@settings(max_examples=num_cases(150))
@given(st.text("ab", min_size=1, max_size=8), st.text("ab", max_size=40))
def test_a_matcher_tracks_the_longest_prefix_of_the_stop_string_that_ends_the_text(stop, text):
    matcher = StopMatcher(stop)
    for end, char in enumerate(text, start=1):
        longest = max(n for n in range(len(stop) + 1) if text[:end].endswith(stop[:n]))
        assert matcher.feed(char) == (longest == len(stop))
        assert matcher.num_matched == longest


@pytest.mark.parametrize("end", [lambda sequence: sequence.abort("abort"), lambda sequence: sequence.fail()])
def test_a_sequence_that_is_aborted_or_fails_shows_the_text_that_was_held_back(end):
    tokenizer = byte_tokenizer()
    sequence = Sequence(0, None, [], 0, SamplingParams(), 0, frozenset(), 100)
    sequence.text = Detokenizer(tokenizer, stops=("bc",))
    for token_id in tokenizer("ab").input_ids:
        sequence.append(token_id)
    assert sequence.text.text[: sequence.text.num_shown] == "a"
    end(sequence)
    assert sequence.text.text[: sequence.text.num_shown] == "ab"
    assert sequence.finish_reason in ("abort", "error") and sequence.stop_reason is None
