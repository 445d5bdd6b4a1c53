"""Reward models: sequence classifiers on prompt + response; loading, building and scoring."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import cached_file

from apa_cli.errors import UserError
from apa_cli.models.loading import (
    TORCH_DTYPES,
    load_merged,
    load_pretrained,
    resolve_model_source,
)
from apa_cli.models.lora import is_adapter, read_adapter_base, read_adapter_config
from apa_cli.models.structure import get_context_length
from apa_cli.settings import DType, ModelSettings, RewardFormat

STORED_FORMAT = "reward_format"
"""Entry of config.json for the format of the texts that apa-reward trained the model on."""
HEAD_NAMES = ("score", "classifier", "classification_head", "logits_proj")
"""Names that `transformers` gives to the score head of a sequence classifier."""


def load_reward_model(path: str, dtype: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a frozen classifier in the given dtype on the CPU, and its tokenizer, which pads on the right.

    A LoRA adapter is merged into its base model, and uses the base's tokenizer if it has none. Raise UserError if model
    or tokenizer cannot be loaded, if weights are missing, such as the score head of a language model, or if the
    tokenizer has more tokens than the model.
    """
    resolve_model_source(path, "reward.path")
    options: dict[str, Any] = {"dtype": TORCH_DTYPES[DType(dtype)], "trust_remote_code": False}
    load: Callable[..., PreTrainedModel] = load_complete_classifier
    tokenizer_path = path
    if is_adapter(path):
        # The base lacks the head, or has another; the adapter's replaces it.
        load, options["num_labels"] = AutoModelForSequenceClassification.from_pretrained, count_adapter_outputs(path)
        options["ignore_mismatched_sizes"] = True
        tokenizer_path = path if find_model_file(path, "tokenizer_config.json") else read_adapter_base(path)
    model = load_merged(load, path, "reward.path", **options)
    options = {"padding_side": "right", "trust_remote_code": False}
    tokenizer = load_pretrained(AutoTokenizer.from_pretrained, tokenizer_path, "reward.path", **options)
    if len(tokenizer) <= len(tokenizer.all_special_tokens):  # `transformers` makes such a tokenizer if there is none
        raise UserError(f"reward.path: {tokenizer_path} contains no tokenizer")
    highest = max(tokenizer.get_vocab().values())
    size = cast(nn.Embedding, model.get_input_embeddings()).num_embeddings
    if highest >= size:
        raise UserError(
            f"reward.path: the highest token id of {tokenizer_path} is {highest}, but the model has {size} embeddings"
        )
    return model.eval().requires_grad_(False), tokenizer


def load_complete_classifier(source: str, **options: Any) -> PreTrainedModel:
    """Load a classifier. Raise ValueError for missing weights, which `transformers` would make random."""
    model, info = AutoModelForSequenceClassification.from_pretrained(source, output_loading_info=True, **options)
    missing = sorted(info["missing_keys"], key=lambda name: (name.partition(".")[0] not in HEAD_NAMES, name))
    if not missing:
        return model
    more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
    if missing[0].partition(".")[0] in HEAD_NAMES:
        more += (
            ", so it is no reward model: its scores would be random; to train one on it, give "
            f"apa-reward model.path={source}"
        )
    raise ValueError(f"the weights lack {missing[0]}{more}")


def count_adapter_outputs(path: str) -> int:
    """Return the number of outputs of an adapter's score head.

    Raise UserError for an adapter of another task, or without a score head, which would then be random.
    """
    from peft.utils import load_peft_weights

    task = read_adapter_config(path).get("task_type")
    if task != "SEQ_CLS":
        raise UserError(f"reward.path: {path} is an adapter of task {task}; a reward model needs SEQ_CLS")
    tensors = load_pretrained(lambda source: load_peft_weights(source, device="cpu"), path, "reward.path")
    heads = [
        tensor
        for name, tensor in tensors.items()
        if set(name.split(".")) & set(HEAD_NAMES) and ".lora_" not in name and tensor.ndim == 2
    ]
    if not heads:
        raise UserError(f"reward.path: the adapter in {path} has no score head; modules_to_save must name it")
    return min(len(head) for head in heads)


def find_model_file(path: str, name: str) -> str | None:
    """Return the path of a file in a model's folder or hub repository; None if it does not exist or is unreachable."""
    folder = Path(path).expanduser()
    if folder.is_dir():
        return str(folder / name) if (folder / name).is_file() else None
    try:
        return cached_file(path, name)
    except OSError:
        return None


def find_output_index(model: PreTrainedModel, output: int | str, path: str) -> int:
    """Return the index of the classifier output with this number or label. Raise UserError listing the outputs."""
    labels = {int(number): label for number, label in (model.config.id2label or {}).items()}
    for number, label in labels.items():
        if output in (number, label):
            return number
    choices = ", ".join(f"{number} ({label})" for number, label in sorted(labels.items()))
    raise UserError(f"reward.output: {path} has no output {output!r}; there are {choices}")


def read_score_mean(model: PreTrainedModel, path: str) -> float:
    """Return the mean score that apa-reward stored in config.json. Raise UserError if there is none."""
    mean = getattr(model.config, "score_mean", None)
    if mean is None:
        raise UserError(f"reward.centered: the config.json of {path} has no score_mean; give false")
    return float(mean)


def read_stored_format(model: PreTrainedModel) -> str | None:
    """Return the format of the texts that apa-reward trained the model on; None if it did not train the model."""
    # Before apa-reward stored the format, it stored the mean score of its models, which all read plain text.
    is_trained_here = hasattr(model.config, "score_mean")
    return getattr(model.config, STORED_FORMAT, RewardFormat.plain.value if is_trained_here else None)


