"""Decode steps: CUDA-graph capture on a fake GPU, and the probe of models for it."""

from contextlib import contextmanager
from functools import partial
from typing import ClassVar

import pytest
import torch
from transformers import PreTrainedModel

from apa_cli.rollout import decode_step, graph_probe
from apa_cli.rollout.decode_step import EagerDecoder, GraphDecoder
from apa_cli.rollout.graph_probe import can_decode_with_graph, probe_graph_decoding
from tests.builders import build_tiny_policy, make_sampling_settings

SETTINGS = make_sampling_settings(max_prompt_tokens=5, temperature=0.7, top_k=8, top_p=0.9, microbatch_size=8)
SUPPORTED = ["gpt_neox", "gpt2", "gptj", "llama"]
build_policy = partial(build_tiny_policy, vocab_size=50, num_hidden_layers=2)


class FakeGraph:
    """A CUDA graph without a GPU: what is asked for during the capture is undone, and done at every replay.

    `decoder` is the one whose `compute_step` is captured.
    """

    capturing: "FakeGraph | None" = None
    captures: ClassVar[list["FakeGraph"]] = []
    open_pools: ClassVar[set[object]] = set()
    """Memory pools of captures that have not ended well; PyTorch's allocator refuses another capture into them."""
    fails_at = ""
    """Failure of the capture: at a "step", or only at its "end"."""

    def capture_begin(self, pool, capture_error_mode):
        assert FakeGraph.capturing is None and capture_error_mode == "thread_local"
        assert FakeStream.current == "capture" and FakeStream.waits[-1] == ("capture", "main")
        self.memory, self.complete, FakeGraph.capturing = pool or object(), False, self
        if self.memory in FakeGraph.open_pools:
            raise RuntimeError("beginAllocateToPool: already recording to mempool_id")
        FakeGraph.open_pools.add(self.memory)
        FakeGraph.captures.append(self)

    def capture_end(self):
        FakeGraph.capturing = None
        if FakeGraph.fails_at:
            raise RuntimeError("operation failed due to a previous error during capture")
        FakeGraph.open_pools.remove(self.memory)
        self.complete = True

    def pool(self):
        assert self.complete
        return self.memory

    def replay(self):
        assert FakeStream.current == "main" and FakeStream.waits[-1] == ("main", "capture")
        GraphDecoder.compute_step(self.decoder)
        self.logits.copy_(self.decoder.logits)
        self.decoder.logits = self.logits


class FakeStream:
    """A CUDA stream by name; `waits` lists (stream, the stream that it waited for)."""

    current = "main"
    waits: ClassVar[list[tuple[str, str]]] = []

    def __init__(self, name: str):
        self.name = name

    def wait_stream(self, other):
        FakeStream.waits.append((self.name, other.name))

    @contextmanager
    def enter(self):
        FakeStream.current = self.name
        yield
        FakeStream.current = "main"


@pytest.fixture
def fake_cuda(monkeypatch):
    """Capture on the CPU. The value lists the calls of `empty_cache`: memory is scarce until the first."""
    compute_step = GraphDecoder.compute_step

    def compute_or_capture(self):
        graph = FakeGraph.capturing
        if graph is None:
            return compute_step(self)
        if FakeGraph.fails_at == "step":
            raise RuntimeError("operation not permitted when stream is capturing")
        buffers = [self.attention_mask, self.input_ids, self.position_ids, self.tokens, self.logprobs]
        buffers += [self.cache_position, self.step_index]
        buffers += [x for layer in self.cache.layers for x in (layer.keys, layer.values)]
        before = [x.clone() for x in buffers]
        compute_step(self)
        for x, old in zip(buffers, before, strict=True):
            x.copy_(old)
        graph.decoder, graph.logits = self, torch.full_like(self.logits, torch.nan)
        self.logits = graph.logits

    emptied = []
    main, capture = FakeStream("main"), FakeStream("capture")
    monkeypatch.setattr(GraphDecoder, "compute_step", compute_or_capture)
    monkeypatch.setattr(decode_step, "CAPTURE_DEVICES", {"cpu"})
    monkeypatch.setattr(decode_step, "first_graphs", {})
    monkeypatch.setattr(decode_step, "failed_devices", set())
    monkeypatch.setattr(decode_step, "get_capture_stream", lambda device: capture)
    monkeypatch.setattr(FakeGraph, "open_pools", set())
    monkeypatch.setattr(FakeGraph, "captures", [])
    monkeypatch.setattr(FakeGraph, "fails_at", "")
    for name, fake in {
        "CUDAGraph": FakeGraph,
        "current_stream": lambda device: main,
        "stream": FakeStream.enter,
        "empty_cache": lambda: emptied.append(True),
        "mem_get_info": lambda device: (decode_step.MIN_FREE_BYTES - (not emptied), 2**32),
    }.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    return emptied


