"""`resnet-dist bench step`: our whole training loop against a bare one, in turn, in the same processes.

Ours is `train.loop.train`, unchanged, from its first step to its last, with its loader, log lines that reach MLflow, a
progress bar and checkpoints. It reports its phases to a Progress. Here that is `Turns`, which stops the clock between
two steps, runs the bare loop (bare.py) for as many steps, and lets ours continue: both meet the same temperature and
the same load by other programs.

With several ranks, the DDP of the bare loop sends its buffers in every forward pass, which is DDP's default, and ours
does not; `--bare-buffers none` compares with a bare loop that does not either. The progress bar and the polling of the
upload take 0.4 % of a core, and run beside both loops.
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
from resnet_dist.config.data.batch import divisors
from resnet_dist.data.batches.loader import Loader
from resnet_dist.data.shards.index import read_index
from resnet_dist.errors import UserError
from resnet_dist.model import MODELS
from resnet_dist.runs.folder import SPOOL_FILE, STOP_FILE
from resnet_dist.runs.storage.open import open_storage
from resnet_dist.runs.storage.protocol import Log
from resnet_dist.tracking.spool import Follower, Spool
from resnet_dist.train.loop import train
from resnet_dist.train.plan import order_of
from resnet_dist.train.tracker import NullTracker, Tracker
from resnet_dist.train.watch.progress import NEXT_BATCH, Progress
from resnet_dist.world import World

EPOCH_STEPS = 16  # steps of an epoch of the synthetic set, which is cached
LR = 0.01  # small enough that rounding does not move the losses of the two loops apart in the first steps


@dataclass(frozen=True)
class StepSpeed:
    """Images per second over all ranks in each round, and the losses, which show that both loops did the same work."""

    ours: tuple[float, ...]
    bare: tuple[float, ...]
    our_loss: float  # mean over the steps of the first round
    bare_loss: float  # the same, over the same batches

    @property
    def ratios(self) -> list[float]:
        """Our speed over the bare loop's in each round: other programs slow down both."""
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
    """Measure `rounds` rounds of `steps` steps of each loop, after a round that is not counted.

    overrides: KEY=VALUE, for the recipe of both loops. sync_buffers: of the bare loop, see bare.py.
    Raises UserError where the ranks cannot share a batch evenly, or there are fewer GPUs than ranks.
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
    """The plan by which the loops take turns. A round is `steps` steps of each.

    On CPUs a turn is one step, because machines that are shared, or that change their clock, drift within seconds by
    more than the difference to be measured. On a GPU a turn is a round, because a turn ends by waiting for the device,
    which no step does otherwise. The first turn of a round is longer, so that our clock runs while the log line and the
    checkpoint before it are uploaded and written.
    """

    steps: int
    turn_steps: int

    @classmethod
    def of(cls, steps: int, *, gpu: bool) -> Pace:
        return cls(steps, steps if gpu else 1)

    @property
    def first(self) -> int:
        """The number of steps from a log line to the end of the next turn."""
        return min(5, self.steps - 1)

    def ends_turn(self, step: int) -> bool:
        place = step % self.steps
        return place >= self.first and (place - self.first) % self.turn_steps == 0

    def round_of(self, step: int) -> int:
        """Return the round of the turn that ends after `step` steps; round 0 warms up.

        Rounds, too, end `first` steps after a log line.
        """
        return max(0, -(-(step - self.first) // self.steps) - 1)

    def total(self, rounds: int) -> int:
        """Return the number of steps to the end of the last turn, and one more: its start reports the end."""
        return (1 + rounds) * self.steps + self.first + 1


def make_recipe(data: Data, model: str, pace: Pace, rounds: int) -> Recipe:
    """Return the settings of both loops. Ours logs and saves in every round, more often than most recipes do."""
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
            eval_every="0 steps",  # Evaluate once, at the end.
        ),
    )


def _rank_main(world: World, recipe: Recipe, folder: Path, pace: Pace, sync_buffers: bool) -> StepSpeed:
    spool = open_storage(folder).log(SPOOL_FILE)
    bare_loop = BareLoop(recipe, CLASSES, world.device, sync_buffers=sync_buffers)
    turns = Turns(world, bare_loop, first_batches(recipe, world, pace.steps), pace)
    with ExitStack() as stack:
        tracker: Tracker = NullTracker()
        if world.is_main:
            tracker = stack.enter_context(Spool(spool))
            stack.enter_context(followed(recipe, folder))
        train(recipe, folder, world, tracker, (folder / STOP_FILE).exists, turns)
    ours, bare = zip(*turns.rounds(), strict=True)
    images = pace.steps * recipe.data.global_batch_size
    losses = world.gather(turns.losses[: pace.steps])  # Each rank has the losses of its own samples.
    return StepSpeed(
        tuple(images / seconds for seconds in ours),
        tuple(images / seconds for seconds in bare),
        _loss_at(spool, pace.steps) if world.is_main else math.nan,
        statistics.mean(loss for rank_losses in losses for loss in rank_losses),
    )


def _loss_at(spool: Log, step: int) -> float:
    """Return the loss in the log line of `step`: the mean since the previous line."""
    return next(e.metrics["train/loss"] for e in Follower(spool).read() if e.step == step)


def first_batches(recipe: Recipe, world: World, steps: int) -> list[Labelled]:
    """Return the batches of the first `steps` steps: uint8 images and labels, on the rank's device."""
    index = read_index(recipe.data.train)
    order = order_of(recipe, index)
    with Loader(index, order, recipe.data, world, seed=recipe.seed) as loader:
        batches = [loader.batch_at(step) for step in range(steps)]
    return [(batch.images_BSSC, batch.labels_B) for batch in batches]


@dataclass(frozen=True)
class Turn:
    """Some steps of our loop, and as many of the bare loop."""

    end: int  # steps that each loop has done at the end of this turn
    our_seconds: float
    bare_seconds: float


class Turns(Progress):
    """A Progress that stops the clock of our loop at the end of a turn, and runs the bare loop meanwhile."""

    def __init__(self, world: World, bare: BareLoop, batches: Sequence[Labelled], pace: Pace) -> None:
        super().__init__()
        self._world, self._bare, self._batches, self._pace = world, bare, batches, pace
        self.turns: list[Turn] = []
        self.losses: list[float] = []  # the losses of the bare loop, step by step
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
        """Return the seconds of our loop and of the bare loop in each round, without round 0, which warms up."""
        by_round: dict[int, list[Turn]] = {}
        for turn in self.turns:
            by_round.setdefault(self._pace.round_of(turn.end), []).append(turn)
        return [
            (sum(turn.our_seconds for turn in turns), sum(turn.bare_seconds for turn in turns))
            for number, turns in by_round.items()
            if number >= 1
        ]
