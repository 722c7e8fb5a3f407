"""Structured output: random walks over the allowed tokens, and masks compared with lists of all fitting texts."""

import itertools
import json
import random
import re
import socket
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import flex_nano_vllm
from benchmarks.random_models import byte_tokenizer
from flex_nano_vllm.grammar import MAX_INTEGER, MAX_OBJECTS, MAX_REGEX_BYTES, MAX_SCHEMA_BYTES, GrammarCompiler, bounded

# By name: the number of logits and the EOS ids. Each model has more logits than its tokenizer has ids. 288 logits fill
# the words of 32 bits of a mask; 1500 and 300 do not.
MODELS = {"tiny-gemma2": (1500, {1, 4}), "bytes": (288, {1}), "byte-fallback": (300, {1, 2})}


def byte_fallback_tokenizer():
    """Return a tokenizer like Gemma's: characters, a few words, `▁` for a space, and bytes for all other characters."""
    words = ["<pad>", "<eos>", "<eot>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *'abcdeé{}[]":,', "ab", "▁c"]
    model = models.BPE({word: i for i, word in enumerate(words)}, merges=[("a", "b")], byte_fallback=True)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens(words[:3])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>")


@cache
def tokenizer_of(model):
    if model == "bytes":
        return byte_tokenizer()
    if model == "byte-fallback":
        return byte_fallback_tokenizer()
    return AutoTokenizer.from_pretrained(Path(flex_nano_vllm.__file__).parent / "tiny_gemma2")


@cache
def compiler_of(model):
    pytest.importorskip("llguidance")
    vocab_size, eos_token_ids = MODELS[model]
    return GrammarCompiler(tokenizer_of(model), vocab_size, frozenset(eos_token_ids))


@pytest.fixture(params=MODELS)
def model(request):
    return request.param


@pytest.fixture
def compiler():
    return compiler_of("tiny-gemma2")


@cache
def bytes_of(model):
    """Return the bytes of each token that has any. Byte-level tokenizers write each byte as a printable character."""
    tokenizer = tokenizer_of(model)
    specials = set(tokenizer.all_special_ids) | MODELS[model][1] | set(tokenizer.added_tokens_decoder)
    printed = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printed]
    byte_of = {chr(byte): byte for byte in printed} | {chr(256 + i): byte for i, byte in enumerate(others)}
    result = {}
    for token in set(range(len(tokenizer))) - specials:
        name = tokenizer.convert_ids_to_tokens(token)
        if model != "byte-fallback":
            result[token] = bytes(byte_of[character] for character in name)
        elif re.fullmatch("<0x..>", name):
            result[token] = bytes([int(name[3:5], 16)])
        else:
            result[token] = name.replace("▁", " ").encode()
    return result


def ids_of(mask):
    assert mask.dtype == np.int32 and mask.ndim == 1
    return {32 * word + bit for word in range(len(mask)) for bit in range(32) if int(mask[word]) >> bit & 1}


def walk(model, follower, seed, is_complete, max_tokens=400):
    """Return the text of a random walk. Check at each token that EOS is allowed exactly if the text is complete."""
    chance, output, text = random.Random(seed), [], b""
    eos_token_ids, bytes_by_token = MODELS[model][1], bytes_of(model)
    while len(output) < max_tokens:
        allowed = ids_of(follower.allowed(output))
        assert allowed <= set(bytes_by_token) | eos_token_ids
        assert allowed & eos_token_ids == (eos_token_ids if is_complete(text) else set()), text
        if allowed & eos_token_ids and (allowed == eos_token_ids or chance.random() < 0.3):
            return text.decode()
        choices = sorted(allowed - eos_token_ids)
        closing = [token for token in choices if bytes_by_token[token] in (b'"', b"}", b"]", b":", b",")]
        output.append(chance.choice(closing if closing and chance.random() < 0.7 else choices))
        text += bytes_by_token[output[-1]]
    raise AssertionError(f"no end after {max_tokens} tokens: {text}")


def is_json(text, check=lambda value: True):
    try:
        return check(json.loads(text))
    except (ValueError, RecursionError):
        return False


def fits(regex):
    def is_complete(text):
        try:
            return re.fullmatch(regex, text.decode()) is not None
        except UnicodeDecodeError:
            return False

    return is_complete


# ---- allowed tokens ----


