"""The checkpoints of a run whose evaluations another process makes: those that await one, and the best of all."""

from __future__ import annotations

from collections.abc import Container, Iterable
from dataclasses import asdict
from typing import Any

from resnet_dist.runs.evaluations import AWAITS, Evaluated
from resnet_dist.runs.storage.protocol import Storage
from resnet_dist.train.beside import better
from resnet_dist.train.checkpoint.folder import (
    MANIFEST,
    list_checkpoints,
    parse_manifest,
    prune,
    signed_manifest,
    step_of,
)
from resnet_dist.train.state.train_state import Best


def awaiting(checkpoints: Storage, evaluated: Container[int]) -> list[int]:
    """Return the steps of the checkpoints that await an evaluation, in order. Damaged manifests name none."""
    return [
        step_of(name)
        for name in list_checkpoints(checkpoints)
        if step_of(name) not in evaluated and _scalars_of(checkpoints, name).get(AWAITS)
    ]


def record_results(
    checkpoints: Storage, results: Iterable[Evaluated], best_metric: str | None, *, keep: int
) -> None:
    """Put the best and the newest metrics into the newest checkpoint, and remove those that need not be kept.

    Only once no rank writes any more. Raises StorageError, and DamagedCheckpoint where the newest cannot be read.
    """
    names = list_checkpoints(checkpoints)
    if not names:
        return
    manifest = parse_manifest(checkpoints.read(f"{names[-1]}/{MANIFEST}") or b"", names[-1])
    scalars = dict(manifest["scalars"])
    best, metrics = Best(**scalars["best"]) if scalars.get("best") else None, dict(scalars["metrics"])
    for result in results:
        best = better(best, result, best_metric)
        metrics |= result.metrics
    changed = {**scalars, "best": asdict(best) if best else None, "metrics": metrics}
    if changed != scalars:
        checkpoints.write(f"{names[-1]}/{MANIFEST}", signed_manifest({**manifest, "scalars": changed}))
    prune(checkpoints, keep=keep, also={best.step} if best else ())


def _scalars_of(checkpoints: Storage, name: str) -> dict[str, Any]:
    try:
        manifest = parse_manifest(checkpoints.read(f"{name}/{MANIFEST}") or b"", name)
        found: dict[str, Any] = manifest["scalars"]
    except (ValueError, KeyError, TypeError):
        return {}
    return found
