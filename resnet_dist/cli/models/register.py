"""The model that --register of several commands names."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from resnet_dist.tracking.mlflow.registry import Candidate
    from resnet_dist.tracking.registration import Registration


def candidate_of(model: str, output: str, registration: Registration | None) -> Candidate | None:
    """Return the model that --register names, once the command has done its work; None without it.

    Raises UserError where MLflow does not have the model.
    """
    if registration is None:
        return None
    from resnet_dist.tracking.mlflow.registry import Candidate
    from resnet_dist.tracking.open import check_tracker
    from resnet_dist.tracking.store import store_folder

    store = store_folder(output)
    check_tracker(store, "")
    return Candidate.find(model, store, registration)
