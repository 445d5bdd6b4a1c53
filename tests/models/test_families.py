"""Each family of models that the paper uses trains, with its own tokenizer: LLaMA, GPT-NeoX, GPT-J."""

import json
import math
import shutil

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPTJConfig,
    GPTNeoXConfig,
    LlamaConfig,
)

from apa_cli.config.build import build
from apa_cli.config.compose import compose
from apa_cli.models.loading import end_tokens
from apa_cli.rewards.base import Placement
from apa_cli.rewards.model import ModelReward
from apa_cli.stages.fitting import Workplace
from apa_cli.stages.reward_model import run_reward
from apa_cli.types import Example

FAMILIES = {
    "llama": (
        "llama-spm32k",
        lambda size: LlamaConfig(
            vocab_size=size, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=128,
        ),
    ),
    "gpt_neox": (
        "gpt-neox-pythia",
        lambda size: GPTNeoXConfig(
            vocab_size=size, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
            max_position_embeddings=128,
        ),
    ),
    "gptj": (
        "gptj",
        lambda size: GPTJConfig(
            vocab_size=size, n_embd=16, n_layer=2, n_head=2, rotary_dim=4, n_positions=128,
            resid_pdrop=0.3, embd_pdrop=0.3, attn_pdrop=0.3,
        ),
    ),
}  # fmt: skip
"""Name → its tokenizer's folder, and the family's own configuration with small dimensions. GPT-J's has
dropout, which must be off everywhere."""


@pytest.fixture(scope="module")
def family(shared, tmp_path_factory):
    """family(name) → the folder of a small random model of that family with its real tokenizer."""
    made = {}

    def make(name):
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            source, config = FAMILIES[name]
            tokenizer = AutoTokenizer.from_pretrained(shared / "tokenizers" / source)
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(config(len(tokenizer)))
            for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
                setattr(model.config, key, getattr(tokenizer, key))
                setattr(model.generation_config, key, getattr(tokenizer, key))
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            made[name] = folder
        return made[name]

    return make


@pytest.fixture
def one_iteration(run_train, records):
    """one_iteration(folder, *words) → the metrics' lines and the run's directory, checked to be finite."""

    def run(folder, *words, name="run"):
        directory = run_train(f"model.path={folder}", "iterations=1", "checkpoint.every=0", *words, name=name)
        rows = records(directory / "metrics.jsonl")
        assert all(math.isfinite(value) for row in rows for value in row.values())
        assert abs(rows[0]["eval/kl_exact"]) < 1e-6
        # The policy that sampled with a cache is the one that is trained without: the same log-probs.
        assert rows[1]["policy/sampler_gap"] < 1e-5
        assert rows[1]["eval/kl_exact"] > 0
        return rows, directory

    return run


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_trains(name, family, one_iteration):
    _, directory = one_iteration(family(name))
    trained = AutoModelForCausalLM.from_pretrained(directory / "model")
    assert type(trained).__name__ == {"llama": "LlamaForCausalLM", "gptj": "GPTJForCausalLM"}.get(
        name, "GPTNeoXForCausalLM"
    )


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_has_a_trunk_for_a_value_head(name, family, one_iteration):
    one_iteration(family(name), "critic=head", "critic.head=mlp", "algo=ppo")


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_trains_with_lora_on_policy_and_critic(name, family, one_iteration):
    _, directory = one_iteration(family(name), "lora=default", "lora.rank=2", "critic=adapter", "optimizer.lr=1e-3")
    before, after = (AutoModelForCausalLM.from_pretrained(folder) for folder in (family(name), directory / "model"))
    old, new = before.state_dict(), after.state_dict()
    assert old.keys() == new.keys()
    changed = {key for key in old if not torch.equal(old[key], new[key])}
    # peft's own choice of layers: the attention's queries and values, in every block.
    wanted = {"llama": ("q_proj", "v_proj"), "gptj": ("q_proj", "v_proj"), "gpt_neox": ("query_key_value",)}[name]
    assert len(changed) == 2 * len(wanted) and all(key.split(".")[-2] in wanted for key in changed)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_makes_a_reward_model(name, family, tmp_path):
    """Of its own tokenizer, which another family's policy is then scored by."""
    words = [
        "reward_model.batch_size=4",
        "reward_model.lr=1e-2",
        "reward_model.max_tokens=40",
        "reward_model.held_out=8",
    ]
    config = build(compose(["model=local", f"model.path={family(name)}", *words, "reward_model.epochs=4"]))
    rows = [Example(f"Is {i} a number?", " Yes, it is.", " No.", {}) for i in range(24)]
    place = Workplace(torch.device("cpu"), tmp_path / "model", lambda text: None, lambda *progress: None)
    report = run_reward(config, rows[:16], rows[16:], 0, place)
    assert report["accuracy"] == 1.0
    score = ModelReward(str(tmp_path / "model"), 0, 1.0, False, None, 4, 40).load(Placement("cpu", "float32"))
    good, bad = score(["Is 3 a number?"] * 2, [" Yes, it is.", " No."], [{}, {}])
    assert good > bad


