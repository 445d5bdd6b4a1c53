"""Throw-away algorithms and plans on the public contract: the hardest of the later ones, in short."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Annotated

import numpy as np
import torch
from torch import Tensor

from apa_cli.advantages import place_scores_at_end
from apa_cli.algorithms.apa import APA
from apa_cli.algorithms.base import CRITIC, POLICY_MASK, ROW_MASK, WHITENING_MASK, Algorithm
from apa_cli.algorithms.dpo import DPO, REJECTED
from apa_cli.algorithms.plans import Plan
from apa_cli.algorithms.ppo import PPO
from apa_cli.pool import Pool
from apa_cli.tensor_ops import masked_row_sum
from apa_cli.types import (
    DATA,
    GUIDE,
    POLICY,
    RESPONSE,
    AtLeastOne,
    Batch,
    Critic,
    Encode,
    Example,
    Loss,
    LossTerm,
    Needs,
    NonNegative,
    PolicyOutput,
    Prefix,
    Rollout,
    RolloutPlan,
    Sequences,
    State,
    UnitInterval,
    critic_mask,
    require,
)

# --- plans --------------------------------------------------------------------------------------------------

GUIDE_CRITIC = "guide_critic"
"""Critic of the responses that the guide completes; "value" is that of the policy's."""


@dataclass(frozen=True)
class Alternating(Plan):
    """LOLS in a fixed order: the guide rolls in and the policy out, then the policy in and the guide out, then both."""

    name = "alternating"

    rollin_probability: Annotated[float, UnitInterval]

    def needs(self, needs: Needs) -> Needs:
        passes = {**needs.passes, RESPONSE: (*needs.passes[RESPONSE], GUIDE_CRITIC)}
        samplers, critics = (*needs.samplers, GUIDE), (*needs.critics, Critic(GUIDE_CRITIC))
        return replace(needs, samplers=samplers, critics=critics, passes=passes)

    def rollout(self, step: int, rng: np.random.Generator, state: State) -> tuple[RolloutPlan, ...]:
        prefix = Prefix("uniform", self.rollin_probability)
        plans = RolloutPlan(GUIDE, prefix, POLICY), RolloutPlan(POLICY, prefix, GUIDE, critic=GUIDE_CRITIC)
        return plans if step % 3 == 0 else (plans[(step + 1) % 2],)

    def masks(self, rollout: Rollout) -> Mapping[str, Tensor]:
        others = rollout.mask & ~rollout.on_policy
        return {
            POLICY_MASK: rollout.on_policy,
            critic_mask(CRITIC): rollout.on_policy,
            critic_mask(GUIDE_CRITIC): others,
        }


@dataclass(frozen=True)
class Resets(Plan):
    """DR-PO (2404.08495): the policy completes a prefix of every logged response; the critic learns from both."""

    name = "resets"

    def needs(self, needs: Needs) -> Needs:
        return replace(needs, samplers=(*needs.samplers, DATA))

    def rollout(self, step: int, rng: np.random.Generator, state: State) -> tuple[RolloutPlan, ...]:
        return (RolloutPlan(DATA, Prefix("uniform", 1.0), POLICY),)

    def masks(self, rollout: Rollout) -> Mapping[str, Tensor]:
        return {POLICY_MASK: rollout.on_policy, critic_mask(CRITIC): rollout.mask, WHITENING_MASK: rollout.mask}


@dataclass(frozen=True)
class Offline(Plan):
    """The logged responses as they are."""

    name = "offline"

    def needs(self, needs: Needs) -> Needs:
        return replace(needs, samplers=(*needs.samplers, DATA))

    def rollout(self, step: int, rng: np.random.Generator, state: State) -> tuple[RolloutPlan, ...]:
        return (RolloutPlan(DATA),)

    def masks(self, rollout: Rollout) -> Mapping[str, Tensor]:
        return {POLICY_MASK: rollout.mask}


# --- online, under plans ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TwoCritics(PPO):
    """LOLS's algorithm; a microbatch without a token of a critic has no term for it, so that ranks may differ."""

    plans = ("alternating",)

    def critic_terms(self, batch: Batch, output: PolicyOutput) -> list[LossTerm]:
        return [term for term in super().critic_terms(batch, output) if bool(batch.masks[term.mask].any())]


@dataclass(frozen=True)
class ResetsPPO(PPO):
    """DR-PO's algorithm."""

    plans = ("resets",)


@dataclass(frozen=True)
class ReferenceText(PPO):
    """RLGF's PPO baseline: PPO with the negative log-likelihood of the data set's chosen response."""

    nll_coef: Annotated[float, NonNegative]

    def needs(self) -> Needs:
        return replace(super().needs(), texts=("chosen",))

    def prepare(self, rollout: Rollout, state: State) -> tuple[Batch, State]:
        batch, state = super().prepare(rollout, state)
        return batch.replace(masks={**batch.masks, "chosen": batch.related["chosen"].mask}), state

    def loss(self, batch: Batch, output: PolicyOutput) -> Loss:
        loss = super().loss(batch, output)
        return replace(
            loss, terms=[*loss.terms, LossTerm("nll", -output.related["chosen"].logprobs, "chosen", self.nll_coef)]
        )


