"""Runs with each family of models that the paper uses and its tokenizer: LLaMA, GPT-NeoX, GPT-J."""

import json
import math
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from apa_cli.config.build import build_config
from apa_cli.config.compose import compose
from apa_cli.models.loading import find_end_token_ids
from apa_cli.rewards.base import Placement
from apa_cli.rewards.model import ModelReward
from apa_cli.settings import RewardFormat
from apa_cli.stages.reward_model import train_reward_model
from apa_cli.types import Example
from tests.builders import build_tiny_policy, make_stage_context

pytestmark = pytest.mark.slow

DIMENSIONS = {"num_hidden_layers": 2, "max_position_embeddings": 128}
FAMILIES = {
    "llama": ("llama-spm32k", {}),
    "gpt_neox": ("gpt-neox-pythia", {}),
    "gptj": ("gptj", {"resid_pdrop": 0.3, "embd_pdrop": 0.3, "attn_pdrop": 0.3}),
}
"""Family → the folder of its tokenizer, and changes to the tiny configuration: GPT-J's dropout, which must stay off."""


@pytest.fixture(scope="module")
def family(shared, tmp_path_factory):
    """family(name): return the folder of a small random model of that family with its real tokenizer."""
    folders = {}

    def make(name):
        if name not in folders:
            folder = tmp_path_factory.mktemp(name)
            source, changes = FAMILIES[name]
            tokenizer = AutoTokenizer.from_pretrained(shared / "tokenizers" / source)
            model = build_tiny_policy(name, vocab_size=len(tokenizer), initializer_range=0.02, **DIMENSIONS, **changes)
            for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
                setattr(model.config, key, getattr(tokenizer, key))
                setattr(model.generation_config, key, getattr(tokenizer, key))
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            folders[name] = folder
        return folders[name]

    return make


@pytest.fixture
def run_iteration(run_train, records):
    """run_iteration(folder, *overrides): train once, check the metrics, and return their rows and the run directory."""

    def run(folder, *overrides, name="run"):
        directory = run_train(f"model.path={folder}", "iterations=1", "checkpoint.every=0", *overrides, name=name)
        rows = records(directory / "metrics.jsonl")
        assert all(math.isfinite(value) for row in rows for value in row.values())
        assert abs(rows[0]["eval/kl_exact"]) < 1e-6
        # Sampling with a KV cache and training without one give the same log-probs.
        assert rows[1]["policy/sampler_gap"] < 1e-5
        assert rows[1]["eval/kl_exact"] > 0
        return rows, directory

    return run


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_trains(name, family, run_iteration):
    _, directory = run_iteration(family(name))
    trained = AutoModelForCausalLM.from_pretrained(directory / "model")
    assert type(trained).__name__ == {"llama": "LlamaForCausalLM", "gptj": "GPTJForCausalLM"}.get(
        name, "GPTNeoXForCausalLM"
    )


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_trains_with_a_value_head_on_its_trunk(name, family, run_iteration):
    run_iteration(family(name), "critic=head", "critic.head=mlp", "algo=ppo")


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_trains_with_lora_on_policy_and_critic(name, family, run_iteration):
    _, directory = run_iteration(family(name), "lora=default", "lora.rank=2", "critic=adapter", "optimizer.lr=1e-3")
    before, after = (AutoModelForCausalLM.from_pretrained(folder) for folder in (family(name), directory / "model"))
    old, new = before.state_dict(), after.state_dict()
    assert old.keys() == new.keys()
    changed = {key for key in old if not torch.equal(old[key], new[key])}
    # peft's default layers: the attention's queries and values, in every block.
    targets = {"llama": ("q_proj", "v_proj"), "gptj": ("q_proj", "v_proj"), "gpt_neox": ("query_key_value",)}[name]
    assert len(changed) == 2 * len(targets) and all(key.split(".")[-2] in targets for key in changed)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_reward_model_of_every_family_learns_and_scores(name, family, tmp_path):
    """A reward model keeps its own tokenizer, since it may score the policy of another family."""
    overrides = [
        "reward_model.batch_size=4",
        "reward_model.lr=1e-2",
        "reward_model.max_tokens=40",
        "reward_model.held_out=8",
    ]
    config = build_config(compose(["model=local", f"model.path={family(name)}", *overrides, "reward_model.epochs=4"]))
    rows = [Example(f"Is {i} a number?", " Yes, it is.", " No.", {}) for i in range(24)]
    report = train_reward_model(config, rows[:16], rows[16:], 0, make_stage_context(tmp_path / "model"))
    assert report["accuracy"] == 1.0
    reward = ModelReward(str(tmp_path / "model"), 0, 1.0, False, None, 4, 40, RewardFormat.auto)
    score = reward.load(Placement("cpu", "float32"))
    good, bad = score(["Is 3 a number?"] * 2, [" Yes, it is.", " No."], [{}, {}])
    assert good > bad


