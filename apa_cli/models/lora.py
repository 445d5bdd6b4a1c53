"""Low-rank adapters (LoRA, 2106.09685) through `peft`: adding, switching, merging and saving of adapters.

The model keeps its class; its linear layers are wrapped in place. Several adapters share one base: the policy's, and
one for each critic of kind `adapter`. With no active adapter the model computes the base's outputs.
"""

from __future__ import annotations

import copy
import json
import logging
import re
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.utils import cached_file

from apa_cli.errors import UserError, get_first_line
from apa_cli.model_folder import ADAPTER_CONFIG, is_adapter_folder
from apa_cli.models.structure import get_trunk
from apa_cli.network import probe_hub
from apa_cli.settings import LoraSettings

if TYPE_CHECKING:
    from peft import LoraConfig
    from peft.tuners.lora import LoraLayer

POLICY_ADAPTER = "policy"
"""Name of the policy's adapter."""

# peft imports bitsandbytes, which reports at once each optional kernel that is not installed.
logging.getLogger("bitsandbytes").setLevel(logging.CRITICAL)


def build_lora_config(model: PreTrainedModel, settings: LoraSettings, with_head: bool) -> LoraConfig:
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
    head = model.get_output_embeddings()
    excluded = find_layers_trained_whole(model)
    excluded += [] if with_head else [name for name, module in model.named_modules() if module is head]
    return LoraConfig(r=settings.rank, lora_alpha=alpha, target_modules=targets, exclude_modules=excluded or None)


def add_adapter(model: PreTrainedModel, settings: LoraSettings, name: str, seed: int, with_head: bool = True) -> None:
    """Add a trainable float32 adapter that changes nothing yet (one of its factors is zero), and freeze the base.

    Earlier adapters stay trainable, and the active one stays active. Without `with_head` the output head gets none, as
    for a critic. Raise UserError if a name in `lora.target_modules` matches no layer, or if an adapter there has no
    effect on the model's output.
    """
    from peft import inject_adapter_in_model

    config = build_lora_config(model, settings, with_head)
    if settings.target_modules is not None:
        check_target_modules(model, list(cast("set[str]", config.target_modules)), with_head)
    trained = [p for other in list_adapters(model) for p in find_adapter_parameters(model, other).values()]
    active = get_active_adapter(model)
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        torch.manual_seed(seed)
        warnings.simplefilter("ignore")  # peft's remarks on several adapters, transposed weights and tied heads
        try:
            inject_adapter_in_model(config, model, name)
        except ValueError as error:
            raise UserError(f"lora.target_modules: {get_first_line(error)}") from error
    untie_head(model)
    model.eval()
    if active is not None:
        activate_adapter(model, active)
    model.requires_grad_(False)
    new = find_adapter_parameters(model, name).values()
    for parameter in new:
        parameter.data = parameter.data.float()
    for parameter in (*trained, *new):
        parameter.requires_grad_(True)
    check_effect(model, name, with_head)


def check_target_modules(model: PreTrainedModel, targets: list[str], with_head: bool) -> None:
    """Raise UserError if the model lacks a layer of one of these names, or, without its head, layers of all of them.

    The critic has no head, so it may lack a layer that the policy has.
    """
    head = model.get_output_embeddings()
    layers = [f".{name}" for name, module in model.named_modules() if with_head or module is not head]
    missing = [target for target in targets if not any(layer.endswith(f".{target}") for layer in layers)]
    if missing and (with_head or len(missing) == len(targets)):
        part = "model has" if with_head else "model's critic, which has no output head, has"
        raise UserError(
            f"lora.target_modules: this {get_model_type(model)} {part} no layer {', '.join(missing)}; "
            f"its linear layers are {', '.join(sorted(find_linear_names(model)))}"
        )


def check_effect(model: PreTrainedModel, name: str, with_head: bool) -> None:
    """Raise UserError if adapter `name` has no effect on the outputs from any layer of a name.

    Some models read a layer's weights instead of calling the layer. One layer of a name suffices, because no token may
    reach an expert. A model without weights, of which only the size is asked, is not checked.
    """
    if model.device.type == "meta":
        return
    parameters, layers = find_adapter_parameters(model, name), find_lora_layers(model)
    part = model if with_head else get_trunk(model)
    ids = torch.zeros(1, 2, dtype=torch.int64, device=model.device)
    # As in training: the new head of a reward model is float32 on a trunk in bfloat16.
    autocast = torch.autocast(model.device.type, torch.bfloat16, enabled=model.dtype is torch.bfloat16)
    with use_adapter(model, name), torch.enable_grad(), autocast:
        try:
            output = part(input_ids=ids, use_cache=False)
        except (RuntimeError, AttributeError, TypeError, ValueError) as error:
            raise UserError(
                f"lora.target_modules: this {get_model_type(model)} model does not run with adapters on these layers "
                f"({get_first_line(error)}); name other layers"
            ) from error
        total = output["logits" if "logits" in output else "last_hidden_state"].float().sum()
        gradients: tuple[Tensor | None, ...] = (None,) * len(parameters)
        if total.requires_grad:
            gradients = torch.autograd.grad(total, list(parameters.values()), allow_unused=True)
    is_used: dict[str, bool] = {}
    for key, gradient in zip(parameters, gradients, strict=True):
        layer = max((layer for layer in layers if key.startswith(f"{layer}.")), key=len).rpartition(".")[2]
        is_used[layer] = is_used.get(layer, False) or gradient is not None
    if unused := sorted(layer for layer, used in is_used.items() if not used):
        raise UserError(
            f"lora.target_modules: an adapter on {', '.join(unused)} has no effect, because a {get_model_type(model)} "
            "model reads these weights without calling the layer; name other layers"
        )


