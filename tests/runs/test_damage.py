"""Models, data sets and tokenizers that are missing, damaged or do not fit: an error of one line, no traceback."""

import gzip
import json
import shutil
import socket
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, GPT2Config, GPT2ForSequenceClassification

from apa_cli import network
from apa_cli.config.build import build_config
from apa_cli.config.compose import compose
from apa_cli.errors import UserError
from apa_cli.models.loading import load_policy, load_tokenizer
from apa_cli.rewards.base import Placement
from apa_cli.rewards.model import ModelReward
from apa_cli.settings import RewardFormat

pytestmark = pytest.mark.slow


def error_message(call) -> str:
    """Return the message, of one line, with which `call` fails."""
    with pytest.raises(UserError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def model(tiny, tmp_path):
    """Copy of the tiny model, to be damaged."""
    return shutil.copytree(tiny, tmp_path / "model")


def truncate_file(file) -> None:
    """Cut a file in half."""
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def remove_tensor(file, name: str) -> None:
    """Remove one tensor from a safetensors file."""
    tensors = load_file(file)
    del tensors[name]
    save_file(tensors, file, metadata={"format": "pt"})


WEIGHT = "gpt_neox.layers.1.mlp.dense_h_to_4h.weight"
DAMAGES = {
    "no folder": shutil.rmtree,
    "an empty folder": lambda model: [file.unlink() for file in model.iterdir()],
    "config.json is no JSON": lambda model: (model / "config.json").write_text("{"),
    "config.json is a list": lambda model: (model / "config.json").write_text("[]"),
    "config.json of no known model": lambda model: (model / "config.json").write_text('{"model_type": "nothing"}'),
    "no weights": lambda model: (model / "model.safetensors").unlink(),
    "weights cut off": lambda model: truncate_file(model / "model.safetensors"),
    "weights are empty": lambda model: (model / "model.safetensors").write_bytes(b""),
    "weights of another size": lambda model: (model / "config.json").write_text(
        (model / "config.json").read_text().replace('"hidden_size": 32', '"hidden_size": 48')
    ),
    "a tensor is missing": lambda model: remove_tensor(model / "model.safetensors", WEIGHT),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_policy(damage, model, make_config):
    DAMAGES[damage](model)
    message = error_message(lambda: load_policy(make_config().model, str(model)))
    assert message.startswith("model.path: ") and str(model) in message
    if damage == "a tensor is missing":
        assert WEIGHT in message


def save_reward_model(folder: Path, tokenizer_path: Path, positions: int) -> Path:
    """Save a GPT-2 classifier of one layer with so many positions, and the tokenizer; return the folder."""
    config = GPT2Config(
        vocab_size=600, n_embd=32, n_layer=1, n_head=2, n_positions=positions, num_labels=1, pad_token_id=1
    )
    GPT2ForSequenceClassification(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tokenizer_path).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("damage", [name for name in DAMAGES if name != "weights of another size"])
def test_damaged_reward_model(damage, tiny, tmp_path):
    model = save_reward_model(tmp_path / "model", tiny, positions=64)
    if damage == "a tensor is missing":
        remove_tensor(model / "model.safetensors", "score.weight")  # it would be initialized at random
    else:
        DAMAGES[damage](model)
    reward = ModelReward(str(model), 0, 1.0, False, None, 4, 64, RewardFormat.auto)
    message = error_message(lambda: reward.load(Placement("cpu", "float32")))
    assert message.startswith("reward.path: ") and str(model) in message


@pytest.mark.parametrize("damage", ["cut off", "no json", "missing"])
def test_damaged_tokenizer(damage, model, make_config):
    file = model / "tokenizer.json"
    {"cut off": lambda: truncate_file(file), "no json": lambda: file.write_text("no"), "missing": file.unlink}[damage]()
    assert error_message(lambda: load_tokenizer(make_config().model, str(model))).startswith("model.path: ")


def test_text_beyond_the_reward_models_positions_is_cut_at_the_prompt(tiny, tmp_path):
    model = save_reward_model(tmp_path / "model", tiny, positions=16)
    score = ModelReward(str(model), 0, 1.0, False, None, 4, 512, RewardFormat.auto).load(Placement("cpu", "float32"))
    (long,) = score(["tea " * 100], [" Yes, do! Yes, do! Yes, do! Yes, do!"], [{}])
    (longer,) = score(["bread " * 100 + "tea " * 100], [" Yes, do! Yes, do! Yes, do! Yes, do!"], [{}])
    assert long == pytest.approx(longer, rel=1e-6)


# --- data ---------------------------------------------------------------------------------------------------

LINES = "".join(json.dumps({"prompt": f"prompt {number}"}) + "\n" for number in range(40))


@pytest.fixture
def jsonl(tmp_path):
    """jsonl(bytes, name) → the error message of loading this file."""

    def load(content: bytes, name: str = "mine.jsonl") -> str:
        (tmp_path / name).write_bytes(content)
        dataset = build_config(compose(["dataset=jsonl", f"dataset.path={tmp_path}/{name}"])).dataset
        return error_message(lambda: dataset.load("train"))

    return load


def test_jsonl_file_cut_within_a_line(jsonl):
    message = jsonl(LINES.encode()[:-10])
    assert message.startswith("dataset.path: ") and "row 40: not JSON" in message


def test_jsonl_file_that_is_not_text(jsonl):
    assert "mine.jsonl, row 1: not UTF-8 (byte 0x80 at position 1)" in jsonl(b"\x80\xff\xfe\x00" * 10)
    assert "mine.jsonl, row 1: UTF-16, not UTF-8" in jsonl(b"\xff\xfe\x00\x80" * 10)  # begins with its mark


def test_gzip_file_that_is_cut_or_damaged(jsonl):
    whole = gzip.compress(LINES.encode())
    for content in (whole[:-12], whole[: len(whole) // 2], b"no gzip", whole[:20] + b"junk" + whole[24:]):
        assert jsonl(content, "mine.jsonl.gz").startswith("dataset.path: ")


@pytest.mark.parametrize("name", ["prompts", "jsonl", "hh", "imdb"])
def test_missing_data_set(name, tmp_path):
    dataset = build_config(compose([f"dataset={name}", f"dataset.path={tmp_path}/nothing"])).dataset
    message = error_message(lambda: dataset.load("train"))
    assert message.startswith("dataset.path: ") and "nothing" in message


@pytest.mark.parametrize("share", [0.0, 0.5, 0.99])
def test_damaged_parquet_file(share, tmp_path):
    import pyarrow
    from pyarrow import parquet

    (tmp_path / "data").mkdir()
    for split in ("train", "test"):
        file = tmp_path / "data" / f"{split}-00000-of-00001.parquet"
        parquet.write_table(pyarrow.table({"text": ["a film " * 50] * 50, "label": [1] * 50}), file)
        file.write_bytes(file.read_bytes()[: int(file.stat().st_size * share)])
    dataset = build_config(compose(["dataset=imdb", f"dataset.path={tmp_path}"])).dataset
    assert error_message(lambda: dataset.load("train")).startswith("dataset.path: ")


# --- sizes that do not fit ----------------------------------------------------------------------------------


def test_prompt_longer_than_the_models_positions(run_train):
    message = error_message(lambda: run_train("sampling.max_prompt_tokens=120", "sampling.max_new_tokens=9"))
    assert (
        message == "sampling: max_prompt_tokens 120 + max_new_tokens 9 is more than the model's 128 positions; "
        "lower one of them"
    )


def test_tokenizer_with_ids_beyond_the_models_vocabulary(model, run_train):
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    tokenizer["added_tokens"][1]["id"] = 700  # that of <|padding|>: there are still 600 tokens
    tokenizer["model"]["vocab"]["<|padding|>"] = 700
    (model / "tokenizer.json").write_text(json.dumps(tokenizer))
    message = error_message(lambda: run_train(f"model.path={model}"))
    assert message == "model.tokenizer: the highest token id is 700, but the model has 600 embeddings"


def test_tokenizer_without_special_tokens(model, run_train):
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if (model / name).exists():
            config = json.loads((model / name).read_text())
            kept = {key: value for key, value in config.items() if not key.endswith("_token")}
            (model / name).write_text(json.dumps(kept))
    message = error_message(lambda: run_train(f"model.path={model}"))
    assert message.startswith("model.path: ") and "pad" in message


def make_token_certain(model, token: int) -> None:
    """Give `token` a logit of 320: the last layer norm adds 0.1 to each of 32 features, and its row is ones · 100."""
    tensors = load_file(model / "model.safetensors")
    tensors["embed_out.weight"][token] = 100.0
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})


PLACE_REWARD = """\
def score(prompts, responses):
    return [0.1 * (place % 3) for place, _ in enumerate(responses)]
"""


@pytest.mark.parametrize("overrides", [["algo=apa"], ["algo=ppo"], ["algo=awr"], ["dataset=embedded", "critic=head"]])
@pytest.mark.parametrize("ending", ["eos", "stop"])
def test_empty_responses(overrides, ending, model, run_train, records, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(model)
    make_token_certain(model, tokenizer.eos_token_id if ending == "eos" else tokenizer.convert_tokens_to_ids("e"))
    (tmp_path / "place.py").write_text(PLACE_REWARD)
    stop = ["sampling.stop_strings=[e]"] if ending == "stop" else []
    run = run_train(
        f"model.path={model}",
        f"reward.target={tmp_path}/place.py:score",
        "iterations=2",
        "evaluation.every=1",
        *overrides,
        *stop,
    )
    rows = records(run / "metrics.jsonl")
    assert len(rows) == 3 and all(torch.tensor(list(row.values())).isfinite().all() for row in rows)
    assert rows[1]["response/length"] == 1 and rows[1]["response/distinct_2"] == 0
    assert {(row["response"], row["ending"]) for row in records(run / "samples.jsonl")} == {("", ending)}


# --- the hub ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("answer", ["nothing", "silence", "503"])
def test_unreachable_hub_is_asked_once(answer, make_config, monkeypatch):
    from huggingface_hub import constants

    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        if answer != "nothing":
            server.listen(20)
        if answer == "503":
            import threading

            def refuse():
                connection, _ = server.accept()
                connection.recv(10000)
                connection.sendall(b"HTTP/1.1 503 busy\r\nContent-Length: 0\r\n\r\n")
                connection.close()

            threading.Thread(target=refuse, daemon=True).start()
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(network, "HUB_TIMEOUT", 0.5)
        network.probe_hub.cache_clear()
        start_time = time.monotonic()
        try:
            message = error_message(lambda: load_policy(make_config().model, f"nobody/none-{answer}"))
        finally:
            network.probe_hub.cache_clear()
        assert time.monotonic() - start_time < 3  # five tries for each file would take minutes
    assert f"nobody/none-{answer}" in message and message.endswith("works too, model.path=FOLDER")
