"""The stages before RL: SFT's targets and perplexity, the reward model's metrics, and the cache of stage models."""

import json
import math
import random
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from apa_cli.config.build import build as build_config
from apa_cli.config.compose import compose
from apa_cli.datasets.base import PromptStyle
from apa_cli.datasets.embedded import EmbeddedDataset
from apa_cli.errors import UserError
from apa_cli.models.prompting import PromptFormat
from apa_cli.models.reward_model import encode_text
from apa_cli.stages import cache
from apa_cli.stages.reward_model import compute_preference_metrics, train_reward_model
from apa_cli.stages.sft import compute_perplexity, train_sft_model
from apa_cli.types import Example
from tests.builders import make_stage_context

OVERRIDES = [
    "sft.epochs=2", "sft.batch_size=8", "sft.lr=5e-3", "sft.weight_decay=0", "sft.warmup_ratio=0.1",
    "sft.max_tokens=100", "sft.held_out=20", "reward_model.epochs=2", "reward_model.batch_size=8",
    "reward_model.lr=5e-3",
    "reward_model.weight_decay=0", "reward_model.warmup_ratio=0.1", "reward_model.max_tokens=100",
    "reward_model.held_out=20",
]  # fmt: skip
ROWS = EmbeddedDataset(80, 20, 0, [])


def configure_model(folder, *overrides):
    """Return a configuration whose stages start from the model in `folder`."""
    return build_config(compose([*OVERRIDES, "model=local", f"model.path={folder}", *overrides]))


def encode_target(tokenizer, prompt, reply, max_tokens):
    return PromptFormat(tokenizer, PromptStyle.hh).encode_target(Example(prompt, reply, None, {}), max_tokens)


@pytest.fixture(scope="module")
def tokenizer(tiny):
    return AutoTokenizer.from_pretrained(tiny)


# --- SFT ----------------------------------------------------------------------------------------------------

PROMPT, REPLY = "\n\nHuman: How long does it take?\n\nAssistant:", " It takes about three hours."


def test_the_target_is_the_reply_and_eos(tokenizer):
    ids, flags = encode_target(tokenizer, PROMPT, REPLY, max_tokens=100)
    prompt = tokenizer(PROMPT)["input_ids"]
    assert ids[: len(prompt)] == prompt and not any(flags[: len(prompt)]) and all(flags[len(prompt) :])
    assert ids[-1] == tokenizer.eos_token_id and tokenizer.decode(ids[len(prompt) : -1]) == REPLY
    assert len(ids) == len(flags)


def test_a_long_dialogue_loses_prompt_tokens_on_the_left(tokenizer):
    whole, flags = encode_target(tokenizer, PROMPT, REPLY, max_tokens=100)
    reply = sum(flags)
    for max_tokens in (len(whole), len(whole) - 1, reply + 3, reply + 1):
        ids, cut_flags = encode_target(tokenizer, PROMPT, REPLY, max_tokens)
        assert ids == whole[-max_tokens:] and sum(cut_flags) == reply and cut_flags == flags[-max_tokens:]


def test_a_long_reply_is_cut_and_has_no_eos(tokenizer):
    whole, flags = encode_target(tokenizer, PROMPT, REPLY, max_tokens=100)
    prompt, reply = whole[: -sum(flags)], whole[-sum(flags) :]
    max_tokens = 4
    ids, cut_flags = encode_target(tokenizer, PROMPT, REPLY, max_tokens)
    # The last token of the prompt, which predicts the first of the reply, and the reply's first three.
    assert ids == [prompt[-1], *reply[:3]] and cut_flags == [False, True, True, True]
    assert tokenizer.eos_token_id not in ids


def test_perplexity_by_hand(tiny, tokenizer):
    model = AutoModelForCausalLM.from_pretrained(tiny).eval()
    rows = [
        encode_target(tokenizer, PROMPT, REPLY, 100),
        encode_target(tokenizer, PROMPT + " more", " No.", 100),
        encode_target(tokenizer, "x", " Yes, it does.", 100),
    ]
    total, count = 0.0, 0
    for ids, flags in rows:
        with torch.no_grad():
            logprobs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        for position, token in enumerate(ids):
            if flags[position]:
                total, count = total + float(logprobs[position - 1, token]), count + 1
    expected = math.exp(-total / count)
    for batch in (1, 2, 3):
        assert compute_perplexity(model, rows, tokenizer.pad_token_id, batch) == pytest.approx(expected, rel=1e-4)


