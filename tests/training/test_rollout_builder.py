"""The rollout of an iteration under several plans: prompts, scores, token scores, related texts, and several ranks."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import pytest
import torch
from torch import Tensor

from apa_cli.algorithms.apa import APA
from apa_cli.algorithms.plans import Online
from apa_cli.datasets.base import Dataset
from apa_cli.errors import UserError
from apa_cli.rewards.base import Scores
from apa_cli.rollout.samplers import ModelSampler
from apa_cli.training.forward_passes import ForwardPasses
from apa_cli.training.responses_per_prompt import ResponsesPerPrompt
from apa_cli.training.rollout_builder import RolloutBuilder, average_equal_responses
from apa_cli.training.trainer import Trainer
from apa_cli.types import Example, Prefix, Rollout, RolloutPlan, Sequences
from tests.builders import make_mask, make_rollout


@dataclass(frozen=True)
class Listed(Online):
    """Plan with these rollout plans and samplers; the rows of an iteration may be given."""

    listed: tuple[RolloutPlan, ...]
    samplers: tuple[str, ...] = ()
    rows_of: Mapping[int, list[int]] = field(default_factory=dict)

    def needs(self, needs):
        return replace(needs, samplers=self.samplers)

    def rows(self, step, size, count, seed):
        return self.rows_of.get(step) or super().rows(step, size, count, seed)

    def rollout(self, step, rng, state):
        return self.listed


@dataclass(frozen=True)
class Logged(Dataset):
    """Twelve prompts with logged responses, of which those of even rows have the score row / 4, and further texts."""

    stop_strings: list[str]

    def load(self, split):
        if split == "test":
            return [Example(f"Held out {i}:", None, None, {}) for i in range(6)]
        return [
            Example(
                f"Prompt {i}:", " chosen", None if i % 3 else " no", {"row": i, "hint": f" hint {i}" if i else ""},
                response=" a b c d e"[: 2 + 2 * (i % 5)], score=None if i % 2 else i / 4,
            )
            for i in range(12)
        ]  # fmt: skip


LOGGED = Logged([])
SMALL = ["rollout_batch_size=4", "minibatch_size=4", "microbatch_size=2"]
INIT_TWICE = RolloutPlan("init", samples=2, once_per_prompt=True)


def score_row(prompts, responses, columns) -> Scores:
    """Return 100 plus the length of the text."""
    return Scores([100.0 + len(text) for text in responses], {"half": [50.0] * len(responses)})


def list_responses(rollout: Sequences) -> list[list[int]]:
    """Return the token ids of each response."""
    return [ids[mask].tolist() for ids, mask in zip(rollout.response_ids, rollout.mask, strict=True)]


def build_whole(builder: RolloutBuilder, iteration: int, score=score_row) -> tuple[Rollout, Rollout]:
    """Return the responses as sampled and scored, and the rollout that `complete` makes of them."""
    shard, _ = builder.sample(iteration, {})
    sampled, _ = builder.gather(shard, builder.score(shard.rollout, score))
    return sampled, builder.complete(iteration, sampled)


# Several plans


def test_plans_of_an_iteration_have_sample_numbers_of_their_own(make_trainer):
    """Before the first update π_init is the policy, so its samples 2, 3 and 4 are those of a plan of five samples."""
    plan = Listed((RolloutPlan(), RolloutPlan("init", samples=3)), ("init",))
    overrides = ["samples_per_prompt=2", "rollout_batch_size=8"]
    shard, truncated_rate = make_trainer(*overrides, plan=plan).rollout_builder.sample(2, {})
    rollout = shard.rollout
    assert rollout.plan_index.tolist() == [0] * 8 + [1] * 12 and rollout.plans == plan.listed
    assert rollout.groups.tolist() == [*(i // 2 for i in range(8)), *(i // 3 for i in range(12))]
    assert shard.positions.tolist() == list(range(20)) and (truncated_rate, rollout.iteration) == (0, 2)
    is_own = rollout.plan_index.unsqueeze(-1) == 0
    assert torch.equal(rollout.on_policy, rollout.mask & is_own)
    five = make_trainer("samples_per_prompt=5", "rollout_batch_size=20", "minibatch_size=20")
    whole, mixed = list_responses(five.rollout_builder.sample(2, {})[0].rollout), list_responses(rollout)
    for place in range(4):
        assert mixed[2 * place : 2 * place + 2] + mixed[8 + 3 * place : 11 + 3 * place] == whole[5 * place :][:5]
    assert len({tuple(response) for response in whole}) > 15  # they differ


def test_a_plan_without_samples_has_those_of_the_run(make_trainer):
    plan = Listed((RolloutPlan("init"), RolloutPlan(samples=1)), ("init",))
    rollout = make_trainer("samples_per_prompt=2", plan=plan).rollout_builder.sample(1, {})[0].rollout
    assert (
        rollout.plan_index.tolist() == [0] * 8 + [1] * 4
        and rollout.on_policy.any(-1).tolist() == [False] * 8 + [True] * 4
    )


def test_an_iteration_without_responses_is_one_line(make_trainer):
    plan = Listed((INIT_TWICE,), ("init",), {1: [3, 5, 3, 7], 2: [5, 7, 7, 3]})
    builder = make_trainer(*SMALL, plan=plan).rollout_builder
    build_whole(builder, 1)
    with pytest.raises(ValueError, match=r"^plan online: iteration 2 has no response to sample$"):
        builder.sample(2, {})


# Once per prompt


class CountedSampler(ModelSampler):
    """Sampler that records the rows of the data set for which it samples."""

    def draw(self, prompts, *arguments):
        self.__dict__.setdefault("rows", []).extend(prompt.example_index for prompt in prompts)
        return super().draw(prompts, *arguments)


ROWS = {1: [3, 5, 3, 7], 2: [5, 1, 1, 3], 3: [7, 5, 3, 1]}
"""Rows of each iteration: row 3 is twice in the first, row 1 in the second; the third has no new row."""


@pytest.fixture
def once(make_trainer) -> Trainer:
    """Trainer with two responses of π_init to each prompt, sampled once."""
    trainer = make_trainer(*SMALL, plan=Listed((RolloutPlan(), INIT_TWICE), ("init",), ROWS))
    samplers = trainer.rollout_builder.samplers
    samplers["init"] = CountedSampler(**vars(samplers["init"]))
    return trainer


def test_two_plans_that_keep_responses_of_one_sampler_are_refused(make_trainer):
    trainer = make_trainer(*SMALL, plan=Listed((RolloutPlan(), INIT_TWICE, INIT_TWICE), ("init",)))
    with pytest.raises(ValueError, match=r"two plans sample once per prompt from init$"):
        trainer.rollout_builder.sample(1, {})


def test_responses_are_sampled_once_per_prompt_and_added_whenever_it_comes_up(once):
    builder, scored = once.rollout_builder, []

    def score(prompts, responses, columns):
        scored.append(len(responses))
        return Scores([float(1000 * len(scored) + len(response)) for response in responses])

    by_row: dict[int, list] = {}
    for iteration, rows in ROWS.items():
        sampled, whole = build_whole(builder, iteration, score)
        assert sampled.plan_index.tolist()[:4] == [0] * 4 and len(whole) == 4 + 2 * 4
        assert whole.plan_index.tolist() == [0] * 4 + [1] * 8
        assert whole.groups.tolist() == [0, 1, 2, 3, 0, 0, 1, 1, 2, 2, 3, 3]
        assert whole.example_index.tolist() == [*rows, *(row for row in rows for _ in range(2))]
        assert torch.equal(whole.on_policy, whole.mask & (whole.plan_index == 0).unsqueeze(-1))
        responses, logprobs = list_responses(whole), whole.logprobs["sampler"]
        for i, row in zip(range(4, 12, 2), rows, strict=True):
            pair = [
                (responses[j], whole.scores[j].item(), logprobs[j][whole.mask[j]].tolist(), whole.endings[j])
                for j in (i, i + 1)
            ]
            assert by_row.setdefault(row, pair) == pair  # the same responses, log-probs and scores as the first time
            example = builder.examples[row]
            assert (whole.prompts[i], whole.columns[i]) == (example.prompt, example.columns)
            prompt_ids = whole.prompt_ids[i][whole.prompt_mask[i]]
            assert prompt_ids.tolist() == builder.prompt_format.tokenizer(whole.prompts[i])["input_ids"]
    # New rows: 3, 5 and 7 in the first iteration, 1 in the second, none in the third.
    assert builder.samplers["init"].rows == [3, 3, 5, 5, 7, 7, 1, 1]
    assert scored == [4 + 6, 4 + 2, 4]
    assert len({str(pair) for pair in by_row.values()}) == 4
    assert [pair[0][1] // 1000 for pair in by_row.values()] == [1, 1, 1, 2]


def test_equal_responses_to_a_prompt_get_their_mean_score():
    # Rows 0, 1 and 3 are "a" to the prompt of row 5: (1 + 2 + 6)/3; "a" to row 6 and "b" keep theirs.
    rollout = make_rollout(
        make_mask([1] * 5), scores=torch.tensor([1.0, 2.0, 4.0, 6.0, 0.5]), responses=["a", "a", "a", "a", "b"],
        example_index=torch.tensor([5, 5, 6, 5, 5]),
    )  # fmt: skip
    assert average_equal_responses(rollout).scores.tolist() == [3, 3, 4, 3, 0.5]
    assert rollout.scores.tolist() == [1, 2, 4, 6, 0.5]


def test_kept_responses_do_not_depend_on_when_the_prompt_first_comes_up(once):
    _, first = build_whole(once.rollout_builder, 1)
    expected = dict(zip(first.example_index.tolist()[4:], list_responses(first)[4:], strict=True))
    _, later = build_whole(replace(once.rollout_builder, kept=ResponsesPerPrompt()), 3)
    actual = dict(zip(later.example_index.tolist()[4:], list_responses(later)[4:], strict=True))
    assert {row: actual[row] for row in expected} == expected and actual.keys() == {7, 5, 3, 1}


def test_metrics_and_counts_are_of_the_responses_of_the_iteration(once):
    result = once.run_phases(1)
    assert len(result.sampled) == 10 and len(result.rollout) == 12 and once.progress.samples == 10
    assert result.metrics["reward/mean"] == pytest.approx(float(result.sampled.scores[:4].mean()), rel=1e-6)
    assert result.metrics["response/length"] == pytest.approx(float(result.sampled.mask[:4].sum(-1).float().mean()))
    assert once.progress.kept is once.rollout_builder.kept.pool and once.progress.kept.length == 6


def test_penalties_are_subtracted_from_kept_scores_once(make_trainer):
    plan = Listed((RolloutPlan(), INIT_TWICE), ("init",), ROWS)
    trainer = make_trainer(*SMALL, "penalty.per_token=0.5", plan=plan)
    builder = trainer.rollout_builder
    for iteration in (1, 3):
        shard, _ = builder.sample(iteration, {})
        sampled, _ = builder.gather(shard, builder.score(shard.rollout, score_row))
        rollout, _ = trainer.process_rollout(iteration, sampled)
        lengths = torch.tensor([len(text) for text in rollout.responses])
        assert torch.equal(rollout.scores, 100 + lengths - 0.5 * rollout.mask.sum(-1))


# Logged responses and their scores


def test_logged_scores_replace_those_of_the_reward_which_reads_the_other_rows_only(make_trainer):
    rows, asked = [0, 3, 4, 10], []
    plan = Listed((RolloutPlan("data"),), ("data",), {1: rows})
    builder = make_trainer(*SMALL, plan=plan, dataset=LOGGED).rollout_builder

    def score(prompts, responses, columns):
        asked.append((prompts, responses, columns))
        return Scores([-7.0] * len(responses), {"half": [1.0] * len(responses)}, [[0.0]] * len(responses))

    shard, _ = builder.sample(1, {})
    scores = builder.score(shard.rollout, score)
    assert asked == [(["Prompt 3:"], [" a b c d"], [builder.examples[3].columns])]
    assert scores == Scores([0.0, -7.0, 1.0, 2.5])  # without parts and token scores, which are of one row alone
    rollout, parts = builder.gather(shard, scores)
    assert rollout.scores.tolist() == [0.0, -7.0, 1.0, 2.5] and parts == {} and rollout.token_scores is None
    assert rollout.responses == [" a", " a b c d", " a b c d e", " a"] and not rollout.on_policy.any()
    asked.clear()
    builder.config.plan.rows_of[1][1] = 2
    assert builder.score(builder.sample(1, {})[0].rollout, score).values == [0.0, 0.5, 1.0, 2.5] and not asked


@pytest.mark.parametrize(
    "plan", [RolloutPlan(), RolloutPlan("data", Prefix("uniform"), "policy")], ids=["policy", "completed"]
)
def test_other_responses_to_rows_with_a_logged_score_are_scored_by_the_reward(plan, make_trainer):
    plan = Listed((plan,), ("data",), {1: [0, 3, 4, 10]})
    builder = make_trainer(*SMALL, plan=plan, dataset=LOGGED).rollout_builder
    shard, _ = builder.sample(1, {})
    assert min(builder.score(shard.rollout, score_row).values) >= 100


def test_a_row_without_a_logged_response_has_the_chosen_one(make_trainer):
    plan = Listed((RolloutPlan("data"),), ("data",), {1: [1, 2]})
    builder = make_trainer(*SMALL, plan=plan, dataset=LOGGED).rollout_builder
    builder.examples = [replace(example, response=None) for example in builder.examples]
    assert builder.sample(1, {})[0].rollout.responses == [" chosen", " chosen"]


# Scores per token


@dataclass(frozen=True)
class Recorder(APA):
    """APA that records the rollouts that it prepares."""

    seen: list = field(default_factory=list)

    def prepare(self, rollout, state):
        self.seen.append(rollout)
        return super().prepare(rollout, state)


def test_scores_per_token_reach_the_algorithm(make_trainer):
    trainer = make_trainer(*SMALL)
    recorder = Recorder(**vars(trainer.config.algo))
    trainer = make_trainer(*SMALL, algo=recorder)
    lengths = trainer.rollout_builder.sample(1, {})[0].rollout.mask.sum(-1).tolist()
    rows = [[10.0 * i + t for t in range(length)] for i, length in enumerate(lengths)]
    trainer.score = lambda prompts, responses, columns: Scores([0.0, 1.0, 2.0, 3.0], token_scores=rows)
    trainer.run_phases(1)
    (rollout,) = recorder.seen
    assert [row[mask].tolist() for row, mask in zip(rollout.token_scores, rollout.mask, strict=True)] == rows
    assert not rollout.token_scores[~rollout.mask].any() and len(set(lengths)) > 1


def test_scores_per_token_of_another_length_are_one_line(make_trainer):
    trainer = make_trainer(*SMALL)
    lengths = trainer.rollout_builder.sample(1, {})[0].rollout.mask.sum(-1).tolist()
    rows = [[0.0] * length for length in lengths]
    rows[2].append(0.0)
    trainer.score = lambda prompts, responses, columns: Scores([0.0] * 4, token_scores=rows)
    with pytest.raises(UserError) as error:
        trainer.run_phases(1)
    assert str(error.value) == f"reward: response 2 has {lengths[2]} tokens, but {lengths[2] + 1} token_scores"


# Related texts


def test_texts_of_the_data_set_become_related_sequences(make_trainer):
    @dataclass(frozen=True)
    class WithTexts(Listed):
        def needs(self, needs):
            return replace(super().needs(needs), texts=("rejected", "hint"))

    rows = [3, 4, 0, 7]
    plan = WithTexts((RolloutPlan(),), (), {1: rows})
    builder = make_trainer(
        *SMALL,
        plan=plan,
        dataset=LOGGED,
    ).rollout_builder
    _, whole = build_whole(builder, 1)
    tokenizer = builder.prompt_format.tokenizer
    texts = {"rejected": [" no", None, " no", None], "hint": [" hint 3", " hint 4", None, " hint 7"]}
    assert whole.related.keys() == texts.keys()
    for name, sequences in whole.related.items():
        expected = [[*tokenizer(text)["input_ids"], tokenizer.eos_token_id] if text else [] for text in texts[name]]
        assert list_responses(sequences) == expected
        assert torch.equal(sequences.prompt_ids, whole.prompt_ids) and not sequences.on_policy.any()
    assert [builder.examples[row].prompt for row in whole.example_index.tolist()] == whole.prompts


def test_a_text_that_no_row_has_is_one_line(make_trainer):
    @dataclass(frozen=True)
    class WithTexts(Listed):
        def needs(self, needs):
            return replace(needs, texts=("reason",))

    with pytest.raises(UserError, match=r"^dataset: no row has 'reason', which the algorithm needs$"):
        make_trainer(*SMALL, plan=WithTexts((RolloutPlan(),)), dataset=LOGGED)


def test_the_encoder_makes_off_policy_rows_of_texts_and_tokens(make_trainer):
    builder = make_trainer(*SMALL, "sampling.max_new_tokens=4", dataset=LOGGED).rollout_builder
    tokenizer = builder.prompt_format.tokenizer
    examples = [Example("Say it:", None, None, {}), builder.examples[2], Example("Go", None, None, {})]
    rows = builder.encoder(examples, [" a b c d e f g h", [5, 6], " a"])
    cut, short = tokenizer(" a b c d e f g h")["input_ids"][:4], tokenizer(" a")["input_ids"]
    assert list_responses(rows) == [cut, [5, 6], [*short, tokenizer.eos_token_id]]
    prompts = [ids[mask].tolist() for ids, mask in zip(rows.prompt_ids, rows.prompt_mask, strict=True)]
    assert prompts == [tokenizer(example.prompt)["input_ids"] for example in examples]
    assert rows.prompt_mask[:, -1].all() and not rows.on_policy.any()
    assert list(builder.encoder.examples) == builder.examples
    with pytest.raises(UserError, match=r"^algo: encode\(\) got a response of 5 tokens, more than .*max_new_tokens 4"):
        builder.encoder(examples[:1], [[5] * 5])


# Forward passes


def test_without_rows_there_are_no_passes(make_trainer):
    trainer = make_trainer(*SMALL)
    _, whole = build_whole(trainer.rollout_builder, 1)
    none = whole.select_rows(torch.arange(0))
    assert trainer.forward_passes.run(none) is none


# Several ranks


def assert_same_rollout(actual: Rollout, expected: Rollout) -> None:
    """Assert equal rollouts; log-probs to 1e-5, since they are computed in batches of other widths."""
    assert list_responses(actual) == list_responses(expected)
    for name in ("prompts", "responses", "endings", "columns", "plans"):
        assert getattr(actual, name) == getattr(expected, name), name
    for name in ("groups", "example_index", "plan_index", "scores", "prompt_ids", "on_policy"):
        assert torch.equal(getattr(actual, name), getattr(expected, name)), name
    assert actual.logprobs.keys() == expected.logprobs.keys()
    tables: dict[str, tuple[Tensor, Tensor]] = {
        name: (actual.logprobs[name], table) for name, table in expected.logprobs.items()
    }
    if expected.token_scores is not None:
        tables["token_scores"] = (actual.token_scores, expected.token_scores)
    for name, (table, other) in tables.items():
        torch.testing.assert_close(table, other, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_give_the_rollout_of_one(ranks, make_trainer, run_on_ranks):
    """The second iteration has two new responses of π_init, fewer than ranks; the third has none."""
    plan = Listed((RolloutPlan(), INIT_TWICE), ("init",), ROWS)
    trainer = make_trainer("rollout_batch_size=4", "minibatch_size=2", "microbatch_size=2", plan=plan)

    def score(prompts, responses, columns):
        return Scores([float(len(text)) for text in responses], {"half": [len(text) / 2 for text in responses]})

    def build(builder: RolloutBuilder, passes: ForwardPasses) -> list:
        result = []
        for iteration in ROWS:
            shard, _ = builder.sample(iteration, {})
            sampled, parts = builder.gather(shard, builder.score(shard.rollout, score))
            result.append((passes.run(builder.complete(iteration, sampled)), parts))
        return result

    expected = build(trainer.rollout_builder, trainer.forward_passes)
    results = run_on_ranks(
        ranks,
        lambda world: build(
            replace(trainer.rollout_builder, world=world, kept=ResponsesPerPrompt()),
            replace(trainer.forward_passes, world=world),
        ),
    )
    for result in results:
        for (rollout, parts), (other, other_parts) in zip(result, expected, strict=True):
            assert_same_rollout(rollout, other)
            assert parts == other_parts and len(parts["half"]) in (4 + 6, 4 + 2, 4)


def test_ranks_score_equally_many_responses_even_if_some_are_logged(make_trainer, run_on_ranks):
    """A sharded reward model runs on all ranks at once. Rank 0 has the scored rows 0 and 2, rank 1 rows 3 and 5."""
    plan = Listed((RolloutPlan("data"),), ("data",), {1: [0, 2, 3, 5]})
    builder = make_trainer(*SMALL, plan=plan, dataset=LOGGED).rollout_builder
    counts = []

    def build(world):
        own = replace(builder, world=world)
        shard, _ = own.sample(1, {})
        per_token = [[0.0] * length for length in shard.rollout.mask.sum(-1).tolist()]

        def score(prompts, responses, columns):
            counts.append(world.all_gather(len(responses)))
            return Scores([9.0] * len(responses), {"half": [1.0] * len(responses)}, per_token)

        return own.gather(shard, own.score(shard.rollout, score))

    for rollout, parts in run_on_ranks(2, build):
        assert rollout.scores.tolist() == [0.0, 0.5, 9.0, 9.0] and parts == {} and rollout.token_scores is None
    assert counts == [[2, 2], [2, 2]]
