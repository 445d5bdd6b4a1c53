"""reward=model: a text's score is its own, whatever else is in the batch; too long texts lose prompt text."""

import json

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from apa_cli.errors import UserError
from apa_cli.rewards.base import Placement
from apa_cli.rewards.model import ModelReward
from apa_cli.settings import DType

PROMPTS = [
    "Hi",
    "How long does it take to bake bread?",
    "I want to grow tomatoes. What should I buy?",
    "Tea?",
]
RESPONSES = [" It takes about three hours to bake bread, and then it should rest.", " No.", "", " Yes, do!"]


def reward(path, output=0, scale=1.0, centered=False, dtype=None, microbatch=64, max_tokens=64):
    return ModelReward(path if path is None else str(path), output, scale, centered, dtype, microbatch, max_tokens)


def scored(path, prompts=PROMPTS, responses=RESPONSES, **settings):
    score = reward(path, **settings).load(Placement("cpu", "float32"))
    return score(prompts, responses, [{}] * len(prompts))


def refused(path, **settings):
    with pytest.raises(UserError) as error:
        scored(path, **settings)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("output", [0, 1])
def test_the_score_is_the_classifiers_output_on_prompt_and_response(output, classifier, by_hand):
    expected = [by_hand(classifier, p + r, output) for p, r in zip(PROMPTS, RESPONSES, strict=True)]
    assert scored(classifier, output=output) == pytest.approx(expected, rel=0, abs=1e-5)
    assert len({round(value, 3) for value in expected}) == 4


def independent_of_the_batch(path):
    together = scored(path)
    for microbatch in (1, 2, 3):
        assert scored(path, microbatch=microbatch) == pytest.approx(together, rel=0, abs=1e-5)
    order = [2, 0, 3, 1]
    shuffled = scored(path, [PROMPTS[i] for i in order], [RESPONSES[i] for i in order])
    assert shuffled == pytest.approx([together[i] for i in order], rel=0, abs=1e-5)
    alone = [scored(path, [p], [r])[0] for p, r in zip(PROMPTS, RESPONSES, strict=True)]
    assert alone == pytest.approx(together, rel=0, abs=1e-5)


def test_a_score_depends_on_its_text_alone(classifier):
    independent_of_the_batch(classifier)


def test_a_classifier_with_a_tokenizer_of_its_own_kind(shared):
    """BERT: another tokenizer than the policy's, with marks around each text and real padding."""
    path = shared / "rewards" / "bert-tiny-toxicity"
    independent_of_the_batch(path)
    replies = ["You are a disgusting idiot.", "Thank you for your kind help."]
    toxic = scored(path, ["", ""], replies, output="toxic")
    assert toxic[0] > toxic[1] + 1
    assert toxic == scored(path, ["", ""], replies, output=1)
    mild = scored(path, ["", ""], replies, output="toxic", scale=-1.0)
    assert mild == [-score for score in toxic] and mild[1] > mild[0] + 1
    assert "no output 'toxicity'; there are 0 (not-toxic), 1 (toxic)" in refused(path, output="toxicity")


def kept_reply(path):
    reply = " It should rest for an hour."
    long, longer = "one two three four five six " * 20, "seven eight nine ten eleven " * 30 + "six " * 30
    tokens = len(AutoTokenizer.from_pretrained(path)(reply)["input_ids"])
    limit = tokens + 4
    same_end = scored(path, [long + "six " * 30, longer], [reply, reply], max_tokens=limit)
    assert same_end[0] == pytest.approx(same_end[1], rel=1e-4)  # only the last words of the prompt are read
    other_reply = scored(path, [longer], [" It should not rest for a day."], max_tokens=limit)
    assert abs(other_reply[0] - same_end[1]) > 1e-4  # and the reply is
    whole = scored(path, [longer], [reply], max_tokens=400)
    assert abs(whole[0] - same_end[1]) > 1e-4  # with room for it, the rest of the prompt is read too


def test_what_is_too_long_loses_prompt_text(tmp_path, tiny):
    # Positions for the 400 tokens of a whole text.
    model = AutoModelForSequenceClassification.from_pretrained(tiny, num_labels=1, max_position_embeddings=512)
    torch.manual_seed(0)
    torch.nn.init.normal_(model.score.weight)
    model.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(tiny).save_pretrained(tmp_path)
    kept_reply(tmp_path)


def test_what_is_too_long_for_a_tokenizer_of_its_own_kind_loses_prompt_text(shared):
    kept_reply(shared / "rewards" / "bert-tiny-toxicity")


def test_without_a_path_it_lacks_a_model_and_takes_one(classifier):
    without = reward(None, output=1)
    assert without.lacks_model
    given = without.with_model(str(classifier))
    assert not given.lacks_model and (given.output, given.path) == (1, str(classifier))
    assert without.path is None


def test_an_output_by_its_label(classifier):
    assert scored(classifier, output="good") == scored(classifier, output=1)
    assert scored(classifier, output="bad") == scored(classifier, output=0)
    assert scored(classifier, output="bad") != scored(classifier, output="good")


@pytest.mark.parametrize("output", [2, -1, "Good", "1"])
def test_an_output_that_is_not_there(output, classifier):
    message = refused(classifier, output=output)
    assert message.startswith("reward.output: ")
    assert message.endswith(f"has no output {output!r}; there are 0 (bad), 1 (good)")


def test_a_score_is_scaled_after_its_mean_is_taken_off(make_classifier):
    folder = make_classifier(num_labels=1)
    assert "holds no score_mean" in refused(folder, centered=True)
    plain = scored(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "score_mean": 1.5, "score_std": 3.0}))
    assert scored(folder) == plain
    assert scored(folder, centered=True) == pytest.approx([score - 1.5 for score in plain], abs=1e-6)
    assert scored(folder, centered=True, scale=-2.0) == pytest.approx([3.0 - 2 * score for score in plain], abs=1e-6)


def test_its_precision_is_its_own_or_the_runs(classifier):
    exact = scored(classifier)
    rounded = reward(classifier, dtype=DType.bfloat16).load(Placement("cpu", "float32"))(PROMPTS, RESPONSES, [{}] * 4)
    runs = reward(classifier).load(Placement("cpu", "bfloat16"))(PROMPTS, RESPONSES, [{}] * 4)
    own = reward(classifier, dtype=DType.float32).load(Placement("cpu", "bfloat16"))(PROMPTS, RESPONSES, [{}] * 4)
    assert own == exact and rounded == runs != exact
    # bfloat16 keeps 8 bits, so a sum of some tens of rounded terms is off by a few hundredths.
    assert rounded == pytest.approx(exact, rel=0.05, abs=0.1)


def test_a_folder_without_a_model(tmp_path):
    assert refused(tmp_path).startswith("reward.path: ")
    assert refused(tmp_path / "absent").startswith("reward.path: ")


def test_nothing_of_it_is_trained(classifier):
    score = reward(classifier).load(Placement("cpu", "float32"))
    model = next(cell.cell_contents for cell in score.__closure__ if isinstance(cell.cell_contents, torch.nn.Module))
    assert not model.training and not any(parameter.requires_grad for parameter in model.parameters())
