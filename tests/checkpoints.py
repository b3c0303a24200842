"""Checkpoints of models with random weights, for tests that need a model and no training."""

from __future__ import annotations

from pathlib import Path

from resnet_dist.config import Recipe, load_recipe
from resnet_dist.model import build_model
from resnet_dist.runs.storage.open import open_storage
from resnet_dist.train.checkpoint.folder import MODEL_FILE, checkpoint_name, write_checkpoint
from tests.paths import ROOT

# Colored images of a size that photographs are cropped, and decoded at a smaller scale, for.
COLORED = (
    "model.name=resnet8",
    "data.channels=3",
    "data.mean=[0.485, 0.456, 0.406]",
    "data.std=[0.229, 0.224, 0.225]",
    "data.image_size=32",
    "data.eval_crop=0.875",
    "data.eval_flip=true",
    "data.eval_shift=1",
)
CLASSES = ("cat", "dog", 'Größe, 3 "m"', "newt", "owl", "pig")


def random_checkpoint(
    folder: Path, *overrides: str, classes: tuple[str, ...] = CLASSES, seed: int = 1
) -> tuple[Path, Recipe]:
    """Write a checkpoint of step 7 of the digits' recipe with overrides; return its folder and the recipe."""
    recipe = load_recipe(ROOT / "jobs/digits.py", overrides)
    model = build_model(
        **recipe.model.options(), in_channels=recipe.data.channels, num_classes=len(classes), seed=seed
    )
    manifest = {
        "scalars": {"step": 7, "best": None},
        "recipe": recipe.model_dump(mode="json"),
        "classes": list(classes),
    }
    folder.mkdir(parents=True, exist_ok=True)
    write_checkpoint(open_storage(folder), 7, {Path(MODEL_FILE).stem: model.state_dict()}, manifest)
    return folder / checkpoint_name(7), recipe
