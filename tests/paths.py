"""Where tests find the files of the repository that lie outside the package."""

from pathlib import Path

ROOT = Path(__file__).parent.parent
JOBS = ROOT / "jobs"
