"""The folder of a checkpoint: written aside, flushed, renamed; verified when read; the newest good one wins.

`step-00000120/` holds safetensors files, and a `checkpoint.json` with their SHA-256, its own SHA-256, the scalars and
the recipe. It holds no pickles, and its model.safetensors is the model's state dict.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from resnet_dist.runs.folder import CHECKPOINTS_FOLDER
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
    """The verified contents of a checkpoint folder."""

    folder: Path
    tensors: Tensors
    manifest: dict[str, Any]


def folder_of(checkpoints: Path, step: int) -> Path:
    return checkpoints / f"step-{step:08d}"


def step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


def write_checkpoint(folder: Path, tensors: Tensors, manifest: dict[str, Any]) -> None:
    """Write all files aside, flush them, and rename: `folder` is complete or absent.

    Raises OSError where it cannot be written, and leaves nothing behind.
    """
    partial = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}.partial")
    try:
        # Not the run folder: it was removed where it is missing, and a new one would hold nothing else of the run.
        partial.parent.mkdir(exist_ok=True)
        partial.mkdir()
        checksums = {}
        for name, group in tensors.items():
            path = partial / f"{name}.safetensors"
            _save(group, path)
            checksums[path.name] = _sha256(path)
        content = {"sha256": checksums, **manifest}
        signed = {**content, "manifest_sha256": _digest(content)}
        (partial / MANIFEST).write_text(json.dumps(signed, indent=1) + "\n")
        for path in [*partial.iterdir(), partial]:
            _flush(path)
        _replace(folder, partial)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    _flush(folder.parent)


def read_checkpoint(folder: Path, only: tuple[str, ...] | None = None) -> tuple[Tensors, dict[str, Any]]:
    """Return the tensors, by file and name, and the manifest, both verified. Raises DamagedCheckpoint.

    `only` names the files to read; None reads all. A model is loaded without the optimizer.
    """
    try:
        manifest = _read_manifest(folder)
        tensors = {}
        for name, expected in manifest["sha256"].items():
            path = folder / name
            if only is not None and path.stem not in only:
                continue
            if _sha256(path) != expected:
                raise DamagedCheckpoint(f"{path} does not match its checksum")
            tensors[path.stem] = load_file(path)
        if missing := [name for name in only or REQUIRED_FILES if name not in tensors]:
            raise DamagedCheckpoint(f"{folder / MANIFEST} names no {missing[0]}.safetensors")
        return tensors, manifest
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        if isinstance(error, DamagedCheckpoint):
            raise
        raise DamagedCheckpoint(f"{folder}: {type(error).__name__}: {error}") from None


def read_newest(location: Path, only: tuple[str, ...]) -> VerifiedCheckpoint:
    """Return some files of a checkpoint folder, or of the newest good checkpoint of a run folder.

    Raises DamagedCheckpoint where there is none.
    """
    candidates = [location] if (location / MANIFEST).exists() else []
    candidates += reversed(list_checkpoints(location / CHECKPOINTS_FOLDER))
    problem = DamagedCheckpoint(f"a checkpoint folder holds {MANIFEST}, a run folder holds checkpoints/")
    for folder in candidates:
        try:
            return VerifiedCheckpoint(folder, *read_checkpoint(folder, only))
        except DamagedCheckpoint as error:
            problem = error
    raise problem


def list_checkpoints(folder: Path) -> list[Path]:
    """Return the finished checkpoint folders, oldest first."""
    return sorted(folder.glob("step-*"))


def newest_good(folder: Path, report: Callable[[str], None]) -> VerifiedCheckpoint | None:
    """Return the newest checkpoint that matches its manifest; report and skip damaged ones."""
    for candidate in reversed(list_checkpoints(folder)):
        try:
            return VerifiedCheckpoint(candidate, *read_checkpoint(candidate))
        except DamagedCheckpoint as problem:
            report(f"skipped a damaged checkpoint: {problem}")
    return None


def best_checkpoint(folder: Path) -> Path | None:
    """Return the checkpoint with the best value of `train.best_metric`, as the newest good manifest records it."""
    for candidate in reversed(list_checkpoints(folder)):
        try:
            best = _read_manifest(candidate)["scalars"]["best"]
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue  # damaged: an older manifest records it too
        path = None if best is None else folder_of(folder, best["step"])
        return path if path is not None and path.exists() else None
    return None


def prune(folder: Path, *, keep: int, also: int | None) -> None:
    """Remove all but the newest `keep` checkpoints and the one of step `also`."""
    kept = set(list_checkpoints(folder)[-keep:])
    if also is not None:
        kept.add(folder_of(folder, also))
    remove(old for old in list_checkpoints(folder) if old not in kept)


def remove(folders: Iterable[Path]) -> None:
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)


def remove_unfinished(folder: Path) -> None:
    """Remove what killed writers left half-written, and bring back a checkpoint that was about to be replaced."""
    for replaced in folder.glob(".step-*.old.partial"):
        target = folder / replaced.name.split(".")[1]
        if not target.exists():
            replaced.rename(target)
    remove(folder.glob(".step-*.partial"))


def _replace(folder: Path, partial: Path) -> None:
    """Rename `partial` to `folder`, which may exist: damaged, or with the same bytes from before a restart."""
    replaced = folder.with_name(f"{partial.name.removesuffix('.partial')}.old.partial")
    if folder.exists():
        folder.rename(replaced)
    partial.rename(folder)
    shutil.rmtree(replaced, ignore_errors=True)


def _read_manifest(folder: Path) -> dict[str, Any]:
    """Return the manifest. Raises DamagedCheckpoint, or what reading and parsing raise."""
    manifest: dict[str, Any] = json.loads((folder / MANIFEST).read_bytes())
    digest = manifest.pop("manifest_sha256", None)  # older versions wrote none
    if digest is not None and digest != _digest(manifest):
        raise DamagedCheckpoint(f"{folder / MANIFEST} does not match its checksum")
    if missing := [name for name in REQUIRED if name not in manifest]:
        raise DamagedCheckpoint(f"{folder / MANIFEST} has no {missing[0]}")
    return manifest


def _digest(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _save(group: dict[str, Tensor], path: Path) -> None:
    try:
        save_file(group, path)
    except SafetensorError as error:  # safetensors reports a full disk with its own error
        raise OSError(str(error)) from None


def _sha256(path: Path) -> str:
    return checksum(path, "sha256").removeprefix("sha256:")


def _flush(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
