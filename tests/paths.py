"""The files of the repository that tests use and that lie outside the package."""

import os
from pathlib import Path

ROOT = Path(__file__).parent.parent
JOBS = ROOT / "jobs"

# How many times more random folders and tars than usual the property tests make: a long run by hand sets it.
FUZZ_FACTOR = int(os.environ.get("RESNET_DIST_FUZZ_FACTOR", "1"))


def list_checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints in a folder, oldest first."""
    return sorted(folder.glob("step-*"))
