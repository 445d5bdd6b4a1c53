"""reward=gptj_rm: a checkpoint in the format of Dahoas/gptj-rm-static, scored at the first end of text."""

import pytest
import torch
from transformers import AutoTokenizer, GPTJConfig, GPTJModel

from apa_cli.errors import UserError
from apa_cli.rewards.base import Placement
from apa_cli.rewards.gptj_rm import GPTJReward
from apa_cli.settings import DType

pytestmark = pytest.mark.slow

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
def tokenizer_path(shared):
    return shared / "tokenizers" / "gptj"


@pytest.fixture(scope="module")
def body_and_head():
    """Return a body with random weights, large enough that every token affects the score, and a head."""
    torch.manual_seed(0)
    body = GPTJModel(GPTJConfig(**ARCHITECTURE, initializer_range=0.3)).eval()
    return body, torch.randn(1, ARCHITECTURE["n_embd"])


def make_tensors(body_and_head):
    body, head = body_and_head
    return {**{f"transformer.{name}": t for name, t in body.state_dict().items()}, "v_head.weight": head}


def save_checkpoint(tensors, folder, **options):
    folder.mkdir(exist_ok=True)
    torch.save(tensors, folder / "hf_ckpt.pt", **options)
    return folder


@pytest.fixture(scope="module")
def checkpoint(body_and_head, tmp_path_factory):
    return save_checkpoint(make_tensors(body_and_head), tmp_path_factory.mktemp("gptj"))


def make_reward(path, tokenizer_path, file="hf_ckpt.pt", dtype=None, microbatch=3, max_tokens=64, **dimensions):
    return GPTJReward(
        str(path), file, str(tokenizer_path), {**ARCHITECTURE, **dimensions}, dtype, microbatch, max_tokens
    )


def score(path, tokenizer_path, texts, **settings):
    return make_reward(path, tokenizer_path, **settings).load(Placement("cpu", "float32"))(*texts)


def get_load_error(path, tokenizer_path, texts, **settings):
    with pytest.raises(UserError) as error:
        score(path, tokenizer_path, texts, **settings)
    assert "\n" not in str(error.value)
    return str(error.value)


def compute_published_scores(body_and_head, tokenizer_path, texts):
    """Return the scores as in the published code: right padding by end-of-text tokens, read at the first of these."""
    body, head = body_and_head
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_path)
    rows = [tokenizer(p + r + "<|endoftext|>")["input_ids"] for p, r, _ in zip(*texts, strict=True)]
    width = max(map(len, rows)) + 3
    ids = torch.tensor([row + [END] * (width - len(row)) for row in rows])
    with torch.no_grad():
        every = (body(ids).last_hidden_state @ head.T)[:, :, 0]
    return [float(values[row.tolist().index(END)]) for row, values in zip(ids, every, strict=True)]


def test_the_score_is_read_at_the_first_end_of_text(body_and_head, tokenizer_path, checkpoint, texts):
    expected = compute_published_scores(body_and_head, tokenizer_path, texts)
    assert score(checkpoint, tokenizer_path, texts) == pytest.approx(expected, rel=0, abs=1e-5)
    assert min(abs(a - b) for i, a in enumerate(expected) for b in expected[:i]) > 0.01


def test_scores_do_not_depend_on_the_batch(tokenizer_path, checkpoint, texts):
    together = score(checkpoint, tokenizer_path, texts, microbatch=64)
    for microbatch in (1, 2, 3):
        assert score(checkpoint, tokenizer_path, texts, microbatch=microbatch) == pytest.approx(
            together, rel=0, abs=1e-5
        )
    order = [2, 0, 3, 1]
    shuffled = score(checkpoint, tokenizer_path, [[column[i] for i in order] for column in texts])
    assert shuffled == pytest.approx([together[i] for i in order], rel=0, abs=1e-5)


def test_prefixed_names_old_buffers_and_the_old_file_format_load(
    body_and_head, tokenizer_path, checkpoint, texts, tmp_path
):
    tensors = make_tensors(body_and_head)
    for layer in range(ARCHITECTURE["n_layer"]):
        tensors[f"transformer.h.{layer}.attn.bias"] = torch.ones(1, 1, 128, 128, dtype=torch.uint8).tril()
        tensors[f"transformer.h.{layer}.attn.masked_bias"] = torch.tensor(-1e9)
    wrapped = {f"module.{name}": tensor for name, tensor in tensors.items()}
    expected = score(checkpoint, tokenizer_path, texts)
    assert score(save_checkpoint(wrapped, tmp_path / "wrapped"), tokenizer_path, texts) == expected
    old = save_checkpoint(wrapped, tmp_path / "old", _use_new_zipfile_serialization=False)
    assert score(old, tokenizer_path, texts) == expected


