"""`resnet-dist bench step`: our whole training loop against a bare one, in turn, in the same processes.

Ours is `train.loop.train` as it is, from its first step to its last, with its loader, log lines that reach
MLflow, a progress bar and checkpoints. Where a round ends with a log line, the Tracker stops the clock, runs a
round of the bare loop (bare.py), and lets ours go on: both meet the same heat and the same neighbours.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from resnet_dist.bench.bare import BareLoop
from resnet_dist.bench.follow import Pause, followed
from resnet_dist.bench.ranks import run_ranks
from resnet_dist.bench.synthetic import CLASSES, write_noise
from resnet_dist.config import Data, Model, Optim, Recipe, Schedule, Train, UserError
from resnet_dist.config.data import divisors
from resnet_dist.data.index import read_index
from resnet_dist.data.loader import Loader
from resnet_dist.model import MODELS
from resnet_dist.runs import SPOOL_FILE, STOP_FILE
from resnet_dist.tracking.spool import Spool
from resnet_dist.train.loop import NullTracker, Tracker, train
from resnet_dist.train.plan import plan_of
from resnet_dist.world import World

EPOCH_STEPS = 16  # of the synthetic set, which is held in memory
LR = 0.01  # small enough for the same batches to give both loops the same losses for some steps


@dataclass(frozen=True)
class StepSpeed:
    """Images per second over all ranks, round by round, and what shows that both loops did the same work."""

    ours: tuple[float, ...]
    bare: tuple[float, ...]
    cpu_ratios: tuple[
        float, ...
    ]  # processor time of the bare loop over ours: a busy machine disturbs it less
    our_loss: float  # mean over the first round's steps
    bare_loss: float

    @property
    def ratios(self) -> list[float]:
        """Ours over the bare loop's, of every round: what slows a round slows its neighbour too."""
        return [ours / bare for ours, bare in zip(self.ours, self.bare, strict=True)]

    @property
    def ratio(self) -> float:
        return statistics.median(self.ratios)

    @property
    def cpu_ratio(self) -> float:
        return statistics.median(self.cpu_ratios)

    @property
    def same_work(self) -> bool:
        return abs(self.our_loss / self.bare_loss - 1) < 1e-3


def bench_step(
    *,
    model: str,
    image_size: int,
    global_batch_size: int,
    ranks: int,
    steps: int,
    rounds: int,
    gpu: bool,
    overrides: Iterable[str] = (),
) -> StepSpeed:
    """`rounds` rounds of `steps` steps of each loop, after one of each that is not counted.

    Raises UserError where the ranks cannot share a batch, or have no GPU each.
    """
    if global_batch_size % ranks:
        raise UserError(
            f"--ranks {ranks} cannot share --global-batch-size {global_batch_size} evenly; use one of "
            f"{divisors(global_batch_size)}"
        )
    if gpu and torch.cuda.device_count() < ranks:
        raise UserError(
            f"--ranks {ranks}: torch sees {torch.cuda.device_count()} CUDA device(s) here; use --cpu"
        )
    with tempfile.TemporaryDirectory() as folder:
        data = Data(
            train=f"{folder}/train",
            eval=f"{folder}/eval",
            image_size=image_size,
            global_batch_size=global_batch_size,
            lanes=ranks,
            cache="device" if gpu else "ram",
        )
        recipe = make_recipe(data, model, steps=steps, rounds=rounds).with_overrides(overrides)
        if recipe.model.name not in MODELS:
            raise UserError(f"--model {recipe.model.name}: use one of {', '.join(MODELS)}")
        count = EPOCH_STEPS * global_batch_size
        write_noise(Path(folder), image_size, train=count, evaluation=global_batch_size)
        speed: StepSpeed = run_ranks(_rank_main, ranks, recipe, Path(folder) / "run", steps, gpu=gpu)[0]
    return speed


def make_recipe(data: Data, model: str, *, steps: int, rounds: int) -> Recipe:
    """Both loops' settings. Ours logs and writes a checkpoint in every round: more often than most recipes."""
    return Recipe(
        name="bench-step",
        data=data,
        model=Model(name=model),
        optim=Optim(lr=LR),
        schedule=Schedule(decay="constant"),
        train=Train(
            length=f"{(1 + rounds) * steps} steps",
            log_every=f"{steps} steps",
            checkpoint_every=f"{steps} steps",
            eval_every="0 steps",  # once, after the last round
        ),
    )


