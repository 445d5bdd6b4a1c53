"""reward=model: scores do not depend on the batch; long texts lose prompt text; outputs, scale and precision."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from apa_cli.errors import UserError
from apa_cli.rewards.base import Placement
from apa_cli.rewards.model import ModelReward
from apa_cli.settings import DType, RewardFormat

PROMPTS = [
    "Hi",
    "How long does it take to bake bread?",
    "I want to grow tomatoes. What should I buy?",
    "Tea?",
]
RESPONSES = [" It takes about three hours to bake bread, and then it should rest.", " No.", "", " Yes, do!"]


def make_reward(
    path, output=0, scale=1.0, centered=False, dtype=None, microbatch=64, max_tokens=64, format=RewardFormat.auto
):
    path = path if path is None else str(path)
    return ModelReward(path, output, scale, centered, dtype, microbatch, max_tokens, format)


def score_with(path, prompts=PROMPTS, responses=RESPONSES, **settings):
    score = make_reward(path, **settings).load(Placement("cpu", "float32"))
    return score(prompts, responses, [{}] * len(prompts))


def get_load_error(path, **settings):
    with pytest.raises(UserError) as error:
        score_with(path, **settings)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("output", [0, 1])
def test_the_score_is_the_classifiers_output(output, classifier, score_one_text):
    expected = [score_one_text(classifier, p + r, output) for p, r in zip(PROMPTS, RESPONSES, strict=True)]
    assert score_with(classifier, output=output) == pytest.approx(expected, rel=0, abs=1e-5)
    assert len({round(value, 3) for value in expected}) == 4


def check_batch_independence(path):
    together = score_with(path)
    for microbatch in (1, 2, 3):
        assert score_with(path, microbatch=microbatch) == pytest.approx(together, rel=0, abs=1e-5)
    order = [2, 0, 3, 1]
    shuffled = score_with(path, [PROMPTS[i] for i in order], [RESPONSES[i] for i in order])
    assert shuffled == pytest.approx([together[i] for i in order], rel=0, abs=1e-5)
    alone = [score_with(path, [p], [r])[0] for p, r in zip(PROMPTS, RESPONSES, strict=True)]
    assert alone == pytest.approx(together, rel=0, abs=1e-5)


def test_scores_do_not_depend_on_the_batch(classifier):
    check_batch_independence(classifier)


def test_a_bert_classifier(shared):
    """BERT has another tokenizer than the policy, with special tokens around each text and a pad token."""
    path = shared / "rewards" / "bert-tiny-toxicity"
    check_batch_independence(path)
    replies = ["You are a disgusting idiot.", "Thank you for your kind help."]
    toxic = score_with(path, ["", ""], replies, output="toxic")
    assert toxic[0] > toxic[1] + 1
    assert toxic == score_with(path, ["", ""], replies, output=1)
    mild = score_with(path, ["", ""], replies, output="toxic", scale=-1.0)
    assert mild == [-score for score in toxic] and mild[1] > mild[0] + 1
    assert "no output 'toxicity'; there are 0 (not-toxic), 1 (toxic)" in get_load_error(path, output="toxicity")


def check_truncation(path):
    reply = " It should rest for an hour."
    long, longer = "one two three four five six " * 20, "seven eight nine ten eleven " * 30 + "six " * 30
    tokens = len(AutoTokenizer.from_pretrained(path)(reply)["input_ids"])
    limit = tokens + 4
    same_end = score_with(path, [long + "six " * 30, longer], [reply, reply], max_tokens=limit)
    assert same_end[0] == pytest.approx(same_end[1], rel=1e-4)  # only the end of the prompt is read
    other_reply = score_with(path, [longer], [" It should not rest for a day."], max_tokens=limit)
    assert abs(other_reply[0] - same_end[1]) > 1e-4  # and the whole response
    whole = score_with(path, [longer], [reply], max_tokens=400)
    assert abs(whole[0] - same_end[1]) > 1e-4  # with a higher limit, the rest of the prompt is read too


def test_long_texts_lose_prompt_text(tmp_path, tiny):
    # Enough positions for the 400 tokens of a whole text.
    model = AutoModelForSequenceClassification.from_pretrained(tiny, num_labels=1, max_position_embeddings=512)
    torch.manual_seed(0)
    torch.nn.init.normal_(model.score.weight)
    model.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(tiny).save_pretrained(tmp_path)
    check_truncation(tmp_path)


def test_long_texts_of_a_bert_classifier_lose_prompt_text(shared):
    check_truncation(shared / "rewards" / "bert-tiny-toxicity")


def test_a_reward_without_a_path_needs_a_trained_model(classifier):
    untrained = make_reward(None, output=1)
    assert untrained.needs_trained_model
    trained = untrained.use_trained_model(str(classifier))
    assert not trained.needs_trained_model and (trained.output, trained.path) == (1, str(classifier))
    assert untrained.path is None


def test_an_output_is_selected_by_its_label(classifier):
    assert score_with(classifier, output="good") == score_with(classifier, output=1)
    assert score_with(classifier, output="bad") == score_with(classifier, output=0)
    assert score_with(classifier, output="bad") != score_with(classifier, output="good")


@pytest.mark.parametrize("output", [2, -1, "Good", "1"])
def test_an_unknown_output_is_refused(output, classifier):
    message = get_load_error(classifier, output=output)
    assert message.startswith("reward.output: ")
    assert message.endswith(f"has no output {output!r}; there are 0 (bad), 1 (good)")


def test_the_mean_is_subtracted_before_scaling(make_classifier):
    folder = make_classifier(num_labels=1)
    assert "has no score_mean" in get_load_error(folder, centered=True)
    plain = score_with(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "score_mean": 1.5, "score_std": 3.0}))
    assert score_with(folder) == plain
    assert score_with(folder, centered=True) == pytest.approx([score - 1.5 for score in plain], abs=1e-6)
    assert score_with(folder, centered=True, scale=-2.0) == pytest.approx(
        [3.0 - 2 * score for score in plain], abs=1e-6
    )


def test_dtype_defaults_to_that_of_the_run(classifier):
    exact = score_with(classifier)
    rounded = make_reward(classifier, dtype=DType.bfloat16).load(Placement("cpu", "float32"))(
        PROMPTS, RESPONSES, [{}] * 4
    )
    default = make_reward(classifier).load(Placement("cpu", "bfloat16"))(PROMPTS, RESPONSES, [{}] * 4)
    explicit = make_reward(classifier, dtype=DType.float32).load(Placement("cpu", "bfloat16"))(
        PROMPTS, RESPONSES, [{}] * 4
    )
    assert explicit == exact and rounded == default != exact
    # bfloat16 has 8 significant bits, so a sum of some tens of rounded terms is off by a few hundredths.
    assert rounded == pytest.approx(exact, rel=0.05, abs=0.1)


def test_a_folder_without_a_model_is_refused(tmp_path):
    assert get_load_error(tmp_path).startswith("reward.path: ")
    assert get_load_error(tmp_path / "absent").startswith("reward.path: ")


def test_the_loaded_model_is_frozen(classifier):
    score = make_reward(classifier).load(Placement("cpu", "float32"))
    model = next(
        cell.cell_contents for cell in score.score.__closure__ if isinstance(cell.cell_contents, torch.nn.Module)
    )
    assert not model.training and not any(parameter.requires_grad for parameter in model.parameters())


TEMPLATE = "{% for m in messages %}<{{m.role}}>{{m.content}}{{eos_token}}{% endfor %}"


@pytest.fixture
def chat_classifier(make_classifier):
    """Return the folder of a classifier whose tokenizer has a chat template that ends in EOS, as its padding does."""
    folder = make_classifier(num_labels=1, pad_token_id=None)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template, tokenizer.pad_token = TEMPLATE, None
    tokenizer.save_pretrained(folder)
    return folder


def test_a_model_with_a_chat_template_reads_chats(chat_classifier, score_one_text):
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes?"}]
    turns.append({"role": "user", "content": "Tea?"})
    score = make_reward(chat_classifier).load(Placement("cpu", "float32"))
    end = AutoTokenizer.from_pretrained(chat_classifier).eos_token
    texts = [
        f"<user>Hi{end}<assistant>Yes?{end}<user>Tea?{end}<assistant>No.{end}",
        f"<user>Tea?{end}<assistant>No.{end}",
    ]
    assert score.show_input("unused", " No.", {"messages": turns}) == {"": texts[0]}
    scores = score(["unused", "Tea?"], [" No.", "No."], [{"messages": turns}, {}])
    # A model without a pad token reads the last token, here EOS, also in a batch.
    expected = [score_one_text(chat_classifier, text) for text in texts]
    assert scores == pytest.approx(expected, rel=0, abs=1e-5) and abs(expected[0] - expected[1]) > 0.01
    plain = make_reward(chat_classifier, format=RewardFormat.plain).load(Placement("cpu", "float32"))
    assert plain.show_input("Tea?", " No.", {"messages": turns}) == {"": "Tea? No."}


def test_a_model_of_apa_reward_reads_the_format_that_it_was_trained_on(chat_classifier):
    config = json.loads((chat_classifier / "config.json").read_text())
    for entries, text in (
        ({"reward_format": "plain"}, "Tea? No."),
        ({"reward_format": "chat"}, "<user>"),
        ({"score_mean": 0.5}, "Tea? No."),  # trained before the format was stored
    ):
        (chat_classifier / "config.json").write_text(json.dumps({**config, **entries}))
        read = make_reward(chat_classifier).load(Placement("cpu", "float32")).show_input("Tea?", " No.", {})[""]
        assert read.startswith(text)


def test_a_language_model_is_no_reward_model(tiny):
    message = get_load_error(tiny)
    assert message.startswith("reward.path: ") and "lack score.weight, so it is no reward model" in message


def test_weights_without_a_head_or_a_block_are_refused(make_classifier):
    folder = make_classifier(num_labels=1)
    tensors = load_file(folder / "model.safetensors")
    block = next(name for name in tensors if ".layers.1." in name)
    for name, advice in (("score.weight", True), (block, False)):
        rest = {key: tensor for key, tensor in tensors.items() if key != name}
        save_file(rest, folder / "model.safetensors", metadata={"format": "pt"})
        message = get_load_error(folder)
        assert f"the weights lack {name}" in message and ("no reward model" in message) == advice


def test_equal_texts_have_equal_scores_in_every_batch(classifier):
    prompts = [f"Is {i} {'very ' * (i % 7)}large?" for i in range(20)]
    rows = [*prompts, "Tea?", *prompts, "Tea?"]
    scores = score_with(classifier, rows, [" Yes."] * len(rows), microbatch=3)
    assert scores[:21] == scores[21:] and len(set(scores)) == 21


def test_the_length_limit_leaves_room_for_a_text(shared):
    path = shared / "rewards" / "bert-tiny-toxicity"  # adds [CLS] and [SEP]
    assert get_load_error(path, max_tokens=2).startswith("reward.max_tokens: 2 leaves no room for a text")
    assert len(score_with(path, max_tokens=3)) == 4
