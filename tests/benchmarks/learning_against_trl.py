"""PPO and APA against TRL's last PPOTrainer (trl 1.12.0, `trl.experimental.ppo`): held-out score at equal KL.

    python tests/benchmarks/learning_against_trl.py --seeds 0 1 2 3 --out outputs/learning
    python tests/benchmarks/learning_against_trl.py --report --out outputs/learning        the tables of finished jobs

`make bench-learning` makes an environment with both tools and runs the first. A job is one side, λ and seed; it trains
a policy in a process of its own, evaluates it by `apa-eval`, and writes result.json to its folder. A job that has one
is not repeated, so the command may be stopped and started again. Both sides have the same

- models: SFT and reward model of the embedded default, from `--sft` and `--reward` or else from the stages' cache;
- work: 40 iterations of 64 responses of up to 64 tokens, to prompts of the same training set; minibatches of 32,
  2 passes, temperature 1, linear decay of 5e-4 for policy and critic (APA: apa-train's own 1e-3 for the critic);
- scores: TRL's trainer scores by apa-train's function, that is, text without the end token, from a prompt as text;
- evaluation: 1024 held-out prompts, and the same random numbers for all policies.

Everything else is each tool's own. TRL's critic starts from the reward model, and it never clips gradients; its own
settings stay but λ, which is the price of KL: vf_coef 0.1, Adam with 0.9, 0.999 and no weight decay.

Sides are compared where their KL is equal: the score of a seed at a KL is interpolated linearly between its runs at
different λ. Each ± is half of a 95 % interval of Student's t: over seeds, for these held-out prompts, or over prompts,
for these seeds. PPO's λ and TRL's are the same price, so their difference in score − λ·KL is shown too: the slope of
score over KL at the optimum of a price is that price, so this is the difference at equal KL, to first order.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib import metadata
from itertools import pairwise
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ITERATIONS, RESPONSES, MINIBATCH, EPOCHS, LR = 40, 64, 32, 2, 5e-4
HELD_OUT = 1024
"""Prompts of the evaluation; with fewer its own noise exceeds the differences."""
TRL, PPO, APA = "trl", "ppo", "apa"
SIDES: dict[str, tuple[list[str], tuple[float, ...]]] = {
    TRL: ([], (0.2, 0.05, 0.01)),
    PPO: (["algo=ppo", "algo.score_scaling=none", f"optimizer.critic_lr={LR}"], (0.2, 0.05, 0.01)),
    APA: (["algo=apa"], (0.2, 0.1, 0.03)),
}
"""Side → apa-train's overrides and the values of λ."""
TARGETS = (2.0, 4.0, 8.0)
"""KLs of the comparison, exact, nats per response."""
T_QUANTILES = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
)  # fmt: skip
"""97.5 % quantiles of Student's t with 1, 2, … degrees of freedom."""


# --- statistics ---------------------------------------------------------------------------------------------


def get_t_quantile(degrees: int) -> float:
    """Return the 97.5 % quantile of Student's t; beyond the table an approximation to 0.2 %."""
    return T_QUANTILES[degrees - 1] if degrees <= len(T_QUANTILES) else 1.96 + 2.5 / degrees