@pytest.mark.parametrize(
    "regex",
    [
        "abc",
        "(yes|no|maybe)",
        "[0-9]{4}-[01][0-9]",
        "a{0,3}b?",
        "[äöüß€]{1,4}",
        "(日本|語|🙂){2,3}[é]?",
        r"[a-z]{1,5}@[a-z]{1,5}\.(de|fr)",
        "<eos>|<end_of_turn>|<0x41>",
        r"a/b\\|//|/\*",
        "a\nb|\r\t",
        r"[^a-z]{2}",
        r"[0-9]{1,2}\.[0-9]{2} (EUR|€)",
    ],
)
def test_every_walk_ends_in_a_text_that_the_regex_matches(model, regex):
    grammar = compiler_of(model).compile("regex", regex)
    texts = {walk(model, grammar.follow(), seed, fits(regex)) for seed in range(8)}
    assert all(re.fullmatch(regex, text) for text in texts)
    assert len(texts) > 1 or regex == "abc"


FINITE = {
    "(ab|cé){1,2}x?": [
        "".join(p) + x for n in (1, 2) for p in itertools.product(["ab", "cé"], repeat=n) for x in ["", "x"]
    ],
    "(a|ab)(c|bcd)": ["ac", "abcd", "abc", "abbcd"],
    "<eos>|🙂🙂| the a": ["<eos>", "🙂🙂", " the a"],
    "|a": ["", "a"],
}


@pytest.mark.parametrize("regex", FINITE)
def test_a_mask_contains_exactly_the_tokens_that_continue_a_fitting_text(model, regex):
    texts = [text.encode() for text in FINITE[regex]]
    grammar, pending, seen = compiler_of(model).compile("regex", regex), [[]], 0
    while pending:
        output = pending.pop()
        begun = b"".join(bytes_of(model)[token] for token in output)
        wanted = {t for t, more in bytes_of(model).items() if any(text.startswith(begun + more) for text in texts)}
        wanted |= MODELS[model][1] if begun in texts else set()
        mask = grammar.follow().allowed(output)
        assert ids_of(mask) == wanted, begun
        assert mask.shape == (-(-MODELS[model][0] // 32),)
        pending += [[*output, token] for token in wanted - MODELS[model][1]]
        seen += 1
    assert seen >= len(texts)


def test_digits_and_word_characters_are_those_of_ascii(compiler):
    number, word = {"type": "string", "pattern": r"^\d[\d]\w[\w]$"}, r"\d[\d]\w[\w]"
    texts = {
        walk("tiny-gemma2", compiler.compile("regex", word).follow(), seed, fits(f"(?a:{word})")) for seed in range(8)
    }
    schema = compiler.compile("json_schema", number)
    texts |= {walk("tiny-gemma2", schema.follow(), seed, is_json)[1:-1] for seed in range(8)}
    assert len(texts) > 8 and all(re.fullmatch(word, text, re.ASCII) for text in texts)


def test_a_choice_is_exactly_one_of_the_strings(model):
    choices = ["a.c", "a", "(b)", "é|\n#", 'say "so"', "\\"]
    grammar = compiler_of(model).compile("choice", choices)
    assert {
        walk(model, grammar.follow(), seed, lambda text: text.decode(errors="replace") in choices) for seed in range(60)
    } == {*choices}


PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 130},
        "tags": {"type": "array", "items": {"enum": ["a", "é", 1, None]}, "minItems": 1, "maxItems": 3},
        "home": {"$ref": "#/$defs/place"},
    },
    "required": ["name", "age", "home"],
    "additionalProperties": False,
    "$defs": {
        "place": {
            "type": "object",
            "properties": {"zip": {"type": "string", "pattern": "^[0-9]{5}$"}},
            "required": ["zip"],
            "additionalProperties": False,
        }
    },
}
LIST = {
    "$defs": {
        "list": {
            "anyOf": [
                {"type": "null"},
                {
                    "type": "array",
                    "prefixItems": [{"type": "boolean"}, {"$ref": "#/$defs/list"}],
                    "minItems": 2,
                    "items": False,
                },
            ]
        }
    },
    "$ref": "#/$defs/list",
}


