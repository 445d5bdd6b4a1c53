"""PPO against TRL's last PPOTrainer (trl 1.12.0, `trl.experimental.ppo`), and APA beside them: samples per second.

    python tests/benchmarks/against_trl.py --model pythia_14m pythia_70m --turns 3 --out outputs/against_trl
    python tests/benchmarks/against_trl.py --side trl --model pythia_14m      one measurement of TRL, in this process

`make bench-trl` makes an environment with both tools and runs the first. Each measurement is a process of its own, the
sides in turn, `--turns` times; medians are compared. The work is made equal:

- architecture: conf/model/NAME.yaml, random weights; policy, reference, critic and reward are four models of it;
- prompts: the same random tokens, lengths spread evenly over 16 to 64; no response ends early on either side;
- batches: the same responses per iteration, minibatch, microbatch and passes over them; one chunk in sampling.
  TRL's own accumulation makes an optimizer step only every `responses / microbatch` microbatches, whatever its
  minibatch is; it is set so that both make a step for every minibatch, and the number of steps is checked;
- precision: float32, or for both bfloat16 autocast over everything, with reference and reward stored in bfloat16;
- TRL's gradient checkpointing, sample generation, reports and checkpoints are off. It logs an iteration's metrics, as
  apa-train does.

What each does with that is its own: TRL pads prompts to the longest, takes old log-probs from generation and logits
over the whole sequence; apa-train's PPO recomputes old log-probs and clips gradient norms. Seconds are those of whole
iterations after the first, here from one iteration's end to the next, there by apa-bench.
"""

import argparse
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SIDES = ("trl", "ppo", "apa")
SHORTEST, LONGEST = 16, 64
LR = 1e-6


def words(arguments: argparse.Namespace, algo: str, model: str) -> list[str]:
    """apa-bench's words for this work."""
    return [
        f"model={model}",
        f"algo={algo}",
        f"model.dtype={arguments.dtype}",
        f"bench.iterations={arguments.iterations}",
        "bench.warmup=1",
        f"bench.shortest_prompt={SHORTEST}",
        f"sampling.max_prompt_tokens={LONGEST}",
        f"sampling.max_new_tokens={arguments.tokens}",
        f"sampling.microbatch_size={arguments.responses}",
        "sampling.stop_strings=[]",
        f"rollout_batch_size={arguments.responses}",
        f"minibatch_size={arguments.minibatch}",
        f"microbatch_size={arguments.microbatch}",
        f"reward.microbatch_size={arguments.responses}",
        f"update_epochs={arguments.epochs}",
        f"optimizer.lr={LR}",
        f"optimizer.critic_lr={LR}",
        f"launch.matmul={arguments.matmul}",
        *([] if arguments.threads is None else [f"launch.threads={arguments.threads}"]),
    ]


def measured_here(arguments: argparse.Namespace, algo: str, model: str) -> dict:
    """apa-bench in a process of its own → its result."""
    command = [sys.executable, "-c", "from apa_cli.cli.bench import main; main()", *words(arguments, algo, model)]
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([*command, "name=it"], cwd=folder, check=True, stdout=subprocess.DEVNULL)
        result = json.loads((Path(folder) / "outputs" / "it" / "bench.json").read_text())
    return {
        "samples_per_s": result["samples_per_s"],
        "phases": {row["name"]: {key: row[key] for key in ("seconds", "floor_share")} for row in result["phases"]},
        "floor_s": result["floor_s"],
        "peak_gib": result["peak_bytes"] / 2**30,
        "machine": result["machine"],
    }