def get_model_type(model: PreTrainedModel) -> str:
    """Return the model's type, as `transformers` names it."""
    return model.config.get_text_config().model_type


def untie_head(model: PreTrainedModel) -> None:
    """Give the output head its own copy of the embeddings' weights if the two are tied and either has an adapter.

    The adapter changes one of them only, so the merged model cannot be tied; its configuration says so.
    """
    head: Any = model.get_output_embeddings()
    embedding: Any = model.get_input_embeddings()
    adapted = [part for part in (head, embedding) if any(part is layer for layer in find_lora_layers(model).values())]
    bases = [part.get_base_layer() if part in adapted else part for part in (head, embedding)]
    if adapted and all(base is not None for base in bases) and bases[0].weight is bases[1].weight:
        bases[0].weight = nn.Parameter(bases[0].weight.detach().clone(), requires_grad=False)
        mark_untied(model)


def mark_untied(model: PreTrainedModel) -> None:
    """Let the model's configuration say that head and embeddings are not tied."""
    for config in (model.config, model.config.get_text_config()):
        config.tie_word_embeddings = False


def find_layers_trained_whole(model: PreTrainedModel) -> list[str]:
    """Return the names of a classifier's linear layers outside the trunk and in a pooler, which adapters leave out.

    They are new in a reward model, which trains them themselves. A language model has none.
    """
    if get_trunk(model) is model:
        return []
    head, trunk = model.get_output_embeddings(), f"{model.base_model_prefix}."
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not head and (not name.startswith(trunk) or ".pooler" in name)
    ]


def find_linear_names(model: PreTrainedModel) -> set[str]:
    """Return the last part of the name of each linear layer that adapters may wrap, the output head left out."""
    layers, head, whole = find_lora_layers(model), model.get_output_embeddings(), find_layers_trained_whole(model)
    inside = {id(part) for layer in layers.values() for part in cast(nn.Module, layer).modules() if part is not layer}
    modules = {
        name: layers[name].get_base_layer() if name in layers else module
        for name, module in model.named_modules()
        if id(module) not in inside and module is not head and name not in whole
    }
    # The number of a block may be that of a linear layer in a list: such a layer is given with its whole name.
    others = {name.rpartition(".")[2] for name, module in modules.items() if not isinstance(module, nn.Linear | Conv1D)}
    linear = [name for name, module in modules.items() if isinstance(module, nn.Linear | Conv1D)]
    return {name if (last := name.rpartition(".")[2]) in others else last for name in linear}


def find_lora_layers(model: nn.Module) -> dict[str, LoraLayer]:
    """Return the layers that hold adapters, by name; peft is only imported if an adapter has been added."""
    if "peft.tuners.lora" not in sys.modules:
        return {}
    from peft.tuners.lora import LoraLayer

    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}


def has_adapter(layer: LoraLayer, name: str) -> bool:
    """Return True if the layer holds a part of the adapter `name`."""
    return any(name in getattr(layer, part, ()) for part in layer.adapter_layer_names)


def list_adapters(model: nn.Module) -> list[str]:
    """Return the names of the model's adapters."""
    return list(dict.fromkeys(name for layer in find_lora_layers(model).values() for name in layer.scaling))


def find_adapter_parameters(model: nn.Module, name: str, as_saved: bool = False) -> dict[str, nn.Parameter]:
    """Return the parameters of adapter `name` by their names in the model, or in a file of that adapter alone."""
    parameters: dict[str, nn.Parameter] = {}
    for layer_name, layer in find_lora_layers(model).items():
        for part in layer.adapter_layer_names:
            container = getattr(layer, part, {})
            if name in container:
                factor, prefix = container[name], f"{layer_name}.{part}" + ("" if as_saved else f".{name}")
                named = {"": factor} if isinstance(factor, nn.Parameter) else dict(factor.named_parameters(prefix="."))
                parameters |= {prefix + key.replace("..", "."): parameter for key, parameter in named.items()}
    return parameters


