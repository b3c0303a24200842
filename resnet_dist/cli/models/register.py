"""The model that --register of several commands names."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from resnet_dist.tracking.mlflow.registry import Candidate
    from resnet_dist.tracking.registration import Registration


def candidate_of(
    model: str, output: str, registration: Registration | None, step: int | None = None
) -> Candidate | None:
    """Return the model that --register names, once the command has done its work; None without it.

    step: of the model that the command works with. Raises UserError where MLflow does not have that model.
    """
    if registration is None:
        return None
    from resnet_dist.runs.storage.open import resolved
    from resnet_dist.tracking.locate import run_id_of
    from resnet_dist.tracking.mlflow.registry import Candidate
    from resnet_dist.tracking.open import check_tracker
    from resnet_dist.tracking.store import store_folder

    place = resolved(output)
    check_tracker(store_folder(place), "")
    # Another output may have a run of the same name in the same tracker.
    candidate = Candidate.find(run_id_of(model, place) or model, store_folder(place), registration)
    if step is not None:
        candidate.check_step(step)
    return candidate
