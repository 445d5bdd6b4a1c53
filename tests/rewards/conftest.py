"""Small reward models with random weights, and their scores computed text by text."""

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

PROMPTS = [
    "Hi",
    "How long does it take to bake bread?",
    "I want to grow tomatoes. What should I buy?",
    "Tea?",
]
RESPONSES = [" It takes about three hours to bake bread, and then it should rest.", " No.", "", " Yes, do!"]


@pytest.fixture(scope="session")
def texts():
    """Return (prompts, responses, columns) of several lengths."""
    return PROMPTS, RESPONSES, [{}] * len(PROMPTS)


@pytest.fixture(scope="session")
def classifier(make_classifier):
    """Return the folder of a classifier with two outputs, `bad` and `good`."""
    return make_classifier(id2label={0: "bad", 1: "good"}, label2id={"bad": 0, "good": 1})


@pytest.fixture(scope="session")
def score_one_text():
    """Return a function (folder, text, output) → the classifier's output on one text alone, without padding."""

    def compute(path, text, output=0):
        ids = AutoTokenizer.from_pretrained(path)(text, return_tensors="pt")["input_ids"]
        model = AutoModelForSequenceClassification.from_pretrained(path).eval()
        with torch.no_grad():
            return float(model(ids, attention_mask=torch.ones_like(ids)).logits[0, output])

    return compute
