"""The typed sections of the configuration: names, types and ranges; every value is in conf/.

The sections `algo`, `dataset` and `reward` are not here: each is the dataclass that its `_target_` names.
A field's comment is the one above its key in conf/.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Annotated, Any

from apa_cli.types import AtLeastOne, NonNegative, Positive, Range, Unit

Probability = Range(0, 1, open_low=True)
Seed = Range(0, 2**63 - 1)


class RewardSpecs:
    """Marks a field that holds rewards. In conf/ each is the name of a yaml in conf/reward, or a mapping {use: NAME,
    name: …, weight: …, any key of that yaml: value}; the check of the configuration makes `rewards.base.Part`s of them.
    """


class UpdateOrder(Enum):
    epochs = "epochs"
    consecutive = "consecutive"


class DType(Enum):
    float32 = "float32"
    bfloat16 = "bfloat16"


class Quantization(Enum):
    none = "none"
    int8 = "int8"
    int4 = "int4"


class CriticKind(Enum):
    separate = "separate"
    head = "head"
    adapter = "adapter"


class CriticInit(Enum):
    policy = "policy"
    reward = "reward"


class HeadKind(Enum):
    linear = "linear"
    mlp = "mlp"


class Schedule(Enum):
    constant = "constant"
    linear = "linear"
    cosine = "cosine"


class TrackerKind(Enum):
    none = "none"
    wandb = "wandb"
    tensorboard = "tensorboard"


class TrackingMode(Enum):
    auto = "auto"
    online = "online"
    offline = "offline"


class NonFinite(Enum):
    stop = "stop"
    skip = "skip"


class GuardAction(Enum):
    warn = "warn"
    stop = "stop"


class Matmul(Enum):
    """Who multiplies float32 matrices on a CPU, see `matmul`."""

    auto = "auto"
    torch = "torch"
    onednn = "onednn"


class Device(Enum):
    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


class Strategy(Enum):
    ddp = "ddp"
    fsdp = "fsdp"


class Frozen(Enum):
    replicated = "replicated"
    sharded = "sharded"
    offloaded = "offloaded"


@dataclass(frozen=True)
class RunSettings:
    """The keys that stand at the top of config.yaml."""

    name: str
    seed: Annotated[int, Seed]
    iterations: Annotated[int, NonNegative]
    rollout_batch_size: Annotated[int, AtLeastOne]
    minibatch_size: Annotated[int, AtLeastOne]
    microbatch_size: Annotated[int, AtLeastOne]
    samples_per_prompt: Annotated[int, AtLeastOne]
    update_epochs: Annotated[int, AtLeastOne]
    update_order: UpdateOrder
    stop_at_kl: Annotated[float | None, Positive]
    resume: str | None
    resume_changed: list[str]
    fork: str | None
    stop_after: str | None
    dry_run: bool
    run: str | None


@dataclass(frozen=True)
class ModelSettings:
    path: str | None
    dtype: DType
    attn_implementation: str | None
    trust_remote_code: bool
    tokenizer: str | None
    tokenizer_vocabulary: Annotated[int | None, Range(300)]
    trainable_layers: Annotated[int | None, NonNegative]
    gradient_checkpointing: bool
    quantization: Quantization
    architecture: dict[str, Any]


@dataclass(frozen=True)
class LoraSettings:
    rank: Annotated[int, NonNegative]
    alpha: Annotated[float, Positive]
    target_modules: list[str] | None


@dataclass(frozen=True)
class CriticSettings:
    kind: CriticKind
    init: CriticInit
    head: HeadKind


@dataclass(frozen=True)
class ReferenceSettings:
    refresh_every: Annotated[int, NonNegative]


@dataclass(frozen=True)
class SamplingSettings:
    max_prompt_tokens: Annotated[int, AtLeastOne]
    max_new_tokens: Annotated[int, AtLeastOne]
    temperature: Annotated[float, Positive]
    top_k: Annotated[int, NonNegative]
    top_p: Annotated[float, Probability]
    stop_strings: list[str]
    microbatch_size: Annotated[int, AtLeastOne]
    cuda_graph: bool


@dataclass(frozen=True)
class OptimizerSettings:
    lr: Annotated[float, Positive]
    critic_lr: Annotated[float, Positive]
    betas: list[float]
    eps: Annotated[float, Positive]
    weight_decay: Annotated[float, NonNegative]
    max_grad_norm: Annotated[float, Positive]
    lr_scheduler: Schedule
    warmup_ratio: Annotated[float, Unit]
    critic_warmup_iterations: Annotated[int, NonNegative]


@dataclass(frozen=True)
class PartSettings:
    """What a reward spec says beside the keys of its reward."""

    use: str
    name: str | None
    weight: float


@dataclass(frozen=True)
class PenaltySettings:
    per_token: Annotated[float, NonNegative]
    missing_eos: Annotated[float, NonNegative]


@dataclass(frozen=True)
class EvaluationSettings:
    every: Annotated[int, NonNegative]
    seed: Annotated[int, Seed]
    prompts: Annotated[int, AtLeastOne]
    print_samples: Annotated[int, NonNegative]
    rewards: Annotated[list[Any], RewardSpecs]
    reference: str | None
    best_of: list[int]
    best_of_prompts: Annotated[int, AtLeastOne]


@dataclass(frozen=True)
class CheckpointSettings:
    every: Annotated[int, NonNegative]
    keep_last: Annotated[int, AtLeastOne]
    keep_best: bool


@dataclass(frozen=True)
class GuardSettings:
    nonfinite: NonFinite
    action: GuardAction
    max_kl: Annotated[float | None, Positive]
    min_entropy: Annotated[float, NonNegative]
    critic_patience: Annotated[int | None, AtLeastOne]
    min_explained_variance: float


@dataclass(frozen=True)
class LaunchSettings:
    device: Device
    threads: Annotated[int | None, AtLeastOne]
    matmul: Matmul
    processes: Annotated[int | None, AtLeastOne]
    strategy: Strategy
    frozen_placement: Frozen
    timeout: Annotated[float, Positive]


@dataclass(frozen=True)
class TrackingSettings:
    kind: TrackerKind
    project: str
    mode: TrackingMode
    group: str | None


@dataclass(frozen=True)
class FitSettings:
    """What the supervised stages have in common: `sft` in the configuration, and `reward_model`."""

    epochs: Annotated[int, AtLeastOne]
    batch_size: Annotated[int, AtLeastOne]
    lr: Annotated[float, Positive]
    lr_scheduler: Schedule
    weight_decay: Annotated[float, NonNegative]
    warmup_ratio: Annotated[float, Unit]
    max_grad_norm: Annotated[float, Positive]
    max_tokens: Annotated[int, Range(2)]
    held_out: Annotated[int, AtLeastOne]
    eval_every: Annotated[int, NonNegative]
    checkpoint_every: Annotated[int, NonNegative]


@dataclass(frozen=True)
class RewardModelSettings(FitSettings):
    center_coef: Annotated[float, NonNegative]
    scored_pairs: Annotated[int, AtLeastOne]


@dataclass(frozen=True)
class ExportSettings:
    folder: str | None
    dtype: DType | None


@dataclass(frozen=True)
class ChatSettings:
    dialogue: bool | None
    score: bool


@dataclass(frozen=True)
class BenchSettings:
    iterations: Annotated[int, AtLeastOne]
    warmup: Annotated[int, NonNegative]
    shortest_prompt: Annotated[int, AtLeastOne]
    end_probability: Annotated[float, Unit]
    reward: bool
    reward_architecture: dict[str, Any] | None


@dataclass(frozen=True)
class StagesSettings:
    seed: Annotated[int, Seed]
    cache_dir: str


SECTIONS: dict[str, type] = {
    "model": ModelSettings,
    "lora": LoraSettings,
    "critic": CriticSettings,
    "reference": ReferenceSettings,
    "sampling": SamplingSettings,
    "optimizer": OptimizerSettings,
    "penalty": PenaltySettings,
    "evaluation": EvaluationSettings,
    "checkpoint": CheckpointSettings,
    "guard": GuardSettings,
    "launch": LaunchSettings,
    "tracking": TrackingSettings,
    "sft": FitSettings,
    "reward_model": RewardModelSettings,
    "stages": StagesSettings,
    "export": ExportSettings,
    "chat": ChatSettings,
    "bench": BenchSettings,
}
"""The sections whose type is fixed."""

TARGET_SECTIONS = ("algo", "dataset", "reward")
"""The sections whose type their `_target_` names."""


@dataclass(frozen=True)
class Config:
    """A whole checked configuration. `raw` is the same, resolved, as plain dicts and lists."""

    run: RunSettings
    algo: Any
    dataset: Any
    reward: Any
    model: ModelSettings
    lora: LoraSettings
    critic: CriticSettings
    reference: ReferenceSettings
    sampling: SamplingSettings
    optimizer: OptimizerSettings
    penalty: PenaltySettings
    evaluation: EvaluationSettings
    checkpoint: CheckpointSettings
    guard: GuardSettings
    launch: LaunchSettings
    tracking: TrackingSettings
    sft: FitSettings
    reward_model: RewardModelSettings
    stages: StagesSettings
    export: ExportSettings
    chat: ChatSettings
    bench: BenchSettings
    raw: dict[str, Any]
