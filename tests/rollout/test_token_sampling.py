"""Token sampling: the inverse CDF of a uniform number, and truncation by top_k and top_p."""

from functools import partial

import numpy as np
import pytest
import torch

from apa_cli.rollout.token_sampling import invert_cdf, sample_tokens, truncate_logits, truncate_probabilities
from tests.builders import make_sampling_settings

close = partial(torch.testing.assert_close, rtol=1e-6, atol=1e-7)

# Inverse CDF


def sample(probabilities: list[float], *uniforms: float) -> list[int]:
    """Return the token that each number selects."""
    rows = torch.tensor(probabilities).expand(len(uniforms), len(probabilities))
    return invert_cdf(rows, torch.tensor(uniforms, dtype=torch.float64)).tolist()


def test_inverse_cdf_by_hand():
    # cumulative ¼, ¾, 1: the first token that reaches u
    assert sample([0.25, 0.5, 0.25], 0.1, 0.25, 0.26, 0.75, 0.76, 1.0) == [0, 0, 1, 1, 2, 2]


def test_u_is_a_share_of_the_total_if_probabilities_do_not_sum_to_1():
    # total 2, cumulative ½, 1½, 2
    assert sample([0.5, 1.0, 0.5], 0.25, 0.26, 0.75, 0.76) == [0, 1, 1, 2]


def test_a_token_of_probability_0_is_never_sampled():
    tiny = 2.0**-53  # the smallest number that the generator returns
    assert sample([0.0, 0.5, 0.0, 0.5, 0.0], tiny, 0.5, 0.5 + tiny, 1.0) == [1, 1, 3, 3]
    assert sample([0.0, 0.0, 1.0], tiny, 0.5, 1.0) == [2, 2, 2]
    assert sample([1.0, 0.0, 0.0], tiny, 0.5, 1.0) == [0, 0, 0]


def test_cumulative_probabilities_are_summed_in_float64():
    # cumulative ½, ½ + 2⁻³⁰, 1 + 2⁻³⁰, of which u is a share: u = ½ falls between the first two, equal in float32
    assert sample([0.5, 2.0**-30, 0.5], 0.5 - 2.0**-30, 0.5, 0.5 + 2.0**-29) == [0, 1, 2]


def test_each_row_is_sampled_from_its_own_distribution():
    probabilities = torch.tensor([[0.9, 0.1], [0.1, 0.9], [0.5, 0.5]])
    assert invert_cdf(probabilities, torch.tensor([0.5, 0.5, 0.75]).double()).tolist() == [0, 1, 1]


def test_frequencies_over_a_grid_of_numbers_equal_the_probabilities():
    # 1024 equally spaced numbers, probabilities in eighths: 128, 256, 0 and 640 of them
    grid = [(k + 1) / 1024 for k in range(1024)]
    assert np.bincount(sample([1 / 8, 2 / 8, 0.0, 5 / 8], *grid)).tolist() == [128, 256, 0, 640]


# Truncation

P = [0.1, 0.4, 0.2, 0.3]


def truncate(probabilities: list[float], top_k: int = 0, top_p: float = 1.0) -> list[float]:
    return truncate_probabilities(torch.tensor([probabilities]), top_k, top_p)[0].tolist()


def approx(*probabilities: float) -> object:
    return pytest.approx(list(probabilities), rel=1e-6)


def test_top_k_keeps_the_likeliest_tokens():
    assert truncate(P, top_k=1) == approx(0, 0.4, 0, 0)
    assert truncate(P, top_k=2) == approx(0, 0.4, 0, 0.3)
    assert truncate(P, top_k=3) == approx(0, 0.4, 0.2, 0.3)


@pytest.mark.parametrize("top_k", [0, 4, 50])
def test_top_k_of_0_or_at_least_the_vocabulary_keeps_all(top_k):
    assert truncate(P, top_k=top_k) == approx(*P)


