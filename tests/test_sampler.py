"""Sampling of tokens from logits, compared with sums in plain Python."""

import itertools
import math
import random
from collections import Counter

import numpy as np
import pytest
import torch
from engines import byte_model, inverse_cdf, token_of
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.profiler import ProfilerActivity, profile

from flex_nano_vllm import Inference, sampler
from flex_nano_vllm.logprobs import logprobs_of
from flex_nano_vllm.sampler import ARGMAX, BYTES_PER_LOGIT, NOT_FINITE, Draw, Sampler, uniform
from flex_nano_vllm.sequence import LogitEdits

sample_tokens = Sampler(compiled=False, device_type="cpu").choose

DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)


def sample(logits, temperatures, levels):
    draws = [Draw(temperature=t, u=u) if t > 0 else ARGMAX for t, u in zip(temperatures, levels)]
    return sample_tokens(logits, draws).tolist()


def test_uniform_maps_seed_and_position_into_the_unit_interval():
    numbers = {(s, p): uniform(s, p) for s in (0, 1, 12, 2**63 - 1) for p in range(500)}
    assert all(0 <= number < 1 for number in numbers.values())
    assert all(uniform(s, p) == number for (s, p), number in numbers.items())
    assert len(set(numbers.values())) == len(numbers)
    assert uniform(1, 23) != uniform(12, 3)  # depends on more than the joined digits


def test_uniform_never_changes():
    """A seed gives the same numbers in every version."""
    assert [uniform(0, 0), uniform(7, 5), uniform(2**63 - 1, 4096)] == [
        0.8336885269740499,
        0.14270864735161393,
        0.6524567310695528,
    ]


@pytest.mark.parametrize("vary", ["seed", "position"])
def test_uniform_is_uniform(vary):
    draws = [uniform(i, 9) if vary == "seed" else uniform(9, i) for i in range(20_000)]
    counts = Counter(int(draw * 20) for draw in draws)
    chi_square = sum((counts[bin] - 1000) ** 2 / 1000 for bin in range(20))
    assert chi_square < 55  # 19 degrees of freedom: a fair generator exceeds it once in 20,000 times


def test_consecutive_uniforms_are_independent():
    pairs = Counter((int(uniform(s, p) * 4), int(uniform(s, p + 1) * 4)) for s in range(100) for p in range(0, 320, 2))
    chi_square = sum((pairs[i, j] - 1000) ** 2 / 1000 for i in range(4) for j in range(4))
    assert chi_square < 48  # 15 degrees of freedom


@DTYPES
@pytest.mark.parametrize("vocabulary", [2, 50, 1000])
def test_sample_is_the_inverse_of_the_cumulative_distribution(dtype, vocabulary):
    generator = torch.Generator().manual_seed(vocabulary)
    num_rows = 200
    logits = (4 * torch.randn(num_rows, vocabulary, generator=generator, dtype=torch.float64)).to(dtype)
    temperatures = [(0.1, 0.7, 1.0, 2.0)[row % 4] for row in range(num_rows)]
    levels = [row / num_rows for row in range(num_rows - 1)] + [1 - 2**-53]
    tokens = sample(logits, temperatures, levels)
    oracle = [inverse_cdf(*arguments) for arguments in zip(logits.double().tolist(), temperatures, levels)]
    clear = [row for row, (_, distance) in enumerate(oracle) if distance > (1e-12 if dtype == torch.float64 else 1e-6)]
    assert len(clear) >= num_rows - 4  # the levels next to 0 and 1, and few others, may be too close to a boundary
    assert [tokens[row] for row in clear] == [oracle[row][0] for row in clear]


def test_sampled_frequencies_match_the_probabilities():
    logits, temperature, num_draws = [0.0, 1.0, -1.0, 2.0, 0.5], 0.8, 20_000
    weights = [math.exp(logit / temperature) for logit in logits]
    rows = torch.tensor([logits], dtype=torch.float32).expand(num_draws, -1)
    counts = Counter(sample(rows, [temperature] * num_draws, [uniform(i, 3) for i in range(num_draws)]))
    wanted = [num_draws * weight / sum(weights) for weight in weights]
    chi_square = sum((counts[token] - count) ** 2 / count for token, count in enumerate(wanted))
    assert chi_square < 25  # 4 degrees of freedom: exceeded once in 20,000 times


