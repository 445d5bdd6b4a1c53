"""LOLS's plans and two critics: who samples which token, what is logged of them, and what idles does not move."""

import pytest
import torch
from transformers import AutoTokenizer

from apa_cli.algorithms.awr import AWR
from apa_cli.models.loading import save_model
from apa_cli.randomness import Stream
from apa_cli.rollout.samplers import Draws
from tests.builders import build_tiny_policy, make_algorithm, make_mask, make_rollout
from tests.contract.plain import compute_log_distributions, list_rows, select_tokens

OUTPUTS = ("policy", "value", "guide_critic")


def copy_parameters(trainer) -> dict[str, list[torch.Tensor]]:
    model = trainer.models.model
    return {name: [p.detach().clone() for p in model.list_output_parameters(name)] for name in OUTPUTS}


def run_and_list_moved(trainer, iteration: int) -> tuple[set[str], dict[str, float]]:
    """Run an iteration and return the outputs of which a bit has changed, and the metrics."""
    before = copy_parameters(trainer)
    metrics = trainer.run_phases(iteration).metrics
    after = copy_parameters(trainer)
    same = {name: all(map(torch.equal, before[name], after[name])) for name in OUTPUTS}
    return {name for name in OUTPUTS if not same[name]}, metrics


@pytest.mark.parametrize("critic", ["separate", pytest.param("head", marks=pytest.mark.slow)])
def test_a_critic_that_idles_does_not_move_though_adamw_has_momentum(critic, make_contract_trainer):
    trainer = make_contract_trainer("algo=two_critics", f"critic={critic}", "optimizer.weight_decay=0.1")
    moved, metrics = zip(*(run_and_list_moved(trainer, iteration) for iteration in (1, 2, 3, 4)), strict=True)
    # each has idled in an iteration after one in which it moved: the value in 2 and 4, the guide's critic in none but 1
    assert moved == ({"policy", "value"}, {"policy", "guide_critic"}, set(OUTPUTS), {"policy", "guide_critic"})
    for names, row in zip(moved, metrics, strict=True):
        for name in OUTPUTS[1:]:
            assert {f"loss/{name}", f"{name}/explained_variance"} <= row.keys() or name not in names
            assert not {f"loss/{name}", f"{name}/explained_variance"} & row.keys() or name in names


@pytest.mark.parametrize("critic", ["separate", "head"])
def test_a_policy_without_a_token_idles_and_has_no_metric(critic, make_contract_trainer):
    """Without prefixes the guide samples all of iteration 2; a critic on the trunk still moves the trunk."""
    trainer = make_contract_trainer("algo=two_critics", f"critic={critic}", "plan.rollin_probability=0")
    moved, _ = run_and_list_moved(trainer, 1)
    assert moved == {"policy", "value"}
    moved, metrics = run_and_list_moved(trainer, 2)
    assert moved == {"guide_critic"} | ({"policy"} if critic == "head" else set())
    policy = {"loss/policy", "kl/sequence", "kl/token_k3", "policy/entropy", "policy/ratio_max", "policy/clip_fraction",
              "policy/sampler_gap"}  # fmt: skip
    assert not policy & metrics.keys()
    assert ("optimizer/grad_norm" in metrics) == (critic == "head")
    assert {"reward/mean", "response/length", "loss/guide_critic", "optimizer/critic_grad_norm"} <= metrics.keys()


