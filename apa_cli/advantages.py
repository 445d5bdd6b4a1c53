"""Score moments, token rewards and advantage estimators: pure functions of tensors."""

from __future__ import annotations

from typing import TYPE_CHECKING

from apa_cli.tensor_ops import drop_rounding, is_rounding, masked_variance

if TYPE_CHECKING:
    from torch import Tensor

Moments = tuple[float, float, float]
"""Count, mean and sum of squared deviations of a set of scores."""


def update_moments(moments: Moments, scores: Tensor) -> Moments:
    """Return the moments of all scores so far, this batch [N] included.

    Two sets are merged by the parallel formula of Chan, Golub and LeVeque (1979), in float64.
    """
    count, mean, squares = moments
    batch = scores.double()
    n, batch_mean = len(batch), float(batch.mean())
    batch_squares = float(((batch - batch_mean) ** 2).sum())
    total, difference = count + n, batch_mean - mean
    return (
        total,
        mean + difference * n / total,
        squares + batch_squares + difference**2 * count * n / total,
    )


def place_scores_at_end(scores: Tensor, mask: Tensor) -> Tensor:
    """Return token rewards: each response's score at its last true token, 0 elsewhere. [N], [N, T] → [N, T].

    A response without a true token gets no reward.
    """
    last = mask & (mask.long().flip(-1).cumsum(-1).flip(-1) == 1)
    return last * scores.unsqueeze(-1)


def gae(token_rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, gae_lambda: float) -> tuple[Tensor, Tensor]:
    """Return generalized advantage estimates and returns (1506.02438, equations 11 to 16).

        δ_t = r_t + γ V_{t+1} − V_t,   A_t = δ_t + γ·gae_lambda·A_{t+1},   G_t = A_t + V_t

    V after the last true token is 0, however the response ended: the length limit is part of the task.

    token_rewards and values [N, T] float32; mask [N, T] bool with the true tokens of a row contiguous; γ and
    gae_lambda in [0, 1] → advantages, returns [N, T], 0 outside the mask.
    """
    zero = values.new_zeros(())
    rewards, values = token_rewards.where(mask, zero), values.where(mask, zero)
    advantages = values.new_zeros(values.shape)
    next_value = next_advantage = values.new_zeros(values.shape[0])
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        next_advantage = (delta + gamma * gae_lambda * next_advantage).where(mask[:, t], zero)
        next_value = values[:, t]
        advantages[:, t] = next_advantage
    return advantages, (advantages + values).where(mask, zero)


def sum_rewards_to_go(token_rewards: Tensor, mask: Tensor, gamma: float) -> Tensor:
    """Return the Monte-Carlo returns Σ_{k ≥ t} γ^(k−t) r_k, without any value. [N, T] → [N, T], 0 outside the mask."""
    return gae(token_rewards, token_rewards.new_zeros(token_rewards.shape), mask, gamma, 1.0)[1]


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> float | None:
    """Return 1 − Var(R − V) / Var(R) over true tokens, at most 1; None if R does not differ beyond rounding.

    R are the Monte-Carlo returns [N, T], see `sum_rewards_to_go`: λ-returns contain V, so that a critic of pure noise
    would seem to explain them. Computed in float64.
    """
    wide, zero = returns.double(), returns.new_zeros((), dtype=values.double().dtype)
    spread = float(masked_variance(wide, mask))
    if is_rounding(spread**0.5, float(wide.where(mask, zero).abs().max())):
        return None
    return 1 - float(masked_variance(wide - values.double(), mask)) / spread


def group_mean(token_rewards: Tensor, groups: Tensor, mask: Tensor) -> Tensor:
    """Return each response's total reward minus the mean of the other responses to its prompt, on every true token.

    The leave-one-out baseline of RLOO (2402.14740). Without a KL penalty in the token rewards the total is the score.
    token_rewards [N, T], groups [N] int64 (the prompt of each response), mask [N, T] → [N, T], 0 outside the mask.
    Raise ValueError if a prompt has only one response.
    """
    totals = token_rewards.where(mask, token_rewards.new_zeros(())).double().sum(-1)
    return spread_over_tokens(subtract_mean_of_others(totals, groups).to(token_rewards.dtype), mask)


def spread_over_tokens(values: Tensor, mask: Tensor) -> Tensor:
    """Return each row's value on every true token, 0 elsewhere. values [N], mask [N, T] → [N, T]."""
    return values.unsqueeze(-1) * mask


def match_prompts(groups: Tensor) -> Tensor:
    """Return 1 for each pair of responses to the same prompt, else 0. groups [N] int64 → [N, N] float64.

    Sums of a group's scores, as products with this matrix, are in float64: of equal float32 scores they are exact, so
    that equal scores differ from their mean by exactly 0. Raise ValueError if a prompt has only one response.
    """
    same_prompt = (groups.unsqueeze(0) == groups.unsqueeze(1)).double()
    if bool((same_prompt.sum(-1) < 2).any()):
        raise ValueError("samples_per_prompt: at least two responses to every prompt are needed; raise it")
    return same_prompt


def subtract_mean_of_others(rewards: Tensor, groups: Tensor) -> Tensor:
    """Return each response's reward minus the mean of the other responses to its prompt (RLOO, 2402.14740).

    rewards [N], groups [N] → [N] float64, exactly 0 for a difference that may be rounding alone. Raise ValueError if a
    prompt has only one response.
    """
    same_prompt, rewards = match_prompts(groups), rewards.double()
    return drop_rounding(rewards - (same_prompt @ rewards - rewards) / (same_prompt.sum(-1) - 1), rewards)


def center_in_groups(scores: Tensor, groups: Tensor) -> tuple[Tensor, Tensor]:
    """Return each score minus the mean of all responses to its prompt, and their standard deviation (n − 1).

    scores [N], groups [N] → two of [N] float64; differences and deviations that may be rounding alone are exactly 0.
    Raise ValueError if a prompt has only one response.
    """
    same_prompt, scores = match_prompts(groups), scores.double()
    count = same_prompt.sum(-1)
    mean = same_prompt @ scores / count
    deviation = (same_prompt @ (scores - mean) ** 2 / (count - 1)).sqrt()
    return drop_rounding(scores - mean, mean), drop_rounding(deviation, mean)
