"""Draw the trials of a sweep from the values that a person searches; a seed decides which they are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from resnet_dist.sweep.on_tune.settings import set_defaults

set_defaults()

import numpy as np
from ray import tune
from ray.tune.search.variant_generator import generate_variants

from resnet_dist.errors import UserError
from resnet_dist.sweep.search import Search, num_combinations

MAX_IN_VAIN = 1000  # draws that give no new trial, after which there are no more


def draw(searches: Sequence[Search], seed: int, num: int) -> list[tuple[str, ...]]:
    """Draw different trials, each as `--set` texts. Raises UserError where there are not so many."""
    possible = num_combinations(searches)
    if num > possible:
        raise _too_many(num, int(possible))
    space = {search.field: _domain(search) for search in searches}
    random, drawn, in_vain = np.random.RandomState(seed), dict[tuple[str, ...], None](), 0
    while len(drawn) < num and in_vain < MAX_IN_VAIN * num:
        _, values = next(generate_variants(space, random_state=random))
        sets = tuple(f"{search.field}={search.text_of(values[search.field])}" for search in searches)
        in_vain = in_vain + 1 if sets in drawn else 0
        drawn[sets] = None
    if len(drawn) < num:  # A narrow range has few numbers of four digits.
        raise _too_many(num, len(drawn))
    return list(drawn)


def _too_many(num: int, possible: int) -> UserError:
    return UserError(
        f"--trials {num}: the searches have {possible} different trials; give --trials {possible}"
    )


def _domain(search: Search) -> Any:
    """Return the search space of Tune for one field."""
    match search.form:
        case "log":
            return tune.loguniform(search.low, search.high)
        case "uniform":
            return tune.uniform(search.low, search.high)
        case "int":
            return tune.randint(int(search.low), int(search.high) + 1)
        case "list":
            return tune.choice(list(search.choices))
