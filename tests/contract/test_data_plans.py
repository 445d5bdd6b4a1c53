"""Plans that read the data set's responses: prefixes that the policy completes, and whole responses."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from apa_cli.rollout.collect import concatenate_sequences
from apa_cli.rollout.decode_step import EagerDecoder, GraphDecoder
from apa_cli.rollout.engine import sample_responses
from tests.builders import build_word_tokenizer, make_mask, make_rollout, make_sampling_settings
from tests.contract.plain import compute_log_distributions, list_rows, select_tokens


def encode_logged(trainer, rollout) -> list[list[int]]:
    """Return the tokens of the logged response of each row's prompt, with EOS, cut to the longest response."""
    tokenizer, examples = trainer.rollout_builder.prompt_format.tokenizer, trainer.rollout_builder.examples
    return [
        [*tokenizer(examples[row].response, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id][:12]
        for row in rollout.example_index.tolist()
    ]


class Forbidden:
    """A sampler that no plan may call."""

    def draw(self, *arguments):
        raise AssertionError("the policy has sampled")

    def refresh(self, model):
        """Do nothing."""


def test_the_policy_completes_prefixes_of_the_data(make_contract_trainer, logged_data):
    trainer = make_contract_trainer("algo=resets_ppo", *logged_data, "lambda=0.5", "algo.score_scaling=none")
    result = trainer.run_phases(1)
    rollout, batch = result.rollout, result.batch
    prefix, lengths = rollout.mask & ~rollout.on_policy, []
    for i, logged in enumerate(encode_logged(trainer, rollout)):
        length = int(prefix[i].sum())
        lengths.append(length)
        assert rollout.response_ids[i, :length].tolist() == logged[:length] and prefix[i, :length].all()
        assert 1 <= length < len(logged) or len(logged) < 2
        assert rollout.on_policy[i, length:].equal(rollout.mask[i, length:])
    assert len(set(lengths)) > 2 and int(rollout.mask.sum(-1).max()) <= 12
    assert batch.masks["policy"].equal(rollout.on_policy) and batch.masks["critic/value"].equal(rollout.mask)
    # whitened over all positions, prefixes included
    advantages = batch.advantages[rollout.mask].double()
    assert float(advantages.mean()) == pytest.approx(0, abs=1e-6)
    assert float(advantages.var(correction=0)) == pytest.approx(1, abs=1e-5)
    # at the start π_old is π_init, so that no token has a price of KL, whoever sampled it: the returns of the last
    # tokens are the scores, though the data's tokens have no log-probs of a sampler (0)
    last = rollout.mask.sum(-1) - 1
    assert batch.returns["value"][torch.arange(8), last].tolist() == pytest.approx(rollout.scores.tolist(), abs=1e-4)
    assert batch.returns["value"][:, 0].tolist() == pytest.approx(
        [float(0.95 ** int(n)) * float(score) for n, score in zip(last, rollout.scores, strict=True)], abs=1e-4
    )
    assert not rollout.logprobs["sampler"][prefix].any() and rollout.logprobs["old"][prefix].all()
    for i, (prompt, response) in enumerate(list_rows(rollout)):
        own = compute_log_distributions(trainer.models.reference, prompt, response)
        expected = select_tokens(own, response)
        torch.testing.assert_close(rollout.logprobs["old"][i, : len(response)], expected, rtol=1e-4, atol=1e-5)
    entropy = -float(rollout.logprobs["sampler"][rollout.on_policy].mean())
    assert result.metrics["policy/entropy"] == pytest.approx(entropy)
    # the reward scores the prefix with the rest, not the data set's own score
    assert rollout.scores.tolist() == pytest.approx(
        [sum(map(t.lower().count, "aeiou")) / (len(t) + 1) - 0.002 * len(t) for t in rollout.responses], abs=1e-6
    )


def test_offline_nothing_is_sampled_and_scores_are_those_of_the_data(make_contract_trainer, logged_data):
    trainer = make_contract_trainer("algo=offline_apa", *logged_data)
    builder = trainer.rollout_builder
    policy_sampler, calls, score = builder.samplers["policy"], [], trainer.score
    builder.samplers = {**builder.samplers, "policy": Forbidden()}
    trainer.score = lambda *arguments: calls.append(arguments) or score(*arguments)
    results = [trainer.run_phases(iteration) for iteration in (1, 2)]
    for result in results:
        rollout = result.rollout
        assert [response for _, response in list_rows(rollout)] == encode_logged(trainer, rollout)
        expected = [builder.examples[row].score for row in rollout.example_index.tolist()]
        assert rollout.scores.tolist() == expected and result.metrics["reward/mean"] == sum(expected) / 8
        assert not rollout.on_policy.any() and result.batch.masks["policy"].equal(rollout.mask)
        endings = ["eos" if response[-1] == trainer.evaluator.tokenizer.eos_token_id else "length"
                   for _, response in list_rows(rollout)]  # fmt: skip
        assert rollout.endings == endings and set(endings) == {"eos", "length"}
        absent = ("kl/", "policy/", "apa/")
        assert not [name for name in result.metrics if name.startswith(absent)] and "loss/policy" in result.metrics
        assert "init" not in rollout.logprobs and "reference" in rollout.logprobs
    assert not calls
    builder.samplers = {**builder.samplers, "policy": policy_sampler}
    metrics = trainer.evaluate()  # evaluation samples, and measures the exact KL
    assert metrics["eval/kl_exact"] > 1e-3 and {"eval/entropy", "eval/reward_mean"} <= metrics.keys()


def test_the_reward_scores_only_logged_responses_without_a_score(make_contract_trainer, half_scored_data):
    trainer = make_contract_trainer("algo=offline_apa", *half_scored_data)
    scored, score = [], trainer.score
    trainer.score = lambda prompts, responses, columns: scored.extend(responses) or score(prompts, responses, columns)
    rollout = trainer.run_phases(1).rollout
    examples = [trainer.rollout_builder.examples[row] for row in rollout.example_index.tolist()]
    missing = [example.score is None for example in examples]
    assert scored == [text for text, is_missing in zip(rollout.responses, missing, strict=True) if is_missing] != []
    for example, text, value in zip(examples, rollout.responses, rollout.scores.tolist(), strict=True):
        vowels = sum(map(text.lower().count, "aeiou")) / (len(text) + 1) - 0.002 * len(text)
        assert value == pytest.approx(vowels if example.score is None else example.score, abs=1e-6)


def test_token_scores_that_only_some_rows_have_are_left_out():
    mask = make_mask([2, 1])
    parts = [make_rollout(mask, token_scores=torch.ones(2, 2)), make_rollout(mask)]
    assert concatenate_sequences(parts, 0).token_scores is None
    assert concatenate_sequences(parts[::-1], 0).token_scores is None
    assert concatenate_sequences(parts[:1] * 2, 0).token_scores.equal(torch.ones(4, 2))


# --- positions ----------------------------------------------------------------------------------------------


def build_absolute_model(positions: int):
    """Return a GPT-2, whose positions are a table, with weights that do not depend on the table's length."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "gpt2", vocab_size=11, n_embd=16, n_layer=1, n_head=2, n_positions=64, initializer_range=0.5,
        bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).eval()
    table = model.transformer.wpe
    table.weight.data = table.weight.data[:positions]
    model.config.n_positions = positions
    return model


def test_a_prefix_does_not_lead_beyond_the_last_position():
    """Prompts of 8 tokens and responses of 12 need 20 positions, with a prefix too: one more token follows 11."""
    prompts, prefixes = [[1, 2, 3, 4, 5, 6, 7, 8], [2, 3], [3, 1, 4, 1, 5]], [[9] * 11, [], [7] * 4]
    uniforms = torch.rand(3, 12, generator=torch.Generator().manual_seed(1)).numpy()
    contexts = [prompt + prefix for prompt, prefix in zip(prompts, prefixes, strict=True)]
    results = [
        sample_responses(build_absolute_model(positions), build_word_tokenizer(), contexts, uniforms,
                         make_sampling_settings(), frozenset(), prefixes)
        for positions in (20, 64)
    ]  # fmt: skip
    assert results[0] == results[1]
    assert [len(tokens) for tokens in results[0].tokens] == [1, 12, 8] and results[0].endings == ["length"] * 3


@pytest.mark.parametrize("with_graph", [False, True])
def test_rows_that_have_ended_are_decoded_on_at_the_last_position(with_graph):
    model, ids = build_absolute_model(20), torch.full((2, 19), 3)
    mask = torch.ones_like(ids)
    mask[1, :10] = 0
    decoder = EagerDecoder(model, ids, mask, torch.full((2, 12), 0.5), make_sampling_settings(), last_position=19)
    decoder.step()
    assert decoder.position_ids.tolist() == [[19], [9]]
    decoder = GraphDecoder(decoder) if with_graph else decoder
    for step in range(1, 8):
        decoder.step()
        assert decoder.position_ids.tolist() == [[19], [9 + step]]
