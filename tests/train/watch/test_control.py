"""All ranks act at the same step on the request of one, and abandon an evaluation at once."""

from __future__ import annotations

from pathlib import Path

import pytest

from resnet_dist.config import Recipe
from resnet_dist.train import loop
from resnet_dist.train.watch.control import Control
from resnet_dist.world import World
from tests.paths import list_checkpoints
from tests.train.ranks import run_ranks
from tests.train.runs import Recorder


def agree(world: World) -> list[tuple[bool, bool]]:
    """Request a stop on rank 1 after step 5, a save on rank 0 after step 2; return (stop, save) after every step."""
    step, known = 0, []

    def save_requested() -> bool:
        return world.rank == 0 and step == 2

    with Control(world, 60, lambda: world.rank == 1 and step >= 5, save_requested) as control:
        while step < 9:
            step += 1
            control.agree()
            known.append((control.stop, control.save))
            control.saved()
            if control.stop:
                break
    return known


def test_all_ranks_learn_of_a_request_at_the_next_step() -> None:
    results = run_ranks(2, agree)
    nothing, save, stop = (False, False), (False, True), (True, False)
    assert results == [[nothing, nothing, save, nothing, nothing, stop]] * 2


def stop_in_evaluation(world: World, recipe_json: str, folder: str) -> tuple[int, bool, list[str]]:
    """Stop on the last rank's request in the evaluation of step 3, then resume."""
    recipe, log = Recipe.from_json(recipe_json), Recorder()
    calls = iter(range(1000))
    first = loop.train(
        recipe, Path(folder), world, log, lambda: next(calls) == 3 and world.rank == world.world_size - 1
    )
    assert not [name for name, _ in log.metrics if name.startswith("eval/")]
    second = loop.train(recipe, Path(folder), world, log)
    assert second.finished
    return (
        first.step,
        first.finished,
        sorted(f"{name} {step}" for name, step in log.metrics if "top1" in name),
    )


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_stop_abandons_an_evaluation_and_a_restart_begins_it_again(
    digits_recipe: Recipe, tmp_path: Path, world_size: int
) -> None:
    lengths = ["train.length=3 steps", "train.log_every=3 steps"]
    recipe = digits_recipe.with_overrides(lengths)
    results = run_ranks(world_size, stop_in_evaluation, recipe.to_json(), str(tmp_path))
    # All steps are trained, but the run is not finished: its last evaluation is pending.
    assert results[0] == (3, False, ["eval/top1 3", "train/top1 3"])
    assert results == [results[0]] * world_size
    assert [path.name for path in list_checkpoints(tmp_path / "checkpoints")] == ["step-00000003"]
