"""The run folder: the name of a run, its recipe, its objects, and the lease that allows one attempt at a time.

OUTPUT/runs/NAME/   run.json  spool.jsonl  log.txt  checkpoints/step-00000120/…

OUTPUT is a folder, or a URL such as s3://…; the log of a run at a URL lies in the scratch folder of the driver's machine.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Literal

from resnet_dist.config import ProfiledSteps, Recipe
from resnet_dist.errors import StorageError, UserError
from resnet_dist.order.versions import FIRST_VERSION, VERSIONS
from resnet_dist.runs.lineage import Lineage
from resnet_dist.runs.page import PAGE_FOLDER
from resnet_dist.runs.storage.holder import Holder
from resnet_dist.runs.storage.lease import Lease, LeaseHeld, held_lease, log_loss
from resnet_dist.runs.storage.protocol import Log, Report, Storage
from resnet_dist.system.command import sync_advice
from resnet_dist.system.streams import LOG_FILE

# The status of an attempt, in MLflow's names.
Status = Literal["FINISHED", "FAILED", "KILLED"]

RUNS_FOLDER = "runs"  # in the output folder
RUN_FILE = "run.json"
SPOOL_FILE = "spool.jsonl"
RANKS_FILE = "ranks.json"
FAILURES_FOLDER = "failures"  # everything that is known of each failure, for a defect report
STOP_FILE = "stop"  # Its existence requests a stop of the ranks.
TOKENS_FOLDER = "tokens"
CHECKPOINTS_FOLDER = "checkpoints"
CHECKPOINT_PREFIX = "step-"
NOT_RECORDED = (
    "storage",
    "token",
    "lease",
    "marks",
    "profile",
)  # fields of a RunFolder that are not in run.json


class RunHeld(UserError):
    """A run that another process trains."""


@dataclass(frozen=True)
class RankPlaces:
    """Where the ranks of an attempt are, as rank 0 writes it when they have met."""

    attempt: int
    threads: int  # that each rank computes with
    hosts: list[str]  # by rank
    nodes: list[str]  # by rank: Ray's id of the node, or "" without Ray
    cpus: int = 0  # of each rank; 0: as many as threads, as in runs of 0.3.0

    def write(self, storage: Storage) -> None:
        storage.write(RANKS_FILE, (json.dumps(asdict(self), indent=1) + "\n").encode())


@dataclass(frozen=True)
class Restarted:
    """A start of the ranks after the first one of a submission, as run.json and MLflow record it."""

    attempt: int
    cause: str
    step: int  # of the checkpoint that it began with; 0: of none
    # From the cause to the first step; None: there was none, or it is not known yet.
    seconds: float | None = None

    def __str__(self) -> str:
        where = f"resumed from step {self.step}" if self.step else "began anew"
        return f"{self.cause}; {where}" + (f", {self.seconds:.0f} s" if self.seconds is not None else "")


@dataclass(frozen=True)
class RunFolder:
    """A run and what its run.json records. A value: nothing is in the storage before `write` or `lock`."""

    storage: Storage  # the place of this run alone
    name: str
    run_id: str | None  # the id in MLflow, once the run exists there
    attempt: int  # 1 for the first
    recipe: dict[str, object]  # without passwords and signatures, see `stored_recipe`
    key: str = ""  # a unique tag in MLflow, by which a restarted driver finds the run that it had created
    data: tuple[str, ...] = ()  # digests of the indexes that the run was started on
    launch: str = ""  # the launch of torchrun, by which a restart of the ranks finds its run
    order: int = FIRST_VERSION  # version of the order of samples, which a run keeps
    # Of the run in MLflow, for one that is created there later.
    tags: dict[str, str] = field(default_factory=dict)
    # MLFLOW_TRACKING_URI without a password; empty: the store in the output folder; None: an earlier version's run
    tracker: str | None = None
    status: Status | None = None  # that of the newest attempt; None while it runs, and where its driver died
    unsent: tuple[str, ...] = ()  # what MLflow did not get, in words
    restarts: tuple[Restarted, ...] = ()  # of all attempts, oldest first
    also: tuple[str, ...] = ()  # what gets its metrics beside MLflow, see tracking/also
    register: str = ""  # NAME or NAME@ALIAS, under which MLflow gets the model of the finished run
    lineage: Lineage | None = None  # the run that this one was forked from
    # Written by the driver and read by every rank, to find out whether they share the storage. Not in run.json.
    token: str = field(default_factory=lambda: uuid.uuid4().hex)
    # Of the driver that trains the run: once it is lost, nothing more is written. Not in run.json.
    lease: Lease | None = field(default=None, compare=False, repr=False)
    # The driver's times of the start under way, see launch/start_times. Not in run.json.
    marks: dict[str, float] = field(default_factory=dict, compare=False)
    # The steps that this submission profiles. Not in run.json.
    profile: ProfiledSteps | None = field(default=None, compare=False)

    @property
    def is_lost(self) -> bool:
        """Report whether another driver has taken this run over."""
        return self.lease is not None and self.lease.is_lost

    @property
    def location(self) -> str:
        """The absolute path of the run, or its URL."""
        return self.storage.location

    @property
    def spool(self) -> Log:
        return self.storage.log(SPOOL_FILE)

    @property
    def log(self) -> Path:
        """The lines of libraries while this run was trained; it exists where there were any."""
        return self.storage.local_folder() / LOG_FILE

    @property
    def checkpoints(self) -> Storage:
        return self.storage.at(CHECKPOINTS_FOLDER)

    @property
    def page(self) -> Storage:
        """The files that the page of the run shows, see `runs.page`."""
        return self.storage.at(PAGE_FOLDER)

    def request_stop(self, reason: str = "") -> None:
        """Request that the ranks of this run save and stop, on whatever machine they are. Raises Superseded.

        reason: for the page of the run, where something else than a person or the cluster stops it.
        """
        self.check_lease()
        self.storage.write(STOP_FILE, reason.encode())

    def stop_reason(self) -> str:
        """Return the reason that was given for a stop of this attempt; empty without one."""
        try:
            return (self.storage.read(STOP_FILE) or b"").decode()
        except StorageError:
            return ""

    def ranks(self) -> RankPlaces | None:
        """Return where the ranks of the newest attempt that began are; None before the first.

        Raises StorageError: without their threads, ranks would choose others and compute other bits.
        """
        try:
            return RankPlaces(**json.loads(self.storage.read(RANKS_FILE) or b""))
        except (ValueError, TypeError):  # None has begun yet, or another version wrote it.
            return None

    def with_run_id(self, run_id: str | None) -> RunFolder:
        return replace(self, run_id=run_id or self.run_id)

    def with_seconds(self, seconds: Mapping[int, float]) -> RunFolder:
        """Return the run with the seconds that its restarts took, by attempt, as far as they are known."""
        restarts = [replace(one, seconds=seconds.get(one.attempt, one.seconds)) for one in self.restarts]
        return replace(self, restarts=tuple(restarts))

    def with_tags(self, tags: Mapping[str, str]) -> RunFolder:
        """Return the run with more tags, or other values of some."""
        return replace(self, tags={**self.tags, **tags})

    def ended(self, status: Status, unsent: Sequence[str]) -> RunFolder:
        """Return the run as it is after an attempt; unsent: what MLflow did not get."""
        return replace(self, status=status, unsent=tuple(unsent))

    def with_data(self, digests: Sequence[str]) -> RunFolder:
        """Return the run with the digests of its data.

        Raises UserError where the run was started on other data.
        """
        if self.data and tuple(self.data) != tuple(digests):
            raise UserError(
                f"run {self.name} was started on other data than data.train={self.recipe_field('data.train')} and "
                f"data.eval={self.recipe_field('data.eval')} hold now; give a new --name, or the same shards"
            )
        return replace(self, data=tuple(digests))

    def recipe_field(self, key: str) -> object:
        """Return the value of a recipe field such as "data.train"."""
        return Recipe.model_validate(self.recipe).flat()[key]

    @contextmanager
    def lock(
        self,
        report: Report = lambda text: None,
        on_lost: Callable[[Holder | None], None] = log_loss,
    ) -> Iterator[Lease]:
        """Hold the lease of the run, so that one attempt at a time trains it; yield it, for `lease` of the run.

        Raises RunHeld where another process holds it; the lease of a driver that died ends by itself, see `lease`.
        A run that was never written is removed at the end.
        """
        try:
            with held_lease(self.storage, report, on_lost) as lease:
                try:
                    yield lease
                finally:
                    with suppress(StorageError):  # among them Superseded: the run is another driver's
                        lease.check()
                        self.storage.at(TOKENS_FOLDER).delete_all()
                        # The attempt ended before the run was written.
                        if self.storage.read(RUN_FILE) is None:
                            lease.release()
                            self.remove()
        except LeaseHeld as held:
            who = f" ({held.holder})" if held.holder else ""
            raise RunHeld(
                f"run {self.name} is being trained by another process{who}; wait for its end, or give another --name"
            ) from None

    def remove(self) -> None:
        """Remove a run that did not begin, and the folder of all runs if it is empty then."""
        self.storage.delete_all()

    def write(self) -> None:
        """Create or update run.json, and write the token by which ranks find out whether they share this storage.

        Raises Superseded where another driver has taken the run over.
        """
        self.check_lease()
        self.storage.delete(STOP_FILE)  # An earlier attempt may have been stopped by it.
        recorded = [one.name for one in fields(self) if one.name not in NOT_RECORDED]
        value = {name: getattr(self, name) for name in recorded}
        self.storage.write(RUN_FILE, (json.dumps(value, indent=1, default=asdict) + "\n").encode())
        self.storage.write(token_name(self.token), b"")

    def check_lease(self) -> None:
        """Raise Superseded where another driver has taken this run over."""
        if self.lease is not None:
            self.lease.check()


def failure_name(attempt: int) -> str:
    """Return the name of the object with everything that is known of the failure of an attempt."""
    return f"{FAILURES_FOLDER}/attempt-{attempt:04}.txt"


def checkpoint_name(step: int) -> str:
    """Return the name of the checkpoint of a step, in CHECKPOINTS_FOLDER."""
    return f"{CHECKPOINT_PREFIX}{step:08d}"


def token_name(token: str) -> str:
    """Return the name of the object whose existence shows that the driver's storage is seen."""
    # A name of its own, which no client of a network file system can have in its cache.
    return f"{TOKENS_FOLDER}/{token}"


