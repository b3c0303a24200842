"""Distributed training of residual networks: Ray Train, DDP, WebDataset and MLflow.

    from resnet_dist import Recipe, Data, Model, Optim, Schedule, Train, Study, Trial

Start reading at train/loop.py for distributed training, at model/blocks.py for residual networks.

Every folder is a room; the docstring of its __init__.py is the map of its modules. From the top down (a module
imports from rooms further down and from its own, never from a room above):

cli          the commands: each parses its arguments, calls one function and prints the result
bench        measure the package: its loader, its training loop, the start of a run
study        train several runs that answer one question; draw their figure
sweep        trials of one recipe with other values of some fields, and the best of them
experiments  the runs of a tracker as tables, curves and JSON
evaluation   a trained model measured by the code of training, on any number of processes
export       a model as a file for other programs, compared with the original
explain      pictures of where a trained model sees the evidence for a class
serve        a trained model's answers over HTTP
predict      the classes of images that lie anywhere
driver       turn a request to train into a finished run; close it on every way out
terminal     show progress as a bar or as plain lines
launch       start the ranks: in this process, on Ray, or under torchrun
tracking     bring metrics from rank 0 to a person and to MLflow
figures      what a run has learned, as a PNG and as JSON
train        the loop of one rank, with its step, evaluation, checkpoints and watchdog
runs         the folder of a run; whether a run may be resumed
data         shards in, batches out
model        residual networks from scratch
order        the samples and the image size of every step: pure functions of seed, epoch and step
config       the recipe: one frozen, validated value that describes a run
system       signals, files, memory and CPUs of this machine
world        the rank of this process, and the collectives that the loop needs
errors       the errors that a person sees as one sentence, with their exit codes
search_path  where Python finds modules: no file of the working folder may hide a library
signal_at_start  an interruption while a command imports
"""

# First: it keeps files of the working folder from hiding libraries.
import resnet_dist.search_path
import resnet_dist.signal_at_start  # noqa: F401
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
