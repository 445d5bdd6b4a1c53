"""The typed sections of the configuration: names, types and ranges. All values are in conf/.

The type of the sections `algo`, `plan`, `dataset` and `reward` is the dataclass that their `_target_` names.
The meaning and unit of a field are in the comment above its key in conf/.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Annotated, Any

from apa_cli.types import AtLeastOne, EscapedText, Needs, NonNegative, Positive, Range, UnitInterval

if TYPE_CHECKING:
    from apa_cli.datasets.base import Dataset

PositiveProbability = Range(0, 1, open_low=True)
"""A probability that is not 0."""
Seed = Range(0, 2**63 - 1)
"""Seeds that fit both numpy's Philox key and torch's generators."""


class RewardSpecs:
    """Marker for a field that holds rewards.

    In conf/ a reward is the name of a yaml in conf/reward, or a mapping {use: NAME, name: …, weight: …, any key of
    that yaml: value}. The check of the configuration turns each into a `rewards.base.NamedReward`.
    """


class UpdateOrder(Enum):
    """Order of the updates within an iteration: shuffled epochs, or consecutive updates of each minibatch."""

    epochs = "epochs"
    consecutive = "consecutive"


class DType(Enum):
    """Floating-point type of weights or computation."""

    float32 = "float32"
    bfloat16 = "bfloat16"


class Quantization(Enum):
    """Precision of the quantized base weights under LoRA."""

    none = "none"
    int8 = "int8"
    int4 = "int4"


class CriticKind(Enum):
    """Placement of the critic: a separate network, a head on the policy's trunk, or an adapter on that trunk."""

    separate = "separate"
    head = "head"
    adapter = "adapter"


class CriticInit(Enum):
    """Model that initializes a separate critic."""

    policy = "policy"
    reward = "reward"


class HeadKind(Enum):
    """Shape of the critic's value head: one linear layer, or h → 2h → 1."""

    linear = "linear"
    mlp = "mlp"


class LRScheduler(Enum):
    """Shape of the learning rate after warm-up: constant, or linear or cosine decay to 0."""

    constant = "constant"
    linear = "linear"
    cosine = "cosine"


class RewardFormat(Enum):
    """Text of a reward model: prompt + response as plain text, or as a chat in its tokenizer's template.

    auto: as the model was trained if apa-reward trained it, else the template if the tokenizer has one.
    """

    auto = "auto"
    chat = "chat"
    plain = "plain"


class TrackerKind(Enum):
    """Tracker that records a run's metrics in addition to metrics.jsonl."""

    none = "none"
    wandb = "wandb"
    tensorboard = "tensorboard"


class TrackingMode(Enum):
    """Connection of wandb; auto: online if a key is set and the server responds, else offline."""

    auto = "auto"
    online = "online"
    offline = "offline"


class NonFiniteAction(Enum):
    """Action on a gradient norm that is not finite: end the run, or leave that update out."""

    stop = "stop"
    skip = "skip"


class GuardAction(Enum):
    """Action if a bound of the guard is exceeded: print one warning, or save a checkpoint and end the run."""

    warn = "warn"
    stop = "stop"


class MatmulLibrary(Enum):
    """Library for float32 matrix products on a CPU; see `hardware.cpu_matmul`."""

    auto = "auto"
    torch = "torch"
    onednn = "onednn"


class Device(Enum):
    """Device of all models; auto: a GPU if there is one."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


class ParallelStrategy(Enum):
    """Placement of trained weights in several processes: replicated (ddp) or sharded (fsdp)."""

    ddp = "ddp"
    fsdp = "fsdp"


class FrozenPlacement(Enum):
    """Placement of the reference and reward models under fsdp."""

    replicated = "replicated"
    sharded = "sharded"
    offloaded = "offloaded"


@dataclass(frozen=True)
class RunSettings:
    """The keys at the top level of config.yaml."""

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
    overwrite: bool
    stop_after: str | None
    dry_run: bool
    run: str | None


@dataclass(frozen=True)
class ModelSettings:
    """`model`: the policy's weights, tokenizer and architecture."""

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

    @property
    def resolved_path(self) -> str:
        """Folder or hub id of the model. Raises ValueError while `path` is null; the SFT stage fills it in."""
        if self.path is None:
            raise ValueError("model.path: not filled in yet; the SFT stage must run first")
        return self.path


