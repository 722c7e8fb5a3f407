"""An output continues its prompt: texts, bytes, names and offsets of tokens, compared with the tokenizer's text.

The tokenizers have the decoders of real models (Llama-2 and Mistral, Gemma, GPT-2, Qwen, Llama 3, T5, BERT) and few
tokens. The first tokens of all of them are <pad>, <eos>, <bos>, as in the configuration of the tiny Gemma-2.
"""

import codecs
import functools
import http.client
import itertools
import json
import re

import pytest
import torch
from engines import SIZES, num_cases
from hypothesis import given, settings
from hypothesis import strategies as st
from serving import MODEL, ROOMY, TEMPLATE, events_of, serving
from tiny_models import CONFIGS
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from flex_nano_vllm import Inference, SamplingParams, StructuredOutputsParams
from flex_nano_vllm.detokenizer import Detokenizer, OffsetCounter, TextWriter, echo, text_of, token_bytes, token_name
from flex_nano_vllm.models import EMBEDDED_MODELS
from flex_nano_vllm.outputs import Logprob
from flex_nano_vllm.server_protocol import chat_logprobs, completion_logprobs

SPECIAL = ["<pad>", "<eos>", "<bos>", "<end_of_turn>", "<unk>"]
BYTES = [f"<0x{i:02X}>" for i in range(256)]
UNTIDY = dict(clean_up_tokenization_spaces=True)  # would remove the space of " ."; must have no effect
CHARS = [*"abredfoxnyst", "é", "你", "�", "\n"]
BOS_FIRST = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 2)])
EOS_LAST = processors.TemplateProcessing(single="$A <eos>", special_tokens=[("<eos>", 1)])


def fast(tokenizer, decoder, post_processor=None, **options):
    """Return a fast tokenizer with special tokens, and with one added token that is not special."""
    tokenizer.decoder = decoder
    if post_processor is not None:
        tokenizer.post_processor = post_processor
    tokenizer.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in SPECIAL])
    tokenizer.add_tokens([AddedToken("<think>", normalized=False, special=False)])
    named = dict(pad_token="<pad>", eos_token="<eos>", bos_token="<bos>", unk_token="<unk>")
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **named, **options)
    fast.chat_template = TEMPLATE
    return fast


def merged(chars, words, others=(), **options):
    """Return a BPE model that merges `words` letter by letter. No merge produces a token of `others`."""
    merges = [(word[:i], word[i]) for word in words for i in range(1, len(word))]
    tokens = dict.fromkeys([*SPECIAL, *chars, *(first + last for first, last in merges), *others])
    return models.BPE({token: i for i, token in enumerate(tokens)}, merges=list(dict.fromkeys(merges)), **options)


def with_byte_fallback(*last_steps, normalizer=None, pre_tokenizer=None):
    words = ["▁red", "▁fox", "▁ran", "▁yes", "▁no", "ran"]
    model = merged([*BYTES, "▁", *CHARS], words, ["▁▁", "ab"], byte_fallback=True, unk_token="<unk>")
    tokenizer = Tokenizer(model)
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    if pre_tokenizer is not None:
        tokenizer.pre_tokenizer = pre_tokenizer
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *last_steps]
    return fast(tokenizer, decoders.Sequence(steps), BOS_FIRST)


def byte_level(post_processor=None, **options):
    words = ["red", "Ġred", "Ġfox", "Ġran", "Ġyes", "Ġno", "Ġ.", "ðŁĺ"]  # the last one: three bytes of an emoji
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(merged(alphabet, words, ["©Ã"]))  # the end of one character and the beginning of another
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return fast(tokenizer, decoders.ByteLevel(), post_processor, **options)


def metaspace(prepend_scheme, post_processor=None):
    pieces = [*SPECIAL, "▁", "▁▁", "▁red", "▁fox", "▁ran", "▁.", "red", "ran", "ab", *CHARS]
    tokenizer = Tokenizer(models.Unigram([(piece, -1.0 - 0.1 * (len(piece) == 1)) for piece in pieces], unk_id=4))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme=prepend_scheme)
    return fast(tokenizer, decoders.Metaspace("▁", prepend_scheme=prepend_scheme), post_processor, **UNTIDY)


