"""Loading models and tokenizers from a folder or the hub, and building them from their dimensions."""

from __future__ import annotations

import copy
import json
import warnings
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

from apa_cli.errors import ConfigError, UserError
from apa_cli.models.lora import adapter_base, is_adapter, layers, merged_tensors, save_adapter
from apa_cli.network import hub_answers
from apa_cli.settings import DType, ModelSettings, Quantization

transformers.utils.logging.disable_progress_bar()
transformers.utils.logging.set_verbosity_error()
# Said of every generation step from transformers 5.24 on; the new name is unknown to older versions.
warnings.filterwarnings("ignore", message="`past_key_values` is deprecated", category=FutureWarning)

MODEL_FILES = ("config.json", "adapter_config.json", "tokenizer_config.json")
TORCH_DTYPES = {DType.float32: torch.float32, DType.bfloat16: torch.bfloat16}


def source(path: str, key: str) -> str:
    """`path` as `transformers` takes it: an existing folder, or a hub id. UserError if it can be neither."""
    folder = Path(path).expanduser()
    if folder.is_dir():
        if not any((folder / name).is_file() for name in MODEL_FILES):
            raise UserError(f"{key}: {folder} holds no model (no config.json)")
        return str(folder)
    if path.startswith((".", "/", "~")) or path.count("/") > 1 or folder.exists():
        raise UserError(f"{key}: there is no folder {folder}")
    hub_answers()
    return path


def loaded(load: Any, path: str, key: str, **options: Any) -> Any:
    """`load(path, **options)`; what cannot be loaded is a UserError of one line."""
    where = source(path, key)
    try:
        return load(where, **options)
    except UserError:
        raise
    except Exception as error:  # of `transformers`, safetensors, pickle, json, zipfile, the hub's client, …
        first = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        advice = "" if Path(where).is_dir() else f"; a local folder laid out as the hub's works too, {key}=FOLDER"
        if "trust_remote_code" in str(error) and key == "model.path":
            advice = "; model.trust_remote_code=true lets it run"
        raise UserError(f"{key}: cannot load {path}: {first}{advice}") from error


def whole(load: Any) -> Any:
    """`load`, a model's, but ValueError where its files lack weights: `transformers` makes random ones then."""

    def checked(where: str, **options: Any) -> PreTrainedModel:
        model, info = load(where, output_loading_info=True, **options)
        if lacking := sorted(info["missing_keys"]):
            more = f" and {len(lacking) - 1} more" if len(lacking) > 1 else ""
            raise ValueError(f"its weights lack {lacking[0]}{more}")
        return model

    return checked


