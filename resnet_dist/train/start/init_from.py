"""Read the weights that training begins with, from where `model.init_from` points: a file, a run, or torchvision."""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from resnet_dist.errors import UserError
from resnet_dist.model import Match, from_torchvision, load_fitting, match
from resnet_dist.runs.storage.open import is_url
from resnet_dist.train.checkpoint.folder import DamagedCheckpoint, read_newest
from resnet_dist.train.start.shapes import shapes_only

TORCHVISION = "torchvision:"
# The share of the model, and of the weights, that must fit, heads not counted: room for a new stem or added layers.
MIN_SHARE = 0.8
WEIGHT_KEYS = ("state_dict", "model", "model_state_dict")  # where training scripts save the weights in a file
PREFIXES = ("module.", "_orig_mod.")  # added to names by DistributedDataParallel and torch.compile

Weights = dict[str, Tensor]


def load_weights(model: nn.Module, source: str, weights: Weights) -> Match:
    """Copy the tensors that fit into `model`, and return which do. Raises UserError where it is another network."""
    check_match(source, match(model, weights))
    return load_fitting(model, weights)


def check_match(source: str, found: Match) -> None:
    """Raise UserError where too little fits: the weights are another network's."""
    if min(found.model_share, found.weights_share) < MIN_SHARE:
        raise UserError(
            f"model.init_from={source!r} is another network: it has {found.model_share:.0%} of the model, and the "
            f"model {found.weights_share:.0%} of it ({found})"
        )


def read_weights(source: str) -> Weights:
    """Return CPU tensors by our names; torchvision's are downloaded. Raises UserError."""
    if source.startswith(TORCHVISION):
        try:
            state = _torchvision_weights(source).get_state_dict(progress=False, check_hash=True)
        except (OSError, RuntimeError) as error:  # no network, or a wrong checksum
            raise UserError(f"model.init_from={source!r} could not be downloaded: {error}") from None
        return from_torchvision(state)
    path = Path(source)
    if is_url(source) or path.is_dir():
        return _read_run(source)
    if not path.is_file():
        raise UserError(
            f"model.init_from={source!r}: no such file or folder; give a .pth, .pt or .safetensors file, a "
            f"checkpoint or run folder, or {TORCHVISION}resnet50.IMAGENET1K_V2"
        )
    return from_torchvision(_read_safetensors(path) if path.suffix == ".safetensors" else _read_pickle(path))


def read_shapes(source: str) -> Weights:
    """Return the tensors of `read_weights` without a download: torchvision's models are built on the meta device."""
    if not source.startswith(TORCHVISION):
        return read_weights(source)
    from torchvision.models import get_model

    _torchvision_weights(source)
    with shapes_only():
        return from_torchvision(get_model(_torchvision_name(source)).state_dict())


def _torchvision_name(source: str) -> str:
    return source.removeprefix(TORCHVISION).partition(".")[0]


def _torchvision_weights(source: str) -> Any:
    from torchvision.models import get_model_weights  # imported here: it takes a second, and few runs need it

    name, _, version = source.removeprefix(TORCHVISION).partition(".")
    try:
        known = get_model_weights(name)
    except ValueError:
        raise UserError(
            f"model.init_from={source!r}: torchvision has no model {name!r} with weights"
        ) from None
    if version not in known.__members__:
        raise UserError(
            f"model.init_from={source!r}: torchvision's weights of {name} are {', '.join(known.__members__)}"
        )
    return known[version]


def _read_run(location: str) -> Weights:
    """Return the weights of a checkpoint, or of the newest good checkpoint of a run, by its path or URL."""
    try:
        return read_newest(location, only=("model",)).tensors["model"]
    except DamagedCheckpoint as problem:
        raise UserError(f"model.init_from={location!r}: no weights to load; {problem}") from None


def _read_safetensors(path: Path) -> Weights:
    try:
        return dict(load_file(path))
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"model.init_from={str(path)!r} cannot be read as safetensors: {_first_line(error)}"
        ) from None


def _read_pickle(path: Path) -> Weights:
    """Return a state dict, saved alone or inside what a training script saved. Runs no code from the file."""
    try:
        with warnings.catch_warnings():
            # Ignore the warning about an unusual pickle protocol: a file that cannot be read raises.
            warnings.simplefilter("ignore")
            value = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as error:
        raise UserError(
            f"model.init_from={str(path)!r} cannot be read as tensors alone: {_first_line(error)}"
        ) from None
    if isinstance(value, Mapping):
        inner = next((value[key] for key in WEIGHT_KEYS if isinstance(value.get(key), Mapping)), value)
        weights = {str(name): tensor for name, tensor in inner.items() if isinstance(tensor, Tensor)}
        if weights:
            return _without_prefixes(weights)
    raise UserError(f"model.init_from={str(path)!r} holds no state dict")


def _without_prefixes(weights: Weights) -> Weights:
    for prefix in PREFIXES:
        if all(name.startswith(prefix) for name in weights):
            return _without_prefixes({name.removeprefix(prefix): tensor for name, tensor in weights.items()})
    return weights


def _first_line(error: BaseException) -> str:
    """Return the first line of the message: torch explains a refused pickle in twenty."""
    return (str(error).splitlines() or [type(error).__name__])[0]
