"""Low-rank adapters (LoRA, 2106.09685) through `peft`: adding, switching, merging and saving of adapters.

The model keeps its class; its linear layers are wrapped in place. Several adapters share one base: the policy's, and
one for each critic of kind `adapter`. With no active adapter the model computes the base's outputs.
"""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.utils import cached_file

from apa_cli.errors import UserError, get_first_line
from apa_cli.network import probe_hub
from apa_cli.settings import LoraSettings

if TYPE_CHECKING:
    from peft import LoraConfig
    from peft.tuners.lora import LoraLayer

POLICY_ADAPTER = "policy"
"""Name of the policy's adapter."""


def build_lora_config(model: PreTrainedModel, settings: LoraSettings) -> LoraConfig:
    """Return peft's configuration for this model. Raise UserError if peft has no default layers for its type."""
    from peft import LoraConfig
    from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as DEFAULT_TARGETS

    targets = settings.target_modules
    if targets is None:
        model_type = model.config.model_type
        if model_type not in DEFAULT_TARGETS:
            raise UserError(
                f"lora.target_modules: peft has no default for {model_type} models; name the layers, or [all-linear]"
            )
        targets = list(DEFAULT_TARGETS[model_type])
    elif targets == ["all-linear"]:
        targets = sorted(find_linear_names(model))
    alpha = cast(int, settings.alpha)  # peft declares an int, and only divides it
    return LoraConfig(r=settings.rank, lora_alpha=alpha, target_modules=targets)


def add_adapter(model: PreTrainedModel, settings: LoraSettings, name: str, seed: int) -> None:
    """Add a trainable float32 adapter that changes nothing yet (its second factor is zero), and freeze the base.

    Earlier adapters stay trainable, and the active one stays active. Raise UserError if no layer matches
    `lora.target_modules`.
    """
    from peft import inject_adapter_in_model

    config = build_lora_config(model, settings)
    trained = {id(p) for n, p in model.named_parameters() if ".lora_" in n and p.requires_grad}
    active = get_active_adapter(model)
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        torch.manual_seed(seed)
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")
        try:
            inject_adapter_in_model(config, model, name)
        except ValueError as error:
            raise UserError(f"lora.target_modules: {get_first_line(error)}") from error
    model.eval()
    if active is not None:
        activate_adapter(model, active)
    for parameter_name, parameter in model.named_parameters():
        is_new = f".{name}." in parameter_name and ".lora_" in parameter_name
        if is_new and parameter.dtype is not torch.float32:
            parameter.data = parameter.data.float()
        parameter.requires_grad_(is_new or id(parameter) in trained)


def find_linear_names(model: PreTrainedModel) -> set[str]:
    """Return the last part of the name of each linear layer, the output head left out."""
    head = model.get_output_embeddings()
    return {
        name.removesuffix(".base_layer").rsplit(".", 1)[-1]
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not head and ".lora_" not in name
    }


def find_lora_layers(model: nn.Module) -> list[LoraLayer]:
    """Return the layers that hold adapters; peft is only imported if there are any."""
    if not any(".lora_" in name for name, _ in model.named_parameters()):
        return []
    from peft.tuners.lora import LoraLayer

    return [module for module in model.modules() if isinstance(module, LoraLayer)]


def get_active_adapter(model: nn.Module) -> str | None:
    """Return the name of the active adapter, or None."""
    layers = find_lora_layers(model)
    return None if not layers or layers[0].disable_adapters else layers[0].active_adapters[0]


def activate_adapter(model: nn.Module, name: str | None) -> None:
    """Make `name` the only active adapter (None: no adapter). Unlike peft's switches, keep the trained parameters."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for layer in find_lora_layers(model):
        layer.enable_adapters(name is not None)
        if name is not None:
            layer.set_adapter(name)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for parameter in trained:
        parameter.requires_grad_(True)


@contextmanager
def use_adapter(model: nn.Module, name: str | None) -> Iterator[None]:
    """Make `name` the active adapter within the block (None: the base alone), then restore the previous adapter."""
    previous = get_active_adapter(model)
    activate_adapter(model, name)
    try:
        yield
    finally:
        activate_adapter(model, previous)


class AdapterDisabledModel:
    """A view of a model with its adapters disabled, called like the model: a LoRA run's reference, without a copy."""

    def __init__(self, model: PreTrainedModel):
        self.model = model

    def __call__(self, **inputs: Any) -> Any:
        with use_adapter(self.model, None):
            return self.model(**inputs)

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def config(self) -> PretrainedConfig:
        return self.model.config


