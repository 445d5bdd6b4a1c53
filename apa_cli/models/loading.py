"""Loading, building and saving of models and tokenizers, from a folder, the hub or a model's dimensions."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import transformers
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from apa_cli.errors import UserError, get_first_line
from apa_cli.file_modes import apply_umask
from apa_cli.model_folder import ADAPTER_CONFIG, MODEL_FILES, has_model_weights
from apa_cli.models.lora import (
    find_lora_layers,
    is_adapter,
    mark_untied,
    merge_adapter_tensors,
    read_adapter_base,
    save_adapter,
    untie_head,
)
from apa_cli.models.tokenization import find_turn_end
from apa_cli.network import probe_hub
from apa_cli.settings import DType, ModelSettings, Quantization

if TYPE_CHECKING:
    from transformers import BitsAndBytesConfig

transformers.utils.logging.disable_progress_bar()
transformers.utils.logging.set_verbosity_error()
# transformers warns at every generation step from 5.24 on; older versions do not know the argument's new name.
warnings.filterwarnings("ignore", message="`past_key_values` is deprecated", category=FutureWarning)

TORCH_DTYPES = {DType.float32: torch.float32, DType.bfloat16: torch.bfloat16}

T = TypeVar("T")


def resolve_model_source(path: str, key: str) -> str:
    """Return an existing folder or a hub id, as `transformers` takes it. Raise UserError if `path` is neither.

    `key` is the configuration key that errors name.
    """
    folder = Path(path).expanduser()
    if folder.is_dir():
        if not any((folder / name).is_file() for name in MODEL_FILES):
            raise UserError(f"{key}: {folder} contains no model (no config.json)")
        if (folder / ADAPTER_CONFIG).is_file() and has_model_weights(folder):
            raise UserError(f"{key}: {folder} contains both a model and an adapter ({ADAPTER_CONFIG}); move one away")
        return str(folder)
    if path.startswith((".", "/", "~")) or path.count("/") > 1 or folder.exists():
        raise UserError(f"{key}: there is no folder {folder}")
    probe_hub()  # switches to offline mode if the hub does not respond
    return path


def load_pretrained(load: Callable[..., T], path: str, key: str, **options: Any) -> T:
    """Return `load(source, **options)` of a folder or hub id. Raise UserError, in one line, if that fails."""
    source = resolve_model_source(path, key)
    try:
        return load(source, **options)
    except UserError:
        raise
    except (
        Exception
    ) as error:  # `transformers`, safetensors, pickle, json, zipfile, the hub's client, … raise many types
        reason = get_first_line(error).partition(" Model type should be one of")[0].rstrip(".")
        if reason.startswith("Couldn't instantiate the backend tokenizer"):  # followed by a list of many lines
            reason = "no tokenizer that `transformers` can read, such as tokenizer.json; copy the model's into it"
        advice = "" if Path(source).is_dir() else f"; a local folder with the hub's layout works too, {key}=FOLDER"
        if "trust_remote_code" in str(error) and key == "model.path":
            advice = "; model.trust_remote_code=true runs the model's code"
        raise UserError(f"{key}: cannot load {path}: {reason}{advice}") from error


def require_all_weights(load: Callable[..., Any]) -> Callable[..., PreTrainedModel]:
    """Wrap a model's `from_pretrained` to raise ValueError for weights that are missing or of another shape.

    Missing ones would be initialized at random; the shapes are in no message of `transformers`' own.
    """

    def load_completely(source: str, **options: Any) -> PreTrainedModel:
        model, info = load(source, output_loading_info=True, ignore_mismatched_sizes=True, **options)
        if mismatched := sorted(info["mismatched_keys"]):
            name, stored, configured = mismatched[0]
            raise ValueError(f"{name} has the shape {list(stored)}, but {list(configured)} by config.json")
        if missing := sorted(info["missing_keys"]):
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise ValueError(f"the weights lack {missing[0]}{more}")
        return model

    return load_completely


def load_tokenizer(settings: ModelSettings, path: str, path_key: str = "model.path") -> PreTrainedTokenizerBase:
    """Load `model.tokenizer`, or else the tokenizer of the model in `path`, and give it a pad token.

    A LoRA adapter without a tokenizer uses the base model's. `path_key` is the key of `path`. Raise UserError if no
    token can pad.
    """
    key = "model.tokenizer" if settings.tokenizer else path_key
    source = settings.tokenizer or path
    while is_adapter(source) and not (Path(source).expanduser() / "tokenizer_config.json").is_file():
        source = read_adapter_base(source)
    tokenizer = load_pretrained(
        AutoTokenizer.from_pretrained, source, key, trust_remote_code=settings.trust_remote_code
    )
    if tokenizer.pad_token is None and tokenizer.eos_token is None and tokenizer.unk_token is None:
        raise UserError(f"{key}: the tokenizer of {source} has neither a pad, an end nor an unknown token")
    return ensure_pad_token(tokenizer)


def ensure_pad_token(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """Set the pad token of a tokenizer without one to its EOS or unknown token, in place.

    Masks mark the padding, so any token can pad; `transformers` requires a pad token.
    """
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    return tokenizer


def load_policy(
    settings: ModelSettings, path: str, frozen_base: bool = False, key: str = "model.path"
) -> PreTrainedModel:
    """Load a causal language model in evaluation mode (without dropout), all of its weights trainable float32.

    With `frozen_base` (for LoRA) the weights have the compute dtype, quantized if `model.quantization` says so. A LoRA
    adapter is merged into its base model. `key` is the key of `path`.
    """
    options: dict[str, Any] = {
        "dtype": TORCH_DTYPES[settings.dtype] if frozen_base else torch.float32,
        "attn_implementation": settings.attn_implementation,
        "trust_remote_code": settings.trust_remote_code,
    }
    if settings.quantization is not Quantization.none:
        options["quantization_config"] = build_quantization_config(settings)
    load = require_all_weights(AutoModelForCausalLM.from_pretrained)
    model = load_merged(load, path, key, **options).eval()
    if getattr(model.config, "output_router_logits", False):
        model.config.output_router_logits = False  # for a loss of `transformers`' own, which fails with a KV cache
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            # In evaluation mode bitsandbytes would repack a CPU's 4-bit weights into a form without gradients.
            module.support_avx512bf16_for_cpu = False
    return model


def load_merged(load: Callable[..., PreTrainedModel], path: str, key: str, **options: Any) -> PreTrainedModel:
    """Load a model as `load_pretrained` does; for a LoRA adapter, its base model with the adapter merged.

    Raise UserError for an adapter if `options` ask for quantized weights.
    """
    if not is_adapter(path):
        return load_pretrained(load, path, key, **options)
    if "quantization_config" in options:
        raise UserError(f"model.quantization: {path} is an adapter, which cannot be merged into quantized weights")
    from peft import PeftModel

    try:
        base = load_merged(load, read_adapter_base(path), key, **options)
    except UserError as error:
        reason = str(error).removeprefix(f"{key}: ")
        raise UserError(f"{key}: cannot load the base model of the adapter {path}: {reason}") from error
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft's remarks on tied heads, which are untied here
        adapted = load_pretrained(lambda source: PeftModel.from_pretrained(base, source), path, key)
        untie_head(base)
        merged = adapted.merge_and_unload()
    head, embedding = merged.get_output_embeddings(), merged.get_input_embeddings()
    if head is not None and head.weight is not embedding.weight:
        mark_untied(merged)  # also if peft has replaced one of them, which the adapter was saved with
    merged.config._name_or_path = path  # the base of a further adapter
    return merged.requires_grad_(True)  # peft has frozen the model


def build_quantization_config(settings: ModelSettings) -> BitsAndBytesConfig:
    """Return the quantization of `model.quantization`. Raise UserError if bitsandbytes is not installed."""
    try:
        import bitsandbytes  # noqa: F401
    except ImportError as error:
        raise UserError(
            "model.quantization: the package bitsandbytes is not installed; pip install bitsandbytes"
        ) from error
    from transformers import BitsAndBytesConfig

    if settings.quantization is Quantization.int8:
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=TORCH_DTYPES[settings.dtype]
    )


def load_model_config(settings: ModelSettings, path: str | None) -> PretrainedConfig:
    """Return a model's `transformers` configuration without loading weights.

    It is built from `model.architecture` if that is given and `path` is not a local folder, else read from `path`.
    """
    if path is None:
        return build_architecture_config(settings.architecture, settings.tokenizer_vocabulary or 0)
    if settings.architecture and not Path(path).expanduser().is_dir():
        return build_architecture_config(settings.architecture, settings.tokenizer_vocabulary or 0)
    source = path
    while is_adapter(source):
        source = read_adapter_base(source)
    options = {"trust_remote_code": settings.trust_remote_code}
    config = load_pretrained(AutoConfig.from_pretrained, source, "model.path", **options)
    check_task(config, path, "model.path")
    return config


def check_task(config: PretrainedConfig, path: str, key: str) -> None:
    """Raise UserError, beginning with `key`, if a configuration is not a causal language model's."""
    is_own_code = "AutoModelForCausalLM" in getattr(config, "auto_map", {})
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING and not is_own_code:
        raise UserError(f"{key}: {path} is a {config.model_type} model, which is not a causal language model")


