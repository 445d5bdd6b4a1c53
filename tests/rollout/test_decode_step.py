"""The steps of sampling: caches, and which models can repeat one step."""

import copy
from contextlib import contextmanager
from typing import ClassVar

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

from apa_cli.rollout import decode_step as steps
from apa_cli.rollout.decode_step import FixedLayer, Growing, Repeated, RoomyLayer, repeats, tried

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
    assert begun.keys is begun.values is begun.rooms is None  # not held twice
    first = layer.update(torch.full((2, 1, 1, 4), 5.0), torch.full((2, 1, 1, 4), 6.0))
    place.add_(1)
    keys, values = layer.update(torch.full((2, 1, 1, 4), 7.0), torch.full((2, 1, 1, 4), 8.0))
    assert keys[0, 0, :, 0].tolist() == [1, 1, 1, 5, 7] and values[1, 0, :, 3].tolist() == [2, 2, 2, 6, 8]
    assert [x.data_ptr() for x in first] == [keys.data_ptr(), values.data_ptr()]


class FakeGraph:
    """A graph as CUDA's is: what is asked for while it records is not done, and is done at every replay.

    `steps` is the object whose `compute` it records.
    """

    recording: "FakeGraph | None" = None
    made: ClassVar[list["FakeGraph"]] = []
    under_way: ClassVar[set[object]] = set()
    """Memory of recordings that have not ended well; PyTorch's allocator refuses to begin another in it."""
    fails = ""
    """What goes wrong: "asking" for something, or only "ending" the recording."""

    def capture_begin(self, pool, capture_error_mode):
        assert FakeGraph.recording is None and capture_error_mode == "thread_local"
        assert FakeStream.current == "side" and FakeStream.waits[-1] == ("side", "main")
        self.memory, self.whole, FakeGraph.recording = pool or object(), False, self
        if self.memory in FakeGraph.under_way:
            raise RuntimeError("beginAllocateToPool: already recording to mempool_id")
        FakeGraph.under_way.add(self.memory)
        FakeGraph.made.append(self)

    def capture_end(self):
        FakeGraph.recording = None
        if FakeGraph.fails:
            raise RuntimeError("operation failed due to a previous error during capture")
        FakeGraph.under_way.remove(self.memory)
        self.whole = True

    def pool(self):
        assert self.whole
        return self.memory

    def replay(self):
        assert FakeStream.current == "main" and FakeStream.waits[-1] == ("main", "side")
        Repeated.compute(self.steps)
        self.logits.copy_(self.steps.logits)
        self.steps.logits = self.logits


class FakeStream:
    current = "main"
    waits: ClassVar[list[tuple[str, str]]] = []

    def __init__(self, name: str):
        self.name = name

    def wait_stream(self, other):
        FakeStream.waits.append((self.name, other.name))

    @contextmanager
    def entered(self):
        FakeStream.current = self.name
        yield
        FakeStream.current = "main"


@pytest.fixture
def fake_cuda(monkeypatch):
    """A CPU that records."""
    compute = Repeated.compute

    def asked(self):
        graph = FakeGraph.recording
        if graph is None:
            return compute(self)
        if FakeGraph.fails == "asking":
            raise RuntimeError("operation not permitted when stream is capturing")
        written = [self.mask, self.ids, self.positions, self.tokens, self.logprobs, self.place, self.taken]
        written += [x for layer in self.cache.layers for x in (layer.keys, layer.values)]
        before = [x.clone() for x in written]
        compute(self)
        for x, old in zip(written, before, strict=True):
            x.copy_(old)
        graph.steps, graph.logits = self, torch.full_like(self.logits, torch.nan)
        self.logits = graph.logits

    emptied = []
    main, side = FakeStream("main"), FakeStream("side")
    monkeypatch.setattr(Repeated, "compute", asked)
    monkeypatch.setattr(steps, "RECORDING", {"cpu"})
    monkeypatch.setattr(steps, "_first", {})
    monkeypatch.setattr(steps, "_refused", set())
    monkeypatch.setattr(steps, "side_stream", lambda device: side)
    monkeypatch.setattr(FakeGraph, "under_way", set())
    monkeypatch.setattr(FakeGraph, "made", [])
    monkeypatch.setattr(FakeGraph, "fails", "")
    for name, fake in {
        "CUDAGraph": FakeGraph,
        "current_stream": lambda device: main,
        "stream": FakeStream.entered,
        "empty_cache": lambda: emptied.append(True),
        "mem_get_info": lambda device: (2**31 - (not emptied), 2**32),
    }.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    return emptied


