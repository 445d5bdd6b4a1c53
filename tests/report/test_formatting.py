"""Settings as short texts."""

from apa_cli.report.formatting import format_lambda, format_value, shorten_keys


def test_values_are_written_as_on_the_command_line():
    texts = [format_value(value) for value in (None, True, 1e-5, 2.0, 3, "cosine")]
    assert texts == ["–", "true", "1e-05", "2", "3", "cosine"]


def test_lambda_is_followed_by_its_meaning_if_that_is_known():
    assert format_lambda(2.0, "step size") == "2 (step size)"
    assert format_lambda(2.0, None) == "2"


def test_keys_are_shortened_as_far_as_they_stay_different():
    assert shorten_keys(["optimizer.lr", "epochs"]) == {"optimizer.lr": "lr", "epochs": "epochs"}
    assert shorten_keys(["sft.lr", "optimizer.lr"]) == {"sft.lr": "sft.lr", "optimizer.lr": "optimizer.lr"}
