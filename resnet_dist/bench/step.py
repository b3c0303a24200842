"""`resnet-dist bench step`: our whole training loop against a bare one, in turn, in the same processes.

Ours is `train.loop.train` as it is, from its first step to its last, with its loader, log lines that reach
MLflow, a progress bar and checkpoints. It tells a Progress where it is; between two steps that stops the clock,
runs the bare loop (bare.py) for as many steps, and lets ours go on: both meet the same heat and the same
neighbours. With several ranks bare.py's DDP sends its buffers in every forward pass, as is DDP's default, and ours
does not: `--bare-buffers none` measures against a bare loop without. What idles beside them, the bar and the upload's polling, is 0.4 % of a core and runs beside both.
"""

from __future__ import annotations

import math
import statistics
import tempfile
import time
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch

from resnet_dist.bench.bare import BareLoop, Labelled
from resnet_dist.bench.follow import followed
from resnet_dist.bench.ranks import run_ranks
from resnet_dist.bench.synthetic import CLASSES, write_noise
from resnet_dist.config import Data, Model, Optim, Recipe, Schedule, Train
from resnet_dist.config.data import divisors
from resnet_dist.data.batches.loader import Loader
from resnet_dist.data.shards.index import read_index
from resnet_dist.errors import UserError
from resnet_dist.model import MODELS
from resnet_dist.runs.folder import SPOOL_FILE, STOP_FILE
from resnet_dist.tracking.spool import Follower, Spool
from resnet_dist.train.loop import train
from resnet_dist.train.plan import order_of
from resnet_dist.train.tracker import NullTracker, Tracker
from resnet_dist.train.watch.progress import NEXT_BATCH, Progress
from resnet_dist.world import World

EPOCH_STEPS = 16  # of the synthetic set, which is held in memory
LR = 0.01  # small enough for the same batches to give both loops the same losses for some steps


@dataclass(frozen=True)
class StepSpeed:
    """Images per second over all ranks, round by round, and what shows that both loops did the same work."""

    ours: tuple[float, ...]
    bare: tuple[float, ...]
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
    sync_buffers: bool = True,
) -> StepSpeed:
    """`rounds` rounds of `steps` steps of each loop, after one that is not counted. `sync_buffers`: see bare.py.

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
        pace = Pace.of(steps, gpu=gpu)
        recipe = make_recipe(data, model, pace, rounds).with_overrides(overrides)
        if recipe.model.name not in MODELS:
            raise UserError(f"--model {recipe.model.name}: use one of {', '.join(MODELS)}")
        count = EPOCH_STEPS * global_batch_size
        write_noise(Path(folder), image_size, train=count, evaluation=global_batch_size)
        speed: StepSpeed = run_ranks(
            _rank_main, ranks, recipe, Path(folder) / "run", pace, sync_buffers, gpu=gpu
        )[0]
    return speed


@dataclass(frozen=True)
class Pace:
    """When the loops take turns. A round is `steps` steps of each.

    Machines that others use, or that clock up and down, drift by more in seconds than what is to be measured: on
    CPUs a turn is one step. On a GPU it is a round: a turn ends by waiting for the device, as no step does. The
    first turn of a round is longer, so that the log line and the checkpoint before it are uploaded and written
    while our clock runs.
    """

    steps: int
    turn_steps: int

    @classmethod
    def of(cls, steps: int, *, gpu: bool) -> Pace:
        return cls(steps, steps if gpu else 1)

    @property
    def first(self) -> int:
        """Steps after a log line until a turn ends."""
        return min(5, self.steps - 1)

    def ends_turn(self, step: int) -> bool:
        place = step % self.steps
        return place >= self.first and (place - self.first) % self.turn_steps == 0

    def round_of(self, step: int) -> int:
        """Of the turn that ends after `step` steps. Rounds end `first` steps after a log line, too; 0 warms up."""
        return max(0, -(-(step - self.first) // self.steps) - 1)

    def total(self, rounds: int) -> int:
        """Steps until the last turn has ended, and one that tells of it."""
        return (1 + rounds) * self.steps + self.first + 1


def make_recipe(data: Data, model: str, pace: Pace, rounds: int) -> Recipe:
    """Both loops' settings. Ours logs and writes a checkpoint in every round: more often than most recipes."""
    return Recipe(
        name="bench-step",
        data=data,
        model=Model(name=model),
        optim=Optim(lr=LR),
        schedule=Schedule(decay="constant"),
        train=Train(
            length=f"{pace.total(rounds)} steps",
            log_every=f"{pace.steps} steps",
            checkpoint_every=f"{pace.steps} steps",
            eval_every="0 steps",  # once, at the end
        ),
    )