def is_person(value):
    return (
        isinstance(value, dict)
        and {"name", "age", "home"} <= value.keys() <= {"name", "age", "tags", "home"}
        and isinstance(value["name"], str)
        and len(value["name"]) <= 8
        and type(value["age"]) is int
        and 0 <= value["age"] <= 130
        and value["home"].keys() == {"zip"}
        and re.fullmatch("[0-9]{5}", value["home"]["zip"]) is not None
        and (
            "tags" not in value
            or (1 <= len(value["tags"]) <= 3 and all(t in ["a", "é", 1, None] for t in value["tags"]))
        )
    )


def is_list(value):
    return value is None or (
        isinstance(value, list) and len(value) == 2 and isinstance(value[0], bool) and is_list(value[1])
    )


@pytest.mark.parametrize("schema, check", [(PERSON, is_person), (LIST, is_list)], ids=["person", "list"])
def test_every_walk_ends_in_a_value_of_the_schema(model, schema, check):
    grammar = compiler_of(model).compile("json_schema", schema)
    texts = [walk(model, grammar.follow(), seed, lambda text: is_json(text, check)) for seed in range(8)]
    assert all(check(json.loads(text)) for text in texts) and len(set(texts)) > 1


def test_properties_have_the_order_of_the_schema(compiler):
    number, texts = {"type": "integer", "minimum": 0, "maximum": 9}, []
    for names in ("ab", "ba"):
        schema = {"type": "object", "properties": dict.fromkeys(names, number), "required": [*names]}
        grammar = compiler.compile("json_schema", schema | {"additionalProperties": False})
        texts += [walk("tiny-gemma2", grammar.follow(), seed, is_json) for seed in range(5)]
    assert [list(json.loads(text)) for text in texts] == [["a", "b"]] * 5 + [["b", "a"]] * 5


def test_a_json_object_is_any_object(model):
    grammar = compiler_of(model).compile("json_object")
    for seed in range(8):
        text = walk(model, grammar.follow(), seed, is_json, max_tokens=4000)
        assert isinstance(json.loads(text), dict)


@pytest.mark.parametrize(("options", "most"), [({}, 1), (dict(whitespace_pattern=r"[ \n]{1,40}"), 40)])
def test_the_whitespace_between_symbols_of_json_is_limited(compiler, options, most):
    (space,) = [token for token, text in bytes_of("tiny-gemma2").items() if text == b" "]
    follower, output = (
        compiler.compile("json_object", **options).follow(),
        tokenizer_of("tiny-gemma2").encode("{", add_special_tokens=False),
    )
    while len(output) < 100 and space in ids_of(follower.allowed(output)):
        output.append(space)
    assert len(output) == 1 + most


@pytest.mark.parametrize("schema", [PERSON, True, {}])
def test_a_schema_may_be_a_string_and_is_compiled_once(compiler, schema):
    grammar = compiler.compile("json_schema", schema)
    assert compiler.compile("json_schema", json.dumps(schema, indent=3)) is grammar
    assert compiler.compile("json_schema", {"type": "null"}) is not grammar


@pytest.mark.parametrize(
    ("schema", "expected"),
    [
        ({"type": "integer"}, {"minimum": -MAX_INTEGER, "maximum": MAX_INTEGER}),
        ({"type": "integer", "minimum": 0}, {"minimum": 0, "maximum": MAX_INTEGER}),
        ({"type": "integer", "exclusiveMaximum": 5}, {"exclusiveMaximum": 5, "minimum": -MAX_INTEGER}),
        ({"type": "integer", "minimum": 10**20}, {"minimum": 10**20}),
        ({"type": "integer", "multipleOf": 7}, {"multipleOf": 7}),
        ({"type": "string", "minLength": 1}, {"minLength": 1, "maxLength": 50}),
        ({"type": "string", "minLength": 60}, {"minLength": 60, "maxLength": 60}),
        ({"type": "string", "maxLength": 3}, {"maxLength": 3}),
        ({"type": "string", "pattern": "a*"}, {"pattern": "a*"}),
    ],
    ids=str,
)
def test_a_schema_gets_the_limits_that_it_lacks(schema, expected):
    assert bounded(schema, 50) == {"type": schema["type"]} | expected


def test_the_cache_is_bounded(compiler):
    first = compiler.compile("regex", "x0")
    for i in range(40):
        compiler.compile("regex", f"x{i}")
    assert compiler.compile("regex", "x39") is compiler.compile("regex", "x39")
    assert compiler.compile("regex", "x0") is not first


# ---- followers ----