def word_pieces():
    words = [*SPECIAL, "red", "fox", "ran", "##ing", "##s", ",", ".", "do", "n't", "'s", "##é", "##", "yes", "no"]
    tokenizer = Tokenizer(models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return fast(tokenizer, decoders.WordPiece(), **UNTIDY)


STRIP = decoders.Strip(" ", 1, 0)
LEGACY = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
FORMS = {
    "llama-2": with_byte_fallback(STRIP, normalizer=LEGACY),
    "mistral": with_byte_fallback(
        STRIP, pre_tokenizer=pre_tokenizers.Metaspace("▁", prepend_scheme="first", split=False)
    ),
    "gemma": with_byte_fallback(normalizer=normalizers.Replace(" ", "▁")),
    "gpt-2": byte_level(**UNTIDY),
    "qwen": byte_level(),
    "llama-3": byte_level(BOS_FIRST),
    "t5": metaspace("always", EOS_LAST),
    "metaspace": metaspace("first", BOS_FIRST),
    "bert": word_pieces(),
    "tiny-gemma2": AutoTokenizer.from_pretrained(EMBEDDED_MODELS["tiny-gemma2"]),
}
WITH_FALLBACK = ("llama-2", "mistral", "gemma")
WITH_SPACES = ("gemma", "gpt-2", "qwen", "llama-3", "tiny-gemma2")  # the others drop the space of the first token
LLAMA = FORMS["llama-2"]


def ids_of(tokenizer, *names):
    ids = tokenizer.convert_tokens_to_ids(list(names))
    assert tokenizer.convert_ids_to_tokens(ids) == list(names)
    return ids


def plain_decode(tokenizer, token_ids, skip):
    return tokenizer.decode(token_ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False)


def is_visible(tokenizer, token_id, skip):
    added = tokenizer.added_tokens_decoder.get(token_id)
    return token_id < len(tokenizer) and not (skip and added is not None and added.special)


def bytes_are_text(tokenizer, token_ids, skip):
    """Return whether each run of byte tokens is UTF-8. If a run is not, Llama's decoder replaces all of its bytes."""
    names = [tokenizer.convert_ids_to_tokens(i) for i in token_ids if is_visible(tokenizer, i, skip)]
    for is_row, row in itertools.groupby(names, key=lambda name: name in BYTES):
        if is_row:
            try:
                bytes(int(name[3:5], 16) for name in row).decode()
            except UnicodeDecodeError:
                return False
    return True


@functools.cache
def pools(name):
    """Return (tokens of special interest, characters as bytes or other small pieces)."""
    tokenizer, vocabulary = FORMS[name], FORMS[name].get_vocab()
    wanted = [
        *SPECIAL[:4],
        "<think>",
        "▁",
        "▁▁",
        "▁ran",
        "ran",
        "ab",
        "Ġran",
        "▁.",
        "Ġ.",
        "Ġ",
        "©Ã",
        "ðŁĺ",
        "##",
        "##ing",
        "n't",
    ]
    favourites = [[vocabulary[token]] for token in wanted if token in vocabulary]
    chars = []
    for char in "a \né你😀�":
        if name in WITH_FALLBACK:
            chars.append(ids_of(tokenizer, *(f"<0x{byte:02X}>" for byte in char.encode())))
        elif isinstance(tokenizer.backend_tokenizer.decoder, decoders.ByteLevel):
            names = [token for token, _ in pre_tokenizers.ByteLevel(False, use_regex=False).pre_tokenize_str(char)]
            chars.append(ids_of(tokenizer, *"".join(names)))
    return favourites, chars


def emoji_of(name):
    """Return the four tokens of an emoji, one for each byte."""
    (tokens,) = (tokens for tokens in pools(name)[1] if len(tokens) == 4)
    return tokens


@st.composite
def continued(draw, name):
    """Draw (prompt, output): tokens split anywhere, also within a character, or a prompt of special tokens only."""
    favourites, chars = pools(name)
    pieces = st.sampled_from(favourites + chars) | st.sampled_from(chars or favourites)
    wild = st.integers(0, len(FORMS[name]) + 1).map(lambda token_id: [token_id])
    lists = st.lists(pieces if draw(st.booleans()) else pieces | wild, max_size=7)
    token_ids = [token_id for piece in draw(lists) for token_id in piece]
    if draw(st.integers(0, 3)) == 0:
        return draw(st.lists(st.sampled_from([0, 1, 2, 3]), min_size=1, max_size=2)), token_ids
    cut = draw(st.integers(0, len(token_ids)))
    return token_ids[:cut], token_ids[cut:]


# --- the text of an output -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FORMS)
def test_an_output_continues_its_prompt(name):
    """The echoed prompt and the output's text join to the text of both, and so do the bytes of the tokens."""
    tokenizer = FORMS[name]

    @settings(max_examples=num_cases(80), derandomize=True)
    @given(continued(name), st.booleans())
    def check(texts, skip):
        prompt, output = texts
        before, _ = echo(tokenizer, None, prompt, skip)
        writer = TextWriter(tokenizer, skip)
        assert before == "".join([writer.write(token_id) for token_id in prompt])

        detokenizer = Detokenizer(tokenizer, prompt, skip_special_tokens=skip)
        deltas, num_shown = [], 0
        for end in range(len(output) + 1):
            detokenizer.update(output[:end], is_complete=end == len(output))
            deltas.append(detokenizer.text[num_shown : detokenizer.num_shown])
            num_shown = detokenizer.num_shown
        text = text_of(tokenizer, prompt, output, frozenset(), skip, False)
        assert "".join(deltas) == detokenizer.text == text
        if name not in WITH_FALLBACK or bytes_are_text(tokenizer, prompt + output, skip):
            assert before + text == plain_decode(tokenizer, prompt + output, skip)

        contents, has_begun = [], False
        for token_id in prompt + output:
            contents.append(token_bytes(tokenizer, token_id, skip, begins_text=not has_begun))
            assert is_visible(tokenizer, token_id, skip) or contents[-1] == b""
            has_begun = has_begun or is_visible(tokenizer, token_id, skip)
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        assert decoder.decode(b"".join(contents[: len(prompt)])) == before
        unfinished, _ = decoder.getstate()
        assert (unfinished + b"".join(contents[len(prompt) :])).decode(errors="replace") == text

    check()


@pytest.mark.parametrize("name", FORMS)
def test_a_space_is_dropped_only_at_the_beginning_of_a_text(name):
    tokenizer = FORMS[name]
    word = "the" if name == "tiny-gemma2" else "ran"
    (ran,) = tokenizer(f" {word}" if name in WITH_SPACES else word, add_special_tokens=False).input_ids[:1]

    def text(prompt, has_own_start=False, skip=True):
        return text_of(tokenizer, prompt, [ran], frozenset(), skip, has_own_start)

    first = f" {word}" if name in WITH_SPACES else word
    assert text([ran]) == text([ran, 1, 2]) == f" {word}"
    assert text([]) == text([2]) == text([2, 3, 9999]) == first
    assert text([2], skip=False) == text([2], has_own_start=True) == f" {word}"


# --- engines ---------------------------------------------------------------------------------------------------------


def engine_for(tokenizer):
    """Return an engine whose logits are so small that `spell` determines its output.

    A letter and its byte have similar probabilities.
    """
    config = CONFIGS["gemma2"]()
    config.vocab_size = len(tokenizer)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float64, attn_implementation="eager").eval()
    head = model.get_output_embeddings().weight
    with torch.no_grad():
        head *= 1e-4
        for char in CHARS:
            letter, byte = tokenizer.convert_tokens_to_ids([char, f"<0x{ord(char) % 256:02X}>"])
            if len(char.encode()) == 1 and None not in (letter, byte) and byte != tokenizer.unk_token_id:
                head[letter] *= 10
                head[byte] = head[letter] * 0.9
    return Inference(model, tokenizer, **(ROOMY | SIZES))