def compute_interval(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean and half of its 95 % interval of Student's t; NaN if there are fewer than two values."""
    if len(values) < 2:
        return (values[0] if values else float("nan")), float("nan")
    return statistics.fmean(values), get_t_quantile(len(values) - 1) * statistics.stdev(values) / len(values) ** 0.5


def find_weights(kls: Sequence[float], target: float) -> list[float] | None:
    """Return the weights of the runs that interpolate linearly to the target KL; None if it is outside all KLs."""
    order = sorted(range(len(kls)), key=lambda i: kls[i])
    for low, high in pairwise(order):
        if kls[low] <= target <= kls[high] and kls[low] < kls[high]:
            weights, share = [0.0] * len(kls), (target - kls[low]) / (kls[high] - kls[low])
            weights[low], weights[high] = 1 - share, share
            return weights
    return None


def interpolate_scores(runs: Sequence[dict], target: float) -> list[float] | None:
    """Return each prompt's score at the target KL from one seed's runs, the same weights for all prompts."""
    weights = find_weights([run["kl"] for run in runs], target)
    if weights is None:
        return None
    columns = zip(*(run["scores"] for run in runs), strict=True)
    return [sum(weight * score for weight, score in zip(weights, column, strict=True)) for column in columns]


def compute_objective(run: dict) -> list[float]:
    """Return score − λ·KL of each prompt, which PPO maximizes."""
    return [score - run["lambda"] * kl for score, kl in zip(run["scores"], run["kls"], strict=True)]


def compare_sides(first: dict[int, list[float]], second: dict[int, list[float]]) -> dict[str, tuple[float, float]]:
    """Return the difference first − second with its interval over seeds and over prompts.

    Both are seed → score of each prompt; only seeds that both have count.
    """
    seeds = sorted(first.keys() & second.keys())
    by_seed = [[a - b for a, b in zip(first[seed], second[seed], strict=True)] for seed in seeds]
    by_prompt = [statistics.fmean(column) for column in zip(*by_seed, strict=True)]
    return {
        "seeds": compute_interval([statistics.fmean(row) for row in by_seed]),
        "prompts": compute_interval(by_prompt),
    }


# --- jobs ---------------------------------------------------------------------------------------------------


def get_overrides(arguments: argparse.Namespace, policy: Path | None = None) -> list[str]:
    """Return the overrides that training and evaluation of both sides share; `policy`: None, the SFT model."""
    return [
        "model=embedded",
        f"model.path={policy or arguments.sft}",
        f"reward.path={arguments.reward}",
        f"launch.threads={arguments.threads}",
        "launch.device=cpu",
        f"dataset.test_prompts={HELD_OUT}",
    ]


def run_command(name: str, overrides: Sequence[str], folder: Path) -> Path:
    """Run apa-train or apa-eval in `folder`; return the directory of its run. Its output goes to NAME.log."""
    script = f"from apa_cli.cli.{name} import main; main()"
    with (folder / f"{name}.log").open("w") as log:
        command = [sys.executable, "-c", script, *overrides, f"name={name}"]
        subprocess.run(command, cwd=folder, check=True, stdout=log, stderr=subprocess.STDOUT)
    return folder / "outputs" / name


def train_ours(arguments: argparse.Namespace, side: str, lambda_: float, seed: int, folder: Path) -> None:
    """Train by apa-train; leave the policy in `folder`/model."""
    run = run_command(
        "train",
        [
            *get_overrides(arguments),
            *SIDES[side][0],
            f"lambda={lambda_}",
            f"seed={seed}",
            f"iterations={ITERATIONS}",
            f"rollout_batch_size={RESPONSES}",
            f"minibatch_size={MINIBATCH}",
            f"update_epochs={EPOCHS}",
            f"optimizer.lr={LR}",
            "evaluation.every=0",
            "evaluation.prompts=8",
            "checkpoint.every=0",
        ],
        folder,
    )
    shutil.copytree(run / "model", folder / "model", dirs_exist_ok=True)


def train_trl(arguments: argparse.Namespace, lambda_: float, seed: int, folder: Path) -> None:
    """Train by TRL's PPOTrainer in this process; leave the policy in `folder`/model."""
    import torch
    import trl.experimental.ppo.ppo_trainer as ppo_trainer
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    from apa_cli.config.build import build_config
    from apa_cli.config.compose import compose
    from apa_cli.models.loading import load_tokenizer
    from apa_cli.models.prompting import PromptFormat
    from apa_cli.rewards.base import Placement
    from apa_cli.rollout.response_text import read_response
    from apa_cli.training.build import load_examples

    torch.set_num_threads(arguments.threads)
    config = build_config(compose(get_overrides(arguments)))
    tokenizer = load_tokenizer(config.model, arguments.sft)
    tokenizer.padding_side = "left"
    train, _ = load_examples(config, lambda message: print(message, file=sys.stderr))
    prompt_format, longest = PromptFormat(tokenizer, config.dataset.prompt_style), config.sampling.max_prompt_tokens
    prompts = [prompt_format.encode_prompt(example, 0, 0, longest)[0] for example in train]
    texts = {tuple(prompt.token_ids): prompt.text for prompt in prompts}
    rows = Dataset.from_dict({"input_ids": [prompt.token_ids for prompt in prompts]})
    policy, reference = (AutoModelForCausalLM.from_pretrained(arguments.sft) for _ in range(2))
    critic, reward = (AutoModelForSequenceClassification.from_pretrained(arguments.reward) for _ in range(2))
    score = config.reward.use_trained_model(arguments.reward).load(Placement("cpu", "float32"))
    get_value = ppo_trainer.get_reward

    def get_reward(model, query_responses, pad_token_id, context_length):
        """TRL's own function for the critic; for the reward model apa-train's, on text without the end token."""
        if model is not reward:
            return get_value(model, query_responses, pad_token_id, context_length)
        questions, answers = [], []
        for row in query_responses.tolist():
            question = [token for token in row[:context_length] if token != pad_token_id]
            answer = [token for token in row[context_length:] if token != pad_token_id]
            ending = "eos" if tokenizer.eos_token_id in answer else "length"
            questions.append(texts[tuple(question)])
            answers.append(read_response(tokenizer, answer, ending, config.sampling.stop_strings)[2])
        return None, torch.tensor(score(questions, answers, [{} for _ in answers])), None

    ppo_trainer.get_reward = get_reward
    trainer = PPOTrainer(
        args=PPOConfig(
            output_dir=str(folder / "trl"),
            per_device_train_batch_size=MINIBATCH,
            gradient_accumulation_steps=RESPONSES // MINIBATCH,
            num_mini_batches=RESPONSES // MINIBATCH,
            num_ppo_epochs=EPOCHS,
            total_episodes=ITERATIONS * RESPONSES,
            local_rollout_forward_batch_size=RESPONSES,
            response_length=config.sampling.max_new_tokens,
            temperature=1.0,
            stop_token="eos",
            num_sample_generations=0,
            learning_rate=LR,
            lr_scheduler_type="linear",
            kl_coef=lambda_,
            gradient_checkpointing=False,
            bf16=False,
            use_cpu=True,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            seed=seed,
        ),
        processing_class=tokenizer,
        model=policy,
        ref_model=reference,
        reward_model=reward,
        value_model=critic,
        train_dataset=rows,
        eval_dataset=rows,
    )
    # TRL steps the optimizer after `gradient_accumulation_steps` microbatches, whatever its minibatch is; one here.
    trainer.accelerator.gradient_accumulation_steps = 1
    trainer.accelerator.gradient_state.plugin_kwargs["sync_with_dataloader"] = False
    trainer.train()
    made, steps = (
        int(next(iter(trainer.optimizer.state.values()))["step"]),
        ITERATIONS * EPOCHS * RESPONSES // MINIBATCH,
    )
    if made != steps:
        sys.exit(f"TRL made {made} optimizer steps, and should have made {steps}")
    policy.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")


def evaluate(arguments: argparse.Namespace, folder: Path) -> dict:
    """Evaluate the policy in `folder`/model by apa-eval: mean score, exact KL, and both of each prompt's response."""
    options = [f"evaluation.prompts={HELD_OUT}", "evaluation.best_of=[]", f"evaluation.reference={arguments.sft}"]
    overrides = [*get_overrides(arguments, policy=folder / "model"), *options]
    report = json.loads((run_command("evaluate", overrides, folder) / "eval.json").read_text())
    rows = [row["policy"] for row in report["replies"]]
    return {
        "score": report["metrics"]["eval/reward_mean"],
        "kl": report["metrics"]["eval/kl_exact"],
        "scores": [row["score"] for row in rows],
        "kls": [row["kl"] for row in rows],
    }


def run_job(arguments: argparse.Namespace, side: str, lambda_: float, seed: int) -> None:
    """Train and evaluate one policy, unless its folder has a result."""
    target = arguments.out / side / f"lambda_{lambda_}" / f"seed_{seed}"
    if (target / "result.json").exists():
        return
    begun = time.perf_counter()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        if side == TRL:
            command = [sys.executable, __file__, "--train-trl", str(lambda_), str(seed), temporary]
            command += ["--sft", arguments.sft, "--reward", arguments.reward, "--threads", str(arguments.threads)]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        else:
            train_ours(arguments, side, lambda_, seed, folder)
        result = {"side": side, "lambda": lambda_, "seed": seed, **evaluate(arguments, folder)}
        target.mkdir(parents=True, exist_ok=True)
        shutil.copytree(folder / "model", target / "model", dirs_exist_ok=True)
    versions = {name: metadata.version(name) for name in ("torch", "transformers", "trl")}
    result |= {"seconds": time.perf_counter() - begun, "date": time.strftime("%Y-%m-%d"), "versions": versions}
    result |= {"platform": platform.platform(), "overrides": SIDES[side][0]}
    (target / "result.json").write_text(json.dumps(result) + "\n")
    shown = f"score {result['score']:.3f} at KL {result['kl']:.2f} ({result['seconds']:.0f} s)"
    print(f"{side} λ={lambda_} seed {seed}: {shown}", file=sys.stderr, flush=True)


# --- report -------------------------------------------------------------------------------------------------


def format_interval(interval: tuple[float, float]) -> str:
    """Return "mean ± half width"; of one value the value, of none nothing."""
    mean, half = interval
    return "" if math.isnan(mean) else f"{mean:.3f}" if math.isnan(half) else f"{mean:.3f} ± {half:.3f}"


def print_report(results: Sequence[dict]) -> None:
    """Print the mean of every side and λ, then the sides at equal KL."""
    from apa_cli.runs.formatting import format_table

    runs = {side: [run for run in results if run["side"] == side] for side in SIDES}
    runs = {side: found for side, found in runs.items() if found}
    header = ("side", "λ", "seeds", "score", "exact KL, nats", "score − λ·KL", "− trl (± over seeds)")
    print("\n".join(format_table(header, [row for side in runs for row in describe_lambdas(side, runs)])))
    rows = [row for target in TARGETS for row in describe_target(target, runs)]
    header = ("KL", "side", "seeds", "score at this KL", "− trl (± over seeds)", "− trl (± over prompts)")
    print("\n".join(["", *format_table(header, rows)]))


def describe_lambdas(side: str, runs: dict[str, list[dict]]) -> list[tuple[str, ...]]:
    """Return a row for each λ of a side. Only PPO's λ, like TRL's, is a price per nat."""
    rows = []
    for lambda_ in sorted({run["lambda"] for run in runs[side]}, reverse=True):
        found = {run["seed"]: run for run in runs[side] if run["lambda"] == lambda_}
        score, kl = (format_interval(compute_interval([run[key] for run in found.values()])) for key in ("score", "kl"))
        row = (side, str(lambda_), str(len(found)), score, kl)
        if side == APA:
            rows.append((*row, "", ""))
            continue
        objective = {seed: compute_objective(run) for seed, run in found.items()}
        others = {run["seed"]: compute_objective(run) for run in runs.get(TRL, []) if run["lambda"] == lambda_}
        mean = compute_interval([statistics.fmean(values) for values in objective.values()])
        has_difference = side != TRL and objective.keys() & others.keys()
        difference = format_interval(compare_sides(objective, others)["seeds"]) if has_difference else ""
        rows.append((*row, format_interval(mean), difference))
    return rows


def describe_target(target: float, runs: dict[str, list[dict]]) -> list[tuple[str, ...]]:
    """Return a row for each side at one KL."""
    at_target: dict[str, dict[int, list[float]]] = {}
    for side, found in runs.items():
        by_seed = {
            seed: interpolate_scores([run for run in found if run["seed"] == seed], target)
            for seed in sorted({run["seed"] for run in found})
        }
        at_target[side] = {seed: scores for seed, scores in by_seed.items() if scores is not None}
    rows = []
    for side, scores in at_target.items():
        mean = compute_interval([statistics.fmean(values) for values in scores.values()])
        row = (f"{target:g}", side, str(len(scores)), format_interval(mean))
        if side == TRL or not scores.keys() & at_target.get(TRL, {}).keys():
            rows.append((*row, "", ""))
        else:
            difference = compare_sides(scores, at_target[TRL])
            rows.append((*row, *(format_interval(difference[over]) for over in ("seeds", "prompts"))))
    return rows


def find_models(arguments: argparse.Namespace) -> None:
    """Fill in the paths of SFT and reward model that are not given, by the stages of the embedded default."""
    import torch

    from apa_cli.config.build import build_config
    from apa_cli.config.compose import compose
    from apa_cli.runs.console import Console
    from apa_cli.training.build import load_examples, run_missing_stages

    given = {"model.path": arguments.sft, "reward.path": arguments.reward}
    overrides = ["model=embedded", f"dataset.test_prompts={HELD_OUT}"]
    overrides += [f"{key}={path}" for key, path in given.items() if path]
    with Console(None, 0, live=False) as console:
        config = build_config(compose(overrides))
        train, held_out = load_examples(config, console.say)
        config = run_missing_stages(config, train, held_out, torch.device("cpu"), console)
    arguments.sft, arguments.reward = config.model.resolved_path, config.reward.path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sft", help="folder of the SFT model")
    parser.add_argument("--reward", help="folder of the reward model, with the SFT model's tokenizer")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(8)))
    parser.add_argument("--sides", nargs="+", choices=list(SIDES), default=list(SIDES))
    parser.add_argument("--lambdas", type=float, nargs="+", help="only these values of the sides' λ")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--out", type=Path, default=Path("outputs/learning"), help="folder of the jobs' results")
    parser.add_argument("--report", action="store_true", help="train nothing")
    parser.add_argument("--train-trl", nargs=3, metavar=("LAMBDA", "SEED", "FOLDER"), help="one training of TRL, here")
    arguments = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    sys.path.insert(0, str(ROOT))
    if arguments.train_trl:
        lambda_, seed, folder = arguments.train_trl
        train_trl(arguments, float(lambda_), int(seed), Path(folder))
        return
    arguments.out = arguments.out.resolve()
    if not arguments.report:
        find_models(arguments)
        for seed in arguments.seeds:
            for side in arguments.sides:
                for lambda_ in SIDES[side][1]:
                    if arguments.lambdas is None or lambda_ in arguments.lambdas:
                        run_job(arguments, side, lambda_, seed)
    files = sorted(arguments.out.glob("*/*/*/result.json"))
    print_report([json.loads(file.read_text()) for file in files])


if __name__ == "__main__":
    main()
