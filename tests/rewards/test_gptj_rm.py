"""reward=gptj_rm: a checkpoint in the format of Dahoas/gptj-rm-static, scored at the first end of text."""

import pytest
import torch
from transformers import AutoTokenizer, GPTJConfig, GPTJModel

from apa_cli.errors import UserError
from apa_cli.rewards.base import Placement
from apa_cli.rewards.gptj_rm import GPTJReward
from apa_cli.settings import DType

END = 50256
ARCHITECTURE = {
    "vocab_size": 50400,
    "n_positions": 128,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 2,
    "n_inner": None,
    "rotary_dim": 8,
}


@pytest.fixture(scope="module")
def words(shared):
    return shared / "tokenizers" / "gptj"


@pytest.fixture(scope="module")
def parts():
    """A body with random weights large enough that every token counts, and a head."""
    torch.manual_seed(0)
    body = GPTJModel(GPTJConfig(**ARCHITECTURE, initializer_range=0.3)).eval()
    return body, torch.randn(1, ARCHITECTURE["n_embd"])


def tensors_of(parts):
    body, head = parts
    return {**{f"transformer.{name}": t for name, t in body.state_dict().items()}, "v_head.weight": head}


def folder_of(tensors, folder, **options):
    folder.mkdir(exist_ok=True)
    torch.save(tensors, folder / "hf_ckpt.pt", **options)
    return folder


@pytest.fixture(scope="module")
def checkpoint(parts, tmp_path_factory):
    return folder_of(tensors_of(parts), tmp_path_factory.mktemp("gptj"))


def reward(path, words, file="hf_ckpt.pt", dtype=None, microbatch=3, max_tokens=64, **dimensions):
    return GPTJReward(str(path), file, str(words), {**ARCHITECTURE, **dimensions}, dtype, microbatch, max_tokens)


def scored(path, words, texts, **settings):
    return reward(path, words, **settings).load(Placement("cpu", "float32"))(*texts)


def refused(path, words, texts, **settings):
    with pytest.raises(UserError) as error:
        scored(path, words, texts, **settings)
    assert "\n" not in str(error.value)
    return str(error.value)


def published(parts, words, texts):
    """The score as it was published: a batch padded on the right by ends of text, read where the first one stands."""
    body, head = parts
    tokenizer = AutoTokenizer.from_pretrained(words)
    rows = [tokenizer(p + r + "<|endoftext|>")["input_ids"] for p, r, _ in zip(*texts, strict=True)]
    width = max(map(len, rows)) + 3
    ids = torch.tensor([row + [END] * (width - len(row)) for row in rows])
    with torch.no_grad():
        every = (body(ids).last_hidden_state @ head.T)[:, :, 0]
    return [float(values[row.tolist().index(END)]) for row, values in zip(ids, every, strict=True)]


def test_the_score_is_the_heads_at_the_first_end_of_text(parts, words, checkpoint, texts):
    expected = published(parts, words, texts)
    assert scored(checkpoint, words, texts) == pytest.approx(expected, rel=0, abs=1e-5)
    assert min(abs(a - b) for i, a in enumerate(expected) for b in expected[:i]) > 0.01


def test_a_score_depends_on_its_text_alone(words, checkpoint, texts):
    together = scored(checkpoint, words, texts, microbatch=64)
    for microbatch in (1, 2, 3):
        assert scored(checkpoint, words, texts, microbatch=microbatch) == pytest.approx(together, rel=0, abs=1e-5)
    order = [2, 0, 3, 1]
    shuffled = scored(checkpoint, words, [[column[i] for i in order] for column in texts])
    assert shuffled == pytest.approx([together[i] for i in order], rel=0, abs=1e-5)


def test_a_wrappers_prefix_old_buffers_and_the_old_file_format(parts, words, checkpoint, texts, tmp_path):
    tensors = tensors_of(parts)
    for layer in range(ARCHITECTURE["n_layer"]):
        tensors[f"transformer.h.{layer}.attn.bias"] = torch.ones(1, 1, 128, 128, dtype=torch.uint8).tril()
        tensors[f"transformer.h.{layer}.attn.masked_bias"] = torch.tensor(-1e9)
    wrapped = {f"module.{name}": tensor for name, tensor in tensors.items()}
    expected = scored(checkpoint, words, texts)
    assert scored(folder_of(wrapped, tmp_path / "wrapped"), words, texts) == expected
    old = folder_of(wrapped, tmp_path / "old", _use_new_zipfile_serialization=False)
    assert scored(old, words, texts) == expected


