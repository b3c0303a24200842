"""The checkpoints of a run whose evaluations another process makes: those that await one, and the best of all."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from dataclasses import asdict
from typing import Any

from resnet_dist.runs.evaluation_results import AWAITS, Evaluated
from resnet_dist.runs.storage.protocol import Storage
from resnet_dist.train.checkpoint.folder import (
    MANIFEST,
    list_checkpoints,
    parse_manifest,
    prune,
    signed_manifest,
    step_of,
)
from resnet_dist.train.checkpoint.follow_results import better
from resnet_dist.train.state.train_state import Best


def awaiting(checkpoints: Storage, evaluated: Container[int]) -> list[int]:
    """Return the steps of the checkpoints that await an evaluation, in order. Damaged manifests name none."""
    return [
        step_of(name)
        for name in list_checkpoints(checkpoints)
        if step_of(name) not in evaluated and _scalars_of(checkpoints, name).get(AWAITS)
    ]


def record_results(
    checkpoints: Storage,
    results: Iterable[Evaluated],
    newest: Mapping[str, float],
    best_metric: str | None,
    *,
    keep: int,
) -> list[str]:
    """Put the best of all and the newest metrics into the newest good manifest, and remove what need not be kept.

    Return the names of the checkpoints that were removed. Only once no rank writes any more. Raises StorageError.
    """
    for name in reversed(list_checkpoints(checkpoints)):
        try:
            manifest = parse_manifest(checkpoints.read(f"{name}/{MANIFEST}") or b"", name)
            scalars = dict(manifest["scalars"])
            best = Best(**scalars["best"]) if scalars.get("best") else None
            metrics = {**scalars["metrics"], **newest}
        except (ValueError, KeyError, TypeError):
            continue  # damaged: the ranks resume from an older one
        for result in results:
            best = better(best, result, best_metric)
        changed = {**scalars, "best": asdict(best) if best else None, "metrics": metrics}
        if changed != scalars:
            checkpoints.write(f"{name}/{MANIFEST}", signed_manifest({**manifest, "scalars": changed}))
        return prune(checkpoints, keep=keep, also={best.step} if best else ())
    return []


def _scalars_of(checkpoints: Storage, name: str) -> dict[str, Any]:
    try:
        manifest = parse_manifest(checkpoints.read(f"{name}/{MANIFEST}") or b"", name)
        found: dict[str, Any] = manifest["scalars"]
    except (ValueError, KeyError, TypeError):
        return {}
    return found
