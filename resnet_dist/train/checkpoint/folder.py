"""The folder of a checkpoint: published whole, verified when read; the newest good one wins.

`step-00000120/` holds safetensors files, and a `checkpoint.json` with their SHA-256, its own SHA-256, the scalars and
the recipe. It holds no pickles, and its model.safetensors is the model's state dict. `checkpoint.json` commits it: it
is written last and removed first.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from resnet_dist.runs.folder import CHECKPOINT_PREFIX, CHECKPOINTS_FOLDER, checkpoint_name
from resnet_dist.runs.storage.open import open_storage
from resnet_dist.runs.storage.protocol import ALWAYS, Permit, Storage
from resnet_dist.system.files import checksum

MANIFEST = "checkpoint.json"
MODEL_FILE = "model.safetensors"
REQUIRED = ("scalars", "recipe", "classes")  # keys of a manifest
REQUIRED_FILES = ("model", "optimizer", "meter")
Tensors = dict[str, dict[str, Tensor]]  # by file, then by name


class DamagedCheckpoint(ValueError):
    """A checkpoint folder whose files do not match its manifest."""


@dataclass(frozen=True)
class VerifiedCheckpoint:
    """The verified contents of a checkpoint."""

    name: str
    location: str  # the path or URL of its folder
    tensors: Tensors
    manifest: dict[str, Any]


def step_of(name: str) -> int:
    return int(name.removeprefix(CHECKPOINT_PREFIX))


def list_checkpoints(checkpoints: Storage) -> list[str]:
    """Return the names of the finished checkpoints, oldest first."""
    return [name for name in checkpoints.bundles(MANIFEST).names() if name.startswith(CHECKPOINT_PREFIX)]


def write_checkpoint(
    checkpoints: Storage, step: int, tensors: Tensors, manifest: dict[str, Any], permit: Permit = ALWAYS
) -> dict[str, str]:
    """Write all files aside and publish them together: the checkpoint is complete or absent.

    Return the SHA-256 of each file, by its name.

    `permit` is asked before it appears. Raises OSError where it cannot be written, and leaves nothing behind.
    """
    with checkpoints.bundles(MANIFEST).write(checkpoint_name(step), permit) as folder:
        checksums = {}
        for name, group in tensors.items():
            path = folder / f"{name}.safetensors"
            _save(group, path)
            checksums[path.name] = _sha256(path)
        _write_manifest(folder, {"sha256": checksums, **manifest})
    return checksums


def copy_model(folder: Path, target: Path, recipe: dict[str, Any]) -> dict[str, Any]:
    """Write the model of a checkpoint folder, without what resumes it, to a new folder; return its manifest.

    recipe: as JSON, in place of the checkpoint's own. Raises DamagedCheckpoint.
    """
    target.mkdir()
    _, manifest = read_checkpoint(folder, only=("model",))
    shutil.copyfile(folder / MODEL_FILE, target / MODEL_FILE)
    content = {**manifest, "sha256": {MODEL_FILE: manifest["sha256"][MODEL_FILE]}, "recipe": recipe}
    _write_manifest(target, content)
    return content


def read_checkpoint(
    folder: Path, only: tuple[str, ...] | None = None, location: str | None = None
) -> tuple[Tensors, dict[str, Any]]:
    """Return the tensors, by file and name, and the manifest, both verified. Raises DamagedCheckpoint.

    `only` names the files to read; None reads all. A model is loaded without the optimizer. location: the place that
    `folder` is a copy of, for messages.
    """
    place = location or str(folder)
    try:
        manifest = parse_manifest((folder / MANIFEST).read_bytes(), place)
        tensors = {}
        for name, expected in manifest["sha256"].items():
            path = folder / name
            if only is not None and path.stem not in only:
                continue
            if _sha256(path) != expected:
                raise DamagedCheckpoint(f"{place}/{name} does not match its checksum")
            tensors[path.stem] = load_file(path)
        if missing := [name for name in only or REQUIRED_FILES if name not in tensors]:
            raise DamagedCheckpoint(f"{place}/{MANIFEST} names no {missing[0]}.safetensors")
        return tensors, manifest
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        if isinstance(error, DamagedCheckpoint):
            raise
        raise DamagedCheckpoint(f"{place}: {type(error).__name__}: {error}") from None


def fetch_checkpoint(
    checkpoints: Storage, name: str, only: tuple[str, ...] | None = None
) -> VerifiedCheckpoint:
    """Return a verified checkpoint of a storage, or `only` some of its files.

    Raises DamagedCheckpoint, and StorageError where the storage cannot be read.
    """
    bundles = checkpoints.bundles(MANIFEST)
    files = None if only is None else [f"{stem}.safetensors" for stem in only]
    try:
        return _verified(bundles.fetch(name, files), only, bundles.location(name))
    except DamagedCheckpoint:
        bundles.forget(name)  # Only this machine's copy may be damaged: read it once more.
    except FileNotFoundError as error:
        raise DamagedCheckpoint(str(error)) from None
    return _verified(bundles.fetch(name, files), only, bundles.location(name))


def read_newest(location: str | Path, only: tuple[str, ...]) -> VerifiedCheckpoint:
    """Return some files of a checkpoint, or of the newest good checkpoint of a run, by its path or URL.

    Raises DamagedCheckpoint where there is none.
    """
    place = open_storage(location)
    candidates = [
        (place.at(CHECKPOINTS_FOLDER), name) for name in list_checkpoints(place.at(CHECKPOINTS_FOLDER))
    ]
    if place.read(MANIFEST) is not None:
        parent, _, name = place.location.rpartition("/")
        candidates.append((open_storage(parent or "/"), name))
    problem = DamagedCheckpoint(f"a checkpoint folder holds {MANIFEST}, a run folder holds checkpoints/")
    for checkpoints, name in reversed(candidates):
        try:
            return fetch_checkpoint(checkpoints, name, only)
        except DamagedCheckpoint as error:
            problem = error
    raise problem


def newest_good(checkpoints: Storage, report: Callable[[str], None]) -> VerifiedCheckpoint | None:
    """Return the newest checkpoint that matches its manifest; report and skip damaged ones.

    Raises StorageError where the storage cannot be read: a run must not begin anew because of that.
    """
    for candidate in reversed(list_checkpoints(checkpoints)):
        try:
            return fetch_checkpoint(checkpoints, candidate)
        except DamagedCheckpoint as problem:
            report(f"skipped a damaged checkpoint: {problem}")
    return None


def best_checkpoint(checkpoints: Storage) -> str | None:
    """Return the checkpoint with the best value of `train.best_metric`, as the newest good manifest records it."""
    names = list_checkpoints(checkpoints)
    for candidate in reversed(names):
        try:
            content = checkpoints.read(f"{candidate}/{MANIFEST}") or b""
            best = parse_manifest(content, candidate)["scalars"]["best"]
        except (ValueError, KeyError, TypeError, AttributeError):
            continue  # damaged: an older manifest records it too
        name = None if best is None else checkpoint_name(best["step"])
        return name if name in names else None
    return None


def best_or_newest(checkpoints: Storage) -> str | None:
    """Return the checkpoint whose model is the one to load: the best, or the newest where no metric names one."""
    return best_checkpoint(checkpoints) or next(reversed(list_checkpoints(checkpoints)), None)


def model_checksum(checkpoints: Storage, name: str) -> str | None:
    """Return the SHA-256 of the model of a checkpoint as its manifest has it; None where it is damaged or gone."""
    try:
        content = checkpoints.read(f"{name}/{MANIFEST}") or b""
        return str(parse_manifest(content, name)["sha256"][MODEL_FILE])
    except (ValueError, KeyError, TypeError, AttributeError):
        return None


def prune(checkpoints: Storage, *, keep: int, also: Iterable[int]) -> list[str]:
    """Remove all but the newest `keep` checkpoints and those of the steps `also`; return the names of those removed."""
    old = outdated(list_checkpoints(checkpoints), keep=keep, also=also)
    remove(checkpoints, old)
    return old


def outdated(names: Sequence[str], *, keep: int, also: Iterable[int]) -> list[str]:
    """Return all but the newest `keep` checkpoints and those of the steps `also`. names: the oldest first."""
    kept = {*names[-keep:], *map(checkpoint_name, also)}
    return [name for name in names if name not in kept]


def remove(checkpoints: Storage, names: Iterable[str]) -> None:
    for name in names:
        checkpoints.bundles(MANIFEST).remove(name)


def remove_unfinished(checkpoints: Storage) -> None:
    """Remove what killed writers left half-written, and bring back a checkpoint that was about to be replaced.

    Where the checkpoints lie in a folder, it is created: once, at the start. A run folder that is missing later was
    removed, and no checkpoint creates it anew.
    """
    checkpoints.bundles(MANIFEST).clean_up()


def remove_uncommitted(checkpoints: Storage) -> None:
    """Remove what uploads and removals that broke off have left of checkpoints. No process may write any more."""
    checkpoints.bundles(MANIFEST).remove_uncommitted()


def _verified(folder: Path, only: tuple[str, ...] | None, location: str) -> VerifiedCheckpoint:
    return VerifiedCheckpoint(folder.name, location, *read_checkpoint(folder, only, location))


def parse_manifest(content: bytes, place: str) -> dict[str, Any]:
    """Return the manifest. Raises DamagedCheckpoint, or what parsing raises."""
    manifest = json.loads(content)
    if not isinstance(manifest, dict):
        raise DamagedCheckpoint(f"{place}/{MANIFEST} is no JSON object")
    digest = manifest.pop("manifest_sha256", None)  # older versions wrote none
    if digest is not None and digest != _digest(manifest):
        raise DamagedCheckpoint(f"{place}/{MANIFEST} does not match its checksum")
    if missing := [name for name in REQUIRED if name not in manifest]:
        raise DamagedCheckpoint(f"{place}/{MANIFEST} has no {missing[0]}")
    return manifest


def _write_manifest(folder: Path, content: dict[str, Any]) -> None:
    (folder / MANIFEST).write_bytes(signed_manifest(content))


def signed_manifest(content: dict[str, Any]) -> bytes:
    """Return a manifest as its file has it, with its own checksum."""
    return (json.dumps({**content, "manifest_sha256": _digest(content)}, indent=1) + "\n").encode()


def _digest(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _save(group: dict[str, Tensor], path: Path) -> None:
    try:
        save_file(group, path)
    except SafetensorError as error:  # safetensors reports a full disk with its own error
        raise OSError(str(error)) from None


def _sha256(path: Path) -> str:
    return checksum(path, "sha256").removeprefix("sha256:")