@torch.no_grad()
def drawn_with(model: PreTrainedModel, repeated: bool) -> list[list[float]]:
    """Log-probs of each step after the first; after the sixth two of six rows are left."""
    torch.manual_seed(0)
    ids, attention = torch.randint(1, 50, (6, 5)), torch.ones(6, 5, dtype=torch.int64)
    attention[:3, :2] = 0
    drawing = Growing(model, ids, attention, torch.rand(6, 12), sampling_settings())
    drawing.step()
    drawing, found = Repeated(drawing) if repeated else drawing, []
    for t in range(11):
        found.append(drawing.step()[1].tolist())
        if t == 5:
            drawing.keep(torch.tensor([1, 4]))
    return found


def same(found: list[list[float]], expected: list[list[float]]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert one == pytest.approx(other, abs=1e-5)


@pytest.mark.parametrize("family", TAKE)
def test_what_was_recorded_is_replayed(family, fake_cuda):
    model = made(TAKE[family])
    assert tried(model)
    FakeGraph.made.clear()
    same(drawn_with(model, True), drawn_with(model, False))
    first, second = FakeGraph.made  # one for six rows, one for two, in the same memory
    assert first.pool() is second.pool() and len(fake_cuda) == 1
    drawn_with(model, True)
    assert {graph.pool() for graph in FakeGraph.made} == {first.pool()}


@pytest.mark.parametrize("fails", ["asking", "ending"])
def test_what_cannot_be_recorded_is_computed(fails, fake_cuda, monkeypatch):
    model = made(TAKE["gpt2"])
    monkeypatch.setattr(FakeGraph, "fails", fails)
    assert not tried(model)
    FakeGraph.made.clear()
    same(drawn_with(model, True), drawn_with(model, False))
    assert not FakeGraph.made  # nothing is tried again


def test_a_recording_that_fails_later_ends_them(fake_cuda, monkeypatch):
    model = made(TAKE["gpt2"])
    expected = drawn_with(model, False)
    same(drawn_with(model, True), expected)
    monkeypatch.setattr(FakeGraph, "fails", "ending")
    FakeGraph.made.clear()
    for _ in range(2):
        same(drawn_with(model, True), expected)
    assert len(FakeGraph.made) == 1


def test_memory_that_others_hold_is_given_back_before_a_recording_alone(fake_cuda):
    """There is too little the first time."""
    drawn_with(made(TAKE["gpt2"]), True)
    assert len(FakeGraph.made) == 2 and len(fake_cuda) == 1


def test_the_last_two_steps_are_not_worth_a_graph(fake_cuda):
    model = made(TAKE["gpt2"])
    drawing = Growing(model, torch.ones(2, 3).long(), torch.ones(2, 3).long(), torch.rand(2, 3), sampling_settings())
    with torch.no_grad():
        drawing.step()
        drawing = Repeated(drawing)
        drawing.step()
        drawing.step()
    assert not FakeGraph.made and drawing.left == 0


def test_what_waits_for_the_gpu_is_not_recorded(fake_cuda, monkeypatch):
    asked = []

    def waiting(compute):
        asked.append(compute)
        raise RuntimeError("called a synchronizing CUDA operation")

    monkeypatch.setattr(steps, "without_waiting", waiting)
    assert not tried(made(TAKE["gpt2"]))
    assert asked and not FakeGraph.made


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
        assert (drawing.graph is None) == (not steps.RECORDING)
        return found

    with torch.no_grad():
        replayed = run()
        monkeypatch.setattr(steps, "RECORDING", set())
        assert replayed == run()


def sampling_settings():
    return steps.SamplingSettings(5, 12, 0.7, 8, 0.9, [], 8, True)