def test_a_follower_accepts_a_repeated_output_and_several_new_tokens_at_once(compiler):
    grammar, output = compiler.compile("json_schema", PERSON), []
    follower = grammar.follow()
    for step in range(40):
        mask = follower.allowed(output)
        assert (follower.allowed(list(output)) == mask).all()
        assert (grammar.follow().allowed(output) == mask).all()
        output.append(random.Random(step).choice(sorted(ids_of(mask))))
        if output[-1] in (1, 4):
            break


def test_samples_that_share_a_grammar_are_independent(compiler):
    grammar = compiler.compile("regex", "[ab]{3}")
    a, b = tokenizer_of("tiny-gemma2").convert_tokens_to_ids(["a", "b"])
    first, second = grammar.follow(), grammar.follow()
    before = ids_of(second.allowed([]))
    assert ids_of(first.allowed([a, b, a])) == {1, 4}
    assert ids_of(second.allowed([])) == before > {a, b}


def test_only_eos_is_allowed_after_eos(compiler):
    a = tokenizer_of("tiny-gemma2").convert_tokens_to_ids("a")
    for regex in ("a", "a+"):
        follower = compiler.compile("regex", regex).follow()
        assert ids_of(follower.allowed([a])) >= {1, 4}
        assert ids_of(follower.allowed([a, 4])) == ids_of(follower.allowed([a, 4, 1])) == {1, 4}


@pytest.mark.parametrize("wrong", [[71], [1], [0], [3], [1480], [10**6], [69, 69]], ids=str)
def test_a_token_that_does_not_fit_raises_a_value_error(compiler, wrong):
    grammar = compiler.compile("regex", "ab|ac")
    follower = grammar.follow()
    for _ in range(2):
        with pytest.raises(ValueError, match=rf"output token {len(wrong) - 1} \({wrong[-1]}\)"):
            follower.allowed(wrong)
    assert 69 in ids_of(grammar.follow().allowed([]))


def test_a_sample_that_exceeds_a_limit_fails_alone(compiler):
    """The samples of a grammar share its lexer, which cannot recover from an error."""
    a, z = tokenizer_of("tiny-gemma2").convert_tokens_to_ids(["a", "z"])
    grammar = compiler.compile("regex", "z{1,5}|" + "a?" * 600 + "a" * 600)
    costly, cheap = grammar.follow(), grammar.follow()
    assert ids_of(cheap.allowed([z])) >= {1, 4, z}
    with pytest.raises(ValueError, match="too many"):
        costly.allowed([a])
    assert ids_of(cheap.allowed([z, z])) >= {1, 4, z}
    assert ids_of(cheap.allowed([z] * 5)) == {1, 4}
    assert ids_of(grammar.follow().allowed([z] * 5)) == {1, 4}


def test_threads_may_compile_and_follow_concurrently(compiler):
    def text_of(seed):
        regex = f"[a-zé]{{1,3}}(x|y){{2}}z{{{seed % 3}}}"
        return walk("tiny-gemma2", compiler.compile("regex", regex).follow(), seed, fits(regex))

    expected = [text_of(seed) for seed in range(12)]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(text_of, [*range(12)] * 2)) == expected * 2


# ---- rejected sources ----


def nested(depth):
    schema = {"type": "null"}
    for _ in range(depth):
        schema = {"items": schema, "type": "array"}
    return schema


def conjunction(num, pattern="(a|b)*a(a|b){%d}"):
    return {"allOf": [{"type": "string", "pattern": pattern % i} for i in range(num)]}


def hidden_conjunction(num):
    """Return a conjunction of patterns that are joined by references."""
    definitions = {f"d{i}": {"$ref": f"#/$defs/d{i + 1}", "pattern": f"(a|b)*a(a|b){{{i}}}"} for i in range(num)}
    return {"$defs": definitions | {f"d{num}": {"type": "string"}}, "$ref": "#/$defs/d0"}


def chain(num):
    """Return a chain of references. Without a limit, a chain of 1,000 references ends the process."""
    definitions = {f"d{i}": {"properties": {"a": {"$ref": f"#/$defs/d{i + 1}"}}} for i in range(num)}
    return {"$defs": definitions | {f"d{num}": {}}, "$ref": "#/$defs/d0"}