def unwrap_model(model: PreTrainedModel | AdapterDisabledModel) -> PreTrainedModel:
    """Return the model behind an AdapterDisabledModel, and any other model unchanged."""
    return model.model if isinstance(model, AdapterDisabledModel) else model


@torch.no_grad()
def merge_adapter_tensors(model: PreTrainedModel, name: str = POLICY_ADAPTER) -> dict[str, Tensor]:
    """Return the tensors of the model with adapter `name` merged, under their names without adapters.

    Quantized weights are dequantized.
    """
    from peft.utils.integrations import dequantize_module_weight

    deltas = {
        module_name: module.get_delta_weight(name)
        for module_name, module in model.named_modules()
        if hasattr(module, "lora_A") and name in module.lora_A
    }
    names = {n for n, _ in model.named_parameters(remove_duplicate=False)} | {n for n, _ in model.named_buffers()}
    merged = {}
    for key, value in model.state_dict().items():
        if ".lora_" in key or key not in names:  # quantization stores further tensors next to the weights
            continue
        module_name, _, last = key.rpartition(".")
        if last == "weight" and not value.is_floating_point():
            value = dequantize_module_weight(model.get_submodule(module_name))
        owner = module_name.removesuffix(".base_layer")
        if last == "weight" and owner in deltas:
            value = (value.float() + deltas[owner].float()).to(value.dtype)
        merged[key.replace(".base_layer.", ".")] = value.contiguous()
    return merged


def save_adapter(model: PreTrainedModel, folder: Path, base: str, name: str = POLICY_ADAPTER) -> None:
    """Save one adapter as a folder that `peft.PeftModel.from_pretrained` loads onto the model `base`.

    Other trained parameters, such as a reward model's head, are saved with it as peft's `modules_to_save`.
    """
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    config = copy.deepcopy(cast("dict[str, LoraConfig]", model.peft_config)[name])
    heads = {n: p for n, p in model.named_parameters() if p.requires_grad and ".lora_" not in n}
    tensors = {
        f"base_model.model.{key.replace(f'.{name}.', '.')}": value.contiguous()
        for key, value in model.state_dict().items()
        if key in heads or (".lora_" in key and f".{name}." in key)
    }
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config.base_model_name_or_path, config.inference_mode = base, True
    config.task_type = "SEQ_CLS" if heads else "CAUSAL_LM"
    config.modules_to_save = sorted({key.rpartition(".")[0] for key in heads}) or None
    config.save_pretrained(str(folder))


def is_adapter(path: str) -> bool:
    """Return True if a folder or hub repository holds an adapter instead of a model."""
    folder = Path(path).expanduser()
    if folder.is_dir():
        return (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file()
    return is_hub_adapter(path)


@cache
def is_hub_adapter(path: str) -> bool:
    """Return True if a hub repository holds an adapter instead of a model; requested once per process.

    Return False if the hub cannot be reached, since loading then reports the reason.
    """
    probe_hub()
    try:
        return (
            cached_file(path, "config.json", _raise_exceptions_for_missing_entries=False) is None
            and cached_file(path, "adapter_config.json", _raise_exceptions_for_missing_entries=False) is not None
        )
    except OSError:
        return False


def read_adapter_base(path: str) -> str:
    """Return the folder or hub id of an adapter's base model. Raise UserError if adapter_config.json names none."""
    base = read_adapter_config(path).get("base_model_name_or_path")
    if not base:
        raise UserError(f"{path}: adapter_config.json names no base_model_name_or_path")
    return base


def read_adapter_config(path: str) -> dict[str, Any]:
    """Return the parsed adapter_config.json of an adapter's folder or hub repository."""
    folder = Path(path).expanduser()
    file = folder / "adapter_config.json" if folder.is_dir() else cached_file(path, "adapter_config.json")
    return json.loads(Path(cast(str, file)).read_text(encoding="utf-8"))
