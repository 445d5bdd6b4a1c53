"""apa-export: the written folder is the policy, its card says what the run did, and nothing half done is kept."""

import json
import shutil
from functools import partial

import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from apa_cli.config.build import build
from apa_cli.config.from_run import compose_run
from apa_cli.errors import ConfigError, UserError
from apa_cli.inference import export as publication
from apa_cli.inference.export import check, largest_difference, start_export
from apa_cli.inference.model_card import model_card, use
from apa_cli.inference.trained import PromptKind

look = partial(compose_run, scores=lambda cfg: False)
"""compose_run for a command that asks no reward."""

WORDS = ("iterations=2", "optimizer.lr=1e-2", "checkpoint.keep_last=9", "evaluation.every=1")
LORA = ("lora=default", "lora.rank=4", "critic=adapter", "optimizer.lr=2e-2")


@pytest.fixture(scope="module")
def full(train, tmp_path_factory):
    return train(tmp_path_factory.mktemp("exported") / "full", *WORDS)


@pytest.fixture(scope="module")
def lora(train, tmp_path_factory):
    return train(tmp_path_factory.mktemp("exported") / "lora", *WORDS, *LORA)


def export(run, folder, *words):
    start_export(build(look([f"run={run}", f"export.folder={folder}", *words])))
    return folder


def logprobs(model, tokenizer, text="Once there was a dog. It ran up the hill and saw the sea."):
    with torch.no_grad():
        return model(**tokenizer(text, return_tensors="pt")).logits.log_softmax(-1)


def base(tiny):
    return AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)


def checkpoint_tensors(run, iteration):
    return load_file(run / "checkpoints" / f"iteration_{iteration:06d}" / "policy.safetensors")


def of_full_checkpoint(run, tiny):
    model = base(tiny)
    model.load_state_dict(checkpoint_tensors(run, 1))
    return model


def of_lora_checkpoint(run, tiny):
    """The base with W + alpha/r · B·A put in by hand."""
    model, learnt = base(tiny), checkpoint_tensors(run, 1)
    with torch.no_grad():
        for number, layer in enumerate(model.gpt_neox.layers):
            name = f"gpt_neox.layers.{number}.attention.query_key_value.lora_"
            product = learnt[f"{name}B.policy.weight"] @ learnt[f"{name}A.policy.weight"]
            layer.attention.query_key_value.weight += 32 / 4 * product
    return model


CASES = {
    "full": ("full", "", lambda run, tiny: AutoModelForCausalLM.from_pretrained(run / "model")),
    "lora": ("lora", "", lambda run, tiny: PeftModel.from_pretrained(base(tiny), run / "model" / "adapter")),
    "full checkpoint": ("full", "checkpoints/iteration_000001", of_full_checkpoint),
    "lora checkpoint": ("lora", "checkpoints/iteration_000001", of_lora_checkpoint),
}


@pytest.mark.parametrize("case", CASES)
def test_the_folder_gives_the_policys_log_probs(case, request, tiny, tmp_path, capsys):
    name, part, expected = CASES[case]
    run = request.getfixturevalue(name)
    folder = export(run / part, tmp_path / "written")
    assert "differ by at most" in capsys.readouterr().out
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    found = logprobs(model, tokenizer)
    assert model.dtype is torch.float32
    torch.testing.assert_close(found, logprobs(expected(run, tiny), tokenizer), rtol=0, atol=2e-5)
    assert (found - logprobs(base(tiny), tokenizer)).abs().max() > 1e-2  # it is no longer where it started
    assert not (folder / "adapter").exists()


def test_by_default_it_lies_in_the_run_and_another_place_must_be_empty(full, tmp_path):
    run = shutil.copytree(full, tmp_path / "run")
    words = [f"run={run}/checkpoints/iteration_000001"]
    start_export(build(look(words)))
    assert (run / "export_iteration_000001" / "model.safetensors").is_file()
    note = run / "export_iteration_000001" / "README.md"
    note.write_text("mine")
    with pytest.raises(UserError, match="is not empty"):
        start_export(build(look(words)))
    assert note.read_text() == "mine"


def test_in_another_precision(full, tmp_path):
    folder = export(full, tmp_path / "half", "export.dtype=bfloat16")
    assert AutoModelForCausalLM.from_pretrained(folder).dtype is torch.bfloat16
    stored, source = load_file(folder / "model.safetensors"), load_file(full / "model" / "model.safetensors")
    assert all(torch.equal(stored[name], source[name].bfloat16()) for name in source)


def test_what_is_not_the_policy_is_not_kept(full, tmp_path, monkeypatch):
    write = publication.write

    def damaged(policy, tokenizer, folder, dtype):
        write(policy, tokenizer, folder, dtype)
        tensors = load_file(folder / "model.safetensors")
        tensors["gpt_neox.final_layer_norm.weight"] *= 1.01
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    monkeypatch.setattr(publication, "write", damaged)
    with pytest.raises(UserError, match="log-probs differ"):
        export(full, tmp_path / "written")
    assert not list(tmp_path.iterdir())