CYCLE = {}
CYCLE["items"] = CYCLE
BAD = {
    "unknown kind": ("lark", "start: /a/", "unknown kind"),
    "no regex": ("regex", None, "string"),
    "bytes": ("regex", b"a", "string"),
    "surrogate": ("regex", "a\ud800", "surrogate"),
    "unclosed": ("regex", "(a", "unclosed group"),
    "look-ahead": ("regex", "a(?=b)", "look-ahead"),
    "backreference": ("regex", r"(a)\1", "backreferences"),
    "backslash": ("regex", "a\\", "backslash"),
    "empty class": ("regex", r"[^\s\S]", "no text fits"),
    "long regex": ("regex", "a" * (MAX_REGEX_BYTES + 1), "bytes"),
    "deep regex": ("regex", "(" * 1000 + "a" + ")" * 1000, "nest"),
    "no choice": ("choice", [], "list of strings"),
    "a string": ("choice", "abc", "list of strings"),
    "numbers": ("choice", [1, 2], "list of strings"),
    "surrogate choice": ("choice", ["\udcff"], "surrogate"),
    "no JSON": ("json_schema", "{'type': 1}", "bad JSON schema"),
    "None": ("json_schema", None, "object"),
    "list": ("json_schema", [{"type": "null"}], "object"),
    "false": ("json_schema", False, "object"),
    "not a number": ("json_schema", {"minimum": float("nan")}, "JSON compliant"),
    "Infinity": ("json_schema", '{"maximum": Infinity}', "JSON compliant"),
    "a set": ("json_schema", {"enum": {1}}, "serializable"),
    "schema surrogate": ("json_schema", {"const": "\ud800"}, "surrogate"),
    "escaped surrogate": ("json_schema", r'{"const": "\ud800"}', "surrogate"),
    "unknown type": ("json_schema", {"type": "text"}, "Invalid type: text"),
    "no type": ("json_schema", {"properties": {"a": {"type": 5}}}, "type must be"),
    "not": ("json_schema", {"not": {}}, "not"),
    "uniqueItems": ("json_schema", {"type": "array", "uniqueItems": True}, "uniqueItems"),
    "bad pattern": ("json_schema", {"type": "string", "pattern": "("}, "unclosed group"),
    "unknown format": ("json_schema", {"type": "string", "format": "iban"}, "iban"),
    "empty range": ("json_schema", {"type": "integer", "minimum": 2, "maximum": 1}, "minimum"),
    "empty enum": ("json_schema", {"enum": []}, "Unsatisfiable"),
    "missing": ("json_schema", {"$ref": "#/$defs/a"}, "does not exist"),
    "itself": ("json_schema", {"$ref": "#"}, "no text fits"),
    "x-guidance": ("json_schema", {"x-guidance": {"item_separator": ";"}}, "x-guidance"),
    "long schema": ("json_schema", {"enum": ["a" * MAX_SCHEMA_BYTES]}, "bytes"),
    "long text": ("json_schema", " " * MAX_SCHEMA_BYTES + "{}", "bytes"),
    "deep": ("json_schema", nested(63), "levels"),
    "deep text": ("json_schema", '{"items":' * 6000, "schema"),
    "cycle": ("json_schema", CYCLE, "schema"),
    "too deep for Python": ("json_schema", nested(100_000), "schema"),
    # Sources that would take minutes or end the process:
    "objects": ("json_schema", {"properties": {f"{i}": {} for i in range(MAX_OBJECTS)}}, "objects"),
    "chain": ("json_schema", chain(600), "ref"),
    "divisors": ("json_schema", {"properties": {f"{i}": {"multipleOf": 9973 + i} for i in range(17)}}, "multipleOf"),
    "divisor": ("json_schema", {"type": "integer", "multipleOf": 999_999_937}, "fuel"),
    "conjunction": ("json_schema", conjunction(40), "patterns"),
    "hidden conjunction": ("json_schema", hidden_conjunction(40), "patterns"),
    "keys": ("json_schema", {"patternProperties": {f"^{i}x(a|b)*a(a|b){{{i}}}$": {} for i in range(900)}}, "patterns"),
}


@pytest.mark.parametrize("kind, source, reason", BAD.values(), ids=BAD)
def test_an_invalid_source_raises_a_value_error_with_the_reason(compiler, kind, source, reason):
    with pytest.raises(ValueError, match=reason) as raised:
        compiler.compile(kind, source)
    assert len(str(raised.value)) < 600 and "%llguidance" not in str(raised.value)


