"""The recipe: one frozen value that says everything about a run. Knows no torch."""

from resnet_dist.config.data import Data, check_world_size
from resnet_dist.config.lengths import Length, steps_of
from resnet_dist.config.model import Model
from resnet_dist.config.recipe import Recipe, load_recipe
from resnet_dist.config.study import Result, Study, Trial, load_study
from resnet_dist.config.train import Optim, Schedule, Train, check_classes, scaled_lr
from resnet_dist.errors import RecipeError, UserError

__all__ = [
    "Data",
    "Length",
    "Model",
    "Optim",
    "Recipe",
    "RecipeError",
    "Result",
    "Schedule",
    "Study",
    "Train",
    "Trial",
    "UserError",
    "check_classes",
    "check_world_size",
    "load_recipe",
    "load_study",
    "scaled_lr",
    "steps_of",
]
