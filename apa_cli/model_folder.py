"""Files by which a folder is known as a model's, an adapter's or a tokenizer's."""

from __future__ import annotations

from pathlib import Path

ADAPTER_CONFIG = "adapter_config.json"
MODEL_FILES = ("config.json", ADAPTER_CONFIG, "tokenizer_config.json")
"""Files of which a folder with a model, an adapter or a tokenizer has at least one."""
MODEL_WEIGHTS = ("model*.safetensors", "pytorch_model*.bin")
"""Patterns of the files of a whole model's weights."""


def has_model_weights(folder: Path) -> bool:
    """Return True if the folder has the weights of a whole model."""
    return any(file for pattern in MODEL_WEIGHTS for file in folder.glob(pattern))


def is_adapter_folder(folder: Path) -> bool:
    """Return True if the folder has adapter_config.json, also beside a config.json, unless it has a model's weights."""
    return (folder / ADAPTER_CONFIG).is_file() and not has_model_weights(folder)
