"""Weights that predict: the model of a checkpoint folder, without optimizer or position."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from resnet_dist.config import Recipe, UserError
from resnet_dist.model import build_model
from resnet_dist.train.checkpoint import DamagedCheckpoint, list_checkpoints, read_checkpoint


@dataclass(frozen=True)
class TrainedModel:
    """A model in evaluation mode, with the recipe that trained it and the names of its classes."""

    model: nn.Module
    recipe: Recipe
    classes: tuple[str, ...]
    step: int
    folder: Path


def load_model(location: Path, device: torch.device) -> TrainedModel:
    """The model of a checkpoint folder, or the newest good one of a run folder.

    Raises UserError where there is none, or where it is damaged.
    """
    candidates = [location] if (location / "checkpoint.json").exists() else []
    candidates += reversed(list_checkpoints(location / "checkpoints"))
    problem = "a checkpoint folder holds checkpoint.json, a run folder holds checkpoints/"
    for folder in candidates:
        try:
            return _load(folder, device)
        except DamagedCheckpoint as error:
            problem = str(error)
    raise UserError(f"{location}: no model to load; {problem}")


def _load(folder: Path, device: torch.device) -> TrainedModel:
    tensors, manifest = read_checkpoint(folder, only=("model",))
    recipe, classes = Recipe.model_validate(manifest["recipe"]), tuple(manifest["classes"])
    model = build_model(**recipe.model.options(), in_channels=recipe.data.channels, num_classes=len(classes))
    model.load_state_dict(tensors["model"])
    model = model.to(device).to(memory_format=torch.channels_last).eval()
    return TrainedModel(model, recipe, classes, manifest["scalars"]["step"], folder)