def spell(*token_ids, **options):
    """Return parameters with which an engine of `engine_for` generates these tokens, which must be distinct."""
    bias = {token_id: 10 - 0.1 * i for i, token_id in enumerate(token_ids)}
    return dict(temperature=0, presence_penalty=2.0, logit_bias=bias, max_tokens=len(token_ids)) | options


@pytest.fixture(scope="module")
def llama():
    with engine_for(LLAMA) as engine, serving(engine) as served:
        yield served


@pytest.fixture(scope="module")
def llama_alone():
    with engine_for(LLAMA) as engine:
        yield engine


@pytest.fixture(scope="module")
def llama3():
    with engine_for(FORMS["llama-3"]) as engine, serving(engine) as served:
        yield served


def post(served, path, **body):
    body = {"model": MODEL, **body}
    if "logit_bias" in body:
        body["logit_bias"] = {str(token_id): bias for token_id, bias in body["logit_bias"].items()}
    status, _, content = served.ask("POST", path, body)
    assert status == http.client.OK, content
    return content


def complete(served, stream=False, **body):
    """Return (text, the four lists of log-probabilities) of a completion, joined from its chunks if streamed."""
    content = post(served, "/v1/completions", stream=stream, **body)
    if not stream:
        (choice,) = json.loads(content)["choices"]
        return choice["text"], choice["logprobs"]
    text, lists = "", {}
    for event in events_of(content)[:-1]:
        (choice,) = event["choices"]
        text += choice["text"]
        for key, values in (choice["logprobs"] or {}).items():
            lists.setdefault(key, []).extend(values)
    return text, lists or None