def load_tokenizer(settings: ModelSettings, path: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a model, with a pad token (its own, or its end-of-sequence or unknown token)."""
    key = "model.tokenizer" if settings.tokenizer else "model.path"
    where = settings.tokenizer or path
    if is_adapter(where) and not (Path(where).expanduser() / "tokenizer_config.json").is_file():
        where = adapter_base(where)
    tokenizer = loaded(
        AutoTokenizer.from_pretrained,
        where,
        key,
        trust_remote_code=settings.trust_remote_code,
    )
    if tokenizer.pad_token is None and tokenizer.eos_token is None and tokenizer.unk_token is None:
        raise UserError(f"{key}: the tokenizer of {where} has neither a pad, an end nor an unknown token")
    return with_pad(tokenizer)


def with_pad(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """Padding is carried by masks, so any token can pad; one is named because `transformers` asks for it."""
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    return tokenizer


def load_policy(settings: ModelSettings, path: str, frozen_base: bool = False) -> PreTrainedModel:
    """A causal language model in evaluation mode (no dropout anywhere), all of its weights trainable float32.

    With `frozen_base` (for LoRA) in the compute dtype, quantized where that is asked for. The folder of a LoRA
    adapter is loaded as its base with the adapter merged into it.
    """
    options: dict[str, Any] = {
        "dtype": TORCH_DTYPES[settings.dtype] if frozen_base else torch.float32,
        "attn_implementation": settings.attn_implementation,
        "trust_remote_code": settings.trust_remote_code,
    }
    if settings.quantization is not Quantization.none:
        options["quantization_config"] = quantization_config(settings)
    model = load_merged(whole(AutoModelForCausalLM.from_pretrained), path, "model.path", **options).eval()
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            # bitsandbytes would repack 4-bit weights for a CPU, in evaluation mode, into a form without gradients
            module.support_avx512bf16_for_cpu = False
    return model


def load_merged(load: Any, path: str, key: str, **options: Any) -> PreTrainedModel:
    """`loaded`, but for the folder or hub id of a LoRA adapter its base model, the adapter merged into it."""
    if not is_adapter(path):
        return loaded(load, path, key, **options)
    if "quantization_config" in options:
        raise UserError(f"model.quantization: {path} is an adapter, which cannot be merged into quantized weights")
    from peft import PeftModel

    base = loaded(load, adapter_base(path), key, **options)
    merged = loaded(lambda where: PeftModel.from_pretrained(base, where), path, key).merge_and_unload()
    return merged.requires_grad_(True)  # peft froze it


def quantization_config(settings: ModelSettings) -> Any:
    """How bitsandbytes is to quantize the base. UserError where it is not installed."""
    try:
        import bitsandbytes  # noqa: F401
    except ImportError as error:
        raise UserError("model.quantization needs the package bitsandbytes: pip install bitsandbytes") from error
    from transformers import BitsAndBytesConfig

    if settings.quantization is Quantization.int8:
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=TORCH_DTYPES[settings.dtype]
    )


def train_top(model: PreTrainedModel, layers: int) -> None:
    """Freezes everything but the `layers` top blocks, the norm after them, and an output head of its own."""
    stack = blocks(model.base_model)
    count = len(stack)
    if layers > count:
        raise ConfigError(f"model.trainable_layers: {layers} is more than the model's {count} blocks")
    parts = list(model.base_model.children())
    head = model.get_output_embeddings()
    tied = head is None or head.weight is model.get_input_embeddings().weight
    model.requires_grad_(False)
    for part in [*stack[count - layers :], *parts[parts.index(stack) + 1 :], *([] if tied else [head])]:
        part.requires_grad_(True)


def blocks(trunk: PreTrainedModel) -> torch.nn.ModuleList:
    """The transformer blocks of a model without its head. UserError where they cannot be told from other parts."""
    count = trunk.config.num_hidden_layers
    stacks = [part for part in trunk.children() if isinstance(part, torch.nn.ModuleList) and len(part) == count]
    if len(stacks) != 1:
        raise UserError(f"model: cannot find the {count} blocks of a {trunk.config.model_type} model")
    return stacks[0]


def load_config(settings: ModelSettings, path: str | None) -> transformers.PretrainedConfig:
    """The configuration of a model without its weights: from its folder, `model.architecture`, or the hub."""
    if path is None:
        return architecture_config(settings.architecture, settings.tokenizer_vocabulary or 0)
    if settings.architecture and not Path(path).expanduser().is_dir():
        return architecture_config(settings.architecture, settings.tokenizer_vocabulary or 0)
    where = adapter_base(path) if is_adapter(path) else path
    return loaded(AutoConfig.from_pretrained, where, "model.path", trust_remote_code=settings.trust_remote_code)


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
        model = AutoModelForCausalLM.from_config(config, attn_implementation=settings.attn_implementation)
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
    """A plain `transformers` folder; `facts` are added to its config.json.

    What a LoRA adapter has learnt is merged into the weights; the adapter alone is written to adapter/ in the folder.
    """
    if layers(model):
        save_adapter(model, folder / "adapter", base=model.config._name_or_path)
        plain(model).save_pretrained(folder, state_dict=merged_tensors(model))
    else:
        model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if facts:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **facts}, indent=2) + "\n")


def plain(model: PreTrainedModel) -> PreTrainedModel:
    """The model itself, or of a quantized one an empty model of the same kind that is not."""
    if getattr(model.config, "quantization_config", None) is None:
        return model
    config = copy.deepcopy(model.config)
    del config.quantization_config
    with torch.device("meta"):
        empty = type(model)(config)
    empty.generation_config = model.generation_config
    return empty


def parameter_count(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