@pytest.mark.parametrize("form", ["sharded", "bin"])
def test_folders_in_the_hubs_layouts_load(form, family, run_iteration, tmp_path):
    """Weights in several safetensors files with an index, or in one `.bin` file."""
    source, folder = family("gpt_neox"), tmp_path / form
    model, tokenizer = AutoModelForCausalLM.from_pretrained(source), AutoTokenizer.from_pretrained(source)
    if form == "sharded":
        model.save_pretrained(folder, max_shard_size="1MB")
        assert (folder / "model.safetensors.index.json").is_file() and len(list(folder.glob("*.safetensors"))) > 1
    else:
        model.config.save_pretrained(folder)
        model.generation_config.save_pretrained(folder)
        torch.save(model.state_dict(), folder / "pytorch_model.bin")
    tokenizer.save_pretrained(folder)
    rows, _ = run_iteration(folder)
    again, _ = run_iteration(source, name="again")
    assert rows[0]["eval/reward_mean"] == again[0]["eval/reward_mean"]


def test_positions_are_counted_without_padding(tiny, run_iteration, tmp_path):
    """GPT-2's positions are absolute; rotary positions are relative, so that a wrong start would not show."""
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    ends = dict(bos_token_id=0, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    model = build_tiny_policy("gpt2", vocab_size=len(tokenizer), **DIMENSIONS, **ends)
    model.save_pretrained(tmp_path / "gpt2")
    tokenizer.save_pretrained(tmp_path / "gpt2")
    run_iteration(tmp_path / "gpt2")


def copy_with_tokenizer(folder, tmp_path, change):
    """Copy a model's folder and change its tokenizer_config.json by `change`."""
    copy = tmp_path / "copied"
    shutil.copytree(folder, copy)
    for file in copy.glob("special_tokens_map.json"):
        file.unlink()
    config = json.loads((copy / "tokenizer_config.json").read_text())
    change(config)
    (copy / "tokenizer_config.json").write_text(json.dumps(config))
    return copy


def test_a_tokenizer_without_a_pad_token_trains(family, run_iteration, tmp_path):
    def change(config):
        config["tokenizer_class"] = "PreTrainedTokenizerFast"  # GPT-NeoX's tokenizer class always has a pad token
        del config["pad_token"]

    folder = copy_with_tokenizer(family("gpt_neox"), tmp_path, change)
    assert AutoTokenizer.from_pretrained(folder).pad_token is None
    run_iteration(folder)


def test_padding_with_the_end_token_changes_no_number(family, run_train, comparable, tmp_path):
    """Padding is never read: a run with EOS as pad token gives the numbers of a run with another pad token."""
    overrides = ["iterations=1", "checkpoint.every=0"]
    plain = run_train(f"model.path={family('gpt_neox')}", *overrides, name="plain")
    folder = copy_with_tokenizer(
        family("gpt_neox"), tmp_path, lambda config: config.update(pad_token=config["eos_token"])
    )
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    end = run_train(f"model.path={folder}", *overrides, name="end")
    for expected, row in zip(comparable(plain / "metrics.jsonl"), comparable(end / "metrics.jsonl"), strict=True):
        assert row == pytest.approx(expected, rel=1e-4, abs=1e-6)


# --- a real model -------------------------------------------------------------------------------------------

STORIES = [
    "dataset.test_prompts=20", "evaluation.prompts=20", "sampling.max_new_tokens=24",
]  # fmt: skip


@pytest.fixture(scope="module")
def stories(shared):
    """A LLaMA of 260 thousand parameters, trained on TinyStories, with tied embeddings."""
    return shared / "models" / "stories260k"


def test_replies_of_a_real_model_keep_their_first_space(stories, run_iteration, records):
    _, directory = run_iteration(stories, *STORIES)
    tokenizer = AutoTokenizer.from_pretrained(stories)
    rows = records(directory / "samples.jsonl")
    for row in rows:
        text = row["prompt"] + row["response"]
        assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text
        assert "<" not in row["response"]
    starts = [row["response"][:1] for row in rows if row["iteration"] == 0]
    # An opening ends with a whole word, so that a reply starts with a space or with punctuation.
    assert len(starts) == 20 and starts.count(" ") >= 8
    assert all(first in " .,!?'\"s" for first in starts)


def test_tied_embeddings_stay_tied(stories, run_iteration):
    _, directory = run_iteration(stories, *STORIES, "critic=head")
    model = AutoModelForCausalLM.from_pretrained(directory / "model")
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    before = AutoModelForCausalLM.from_pretrained(stories)
    assert not torch.equal(before.get_input_embeddings().weight, model.get_input_embeddings().weight)


def test_every_end_token_ends_a_reply(stories, run_iteration, records, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(stories)
    tokenizer = AutoTokenizer.from_pretrained(stories)
    assert find_end_token_ids(model, tokenizer) == {1, 2}
    folder = tmp_path / "full_stop"
    shutil.copytree(stories, folder)
    for file in folder.iterdir():
        file.chmod(0o644)
    generation = json.loads((folder / "generation_config.json").read_text())
    stop = tokenizer.convert_tokens_to_ids(".")
    generation["eos_token_id"] = [2, stop]
    (folder / "generation_config.json").write_text(json.dumps(generation))
    rows, directory = run_iteration(folder, *STORIES)
    replies = [row for row in records(directory / "samples.jsonl") if row["iteration"] == 0]
    ended = [row for row in replies if row["ending"] == "eos"]
    assert len(ended) >= 10 and rows[0]["eval/eos_rate"] == len(ended) / 20
    assert not any("." in row["response"] for row in replies)