def test_sft_lowers_perplexity_and_is_repeatable(tiny, tmp_path):
    train, test = ROWS.load("train"), ROWS.load("test")
    results = []
    for name in ("first", "second"):
        torch.manual_seed(random.randrange(1000))
        results.append(train_sft_model(configure_model(tiny), train, test, 0, make_stage_context(tmp_path / name)))
    first, second = results
    assert first["perplexity_after"] < 0.5 * first["perplexity_before"]
    assert first == second and first["replies"] == 80
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("first", "second")]
    assert weights[0] == weights[1]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "first").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "first")
    rows = [encode_target(tokenizer, e.prompt, e.chosen, 100) for e in test]
    assert compute_perplexity(model, rows, tokenizer.pad_token_id, 8) == pytest.approx(
        first["perplexity_after"], rel=1e-4
    )


def test_sft_builds_a_model_without_model_path(tmp_path):
    dimensions = ["hidden_size=16", "num_hidden_layers=1", "num_attention_heads=2", "intermediate_size=16"]
    architecture = [f"model.architecture.{dimension}" for dimension in dimensions]
    config = build_config(compose([*OVERRIDES, *architecture, "model.tokenizer_vocabulary=320", "sft.epochs=1"]))
    train, test = ROWS.load("train"), ROWS.load("test")
    train_sft_model(config, train, test, 0, make_stage_context(tmp_path / "model"))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert model.config.vocab_size == len(tokenizer) == 320
    assert model.config.eos_token_id == tokenizer.eos_token_id != tokenizer.pad_token_id


@pytest.mark.parametrize("stage", ["sft", "reward_model"])
def test_a_stage_without_replies_is_refused(stage, tiny, tmp_path):
    rows = [Example("a prompt", None, None, {})]
    with pytest.raises(UserError, match=f"^{stage}: the data set has no") as error:
        if stage == "sft":
            train_sft_model(configure_model(tiny), rows, rows, 0, make_stage_context(tmp_path / "x"))
        else:
            train_reward_model(configure_model(tiny), rows, rows, 0, make_stage_context(tmp_path / "x"))
    assert "\n" not in str(error.value)


# --- the reward model ---------------------------------------------------------------------------------------


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def test_preference_metrics_by_hand():
    chosen, rejected = [2.0, 1.0, 0.0, 1.0], [0.0, 1.0, 1.0, 0.9]
    # Differences 2, 0, −1, 0.1: correct, a tie, wrong, correct.
    report = compute_preference_metrics(chosen, rejected, [4, 3, 2, 3, 2, 3, 1, 3])
    accuracy = (1 + 0.5 + 0 + 1) / 4
    assert report["accuracy"] == accuracy == 0.625
    assert report["accuracy_ci"] == pytest.approx(1.96 * math.sqrt(0.625 * 0.375 / 4))  # 0.4744
    assert report["margin"] == pytest.approx((2 + 0 - 1 + 0.1) / 4)
    # σ(2) = 0.8808 is in bin 7 of the ten from 0.5 to 1, σ(1) = 0.7311 in bin 4, σ(0) = 0.5 and
    # σ(0.1) = 0.5250 both in bin 0: the mean confidence is 0.5125 and the accuracy 0.75 there.
    error = abs(sigmoid(2) - 1) / 4 + abs(sigmoid(1) - 0) / 4 + abs((0.5 + sigmoid(0.1)) / 2 - 0.75) / 2
    assert report["calibration_error"] == pytest.approx(error)
    # Scores 2 1 0 1 0 1 1 .9 (mean 0.8625) against lengths 4 3 2 3 2 3 1 3 (mean 2.625), Pearson:
    scores, lengths = [*chosen, *rejected], [4, 3, 2, 3, 2, 3, 1, 3]
    ds, dl = [s - 0.8625 for s in scores], [x - 2.625 for x in lengths]
    r = sum(a * b for a, b in zip(ds, dl, strict=True)) / math.sqrt(sum(a * a for a in ds) * sum(b * b for b in dl))
    assert report["length_correlation"] == pytest.approx(r)


def test_preference_metrics_of_equal_scores():
    report = compute_preference_metrics([1.0, 1.0], [1.0, 1.0], [3, 4, 5, 6])
    assert report["accuracy"] == 0.5 and report["length_correlation"] == 0.0 and report["calibration_error"] == 0.0


def test_a_confidence_of_1_is_in_the_last_bin():
    report = compute_preference_metrics([1000.0], [0.0], [1, 2])
    assert report["calibration_error"] == pytest.approx(0.0, abs=1e-9) and report["accuracy"] == 1.0