def test_the_check_is_of_the_largest_difference():
    expected, found = (
        [torch.tensor([-1.0, -2.0]), torch.tensor([-3.0])],
        [torch.tensor([-1.5, -2.0]), torch.tensor([-1])],
    )
    assert largest_difference(expected, found) == 2
    check(1e-3, 1e-3)
    for wrong in (1.1e-3, float("nan")):
        with pytest.raises(UserError):
            check(wrong, 1e-3)


# --- the card -----------------------------------------------------------------------------------------------


def cells(card: str) -> dict[str, list[str]]:
    """The rows of all tables by their first cell."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in card.splitlines() if line.startswith("|")]
    return {row[0]: row[1:] for row in rows}


def test_the_card_says_what_the_run_did_and_found(full, records):
    card = model_card(full, None, 2, torch.float32)
    first, _, last = [row for row in records(full / "metrics.jsonl") if "eval/reward_mean" in row]
    found = cells(card)
    assert found["score"] == [f"{first['eval/reward_mean']:.4g}", f"{last['eval/reward_mean']:.4g}"]
    assert found["exact KL to the SFT model, nats per reply"][1] == f"{last['eval/kl_exact']:.4g}"
    assert found["responses sampled"] == ["16"] and found["iterations"] == ["2 of 2"] and found["seed"] == ["0"]
    assert found["reward"] == ["FunctionReward `vowels.py:vowels` (local)"]
    assert found["trained from"] == ["`tiny` (local)"] and found["prompts"] == ["StoryOpenings"]
    assert found["`optimizer.lr`"] == ["0.01"] and found["`whitening`"] == ["none"] and found["`lambda_`"] == ["0.1"]
    assert "APA, λ = 0.1" in card and "After iteration 2" in card and f"torch {torch.__version__}" in card
    assert yaml.safe_load(card.split("---")[1])["tags"] == ["rlhf", "apa", "apa-cli"]


def test_a_checkpoints_card_is_of_its_iteration(full, records):
    card = model_card(full, full / "checkpoints" / "iteration_000001", 1, torch.bfloat16)
    row = records(full / "metrics.jsonl")[1]
    assert cells(card)["score"][1] == f"{row['eval/reward_mean']:.4g}"
    assert cells(card)["responses sampled"] == ["8"] and cells(card)["precision of the weights"] == ["bfloat16"]
    assert "After iteration 1" in card


def test_the_card_has_what_apa_eval_found(full, tmp_path):
    run = shutil.copytree(full, tmp_path / "run")
    metrics = {
        "eval/reward_mean": 0.25, "eval/reward_ci": 0.125, "eval/gain/size": 2.0, "eval/gain_ci/size": 0.5,
        "eval/best_of_4/reward_mean": 3.0, "eval/best_of_4/reward_ci": 0.75,
    }  # fmt: skip
    for iteration in (1, 2):  # an evaluation from before the run was continued is none of this policy
        (run / "eval.json").write_text(json.dumps({"iteration": iteration, "prompts": 99, "metrics": metrics}))
        card = model_card(run, None, 2, torch.float32)
        assert ("apa-eval" in card) == (iteration == 2)
    assert "on 99 held-out prompts" in card
    found = cells(card.split("`apa-eval`")[1])
    assert found["score"] == ["0.25 ± 0.12"] and found["gain in size"] == ["2 ± 0.5"]
    assert found["score of the SFT model's best of 4 replies"] == ["3 ± 0.75"]


def test_the_cards_program_runs(full, tmp_path, monkeypatch, capsys):
    folder = export(full, tmp_path / "written")
    program = (folder / "README.md").read_text().split("```python\n")[1].split("```")[0]
    monkeypatch.chdir(folder)
    exec(program)
    assert capsys.readouterr().out.strip()


def test_a_chats_prompt_is_given_to_the_template():
    sampling = {"stop_strings": ["Human:"], "temperature": 0.5, "top_k": 0, "top_p": 1.0, "max_new_tokens": 7}
    text = "\n\nHuman: Hi\n\nAssistant: "
    program = use(sampling, text, PromptKind.chat)
    assert "messages = [{'role': 'user', 'content': 'Hi'}]" in program and "prompt =" not in program
    assert "temperature=0.5" in program and "stop_strings=['Human:']" in program
    assert f"prompt = {text!r}" in use(sampling, text, PromptKind.dialogue)


def test_a_checkpoint_that_is_not_there(full):
    with pytest.raises(ConfigError, match="no checkpoint of one"):
        look([f"run={full}/checkpoints/iteration_000077"])