def build_architecture_config(architecture: dict[str, Any], vocab_size: int) -> PretrainedConfig:
    """Return a `transformers` configuration of the given `model_type` and dimensions, `vocab_size` by default.

    Raise UserError if `transformers` does not know the type or refuses the dimensions.
    """
    dimensions = {"vocab_size": vocab_size, **architecture}
    try:
        return AutoConfig.for_model(dimensions.pop("model_type"), **dimensions)
    except (KeyError, ValueError) as error:
        raise UserError(f"model.architecture: {get_first_line(error)}") from error


def build_policy(settings: ModelSettings, tokenizer: PreTrainedTokenizerBase, seed: int) -> PreTrainedModel:
    """Build a causal language model of `model.architecture` with random float32 weights that depend on `seed` alone."""
    config = build_architecture_config(settings.architecture, len(tokenizer))
    config.bos_token_id = tokenizer.bos_token_id
    config.eos_token_id = tokenizer.eos_token_id
    config.pad_token_id = tokenizer.pad_token_id
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, attn_implementation=settings.attn_implementation)
    return model.float().eval()


def train_tokenizer(texts: list[str], vocab_size: int) -> PreTrainedTokenizerBase:
    """Train a byte-level BPE tokenizer of `vocab_size` tokens on `texts`, with Pythia's special tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
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


def find_end_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Return the ids of the tokens that end a response.

    They are EOS of tokenizer, model and generation configuration, and the end of a turn in the chat template.
    """
    end_tokens: set[int] = set()
    turn_end, generation = find_turn_end(tokenizer), model.generation_config.eos_token_id
    for ids in (tokenizer.eos_token_id, model.config.eos_token_id, generation, turn_end):
        if ids is not None:
            end_tokens.update([ids] if isinstance(ids, int) else ids)
    return frozenset(end_tokens)


