"""apa-export: the written folder holds the policy, and nothing is left of an export that fails its check."""

import shutil

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from apa_cli.config.build import build_config
from apa_cli.config.from_run import compose_from_run
from apa_cli.errors import UserError
from apa_cli.inference import export
from apa_cli.inference.export import check_difference, compute_max_difference, export_policy
from apa_cli.runs.records import RecordedRun

OVERRIDES = ("iterations=2", "optimizer.lr=1e-2", "checkpoint.keep_last=9", "evaluation.every=1")
LORA = ("lora=default", "lora.rank=4", "critic=adapter", "optimizer.lr=2e-2")


@pytest.fixture(scope="module")
def full_run(train, tmp_path_factory):
    """A run that trained all weights."""
    return train(tmp_path_factory.mktemp("exported") / "full", *OVERRIDES)


@pytest.fixture(scope="module")
def lora_run(train, tmp_path_factory):
    """A run that trained a LoRA adapter."""
    return train(tmp_path_factory.mktemp("exported") / "lora", *OVERRIDES, *LORA)


def run_export(run, *overrides):
    """Run apa-export run=… with these overrides."""
    config = build_config(compose_from_run([f"run={run}", *overrides], uses_reward=lambda cfg: False))
    export_policy(config, RecordedRun.find(config.run.run))


def compute_logprobs(model, tokenizer, text="Once there was a dog. It ran up the hill and saw the sea."):
    with torch.no_grad():
        return model(**tokenizer(text, return_tensors="pt")).logits.log_softmax(-1)


def load_base(tiny):
    return AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)


def load_tensors(run, iteration):
    return load_file(run / "checkpoints" / f"iteration_{iteration:06d}" / "policy.safetensors")


def load_full_checkpoint(run, tiny):
    model = load_base(tiny)
    model.load_state_dict(load_tensors(run, 1))
    return model


def load_lora_checkpoint(run, tiny):
    """Return the base with alpha/r · B·A added to W by hand."""
    model, tensors = load_base(tiny), load_tensors(run, 1)
    with torch.no_grad():
        for number, layer in enumerate(model.gpt_neox.layers):
            name = f"gpt_neox.layers.{number}.attention.query_key_value.lora_"
            product = tensors[f"{name}B.policy.weight"] @ tensors[f"{name}A.policy.weight"]
            layer.attention.query_key_value.weight += 32 / 4 * product
    return model


CASES = {
    "full": ("full_run", "", lambda run, tiny: AutoModelForCausalLM.from_pretrained(run / "model")),
    "lora": ("lora_run", "", lambda run, tiny: PeftModel.from_pretrained(load_base(tiny), run / "model" / "adapter")),
    "full checkpoint": ("full_run", "checkpoints/iteration_000001", load_full_checkpoint),
    "lora checkpoint": ("lora_run", "checkpoints/iteration_000001", load_lora_checkpoint),
}


@pytest.mark.parametrize("case", CASES)
def test_the_folder_gives_the_policys_log_probs(case, request, tiny, tmp_path, capsys):
    name, part, load_expected = CASES[case]
    run, folder = request.getfixturevalue(name), tmp_path / "written"
    run_export(run / part, f"export.folder={folder}")
    assert "differ by at most" in capsys.readouterr().out
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    logprobs = compute_logprobs(model, tokenizer)
    assert model.dtype is torch.float32
    torch.testing.assert_close(logprobs, compute_logprobs(load_expected(run, tiny), tokenizer), rtol=0, atol=2e-5)
    assert (logprobs - compute_logprobs(load_base(tiny), tokenizer)).abs().max() > 1e-2  # training moved it
    assert not (folder / "adapter").exists()


def test_the_default_folder_is_in_the_run_and_a_folder_with_files_is_refused(full_run, tmp_path):
    run = shutil.copytree(full_run, tmp_path / "run")
    checkpoint = run / "checkpoints" / "iteration_000001"
    run_export(checkpoint)
    assert (run / "export_iteration_000001" / "model.safetensors").is_file()
    card = run / "export_iteration_000001" / "README.md"
    card.write_text("edited")
    with pytest.raises(UserError, match="is not empty"):
        run_export(checkpoint)
    assert card.read_text() == "edited"


def test_weights_are_rounded_to_another_precision(full_run, tmp_path):
    folder = tmp_path / "half"
    run_export(full_run, f"export.folder={folder}", "export.dtype=bfloat16")
    assert AutoModelForCausalLM.from_pretrained(folder).dtype is torch.bfloat16
    stored, source = load_file(folder / "model.safetensors"), load_file(full_run / "model" / "model.safetensors")
    assert all(torch.equal(stored[name], source[name].bfloat16()) for name in source)


def test_a_folder_that_does_not_hold_the_policy_is_removed(full_run, tmp_path, monkeypatch):
    save_plain_folder = export.save_plain_folder

    def save_damaged(policy, tokenizer, folder, dtype):
        save_plain_folder(policy, tokenizer, folder, dtype)
        tensors = load_file(folder / "model.safetensors")
        tensors["gpt_neox.final_layer_norm.weight"] *= 1.01
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    monkeypatch.setattr(export, "save_plain_folder", save_damaged)
    with pytest.raises(UserError, match="log-probs of the reloaded model differ"):
        run_export(full_run, f"export.folder={tmp_path / 'written'}")
    assert not list(tmp_path.iterdir())


def test_the_check_is_of_the_largest_difference():
    expected, actual = (
        [torch.tensor([-1.0, -2.0]), torch.tensor([-3.0])],
        [torch.tensor([-1.5, -2.0]), torch.tensor([-1])],
    )
    assert compute_max_difference(expected, actual) == 2
    check_difference(1e-3, 1e-3)
    for difference in (1.1e-3, float("nan")):
        with pytest.raises(UserError):
            check_difference(difference, 1e-3)
