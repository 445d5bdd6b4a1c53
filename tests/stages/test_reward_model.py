"""The reward model's stage: its loss and metrics by hand, a model that learns, and the folder that it leaves."""

import json
import math
from dataclasses import replace

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

from apa_cli.config.build import build_config
from apa_cli.config.compose import compose
from apa_cli.datasets.embedded import EmbeddedDataset
from apa_cli.errors import UserError
from apa_cli.models.reward_text import encode_reward_text
from apa_cli.rewards.base import Placement
from apa_cli.rewards.model import ModelReward
from apa_cli.settings import RewardFormat
from apa_cli.stages.reward_model import (
    bradley_terry_loss,
    compute_preference_metrics,
    compute_subset_accuracies,
    train_reward_model,
)
from apa_cli.types import Example
from tests.builders import make_stage_context

TWO_EPOCHS = (
    "epochs=2", "batch_size=8", "lr=5e-3", "weight_decay=0", "warmup_ratio=0.1", "max_tokens=100", "held_out=20",
)  # fmt: skip
THREE_EPOCHS = ("epochs=3", "batch_size=8", "lr=5e-3", "eval_every=4", "max_tokens=100", "held_out=20")


def configure_model(folder, settings: tuple[str, ...], *overrides: str):
    """Return a configuration whose stage starts from the model in `folder`."""
    of_stage = [f"reward_model.{override}" for override in settings]
    return build_config(compose(["model=local", f"model.path={folder}", *of_stage, *overrides]))


def test_bradley_terry_loss_by_hand():
    chosen, rejected = torch.tensor([2.0, -1.0]), torch.tensor([1.0, 1.0])
    # −log σ(1) = log(1 + e⁻¹) = 0.3133; −log σ(−2) = log(1 + e²) = 2.1269. Centred: 0.1 · 3² = 0.9; 0.1 · 0² = 0.
    assert bradley_terry_loss(chosen, rejected, 0.0).tolist() == pytest.approx([0.313262, 2.126928], abs=1e-5)
    assert bradley_terry_loss(chosen, rejected, 0.1).tolist() == pytest.approx([1.213262, 2.126928], abs=1e-5)


def test_subset_accuracies_by_hand():
    rows = [Example("p", "a", "b", {"subset": name}) for name in ("kind", "wise", "kind", "kind")]
    report = compute_subset_accuracies(rows, [1.0, 0.0, 1.0, 0.0], [0.0, 1.0, 0.0, 1.0])
    assert report["accuracy/kind"] == pytest.approx(2 / 3) and report["accuracy/wise"] == 0.0
    assert report["accuracy_ci/kind"] == pytest.approx(1.96 * math.sqrt(2 / 3 * 1 / 3 / 3))
    assert compute_subset_accuracies([Example("p", "a", "b", {})], [1.0], [0.0]) == {}


def test_center_coef_centres_the_scores_and_the_metrics_have_the_subsets(tiny, tmp_path):
    rows = EmbeddedDataset(80, 20, 1, []).load("train")
    rows = [replace(row, columns={"subset": "even" if i % 2 == 0 else "odd"}) for i, row in enumerate(rows)]
    means = {}
    for coefficient in ("0", "1"):
        config = configure_model(tiny, THREE_EPOCHS, f"reward_model.center_coef={coefficient}")
        report = train_reward_model(config, rows[:60], rows[60:], 0, make_stage_context(tmp_path / coefficient))
        assert {"accuracy/even", "accuracy/odd"} <= report.keys()
        means[coefficient] = abs(report["score_mean"])
    assert means["0"] > 0.1  # pairs on which scores drift: the Bradley-Terry loss does not see their mean
    assert means["1"] < 0.2 * means["0"]


def test_a_lora_reward_model_is_saved_merged_and_as_an_adapter_with_its_head(tiny, tmp_path):
    rows = EmbeddedDataset(80, 20, 0, []).load("train")
    config = configure_model(tiny, THREE_EPOCHS, "lora=default", "lora.rank=3")
    train_reward_model(config, rows[:60], rows[60:], 0, make_stage_context(tmp_path / "model"))
    ids = torch.tensor([[7, 99, 31, 4]])
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model").eval()(ids).logits
    base = AutoModelForSequenceClassification.from_pretrained(tiny, num_labels=1)
    adapted = PeftModel.from_pretrained(base, tmp_path / "model" / "adapter").eval()
    torch.testing.assert_close(adapted(ids).logits, merged, rtol=1e-4, atol=1e-5)
    stored = json.loads((tmp_path / "model" / "adapter" / "adapter_config.json").read_text())
    assert stored["task_type"] == "SEQ_CLS" and stored["modules_to_save"] == ["score"]
    assert float(merged.detach().abs().sum()) > 0


def test_a_lora_reward_model_is_trained_on_a_trunk_in_bfloat16_with_a_head_in_float32(tiny, tmp_path):
    rows = EmbeddedDataset(30, 10, 0, []).load("train")
    config = configure_model(tiny, ("epochs=1", "batch_size=8"), "lora=default", "model.dtype=bfloat16")
    train_reward_model(config, rows[:20], rows[20:], 0, make_stage_context(tmp_path / "model"))
    adapter = load_file(tmp_path / "model" / "adapter" / "adapter_model.safetensors")
    trained = [tensor for name, tensor in adapter.items() if "lora_B" in name or name.endswith("score.weight")]
    assert len(trained) > 1 and all(tensor.dtype is torch.float32 and bool(tensor.any()) for tensor in trained)


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
    config = configure_model(tiny, TWO_EPOCHS)
    report = train_reward_model(config, train, test, 0, make_stage_context(folder))
    assert report["accuracy"] == 1.0 and report["margin"] > 0.5
    assert (report["pairs"], report["held_out_pairs"]) == (64, 10)
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert model.config.num_labels == 1
    scores = []
    for example in train:
        for reply in (example.chosen, example.rejected):
            ids = torch.tensor([encode_reward_text(tokenizer, example.prompt, reply, 100)])
            with torch.no_grad():
                scores.append(float(model(ids).logits[0, 0]))
    stored = json.loads((folder / "config.json").read_text())
    mean = sum(scores) / len(scores)
    assert stored["score_mean"] == pytest.approx(mean, rel=1e-4, abs=1e-5)
    deviation = math.sqrt(sum((score - mean) ** 2 for score in scores) / len(scores))
    assert stored["score_std"] == pytest.approx(deviation, rel=1e-4)
    assert report["score_mean"] == stored["score_mean"] and report["score_std"] == stored["score_std"]