def add_turn_end(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Add the end of a turn in the chat template to the end tokens of the generation configuration, in place."""
    turn_end = find_turn_end(tokenizer)
    if turn_end is None or not model.can_generate():
        return
    known = model.generation_config.eos_token_id
    if turn_end not in ([known] if isinstance(known, int) else known or []):
        model.generation_config.eos_token_id = sorted(find_end_token_ids(model, tokenizer))


def save_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, **entries: Any) -> None:
    """Save a plain `transformers` folder, with `entries` added to its config.json.

    Its generation_config.json names the end of a turn in the chat template as an end token. A LoRA adapter is merged
    into the weights, and also saved alone in the subfolder adapter/.
    """
    add_turn_end(model, tokenizer)
    if find_lora_layers(model):
        save_adapter(model, folder / "adapter", base=model.config._name_or_path)
        build_unquantized_shell(model).save_pretrained(folder, state_dict=merge_adapter_tensors(model))
    else:
        model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if entries:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **entries}, indent=2) + "\n")
    apply_umask(folder)


def build_unquantized_shell(model: PreTrainedModel) -> PreTrainedModel:
    """Return the model itself, or for a quantized model a model of its class without weights and quantization.

    `save_pretrained` with merged tensors then writes an ordinary checkpoint.
    """
    if getattr(model.config, "quantization_config", None) is None:
        return model
    config = copy.deepcopy(model.config)
    del config.quantization_config
    with torch.device("meta"):
        empty = type(model)(config)
    empty.generation_config = model.generation_config
    return empty