def test_top_p_keeps_the_smallest_set_that_reaches_it():
    # descending: 0.4, 0.3, 0.2, 0.1; the mass before each: 0, 0.4, 0.7, 0.9
    assert truncate(P, top_p=0.01) == approx(0, 0.4, 0, 0)
    assert truncate(P, top_p=0.39) == approx(0, 0.4, 0, 0)
    assert truncate(P, top_p=0.41) == approx(0, 0.4, 0, 0.3)
    assert truncate(P, top_p=0.69) == approx(0, 0.4, 0, 0.3)
    assert truncate(P, top_p=0.71) == approx(0, 0.4, 0.2, 0.3)
    assert truncate(P, top_p=0.91) == approx(*P)
    assert truncate(P, top_p=1.0) == approx(*P)


def test_a_nucleus_that_reaches_top_p_exactly_is_complete():
    # ½ reaches 0.5: the next token is not needed
    assert truncate([0.25, 0.5, 0.25], top_p=0.5) == [0, 0.5, 0]
    assert truncate([0.25, 0.5, 0.125, 0.125], top_p=0.75) == [0.25, 0.5, 0, 0]


def test_top_p_is_a_share_of_the_mass_that_top_k_keeps():
    # top 3: 0.4, 0.3, 0.2 of 0.9, the mass before each 0, 0.4, 0.7; 0.75 · 0.9 = 0.675, 0.8 · 0.9 = 0.72
    assert truncate(P, top_k=3, top_p=0.75) == approx(0, 0.4, 0, 0.3)
    assert truncate(P, top_k=3, top_p=0.8) == approx(0, 0.4, 0.2, 0.3)


def test_a_top_p_of_1_keeps_a_token_below_float32_resolution():
    # 1 + 1e-9 is 1 in float32, so all of the mass comes before the second token
    assert truncate([1.0, 1e-9], top_p=1.0) == approx(1.0, 1e-9)


def test_each_row_is_truncated_by_itself():
    rows = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.2, 0.7]])
    close(truncate_probabilities(rows, 1, 1.0), torch.tensor([[0.7, 0.0, 0.0], [0.0, 0.0, 0.7]]))
    close(truncate_probabilities(rows, 0, 0.8), torch.tensor([[0.7, 0.2, 0.0], [0.0, 0.2, 0.7]]))


LOGITS = torch.tensor([[4.0, 3.0, 2.0, 1.0]]).log()
"""Probabilities 0.4, 0.3, 0.2, 0.1."""


@pytest.mark.parametrize(
    ("top_k", "top_p", "expected"),
    [
        (0, 1.0, [0.4, 0.3, 0.2, 0.1]),
        (2, 1.0, [4 / 7, 3 / 7, 0, 0]),
        (0, 0.75, [4 / 9, 3 / 9, 2 / 9, 0]),
        (3, 0.75, [4 / 7, 3 / 7, 0, 0]),  # of the share 4/9, 3/9, 2/9 that top_k keeps, two tokens have 7/9 ≥ 0.75
    ],
)
def test_truncated_logits_are_those_of_the_distribution_that_is_sampled(top_k, top_p, expected):
    settings = make_sampling_settings(top_k=top_k, top_p=top_p)
    assert truncate_logits(LOGITS, settings).softmax(-1)[0].tolist() == pytest.approx(expected, abs=1e-6)
    uniforms = (torch.arange(1000) + 0.5) / 1000
    tokens, _ = sample_tokens(LOGITS.expand(1000, -1), uniforms, settings)
    shares = tokens.bincount(minlength=4) / 1000
    assert shares.tolist() == pytest.approx(expected, abs=2e-3)


def test_ties_at_the_edge_of_top_k_stay_in_both():
    settings = make_sampling_settings(top_k=2)
    logits = torch.tensor([[1.0, 2.0, 1.0, 0.0]])
    assert truncate_logits(logits, settings).isfinite().tolist() == [[True, True, True, False]]
    tokens, _ = sample_tokens(logits.expand(3, -1), torch.tensor([0.1, 0.5, 1.0]), settings)
    assert tokens.tolist() == [0, 1, 2]


def test_whole_logits_are_not_copied():
    assert truncate_logits(LOGITS, make_sampling_settings()) is LOGITS