def _rank_main(world: World, recipe: Recipe, folder: Path, steps: int) -> StepSpeed:
    batches = first_batches(recipe, world, steps)
    bare = BareLoop(recipe, CLASSES, world.device)
    with ExitStack() as stack:
        tracker: Tracker = NullTracker()
        pause: Pause = nullcontext
        total_steps = plan_of(recipe, read_index(recipe.data.train))[1].total
        if world.is_main:
            tracker = stack.enter_context(Spool(folder / SPOOL_FILE))
            pause = stack.enter_context(followed(recipe, folder, folder / SPOOL_FILE, total_steps))
        turns = Turns(tracker, world, lambda: bare.run(batches), pause)
        train(recipe, folder, world, turns, stop_requested=(folder / STOP_FILE).exists)
    images = steps * recipe.data.global_batch_size
    return turns.result(images)


def first_batches(recipe: Recipe, world: World, steps: int) -> list[tuple[Tensor, Tensor]]:
    """What the loop meets at its first steps: uint8 images and labels, on the rank's device."""
    index = read_index(recipe.data.train)
    order, _ = plan_of(recipe, index)
    with Loader(index, order, recipe.data, world, seed=recipe.seed) as loader:
        batches = [loader.batch_at(step) for step in range(steps)]
    return [(batch.images_BSSC, batch.labels_B) for batch in batches]


class Turns:
    """A Tracker that hands the machine to the bare loop where a round of ours ends.

    The log line, the checkpoint and the upload that are due there come after the bare round: ours pays for them.
    """

    def __init__(
        self, inner: Tracker, world: World, bare: Callable[[], tuple[float, float]], pause: Pause
    ) -> None:
        self._inner, self._world, self._bare, self._pause = inner, world, bare, pause
        self._seconds: list[tuple[float, float]] = []  # of a round: ours, and the bare loop's
        self._cpu_seconds: list[tuple[float, float]] = []  # of this rank, all threads
        self._losses: list[tuple[float, float]] = []  # means over a round
        self._start, self._cpu_start = time.perf_counter(), time.process_time()

    def log(self, metrics: dict[str, float], step: int) -> None:
        if "train/loss" in metrics:  # a round is what lies between two log lines
            self._take_turns(metrics["train/loss"])
        self._inner.log(metrics, step)

    def log_layers(self, name: str, values: dict[str, float], step: int) -> None:
        self._inner.log_layers(name, values, step)

    def note(self, text: str) -> None:
        self._inner.note(text)

    def _take_turns(self, our_loss: float) -> None:
        ours = time.perf_counter() - self._start  # a log line has waited for the device
        our_cpu = time.process_time() - self._cpu_start
        with self._pause():
            self._world.barrier()
            cpu_start = time.process_time()
            bare, bare_loss = self._bare()
            bare_cpu = time.process_time() - cpu_start
        self._losses.append((our_loss, bare_loss))
        self._seconds.append((ours, bare))
        self._cpu_seconds.append((our_cpu, bare_cpu))
        self._world.barrier()
        self._start, self._cpu_start = time.perf_counter(), time.process_time()

    def result(self, images: int) -> StepSpeed:
        """`images` of a round, over all ranks. A collective."""
        ours, bare = zip(*self._seconds[1:], strict=True)  # the first round warms up
        our_loss, bare_loss = self._losses[0]  # of the same batches, from the same weights
        bare_loss = statistics.mean(self._world.gather(bare_loss))  # a rank knows its own only
        # round, (ours, bare), summed over the ranks
        cpu_seconds = torch.tensor(self._world.gather(self._cpu_seconds[1:])).sum(dim=0)
        return StepSpeed(
            tuple(images / seconds for seconds in ours),
            tuple(images / seconds for seconds in bare),
            tuple((cpu_seconds[:, 1] / cpu_seconds[:, 0]).tolist()),
            our_loss,
            bare_loss,
        )