def said(engine, prompt, **options):
    """Return (text, stop_reason, tokens) of the only completion. Check text and stop_reason against a stream."""
    params = SamplingParams(**options)
    (completion,) = engine.generate([prompt], params, use_tqdm=False)[0].outputs
    deltas = list(engine.stream(prompt, params))
    assert "".join(delta.text for delta in deltas) == completion.text
    assert deltas[-1].stop_reason == completion.stop_reason
    if completion.logprobs is not None:
        rated = [entry[i].token_bytes for i, entry in zip(completion.token_ids, completion.logprobs)]
        assert b"".join(rated).decode() == completion.text
    return completion.text, completion.stop_reason, completion.token_ids


def test_a_word_after_a_prompt_keeps_its_space(llama, llama_alone):
    (ran,) = ids_of(LLAMA, "▁ran")
    one = dict(allowed_token_ids=[ran], max_tokens=1, temperature=0)
    assert said(llama_alone, "red fox", **one, logprobs=0) == (" ran", None, [ran])
    assert said(llama_alone, [2], **one, logprobs=0) == ("ran", None, [ran])  # the prompt has no text
    for stream in (False, True):
        assert complete(llama, stream, prompt="red fox", echo=True, **one)[0] == "red fox ran"


@pytest.mark.parametrize("prompt", ["red fox", [2]], ids=["text", "no text"])
def test_a_choice_keeps_its_leading_space(llama_alone, prompt):
    choice = StructuredOutputsParams(choice=[" yes", " no"])
    text, _, _ = said(llama_alone, prompt, structured_outputs=choice, seed=1, max_tokens=6, logprobs=0)
    assert text in (" yes", " no")


def test_structured_output_keeps_its_leading_space_over_http(llama):
    form = dict(type="regex", regex=" (yes|no)")
    for stream in (False, True):
        body = dict(prompt=[2], response_format=form, seed=1, max_tokens=6, logprobs=0)
        text, logprobs = complete(llama, stream, **body)
        assert text in (" yes", " no")
        assert logprobs["text_offset"] == offsets_of(logprobs["tokens"][:-1]) and logprobs["tokens"][-1] == "<eos>"


def offsets_of(tokens):
    return list(itertools.accumulate(map(len, tokens), initial=0))


def test_a_stop_string_may_begin_with_the_space_of_a_word(llama_alone):
    fox, ran = ids_of(LLAMA, "▁fox", "▁ran")
    assert said(llama_alone, "red", **spell(fox, ran, stop=" ran")) == (" fox", " ran", [fox, ran])
    assert said(llama_alone, "red", **spell(ran, fox, stop=" ran")) == ("", " ran", [ran])
    assert said(llama_alone, [2], **spell(ran, fox, stop=" ran")) == ("ran fox", None, [ran, fox])


# --- offsets ---------------------------------------------------------------------------------------------------------