def test_half_precision_weights_are_widened(parts, words, texts, tmp_path):
    half = {name: tensor.half() for name, tensor in tensors_of(parts).items()}
    body, head = parts
    rounded = GPTJModel(body.config).eval()
    rounded.load_state_dict({name: tensor.half().float() for name, tensor in body.state_dict().items()})
    expected = published((rounded, head.half().float()), words, texts)
    folder = folder_of(half, tmp_path / "half")
    assert scored(folder, words, texts) == pytest.approx(expected, rel=0, abs=1e-5)


def test_its_precision_is_its_own_or_the_runs(words, checkpoint, texts):
    exact = scored(checkpoint, words, texts)
    own = reward(checkpoint, words, dtype=DType.bfloat16).load(Placement("cpu", "float32"))(*texts)
    runs = reward(checkpoint, words).load(Placement("cpu", "bfloat16"))(*texts)
    # bfloat16 keeps 8 bits; the scores are sums of 32 products of size 1.
    assert own == runs != exact and own == pytest.approx(exact, rel=0, abs=0.5)


def test_what_is_too_long_loses_prompt_text(parts, words, checkpoint):
    tokenizer = AutoTokenizer.from_pretrained(words)
    reply = " Let it rest for an hour."
    limit = len(tokenizer(reply)["input_ids"]) + 3
    long, longer = "one two three" + " six" * 30, "seven eight nine ten" + " six" * 40
    # Two prompt tokens, the reply, the end: the rest of the prompt is not read.
    by_hand = published(parts, words, [[" six six"], [reply], [{}]])
    cut = scored(checkpoint, words, [[long, longer], [reply, reply], [{}, {}]], max_tokens=limit)
    assert cut == pytest.approx(by_hand * 2, rel=0, abs=1e-5)
    whole = scored(checkpoint, words, [[long], [reply], [{}]], max_tokens=limit + 1)
    assert abs(whole[0] - cut[0]) > 1e-3


def test_tensors_that_do_not_fit_are_named(parts, words, texts, tmp_path):
    tensors = tensors_of(parts)
    without = {name: t for name, t in tensors.items() if name not in ("v_head.weight", "transformer.ln_f.bias")}
    message = refused(folder_of(without, tmp_path / "missing"), words, texts)
    assert message.endswith("missing transformer.ln_f.bias, v_head.weight")
    message = refused(folder_of({**tensors, "v_head.bias": torch.zeros(1)}, tmp_path / "more"), words, texts)
    assert message.endswith("unexpected v_head.bias")
    message = refused(folder_of(tensors, tmp_path / "all"), words, texts, n_layer=1)
    assert "unexpected transformer.h.1." in message and message.endswith("more") and "missing" not in message
    message = refused(tmp_path / "all", words, texts, n_inner=96)
    assert "transformer.h.0.mlp.fc_in.weight in hf_ckpt.pt is [128, 32]" in message and "[96, 32]" in message


def test_what_cannot_be_loaded_is_one_line(words, checkpoint, texts, tmp_path):
    assert refused(checkpoint, words, texts, file="other.pt").startswith("reward.file: there is no other.pt")
    assert refused(tmp_path / "nowhere", words, texts).startswith("reward.path: ")
    assert refused(checkpoint, tmp_path / "nowhere", texts).startswith("reward.tokenizer: ")
    assert refused(checkpoint, words, texts, vocab_size=50000).startswith("reward.tokenizer: ")
    assert refused(checkpoint, words, texts, n_head=5).startswith("reward.architecture: ")
    assert refused(checkpoint, words, texts, max_tokens=129).startswith("reward.max_tokens: 129 is more than")
    (tmp_path / "hf_ckpt.pt").write_text("no tensors")
    assert refused(tmp_path, words, texts).startswith("reward.file: ")
    torch.save([torch.zeros(1)], tmp_path / "hf_ckpt.pt")
    assert "no file of tensors by name" in refused(tmp_path, words, texts)


def test_code_in_a_checkpoint_is_not_run(words, texts, tmp_path):
    ran = tmp_path / "ran"

    class Harmful:
        def __reduce__(self):
            return (type(ran).touch, (ran,))

    torch.save({"v_head.weight": Harmful()}, tmp_path / "hf_ckpt.pt")
    assert refused(tmp_path, words, texts).startswith("reward.file: ")
    assert not ran.exists()
