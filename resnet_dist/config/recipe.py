"""The recipe: one frozen value that determines a run, and its overrides from the command line.

A recipe file defines `recipe() -> Recipe`. `--set data.global_batch_size=256` overrides one field and is
validated like everything else. The value is JSON where it is printed, logged, and sent to a cluster.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Self

from pydantic import Field, ValidationError, field_validator, model_validator

from resnet_dist.config.data.combined import Data
from resnet_dist.config.model import Model
from resnet_dist.config.overrides import annotation_of, read_as
from resnet_dist.config.part import Part, explain, fields, nearest
from resnet_dist.config.recipe_file import call_function, read_source
from resnet_dist.config.train import Optim, Schedule, Train
from resnet_dist.errors import RecipeError
from resnet_dist.system.redact import redact_all


class Recipe(Part):
    """Everything that determines a run, apart from the machines that it runs on."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100)
    """Prefix of the names of its runs: letters, digits, ".", "_" and "-", at most 100, the first a letter or
    digit."""
    experiment: str | None = None
    """MLflow experiment of its runs. None: `name`."""
    description: str = ""
    """Text that MLflow shows beside the run."""
    seed: int = Field(default=0, ge=0, lt=2**32)
    """Seed of the initial weights, the order of samples, and every augmentation."""
    data: Data
    """The shards, the order of samples, and the augmentations."""
    model: Model = Model()
    """The network and its initial weights."""
    optim: Optim = Optim()
    """The optimizer and its learning rate."""
    schedule: Schedule = Schedule()
    """The learning rate at each step, relative to `optim.lr`."""
    train: Train
    """The length of the run, the loss, the precision, and the intervals of logs and checkpoints."""

    @field_validator("description", mode="before")
    @classmethod
    def _no_docstring_is_no_text(cls, value: object) -> object:
        # `python -OO` drops docstrings, and a recipe may have none: `__doc__` is None then.
        return "" if value is None else value

    @model_validator(mode="after")
    def _sizes_suit_compile(self) -> Self:
        mode, sizes = self.train.compile, sorted({size for _, size in self.data.train_sizes})
        if mode != "none" and len(sizes) > 1:
            raise ValueError(
                f"train.compile={mode!r} compiles for one image size, but data.train_sizes moves over {sizes}; use "
                "train.compile='none' or data.train_sizes=[]"
            )
        return self

    @model_validator(mode="after")
    def _batch_norm_sees_what_the_recipe_says(self) -> Self:
        if self.train.sync_batch_norm and self.data.micro_batch_size:
            raise ValueError(
                f"train.sync_batch_norm=True shows batch norm the images of all ranks, but data.micro_batch_size="
                f"{self.data.micro_batch_size} fixes what it sees; use one of them"
            )
        return self

    def to_json(self) -> str:
        """Return the recipe as indented JSON, with every field."""
        return self.model_dump_json(indent=2) + "\n"

    def public(self) -> Recipe:
        """Return the recipe as it may be stored and shown: its URLs without passwords and signatures."""
        return Recipe.model_validate(redact_all(self.model_dump()))

    def portable(self) -> Recipe:
        """Return the recipe as it may leave this machine: of a path only its last two names, of a URL no password.

        Where shards are kept and whether commands run is decided anew by each machine.
        """
        tree = self.public().model_dump()
        for part, field in (("data", "train"), ("data", "eval"), ("data", "source"), ("model", "init_from")):
            tree[part][field] = _end_of_path(tree[part][field])
        for field in ("shard_cache", "allow_commands"):
            tree["data"][field] = Data.model_fields[field].default
        return Recipe.model_validate(tree)

    @classmethod
    def from_json(cls, text: str | bytes) -> Recipe:
        """Read a recipe from JSON. Raises RecipeError with the field, the value and what would be accepted."""
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            raise RecipeError(explain(error, cls)) from None

    def with_overrides(self, overrides: Iterable[str]) -> Recipe:
        """Return this recipe with `KEY=VALUE` strings applied, KEY dotted. Raises RecipeError."""
        tree = self.model_dump()
        for override in overrides:
            key, equals, value = override.partition("=")
            if not equals or not key:
                raise RecipeError(f"--set {override}: must be KEY=VALUE, such as optim.lr=0.2")
            _set_field(tree, key.strip(), value)
        try:
            return Recipe.model_validate(tree)
        except ValidationError as error:
            raise RecipeError(explain(error, Recipe)) from None

    def flat(self) -> dict[str, str]:
        """Return every field by its dotted name, as MLflow shows parameters."""
        return {key: _text(value) for key, value in _leaves(self.model_dump(mode="json"))}

    def changes_from(self, other: Recipe) -> dict[str, tuple[str, str]]:
        """Return the fields that differ by dotted name: the value here and the other's, without passwords."""
        ours, theirs = self.public().flat(), other.public().flat()
        return {key: (value, theirs[key]) for key, value in ours.items() if value != theirs[key]}

    def not_default(self) -> dict[str, str]:
        """Return the fields that are not at their default, or have none, by dotted name; without passwords."""
        tree = self.public().model_dump(mode="json", exclude_defaults=True)
        return {key: _text(value) for key, value in _leaves(tree)}

    def digest(self) -> str:
        """Return the SHA-256 of the canonical JSON, which ranks compare before they start.

        Each node may have signed the same URLs anew: signatures do not count.
        """
        canonical = json.dumps(self.public().model_dump(mode="json"), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()


def load_recipe(path: Path | str, overrides: Iterable[str] = ()) -> Recipe:
    """Read `recipe()` from a Python file, or a recipe from JSON, and apply `KEY=VALUE` overrides.

    The JSON is a recipe, as it is sent to a cluster, or a run.json, which holds the recipe of its run.

    Raises RecipeError where the file is missing, raises, or returns something else than a Recipe.
    """
    path = Path(path)
    source = read_source(path, "recipe", "recipe")
    # A recipe that was sent to a cluster is a JSON file, and so is the record of a run.
    value = _read_json(path, source) if path.suffix == ".json" else _run_recipe(path, source)
    return value.with_overrides(overrides)


def _end_of_path(text: str | None) -> str | None:
    if text is None or not text.startswith(("/", "~", "file:")):
        return text
    return "/".join(["…", *Path(text.removeprefix("file:")).parts[-2:]])


def _set_field(tree: dict[str, Any], key: str, text: str) -> None:
    """Set one field of a recipe's tree to the value that `text` has for it. Raises RecipeError."""
    if key not in dict(fields(Recipe)):
        raise RecipeError(f"--set {key}: not a field of the recipe{nearest(key, Recipe)}")
    *parents, leaf = key.split(".")
    for parent in parents:
        tree = tree[parent]
    tree[leaf] = read_as(annotation_of(Recipe, key), key, text)


def _read_json(path: Path, source: bytes) -> Recipe:
    try:
        tree = json.loads(source)
    except (ValueError, RecursionError) as error:
        raise RecipeError(f"{path}: is no JSON ({error})") from None
    of_run = tree.get("recipe") if isinstance(tree, dict) else None
    try:
        return Recipe.from_json(source if of_run is None else json.dumps(of_run))
    except RecipeError as error:
        raise RecipeError(f"{path}: {error}") from None


def _run_recipe(path: Path, source: bytes) -> Recipe:
    value = call_in_file(path, source, "recipe", "Recipe")
    if not isinstance(value, Recipe):
        raise RecipeError(f"{path}: recipe() returned {type(value).__name__}, must return a Recipe")
    return value


def call_in_file(
    path: Path, source: bytes, name: str, returns: str, arguments: Mapping[str, Any] = MappingProxyType({})
) -> Any:
    """Call a function of a Python file as `call_function` does, and explain wrong fields too. Raises RecipeError."""
    try:
        return call_function(path, source, name, returns, arguments)
    except ValidationError as error:
        raise RecipeError(f"{path}: {explain(error, _part_named(error.title))}") from None


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
