"""The recipe: one frozen value that determines a run. Knows no torch.

part         the base class of every part of a recipe, and the sentences that explain a wrong field
lengths      lengths such as "10 epochs" or "5 percent", and their conversion to steps
data/        Data: the shards, the order of samples, the augmentations
model        Model: the network, its variants, its initial weights
train        Optim, Schedule and Train: optimizer, learning rate, loss, length and intervals
recipe       Recipe: all parts together, and a recipe with some fields changed
unread       fields that another field's value leaves unread, in a recipe that is accepted
overrides    KEY=VALUE of a command line, read as the type of its field
study        Study: several recipes that answer one question
description  a recipe's description as Markdown
recipe_file  run a Python file that defines one of both
profile      ProfiledSteps: the steps that a trace covers
workers      WorkerRange: the numbers of ranks that a run may use
"""

from resnet_dist.config.data.augmentation import Crop
from resnet_dist.config.data.combined import Data, check_world_size
from resnet_dist.config.data.reading import Cache
from resnet_dist.config.lengths import Length, steps_of
from resnet_dist.config.model import Model
from resnet_dist.config.profile import ProfiledSteps
from resnet_dist.config.recipe import Recipe, load_recipe
from resnet_dist.config.study import Result, Study, Trial, load_study
from resnet_dist.config.train import Optim, Schedule, Train, check_classes, scaled_lr
from resnet_dist.config.workers import DEFAULT_MAX_RESTARTS, DEFAULT_WORKERS, WorkerRange
from resnet_dist.errors import RecipeError, UserError

__all__ = [
    "DEFAULT_MAX_RESTARTS",
    "DEFAULT_WORKERS",
    "Cache",
    "Crop",
    "Data",
    "Length",
    "Model",
    "Optim",
    "ProfiledSteps",
    "Recipe",
    "RecipeError",
    "Result",
    "Schedule",
    "Study",
    "Train",
    "Trial",
    "UserError",
    "WorkerRange",
    "check_classes",
    "check_world_size",
    "load_recipe",
    "load_study",
    "scaled_lr",
    "steps_of",
]