@torch.no_grad()
def decode_logprobs(model: PreTrainedModel, with_graph: bool) -> list[list[float]]:
    """Return the log-probs of each step after the first; after the sixth, two of six rows are selected."""
    torch.manual_seed(0)
    input_ids, attention_mask = torch.randint(1, 50, (6, 5)), torch.ones(6, 5, dtype=torch.int64)
    attention_mask[:3, :2] = 0
    decoder = EagerDecoder(model, input_ids, attention_mask, torch.rand(6, 12), SETTINGS)
    decoder.step()
    decoder, rows = GraphDecoder(decoder) if with_graph else decoder, []
    for t in range(11):
        rows.append(decoder.step()[1].tolist())
        if t == 5:
            decoder.select_rows(torch.tensor([1, 4]))
    return rows


def assert_close(rows: list[list[float]], expected: list[list[float]]) -> None:
    for row, expected_row in zip(rows, expected, strict=True):
        assert row == pytest.approx(expected_row, abs=1e-5)


@pytest.mark.parametrize("family", SUPPORTED)
def test_a_captured_step_is_replayed(family, fake_cuda):
    model = build_policy(family)
    assert probe_graph_decoding(model)
    FakeGraph.captures.clear()
    assert_close(decode_logprobs(model, True), decode_logprobs(model, False))
    first, second = FakeGraph.captures  # for six rows and for two, in the same memory pool
    assert first.pool() is second.pool() and len(fake_cuda) == 1
    decode_logprobs(model, True)
    assert {graph.pool() for graph in FakeGraph.captures} == {first.pool()}


@pytest.mark.parametrize("fails_at", ["step", "end"])
def test_steps_that_cannot_be_captured_are_computed(fails_at, fake_cuda, monkeypatch):
    model = build_policy("gpt2")
    monkeypatch.setattr(FakeGraph, "fails_at", fails_at)
    assert not probe_graph_decoding(model)
    FakeGraph.captures.clear()
    assert_close(decode_logprobs(model, True), decode_logprobs(model, False))
    assert not FakeGraph.captures  # one failure on a device ends the attempts


def test_a_capture_that_fails_after_others_succeeded_ends_the_attempts(fake_cuda, monkeypatch):
    model = build_policy("gpt2")
    expected = decode_logprobs(model, False)
    assert_close(decode_logprobs(model, True), expected)
    monkeypatch.setattr(FakeGraph, "fails_at", "end")
    FakeGraph.captures.clear()
    for _ in range(2):
        assert_close(decode_logprobs(model, True), expected)
    assert len(FakeGraph.captures) == 1


def test_cached_memory_is_released_before_a_capture_only_if_memory_is_scarce(fake_cuda):
    decode_logprobs(build_policy("gpt2"), True)
    assert len(FakeGraph.captures) == 2 and len(fake_cuda) == 1


def test_the_last_two_steps_are_not_captured(fake_cuda):
    model, ones = build_policy("gpt2"), torch.ones(2, 3).long()
    decoder = EagerDecoder(model, ones, ones, torch.rand(2, 3), SETTINGS)
    with torch.no_grad():
        decoder.step()
        decoder = GraphDecoder(decoder)
        decoder.step()
        decoder.step()
    assert not FakeGraph.captures and decoder.steps_left == 0


def test_a_step_that_synchronizes_with_the_gpu_is_not_captured(fake_cuda, monkeypatch):
    calls = []

    def raise_synchronization(compute):
        calls.append(compute)
        raise RuntimeError("called a synchronizing CUDA operation")

    monkeypatch.setattr(graph_probe, "run_without_sync", raise_synchronization)
    assert not probe_graph_decoding(build_policy("gpt2"))
    assert calls and not FakeGraph.captures


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("family", SUPPORTED)
def test_a_replayed_graph_samples_what_its_eager_steps_sample(family, monkeypatch):
    """On a GPU, bit for bit, also after rows are selected."""
    model = build_policy(family).cuda()
    assert can_decode_with_graph(model)
    input_ids = torch.randint(1, 50, (6, 5), device="cuda")
    attention_mask = torch.ones_like(input_ids)
    attention_mask[:3, :2] = 0
    uniforms = torch.rand(6, 12, device="cuda")

    def run() -> list[tuple[list[int], list[float]]]:
        decoder, steps = EagerDecoder(model, input_ids, attention_mask, uniforms, SETTINGS), []
        decoder.step()
        decoder = GraphDecoder(decoder)
        for t in range(11):
            tokens, logprobs = decoder.step()
            steps.append((tokens.tolist(), logprobs.tolist()))
            if t == 5:
                decoder.select_rows(torch.tensor([1, 4], device="cuda"))
        assert (decoder.graph is None) == (not decode_step.CAPTURE_DEVICES)
        return steps

    with torch.no_grad():
        replayed = run()
        monkeypatch.setattr(decode_step, "CAPTURE_DEVICES", set())
        assert replayed == run()