@pytest.fixture(scope="module")
def llama(tiny, tmp_path_factory):
    """The folder of a Llama-like model of another seed with the tiny model's tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    folder = tmp_path_factory.mktemp("guide")
    guide = build_tiny_policy("llama", seed=5, vocab_size=len(tokenizer), max_position_embeddings=128)
    save_model(guide, tokenizer, folder)
    return folder


@pytest.mark.parametrize("guide", ["sft", "local"])
def test_each_token_is_that_of_its_sampler_and_trains_whom_the_plan_says(guide, llama, make_contract_trainer):
    chosen = [f"guide={guide}", *([f"guide.path={llama}", "guide.dtype=float32"] if guide == "local" else [])]
    trainer = make_contract_trainer("algo=two_critics", "seed=4", *chosen)
    builder = trainer.rollout_builder
    assert (trainer.models.guide is None) == (guide == "sft")
    for iteration, roll_in in ((1, "guide"), (2, "policy")):
        # the plan is followed with the policy as it is before the update
        (plan,) = trainer.config.plan.rollout(iteration, None, {})
        prompts, _ = builder.select_prompts(iteration, plan, 1)
        draws = Draws(4, Stream.roll_in, iteration, [(place, 0) for place in range(8)])
        sampler, empty = builder.samplers[roll_in], [[] for _ in prompts]
        whole = sampler.draw(prompts, empty, draws, trainer.config.sampling, builder.end_tokens).tokens
        policy = [p.detach().clone() for p in trainer.models.policy.parameters()]
        result = trainer.run_phases(iteration)
        rollout, masks = result.rollout, result.batch.masks
        prefix = rollout.mask & (rollout.on_policy if roll_in == "policy" else ~rollout.on_policy)
        lengths = prefix.sum(-1).tolist()
        for i, length in enumerate(lengths):
            assert rollout.response_ids[i][prefix[i]].tolist() == whole[i][:length] and length < len(whole[i])
            assert prefix[i, :length].all()  # the prefix comes first
        assert 0 in lengths and len(set(lengths)) > 2
        assert masks["policy"].equal(rollout.on_policy)
        if roll_in == "guide":
            assert masks["critic/value"].equal(rollout.on_policy)
        else:
            assert masks["critic/guide_critic"].equal(rollout.mask & ~rollout.on_policy)
        # π_old of a token is that of the training forward pass, whoever sampled it
        for parameter, value in zip(trainer.models.policy.parameters(), policy, strict=True):
            parameter.data.copy_(value)
        for i, (prompt, response) in enumerate(list_rows(rollout)):
            expected = select_tokens(compute_log_distributions(trainer.models.policy, prompt, response), response)
            torch.testing.assert_close(rollout.logprobs["old"][i, : len(response)], expected, rtol=1e-4, atol=1e-5)
        # metrics are over the tokens that the policy sampled, and rows with such tokens
        sampled, k1 = rollout.logprobs["sampler"], rollout.logprobs["sampler"] - rollout.logprobs["init"]
        assert result.metrics["policy/entropy"] == pytest.approx(-float(sampled[rollout.on_policy].mean()), rel=1e-5)
        rows = [float(k1[i][rollout.on_policy[i]].sum()) for i in range(8) if rollout.on_policy[i].any()]
        assert result.metrics["kl/sequence"] == pytest.approx(sum(rows) / len(rows), abs=1e-5)
        gap = (sampled - rollout.logprobs["old"]).abs()
        assert result.metrics["policy/sampler_gap"] < 1e-5
        assert guide == "sft" or float(gap[rollout.mask & ~rollout.on_policy].mean()) > 0.1


def test_both_plans_of_one_iteration_answer_each_prompt(make_contract_trainer):
    trainer = make_contract_trainer("algo=two_critics", "seed=4")
    shard, _ = trainer.rollout_builder.sample(3, {})
    rollout = shard.rollout
    assert len(rollout) == 16 and rollout.plan_index.tolist() == [0] * 8 + [1] * 8
    assert rollout.groups.tolist() == [*range(8), *range(8)]
    assert rollout.example_index[:8].equal(rollout.example_index[8:])
    masks = trainer.config.plan.masks(rollout)
    last = rollout.mask.sum(-1) - 1
    ends_on_policy = rollout.on_policy[torch.arange(16), last].tolist()
    assert ends_on_policy == [True] * 8 + [False] * 8
    assert masks["policy"].equal(rollout.on_policy)


def test_a_critic_whose_mask_is_empty_has_no_explained_variance():
    mask = make_mask([2, 1])
    for trained in (mask, torch.zeros_like(mask)):
        rollout = make_rollout(
            mask, scores=torch.tensor([1.0, -1.0]), values={"value": torch.zeros(2, 2)},
            masks={"policy": mask, "critic/value": trained},
        )  # fmt: skip
        batch, _ = make_algorithm(AWR).prepare(rollout, make_algorithm(AWR).initial_state())
        assert ("value/explained_variance" in batch.metrics) == bool(trained.any())
