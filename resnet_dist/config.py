"""The recipe: one frozen value that says everything about a run, and how a person changes it.

A recipe file defines `recipe() -> Recipe`. `--set data.global_batch_size=256` overrides one field and is
validated like everything else. The value prints as JSON, is logged whole, and travels to the cluster so.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import math
import runpy
import traceback
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Self, Union, get_args, get_origin

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import ErrorDetails


class UserError(ValueError):
    """A person's mistake, told in one sentence: what is wrong, its value, and what would be accepted."""


class RecipeError(UserError):
    """A recipe, or an override of one of its fields, that cannot be run."""


UNITS = ("steps", "epochs", "samples")


def _check_length(text: str) -> str:
    value, _, unit = text.strip().partition(" ")
    unit = unit.strip()
    unit = unit if unit.endswith("s") else unit + "s"
    try:
        number = float(value.replace("_", ""))
    except ValueError:
        number = math.nan
    if not (math.isfinite(number) and number >= 0 and unit in UNITS):
        raise ValueError("must be a number and a unit, such as '10 epochs', '64000 steps' or '1e6 samples'")
    return f"{number:.15g} {unit}"


# A length of training in the unit that suits the person; `steps_of` turns it into steps, once.
Length = Annotated[str, AfterValidator(_check_length)]


def steps_of(length: Length, *, steps_per_epoch: int, global_batch_size: int) -> int:
    """Steps in `length`, rounded to the nearest; at least one where the length is not zero."""
    value, unit = length.split()
    per_unit = {"steps": 1.0, "epochs": float(steps_per_epoch), "samples": 1 / global_batch_size}
    steps = float(value) * per_unit[unit]
    return max(1, round(steps)) if steps > 0 else 0


class Part(BaseModel):
    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, validate_default=True, coerce_numbers_to_str=True
    )


