"""Load the model of a checkpoint folder or of an exported file for prediction, without optimizer or position."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from resnet_dist.config import Data, Recipe
from resnet_dist.config.part import explain
from resnet_dist.data.storage.transfer import read_bytes
from resnet_dist.data.storage.urls import path_of, shown
from resnet_dist.errors import UserError
from resnet_dist.model import build_model
from resnet_dist.runs.storage.open import is_url
from resnet_dist.train.checkpoint.folder import DamagedCheckpoint, read_newest
from resnet_dist.train.checkpoint.single_file import SUFFIX, read_single_file


@dataclass(frozen=True)
class TrainedModel:
    """A model in evaluation mode, with the recipe that trained it and the names of its classes."""

    model: nn.Module
    recipe: Recipe
    classes: tuple[str, ...]
    step: int
    location: str  # the path or URL of its checkpoint


def load_model(location: str | Path, device: torch.device, *, allow_commands: bool = False) -> TrainedModel:
    """Return the model of a checkpoint folder, of the newest good checkpoint of a run folder, or of an exported file.

    allow_commands: whether its data may be what a command in a shell prints, which is the person's to allow and not the
    model's. Raises UserError where there is none, where it is damaged, or where this version cannot use it.
    """
    trained = _loaded(location, device)
    return replace(trained, recipe=_on_this_machine(trained.recipe, allow_commands=allow_commands))


def _on_this_machine(recipe: Recipe, *, allow_commands: bool) -> Recipe:
    """Return the recipe without what another machine may do: run commands, and the folder of its cache."""
    cache = Data.model_fields["shard_cache"].default
    data = recipe.data.model_copy(update={"allow_commands": allow_commands, "shard_cache": cache})
    return recipe.model_copy(update={"data": data})


def _loaded(location: str | Path, device: torch.device) -> TrainedModel:
    if is_url(location):
        if path_of(str(location)).endswith(SUFFIX):
            return _fetched(str(location), device)
    elif Path(location).is_file():
        return _load_file(Path(location), device)
    try:
        found = read_newest(location, only=("model",))
    except DamagedCheckpoint as problem:
        raise UserError(f"{location}: no model to load; {problem}") from None
    manifest = found.manifest
    try:
        description = _Description(manifest["recipe"], manifest["classes"], manifest["scalars"]["step"])
    except (KeyError, TypeError) as problem:
        raise UserError(f"{found.location}: no model to load; its manifest lacks {problem}") from None
    return _built(found.tensors["model"], description, found.location, device)


class _Description(NamedTuple):
    """The description that lies beside the weights."""

    recipe: Any
    classes: list[str]
    step: int


def _fetched(url: str, device: torch.device) -> TrainedModel:
    """Return the model of an exported file that lies in a bucket or on a server."""
    try:
        content = read_bytes(url)
    except FileNotFoundError:
        raise UserError(f"{shown(url)}: no such file") from None
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / f"model{SUFFIX}"
        file.write_bytes(content)
        trained = _load_file(file, device)
    return replace(trained, location=shown(url))


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
    given = description.classes
    if not isinstance(given, list) or not given or not all(isinstance(name, str) for name in given):
        raise UserError(f"{location}: its classes are {str(given)[:80]}; they must be a list of names")
    classes = tuple(given)
    model = build_model(**recipe.model.options(), in_channels=recipe.data.channels, num_classes=len(classes))
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        first = next((line.strip() for line in str(error).splitlines()[1:]), str(error))
        raise UserError(f"{location}: its weights do not fit its recipe: {first[:200]}") from None
    model = model.to(device).to(memory_format=torch.channels_last).eval()
    return TrainedModel(model, recipe, classes, description.step, location)
