"""Distributed training of residual networks: Ray Train, DDP, WebDataset and MLflow.

    from resnet_dist import Recipe, Data, Model, Optim, Schedule, Train, Study, Trial

Start reading at train/loop.py (distributed training on one screen) or model/blocks.py (what a skip
connection is). Imports point down only: cli → driver, submit → launch, tracking, evaluate → train → data,
model → config, world.
"""

from resnet_dist.config import Data, Model, Optim, Recipe, Result, Schedule, Study, Train, Trial, scaled_lr
from resnet_dist.errors import RecipeError

__all__ = [
    "Data",
    "Model",
    "Optim",
    "Recipe",
    "RecipeError",
    "Result",
    "Schedule",
    "Study",
    "Train",
    "Trial",
    "scaled_lr",
]
__version__ = "0.3.0"
