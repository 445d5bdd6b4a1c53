"""The steps of sampling: caches, and which models can repeat one step."""

import copy

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    GPT2Config,
    GPTJConfig,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

from apa_cli.rollout import steps
from apa_cli.rollout.steps import FixedLayer, Growing, Repeated, RoomyLayer, recorded, repeats, tried

LLAMA = {
    "vocab_size": 50, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "initializer_range": 0.2,
}  # fmt: skip
GPT = {"vocab_size": 50, "n_embd": 16, "n_layer": 2, "n_head": 2, "initializer_range": 0.2}
TAKE = {
    "gpt_neox": GPTNeoXConfig(
        vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        initializer_range=0.2,
    ),
    "gpt2": GPT2Config(**GPT),
    "gptj": GPTJConfig(**GPT, rotary_dim=4),
    "llama": LlamaConfig(**LLAMA),
}  # fmt: skip
LEFT = {
    "a window": MistralConfig(**LLAMA, sliding_window=4),
    "positions read off the mask": BloomConfig(vocab_size=50, hidden_size=16, n_layer=2, n_head=2),
}


def made(config: PreTrainedConfig) -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(copy.deepcopy(config)).eval()


def test_keys_are_moved_once_in_as_many_tokens_as_there_is_room():
    layer, moves = RoomyLayer(), set()
    for _ in range(300):
        keys, values = layer.update(torch.ones(2, 1, 1, 4), torch.zeros(2, 1, 1, 4))
        moves.add(keys.data_ptr())
    assert len(moves) == 3 and keys.shape == values.shape == (2, 1, 300, 4)
    assert bool(keys.all()) and not bool(values.any())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", TAKE)
def test_these_families_can_repeat_a_step(family, dtype):
    assert tried(made(TAKE[family]).to(dtype))


@pytest.mark.parametrize("why", LEFT)
def test_these_cannot(why):
    assert not tried(made(LEFT[why]))


def test_attention_that_adds_its_mask_cannot():
    config = copy.deepcopy(TAKE["llama"])
    config._attn_implementation = "eager"
    assert not tried(made(config))


@pytest.mark.parametrize("wrong", ["place", "positions", "taken", "mask"])
def test_the_trial_notices_a_step_that_goes_wrong(wrong, monkeypatch):
    """Each of the things that a step moves on is left where it was."""
    compute = Repeated.compute

    def leaving(self):
        before = getattr(self, wrong).clone()
        compute(self)
        getattr(self, wrong).copy_(before)

    monkeypatch.setattr(Repeated, "compute", leaving)
    # which number draws is nothing that logits depend on
    assert tried(made(TAKE["gpt2"])) == (wrong == "taken")


def test_nothing_is_tried_on_a_cpu(monkeypatch):
    monkeypatch.setattr(steps, "tried", lambda model: pytest.fail("tried"))
    assert not repeats(made(TAKE["gpt2"]))


def test_running_out_of_memory_says_nothing_about_a_model(monkeypatch):
    def compute(self):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(Repeated, "compute", compute)
    with pytest.raises(torch.OutOfMemoryError):
        tried(made(TAKE["gpt2"]))


def test_a_fixed_layer_holds_what_was_there_and_takes_what_comes():
    begun = RoomyLayer()
    begun.update(torch.ones(2, 1, 3, 4), torch.full((2, 1, 3, 4), 2.0))
    place = torch.tensor([3])
    layer = FixedLayer(begun, 2, place)
    first = layer.update(torch.full((2, 1, 1, 4), 5.0), torch.full((2, 1, 1, 4), 6.0))
    place.add_(1)
    keys, values = layer.update(torch.full((2, 1, 1, 4), 7.0), torch.full((2, 1, 1, 4), 8.0))
    assert keys[0, 0, :, 0].tolist() == [1, 1, 1, 5, 7] and values[1, 0, :, 3].tolist() == [2, 2, 2, 6, 8]
    assert [x.data_ptr() for x in first] == [keys.data_ptr(), values.data_ptr()]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("family", TAKE)
def test_a_graph_draws_what_its_steps_draw(family, monkeypatch):
    """On a GPU: replays against the same steps computed one by one, to the bit, and rows that leave."""
    model, settings = made(TAKE[family]).cuda(), sampling_settings()
    assert repeats(model)
    ids = torch.randint(1, 50, (6, 5), device="cuda")
    attention = torch.ones_like(ids)
    attention[:3, :2] = 0
    uniforms = torch.rand(6, 12, device="cuda")

    def run() -> list[tuple[list[int], list[float]]]:
        drawing, found = Growing(model, ids, attention, uniforms, settings), []
        drawing.step()
        drawing = Repeated(drawing)
        for t in range(11):
            tokens, logprobs = drawing.step()
            found.append((tokens.tolist(), logprobs.tolist()))
            if t == 5:
                drawing.keep(torch.tensor([1, 4], device="cuda"))
        assert (drawing.graph is None) == (steps.recorded is not recorded)
        return found

    with torch.no_grad():
        replayed = run()
        monkeypatch.setattr(steps, "recorded", Repeated.compute)
        assert replayed == run()


def sampling_settings():
    return steps.SamplingSettings(5, 12, 1.0, 0, 1.0, [], 8, True)
