"""The files of the repository that tests use and that lie outside the package."""

from pathlib import Path

ROOT = Path(__file__).parent.parent
JOBS = ROOT / "jobs"