@dataclass(frozen=True)
class LoraSettings:
    """`lora`: low-rank adapters on the policy and the critic."""

    rank: Annotated[int, NonNegative]
    alpha: Annotated[float, Positive]
    target_modules: list[str] | None


@dataclass(frozen=True)
class CriticSettings:
    """`critic`: placement, initialization and head of the critic."""

    kind: CriticKind
    init: CriticInit
    head: HeadKind


@dataclass(frozen=True)
class ReferenceSettings:
    """`reference`: the reference policy π_init."""

    refresh_every: Annotated[int, NonNegative]
    log_kl: bool


@dataclass(frozen=True)
class GuideSettings:
    """`guide`: a further policy that plans roll in or out, with sampling settings of its own."""

    path: str | None
    dtype: DType
    trust_remote_code: bool
    temperature: Annotated[float, Positive]
    top_k: Annotated[int, NonNegative]
    top_p: Annotated[float, PositiveProbability]


@dataclass(frozen=True)
class SamplingSettings:
    """`sampling`: how the policy samples responses."""

    max_prompt_tokens: Annotated[int, AtLeastOne]
    max_new_tokens: Annotated[int, AtLeastOne]
    temperature: Annotated[float, Positive]
    top_k: Annotated[int, NonNegative]
    top_p: Annotated[float, PositiveProbability]
    stop_strings: Annotated[list[str], EscapedText]
    microbatch_size: Annotated[int, AtLeastOne]
    cuda_graph: bool


@dataclass(frozen=True)
class OptimizerSettings:
    """`optimizer`: AdamW, gradient clipping and the learning-rate schedule."""

    lr: Annotated[float, Positive]
    critic_lr: Annotated[float, Positive]
    betas: list[float]
    eps: Annotated[float, Positive]
    weight_decay: Annotated[float, NonNegative]
    max_grad_norm: Annotated[float, Positive]
    joint_clip: bool
    lr_scheduler: LRScheduler
    warmup_ratio: Annotated[float, UnitInterval]
    critic_warmup_iterations: Annotated[int, NonNegative]


@dataclass(frozen=True)
class RewardSpecSettings:
    """The keys of a reward spec besides those of the reward itself."""

    use: str
    name: str | None
    weight: float


@dataclass(frozen=True)
class PenaltySettings:
    """`penalty`: amounts subtracted from the score before the algorithm reads it."""

    per_token: Annotated[float, NonNegative]
    missing_eos: Annotated[float, NonNegative]


@dataclass(frozen=True)
class EvaluationSettings:
    """`evaluation`: evaluation on held-out prompts, during training and in apa-eval."""

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
    """`checkpoint`: frequency and retention of checkpoints."""

    every: Annotated[int, NonNegative]
    keep_last: Annotated[int, AtLeastOne]
    keep_best: bool


@dataclass(frozen=True)
class GuardSettings:
    """`guard`: signs of a failing run, and the action on them."""

    nonfinite: NonFiniteAction
    action: GuardAction
    max_kl: Annotated[float | None, Positive]
    min_entropy: Annotated[float, NonNegative]
    critic_patience: Annotated[int | None, AtLeastOne]
    min_explained_variance: float


@dataclass(frozen=True)
class LaunchSettings:
    """`launch`: devices and processes."""

    device: Device
    threads: Annotated[int | None, AtLeastOne]
    matmul: MatmulLibrary
    processes: Annotated[int | None, AtLeastOne]
    strategy: ParallelStrategy
    frozen_placement: FrozenPlacement
    timeout: Annotated[float, Positive]


@dataclass(frozen=True)
class TrackingSettings:
    """`tracking`: the tracker, its project and its mode."""

    kind: TrackerKind
    project: str
    mode: TrackingMode
    group: str | None