def unsent_summary(run: RunFolder) -> str:
    """Return the line about what MLflow, or what else gets the run, did not get, with the command that sends it."""
    output = run.location.removesuffix(f"/{RUNS_FOLDER}/{run.name}")
    # Those of other stores name them, as in "12 metrics to TensorBoard".
    where = "" if all(" to " in one for one in run.unsent) else " to MLflow"
    return f"not sent{where}: {', '.join(run.unsent)}; {sync_advice(run.name, output)}"


def stored_recipe(recipe: Recipe) -> dict[str, object]:
    """Return a recipe as a run keeps it: JSON without passwords and signatures, which a resumed run is given anew."""
    return recipe.public().model_dump(mode="json")


def read_run(storage: Storage) -> RunFolder | None:
    """Return the run in a storage; None where there is none.

    Raises UserError where run.json cannot be parsed.
    """
    content = storage.read(RUN_FILE)
    if content is None:
        return None
    place = f"{storage.location}/{RUN_FILE}"
    try:
        value = json.loads(content)
        restarts = tuple(Restarted(**one) for one in value.get("restarts", ()))
        unsent = tuple(value.get("unsent", ()))
        lineage = Lineage(**value["lineage"]) if value.get("lineage") else None
        also = tuple(value.get("also", ()))
        read = {"unsent": unsent, "also": also, "restarts": restarts, "lineage": lineage}
        run = RunFolder(storage=storage, **{**value, **read})
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{place}: not a run ({error})") from None
    if run.order not in VERSIONS:
        raise UserError(
            f"{place}: the run has version {run.order!r} of the order of samples, this resnet_dist has "
            f"{' and '.join(map(str, VERSIONS))}; continue it with the version of resnet_dist that began it"
        )
    return run