@dataclass(frozen=True)
class Resized(APA):
    """APA on some of the responses, or on all of them and on repetitions, which count as relabelled."""

    row_counts: list[int]

    def initial_state(self) -> State:
        return {**super().initial_state(), "rounds": 0}

    def process_rollout(
        self, rollout: Rollout, state: State, rng: np.random.Generator, encode: Encode
    ) -> tuple[Rollout, State]:
        rounds = state["rounds"]
        count = self.row_counts[min(rounds, len(self.row_counts) - 1)]
        order = rng.permutation(len(rollout))[np.arange(count) % len(rollout)]
        rows = rollout.select_rows(torch.from_numpy(order))
        is_first = torch.arange(count).unsqueeze(1) < len(rollout)
        return rows.replace(on_policy=rows.on_policy & is_first), {**state, "rounds": rounds + 1}


# --- offline ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class OfflineAPA(APA):
    """APA on logged responses."""

    plans = ("offline",)


@dataclass(frozen=True)
class OfflineDPO(DPO):
    """DPO on logged pairs; a row without the worse response gives no term."""

    plans = ("offline",)

    def needs(self) -> Needs:
        return Needs(texts=(REJECTED,), passes={RESPONSE: self.passes, REJECTED: self.passes})


@dataclass(frozen=True)
class ILQL(Algorithm):
    """ILQL (2206.11871): two action critics with Polyak copies and a state critic on the trunk, decoding by Q."""

    plans = ("offline", "online")

    expectile: Annotated[float, UnitInterval]
    gamma: Annotated[float, UnitInterval]
    cql_coef: Annotated[float, NonNegative]
    polyak: Annotated[float, UnitInterval]
    polyak_every: Annotated[int, AtLeastOne]
    beta: Annotated[float, NonNegative]
    top_k: Annotated[int, NonNegative]

    def needs(self) -> Needs:
        copied = {"polyak": self.polyak, "polyak_every": self.polyak_every}
        q = [Critic(name, kind="action", on="trunk", head="mlp", **copied) for name in ("q1", "q2")]
        return Needs(critics=(*q, Critic("v", on="trunk", head="mlp")))

    def prepare(self, rollout: Rollout, state: State) -> tuple[Batch, State]:
        rewards = place_scores_at_end(require(rollout.scores, "scores"), rollout.mask)
        return Batch.from_rollout(rollout, extra={"rewards": rewards}), state

    def loss(self, batch: Batch, output: PolicyOutput) -> Loss:
        values, v = output.values, output.values["v"]
        next_v = torch.nn.functional.pad(v.detach()[:, 1:], (0, 1))
        target = batch.extra["rewards"] + self.gamma * next_v
        error = values["q1/target"].minimum(values["q2/target"]) - v
        terms = [
            LossTerm("lm", -output.logprobs, POLICY_MASK, 1.0),
            LossTerm("v", (self.expectile - (error < 0).float()).abs() * error**2, POLICY_MASK, 1.0),
        ]
        for name in ("q1", "q2"):
            terms += [
                LossTerm(name, (values[name] - target) ** 2, POLICY_MASK, 1.0),
                LossTerm(f"cql_{name}", output.logsumexp[name] - values[name], POLICY_MASK, self.cql_coef),
            ]
        return Loss(terms)

    def adjust_logits(self, logits: Tensor, critic_outputs: Mapping[str, Tensor]) -> Tensor:
        q = critic_outputs["q1/target"].minimum(critic_outputs["q2/target"])
        adjusted = logits.log_softmax(-1) + self.beta * q
        if not self.top_k:
            return adjusted
        least = adjusted.topk(self.top_k, dim=-1).values[:, -1:]
        return adjusted.masked_fill(adjusted < least, -float("inf"))


# --- relabelling --------------------------------------------------------------------------------------------

RIGHT, WRONG = "Write vowels. ", "Do not write any vowels, please. "
"""Instructions, of different lengths."""
OTHER = "other_instruction/{}"
"""Names of the related sequences: the row's response under another instruction, or another prompt."""


def instruct(example: Example, instruction: str) -> Example:
    """Return the example with the instruction before its prompt, in a chat before the user's last turn."""
    if example.messages is None:
        return replace(example, prompt=instruction + example.prompt)
    *turns, last = example.messages
    return replace(example, messages=[*turns, {**last, "content": instruction + last["content"]}])


def list_tokens(sequences: Sequences, row: int) -> list[int]:
    """Return the tokens of a row's response."""
    return sequences.response_ids[row][sequences.mask[row]].tolist()


