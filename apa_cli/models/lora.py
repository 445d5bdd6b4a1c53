"""Low-rank adapters (2106.09685) through `peft`: adding, switching, merging and saving them.

The model keeps its own class; its linear layers are wrapped in place. Several adapters share one base: the
policy's, and one per critic of kind `adapter`. With none active the model is what it was before.
"""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from apa_cli.errors import UserError
from apa_cli.network import hub_answers
from apa_cli.settings import LoraSettings

if TYPE_CHECKING:
    from peft import LoraConfig

POLICY = "policy"
"""Name of the policy's adapter."""


def lora_config(settings: LoraSettings) -> LoraConfig:
    from peft import LoraConfig

    targets: Any = settings.target_modules
    if targets == ["all-linear"]:
        targets = "all-linear"
    return LoraConfig(r=settings.rank, lora_alpha=settings.alpha, target_modules=targets)


def add_adapter(model: nn.Module, settings: LoraSettings, name: str, seed: int) -> None:
    """Adds a trainable float32 adapter that changes nothing yet (its second factor is zero) and freezes the rest.

    Adapters that are there already stay trainable, and the one that was active stays so.
    """
    from peft import inject_adapter_in_model
    from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as KNOWN

    config = lora_config(settings)
    if config.target_modules is None:
        kind = model.config.model_type
        if kind not in KNOWN:
            raise UserError(
                f"lora.target_modules: peft has no default for {kind} models; name the layers, or [all-linear]"
            )
        config.target_modules = set(KNOWN[kind])
    if config.target_modules == "all-linear":
        config.target_modules = linear_names(model)
    trained = {id(p) for n, p in model.named_parameters() if ".lora_" in n and p.requires_grad}
    active = active_adapter(model)
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        torch.manual_seed(seed)
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")
        try:
            inject_adapter_in_model(config, model, name)
        except ValueError as error:
            raise UserError(f"lora.target_modules: {str(error).splitlines()[0]}") from error
    model.eval()
    if active is not None:
        activate(model, active)
    for parameter_name, parameter in model.named_parameters():
        own = f".{name}." in parameter_name and ".lora_" in parameter_name
        if own and parameter.dtype is not torch.float32:
            parameter.data = parameter.data.float()
        parameter.requires_grad_(own or id(parameter) in trained)


def linear_names(model: nn.Module) -> set[str]:
    """Last names of the linear layers, without the output head."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    return {
        name.removesuffix(".base_layer").rsplit(".", 1)[-1]
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not head and ".lora_" not in name
    }


def layers(model: nn.Module) -> list[Any]:
    """The wrapped layers."""
    if not any(".lora_" in name for name, _ in model.named_parameters()):
        return []
    from peft.tuners.lora import LoraLayer

    return [module for module in model.modules() if isinstance(module, LoraLayer)]


def active_adapter(model: nn.Module) -> str | None:
    """The name of the adapter in use, or None."""
    wrapped = layers(model)
    return None if not wrapped or wrapped[0].disable_adapters else wrapped[0].active_adapters[0]


def activate(model: nn.Module, name: str | None) -> None:
    """Puts one adapter to use, or none. Unlike peft's own switches it leaves alone which weights are trained."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for layer in layers(model):
        layer.enable_adapters(name is not None)
        if name is not None:
            layer.set_adapter(name)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for parameter in trained:
        parameter.requires_grad_(True)


@contextmanager
def adapter(model: nn.Module, name: str | None) -> Iterator[None]:
    """`name` is the active adapter in the block (None: the base alone), then the one that was active before."""
    before = active_adapter(model)
    activate(model, name)
    try:
        yield
    finally:
        activate(model, before)


class WithoutAdapter:
    """A model as it is without its adapters, to be called like one: the reference of a LoRA run, at no memory."""

    def __init__(self, model: nn.Module):
        self.model = model

    def __call__(self, **inputs: Any) -> Any:
        with adapter(self.model, None):
            return self.model(**inputs)

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def config(self) -> Any:
        return self.model.config


def underlying(model: nn.Module | WithoutAdapter) -> nn.Module:
    """The model itself, whatever of it is to be computed."""
    return model.model if isinstance(model, WithoutAdapter) else model


@torch.no_grad()
def merged_tensors(model: nn.Module, name: str = POLICY) -> dict[str, Tensor]:
    """The model's tensors under the names they have without adapters, adapter `name` added to them.

    Quantized weights are given as the numbers that they stand for.
    """
    from peft.utils.integrations import dequantize_module_weight

    deltas = {
        module_name: module.get_delta_weight(name)
        for module_name, module in model.named_modules()
        if hasattr(module, "lora_A") and name in module.lora_A
    }
    own = {n for n, _ in model.named_parameters(remove_duplicate=False)} | {n for n, _ in model.named_buffers()}
    merged = {}
    for key, value in model.state_dict().items():
        if ".lora_" in key or key not in own:  # what quantization keeps beside its weights is no tensor of the model
            continue
        module_name, _, last = key.rpartition(".")
        if last == "weight" and not value.is_floating_point():
            value = dequantize_module_weight(model.get_submodule(module_name))
        owner = module_name.removesuffix(".base_layer")
        if last == "weight" and owner in deltas:
            value = (value.float() + deltas[owner].float()).to(value.dtype)
        merged[key.replace(".base_layer.", ".")] = value.contiguous()
    return merged


def save_adapter(model: nn.Module, folder: Path, base: str, name: str = POLICY) -> None:
    """Writes one adapter as the folder that `peft.PeftModel.from_pretrained` loads onto `base`.

    What else is trained, the head of a reward model, goes with it as peft's `modules_to_save`.
    """
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    config = copy.deepcopy(model.peft_config[name])
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
    config.save_pretrained(folder)


def is_adapter(path: str) -> bool:
    """Whether a folder, or a hub repository, holds an adapter instead of a model."""
    folder = Path(path).expanduser()
    if folder.is_dir():
        return (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file()
    return hub_holds_adapter(path)


@cache
def hub_holds_adapter(path: str) -> bool:
    """The same for a hub id, asked once. What cannot be reached is no adapter; loading it will say what is wrong."""
    from transformers.utils import cached_file

    hub_answers()
    try:
        return (
            cached_file(path, "config.json", _raise_exceptions_for_missing_entries=False) is None
            and cached_file(path, "adapter_config.json", _raise_exceptions_for_missing_entries=False) is not None
        )
    except OSError:
        return False


def adapter_base(path: str) -> str:
    """The folder or hub id of the model that an adapter belongs to."""
    from transformers.utils import cached_file

    folder = Path(path).expanduser()
    file = folder / "adapter_config.json" if folder.is_dir() else Path(cached_file(path, "adapter_config.json"))
    base = json.loads(file.read_text()).get("base_model_name_or_path")
    if not base:
        raise UserError(f"{path}: adapter_config.json names no base_model_name_or_path")
    return base