@dataclass(frozen=True)
class SupervisedSettings:
    """Settings of a supervised stage: `sft`, and the base of `reward_model`."""

    epochs: Annotated[int, AtLeastOne]
    batch_size: Annotated[int, AtLeastOne]
    lr: Annotated[float, Positive]
    lr_scheduler: LRScheduler
    weight_decay: Annotated[float, NonNegative]
    warmup_ratio: Annotated[float, UnitInterval]
    max_grad_norm: Annotated[float, Positive]
    max_tokens: Annotated[int, Range(2)]
    held_out: Annotated[int, AtLeastOne]
    eval_every: Annotated[int, NonNegative]
    checkpoint_every: Annotated[int, NonNegative]


@dataclass(frozen=True)
class RewardModelSettings(SupervisedSettings):
    """`reward_model`: training of the Bradley-Terry reward model."""

    format: RewardFormat
    center_coef: Annotated[float, NonNegative]
    scored_pairs: Annotated[int, AtLeastOne]


@dataclass(frozen=True)
class ExportSettings:
    """`export`: folder and precision of apa-export."""

    folder: str | None
    dtype: DType | None


@dataclass(frozen=True)
class ChatSettings:
    """`chat`: options of apa-chat."""

    dialogue: bool | None
    score: bool


@dataclass(frozen=True)
class BenchSettings:
    """`bench`: workload of apa-bench."""

    iterations: Annotated[int, AtLeastOne]
    warmup: Annotated[int, NonNegative]
    shortest_prompt: Annotated[int, AtLeastOne]
    end_probability: Annotated[float, UnitInterval]
    reward: bool
    reward_architecture: dict[str, Any] | None


@dataclass(frozen=True)
class StagesSettings:
    """`stages`: seed and cache of the SFT and reward models that a run trains first."""

    seed: Annotated[int, Seed]
    cache_dir: str


SECTIONS: dict[str, type] = {
    "model": ModelSettings,
    "lora": LoraSettings,
    "critic": CriticSettings,
    "reference": ReferenceSettings,
    "guide": GuideSettings,
    "sampling": SamplingSettings,
    "optimizer": OptimizerSettings,
    "penalty": PenaltySettings,
    "evaluation": EvaluationSettings,
    "checkpoint": CheckpointSettings,
    "guard": GuardSettings,
    "launch": LaunchSettings,
    "tracking": TrackingSettings,
    "sft": SupervisedSettings,
    "reward_model": RewardModelSettings,
    "stages": StagesSettings,
    "export": ExportSettings,
    "chat": ChatSettings,
    "bench": BenchSettings,
}
"""The sections with a fixed type, by name."""

TARGET_SECTIONS = ("algo", "plan", "dataset", "reward")
"""The sections whose type is the dataclass named by their `_target_`."""


@dataclass(frozen=True)
class Config:
    """A checked configuration. `raw` is the same configuration, resolved, as plain dicts and lists."""

    run: RunSettings
    algo: Any
    """An `algorithms.base.Algorithm`; Any, because this module is below that package."""
    plan: Any
    """An `algorithms.plans.Plan`."""
    dataset: Dataset
    reward: Any
    """A `rewards.base.Reward`; Any, because this module is below that package."""
    model: ModelSettings
    lora: LoraSettings
    critic: CriticSettings
    reference: ReferenceSettings
    guide: GuideSettings
    sampling: SamplingSettings
    optimizer: OptimizerSettings
    penalty: PenaltySettings
    evaluation: EvaluationSettings
    checkpoint: CheckpointSettings
    guard: GuardSettings
    launch: LaunchSettings
    tracking: TrackingSettings
    sft: SupervisedSettings
    reward_model: RewardModelSettings
    stages: StagesSettings
    export: ExportSettings
    chat: ChatSettings
    bench: BenchSettings
    raw: dict[str, Any]

    @property
    def needs(self) -> Needs:
        """Needs of the algorithm and the plan together."""
        return self.plan.needs(self.algo.needs())