def test_data_without_replies_is_refused(tiny, tmp_path):
    rows = [Example("a prompt", None, None, {})]
    with pytest.raises(UserError, match=r"^reward_model: the data set has no") as error:
        train_reward_model(configure_model(tiny, TWO_EPOCHS), rows, rows, 0, make_stage_context(tmp_path / "x"))
    assert "\n" not in str(error.value)


BASES = {
    "roberta": (AutoModelForMaskedLM, {"intermediate_size": 64}),
    "bert": (AutoModelForMaskedLM, {"intermediate_size": 64}),  # its masked language model has no pooler
    "gpt2": (AutoModelForCausalLM, {}),
}


def save_base(folder, kind: str, tokenizer):
    """Save a language model of two small layers and 40 positions, with random weights."""
    build, changes = BASES[kind]
    dimensions = {
        "vocab_size": len(tokenizer), "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
        "max_position_embeddings": 40, "pad_token_id": tokenizer.pad_token_id, **changes,
    }  # fmt: skip
    torch.manual_seed(0)
    build.from_config(AutoConfig.for_model(kind, **dimensions)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@pytest.mark.slow
@pytest.mark.parametrize("lora", [(), ("lora=default", "lora.target_modules=[all-linear]")], ids=["whole", "lora"])
@pytest.mark.parametrize("kind", BASES)
def test_any_trunk_learns_within_its_positions_and_scores_as_it_was_saved(kind, lora, tiny, tmp_path):
    save_base(tmp_path / "base", kind, AutoTokenizer.from_pretrained(tiny))
    rows = [Example("Is it so? " * (30 if i % 8 == 0 else 1), f" Yes, {i}.", f" No, {i}.", {}) for i in range(64)]
    settings = ("epochs=6", "batch_size=8", "lr=5e-3", "weight_decay=0", "max_tokens=100")
    said = []
    context = replace(make_stage_context(tmp_path / "model"), say=said.append)
    report = train_reward_model(configure_model(tmp_path / "base", settings, *lora), rows[:56], rows[56:], 0, context)
    assert report["accuracy"] >= (0.8 if lora else 1.0)  # an adapter of a random trunk learns more slowly
    # Seven of 56 rows and one of 8 are longer than the 40 positions; RoBERTa's first positions are for padding.
    limit = 40 - 1 - AutoTokenizer.from_pretrained(tiny).pad_token_id if kind == "roberta" else 40
    assert [line for line in said if "longer" in line] == [
        f"reward model: {count} texts are longer than {limit} tokens and lose the start of their prompt"
        for count in ("14 of 112", "2 of 16")
    ]
    texts = ([row.prompt for row in rows[:9]] * 2, [" Yes, 5."] * 9 + [" No, 5."] * 9, [{}] * 18)
    scored: list[list[float]] = []
    for folder in (tmp_path / "model", *([tmp_path / "model" / "adapter"] if lora else [])):
        reward = ModelReward(str(folder), 0, 1.0, False, None, 3, 100, RewardFormat.auto)
        score = reward.load(Placement("cpu", "float32"))
        scores = score(*texts)
        assert lora or min(scores[:9]) > max(scores[9:])
        alone = [score([prompt], [reply], [{}])[0] for prompt, reply, _ in zip(*texts, strict=True)]
        assert scores == pytest.approx(alone, rel=0, abs=1e-5)  # padding changes nothing
        scored.append(scores)
        assert scores == pytest.approx(scored[0], rel=1e-4, abs=1e-5)  # the adapter alone scores the same


def test_the_format_of_the_texts_is_stored_with_the_model(tiny, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    tokenizer.chat_template = "{% for m in messages %}<{{m.role}}>{{m.content}}{{eos_token}}{% endfor %}"
    AutoModelForCausalLM.from_pretrained(tiny).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    rows = [Example("Is it?", " Yes.", " No.", {}) for _ in range(8)]
    for chosen, stored in (("auto", "chat"), ("plain", "plain")):
        folder = tmp_path / chosen
        config = configure_model(tmp_path / "base", ("max_tokens=100",), f"reward_model.format={chosen}")
        train_reward_model(config, rows, rows, 0, make_stage_context(folder))
        assert json.loads((folder / "config.json").read_text())["reward_format"] == stored
    with pytest.raises(UserError, match=r"^reward_model\.format: chat needs a reward tokenizer with a chat template"):
        config = configure_model(tiny, (), "reward_model.format=chat")
        train_reward_model(config, rows, rows, 0, make_stage_context(tmp_path / "none"))


def test_scores_of_a_pair_that_differ_by_rounding_tie():
    # 2⁻¹⁸ · 3 = 1.1e-5: 1e-5 is rounding, 2e-5 is not
    metrics = compute_preference_metrics([3 + 1e-5, 3.0, 3 + 2e-5], [3.0, 3 + 1e-5, 3.0], [1] * 6)
    assert metrics["accuracy"] == pytest.approx((0.5 + 0.5 + 1) / 3)