def check_offsets(text, num_in_prompt, tokens, offsets, num_prompt, without_text):
    """Check the offsets of the tokens in a text.

    Args:
        num_in_prompt: the number of characters of the text that belong to the prompt.
        num_prompt: the number of tokens of the prompt.
        without_text: for each token, whether it adds nothing to the text.
    """
    assert len(tokens) == len(offsets) == len(without_text)
    assert offsets == sorted(offsets) and offsets[-1] <= len(text)
    if len(tokens) > num_prompt:
        assert offsets[num_prompt] == num_in_prompt
    for position, (token, offset, is_hidden) in enumerate(zip(tokens, offsets, without_text)):
        if not is_hidden and not token.startswith("bytes:"):
            assert text.startswith(token, offset), (position, token, offset, text)
            assert (offset < num_in_prompt) == (position < num_prompt)


def walk(tokenizer, prompt, prompt_ids, output_ids, skip):
    """Return (text, number of characters of the prompt, names, offsets), computed as in `CompletionTexts`."""
    before, offsets = echo(tokenizer, prompt, prompt_ids, skip)
    counter = OffsetCounter(TextWriter(tokenizer, skip, prompt_ids), len(before))
    offsets = offsets + [offset for token_id in output_ids for offset in counter.take([token_id])]
    names, has_begun = [], False
    for token_id in prompt_ids + output_ids:
        names.append(token_name(token_bytes(tokenizer, token_id, False, begins_text=not has_begun)))
        has_begun = has_begun or is_visible(tokenizer, token_id, skip)
    return before + text_of(tokenizer, prompt_ids, output_ids, frozenset(), skip, False), len(before), names, offsets


@pytest.mark.parametrize("name", FORMS)
def test_tokens_are_at_their_offsets_if_the_prompt_is_token_ids(name):
    """Only valid text is checked: a replacement character begins at the offset of the first byte that it replaces."""
    tokenizer = FORMS[name]

    @settings(max_examples=num_cases(40), derandomize=True)
    @given(continued(name), st.booleans())
    def check(texts, skip):
        prompt, output = texts
        token_ids = prompt + output
        if not prompt or not bytes_are_text(tokenizer, token_ids, skip):
            return
        if "�" in plain_decode(tokenizer, token_ids, skip):
            return
        text, num_in_prompt, names, offsets = walk(tokenizer, None, prompt, output, skip)
        without_text = [not is_visible(tokenizer, i, skip) or not name for i, name in zip(token_ids, names)]
        check_offsets(text, num_in_prompt, names, offsets, len(prompt), without_text)

    check()


@pytest.mark.parametrize("name", FORMS)
def test_tokens_are_at_their_offsets_if_the_prompt_is_text(name):
    tokenizer = FORMS[name]
    for prompt in ["red fox", "red fox ran", "ran"]:
        prompt_ids, output = tokenizer(prompt).input_ids, tokenizer(prompt, add_special_tokens=False).input_ids
        text, num_in_prompt, names, offsets = walk(tokenizer, prompt, prompt_ids, output, True)
        assert text.startswith(prompt) and num_in_prompt == len(prompt)
        without_text = [not is_visible(tokenizer, i, True) for i in prompt_ids + output]
        check_offsets(text, num_in_prompt, names, offsets, len(prompt_ids), without_text)
        if prompt_ids[0] == tokenizer.bos_token_id:
            assert offsets[:2] == [0, 0]  # BOS is not in the text and has no width
        if prompt_ids[-1] == tokenizer.eos_token_id:
            assert offsets[len(prompt_ids) - 1] == len(prompt)


WRITTEN = ["red<end_of_turn> fox<end_of_turn>", "<bos>red<end_of_turn><end_of_turn>ran", "<end_of_turn>red"]


@pytest.mark.parametrize("skip", [True, False], ids=["skipping", "all"])
@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("prompt", WRITTEN)
def test_special_tokens_named_in_the_text_of_a_prompt_have_the_offsets_of_their_names(name, prompt, skip):
    tokenizer = FORMS[name]
    (end,) = ids_of(tokenizer, "<end_of_turn>")
    prompt_ids = tokenizer(prompt, add_special_tokens=not prompt.startswith("<bos>")).input_ids
    text, offsets = echo(tokenizer, prompt, prompt_ids, skip)
    places = [offset for token_id, offset in zip(prompt_ids, offsets) if token_id == end]
    assert text == prompt and offsets == sorted(offsets)
    assert places == [match.start() for match in re.finditer("<end_of_turn>", prompt)]