@pytest.mark.parametrize("form", ["sharded", "bin"])
def test_folders_as_the_hub_lays_them_out(form, family, one_iteration, tmp_path):
    """Weights in several safetensors files with an index, or in one `.bin`."""
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
    rows, _ = one_iteration(folder)
    again, _ = one_iteration(source, name="again")
    assert rows[0]["eval/reward_mean"] == again[0]["eval/reward_mean"]


def test_positions_are_counted_without_the_padding(tiny, one_iteration, tmp_path):
    """Rotary positions are relative, so that a wrong start is not seen; GPT-2's are absolute."""
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    torch.manual_seed(0)
    ends = dict(bos_token_id=0, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    config = GPT2Config(
        vocab_size=len(tokenizer), n_positions=128, n_embd=16, n_layer=2, n_head=2, initializer_range=0.2, **ends
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "gpt2")
    tokenizer.save_pretrained(tmp_path / "gpt2")
    one_iteration(tmp_path / "gpt2")


def with_tokenizer(folder, tmp_path, change):
    """A copy of a model's folder whose tokenizer_config.json `change` has changed."""
    copied = tmp_path / "copied"
    shutil.copytree(folder, copied)
    for file in copied.glob("special_tokens_map.json"):
        file.unlink()
    config = json.loads((copied / "tokenizer_config.json").read_text())
    change(config)
    (copied / "tokenizer_config.json").write_text(json.dumps(config))
    return copied


def test_a_tokenizer_without_a_pad_token(family, one_iteration, tmp_path):
    def change(config):
        config["tokenizer_class"] = "PreTrainedTokenizerFast"  # GPT-NeoX's own class always names a pad token
        del config["pad_token"]

    folder = with_tokenizer(family("gpt_neox"), tmp_path, change)
    assert AutoTokenizer.from_pretrained(folder).pad_token is None
    one_iteration(folder)


def test_padding_with_the_end_token_changes_no_number(family, run_train, comparable, tmp_path):
    """What pads is never read: with EOS as pad a run gives the numbers it gives with another pad token."""
    words = ["iterations=1", "checkpoint.every=0"]
    own = run_train(f"model.path={family('gpt_neox')}", *words, name="own")
    folder = with_tokenizer(family("gpt_neox"), tmp_path, lambda config: config.update(pad_token=config["eos_token"]))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    end = run_train(f"model.path={folder}", *words, name="end")
    for expected, row in zip(comparable(own / "metrics.jsonl"), comparable(end / "metrics.jsonl"), strict=True):
        assert row == pytest.approx(expected, rel=1e-4, abs=1e-6)


# --- a real model -------------------------------------------------------------------------------------------

STORIES = [
    "dataset.test_prompts=20", "evaluation.prompts=20", "sampling.max_new_tokens=24",
]  # fmt: skip


@pytest.fixture(scope="module")
def stories(shared):
    """A LLaMA of 260 thousand parameters that was trained on TinyStories; its embeddings are tied."""
    return shared / "models" / "stories260k"


def test_a_real_model_trains_and_its_replies_keep_their_first_space(stories, one_iteration, records):
    _, directory = one_iteration(stories, *STORIES)
    tokenizer = AutoTokenizer.from_pretrained(stories)
    rows = records(directory / "samples.jsonl")
    for row in rows:
        text = row["prompt"] + row["response"]
        assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text
        assert "<" not in row["response"]
    begun = [row["response"][:1] for row in rows if row["iteration"] == 0]
    # An opening ends with a whole word, so that a reply goes on with a space or with punctuation.
    assert len(begun) == 20 and begun.count(" ") >= 8
    assert all(first in " .,!?'\"s" for first in begun)


def test_tied_embeddings_stay_tied(stories, one_iteration):
    _, directory = one_iteration(stories, *STORIES, "critic=head")
    model = AutoModelForCausalLM.from_pretrained(directory / "model")
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    before = AutoModelForCausalLM.from_pretrained(stories)
    assert not torch.equal(before.get_input_embeddings().weight, model.get_input_embeddings().weight)


def test_every_end_token_ends_a_reply(stories, one_iteration, records, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(stories)
    tokenizer = AutoTokenizer.from_pretrained(stories)
    assert end_tokens(model, tokenizer) == {1, 2}
    folder = tmp_path / "full_stop"
    shutil.copytree(stories, folder)
    for file in folder.iterdir():
        file.chmod(0o644)
    generation = json.loads((folder / "generation_config.json").read_text())
    stop = tokenizer.convert_tokens_to_ids(".")
    generation["eos_token_id"] = [2, stop]
    (folder / "generation_config.json").write_text(json.dumps(generation))
    rows, directory = one_iteration(folder, *STORIES)
    replies = [row for row in records(directory / "samples.jsonl") if row["iteration"] == 0]
    ended = [row for row in replies if row["ending"] == "eos"]
    assert len(ended) >= 10 and rows[0]["eval/eos_rate"] == len(ended) / 20
    assert not any("." in row["response"] for row in replies)
