"""reward=model: a text's score is its own, whatever else is in the batch; too long texts lose prompt text."""

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from apa_cli.rewards.model import ModelReward
from apa_cli.types import UserError

PROMPTS = [
    "Hi",
    "How long does it take to bake bread?",
    "I want to grow tomatoes. What should I buy?",
    "Tea?",
]
RESPONSES = [" It takes about three hours to bake bread, and then it should rest.", " No.", "", " Yes, do!"]


@pytest.fixture(scope="module")
def classifier(tiny, tmp_path_factory):
    """A two-output GPT-NeoX classifier with random weights and the tiny model's tokenizer."""
    folder = tmp_path_factory.mktemp("classifier")
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(tiny, num_labels=2)
    torch.nn.init.normal_(model.score.weight)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny).save_pretrained(folder)
    return folder


def scored(path, prompts=PROMPTS, responses=RESPONSES, output=0, microbatch=64, max_tokens=64):
    score = ModelReward(str(path), output, microbatch, max_tokens).load("cpu", "float32")
    return score(prompts, responses, [{}] * len(prompts))


def by_hand(path, text, output):
    """The classifier's output on the tokens of one text, without padding."""
    ids = AutoTokenizer.from_pretrained(path)(text, return_tensors="pt")["input_ids"]
    model = AutoModelForSequenceClassification.from_pretrained(path).eval()
    with torch.no_grad():
        return float(model(ids, attention_mask=torch.ones_like(ids)).logits[0, output])


@pytest.mark.parametrize("output", [0, 1])
def test_the_score_is_the_classifiers_output_on_prompt_and_response(output, classifier):
    expected = [by_hand(classifier, p + r, output) for p, r in zip(PROMPTS, RESPONSES, strict=True)]
    assert scored(classifier, output=output) == pytest.approx(expected, rel=1e-4, abs=1e-5)
    assert len({round(value, 3) for value in expected}) == 4


def independent_of_the_batch(path):
    together = scored(path)
    for microbatch in (1, 2, 3):
        assert scored(path, microbatch=microbatch) == pytest.approx(together, rel=1e-4, abs=1e-5)
    order = [2, 0, 3, 1]
    shuffled = scored(path, [PROMPTS[i] for i in order], [RESPONSES[i] for i in order])
    assert shuffled == pytest.approx([together[i] for i in order], rel=1e-4, abs=1e-5)
    alone = [scored(path, [p], [r])[0] for p, r in zip(PROMPTS, RESPONSES, strict=True)]
    assert alone == pytest.approx(together, rel=1e-4, abs=1e-5)


def test_a_score_depends_on_its_text_alone(classifier):
    independent_of_the_batch(classifier)


def test_a_classifier_with_a_tokenizer_of_its_own_kind(shared):
    """BERT: another tokenizer than the policy's, with marks around each text and real padding."""
    path = shared / "rewards" / "bert-tiny-toxicity"
    independent_of_the_batch(path)
    toxic = scored(path, ["", ""], ["You are a disgusting idiot.", "Thank you for your kind help."], output=1)
    assert toxic[0] > toxic[1] + 1


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
    reward = ModelReward(None, 1, 64, 64)
    assert reward.lacks_model
    given = reward.with_model(str(classifier))
    assert not given.lacks_model and (given.output, given.path) == (1, str(classifier))
    assert reward.path is None


def test_an_output_that_is_not_there(classifier):
    with pytest.raises(UserError, match=r"reward\.output: .* has 2 outputs") as error:
        scored(classifier, output=2)
    assert "\n" not in str(error.value)


def test_a_folder_without_a_model(tmp_path):
    with pytest.raises(UserError, match=r"reward\.path") as error:
        scored(tmp_path)
    assert "\n" not in str(error.value)


def test_nothing_of_it_is_trained(classifier):
    score = ModelReward(str(classifier), 0, 64, 64).load("cpu", "float32")
    model = next(cell.cell_contents for cell in score.__closure__ if isinstance(cell.cell_contents, torch.nn.Module))
    assert not model.training and not any(parameter.requires_grad for parameter in model.parameters())
