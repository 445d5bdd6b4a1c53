"""The probe of models for decoding with a CUDA graph: the families that it accepts, and the reasons to reject."""

from functools import partial

import pytest
import torch

from apa_cli.rollout import graph_probe
from apa_cli.rollout.decode_step import GraphDecoder
from apa_cli.rollout.graph_probe import can_decode_with_graph, probe_graph_decoding
from tests.builders import build_tiny_policy

UNSUPPORTED = {
    "sliding window": ("mistral", {"sliding_window": 4}),
    "positions computed from the mask": ("bloom", {}),
}
build_policy = partial(build_tiny_policy, vocab_size=50, num_hidden_layers=2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["gpt_neox", "gpt2", "gptj", "llama"])
def test_the_probe_accepts_these_families(family, dtype):
    assert probe_graph_decoding(build_policy(family).to(dtype))


@pytest.mark.parametrize("reason", UNSUPPORTED)
def test_the_probe_rejects_these_models(reason):
    kind, changes = UNSUPPORTED[reason]
    assert not probe_graph_decoding(build_policy(kind, **changes))


def test_the_probe_rejects_eager_attention():
    """It adds the mask to the scores, and a boolean mask hides nothing then."""
    assert not probe_graph_decoding(build_policy("llama", attn_implementation="eager"))


@pytest.mark.parametrize("buffer", ["cache_position", "position_ids", "step_index", "attention_mask"])
def test_the_probe_notices_a_step_that_does_not_advance_a_buffer(buffer, monkeypatch):
    compute_step = GraphDecoder.compute_step

    def compute_without_advancing(self):
        before = getattr(self, buffer).clone()
        compute_step(self)
        getattr(self, buffer).copy_(before)

    monkeypatch.setattr(GraphDecoder, "compute_step", compute_without_advancing)
    # The step's index selects the uniform number, on which logits do not depend: the probe sets the tokens.
    assert probe_graph_decoding(build_policy("gpt2")) == (buffer == "step_index")


def test_models_on_a_cpu_are_not_probed(monkeypatch):
    monkeypatch.setattr(graph_probe, "probe_graph_decoding", lambda model: pytest.fail("probed"))
    assert not can_decode_with_graph(build_policy("gpt2"))


def test_out_of_memory_in_the_probe_is_raised(monkeypatch):
    """It says nothing about the model, so the probe gives no answer."""

    def run_out_of_memory(self):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(GraphDecoder, "compute_step", run_out_of_memory)
    with pytest.raises(torch.OutOfMemoryError):
        probe_graph_decoding(build_policy("gpt2"))
