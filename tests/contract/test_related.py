"""Rows with further sequences, of other prompts and lengths: their losses, steps, microbatches and chat prompts."""

import json
import math
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.contract.algorithms import RIGHT, WRONG
from tests.contract.plain import compute_log_distributions, list_rows, select_tokens

ONE_STEP = ["minibatch_size=8", "update_epochs=1"]
"""The logged losses are then those of the policy as it was loaded."""


def count_forwarded_sequences(trainer) -> list[int]:
    """Return a list to which every forward pass of the update adds its number of sequences."""
    counts = []

    def record(module, arguments, options):
        if torch.is_grad_enabled():
            counts.append(len(arguments[0].mask) * (1 + len(arguments[0].related)))

    trainer.models.model.register_forward_pre_hook(record, with_kwargs=True)
    return counts


def test_losses_over_other_prompts_and_lengths_are_those_of_single_sequences(make_contract_trainer, tiny):
    trainer = make_contract_trainer("algo=contrastive", "algo.contrast_count=2", *ONE_STEP)
    result = trainer.run_phases(1)
    model, names = AutoModelForCausalLM.from_pretrained(tiny).eval(), ["other_instruction/0", "other_instruction/1"]
    own, *others = [list_rows(part) for part in (result.batch, *(result.batch.related[name] for name in names))]
    tokenizer = trainer.rollout_builder.prompt_format.tokenizer
    texts = result.sampled.prompts
    assert [tokenizer.decode(prompt) for prompt, _ in own] == [RIGHT + text for text in texts]
    assert [tokenizer.decode(prompt) for prompt, _ in others[0]] == [WRONG + text for text in texts]
    assert [tokenizer.decode(prompt) for prompt, _ in others[1]] == [WRONG + text for text in texts[1:] + texts[:1]]
    assert [response for _, response in others[0]] == [response for _, response in own]
    assert [response for _, response in others[1]] == [response[: (len(response) + 1) // 2] for _, response in own]
    sums, tokens = [], {"nll": [], "entropy": [], "other_0": [], "other_1": []}
    for rows in zip(own, *others, strict=True):
        distributions = [compute_log_distributions(model, prompt, response) for prompt, response in rows]
        chosen = [select_tokens(x, response) for x, (_, response) in zip(distributions, rows, strict=True)]
        sums.append([float(x.sum()) for x in chosen])
        tokens["nll"] += (-0.8 * chosen[0] - 0.2 * distributions[0].mean(-1)).tolist()
        tokens["entropy"] += (distributions[0].exp() * distributions[0]).sum(-1).tolist()
        tokens["other_0"] += chosen[1].tolist()
        tokens["other_1"] += chosen[2].tolist()
    for name, values in tokens.items():
        assert result.metrics[f"loss/{name}"] == pytest.approx(sum(values) / len(values), rel=1e-4)
    contrast = [math.log(sum(math.exp(other - row[0]) for other in row)) for row in sums]
    assert result.metrics["loss/contrast"] == pytest.approx(sum(contrast) / 8, rel=1e-4)
    # the gap, ratio and KL are those of the response as it was sampled
    assert result.metrics["policy/sampler_gap"] < 1e-5
    assert result.metrics["policy/ratio_max"] == pytest.approx(1, abs=1e-4)


@pytest.mark.slow
def test_results_do_not_depend_on_the_microbatch_which_counts_every_sequence(make_contract_trainer):
    """Five sequences per row: 4 rows per microbatch of 20 sequences, 2 of 10, and one of 1, as a row cannot be torn."""
    runs = {}
    for size, rows in ((20, 4), (10, 2), (1, 1)):
        trainer = make_contract_trainer(
            "algo=contrastive", "algo.contrast_count=4", "rollout_batch_size=20", "minibatch_size=20",
            f"microbatch_size={size}", "sampling.max_new_tokens=6",
        )  # fmt: skip
        forwarded = count_forwarded_sequences(trainer)
        runs[size] = trainer.run_phases(1).metrics
        # two epochs with one step each: rows are not sequences
        assert forwarded == [5 * rows] * (2 * 20 // rows) and trainer.updater.steps == 2
    for size in (10, 1):
        assert runs[size].keys() == runs[20].keys()
        for name, value in runs[20].items():
            absolute = 8e-6 if name == "kl/sequence" else 1e-6  # a sum of up to 6 differences
            assert runs[size][name] == pytest.approx(value, rel=1e-4, abs=absolute), name


def test_a_reference_text_adds_its_loss_and_no_step(make_contract_trainer, logged_data, tiny):
    trainer = make_contract_trainer("algo=reference_text", *logged_data, *ONE_STEP, "sampling.max_new_tokens=10")
    result = trainer.run_phases(1)
    assert trainer.updater.steps == 1
    tokenizer = trainer.rollout_builder.prompt_format.tokenizer
    model, losses = AutoModelForCausalLM.from_pretrained(tiny).eval(), []
    rows, ends = list_rows(result.batch.related["chosen"]), 0
    for (prompt, response), text, columns in zip(rows, result.sampled.prompts, result.sampled.columns, strict=True):
        assert tokenizer.decode(prompt) == text
        target = [*tokenizer(columns["response"], add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        assert response == target[:10]
        ends += len(target) <= 10
        losses += (-select_tokens(compute_log_distributions(model, prompt, response), response)).tolist()
    assert 0 < ends < 8  # some are cut, and then do not end with EOS
    assert result.metrics["loss/nll"] == pytest.approx(sum(losses) / len(losses), rel=1e-4)
    assert not result.batch.related["chosen"].on_policy.any()
    trainer = make_contract_trainer("algo=reference_text", *logged_data)
    trainer.run_phases(1)
    assert trainer.updater.steps == 4  # 2 epochs · 8 responses / 4


def test_a_logged_pair_is_one_row_of_two_responses(make_contract_trainer, logged_data):
    """At the start every margin is 0 and the loss log 2; rows without a rejected response do not count."""
    trainer = make_contract_trainer("algo=offline_dpo", *logged_data, "update_epochs=1")
    result = trainer.run_phases(1)
    batch = result.batch
    assert trainer.updater.steps == 4  # 8 pairs of 2 responses in minibatches of 4 responses
    examples = [trainer.rollout_builder.examples[row] for row in result.rollout.example_index.tolist()]
    complete = [example.rejected is not None for example in examples]
    assert batch.masks["pair"].tolist() == complete and {True, False} == set(complete)
    tokenizer = trainer.rollout_builder.prompt_format.tokenizer
    for example, (_, chosen), (_, rejected) in zip(
        examples, list_rows(batch), list_rows(batch.related["rejected"]), strict=True
    ):
        for text, tokens in ((example.chosen, chosen), (example.rejected or "", rejected)):
            target = [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
            assert tokens == (target[:12] if text else [])
    trainer = make_contract_trainer("algo=offline_dpo", *logged_data, "optimizer.lr=1e-30")
    metrics = trainer.run_phases(1).metrics
    assert metrics["loss/policy"] == pytest.approx(math.log(2), rel=1e-5) and abs(metrics["dpo/margin"]) < 1e-5
    assert not [name for name in metrics if name.startswith(("kl/", "policy/"))]


TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}<assistant>"


def test_other_instructions_of_a_chat_are_rendered_by_the_template(make_contract_trainer, tiny, tmp_path):
    shutil.copytree(tiny, tmp_path / "chat")
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(tmp_path / "chat")
    rows = [{"messages": [{"role": "user", "content": f"Who is {name}?"}]} for name in "ABCDEFGHIJ"]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    trainer = make_contract_trainer(
        "algo=hindsight", "algo.rows=8", f"model.path={tmp_path}/chat", "dataset=jsonl", "dataset.held_out_every=5",
        f"dataset.path={tmp_path}/chats.jsonl", "~dataset.train_prompts", "~dataset.test_prompts",
    )  # fmt: skip
    result = trainer.run_phases(1)
    for i, text in enumerate(result.rollout.prompts):
        question = text.removeprefix("\n\nHuman: ").removesuffix("\n\nAssistant:")
        own, other = [
            tokenizer.decode(part.prompt_ids[i][part.prompt_mask[i]])
            for part in (result.rollout, result.rollout.related["other_instruction/0"])
        ]
        assert {own, other} == {f"<user>{instruction}{question}<assistant>" for instruction in (RIGHT, WRONG)}
    prompts = [tokenizer.decode(ids[mask]) for ids, mask in
               zip(result.sampled.prompt_ids, result.sampled.prompt_mask, strict=True)]  # fmt: skip
    assert all(prompt.startswith(f"<user>{RIGHT}Who is ") for prompt in prompts)
    assert all(text.startswith("\n\nHuman: Who is ") for text in result.sampled.prompts)  # the reward reads it plain