@dataclass(frozen=True)
class Contrastive(Algorithm):
    """HIR's loss (2302.05206, n-way form) on the responses as sampled, with `contrast_count` other pairs per row."""

    contrast_count: Annotated[int, AtLeastOne]
    smoothing: Annotated[float, UnitInterval]
    entropy_coef: Annotated[float, NonNegative]

    def needs(self) -> Needs:
        return Needs(entropy=True, mean_logprob=True)

    def instruct(self, example: Example, step: int | None) -> Example:
        return instruct(example, RIGHT)

    def process_rollout(
        self, rollout: Rollout, state: State, rng: np.random.Generator, encode: Encode
    ) -> tuple[Rollout, State]:
        examples = [encode.examples[row] for row in rollout.example_index.tolist()]
        return self.add_others(rollout, examples, [WRONG] * len(rollout), encode), state

    def add_others(self, rollout: Rollout, examples: list[Example], others: list[str], encode: Encode) -> Rollout:
        """Return the rows with related sequences: the other instruction to the row's prompt, then to other prompts.

        Every second one has half of the response only, so that widths differ.
        """
        count, related = len(rollout), {}
        for k in range(self.contrast_count):
            prompts = [instruct(examples[(i + k) % count], others[i]) for i in range(count)]
            responses = [list_tokens(rollout, i) for i in range(count)]
            cut = [tokens if k % 2 == 0 else tokens[: (len(tokens) + 1) // 2] for tokens in responses]
            related[OTHER.format(k)] = encode(prompts, cut)
        return rollout.replace(related=related)

    def prepare(self, rollout: Rollout, state: State) -> tuple[Batch, State]:
        others = {name: part.mask for name, part in rollout.related.items()}
        masks = {**rollout.masks, **others, ROW_MASK: rollout.mask.any(-1)}
        return Batch.from_rollout(rollout, masks=masks), state

    def loss(self, batch: Batch, output: PolicyOutput) -> Loss:
        right = masked_row_sum(output.logprobs, batch.masks[POLICY_MASK])
        parts = [output.related[name] for name in batch.related]
        sums = torch.stack([right, *(part.logprobs.sum(-1) for part in parts)], dim=1)
        smoothed = (1 - self.smoothing) * output.logprobs + self.smoothing * require(output.mean_logprob, "mean")
        terms = [
            LossTerm("nll", -smoothed, POLICY_MASK, 1.0),
            LossTerm("contrast", -sums.log_softmax(dim=1)[:, 0], ROW_MASK, 1.0),
            LossTerm("entropy", -require(output.entropy, "entropy"), POLICY_MASK, self.entropy_coef),
        ]
        return Loss([*terms, *(LossTerm(f"other_{k}", part.logprobs, OTHER.format(k), 0.01)
                               for k, part in enumerate(parts))])  # fmt: skip


@dataclass(frozen=True)
class Hindsight(Contrastive):
    """HIR: responses go into a growing pool; rows drawn from it are relabelled by what they achieved."""

    rows: Annotated[int, AtLeastOne]

    def initial_state(self) -> State:
        return {"hindsight": {"pool": Pool(), "rounds": 0, "score_sum": torch.zeros(1, dtype=torch.float64)}}

    def process_rollout(
        self, rollout: Rollout, state: State, rng: np.random.Generator, encode: Encode
    ) -> tuple[Rollout, State]:
        pool, rounds, total = (state["hindsight"][name] for name in ("pool", "rounds", "score_sum"))
        scores = require(rollout.scores, "scores")
        pool.append(
            {
                "example": asdict(encode.examples[int(rollout.example_index[i])]),
                "tokens": list_tokens(rollout, i),
                "score": float(scores[i]),
                "response": rollout.responses[i],
            }
            for i in range(len(rollout))
        )
        total = total + scores.double().sum()
        drawn = pool.rows(rng.integers(0, pool.length, self.rows).tolist())
        rows = self.relabel(drawn, float(total) / pool.length, rollout.plans, rng, encode)
        return rows, {"hindsight": {"pool": pool, "rounds": rounds + 1, "score_sum": total}}

    def relabel(
        self, drawn: list[dict], mean: float, plans: tuple[RolloutPlan, ...], rng: np.random.Generator, encode: Encode
    ) -> Rollout:
        """Return rows of the pool under the instruction that they fulfil; a random prefix does not train."""
        examples = [Example(**row["example"]) for row in drawn]
        labels = [(RIGHT, WRONG) if row["score"] >= mean else (WRONG, RIGHT) for row in drawn]
        prompts = [instruct(example, right) for example, (right, _) in zip(examples, labels, strict=True)]
        sequences = encode(prompts, [row["tokens"] for row in drawn])
        cuts = torch.tensor([int(rng.integers(0, len(row["tokens"]))) for row in drawn]).unsqueeze(1)
        rows = Rollout(
            **vars(sequences),
            prompts=[example.prompt for example in examples],
            responses=[row["response"] for row in drawn],
            endings=["length"] * len(drawn),
            groups=torch.arange(len(drawn)),
            columns=[example.columns for example in examples],
            example_index=torch.zeros(len(drawn), dtype=torch.int64),
            plans=plans,
            plan_index=torch.zeros(len(drawn), dtype=torch.int64),
            masks={POLICY_MASK: sequences.mask & (torch.arange(sequences.mask.shape[1]) >= cuts)},
        )
        return self.add_others(rows, examples, [wrong for _, wrong in labels], encode)
