"""Logits to tokens, against sums in plain Python."""

import math
from collections import Counter

import pytest
import torch
from engines import inverse_cdf

from flex_nano_vllm.sampler import ARGMAX, NOT_FINITE, Draw, uniform
from flex_nano_vllm.sampler import sample as sample_tokens


def sample(logits, temperatures, levels):
    draws = [Draw(temperature=t, level=level) if t > 0 else ARGMAX for t, level in zip(temperatures, levels)]
    return sample_tokens(logits, draws).tolist()


def test_uniform_is_a_function_of_seed_and_position_into_the_unit_interval():
    numbers = {(s, p): uniform(s, p) for s in (0, 1, 12, 2**63 - 1) for p in range(500)}
    assert all(0 <= number < 1 for number in numbers.values())
    assert all(uniform(s, p) == number for (s, p), number in numbers.items())
    assert len(set(numbers.values())) == len(numbers)
    assert uniform(1, 23) != uniform(12, 3)  # not just their digits


def test_uniform_never_changes():
    """What a seed has given once it gives in every version."""
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


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("vocabulary", [2, 50, 1000])
def test_sample_is_the_inverse_of_the_distribution(dtype, vocabulary):
    generator = torch.Generator().manual_seed(vocabulary)
    num_rows = 200
    logits = (4 * torch.randn(num_rows, vocabulary, generator=generator, dtype=torch.float64)).to(dtype)
    temperatures = [(0.1, 0.7, 1.0, 2.0)[row % 4] for row in range(num_rows)]
    levels = [row / num_rows for row in range(num_rows - 1)] + [1 - 2**-53]
    tokens = sample(logits, temperatures, levels)
    oracle = [inverse_cdf(*arguments) for arguments in zip(logits.double().tolist(), temperatures, levels)]
    clear = [row for row, (_, distance) in enumerate(oracle) if distance > 1e-12]
    assert len(clear) >= num_rows - 2  # the levels next to 0 and 1 may be too close to call
    assert [tokens[row] for row in clear] == [oracle[row][0] for row in clear]


def test_sampled_frequencies_are_the_probabilities():
    logits, temperature, num_draws = [0.0, 1.0, -1.0, 2.0, 0.5], 0.8, 20_000
    weights = [math.exp(logit / temperature) for logit in logits]
    rows = torch.tensor([logits], dtype=torch.float32).expand(num_draws, -1)
    counts = Counter(sample(rows, [temperature] * num_draws, [uniform(i, 3) for i in range(num_draws)]))
    wanted = [num_draws * weight / sum(weights) for weight in weights]
    chi_square = sum((counts[token] - count) ** 2 / count for token, count in enumerate(wanted))
    assert chi_square < 25  # 4 degrees of freedom: exceeded once in 20,000 times


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("vocabulary", [5, 256, 100_003])
def test_of_equal_logits_greedy_takes_the_lowest_id(dtype, vocabulary):
    logits = torch.zeros(4, vocabulary, dtype=dtype)
    logits[1, 3:] = 2.0
    logits[2, vocabulary - 2 :] = 2.0
    logits[3] = -5.0
    assert sample(logits, [0.0] * 4, [0.9] * 4) == [0, 3, vocabulary - 2, 0]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_rows_that_are_not_finite_have_no_token_and_the_others_have_theirs(dtype, temperature):
    logits = torch.zeros(7, 9, dtype=dtype)
    logits[:, 4] = 50.0  # the answer at any temperature
    logits[1, 2] = math.nan
    logits[2] = math.nan
    logits[3, 8] = math.inf
    logits[4] = -math.inf
    logits[5, 4] = -math.nan
    tokens = sample(logits, [temperature] * 7, [0.5] * 7)
    assert NOT_FINITE == -1
    assert tokens == [4, -1, -1, -1, -1, -1, 4]


@pytest.mark.parametrize("level", [0.0, 0.5, 1 - 2**-53])
@pytest.mark.parametrize("temperature", [0.0, 1e-4, 1.0, 2.0])
def test_a_token_of_minus_infinity_is_never_taken(temperature, level):
    logits = torch.full((2, 100), -math.inf, dtype=torch.float32)
    logits[0, 40:60] = torch.linspace(-1, 1, 20)
    logits[1, 71] = -3.0
    first, second = sample(logits, [temperature] * 2, [level] * 2)
    assert 40 <= first < 60
    assert second == 71


def test_rows_are_sampled_each_at_its_own_temperature():
    logits = torch.tensor([[0.0, 1.0, 0.9]]).expand(4, -1)
    # Token 0 has 1 in 4 at temperature 2, but 1 in 10,000 at temperature 0.1; at 0 there is token 1 only.
    assert sample(logits, [2.0, 0.1, 0.0, 2.0], [0.2, 0.2, 0.2, 0.99]) == [0, 1, 1, 2]


def test_no_rows_are_no_tokens():
    assert sample(torch.zeros(0, 9), [], []) == []