def test_the_reward_stage_learns_and_stores_the_moments_of_its_scores(tiny, tmp_path):
    # A preference that is easy to learn: the chosen reply says yes.
    train = [Example(f"Is {i} more than zero?", " Yes, it is.", " No, it is not.", {}) for i in range(1, 65)]
    test = [Example(f"Is {i} more than zero?", " Yes, it is.", " No, it is not.", {}) for i in range(70, 80)]
    folder = tmp_path / "model"
    report = train_reward_model(configure_model(tiny), train, test, 0, make_stage_context(folder))
    assert report["accuracy"] == 1.0 and report["margin"] > 0.5
    assert (report["pairs"], report["held_out_pairs"]) == (64, 10)
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert model.config.num_labels == 1
    scores = []
    for example in train:
        for reply in (example.chosen, example.rejected):
            ids = torch.tensor([encode_text(tokenizer, example.prompt, reply, 100)])
            with torch.no_grad():
                scores.append(float(model(ids).logits[0, 0]))
    stored = json.loads((folder / "config.json").read_text())
    mean = sum(scores) / len(scores)
    assert stored["score_mean"] == pytest.approx(mean, rel=1e-4, abs=1e-5)
    deviation = math.sqrt(sum((score - mean) ** 2 for score in scores) / len(scores))
    assert stored["score_std"] == pytest.approx(deviation, rel=1e-4)
    assert report["score_mean"] == stored["score_mean"] and report["score_std"] == stored["score_std"]


# --- the cache ----------------------------------------------------------------------------------------------


@pytest.fixture
def build():
    """Return a stand-in for a stage that counts its calls."""

    def builder(folder):
        builder.calls += 1
        (folder / "weights").write_text("some")
        if builder.fails:
            raise RuntimeError("out of memory")
        return {"accuracy": 0.5}

    builder.calls, builder.fails = 0, False
    return builder


@pytest.fixture
def find_or_build(configured, tmp_path, build):
    """Return a function (*overrides, key=, rows=, stage=) → the folder of the cached stage model."""

    def call(*overrides, key=None, rows=(), stage="sft"):
        config = configured(f"stages.cache_dir={tmp_path}/cache", *overrides)
        return cache.find_or_build(config, stage, key or {"lr": 1}, [list(rows), []], build, lambda text: None)

    return call


def test_a_stage_is_built_once(find_or_build, build):
    folder = find_or_build()
    assert (folder / "weights").read_text() == "some"
    assert json.loads((folder / "stage.json").read_text())["result"] == {"accuracy": 0.5}
    assert find_or_build() == folder and build.calls == 1


def test_the_cache_key_holds_what_determines_a_stage_but_not_the_runs_seed(find_or_build, build):
    row = Example("prompt", "good", "bad", {})
    folders = [
        find_or_build(),
        find_or_build("stages.seed=1"),
        find_or_build(key={"lr": 2}),
        find_or_build(rows=[row]),
        find_or_build(rows=[replace(row, chosen="better")]),
        find_or_build(rows=[replace(row, rejected="worse")]),
        find_or_build(stage="reward"),
    ]
    assert len(set(folders)) == build.calls == 7
    assert find_or_build("seed=5", "iterations=9", "optimizer.lr=0.1") == folders[0] and build.calls == 7


def test_a_failed_build_leaves_nothing_behind(find_or_build, build, tmp_path):
    build.fails = True
    with pytest.raises(RuntimeError, match="out of memory"):
        find_or_build()
    assert not [path for path in (tmp_path / "cache").iterdir() if path.is_dir()]
    build.fails = False
    assert (find_or_build() / "stage.json").is_file() and build.calls == 2


def test_runs_of_several_seeds_share_their_stages(configured, tmp_path, capsys):
    from apa_cli.training.launch import start_training

    overrides = [
        "reward=model", "model=embedded", "dataset=embedded", "~reward.target", "~model.path",
        "model.tokenizer_vocabulary=400",
        "model.architecture.hidden_size=32", "model.architecture.num_hidden_layers=1", "sft.epochs=1",
        "model.architecture.intermediate_size=32", f"stages.cache_dir={tmp_path}/cache", "iterations=1",
        "checkpoint.every=0",
    ]  # fmt: skip
    for seed in (0, 1):
        start_training(configured(*overrides, f"name=seed_{seed}", f"seed={seed}"), tmp_path / f"seed_{seed}", None)
    logs = [(tmp_path / f"seed_{seed}" / "run.log").read_text() for seed in (0, 1)]
    for stage in ("building the SFT model", "training the reward model"):
        assert stage in logs[0] and stage not in logs[1]
    assert "sft model from the cache" in logs[1] and "reward model from the cache" in logs[1]
    folders = sorted(path.name.split("-")[0] for path in (tmp_path / "cache").iterdir() if path.is_dir())
    assert folders == ["reward", "sft"]
