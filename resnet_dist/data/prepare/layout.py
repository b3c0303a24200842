"""The layout of a folder: which of its subfolders are the splits, by their names.

A name counts in any case and with the usual additions: `Train`, `training`, `TRAIN_SET`, `train2017`. What could be
read in two ways is refused with the names of the folders that were meant.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from resnet_dist.errors import UserError

_ADDITION = r"(?:[ _-]?(?:set|data|dataset|images|split|folder))?(?:[ _-]?\d+)?"
_TRAIN = re.compile(rf"(?:train|training|trn){_ADDITION}", re.IGNORECASE)
# The evaluation folder is the first of these that a source has.
EVAL_NAMES = ("eval", "evaluation", "val", "valid", "validation", "dev", "development", "test", "testing")
_EVALS = tuple(re.compile(f"{name}{_ADDITION}", re.IGNORECASE) for name in EVAL_NAMES)


@dataclass(frozen=True)
class Splits:
    """The names of the folders with the classes of each split; None: it is not asked for."""

    train: str
    eval: str | None


def is_train(name: str) -> bool:
    return _TRAIN.fullmatch(name) is not None


def is_eval(name: str) -> bool:
    return _rank(name) is not None


def _rank(name: str) -> int | None:
    return next((rank for rank, pattern in enumerate(_EVALS) if pattern.fullmatch(name)), None)


def find_splits(
    source: str, names: Sequence[str], has_classes: Callable[[str], bool], *, train_only: bool = False
) -> Splits | None:
    """Return the folders of the splits among `names`; None where these are the folders of classes.

    source: for messages. has_classes(name): reports whether a folder holds folders. train_only: an evaluation folder
    need not hold classes. Raises UserError where the names can be read in two ways, or a split is missing.
    """
    trains = [name for name in names if is_train(name)]
    evals = [name for name in names if is_eval(name)]
    usable_trains = [name for name in trains if has_classes(name)]
    usable_evals = [name for name in evals if has_classes(name)]
    if not usable_trains and not usable_evals:
        if len(trains + evals) < 2:
            return None
        raise UserError(
            f"{source}: {_listed(trains + evals)} look like splits, but hold no folders of classes; expected "
            f"{(trains + evals)[0]}/CLASS/IMAGE"
        )
    if usable_trains:
        only_train(source, usable_trains)
    if train_only and usable_trains and evals:
        return Splits(usable_trains[0], None)
    if not usable_trains or not usable_evals:
        _refuse_half(source, usable_trains, usable_evals, trains, evals)
    return Splits(usable_trains[0], best_eval(source, usable_evals))


def only_train(source: str, names: Sequence[str]) -> str:
    """Return the training folder among folders that have its name. Raises UserError where there are several."""
    if len(names) > 1:
        raise UserError(f"{source}: {_listed(names)} all look like the training split; rename all but one")
    return names[0]


def best_eval(source: str, names: Sequence[str]) -> str:
    """Return the evaluation folder among folders that have a name of one. Raises UserError where two are as good."""
    best = min(_rank(name) or 0 for name in names)
    chosen = [name for name in names if _rank(name) == best]
    if len(chosen) > 1:
        raise UserError(f"{source}: {_listed(chosen)} all look like the evaluation split; rename all but one")
    return chosen[0]


def _refuse_half(
    source: str, usable_trains: list[str], usable_evals: list[str], trains: list[str], evals: list[str]
) -> None:
    """Raise UserError where one split has folders of classes, and the other has none or is missing."""
    found, flat = (usable_trains or usable_evals)[0], evals if usable_trains else trains
    if flat:
        more = "; --split train prepares the training split alone" if usable_trains else ""
        raise UserError(
            f"{source}: {found}/ has folders of classes, but {_listed(flat)} beside it has none, so its images have "
            f"no labels{more}"
        )
    other = f"an evaluation folder ({', '.join(EVAL_NAMES)})" if usable_trains else "train"
    raise UserError(
        f"{source}: has {found}/ with folders of classes, but not {other} beside it; give that folder itself as the "
        "source"
    )


def _listed(names: Sequence[str]) -> str:
    return ", ".join(f"{name}/" for name in names[:-1]) + f"{' and ' if names[1:] else ''}{names[-1]}/"
