"""FLOPs and bytes by hand: two sequences, prompts of 2 and 3 tokens, responses of 3 and 1."""

import pytest

from apa_cli.hardware.roofline import (
    ModelCost,
    Work,
    count_attention_pairs,
    count_backward_flops,
    count_forward_flops,
    count_input_positions,
    estimate_forward_work,
    estimate_sampling_work,
    estimate_update_work,
)

COST = ModelCost(
    linear=10,
    linear_backward=21,
    attention=4,
    attention_backward=7,
    head=100,
    head_backward=203,
    weights=55,
    kv_cache_numbers=6,
)
PROMPTS, RESPONSES = [2, 3], [3, 1]


def test_the_last_response_token_is_not_an_input():
    assert count_input_positions(PROMPTS, RESPONSES) == [4, 3]


def test_a_position_attends_to_itself_and_those_before_it():
    assert count_attention_pairs([4, 3]) == (1 + 2 + 3 + 4) + (1 + 2 + 3)


def test_forward_counts_positions_pairs_and_response_tokens():
    # 7 positions · 10 + 16 pairs · 4 + 4 response tokens · 100
    assert count_forward_flops(COST, [4, 3], 4) == 534
    assert count_forward_flops(COST, [4, 3], 0) == 134


def test_backward_counts_the_trunk_again_if_activations_are_recomputed():
    # 7 · 21 + 16 · 7 + 4 · 203 = 147 + 112 + 812; recomputed: 70 + 64 of the trunk more, nothing of the head
    assert count_backward_flops(COST, [4, 3], 4, recomputed=False) == 1071
    assert count_backward_flops(COST, [4, 3], 4, recomputed=True) == 1071 + 134


@pytest.mark.parametrize(("rows", "passes"), [(1, 2), (2, 1), (8, 1)])
def test_a_forward_pass_reads_the_weights_once_per_microbatch(rows, passes):
    assert estimate_forward_work(COST, [4, 3], 4, rows, itemsize=2) == Work(7, 534, passes * 55 * 2)


def test_sampling_reads_the_weights_at_every_step_and_the_cache_as_it_grows():
    # Side by side: 3 steps, as many as the longest response has tokens. The first sequence's second token reads 3
    # cached positions, its third 4; the second sequence reads none. 7 positions are written: (3 · 55 + (7 + 7) · 6)
    # numbers of 2 bytes.
    assert estimate_sampling_work(COST, PROMPTS, RESPONSES, rows=2, itemsize=2) == Work(4, 534, 498)
    # One after the other: 4 steps.
    assert estimate_sampling_work(COST, PROMPTS, RESPONSES, rows=1, itemsize=2) == Work(4, 534, 498 + 55 * 2)


def test_an_update_reads_the_weights_twice_per_pass_and_steps_the_optimizer():
    # 2 epochs · (534 + 1071) FLOPs. 4 passes read 55 weights twice at 2 bytes: 880. Gradients of 11 trained parameters:
    # 4 writes, and 2 reads as the first pass of each of 2 steps only writes; AdamW: 2 · 7 transfers. In all
    # (6 + 14) · 11 · 4 bytes = 880.
    work = estimate_update_work(COST, 11, PROMPTS, RESPONSES, epochs=2, steps=2, passes=4, itemsize=2, recomputed=False)
    assert work == Work(14, 3210, 1760)
    recomputed = estimate_update_work(
        COST, 11, PROMPTS, RESPONSES, epochs=2, steps=2, passes=4, itemsize=2, recomputed=True
    )
    assert recomputed == Work(14, 3210 + 2 * 134, 1760)


def test_the_lower_bound_is_the_longer_of_computing_and_moving():
    assert Work(1, 600, 100).min_seconds(matrix_rate=200.0, copy_rate=100.0) == 3.0
    assert Work(1, 600, 500).min_seconds(matrix_rate=200.0, copy_rate=100.0) == 5.0


def test_costs_add_up():
    assert ModelCost(20, 42, 8, 14, 200, 406, 110, 12) == COST + COST