@DTYPES
@pytest.mark.parametrize("vocabulary", [5, 256, 100_003])
def test_greedy_sampling_takes_the_lowest_id_of_equal_logits(dtype, vocabulary):
    logits = torch.zeros(4, vocabulary, dtype=dtype)
    logits[1, 3:] = 2.0
    logits[2, vocabulary - 2 :] = 2.0
    logits[3] = -5.0
    assert sample(logits, [0.0] * 4, [0.9] * 4) == [0, 3, vocabulary - 2, 0]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@DTYPES
def test_logits_rows_that_are_not_finite_get_no_token_and_other_rows_get_theirs(dtype, temperature):
    logits = torch.zeros(7, 9, dtype=dtype)
    logits[:, 4] = 50.0  # the token at any temperature
    logits[1, 2] = math.nan
    logits[2] = math.nan
    logits[3, 8] = math.inf
    logits[4] = -math.inf
    logits[5, 4] = -math.nan
    tokens = sample(logits, [temperature] * 7, [0.5] * 7)
    assert NOT_FINITE == -1
    assert tokens == [4, -1, -1, -1, -1, -1, 4]


@pytest.mark.parametrize("u", [0.0, 0.5, 1 - 2**-53])
@pytest.mark.parametrize("temperature", [0.0, 1e-4, 1.0, 2.0])
def test_a_token_with_a_logit_of_minus_infinity_is_never_chosen(temperature, u):
    logits = torch.full((2, 100), -math.inf, dtype=torch.float32)
    logits[0, 40:60] = torch.linspace(-1, 1, 20)
    logits[1, 71] = -3.0
    first, second = sample(logits, [temperature] * 2, [u] * 2)
    assert 40 <= first < 60
    assert second == 71


def test_each_logits_row_has_its_own_temperature():
    logits = torch.tensor([[0.0, 1.0, 0.9]]).expand(4, -1)
    # The probability of token 0 is 1/4 at temperature 2, and 1/30,000 at 0.1. At 0, only token 1 is possible.
    assert sample(logits, [2.0, 0.1, 0.0, 2.0], [0.2, 0.2, 0.2, 0.99]) == [0, 1, 1, 2]


def test_zero_logits_rows_give_no_tokens():
    assert sample(torch.zeros(0, 9), [], []) == []


# --- parameters that change the distribution ---------------------------------------------------------------------


def edits_of(changes):
    """Return `LogitEdits` from {token id: (bias, divisor, penalty)}."""
    columns = zip(*changes.values()) if changes else ((), (), ())
    return LogitEdits(np.array(list(changes), dtype=np.int64), *(np.array(column, dtype=float) for column in columns))


