"""ILQL: action critics on the trunk with Polyak copies, and decoding by them, in sampling and in the exact KL."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.contract.plain import compute_log_distributions

BETA = 4.0


def randomize_heads(trainer, std: float = 0.2) -> None:
    """Give the last layers of critics and copies random weights; at the start they are 0."""
    model = trainer.models.model
    generator = torch.Generator().manual_seed(0)
    for name in model.list_critics():
        torch.nn.init.normal_(model.get_critic(name).head[-1].weight, std=std, generator=generator)


@torch.no_grad()
def compute_decoded(trainer, prompt: list[int], response: list[int], top_k: int) -> torch.Tensor:
    """Return the log-probs of the decoded policy before each token, [T, V], by layers and matrices."""
    policy, targets = trainer.models.policy, trainer.models.model.targets
    states = policy.gpt_neox(torch.tensor([prompt + response])).last_hidden_state[0, len(prompt) - 1 : -1]
    q = torch.stack([targets[name].head(states) for name in ("q1", "q2")]).amin(0)
    logits = (states @ policy.get_output_embeddings().weight.T).log_softmax(-1) + BETA * q
    if top_k:
        kept = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, logits.topk(top_k).indices, True)
        logits = logits.where(kept, -float("inf"))
    return logits.log_softmax(-1)


@pytest.mark.parametrize("top_k", [0, 5])
def test_the_decoded_policy_is_evaluated(top_k, make_contract_trainer, logged_data, tiny):
    trainer = make_contract_trainer("algo=ilql", *logged_data, f"algo.top_k={top_k}")
    randomize_heads(trainer)
    sampler, evaluator = trainer.rollout_builder.policy_sampler, trainer.evaluator
    responses = evaluator.sample_and_score(sampler, sampler.model, sampler.decoding)
    reference, rollout = AutoModelForCausalLM.from_pretrained(tiny).eval(), responses.rollout
    expected_kl = []
    for i, prompt in enumerate(evaluator.prompts):
        tokens = rollout.response_ids[i][rollout.mask[i]].tolist()
        decoded = compute_decoded(trainer, prompt.token_ids, tokens, top_k)
        init = compute_log_distributions(reference, prompt.token_ids, tokens)
        terms = (decoded.exp() * (decoded - init)).nan_to_num(0)
        expected_kl.append(float(terms.sum()))
        chosen = decoded.gather(-1, torch.tensor(tokens).unsqueeze(-1)).squeeze(-1)
        torch.testing.assert_close(rollout.logprobs["sampler"][i, : len(tokens)], chosen, rtol=1e-4, atol=1e-4)
        entropy = -(decoded.exp() * decoded).nan_to_num(0).sum(-1)
        torch.testing.assert_close(responses.entropy[i, : len(tokens)], entropy, rtol=1e-3, atol=1e-4)
    metrics = evaluator.evaluate(sampler, sampler.model, {}, sampler.decoding)[0]
    assert metrics["eval/kl_exact"] == pytest.approx(sum(expected_kl) / len(expected_kl), rel=1e-4)
    assert metrics["eval/kl_exact"] > 1


def test_decoding_is_that_of_the_sft_model_as_long_as_the_heads_are_zero(make_contract_trainer, logged_data):
    trainer = make_contract_trainer("algo=ilql", *logged_data)
    metrics = trainer.evaluate()
    assert abs(metrics["eval/kl_exact"]) < 1e-6 and metrics["eval/win_rate_sft"] == 0.5
    before = trainer.evaluator.sample_and_score(trainer.rollout_builder.policy_sampler, trainer.models.policy).rollout
    randomize_heads(trainer)
    after = trainer.evaluator.sample_and_score(trainer.rollout_builder.policy_sampler, trainer.models.policy).rollout
    assert before.responses != after.responses


def test_scores_of_the_sft_model_are_not_those_of_the_decoded_policy(train_contract, logged_data, tmp_path, records):
    """Decoding keeps the likeliest token before the first update already: then every response is the greedy one."""
    plain = train_contract(tmp_path / "plain", "algo=offline_apa", *logged_data, "iterations=0")
    decoded = train_contract(tmp_path / "decoded", "algo=ilql", *logged_data, "algo.top_k=1", "iterations=0")
    (expected,), (row,) = (records(run / "metrics.jsonl") for run in (plain, decoded))
    assert expected["eval/reward_mean"] == expected["eval/reward_mean_sft"] == row["eval/reward_mean_sft"]
    assert row["eval/reward_mean"] != row["eval/reward_mean_sft"] and row["eval/entropy"] == 0


def test_the_copies_follow_their_critics_every_second_step(make_contract_trainer, logged_data):
    """One step per iteration; copy ← ½ copy + ½ critic after steps 2 and 4, and nothing after 1 and 3."""
    trainer = make_contract_trainer(
        "algo=ilql", *logged_data, "minibatch_size=8", "update_epochs=1", "optimizer.critic_lr=1e-2"
    )
    model, critics = trainer.models.model, []
    copies = [[p.clone() for p in model.targets["q1"].parameters()]]
    for iteration in (1, 2, 3, 4):
        trainer.run_phases(iteration)
        critics.append([p.detach().clone() for p in model.critics["q1"].parameters()])
        copies.append([p.clone() for p in model.targets["q1"].parameters()])
    for iteration, (before, critic, after) in enumerate(zip(copies, critics, copies[1:], strict=False), 1):
        for old, trained, new in zip(before, critic, after, strict=True):
            torch.testing.assert_close(new, old if iteration % 2 else (old + trained) / 2, rtol=1e-6, atol=1e-9)
            assert iteration % 2 or not torch.equal(new, old)
    assert not any(parameter.requires_grad for parameter in model.targets.parameters())


def test_losses_are_those_of_the_paper(make_contract_trainer, logged_data):
    trainer = make_contract_trainer("algo=ilql", *logged_data, "minibatch_size=8", "update_epochs=1")
    randomize_heads(trainer)
    model = trainer.models.model
    heads = {
        name: [p.detach().clone() for p in model.get_critic(name).head.parameters()] for name in model.list_critics()
    }
    policy = AutoModelForCausalLM.from_pretrained(trainer.config.model.path).eval()
    result = trainer.run_phases(1)
    losses: dict[str, list[float]] = {name: [] for name in ("lm", "v", "q1", "q2", "cql_q1", "cql_q2")}
    for i, (prompt, response) in enumerate(
        (result.batch.prompt_ids[i][result.batch.prompt_mask[i]].tolist(),
         result.batch.response_ids[i][result.batch.mask[i]].tolist()) for i in range(8)
    ):  # fmt: skip
        with torch.no_grad():
            states = policy.gpt_neox(torch.tensor([prompt + response])).last_hidden_state[0, len(prompt) - 1 : -1]
        outputs = {name: ((states @ w1.T + b1).clamp(min=0) @ w2.T + b2) for name, (w1, b1, w2, b2) in heads.items()}
        at_token = {name: q[range(len(response)), response] for name, q in outputs.items() if name != "v"}
        v = outputs["v"][:, 0]
        target = 0.99 * torch.cat([v[1:], torch.zeros(1)])
        target[-1] += float(result.rollout.scores[i])
        error = torch.minimum(at_token["q1/target"], at_token["q2/target"]) - v
        losses["v"] += [float(0.7 * u**2 if u > 0 else 0.3 * u**2) for u in error]
        losses["lm"] += (-compute_log_distributions(policy, prompt, response)[range(len(response)), response]).tolist()
        for name in ("q1", "q2"):
            losses[name] += ((at_token[name] - target) ** 2).tolist()
            losses[f"cql_{name}"] += (-outputs[name].log_softmax(-1)[range(len(response)), response]).tolist()
    for name, values in losses.items():
        assert result.metrics[f"loss/{name}"] == pytest.approx(sum(values) / len(values), rel=1e-4), name
