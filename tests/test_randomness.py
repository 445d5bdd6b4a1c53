"""Counter-based random numbers: they depend on their key and on nothing else."""

import numpy as np
import pytest

from apa_cli.randomness import Stream, derive_torch_seed, make_generator, sample_permutation, sample_uniforms

PLACES = [(0, 0), (0, 1), (5, 0), (63, 3)]


def sample_row(seed=3, stream=Stream.rollout, iteration=7, place=5, sample=2, length=6):
    return sample_uniforms(seed, stream, iteration, [(place, sample)], length)[0]


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
        "once_per_prompt": 11,
        "process_rollout": 12,
    }


def test_the_same_key_gives_the_same_numbers():
    np.testing.assert_array_equal(sample_row(), sample_row())


def test_the_numbers_of_a_key_are_pinned():
    # 1 − x · 2⁻⁵³ for the top 53 bits x of Philox 4x64-10's words, from its definition (Salmon et al., 2011)
    # with key (seed 3, stream 1) and counter (1, iteration 7, place 5, sample 2)
    expected = [0.2939739161601673, 0.6820139657928308, 0.023318809131010587, 0.11181830339248233]
    np.testing.assert_allclose(sample_row(length=4), expected, rtol=1e-15)


@pytest.mark.parametrize(
    "change", [{"seed": 4}, {"stream": Stream.evaluation}, {"iteration": 8}, {"place": 6}, {"sample": 3}]
)
def test_a_change_in_any_part_of_the_key_changes_every_number(change):
    assert not set(sample_row(length=1000)) & set(sample_row(length=1000, **change))


def test_parts_of_the_key_are_not_interchangeable():
    rows = [sample_row(iteration=1, place=2, sample=3), sample_row(iteration=2, place=1, sample=3)]
    rows += [sample_row(iteration=3, place=2, sample=1), sample_row(iteration=1, place=3, sample=2)]
    assert len({row[0] for row in rows}) == 4
    assert sample_row(seed=1, stream=Stream.roll_in)[0] != sample_row(seed=2, stream=Stream.rollout)[0]


def test_a_shorter_sample_is_the_start_of_a_longer_one():
    np.testing.assert_array_equal(sample_row(length=5), sample_row(length=10)[:5])


def test_a_responses_numbers_do_not_depend_on_the_rest_of_the_batch():
    together = sample_uniforms(3, Stream.rollout, 7, PLACES, 4)
    backwards = sample_uniforms(3, Stream.rollout, 7, PLACES[::-1], 4)
    np.testing.assert_array_equal(backwards[::-1], together)
    for row, place in zip(together, PLACES, strict=True):
        np.testing.assert_array_equal(sample_uniforms(3, Stream.rollout, 7, [place], 4)[0], row)


def test_no_two_responses_share_a_number():
    numbers = sample_uniforms(
        0, Stream.rollout, 1, [(place, sample) for place in range(20) for sample in range(5)], 100
    )
    assert len(np.unique(numbers)) == numbers.size


def test_numbers_are_uniform_in_0_excluded_to_1_included():
    numbers = sample_uniforms(0, Stream.rollout, 1, [(place, 0) for place in range(100)], 1000)
    assert numbers.dtype == np.float64
    assert numbers.min() > 0 and numbers.max() <= 1
    # 100,000 numbers: the mean has a standard error of 0.0009, a tenth's share one of 0.0009
    assert numbers.mean() == pytest.approx(0.5, abs=0.004)
    shares = np.histogram(numbers, bins=10, range=(0, 1))[0] / numbers.size
    np.testing.assert_allclose(shares, 0.1, atol=0.004)


def test_numbers_are_one_minus_numpys_so_that_0_cannot_occur():
    numbers = make_generator(3, Stream.rollout, 7, 5, 2).random(6)
    np.testing.assert_array_equal(sample_row(), 1 - numbers)


def test_no_responses_give_no_rows():
    assert sample_uniforms(0, Stream.rollout, 1, [], 4).shape == (0, 4)


def test_missing_coordinates_are_0_and_a_fourth_is_refused():
    assert make_generator(1, Stream.plan, 4).random() == make_generator(1, Stream.plan, 4, 0, 0).random()
    with pytest.raises(ValueError, match="three coordinates are allowed, got 4"):
        make_generator(1, Stream.plan, 1, 2, 3, 4)


def test_a_permutation_holds_each_index_once_and_is_keyed():
    order = sample_permutation(100, 0, Stream.data_order, 1)
    assert sorted(order) == list(range(100))
    np.testing.assert_array_equal(order, sample_permutation(100, 0, Stream.data_order, 1))
    for other in (
        sample_permutation(100, 0, Stream.data_order, 2),
        sample_permutation(100, 1, Stream.data_order, 1),
        sample_permutation(100, 0, Stream.minibatch_order, 1),
    ):
        assert (order != other).sum() > 80


def test_numpys_global_generator_is_neither_used_nor_changed():
    np.random.seed(0)
    first = sample_row()
    global_number = np.random.random()
    np.random.seed(0)
    assert np.random.random() == global_number
    np.testing.assert_array_equal(sample_row(), first)


def test_torch_seeds_are_keyed_and_in_range():
    seeds = {derive_torch_seed(seed, Stream.initialization, number) for seed in range(20) for number in range(5)}
    assert len(seeds) == 100
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert derive_torch_seed(0, Stream.initialization, 1) == derive_torch_seed(0, Stream.initialization, 1)