def bits_of(token_ids, vocabulary, beyond=0):
    """Return the bitmask of tokens, made of sums of powers of two. `beyond`: bits to set beyond the vocabulary."""
    words = [sum(1 << i % 32 for i in token_ids if i // 32 == word) for word in range((vocabulary + 31) // 32)]
    words[-1] |= beyond & ~((1 << (vocabulary - 1) % 32 + 1) - 1)
    return np.array(words, dtype=np.uint32).view(np.int32)


def random_row(rng, vocabulary, some=0.5):
    """Return (logits, a draw without its arrays, changes, allowed). Each parameter is used with probability `some`."""
    grid = rng.choice([1, 4, 1e9])  # a coarse grid gives many ties
    logits = [round(rng.gauss(0, 3) * grid) / grid for _ in range(vocabulary)]

    def maybe(value, otherwise):
        return value if rng.random() < some else otherwise

    draw = Draw(
        temperature=maybe(rng.uniform(0.1, 2), rng.choice([0.0, 1.0])),
        u=rng.random(),
        top_k=maybe(rng.choice([1, 2, 3, vocabulary - 1, vocabulary, vocabulary + 5, 2**31]), 0),
        top_p=maybe(rng.choice([1e-9, 0.3, 0.7, 0.95, 0.999]), 1.0),
        min_p=maybe(rng.choice([1e-4, 0.05, 0.3, 1.0]), 0.0),
    )
    edited = rng.sample(range(vocabulary), maybe(rng.randint(0, min(vocabulary, 9)), 0))
    biases = [rng.choice([0.0, -math.inf, rng.uniform(-5, 5)]) for _ in edited]
    changes = {i: (bias, rng.choice([1.0, 0.5, 1.3]), rng.choice([0.0, 1.5, -2.0])) for i, bias in zip(edited, biases)}
    allowed = maybe({i for i in range(vocabulary) if rng.random() < 0.6} | {rng.randrange(vocabulary)}, None)
    return logits, draw, changes, allowed


def sampled(rows, dtype, beyond=0, sample_tokens=sample_tokens):
    """Return the tokens of a batch, and the tokens of the oracle."""
    logits = torch.tensor([row[0] for row in rows], dtype=torch.float64).to(dtype)
    vocabulary, draws = logits.shape[1], []
    for _, draw, changes, allowed in rows:
        edits = edits_of(changes) if changes else None
        bits = None if allowed is None else bits_of(allowed, vocabulary, beyond)
        draws.append(Draw(**{**vars(draw), "edits": edits, "allowed": bits}))
    tokens = sample_tokens(logits, draws).tolist()
    rounded = logits.double().tolist()
    is_double = dtype == torch.float64
    margin = 1e-9 if is_double else 1e-6
    return tokens, [token_of(numbers, *row[1:], is_double, margin) for numbers, row in zip(rounded, rows)]


@DTYPES
@pytest.mark.parametrize("num_rows", [1, 2, 9])
@pytest.mark.parametrize("vocabulary", [2, 31, 32, 33, 1000])
def test_all_parameters_together_match_the_oracle(dtype, num_rows, vocabulary):
    rng = random.Random(f"{dtype} {num_rows} {vocabulary}")
    num_unclear, num_batches = 0, 8 if vocabulary == 1000 else 40
    for batch in range(num_batches):
        rows = [random_row(rng, vocabulary, some=(0.2, 0.5, 0.9)[batch % 3]) for _ in range(num_rows)]
        tokens, wanted = sampled(rows, dtype)
        num_unclear += wanted.count(None)
        assert [t for t, w in zip(tokens, wanted) if w is not None] == [w for w in wanted if w is not None]
    assert num_unclear <= 0.05 * num_rows * num_batches + 1


@pytest.mark.compiled
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_compiled_sampling_matches_the_oracle(dtype):
    rng = random.Random(0)
    model = byte_model().to(dtype)
    with Inference(model, None, max_batch_size=2, max_seq_length=32, page_size=16) as engine:
        assert engine.runner.compiled
        for num_rows in (1, 2, 9):
            for vocabulary in (33, 1000):
                rows = [random_row(rng, vocabulary) for _ in range(num_rows)]
                tokens, wanted = sampled(rows, dtype, sample_tokens=engine.sampler.choose)
                assert [t for t, w in zip(tokens, wanted) if w is not None] == [w for w in wanted if w is not None]


finite = st.sampled_from([0.0, 1.0, -1.0, 2.5, -30.0, 30.0, -math.inf]) | st.floats(-100, 100, width=32)
broken = st.sampled_from([math.nan, math.inf])


@st.composite
def batches(draw):
    vocabulary = draw(st.integers(2, 40))
    tokens = st.integers(0, vocabulary - 1)
    bias = st.floats(-100, 100) | st.just(-math.inf)
    changes = st.dictionaries(tokens, st.tuples(bias, st.floats(0.01, 10), st.floats(-50, 50)), max_size=6)
    row = st.tuples(
        st.lists(draw(st.sampled_from([finite, finite, finite | broken])), min_size=vocabulary, max_size=vocabulary),
        st.builds(
            Draw,
            temperature=st.just(0.0) | st.floats(1e-5, 2),
            u=st.floats(0, 1, exclude_max=True),
            top_k=st.integers(0, 45),
            top_p=st.just(1.0) | st.floats(0, 1, exclude_min=True),
            min_p=st.just(0.0) | st.floats(0, 1),
        ),
        changes,
        st.none() | st.sets(tokens),
    )
    return draw(st.lists(row, min_size=1, max_size=4))


@settings(max_examples=300, deadline=None, database=None)
@given(batches(), st.sampled_from([torch.float64, torch.float32]), st.integers(0, 2**32 - 1))
def test_sampling_of_arbitrary_values_matches_the_oracle(rows, dtype, beyond):
    """The values include NaN, infinities, ties, rows without an allowed token, and bits beyond the vocabulary."""
    for token, wanted in zip(*sampled(rows, dtype, beyond)):
        assert wanted is None or token == wanted


@settings(max_examples=100, deadline=None, database=None)
@given(batches(), st.randoms(use_true_random=False))
def test_a_logits_row_does_not_depend_on_other_rows(rows, rng):
    alone = [sampled([row], torch.float64)[0][0] for row in rows]
    order = rng.sample(range(len(rows)), len(rows))
    assert sampled([rows[i] for i in order], torch.float64)[0] == [alone[i] for i in order]


LOG = [math.log(weight) for weight in (16, 8, 4, 4, 2, 1)]


def test_frequencies_match_the_probabilities_with_all_parameters_in_their_order():
    """The weights are 16 8 4 4 2 1. Token 0 is not allowed, and the bias multiplies the weight of token 5 by 4.

    The temperature of 0.5 squares the weights: - 64 16 16 4 16. `min_p` removes the weight 4. `top_k` keeps all three
    weights of 16, because they tie for the second place. `top_p` keeps them too, because 64/112 is less than 0.6. The
    remaining weights are 4 to 1, 1, 1.
    """
    changes, allowed, num_draws = {5: (math.log(4), 1.0, 0.0)}, bits_of({1, 2, 3, 4, 5}, 6), 20_000
    options = dict(temperature=0.5, min_p=0.1, top_k=2, top_p=0.6, edits=edits_of(changes), allowed=allowed)
    logits = torch.tensor([LOG], dtype=torch.float32).expand(num_draws, -1)
    draws = [Draw(u=uniform(i, 4), **options) for i in range(num_draws)]
    counts = Counter(sample_tokens(logits, draws).tolist())
    assert counts.keys() == {1, 2, 3, 5}
    wanted = {1: 4 / 7 * num_draws} | dict.fromkeys([2, 3, 5], num_draws / 7)
    assert sum((counts[i] - wanted[i]) ** 2 / wanted[i] for i in wanted) < 22  # 3 degrees of freedom: 1 in 15,000


def support(weights, **options):
    """Return all tokens that are drawn for 1000 values of `u`."""
    logits = torch.tensor([[math.log(weight) for weight in weights]], dtype=torch.float64).expand(1000, -1)
    return set(sample_tokens(logits, [Draw(temperature=1.0, u=i / 1000, **options) for i in range(1000)]).tolist())


@pytest.mark.parametrize(
    ("weights", "options", "tokens"),
    [
        ((1, 5, 4), dict(top_k=1), {1}),
        ((3, 3, 3, 2), dict(top_k=2), {0, 1, 2}),
        ((5, 3, 2), dict(top_p=0.49), {0}),
        ((5, 3, 2), dict(top_p=0.51), {0, 1}),
        ((5, 3, 2), dict(top_k=2, top_p=0.6), {0}),  # 5 of 8
        ((4, 3, 3), dict(top_k=2, top_p=0.5), {0, 1, 2}),  # 4 of 10
        ((2, 2, 2, 1), dict(top_p=1e-9), {0, 1, 2}),
        ((50, 30, *[1] * 20), dict(min_p=0.1, top_p=0.6), {0}),  # 50 of 80
        ((2, 1, 1), dict(min_p=1.0), {0}),
        ((4, 3, 2), dict(top_k=3, top_p=1.0, min_p=0.6), {0, 1}),
    ],
)
def test_limits_keep_the_expected_tokens(weights, options, tokens):
    assert support(weights, **options) == tokens


def test_the_limits_of_one_logits_row_do_not_change_those_of_another():
    """Two logits rows use fewer ranks than the third, which uses all ranks."""
    logits = torch.tensor([[1.0, 2.0, 3.0, 4.0, 5.0]]).expand(3, -1)
    draws = [Draw(temperature=1.0, top_k=1), Draw(temperature=1.0, top_k=3), Draw(temperature=1.0, top_p=0.999999)]
    assert sample_tokens(logits, draws).tolist() == [4, 2, 0]


@DTYPES
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_logits_row_that_is_not_finite_fails_despite_a_mask_and_edits(dtype, temperature):
    """It fails even if the mask would remove the bad logit, because its other logits are not reliable."""
    logits = torch.zeros(5, 40, dtype=dtype)
    logits[0, 7], logits[1, 7], logits[2, 7] = math.nan, math.inf, -math.inf
    logits[3] = -math.inf
    draw = Draw(temperature=temperature, allowed=bits_of({3}, 40), edits=edits_of({3: (5.0, 2.0, 1.0)}), top_p=0.5)
    assert sample_tokens(logits, [draw] * 5).tolist() == [NOT_FINITE, NOT_FINITE, 3, NOT_FINITE, 3]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_logits_row_without_an_allowed_token_gets_no_token(temperature):
    ban = edits_of(dict.fromkeys([1, 3], (-math.inf, 1.0, 0.0)))
    nothing, odd = bits_of(set(), 5), bits_of({1, 3}, 5)
    options = [dict(allowed=nothing), dict(allowed=odd, edits=ban), dict(edits=ban), dict(allowed=odd)]
    tokens = sample_tokens(torch.zeros(4, 5), [Draw(temperature=temperature, u=0.1, **o) for o in options])
    assert tokens.tolist() == [NOT_FINITE, NOT_FINITE, 0, 1]


def test_sampling_does_not_change_the_logits():
    logits = torch.zeros(2, 8)
    sample_tokens(logits, [Draw(edits=edits_of({2: (9.0, 1.0, 0.0)})), Draw(allowed=bits_of({5}, 8))])
    assert torch.equal(logits, torch.zeros(2, 8))


# --- the distribution in blocks, and its memory ------------------------------------------------------------------


def cdf_of(logits, draw):
    """Return the cumulative probabilities [V] of a draw, in float64 and with a sorted vocabulary."""
    scaled = logits.astype(np.float64) / draw.temperature
    weights = np.exp(scaled - scaled.max())
    weights[weights < draw.min_p] = 0
    if draw.top_k:
        weights[weights < np.sort(weights)[-min(draw.top_k, len(weights))]] = 0
    ranked = np.sort(weights)[::-1]
    before = np.cumsum(ranked) - ranked
    if draw.top_p < 1:
        weights[weights < ranked[before < draw.top_p * ranked.sum()].min()] = 0
    return np.cumsum(weights) / weights.sum()


def is_drawn(token, u, cdf):
    """Return whether a token has a probability, and `u` is in its part of the distribution up to 1e-6."""
    before = cdf[token - 1] if token else 0.0
    return before < cdf[token] and before - 1e-6 <= u <= cdf[token] + 1e-6


@settings(max_examples=100, deadline=None, database=None)
@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from([2, 511, 512, 513, 1023, 1025, 1300]),
    st.sampled_from([0.02, 0.7, 1.0, 2.0]),
    st.sampled_from([0, 1, 2, 50, 510, 5000]),
    st.sampled_from([1.0, 0.999, 0.9, 0.5, 1e-9]),
    st.sampled_from([0.0, 1e-4, 0.03, 1.0]),
)
def test_tokens_follow_the_cumulative_distribution_within_a_millionth(
    seed, vocabulary, temperature, top_k, top_p, min_p
):
    """The logits have ties and values of minus infinity. Many draws are at a boundary between two tokens."""
    rng = np.random.default_rng(seed)
    grid = rng.choice([1, 8, 512])
    logits = (np.round(rng.normal(0, rng.choice([0.01, 1, 4]), vocabulary) * grid) / grid).astype(np.float32)
    logits[rng.random(vocabulary) < rng.choice([0, 0.1, 0.9])] = -np.inf
    logits[rng.integers(vocabulary)] = 1.0
    options = dict(temperature=temperature, top_k=top_k, min_p=min_p)
    # A limit that is within rounding of another set of tokens may give either set.
    nearby = [Draw(**{**options, "min_p": low}, top_p=p) for p in near(top_p, 1.0) for low in near(min_p, 0.0)]
    cdfs = [cdf_of(logits, draw) for draw in nearby]
    levels = [0.0, 1 - 2**-53, *rng.random(20), *rng.choice(cdfs[0][cdfs[0] < 1], 20)] if cdfs[0][0] < 1 else [0.0, 0.5]
    rows = torch.from_numpy(logits).expand(len(levels), -1)
    tokens = sample_tokens(rows, [Draw(u=u, top_p=top_p, **options) for u in levels]).tolist()
    for token, u in zip(tokens, levels):
        assert any(is_drawn(token, u, cdf) for cdf in cdfs)


def near(limit, off):
    """Return numbers around a limit, unless it is `off`."""
    return [limit] if limit == off else [limit, limit * (1 - 1e-6), min(1.0, limit * (1 + 1e-6))]


@pytest.mark.parametrize("position", [0, 1, 511, 512, 700, 1023, 1024, 1299])
def test_the_only_token_with_a_weight_is_drawn_for_every_u(position):
    weights = torch.zeros(5, 1536)
    weights[:, position] = torch.tensor([1.0, 1e-38, 0.3, 1.0, 0.7])
    u = torch.tensor([0.0, 0.0, 0.5, 1 - 2**-53, 1 - 2**-53], dtype=torch.float64)
    assert sampler.inverse_cdf(weights, u).tolist() == [position] * 5


def test_a_token_without_a_weight_is_never_drawn_where_sums_are_rounded():
    """The sums of blocks are rounded to float32. The last tokens of every block have no weight."""
    weights = torch.rand(400, 8, 512, generator=torch.Generator().manual_seed(0))
    weights[:, :, 300:] = 0
    weights = weights.flatten(1)
    ends = weights.unflatten(1, (8, 512)).sum(dim=-1).double().cumsum(dim=-1)
    for block in range(8):
        for ulps in (-1, 0, 1):
            u = (ends[:, block] / ends[:, -1] * (1 + ulps * 2**-52)).clamp(max=1 - 2**-53)
            assert (weights.gather(1, sampler.inverse_cdf(weights, u)[:, None]) > 0).all()


def peak_bytes(call):
    """Return how many bytes a call allocates at most at one time."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        call()
    events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    sizes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return max(itertools.accumulate(sizes))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "options", [dict(), dict(top_p=0.9), dict(top_k=9, top_p=0.9, min_p=0.1), dict(top_p=0.9, allowed=True)], ids=str
)
def test_sampling_takes_at_most_the_counted_bytes_of_memory(dtype, options):
    vocabulary, num_rows = 20_000, 8
    logits = torch.randn(num_rows, vocabulary).to(dtype)
    if "allowed" in options:
        options = options | dict(allowed=bits_of(range(vocabulary), vocabulary))
    draws = [Draw(temperature=1.0, u=0.3, **options)] * num_rows
    assert BYTES_PER_LOGIT <= 24
    assert 4 < peak_bytes(lambda: sample_tokens(logits, draws)) / logits.numel() <= BYTES_PER_LOGIT
    token_ids = torch.arange(num_rows)
    assert peak_bytes(lambda: logprobs_of(logits[token_ids], token_ids, 20)) / logits.numel() <= BYTES_PER_LOGIT


# --- log-probabilities -------------------------------------------------------------------------------------------


@DTYPES
@pytest.mark.parametrize("num_top", [0, 1, 7])
@pytest.mark.parametrize("vocabulary", [7, 500])
def test_logprobs_are_a_log_softmax_and_ranks_count_more_likely_tokens(dtype, num_top, vocabulary):
    rng = random.Random(vocabulary)
    values = [[round(rng.gauss(0, 4)) / 2 for _ in range(vocabulary)] for _ in range(6)]  # with many ties
    token_ids = [rng.randrange(vocabulary) for _ in values]
    rows = logprobs_of(torch.tensor(values, dtype=torch.float64).to(dtype), torch.tensor(token_ids), num_top)
    assert rows.shape == (6, 2 + 2 * num_top) and rows.dtype == torch.float64
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    for numbers, token_id, row in zip(values, token_ids, rows.tolist()):
        total = math.fsum(math.exp(number) for number in numbers)
        wanted = [math.log(math.exp(number) / total) for number in numbers]
        logprob, rank, ids, tops = row[0], row[1], row[2 : 2 + num_top], row[2 + num_top :]
        assert logprob == pytest.approx(wanted[token_id], abs=tolerance)
        assert rank == 1 + sum(number > numbers[token_id] for number in numbers)
        assert len(set(ids)) == num_top
        assert tops == pytest.approx([wanted[int(i)] for i in ids], abs=tolerance)
        assert tops == pytest.approx(sorted(wanted, reverse=True)[:num_top], abs=tolerance)


def test_a_token_with_a_logit_of_minus_infinity_has_that_logprob_and_the_last_rank():
    (row,) = logprobs_of(torch.tensor([[0.0, -math.inf, 0.0]]), torch.tensor([1]), 2).tolist()
    assert row[:2] == [-math.inf, 3.0] and set(row[2:4]) == {0.0, 2.0}
