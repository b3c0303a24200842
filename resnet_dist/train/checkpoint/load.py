"""Load the model of a checkpoint folder or of an exported file for prediction, without optimizer or position."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from resnet_dist.config import Recipe
from resnet_dist.config.part import explain
from resnet_dist.errors import UserError
from resnet_dist.model import build_model
from resnet_dist.runs.storage.open import is_url
from resnet_dist.train.checkpoint.folder import DamagedCheckpoint, read_newest
from resnet_dist.train.checkpoint.single_file import read_single_file


@dataclass(frozen=True)
class TrainedModel:
    """A model in evaluation mode, with the recipe that trained it and the names of its classes."""

    model: nn.Module
    recipe: Recipe
    classes: tuple[str, ...]
    step: int
    location: str  # the path or URL of its checkpoint


def load_model(location: str | Path, device: torch.device) -> TrainedModel:
    """Return the model of a checkpoint folder, of the newest good checkpoint of a run folder, or of an exported file.

    Raises UserError where there is none, where it is damaged, or where this version cannot use its recipe.
    """
    path = None if is_url(location) else Path(location)
    if path is not None and path.is_file():
        return _load_file(path, device)
    try:
        found = read_newest(location, only=("model",))
    except DamagedCheckpoint as problem:
        raise UserError(f"{location}: no model to load; {problem}") from None
    manifest = found.manifest
    description = _Description(manifest["recipe"], manifest["classes"], manifest["scalars"]["step"])
    return _built(found.tensors["model"], description, found.location, device)


class _Description(NamedTuple):
    """The description that lies beside the weights."""

    recipe: Any
    classes: list[str]
    step: int


def _load_file(path: Path, device: torch.device) -> TrainedModel:
    try:
        state, header = read_single_file(path)
        description = _Description(header["recipe"], header["classes"], int(header["step"]))
    except (OSError, ValueError, KeyError, TypeError) as problem:
        raise UserError(
            f"{path}: no model to load; {problem}; use a checkpoint or run folder, or a file that "
            "`resnet-dist export --format safetensors` wrote"
        ) from None
    return _built(state, description, str(path), device)


def _built(
    state: dict[str, Tensor], description: _Description, location: str, device: torch.device
) -> TrainedModel:
    try:
        recipe = Recipe.model_validate(description.recipe)
    except ValidationError as error:
        raise UserError(f"{location}: its recipe cannot be used: {explain(error, Recipe)}") from None
    classes = tuple(description.classes)
    model = build_model(**recipe.model.options(), in_channels=recipe.data.channels, num_classes=len(classes))
    model.load_state_dict(state)
    model = model.to(device).to(memory_format=torch.channels_last).eval()
    return TrainedModel(model, recipe, classes, description.step, location)