def build_reward_model(
    settings: ModelSettings, path: str, tokenizer: PreTrainedTokenizerBase, seed: int, frozen_base: bool = False
) -> tuple[PreTrainedModel, list[nn.Parameter]]:
    """Build a classifier with one output on the trunk of the model in `path`, causal or bidirectional.

    Return it with the parameters that must be trained because they are new: those of its head, whose last layer starts
    at zero, and of a pooler that the trunk lacks. The weights are float32, or with `frozen_base` (for LoRA) in the
    compute dtype, and the new ones float32. Raise UserError if trunk or head cannot be built from `path`.
    """
    config = load_pretrained(
        AutoConfig.from_pretrained,
        read_adapter_base(path) if is_adapter(path) else path,
        "model.path",
        trust_remote_code=settings.trust_remote_code,
    )
    if config.is_encoder_decoder:
        raise UserError(f"model.path: {path} has an encoder and a decoder; a reward model needs one of them alone")
    config.num_labels = 1
    config.problem_type = None
    config.pad_token_id = tokenizer.pad_token_id
    new_names: set[str] = set()

    def load(source: str, **options: Any) -> PreTrainedModel:
        model, info = AutoModelForSequenceClassification.from_pretrained(source, output_loading_info=True, **options)
        new_names.update(info["missing_keys"], (name for name, *_ in info["mismatched_keys"]))
        return model

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = load_merged(
            load,
            path,
            "model.path",
            config=config,
            dtype=TORCH_DTYPES[settings.dtype] if frozen_base else torch.float32,
            attn_implementation=settings.attn_implementation,
            trust_remote_code=settings.trust_remote_code,
            ignore_mismatched_sizes=True,  # of a classifier's own head
        )
    trunk = f"{model.base_model_prefix}."
    if lost := sorted(name for name in new_names if name.startswith(trunk) and ".pooler." not in name):
        more = f" and {len(lost) - 1} more" if len(lost) > 1 else ""
        raise UserError(f"model.path: cannot load {path}: the weights lack {lost[0]}{more}")
    head = find_score_layer(model)
    nn.init.zeros_(head.weight)
    if head.bias is not None:
        nn.init.zeros_(head.bias)
    new = [p for name, p in model.named_parameters() if name in new_names or not name.startswith(trunk)]
    for parameter in new:
        parameter.data = parameter.data.float()
    return model.eval(), new


def find_score_layer(model: PreTrainedModel) -> nn.Linear:
    """Return the linear layer outside the trunk that gives the only output. Raise UserError if there is none."""
    heads = [child for name, child in model.named_children() if name != model.base_model_prefix]
    layers = [part for head in heads for part in head.modules() if isinstance(part, nn.Linear)]
    if not layers or layers[-1].out_features != 1:
        raise UserError(f"model.path: cannot find the score head of a {model.config.model_type} classifier")
    return layers[-1]


def compute_max_text_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, max_tokens: int) -> int:
    """Return the length limit of a text in tokens: `max_tokens`, or fewer if model or tokenizer support fewer."""
    return min(max_tokens, tokenizer.model_max_length, get_context_length(model) or max_tokens)


def pad_token_rows(rows: list[list[int]], pad_id: int, device: torch.device | str) -> dict[str, Tensor]:
    """Return rows of tokens as model inputs [B, S], padded on the right."""
    width = max(len(row) for row in rows)
    return {
        "input_ids": torch.tensor([row + [pad_id] * (width - len(row)) for row in rows], device=device),
        "attention_mask": torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=device),
    }


@torch.no_grad()
def score_in_batches(
    rows: list[list[int]],
    batch_size: int,
    pad_id: int,
    device: torch.device | str,
    score: Callable[[dict[str, Tensor]], Tensor],
) -> list[float]:
    """Return `score(model inputs)`, which is [B], for each row of tokens, computed in batches sorted by length.

    Equal rows get the score of the first of them, since those of other batches would differ by rounding. All rows are
    computed even so: with a sharded model every rank must run equally many batches.
    """
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    scores: dict[tuple[int, ...], float] = {}
    for start in range(0, len(order), batch_size):
        batch = [rows[i] for i in order[start : start + batch_size]]
        for row, value in zip(batch, score(pad_token_rows(batch, pad_id, device)).float().tolist(), strict=True):
            scores.setdefault(tuple(row), value)
    return [scores[tuple(row)] for row in rows]


def score_rows(
    model: Callable[..., Any],
    config: PretrainedConfig,
    rows: list[list[int]],
    batch_size: int,
    device: torch.device | str,
    output: int = 0,
) -> list[float]:
    """Return one output of a classifier for each row of tokens, `batch_size` rows per forward pass.

    `config` is the classifier's own; `model` may be its forward pass alone, as that of a sharded model is.
    """
    with use_pad_token(config, rows) as pad_id:
        return score_in_batches(rows, batch_size, pad_id, device, lambda inputs: model(**inputs).logits[:, output])


@contextmanager
def use_pad_token(config: PretrainedConfig, rows: list[list[int]]) -> Iterator[int]:
    """Yield the token that pads `rows`: the model's own; for a model without, a token that ends no row.

    A classifier on a causal trunk reads its score at the last token that does not pad. A model whose configuration
    names no pad token was trained on single texts, and must read the last token whatever that is.
    """
    config = config.get_text_config()
    own = config.pad_token_id
    if own is not None and 0 <= own < config.vocab_size:
        yield own
        return
    last = {row[-1] for row in rows}
    config.pad_token_id = next(token for token in itertools.count() if token not in last)
    try:
        yield config.pad_token_id
    finally:
        config.pad_token_id = own