@pytest.mark.parametrize(
    ("kind", "skip"),
    [("text", True), ("text", False), ("special", True), ("special", False), ("tokens", False), ("unfinished", True)],
)
@pytest.mark.parametrize("form", ["llama", "llama3"])
def test_tokens_are_at_their_offsets_over_http(request, form, kind, skip):
    served = request.getfixturevalue(form)
    tokenizer = served.engine.tokenizer
    space = "▁" if form == "llama" else "Ġ"
    fox, ran, end = ids_of(tokenizer, f"{space}fox", f"{space}ran", "<end_of_turn>")
    emoji = emoji_of("llama-2" if form == "llama" else "llama-3")
    prompt, output = {
        "text": ("red fox", [ran, end, fox]),
        "special": ("<end_of_turn>red", [ran, end, fox]),
        "tokens": ([2, ran, fox, *emoji, fox, end, fox], [ran, *emoji]),
        "unfinished": ([ran, *emoji[:2]], [*emoji[2:], ran]),
    }[kind]
    body = spell(*output, prompt=prompt, echo=True, logprobs=1, skip_special_tokens=skip)
    text, logprobs = complete(served, **body)
    tokens, offsets = logprobs["tokens"], logprobs["text_offset"]
    streamed_text, streamed = complete(served, stream=True, **body)
    assert (streamed_text, streamed["tokens"], streamed["text_offset"]) == (text, tokens, offsets)

    is_text = isinstance(prompt, str)
    prompt_ids = tokenizer(prompt).input_ids if is_text else prompt
    before = prompt if is_text else plain_decode(tokenizer, prompt, skip).rstrip("�")
    assert text == before + plain_decode(tokenizer, prompt_ids + output, skip)[-len(text) + len(before) :]
    without_text = [not is_visible(tokenizer, token_id, skip) for token_id in prompt_ids + output]
    without_text[0] |= is_text  # BOS, added by the tokenizer
    check_offsets(text, len(before), tokens, offsets, len(prompt_ids), without_text)
    if is_text:
        assert (tokens[0], offsets[:2]) == ("<bos>", [0, 0])
    else:
        assert text == plain_decode(tokenizer, prompt + output, skip)
    if kind == "special":
        assert (tokens[1], offsets[2]) == ("<end_of_turn>", len("<end_of_turn>"))
    if kind == "tokens":
        place = tokens.index(r"bytes:\xf0")
        assert len(set(offsets[place : place + 4])) == 1  # all bytes of the emoji have its offset
    if kind == "unfinished":
        text_alone, alone = complete(served, **body | dict(echo=False))
        assert text_alone == text[len(before) :]
        assert alone["text_offset"] == [offset - len(before) for offset in offsets[len(prompt_ids) :]]


def test_structured_output_does_not_change_the_names_of_prompt_tokens(llama):
    """The output keeps its leading space, which must not affect the names of the prompt's tokens."""
    form = dict(type="regex", regex=" (yes|no)")
    body = dict(prompt="red fox", response_format=form, echo=True, logprobs=1, seed=1, max_tokens=2)
    text, logprobs = complete(llama, **body)
    assert text.startswith("red fox ") and logprobs["text_offset"][:4] == [0, 0, 3, 7]
    assert logprobs["tokens"][:3] == ["<bos>", "red", " fox"]


# --- names and bytes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*WITH_FALLBACK, "gpt-2", "qwen", "llama-3", "tiny-gemma2"])
def test_a_part_of_a_character_is_named_by_its_bytes(name):
    tokenizer = FORMS[name]
    emoji = emoji_of(name)
    contents = [token_bytes(tokenizer, token_id, True) for token_id in emoji]
    assert contents == [b"\xf0", b"\x9f", b"\x98", b"\x80"]
    assert [token_name(content) for content in contents] == [r"bytes:\xf0", r"bytes:\x9f", r"bytes:\x98", r"bytes:\x80"]


