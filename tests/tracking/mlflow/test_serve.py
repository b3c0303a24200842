"""The model that MLflow serves is the one that was evaluated."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import resnet_dist.model
from resnet_dist.config import Recipe
from resnet_dist.data.images.augment import normalize
from resnet_dist.train.checkpoint.load import load_model
from resnet_dist.train.evaluate import logits_of
from resnet_dist.train.loop import train
from resnet_dist.train.tracker import NullTracker
from resnet_dist.world import World


# MLflow warns about the type hints of agents in its own code.
@pytest.mark.filterwarnings("ignore:.*Any type hint")
@pytest.mark.parametrize("eval_flip", [False, True])
def test_served_probabilities_are_the_evaluations(
    eval_flip: bool, digits_recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = digits_recipe.with_overrides(
        [f"data.eval_flip={str(eval_flip).lower()}", "train.length=2 steps"]
    )
    train(recipe, tmp_path, World.single(), NullTracker())
    trained = load_model(tmp_path, torch.device("cpu"))
    images_NHWC = np.random.default_rng(0).integers(0, 256, (5, 8, 8, 1), np.uint8)
    with torch.inference_mode():
        images = normalize(torch.from_numpy(images_NHWC), trained.recipe.data)
        expected = logits_of(trained.model, images, trained.recipe.data).softmax(dim=1)

    from resnet_dist.tracking.mlflow.serve import ImageClassifier

    # A logged model has a copy of resnet_dist.model beside it under this name.
    monkeypatch.setitem(sys.modules, "resnet_dist_model", resnet_dist.model)
    served = ImageClassifier()
    served.load_context(SimpleNamespace(artifacts={"checkpoint": trained.location}))
    got = served.predict(None, images_NHWC)
    assert got.shape == (5, 10)
    np.testing.assert_allclose(got, expected.numpy(), rtol=1e-4, atol=1e-6)