def test_half_precision_weights_are_converted(body_and_head, tokenizer_path, texts, tmp_path):
    half = {name: tensor.half() for name, tensor in make_tensors(body_and_head).items()}
    body, head = body_and_head
    rounded = GPTJModel(body.config).eval()
    rounded.load_state_dict({name: tensor.half().float() for name, tensor in body.state_dict().items()})
    expected = compute_published_scores((rounded, head.half().float()), tokenizer_path, texts)
    folder = save_checkpoint(half, tmp_path / "half")
    assert score(folder, tokenizer_path, texts) == pytest.approx(expected, rel=0, abs=1e-5)


def test_dtype_defaults_to_that_of_the_run(tokenizer_path, checkpoint, texts):
    exact = score(checkpoint, tokenizer_path, texts)
    explicit = make_reward(checkpoint, tokenizer_path, dtype=DType.bfloat16).load(Placement("cpu", "float32"))(*texts)
    default = make_reward(checkpoint, tokenizer_path).load(Placement("cpu", "bfloat16"))(*texts)
    # bfloat16 has 8 significant bits; the scores are sums of 32 products of size 1.
    assert explicit == default != exact and explicit == pytest.approx(exact, rel=0, abs=0.5)


def test_long_texts_lose_prompt_text(body_and_head, tokenizer_path, checkpoint):
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_path)
    reply = " Let it rest for an hour."
    limit = len(tokenizer(reply)["input_ids"]) + 3
    long, longer = "one two three" + " six" * 30, "seven eight nine ten" + " six" * 40
    # Two prompt tokens, the response and the end-of-text token remain.
    expected = compute_published_scores(body_and_head, tokenizer_path, [[" six six"], [reply], [{}]])
    cut = score(checkpoint, tokenizer_path, [[long, longer], [reply, reply], [{}, {}]], max_tokens=limit)
    assert cut == pytest.approx(expected * 2, rel=0, abs=1e-5)
    whole = score(checkpoint, tokenizer_path, [[long], [reply], [{}]], max_tokens=limit + 1)
    assert abs(whole[0] - cut[0]) > 1e-3


def test_missing_unexpected_and_misshapen_tensors_are_named(body_and_head, tokenizer_path, texts, tmp_path):
    tensors = make_tensors(body_and_head)
    without = {name: t for name, t in tensors.items() if name not in ("v_head.weight", "transformer.ln_f.bias")}
    message = get_load_error(save_checkpoint(without, tmp_path / "missing"), tokenizer_path, texts)
    assert message.endswith("missing transformer.ln_f.bias, v_head.weight")
    message = get_load_error(
        save_checkpoint({**tensors, "v_head.bias": torch.zeros(1)}, tmp_path / "more"), tokenizer_path, texts
    )
    assert message.endswith("unexpected v_head.bias")
    message = get_load_error(save_checkpoint(tensors, tmp_path / "all"), tokenizer_path, texts, n_layer=1)
    assert "unexpected transformer.h.1." in message and message.endswith("more") and "missing" not in message
    message = get_load_error(tmp_path / "all", tokenizer_path, texts, n_inner=96)
    assert "transformer.h.0.mlp.fc_in.weight in hf_ckpt.pt has shape [128, 32]" in message and "[96, 32]" in message


def test_unloadable_settings_are_one_line_errors_naming_the_key(tokenizer_path, checkpoint, texts, tmp_path):
    assert get_load_error(checkpoint, tokenizer_path, texts, file="other.pt").startswith(
        "reward.file: there is no other.pt"
    )
    assert get_load_error(tmp_path / "nowhere", tokenizer_path, texts).startswith("reward.path: ")
    assert get_load_error(checkpoint, tmp_path / "nowhere", texts).startswith("reward.tokenizer: ")
    assert get_load_error(checkpoint, tokenizer_path, texts, vocab_size=50000).startswith("reward.tokenizer: ")
    assert get_load_error(checkpoint, tokenizer_path, texts, n_head=5).startswith("reward.architecture: ")
    assert get_load_error(checkpoint, tokenizer_path, texts, max_tokens=129).startswith(
        "reward.max_tokens: 129 is more than"
    )
    (tmp_path / "hf_ckpt.pt").write_text("no tensors")
    assert get_load_error(tmp_path, tokenizer_path, texts).startswith("reward.file: ")
    torch.save([torch.zeros(1)], tmp_path / "hf_ckpt.pt")
    assert "not a file of tensors by name" in get_load_error(tmp_path, tokenizer_path, texts)


def test_pickled_code_in_a_checkpoint_is_not_run(tokenizer_path, texts, tmp_path):
    trace = tmp_path / "trace"

    class Harmful:
        def __reduce__(self):
            return (type(trace).touch, (trace,))

    torch.save({"v_head.weight": Harmful()}, tmp_path / "hf_ckpt.pt")
    assert get_load_error(tmp_path, tokenizer_path, texts).startswith("reward.file: ")
    assert not trace.exists()