def _rank_main(world: World, recipe: Recipe, folder: Path, pace: Pace, sync_buffers: bool) -> StepSpeed:
    spool = folder / SPOOL_FILE
    other = BareLoop(recipe, CLASSES, world.device, sync_buffers=sync_buffers)
    turns = Turns(world, other, first_batches(recipe, world, pace.steps), pace)
    with ExitStack() as stack:
        tracker: Tracker = NullTracker()
        if world.is_main:
            tracker = stack.enter_context(Spool(spool))
            stack.enter_context(followed(recipe, folder, spool))
        train(recipe, folder, world, tracker, (folder / STOP_FILE).exists, turns)
    ours, bare = zip(*turns.rounds(), strict=True)
    images = pace.steps * recipe.data.global_batch_size
    losses = world.gather(turns.losses[: pace.steps])  # a rank knows those of its own samples
    return StepSpeed(
        tuple(images / seconds for seconds in ours),
        tuple(images / seconds for seconds in bare),
        _loss_at(spool, pace.steps) if world.is_main else math.nan,
        statistics.mean(loss for of_rank in losses for loss in of_rank),
    )


def _loss_at(spool: Path, step: int) -> float:
    """What the log line of `step` says: the mean since the one before."""
    return next(e.metrics["train/loss"] for e in Follower(spool).read() if e.step == step)


def first_batches(recipe: Recipe, world: World, steps: int) -> list[Labelled]:
    """What the loop meets at its first steps: uint8 images and labels, on the rank's device."""
    index = read_index(recipe.data.train)
    order = order_of(recipe, index)
    with Loader(index, order, recipe.data, world, seed=recipe.seed) as loader:
        batches = [loader.batch_at(step) for step in range(steps)]
    return [(batch.images_BSSC, batch.labels_B) for batch in batches]


@dataclass(frozen=True)
class Turn:
    """Some steps of ours, and as many of the bare loop."""

    end: int  # steps done, of each
    our_seconds: float
    bare_seconds: float


class Turns(Progress):
    """Told by our loop where it is, it stops the clock there and hands the machine to the bare loop for a while."""

    def __init__(self, world: World, bare: BareLoop, batches: Sequence[Labelled], pace: Pace) -> None:
        super().__init__()
        self._world, self._bare, self._batches, self._pace = world, bare, batches, pace
        self.turns: list[Turn] = []
        self.losses: list[float] = []  # the bare loop's, step by step
        self._start = 0.0

    def at(self, phase: str, step: int | None = None) -> None:
        super().at(phase, step)
        if phase != NEXT_BATCH:
            return
        if step == 0:
            self._start_clock()
        elif self._pace.ends_turn(self.step):
            self._take_turn()

    def _take_turn(self) -> None:
        if self._world.device.type == "cuda":
            torch.cuda.synchronize()
        ours = time.perf_counter() - self._start
        done = self.turns[-1].end if self.turns else 0
        self._world.barrier()
        seconds, losses = self._bare.run(
            [self._batches[number % len(self._batches)] for number in range(done, self.step)]
        )
        self.losses += losses
        self.turns.append(Turn(self.step, ours, seconds))
        self._start_clock()

    def _start_clock(self) -> None:
        self._world.barrier()
        self._start = time.perf_counter()

    def rounds(self) -> list[tuple[float, float]]:
        """Seconds of ours and of the bare loop in each round, the first left out: it warms up."""
        by_round: dict[int, list[Turn]] = {}
        for turn in self.turns:
            by_round.setdefault(self._pace.round_of(turn.end), []).append(turn)
        return [
            (sum(turn.our_seconds for turn in turns), sum(turn.bare_seconds for turn in turns))
            for number, turns in by_round.items()
            if number >= 1
        ]
