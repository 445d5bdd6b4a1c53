"""Names of other tools' keys, and the names here. They are only suggested: no alias is accepted."""

from __future__ import annotations

from pathlib import Path

BATCHES = (
    "rollout_batch_size (responses sampled per iteration), minibatch_size (per optimizer step) or microbatch_size "
    "(per forward pass and process)"
)
RUN_LENGTH = "iterations (each samples, scores and updates once), or update_epochs (passes over each rollout batch)"
KL = "lambda, whose meaning depends on the algorithm (for PPO it sets algo.kl_coef)"
WARMUP = "optimizer.warmup_ratio (share of the optimizer steps)"
MODEL = "model=local model.path=FOLDER_OR_HUB_ID"

ALIASES = {
    "actor_lr": "optimizer.lr",
    "adam_beta1": "optimizer.betas",
    "adam_beta2": "optimizer.betas",
    "adap_kl_ctrl": "algo.kl_controller=adaptive",
    "advantage": "algo.advantage_estimator",
    "attention": "model.attn_implementation",
    "attn": "model.attn_implementation",
    "batch_size": BATCHES,
    "beta": KL,
    "bf16": "model.dtype=bfloat16",
    "checkpoint_every": "checkpoint.every",
    "clip_eps": "algo.clip_range",
    "cliprange": "algo.clip_range",
    "cliprange_value": "algo.value_clip_range",
    "controller": "algo.kl_controller",
    "critic_learning_rate": "optimizer.critic_lr",
    "dataset_name": "dataset=NAME",
    "epochs": RUN_LENGTH,
    "eval_every": "evaluation.every",
    "eval_seed": "evaluation.seed",
    "eval_steps": "evaluation.every",
    "fp16": "model.dtype=bfloat16 (float16 is not offered)",
    "frozen": "launch.frozen_placement",
    "fsdp": "launch.strategy=fsdp",
    "gradient_accumulation_steps": "microbatch_size (gradients accumulate over the microbatches of a minibatch)",
    "guide_model": "guide=local guide.path=FOLDER_OR_HUB_ID",
    "init_kl_coef": KL,
    "kl_beta": KL,
    "kl_coef": KL,
    "kl_ctl": KL,
    "kl_penalty": KL,
    "lam": "algo.gae_lambda",
    "lambda_": "lambda",
    "learning_rate": "optimizer.lr",
    "load_in_4bit": "model.quantization=int4",
    "load_in_8bit": "model.quantization=int8",
    "log_with": "tracking=wandb or tracking=tensorboard",
    "lora_alpha": "lora=default lora.alpha",
    "lora_r": "lora=default lora.rank",
    "lora_rank": "lora=default lora.rank",
    "lora_target_modules": "lora=default lora.target_modules",
    "lr": "optimizer.lr",
    "lr_scheduler_type": "optimizer.lr_scheduler",
    "max_epochs": RUN_LENGTH,
    "max_length": "sampling.max_new_tokens (responses) or sampling.max_prompt_tokens",
    "max_prompt_length": "sampling.max_prompt_tokens",
    "max_steps": RUN_LENGTH,
    "max_tokens": "sampling.max_new_tokens (responses) or sampling.max_prompt_tokens",
    "microbatch": "microbatch_size",
    "mini_batch_size": "minibatch_size",
    "minibatch": "minibatch_size",
    "model_name": MODEL,
    "model_name_or_path": MODEL,
    "nproc_per_node": "launch.processes",
    "num_epochs": RUN_LENGTH,
    "num_generations": "samples_per_prompt",
    "num_iterations": RUN_LENGTH,
    "num_mini_batches": "minibatch_size (responses per optimizer step)",
    "num_ppo_epochs": "update_epochs",
    "num_processes": "launch.processes",
    "num_train_epochs": RUN_LENGTH,
    "output_dir": "name (the run is written to outputs/NAME)",
    "per_device_train_batch_size": BATCHES,
    "ppo_epochs": "update_epochs",
    "pretrain": MODEL,
    "pretrained": MODEL,
    "report_to": "tracking=wandb or tracking=tensorboard",
    "response_length": "sampling.max_new_tokens",
    "resume_from_checkpoint": "resume=outputs/NAME, or name=NAME resume=auto",
    "reward_fn": "reward=function reward.target=FILE.py:NAME",
    "reward_funcs": "reward=function reward.target=FILE.py:NAME",
    "reward_model_path": "reward.path",
    "rollout_batch": "rollout_batch_size",
    "rollout_n": "samples_per_prompt",
    "run_name": "name",
    "save_steps": "checkpoint.every",
    "schedule": "optimizer.lr_scheduler",
    "sft_model_path": MODEL,
    "shown": "evaluation.print_samples",
    "targets": "lora.target_modules",
    "tensorboard": "tracking=tensorboard",
    "tokenizer_name": "model.tokenizer",
    "total_episodes": RUN_LENGTH,
    "total_epochs": RUN_LENGTH,
    "total_steps": RUN_LENGTH,
    "total_timesteps": RUN_LENGTH,
    "train_batch_size": BATCHES,
    "use_lora": "lora=default",
    "use_peft": "lora=default",
    "use_wandb": "tracking=wandb",
    "value_clip": "algo.value_clip_range",
    "vf_coef": "algo.value_coef",
    "wandb": "tracking=wandb",
    "wandb_project": "tracking=wandb tracking.project",
    "warmup_fraction": WARMUP,
    "warmup_steps": WARMUP,
    "world_size": "launch.processes",
}
"""Last part of a key that does not exist here → its replacement, in key=value form or as a key."""

CHOSEN_BY_GROUP = {"critic.kind": "critic", "tracking.kind": "tracking"}
"""Keys that only a group's option sets, by GROUP=OPTION → that group."""


def suggest_for_key(key: str) -> str | None:
    """Return the name here of another tool's key, or None."""
    return ALIASES.get(key.rpartition(".")[2].replace("-", "_").lower())


def suggest_for_option(group: str, option: str) -> str | None:
    """Return the overrides for a path, hub id or file that was given as a group's option, or None."""
    is_path = "/" in option or Path(option).expanduser().exists()
    suffix = Path(option).suffix
    if group == "model" and is_path:
        return f"model=local model.path={option}"
    if group == "guide" and is_path:
        return f"guide=local guide.path={option}"
    if group == "plan" and option.lower() == "true":
        return "dry_run=true"
    if group in ("algo", "plan", "dataset") and ".py:" in option:
        return f"--config-dir DIR with DIR/{group}/NAME.yaml, whose _target_ is {option}, and {group}=NAME"
    if group == "dataset" and (suffix in (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".gz") or "/" in option):
        return f"dataset=jsonl dataset.path={option}"
    if group == "dataset" and option.lower() in ("json", "csv", "parquet", "sharegpt", "hub", "local", "custom"):
        return "dataset=jsonl dataset.path=FILE_FOLDER_OR_HUB_ID"
    if group == "dataset" and suffix == ".txt":
        return f"dataset=prompts dataset.path={option}"
    if group == "reward" and ".py:" in option:
        return f"reward=function reward.target={option}"
    if group == "reward" and option.startswith(("http://", "https://")):
        return f"reward=http reward.url={option}"
    if group == "reward" and is_path:
        return f"reward=model reward.path={option}"
    if group == "lora" and option.isdigit():
        return f"lora=default lora.rank={option}"
    return None
