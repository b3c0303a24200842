"""The environment variables of Ray Tune that we set. Knows no Ray, which reads them when it is imported."""

from __future__ import annotations

import os

from resnet_dist.launch.on_ray import settings

DEFAULTS = {
    # Nothing of the sweep is read from Tune's files, so it need not write any but its own state.
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    # A trial may end before its first evaluation.
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
    # The newer output prints its configuration also where it is asked to be silent.
    "RAY_AIR_NEW_OUTPUT": "0",
}


def set_defaults() -> None:
    """Set the variables of Ray and of Tune that the user has not set. Call it before Ray is imported."""
    settings.set_defaults()
    for name, value in DEFAULTS.items():
        os.environ.setdefault(name, value)
    os.environ["RAY_CHDIR_TO_TRIAL_DIR"] = "0"