def test_a_token_of_several_bytes_is_named_by_all_of_them_if_they_are_not_text():
    names = ids_of(FORMS["qwen"], "ðŁĺ", "©Ã", "Ġred", "<think>", "<eos>")
    contents = [token_bytes(FORMS["qwen"], token_id, False) for token_id in names]
    assert contents == [b"\xf0\x9f\x98", b"\xa9\xc3", b" red", b"<think>", b"<eos>"]
    assert [token_name(content) for content in contents[:2]] == [r"bytes:\xf0\x9f\x98", r"bytes:\xa9\xc3"]
    assert [token_bytes(FORMS["qwen"], token_id, True) for token_id in names[2:]] == [b" red", b"<think>", b""]


@pytest.mark.parametrize("form", ["llama", "llama3"])
def test_the_bytes_of_the_tokens_of_a_chat_join_to_its_text(request, form):
    served = request.getfixturevalue(form)
    body = dict(messages=[{"role": "user", "content": "ab"}], logprobs=True, top_logprobs=1, max_tokens=6, seed=0)
    content = post(served, "/v1/chat/completions", response_format=dict(type="regex", regex="😀"), **body)
    (choice,) = json.loads(content)["choices"]
    entries = choice["logprobs"]["content"]
    assert choice["message"]["content"] == "😀"
    assert bytes(byte for entry in entries for byte in entry["bytes"]) == "😀".encode()
    assert (entries[-1]["token"], entries[-1]["bytes"]) == ("<eos>", [])
    named = [token_name(bytes(entry["bytes"])) for entry in entries[:-1]]
    assert [entry["token"] for entry in entries[:-1]] == named and len(entries) > 2
    assert named[0].startswith(r"bytes:\xf0")
    if form == "llama":
        assert (entries[0]["token"], entries[0]["bytes"]) == (r"bytes:\xf0", [240])


def test_the_stop_token_of_a_chat_has_bytes_only_if_the_text_contains_it(llama):
    a, b = ids_of(LLAMA, "a", "b")
    body = spell(b, a, stop_token_ids=[a], logprobs=True, messages=[{"role": "user", "content": "ab"}])
    for shows, contents in ((False, [[98], []]), (True, [[98], [97]])):
        content = post(llama, "/v1/chat/completions", include_stop_str_in_output=shows, **body)
        (choice,) = json.loads(content)["choices"]
        assert choice["message"]["content"] == ("ba" if shows else "b")
        assert [entry["bytes"] for entry in choice["logprobs"]["content"]] == contents


def test_the_more_likely_of_two_tokens_with_the_same_name_is_listed():
    own, other, third = Logprob(-3.0, 9, "a", b"a"), Logprob(-1.0, 1, "a", b"a"), Logprob(-2.0, 2, "b", b"b")
    both = completion_logprobs([5, 6], [{5: own, 6: other, 7: third}, {6: other, 7: third, 5: own}], [0, 1])
    assert both["token_logprobs"] == [-3.0, -1.0]
    assert both["top_logprobs"] == [{"a": -1.0, "b": -2.0}] * 2
    (entry,) = chat_logprobs([5], [{5: own, 6: other, 7: third}], 2)
    assert [(top["token"], top["logprob"]) for top in entry["top_logprobs"]] == [("a", -1.0), ("b", -2.0)]


def test_the_more_likely_of_a_letter_and_its_byte_is_listed(llama, llama_alone):
    options = dict(temperature=0, max_tokens=1, logprobs=20)
    (output,) = llama_alone.generate(["red fox"], SamplingParams(**options), use_tqdm=False)
    (rated,) = output.outputs[0].logprobs
    best = {}
    for entry in rated.values():
        best[entry.decoded_token] = max(entry.logprob, best.get(entry.decoded_token, -9999.0))
    assert len(best) < len(rated), "no two tokens have the same name"
    _, logprobs = complete(llama, prompt="red fox", **options)
    assert logprobs["top_logprobs"] == [pytest.approx(best)]