def get_active_adapter(model: nn.Module) -> str | None:
    """Return the name of the active adapter, or None."""
    layers = list(find_lora_layers(model).values())
    return None if not layers or layers[0].disable_adapters else layers[0].active_adapters[0]


def activate_adapter(model: nn.Module, name: str | None) -> None:
    """Make `name` the only active adapter (None: no adapter). Unlike peft's switches, keep the trained parameters."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for layer in find_lora_layers(model).values():
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

    layers: dict[str, Any] = {**find_lora_layers(model)}
    deltas = {
        strip_wrappers(f"{layer_name}.{getattr(layer, 'parameter_name', 'weight')}"): layer.get_delta_weight(name)
        for layer_name, layer in layers.items()
        if has_adapter(layer, name)
    }
    adapters = {key for other in list_adapters(model) for key in find_adapter_parameters(model, other)}
    names = {n for n, _ in model.named_parameters(remove_duplicate=False)} | {n for n, _ in model.named_buffers()}
    merged = {}
    for key, value in model.state_dict().items():
        if key in adapters or key not in names:  # quantization stores further tensors next to the weights
            continue
        module_name, _, last = key.rpartition(".")
        if last == "weight" and not value.is_floating_point():
            value = dequantize_module_weight(model.get_submodule(module_name))
        key = strip_wrappers(key)
        if key in deltas:
            value = (value.float() + deltas[key].float()).to(value.dtype)
        merged[key] = value.contiguous()
    return merged


def strip_wrappers(key: str) -> str:
    """Return a tensor's name without adapters; a module with several adapted tensors, of experts, is wrapped twice."""
    return re.sub(r"(\.base_layer)+\.", ".", key)


def save_adapter(model: PreTrainedModel, folder: Path, base: str, name: str = POLICY_ADAPTER) -> None:
    """Save one adapter as a folder that `peft.PeftModel.from_pretrained` loads onto the model `base`.

    Other trained parameters, such as a reward model's head, are saved with it as peft's `modules_to_save`.
    """
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    config = copy.deepcopy(cast("dict[str, LoraConfig]", model.peft_config)[name])
    adapters = {id(p) for other in list_adapters(model) for p in find_adapter_parameters(model, other).values()}
    heads = {n: p for n, p in model.named_parameters() if p.requires_grad and id(p) not in adapters}
    tensors = {
        f"base_model.model.{key}": parameter.detach().contiguous()
        for key, parameter in {**find_adapter_parameters(model, name, as_saved=True), **heads}.items()
    }
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config.base_model_name_or_path = str(Path(base).resolve()) if Path(base).is_dir() else base
    config.inference_mode = True
    config.task_type = "SEQ_CLS" if heads else "CAUSAL_LM"
    trunk = f"{model.base_model_prefix}."  # peft wraps a head of several layers as one module
    owners = {key.rpartition(".")[0] if key.startswith(trunk) else key.partition(".")[0] for key in heads}
    config.modules_to_save = sorted(owners) or None
    config.save_pretrained(str(folder))


def is_adapter(path: str) -> bool:
    """Return True if a folder or hub repository holds an adapter instead of a model."""
    folder = Path(path).expanduser()
    return is_adapter_folder(folder) if folder.is_dir() else is_hub_adapter(path)


@cache
def is_hub_adapter(path: str) -> bool:
    """Return True if a hub repository holds an adapter instead of a model; requested once per process.

    Return False if the hub cannot be reached, since loading then reports the reason.
    """
    probe_hub()
    try:
        return (
            cached_file(path, "config.json", _raise_exceptions_for_missing_entries=False) is None
            and cached_file(path, ADAPTER_CONFIG, _raise_exceptions_for_missing_entries=False) is not None
        )
    except OSError:
        return False


def read_adapter_base(path: str) -> str:
    """Return the folder or hub id of an adapter's base model. Raise UserError if adapter_config.json names none."""
    base = read_adapter_config(path).get("base_model_name_or_path")
    if not base or not isinstance(base, str):
        raise UserError(f"{path}: {ADAPTER_CONFIG} names no base_model_name_or_path")
    if Path(base).expanduser().is_dir() and Path(base).expanduser().resolve() == Path(path).expanduser().resolve():
        raise UserError(f"{path}: {ADAPTER_CONFIG} names the adapter itself as its base_model_name_or_path")
    return base


def read_adapter_config(path: str) -> dict[str, Any]:
    """Return the parsed adapter_config.json of an adapter's folder or hub repository. Raise UserError if it is none."""
    folder = Path(path).expanduser()
    file = folder / ADAPTER_CONFIG if folder.is_dir() else cached_file(path, ADAPTER_CONFIG)
    try:
        config = json.loads(Path(cast(str, file)).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: {ADAPTER_CONFIG} cannot be read: {get_first_line(error)}") from error
    if not isinstance(config, dict):
        raise UserError(f"{path}: {ADAPTER_CONFIG} is no JSON object")
    return config