class Data(Part):
    """What is read, in which order, and how bytes become pixels."""

    train: str
    """Folder or URL (https, s3, gs, hf …) with an index.json, or the index itself. `{output}` stands for the
    output folder."""
    eval: str
    source: str | None = None
    """What `train` prepares by itself where the shards are missing, as `resnet-dist prepare` names it."""

    image_size: int = Field(ge=1)
    """Height and width, in pixels, of what the model sees."""
    channels: Literal[1, 3] = 3
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    """Per channel, of pixels scaled to 0..1."""

    global_batch_size: int = Field(ge=1)
    """Samples per optimizer step, over all ranks."""
    micro_batch_size: int | None = Field(default=None, ge=1)
    """Samples per forward pass. Set, it fixes what batch norm sees, and any number of ranks draws the same
    curve. None: all that a rank has of a step, so batch norm changes with the number of ranks."""
    lanes: int = Field(default=8, ge=1)
    """Contiguous parts of an epoch. Each is read by one rank: ranks must divide lanes."""
    window: int = Field(default=4096, ge=1)
    """Samples over which a lane is shuffled."""

    crop: Literal["none", "pad-crop", "random-resized-crop"] = "none"
    """none: the middle, as in evaluation. pad-crop: the middle, shifted by up to `pad` pixels over black.
    random-resized-crop: 8 to 100 % of the area (arXiv 1409.4842)."""
    pad: int = Field(default=4, ge=0)
    flip: bool = False
    policy: Literal["none", "rand-augment", "trivial-augment"] = "none"
    """RandAugment (arXiv 1909.13719) with `policy_ops` and `policy_magnitude`; TrivialAugment (2103.10158)."""
    policy_ops: int = Field(default=2, ge=1, le=8)
    policy_magnitude: int = Field(default=9, ge=0, le=30)
    color_jitter: float = Field(default=0.0, ge=0, le=1)
    """Brightness, contrast and saturation change by a factor from 1 - this to 1 + this."""
    erase: float = Field(default=0.0, ge=0, le=1)
    """Probability that a rectangle is painted over with the mean color (arXiv 1708.04896)."""
    mixup: float = Field(default=0.0, ge=0)
    """alpha of mixup (arXiv 1710.09412); with `cutmix` too, each micro-batch gets one of them."""
    cutmix: float = Field(default=0.0, ge=0)
    """alpha of CutMix (arXiv 1905.04899)."""
    eval_crop: float = Field(default=1.0, gt=0, le=1)
    """Share of an image's short side that evaluation sees: 0.875 is 224 of 256."""

    cache: Literal["none", "ram", "device"] = "none"
    """ram, device: decode every image once, keep all as uint8 in each rank's memory or on its device."""
    loader_workers: int | None = Field(default=None, ge=1)
    """Decoding threads of one rank. None: as many as the rank has CPU threads."""
    prefetch_batches: int = Field(default=2, ge=1)
    prefetch_bytes: int = Field(default=2**30, ge=1)
    """Decoded batches in flight take no more than this, or one batch. At most as many as `prefetch_batches`."""
    max_bad_fraction: float = Field(default=0.001, ge=0, le=1)
    """Share of samples that may fail to decode before the run stops."""
    shard_cache: str = "~/.cache/resnet-dist/shards"
    """Folder of a node, shared by its ranks, where remote and compressed shards are kept."""
    shard_cache_bytes: int = Field(default=200 * 2**30, ge=1)
    fetch_timeout_seconds: float = Field(default=600.0, gt=0)
    """How long a shard is tried again without a byte of progress before the run ends."""
    allow_commands: bool = False
    """Whether a shard may be a command (`pipe:…`) that is run in a shell."""

    @property
    def micro_batches(self) -> int | None:
        """Micro-batches in a global batch, where the recipe fixes their size."""
        return self.micro_batch_size and self.global_batch_size // self.micro_batch_size

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if len(self.mean) != self.channels or len(self.std) != self.channels:
            raise ValueError(
                f"mean={self.mean} and std={self.std} need {self.channels} value(s) each, one per channel"
            )
        if min(self.std) <= 0:
            raise ValueError(f"std={self.std} must be greater than zero in every channel")
        if self.global_batch_size % self.lanes:
            near = _divisors(self.global_batch_size)
            raise ValueError(
                f"global_batch_size={self.global_batch_size} is not a multiple of lanes={self.lanes}; "
                f"use lanes from {near}, or another batch size"
            )
        if self.micro_batch_size and self.global_batch_size % self.micro_batch_size:
            raise ValueError(
                f"micro_batch_size={self.micro_batch_size} does not divide "
                f"global_batch_size={self.global_batch_size}; use one of {_divisors(self.global_batch_size)}"
            )
        if self.cache != "none" and self.crop == "random-resized-crop":
            raise ValueError(
                f"cache={self.cache!r} keeps images of image_size={self.image_size}, which "
                "crop='random-resized-crop' cannot use; use cache='none', or crop='pad-crop' or 'none'"
            )
        if self.cache == "device" and (self.policy != "none" or self.color_jitter):
            raise ValueError(
                f"cache='device' cannot do policy={self.policy!r} and color_jitter={self.color_jitter}, which work "
                "on single images; use cache='ram'"
            )
        if (self.mixup or self.cutmix) and min(self.micro_batch_size or 2, self.global_batch_size) < 2:
            raise ValueError(
                f"mixup={self.mixup} and cutmix={self.cutmix} mix the images of a micro-batch, which has one "
                f"(micro_batch_size={self.micro_batch_size}, global_batch_size={self.global_batch_size}); use 2 or more"
            )
        if self.micro_batches and self.lanes % self.micro_batches:
            fitting = [self.global_batch_size // d for d in reversed(_divisors(self.lanes))]
            raise ValueError(
                f"micro_batch_size={self.micro_batch_size} cuts a step into {self.micro_batches} "
                f"micro-batches, which does not divide lanes={self.lanes}; use one of {fitting}"
            )
        return self


class Model(Part):
    """Which network; the names are the table in model/resnet.py."""

    name: str = "resnet20"
    shortcut: Literal["projection", "zero-pad", "none"] = "projection"
    """projection: 1x1 convolution where the shape changes (option B). zero-pad: no parameters (option A).
    none: the plain net, without skip connections."""


class Optim(Part):
    optimizer: Literal["sgd"] = "sgd"
    lr: float = Field(default=0.1, gt=0)
    """For the whole global batch. Scaling with it is written out in the recipe, never done behind it."""
    momentum: float = Field(default=0.9, ge=0, lt=1)
    nesterov: bool = True
    weight_decay: float = Field(default=1e-4, ge=0)
    """On convolution and linear weights; never on norms and biases."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.nesterov and self.momentum == 0:
            raise ValueError(
                "nesterov=True needs momentum greater than 0; set nesterov=false or momentum=0.9"
            )
        return self


class Schedule(Part):
    decay: Literal["cosine", "constant"] = "cosine"
    warmup: Length = "0 steps"


class Train(Part):
    length: Length
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    precision: Literal["fp32", "bf16"] = "fp32"
    """Type of the arithmetic in forward passes; weights stay fp32."""
    log_every: Length = "50 steps"
    eval_every: Length = "1 epochs"
    checkpoint_every: Length = "1 epochs"
    keep_checkpoints: int = Field(default=2, ge=1)


class Recipe(Part):
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100)
    """Begins the names of its runs, and names the MLflow experiment unless `experiment` does."""
    experiment: str | None = None
    description: str = ""
    seed: int = Field(default=0, ge=0, lt=2**32)
    data: Data
    model: Model = Model()
    optim: Optim = Optim()
    schedule: Schedule = Schedule()
    train: Train

    def to_json(self) -> str:
        return self.model_dump_json(indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes) -> Recipe:
        """Raises RecipeError with the field, the value and what would be accepted."""
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            raise RecipeError(explain(error, cls)) from None

    def with_overrides(self, overrides: Iterable[str]) -> Recipe:
        """This recipe with `KEY=VALUE` strings applied, KEY dotted. Raises RecipeError."""
        tree = self.model_dump()
        for override in overrides:
            key, equals, value = override.partition("=")
            if not equals or not key:
                raise RecipeError(f"--set {override}: must be KEY=VALUE, such as optim.lr=0.2")
            _set_field(tree, key.strip(), _parse_value(value))
        try:
            return Recipe.model_validate(tree)
        except ValidationError as error:
            raise RecipeError(explain(error, Recipe)) from None

    def flat(self) -> dict[str, str]:
        """Every field by its dotted name, as MLflow shows parameters."""
        return {key: _text(value) for key, value in _leaves(self.model_dump(mode="json"))}

    def digest(self) -> str:
        """SHA-256 of the canonical JSON: ranks compare it before they start."""
        canonical = json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()


def load_recipe(path: Path | str, overrides: Iterable[str] = ()) -> Recipe:
    """Read `recipe()` from a Python file, or a recipe from JSON, and apply `KEY=VALUE` overrides.

    Raises RecipeError where the file is missing, raises, or returns something else than a Recipe.
    """
    path = Path(path)
    if not path.is_file():
        raise RecipeError(f"{path}: no such recipe file; a recipe is a .py file that defines recipe()")
    value = (
        Recipe.from_json(path.read_bytes()) if path.suffix == ".json" else _run_recipe(path)
    )  # JSON is how a recipe travels
    return value.with_overrides(overrides)


def check_world_size(data: Data, world_size: int) -> None:
    """Raise RecipeError, naming the numbers of ranks that work, unless `world_size` ranks share a step."""
    parts, name = (data.micro_batches, "micro-batches") if data.micro_batches else (data.lanes, "lanes")
    if world_size < 1 or parts % world_size:
        raise RecipeError(
            f"--workers {world_size}: the recipe has {parts} {name} a step (data.global_batch_size="
            f"{data.global_batch_size}, data.micro_batch_size={data.micro_batch_size}, data.lanes={data.lanes}), "
            f"which {world_size} ranks cannot share; use one of {_divisors(parts)}"
        )


def explain(error: ValidationError, root: type[Part]) -> str:
    """One sentence for the first problem of a validation error."""
    details = error.errors(include_url=False)[0]
    more = f" ({error.error_count() - 1} more)" if error.error_count() > 1 else ""
    return _explain_one(details, root) + more


def _explain_one(details: ErrorDetails, root: type[Part]) -> str:
    key = ".".join(str(part) for part in details["loc"])
    if details["type"] == "extra_forbidden":
        return f"{key} is not a field of the recipe{_nearest(key, root)}"
    message = details["msg"].removeprefix("Value error, ")
    message = message[0].lower() + message[1:]
    if details["type"] == "missing":
        return f"{key} is missing: it has no default"
    if isinstance(details["input"], dict) or not key:
        return f"{key}: {message}" if key else message
    return f"{key}={details['input']!r}: {message}"


def _nearest(key: str, root: type[Part]) -> str:
    known = [name for name, _ in _fields(root)]
    by_leaf = [name for name in known if name.rpartition(".")[2] == key.rpartition(".")[2]]
    near = by_leaf or difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    if not near:  # a misspelt last word: compare it with last words
        leaf = {name.rpartition(".")[2]: name for name in known}
        near = [leaf[word] for word in difflib.get_close_matches(key.rpartition(".")[2], leaf, n=1)]
    if near:
        return f"; did you mean {' or '.join(near)}?"
    return f"; known are {', '.join(known)}"


def _fields(part: type[Part], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, field in part.model_fields.items():
        kind: Any = field.annotation
        if get_origin(kind) in (Union, UnionType):
            kind = next(arg for arg in get_args(kind) if arg is not type(None))
        if isinstance(kind, type) and issubclass(kind, Part):
            yield from _fields(kind, f"{prefix}{name}.")
        else:
            yield prefix + name, kind


def _set_field(tree: dict[str, Any], key: str, value: Any) -> None:
    if key not in dict(_fields(Recipe)):
        raise RecipeError(f"--set {key}: not a field of the recipe{_nearest(key, Recipe)}")
    *parents, leaf = key.split(".")
    for parent in parents:
        tree = tree[parent]
    tree[leaf] = value


def _parse_value(text: str) -> Any:
    if text.strip().lower() in ("none", "null"):
        return None
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text  # a bare word is a string: pydantic turns it into what the field wants


def _run_recipe(path: Path) -> Recipe:
    try:
        make = runpy.run_path(str(path), run_name="recipe").get("recipe")
        if not callable(make):
            raise RecipeError(f"{path}: defines no function recipe() -> Recipe")
        value = make()
    except RecipeError:
        raise
    except ValidationError as error:
        raise RecipeError(f"{path}: {explain(error, _part_named(error.title))}") from None
    except BaseException as error:  # a recipe is the person's code: SystemExit is a mistake too
        if isinstance(error, KeyboardInterrupt):
            raise
        frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename == str(path)]
        line = error.lineno if isinstance(error, SyntaxError) else frames[-1].lineno if frames else "?"
        raise RecipeError(f"{path}, line {line}: {type(error).__name__}: {error}") from None
    if not isinstance(value, Recipe):
        raise RecipeError(f"{path}: recipe() returned {type(value).__name__}, must return a Recipe")
    return value


def _part_named(title: str) -> type[Part]:
    return next((part for part in (Data, Model, Optim, Schedule, Train) if part.__name__ == title), Recipe)


def _leaves(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]