# --- stop strings that name special tokens ---------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["llama-2", "qwen", "tiny-gemma2"])
@pytest.mark.parametrize(
    ("stop", "text", "num_tokens"),
    [
        ("<end_of_turn>", "ba", 3),
        ("<end_of_turn>\n", "ba", 4),
        ("a<end_of_turn>", "b", 3),
        ("ba<end_of_turn>\n", "", 4),
        ("a\n", "b", 4),  # matches the text without the special token
        ("a<bos>", "ba\nb", 5),
        ("<end_of_turn>b", "ba\nb", 5),
    ],
)
def test_a_stop_string_that_names_a_special_token_matches_skipped_special_tokens(form, stop, text, num_tokens):
    tokenizer = FORMS[form]
    newline = "\n" if form == "llama-2" else "Ċ"
    token_ids = ids_of(tokenizer, "b", "a", "<end_of_turn>", newline, "b")
    is_met = num_tokens < 5
    for include_stop in (False, True):
        shown = Detokenizer(tokenizer, [2], stops=(stop,), include_stop=include_stop)
        deltas, num_shown = [], 0
        for end in range(1, 6):
            has_stopped = shown.update(token_ids[:end], is_complete=end == 5)
            deltas.append(shown.text[num_shown : shown.num_shown])
            num_shown = shown.num_shown
            if has_stopped:
                break
        assert (end, shown.stop_reason) == (num_tokens, stop if is_met else None)
        assert shown.text == "".join(deltas) == text + stop * (include_stop and is_met)
    all_shown = Detokenizer(tokenizer, [2], stops=(stop,), skip_special_tokens=False)
    assert all_shown.update(token_ids, is_complete=True) == (stop in "ba<end_of_turn>\nb")


def test_a_special_token_that_is_a_stop_string_ends_the_output(llama_alone):
    a, newline, end, fox = ids_of(LLAMA, "a", "\n", "<end_of_turn>", "▁fox")
    said_ = functools.partial(said, llama_alone, "red")
    stop = "<end_of_turn>"
    assert llama_alone.input_processor.eos_token_ids == {1}
    assert said_(**spell(a, end, fox, stop=stop)) == ("a", stop, [a, end])
    assert said_(**spell(a, end, fox, stop=stop, skip_special_tokens=False)) == ("a", stop, [a, end])
    included = spell(a, end, fox, stop=stop, include_stop_str_in_output=True)
    assert said_(**included) == ("a" + stop, stop, [a, end])
    assert said_(**spell(a, end, newline, fox, stop=stop + "\n")) == ("a", stop + "\n", [a, end, newline])
    assert said_(**spell(fox, a, end, newline, stop="a" + stop)) == (" fox", "a" + stop, [fox, a, end])
    assert said_(**spell(a, end, fox)) == ("a fox", None, [a, end, fox])


def test_a_special_token_that_is_a_stop_string_is_not_generated_before_min_tokens(llama_alone):
    a, b, newline, end = ids_of(LLAMA, "a", "b", "\n", "<end_of_turn>")
    stop = "<end_of_turn>"
    # The special token has the largest bias, but must not be one of the first two tokens.
    for allowed in ([a, b, end], [a, b, end, newline]):
        params = spell(end, a, b, stop=stop, min_tokens=2, allowed_token_ids=allowed, max_tokens=4)
        assert said(llama_alone, "red", **params) == ("ab", stop, [a, b, end])
    longer = spell(a, end, newline, b, stop=stop + "\n", min_tokens=3)  # ends within min_tokens: does not count
    assert said(llama_alone, "red", **longer) == ("a\nb", None, [a, end, newline, b])


def test_a_plain_stop_string_matches_across_a_skipped_special_token(llama_alone):
    a, b, fox, end = ids_of(LLAMA, "a", "b", "▁fox", "<end_of_turn>")
    both = spell(fox, a, end, b, stop=["ab", "<end_of_turn>x"])
    assert said(llama_alone, "red", **both) == (" fox", "ab", [fox, a, end, b])
    apart = spell(fox, a, end, b, stop=["ab"], skip_special_tokens=False)
    assert said(llama_alone, "red", **apart) == (" foxa<end_of_turn>b", None, [fox, a, end, b])
