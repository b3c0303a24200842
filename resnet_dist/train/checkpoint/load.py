"""Load the model of a checkpoint folder for prediction, without optimizer or position."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import ValidationError
from torch import nn

from resnet_dist.config import Recipe
from resnet_dist.config.part import explain
from resnet_dist.errors import UserError
from resnet_dist.model import build_model
from resnet_dist.train.checkpoint.folder import DamagedCheckpoint, read_newest


@dataclass(frozen=True)
class TrainedModel:
    """A model in evaluation mode, with the recipe that trained it and the names of its classes."""

    model: nn.Module
    recipe: Recipe
    classes: tuple[str, ...]
    step: int
    location: str  # the path or URL of its checkpoint


def load_model(location: str | Path, device: torch.device) -> TrainedModel:
    """Return the model of a checkpoint folder, or of the newest good checkpoint of a run folder.

    Raises UserError where there is none, where it is damaged, or where this version cannot use its recipe.
    """
    try:
        found = read_newest(location, only=("model",))
    except DamagedCheckpoint as problem:
        raise UserError(f"{location}: no model to load; {problem}") from None
    manifest = found.manifest
    try:
        recipe = Recipe.model_validate(manifest["recipe"])
    except ValidationError as error:
        raise UserError(f"{found.location}: its recipe cannot be used: {explain(error, Recipe)}") from None
    classes = tuple(manifest["classes"])
    model = build_model(**recipe.model.options(), in_channels=recipe.data.channels, num_classes=len(classes))
    model.load_state_dict(found.tensors["model"])
    model = model.to(device).to(memory_format=torch.channels_last).eval()
    return TrainedModel(model, recipe, classes, manifest["scalars"]["step"], found.location)
