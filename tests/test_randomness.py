"""Counter-based draws: keyed by what they are for, and by nothing else."""

import numpy as np
import pytest

from apa_cli.randomness import Stream, generator, permutation, torch_seed, uniforms

PLACES = [(0, 0), (0, 1), (5, 0), (63, 3)]


def draws(seed=3, stream=Stream.rollout, iteration=7, place=5, sample=2, length=6):
    return uniforms(seed, stream, iteration, [(place, sample)], length)[0]


def test_streams_keep_their_numbers():
    assert {stream.name: stream.value for stream in Stream} == {
        "rollout": 1,
        "roll_in": 2,
        "evaluation": 3,
        "best_of_n": 4,
        "data_order": 5,
        "minibatch_order": 6,
        "initialization": 7,
        "plan": 8,
        "roll_in_cut": 9,
        "held_out": 10,
    }


def test_the_same_key_gives_the_same_numbers():
    np.testing.assert_array_equal(draws(), draws())


def test_the_numbers_of_a_key_are_pinned():
    # 1 − x · 2⁻⁵³ for the top 53 bits x of Philox 4x64-10's words, from its definition (Salmon et al., 2011)
    # with key (seed 3, stream 1) and counter (1, iteration 7, place 5, sample 2)
    expected = [0.2939739161601673, 0.6820139657928308, 0.023318809131010587, 0.11181830339248233]
    np.testing.assert_allclose(draws(length=4), expected, rtol=1e-15)


@pytest.mark.parametrize(
    "change", [{"seed": 4}, {"stream": Stream.evaluation}, {"iteration": 8}, {"place": 6}, {"sample": 3}]
)
def test_a_change_of_any_part_of_the_key_changes_every_number(change):
    assert not set(draws(length=1000)) & set(draws(length=1000, **change))


def test_parts_of_the_key_do_not_stand_in_for_one_another():
    rows = [draws(iteration=1, place=2, sample=3), draws(iteration=2, place=1, sample=3)]
    rows += [draws(iteration=3, place=2, sample=1), draws(iteration=1, place=3, sample=2)]
    assert len({row[0] for row in rows}) == 4
    assert draws(seed=1, stream=Stream.roll_in)[0] != draws(seed=2, stream=Stream.rollout)[0]


def test_a_shorter_draw_is_the_start_of_a_longer_one():
    np.testing.assert_array_equal(draws(length=5), draws(length=10)[:5])


def test_a_response_draws_the_same_numbers_whatever_else_is_in_the_batch():
    together = uniforms(3, Stream.rollout, 7, PLACES, 4)
    backwards = uniforms(3, Stream.rollout, 7, PLACES[::-1], 4)
    np.testing.assert_array_equal(backwards[::-1], together)
    for row, place in zip(together, PLACES, strict=True):
        np.testing.assert_array_equal(uniforms(3, Stream.rollout, 7, [place], 4)[0], row)


def test_no_response_repeats_a_number_of_another():
    numbers = uniforms(0, Stream.rollout, 1, [(place, sample) for place in range(20) for sample in range(5)], 100)
    assert len(np.unique(numbers)) == numbers.size


def test_numbers_are_uniform_above_0_and_up_to_1():
    numbers = uniforms(0, Stream.rollout, 1, [(place, 0) for place in range(100)], 1000)
    assert numbers.dtype == np.float64
    assert numbers.min() > 0 and numbers.max() <= 1
    # 100,000 numbers: the mean has a standard error of 0.0009, a tenth's share one of 0.0009
    assert numbers.mean() == pytest.approx(0.5, abs=0.004)
    shares = np.histogram(numbers, bins=10, range=(0, 1))[0] / numbers.size
    np.testing.assert_allclose(shares, 0.1, atol=0.004)


def test_zero_cannot_occur_for_numbers_are_one_minus_what_numpy_draws_from_0_included_to_1():
    drawn = generator(3, Stream.rollout, 7, 5, 2).random(6)
    np.testing.assert_array_equal(draws(), 1 - drawn)


def test_no_responses_give_no_rows():
    assert uniforms(0, Stream.rollout, 1, [], 4).shape == (0, 4)


def test_places_left_out_are_zero_and_a_fourth_is_refused():
    assert generator(1, Stream.plan, 4).random() == generator(1, Stream.plan, 4, 0, 0).random()
    with pytest.raises(ValueError, match="three coordinates, got 4"):
        generator(1, Stream.plan, 1, 2, 3, 4)


def test_an_order_holds_each_thing_once_and_is_keyed():
    order = permutation(100, 0, Stream.data_order, 1)
    assert sorted(order) == list(range(100))
    np.testing.assert_array_equal(order, permutation(100, 0, Stream.data_order, 1))
    for other in (
        permutation(100, 0, Stream.data_order, 2),
        permutation(100, 1, Stream.data_order, 1),
        permutation(100, 0, Stream.minibatch_order, 1),
    ):
        assert (order != other).sum() > 80


def test_nothing_depends_on_or_moves_numpys_global_generator():
    np.random.seed(0)
    first = draws()
    left = np.random.random()
    np.random.seed(0)
    assert np.random.random() == left
    np.testing.assert_array_equal(draws(), first)


def test_seeds_for_torch_are_keyed_and_within_its_range():
    seeds = {torch_seed(seed, Stream.initialization, number) for seed in range(20) for number in range(5)}
    assert len(seeds) == 100
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert torch_seed(0, Stream.initialization, 1) == torch_seed(0, Stream.initialization, 1)
