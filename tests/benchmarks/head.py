"""Peak memory of an update's forward and backward pass, log-probs in pieces against logits of the whole batch.

    python tests/benchmarks/head.py --model pythia_70m --rows 8 --tokens 64 128 256 512

Each measurement is a process of its own: the policy with random weights, `rows` replies of so many tokens, float32; GiB
beyond what the process held before the pass.
"""

import argparse
import json
import subprocess
import sys

from apa_cli.runs.formatting import format_table


def measured(model: str, rows: int, tokens: int, pieces: bool) -> dict:
    """In this process: seconds and bytes of one pass, the second that is made."""
    import time

    import torch
    from transformers import AutoModelForCausalLM

    from apa_cli.bench.synthetic import random_model
    from apa_cli.config.build import build_config
    from apa_cli.config.compose import compose
    from apa_cli.hardware.allocator import keep_freed_blocks
    from apa_cli.hardware.machine import read_peak_memory, reset_peak_memory
    from apa_cli.models import forward
    from apa_cli.models.loading import load_model_config
    from apa_cli.types import Sequences

    keep_freed_blocks()
    cpu, config = torch.device("cpu"), build_config(compose([f"model={model}"]))
    policy = random_model(AutoModelForCausalLM, load_model_config(config.model, config.model.path), 0, cpu)
    if not pieces:
        forward.find_linear_head = lambda model: None
    torch.manual_seed(0)
    prompts, replies = torch.randint(1, 1000, (rows, 16)), torch.randint(1, 1000, (rows, tokens))
    true = torch.ones_like(prompts, dtype=torch.bool), torch.ones_like(replies, dtype=torch.bool)
    batch = Sequences(prompts, true[0], replies, true[1])
    forward.compute_response_logprobs(policy, batch, 1.0).sum().backward()
    policy.zero_grad()
    reset_peak_memory(cpu)
    held, begun = read_peak_memory(cpu), time.perf_counter()
    forward.compute_response_logprobs(policy, batch, 1.0).sum().backward()
    return {"seconds": time.perf_counter() - begun, "gib": (read_peak_memory(cpu) - held) / 2**30}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="pythia_70m")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--tokens", type=int, nargs="+", default=[64, 128, 256, 512])
    parser.add_argument("--side", choices=["whole", "pieces"], help="measure this one, here")
    arguments = parser.parse_args()
    if arguments.side:
        print(json.dumps(measured(arguments.model, arguments.rows, arguments.tokens[0], arguments.side == "pieces")))
        return
    table = []
    for tokens in arguments.tokens:
        words = ["--model", arguments.model, "--rows", str(arguments.rows), "--tokens", str(tokens)]
        found = {}
        for side in ("whole", "pieces"):
            command = [sys.executable, __file__, *words, "--side", side]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            found[side] = json.loads(done.stdout.splitlines()[-1])
        whole, pieces = found["whole"], found["pieces"]
        table.append((str(tokens), whole["gib"], pieces["gib"], whole["seconds"], pieces["seconds"]))
    header = ("tokens", "whole GiB", "pieces GiB", "whole s", "pieces s")
    print("\n".join(format_table(header, table)))


if __name__ == "__main__":
    main()