def measured_trl(arguments: argparse.Namespace, model: str) -> dict:
    """TRL's trainer in this process → its result."""
    import contextlib

    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, TrainerCallback
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    from apa_cli.bench.synthetic import number_tokenizer, random_examples, random_model, reward_architecture
    from apa_cli.config.build import build_config
    from apa_cli.config.compose import compose
    from apa_cli.hardware.machine import read_peak_memory
    from apa_cli.models.loading import load_model_config

    config = build_config(compose(words(arguments, "ppo", model)))
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    low = arguments.dtype == "bfloat16"
    frozen = torch.bfloat16 if low else torch.float32
    architecture = load_model_config(config.model, config.model.path)
    tokenizer = number_tokenizer(architecture.vocab_size)
    tokenizer.padding_side = "left"
    rows = [tokenizer(example.prompt)["input_ids"] for example in random_examples(config, architecture.vocab_size)]
    scored = reward_architecture(config, architecture)
    policy = random_model(AutoModelForCausalLM, architecture, 0, device)
    reference = random_model(AutoModelForCausalLM, architecture, 0, device, dtype=frozen)
    critic = random_model(AutoModelForSequenceClassification, scored, 1, device)
    reward = random_model(AutoModelForSequenceClassification, scored, 2, device, dtype=frozen)

    ends: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *_, **__):
            if device.type == "cuda":
                torch.cuda.synchronize()
            ends.append(time.perf_counter())

    with tempfile.TemporaryDirectory() as folder:
        trainer = PPOTrainer(
            args=PPOConfig(
                output_dir=folder,
                per_device_train_batch_size=arguments.microbatch,
                gradient_accumulation_steps=arguments.responses // arguments.microbatch,
                num_mini_batches=arguments.responses // arguments.minibatch,
                num_ppo_epochs=arguments.epochs,
                total_episodes=arguments.responses * (1 + arguments.iterations),
                local_rollout_forward_batch_size=arguments.responses,
                response_length=arguments.tokens,
                temperature=1.0,
                stop_token=None,
                num_sample_generations=0,
                learning_rate=LR,
                kl_coef=0.05,
                vf_coef=1.0,
                gradient_checkpointing=False,
                bf16=False,
                use_cpu=device.type == "cpu",
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                seed=0,
            ),
            processing_class=tokenizer,
            model=policy,
            ref_model=reference,
            reward_model=reward,
            value_model=critic,
            train_dataset=Dataset.from_dict({"input_ids": rows}),
            eval_dataset=Dataset.from_dict({"input_ids": rows}),
            callbacks=[Clock()],
        )
        trainer.accelerator.gradient_accumulation_steps = arguments.minibatch // arguments.microbatch
        # else it would step at every microbatch of the last batch of a pass over the prompts, which here is every batch
        trainer.accelerator.gradient_state.plugin_kwargs["sync_with_dataloader"] = False
        precision = torch.autocast(device.type, dtype=torch.bfloat16) if low else contextlib.nullcontext()
        with contextlib.redirect_stdout(sys.stderr), precision:
            trainer.train()
    state = next(iter(trainer.optimizer.state.values()))
    steps = len(ends) * arguments.epochs * arguments.responses // arguments.minibatch
    if int(state["step"]) != steps:
        sys.exit(f"TRL made {int(state['step'])} optimizer steps, and should have made {steps}")
    seconds = statistics.median(after - before for before, after in itertools.pairwise(ends))
    return {"samples_per_s": arguments.responses / seconds, "peak_gib": read_peak_memory(device) / 2**30}


def compared(arguments: argparse.Namespace, model: str) -> dict:
    """All sides in turn → the medians, and the ratios of samples per second to TRL's."""
    found: dict[str, list[dict]] = {side: [] for side in SIDES}
    for turn in range(arguments.turns):
        for side in SIDES:
            begun = time.perf_counter()
            found[side].append(measured_trl_apart(model) if side == "trl" else measured_here(arguments, side, model))
            rate = found[side][-1]["samples_per_s"]
            took = time.perf_counter() - begun
            print(f"{model} turn {turn + 1} {side}: {rate:.3f} samples/s ({took:.0f} s)", file=sys.stderr, flush=True)
    median = {side: statistics.median(one["samples_per_s"] for one in runs) for side, runs in found.items()}
    return {
        "samples_per_s": median,
        "ratio_to_trl": {side: median[side] / median["trl"] for side in SIDES},
        "runs": found,
    }


def measured_trl_apart(model: str) -> dict:
    """TRL in a process of its own, with this one's words."""
    command = [sys.executable, __file__, *sys.argv[1:], "--side", "trl", "--model", model]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", nargs="+", default=["pythia_14m", "pythia_70m"], help="names in conf/model")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--responses", type=int, default=32, help="responses per iteration")
    parser.add_argument("--tokens", type=int, default=64, help="tokens of every response")
    parser.add_argument("--minibatch", type=int, default=8)
    parser.add_argument("--microbatch", type=int, default=8)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--iterations", type=int, default=1, help="measured ones, after one that is not")
    parser.add_argument("--turns", type=int, default=3, help="measurements of each side")
    parser.add_argument("--threads", type=int, help="CPU threads; PyTorch's choice where it is not given")
    parser.add_argument("--matmul", default="auto", help="apa-train's launch.matmul; TRL has PyTorch's own products")
    parser.add_argument("--side", choices=["trl"], help="measure this one once, in this process")
    parser.add_argument("--out", type=Path, help="folder for against_trl_DTYPE.json")
    arguments = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    sys.path.insert(0, str(ROOT))
    if arguments.side:
        print(json.dumps(measured_trl(arguments, arguments.model[0])))
        return
    packages = {name: metadata.version(name) for name in ("torch", "transformers", "trl", "accelerate")}
    result = {
        "settings": {key: value for key, value in vars(arguments).items() if key not in ("side", "out")},
        "packages": packages,
        "platform": platform.platform(),
        "date": time.strftime("%Y-%m-%d"),
        "models": {model: compared(arguments, model) for model in arguments.model},
    }
    print(f"{'samples/s':14s}" + "".join(f"{side:>10s}" for side in SIDES) + "   PPO / TRL  APA / TRL")
    for model, one in result["models"].items():
        rates = "".join(f"{one['samples_per_s'][side]:10.3f}" for side in SIDES)
        print(f"{model:14s}{rates}{one['ratio_to_trl']['ppo']:12.2f}{one['ratio_to_trl']['apa']:11.2f}")
    if arguments.out:
        arguments.out.mkdir(parents=True, exist_ok=True)
        file = arguments.out / f"against_trl_{arguments.dtype}.json"
        file.write_text(json.dumps(result, indent=2) + "\n")
        print(f"written to {file}")


if __name__ == "__main__":
    main()