BOMBS = {
    "repeated": ("regex", "(a{1000}){1000}"),
    "thrice": ("regex", "((a{100}){100}){100}"),
    "states": ("regex", "(a|b)*a(a|b){1000}"),
    "optional": ("regex", "a?" * 600 + "a" * 600),
    "nested": ("regex", "(((((a{0,9}){0,9}){0,9}){0,9}){0,9}){0,9}"),
    "words": ("regex", r"(\w{1,1000} ){1000}"),
    "letters": ("regex", r"\p{L}{1000}" * 100),
    "plus": ("regex", "(x+x+)+y"),
    "alternatives": ("regex", "(" + "|".join(f".{{{7 * i}}}[a-{'bcdefghij'[i % 9]}]" for i in range(200)) + ")*"),
    "length": ("json_schema", {"type": "string", "minLength": 10**6, "maxLength": 10**7}),
    "items": ("json_schema", {"type": "array", "items": {"type": "integer"}, "minItems": 10**6}),
    "pattern": ("json_schema", {"type": "string", "pattern": "^(a{1000}){1000}$"}),
    "largest conjunction": ("json_schema", conjunction(8)),
    "easy conjunction": ("json_schema", conjunction(8, "^[a-z]{%d,}$")),
    "properties": ("json_schema", {"type": "object", "properties": {f"{i}": {} for i in range(MAX_OBJECTS - 2)}}),
    "divisors": (
        "json_schema",
        {"type": "object", "properties": {f"{i}": {"multipleOf": 9973 + i} for i in range(16)}},
    ),
    "references": ("json_schema", chain(256 - 1)),
    "deep": ("json_schema", nested(62)),
    "keys": ("json_schema", {"patternProperties": {f"^{i}x(a|b)*a(a|b){{{i}}}$": {} for i in range(64)}}),
    "alternative objects": (
        "json_schema",
        {"anyOf": [{"properties": {f"p{j}": {} for j in range(i % 9)} | {"z": {"const": i}}} for i in range(250)]},
    ),
    "endless": ("json_schema", {"properties": {"a": {"$ref": "#"}}, "required": ["a"], "type": "object"}),
}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("kind, source", BOMBS.values(), ids=BOMBS)
def test_an_expensive_source_is_rejected_or_followed_in_bounded_time(compiler, kind, source):
    output, chance = [], random.Random(0)
    try:
        follower = compiler.compile(kind, source).follow()
        while len(output) < 100 and not {1, 4} & set(output):
            output.append(chance.choice(sorted(ids_of(follower.allowed(output)))))
    except ValueError as error:
        assert str(error)


def test_a_remote_reference_is_rejected_and_not_fetched(compiler):
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setblocking(False)
        url = f"http://127.0.0.1:{server.getsockname()[1]}/schema.json"
        for schema in ({"$ref": url}, {"$schema": url, "type": "null"}, {"$id": url, "$ref": "other.json"}):
            with pytest.raises(ValueError, match=r"127\.0\.0\.1"):
                compiler.compile("json_schema", schema)
        with pytest.raises(BlockingIOError):
            server.accept()


@pytest.mark.parametrize("eos_token_ids", [[], [-1], [1, 1480], [1500]], ids=str)
def test_missing_or_invalid_eos_ids_are_rejected(eos_token_ids):
    pytest.importorskip("llguidance")
    with pytest.raises(ValueError, match="EOS"):
        GrammarCompiler(tokenizer_of("tiny-gemma2"), 1500, frozenset(eos_token_ids))


def test_tokens_without_a_logit_are_never_allowed():
    pytest.importorskip("llguidance")
    compiler = GrammarCompiler(tokenizer_of("tiny-gemma2"), 75, frozenset({1}))
    mask = compiler.compile("regex", "[a-z]{2}").follow().allowed([])
    a_to_f = set(range(69, 75))
    assert mask.shape == (3,) and ids_of(mask) == a_to_f
    with pytest.raises(ValueError, match="no text fits"):
        compiler.compile("regex", "zzz")


def test_the_error_without_llguidance_names_the_remedy(monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "llguidance"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "llguidance", None)
    monkeypatch.delitem(sys.modules, "flex_nano_vllm.grammar")
    from flex_nano_vllm.grammar import GrammarCompiler

    with pytest.raises(ImportError, match=r"pip install flex-nano-vllm\[structured\]"):
        GrammarCompiler(tokenizer_of("bytes"), 288, frozenset({1}))
