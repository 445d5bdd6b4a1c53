"""Loading models and tokenizers from a folder or the hub, and building them from their dimensions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from apa_cli.settings import DType, ModelSettings
from apa_cli.types import UserError

transformers.utils.logging.disable_progress_bar()
transformers.utils.logging.set_verbosity_error()

TORCH_DTYPES = {DType.float32: torch.float32, DType.bfloat16: torch.bfloat16}


def source(path: str, key: str) -> str:
    """`path` as `transformers` takes it: an existing folder, or a hub id. UserError if it can be neither."""
    folder = Path(path).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file() and not (folder / "tokenizer_config.json").is_file():
            raise UserError(f"{key}: {folder} holds no model (no config.json)")
        return str(folder)
    if path.startswith((".", "/", "~")) or path.count("/") > 1 or folder.exists():
        raise UserError(f"{key}: there is no folder {folder}")
    return path


def loaded(load: Any, path: str, key: str, **options: Any) -> Any:
    """`load(path, **options)`; what cannot be loaded is a UserError of one line."""
    where = source(path, key)
    try:
        return load(where, **options)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        first = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        advice = "" if Path(where).is_dir() else "; a local folder laid out as the hub's works too"
        raise UserError(f"{key}: cannot load {path}: {first}{advice}") from error


def load_tokenizer(settings: ModelSettings, path: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a model, with a pad token (its own, or its end-of-sequence or unknown token)."""
    key = "model.tokenizer" if settings.tokenizer else "model.path"
    tokenizer = loaded(
        AutoTokenizer.from_pretrained,
        settings.tokenizer or path,
        key,
        trust_remote_code=settings.trust_remote_code,
    )
    return with_pad(tokenizer)


def with_pad(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """Padding is carried by masks, so any token can pad; one is named because `transformers` asks for it."""
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    return tokenizer


def load_policy(settings: ModelSettings, path: str) -> PreTrainedModel:
    """A causal language model with float32 weights, in evaluation mode (no dropout anywhere)."""
    model = loaded(
        AutoModelForCausalLM.from_pretrained,
        path,
        "model.path",
        dtype=torch.float32,
        attn_implementation=settings.attention,
        trust_remote_code=settings.trust_remote_code,
    )
    return model.eval()


def load_config(settings: ModelSettings, path: str | None) -> transformers.PretrainedConfig:
    """The configuration of a model without its weights: from its folder, or from `model.architecture`."""
    if path is None:
        return architecture_config(settings.architecture, settings.tokenizer_vocabulary or 0)
    return loaded(AutoConfig.from_pretrained, path, "model.path", trust_remote_code=settings.trust_remote_code)


def architecture_config(architecture: dict[str, Any], vocabulary: int) -> transformers.PretrainedConfig:
    """A `transformers` configuration from its `model_type` and dimensions."""
    dimensions = {"vocab_size": vocabulary, **architecture}
    try:
        return AutoConfig.for_model(dimensions.pop("model_type"), **dimensions)
    except (KeyError, ValueError) as error:
        raise UserError(f"model.architecture: {str(error).splitlines()[0]}") from error


def build_policy(settings: ModelSettings, tokenizer: PreTrainedTokenizerBase, seed: int) -> PreTrainedModel:
    """A causal language model with random float32 weights that depend on `seed` alone."""
    config = architecture_config(settings.architecture, len(tokenizer))
    config.bos_token_id = tokenizer.bos_token_id
    config.eos_token_id = tokenizer.eos_token_id
    config.pad_token_id = tokenizer.pad_token_id
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, attn_implementation=settings.attention)
    return model.float().eval()


def train_tokenizer(texts: list[str], vocabulary: int) -> PreTrainedTokenizerBase:
    """A byte-level BPE tokenizer of `vocabulary` pieces trained on `texts`, with Pythia's special tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<|endoftext|>", "<|padding|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|endoftext|>",
        bos_token="<|endoftext|>",
        pad_token="<|padding|>",
        clean_up_tokenization_spaces=False,
    )


def end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Every token id that ends a response: the tokenizer's, the configuration's, the generation configuration's."""
    found: set[int] = set()
    for ids in (tokenizer.eos_token_id, model.config.eos_token_id, model.generation_config.eos_token_id):
        if ids is not None:
            found.update([ids] if isinstance(ids, int) else ids)
    return frozenset(found)


def save_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, **facts: Any) -> None:
    """A plain `transformers` folder; `facts` are added to its config.json."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if facts:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **facts}, indent=2) + "\n")


def parameter_count(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
