"""A model as one safetensors file: its weights, and in the header what builds it and reads its images.

Any program that reads safetensors gets the weights; `model.init_from`, `evaluate` and `predict` take the file too.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

SUFFIX = ".safetensors"
HEADER = "resnet_dist"  # the key in the metadata of the file


def write_single_file(
    path: Path, state: Mapping[str, Tensor], recipe: Mapping[str, Any], classes: Sequence[str], step: int
) -> None:
    """Write the file. Raises OSError."""
    header = json.dumps({"recipe": recipe, "classes": list(classes), "step": step})
    tensors = {name: value.detach().cpu().contiguous() for name, value in state.items()}
    try:
        save_file(tensors, path, {HEADER: header, "format": "pt"})
    except SafetensorError as error:  # safetensors reports a full disk with its own error
        raise OSError(str(error)) from None


def read_single_file(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the weights, and `recipe`, `classes` and `step`. Raises ValueError where it is no such file."""
    try:
        with safe_open(path, framework="pt") as file:
            header = (file.metadata() or {}).get(HEADER)
        if header is None:
            raise ValueError("a safetensors file without a recipe, which `resnet-dist export` writes into it")
        return load_file(path), json.loads(header)
    except SafetensorError as error:
        raise ValueError(f"not a safetensors file ({error})") from None
