"""The folder as a package of its own: a logged model carries a copy of it, named resnet_dist_model."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import resnet_dist.model

PROGRAM = """
import sys
sys.modules["resnet_dist"] = None  # an import of it now raises ImportError
import torch
from resnet_dist_model import build_model
for name in ("resnet8", "preresnet20", "resnet9_fast"):
    print(tuple(build_model(name, in_channels=1, num_classes=3, seed=0)(torch.zeros(2, 1, 9, 9)).shape))
"""


def test_a_copy_of_the_folder_builds_models_without_the_package(tmp_path: Path) -> None:
    source = Path(resnet_dist.model.__file__).parent
    shutil.copytree(source, tmp_path / "resnet_dist_model", ignore=shutil.ignore_patterns("__pycache__"))
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["(2, 3)"] * 3
