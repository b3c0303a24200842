"""Averaged weights: they follow the formula, change nothing in training, and are what is evaluated and exported."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from resnet_dist.config import Recipe
from resnet_dist.data.shards.index import read_index
from resnet_dist.train.checkpoint.load import load_model
from resnet_dist.train.evaluate import evaluate, evaluation_loader
from resnet_dist.train.start.initial import initial_state, initialize_weights
from resnet_dist.train.state.ema import Ema
from resnet_dist.world import World
from tests.train.runs import assert_same, final_tensors, run

WORLD = World.single()


def test_the_average_is_the_one_of_the_formula() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))
    ema = Ema(model, decay=0.7, warmup=False)
    expected = {name: value.clone().double() for name, value in model.state_dict().items()}
    for number in range(1, 6):
        model(torch.randn(4, 1, 8, 8))  # updates the running statistics
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn_like(p))
        ema.update(number)
        for name, value in model.state_dict().items():
            counter = name.endswith("num_batches_tracked")
            expected[name] = value.double() if counter else 0.7 * expected[name] + 0.3 * value.double()
    for name, value in ema.model.state_dict().items():
        torch.testing.assert_close(value.double(), expected[name], rtol=1e-5, atol=1e-6)
    assert not torch.equal(ema.model[0].weight, model[0].weight)
    assert ema.model[1].num_batches_tracked == 5
    ema.restart()
    assert all(torch.equal(v, model.state_dict()[name]) for name, v in ema.model.state_dict().items())


def test_the_decay_warms_up() -> None:
    ema = Ema(nn.Linear(1, 1), decay=0.99, warmup=True)
    decays = [ema.decay(number) for number in range(1, 2000)]
    assert decays[0] == pytest.approx(2 / 11)
    assert decays == sorted(decays)
    assert decays[-1] == 0.99
    assert Ema(nn.Linear(1, 1), decay=0.99, warmup=False).decay(1) == 0.99


def test_lookahead_is_that_of_the_source() -> None:
    """A slow copy moves towards the net at every fifth step, with a decay that rises with the cube; the net takes it."""
    torch.manual_seed(0)
    model, total = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)), 20
    ema = Ema(model, decay=0.95**5, warmup=False, rise=3, replaces=True)
    slow = {name: value.clone() for name, value in model.state_dict().items()}
    theirs = copy.deepcopy(model)
    for step in range(1, total + 1):
        change = [torch.randn_like(p) for p in model.parameters()]
        images = torch.randn(4, 1, 8, 8)
        for net in (model, theirs):
            net(images)  # updates the running statistics
            with torch.no_grad():
                for p, moved in zip(net.parameters(), change, strict=True):
                    p.add_(moved)
        if step % 5 == 0:
            ema.update(step // 5, step / total)
            decay = 0.95**5 * (step / total) ** 3
            for name, value in theirs.state_dict().items():
                if value.is_floating_point():
                    slow[name] = decay * slow[name] + (1 - decay) * value
                    value.copy_(slow[name])
    for name, value in theirs.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value)
        torch.testing.assert_close(ema.model.state_dict()[name], value)
    assert model[1].num_batches_tracked == total
    assert ema.decay(4, 0.5) == 0.95**5 / 8


LOOKAHEAD = [
    *("train.ema_decay=0.7", "train.ema_warmup=false", "train.ema_every=2 steps"),
    *("train.ema_rise=3", "train.ema_replaces=true"),
]


def test_training_goes_on_from_the_average_across_restarts_too(digits_recipe: Recipe, tmp_path: Path) -> None:
    recipe = digits_recipe.with_overrides([*LOOKAHEAD, "train.length=7 steps", "model.name=resnet8"])
    whole = run(recipe, tmp_path / "whole")
    for stop in (3, 1, 0):  # between two updates of the average, and at one
        run(recipe, tmp_path / "stopped", stop_after=stop)
    assert_same(tmp_path / "stopped", tmp_path / "whole")
    beside = run(recipe.with_overrides(["train.ema_replaces=false"]), tmp_path / "beside")
    assert beside["train/loss", 7] != whole["train/loss", 7]
    end = final_tensors(tmp_path / "whole")
    assert not torch.equal(end["model/fc.weight"], end["raw/fc.weight"])  # Step 7 came after the last update.
    run(recipe.with_overrides(["train.length=6 steps"]), tmp_path / "even")
    end = final_tensors(tmp_path / "even")
    for name in ("fc.weight", "bn1.running_var"):
        assert torch.equal(end[f"model/{name}"], end[f"raw/{name}"])


def test_training_does_not_notice_the_average(digits_recipe: Recipe, tmp_path: Path) -> None:
    recipe = digits_recipe.with_overrides(["train.length=6 steps", "train.eval_every=0 steps"])
    plain = run(recipe, tmp_path / "plain")
    averaged = run(recipe.with_overrides(["train.ema_decay=0.8"]), tmp_path / "averaged")
    assert plain["train/loss", 6] == averaged["train/loss", 6]
    assert plain["eval/loss", 6] != averaged["eval/loss", 6]
    without, with_average = final_tensors(tmp_path / "plain"), final_tensors(tmp_path / "averaged")
    for name, value in without.items():
        assert torch.equal(value, with_average[name.replace("model/", "raw/")])
    assert not torch.equal(with_average["model/fc.weight"], with_average["raw/fc.weight"])


def test_the_average_moves_at_its_interval(digits_recipe: Recipe, tmp_path: Path) -> None:
    """With 4 steps and an update every 3, the average holds the initial weights and those after step 3."""
    fields = ["train.ema_decay=0.75", "train.ema_warmup=false", "train.ema_every=3 steps"]
    recipe = digits_recipe.with_overrides(["train.checkpoint_every=1 steps", "train.length=4 steps"])
    recipe = recipe.with_overrides(["train.keep_checkpoints=9", *fields])
    start = copy.deepcopy(initial_state(recipe, 10, WORLD).model.state_dict())
    run(recipe, tmp_path, stop_after=3)
    third = final_tensors(tmp_path)["raw/fc.weight"]
    run(recipe, tmp_path)
    end = final_tensors(tmp_path)
    expected = 0.75 * start["fc.weight"] + 0.25 * third
    torch.testing.assert_close(end["model/fc.weight"], expected)
    assert not torch.equal(end["raw/fc.weight"], third)


def test_what_is_exported_is_what_was_evaluated(digits_recipe: Recipe, tmp_path: Path) -> None:
    recipe = digits_recipe.with_overrides(["train.length=6 steps", "train.ema_decay=0.8"])
    metrics = run(recipe, tmp_path)
    trained = load_model(tmp_path, WORLD.device)
    with evaluation_loader(read_index(recipe.data.eval), recipe.data, WORLD) as loader:
        assert evaluate(trained.model, loader, WORLD)["eval/loss"] == metrics["eval/loss", 6]


def test_an_average_can_be_switched_on_and_off_between_attempts(
    digits_recipe: Recipe, tmp_path: Path
) -> None:
    recipe = digits_recipe.with_overrides(["train.length=6 steps", "train.eval_every=0 steps"])
    averaged = recipe.with_overrides(["train.ema_decay=0.8"])
    run(recipe, tmp_path / "whole")
    whole = final_tensors(tmp_path / "whole")
    for first, second, file in ((recipe, averaged, "raw"), (averaged, recipe, "model")):
        run(first, tmp_path / file, stop_after=3)
        run(second, tmp_path / file)
        moved = final_tensors(tmp_path / file)
        assert torch.equal(moved[f"{file}/fc.weight"], whole["model/fc.weight"])


def test_the_average_begins_at_the_loaded_weights(digits_recipe: Recipe, tmp_path: Path) -> None:
    recipe = digits_recipe.with_overrides(
        ["train.ema_decay=0.8", f"model.init_from={tmp_path / 'w.safetensors'}"]
    )
    state = initial_state(recipe, 10, WORLD)
    assert state.ema is not None
    threes = {name: torch.full_like(t, 3).contiguous() for name, t in state.model.state_dict().items()}
    save_file(threes, tmp_path / "w.safetensors")
    initialize_weights(state, recipe, read_index(recipe.data.train), WORLD, lambda text: None)
    assert (state.model.get_parameter("fc.weight") == 3).all()
    assert (state.ema.model.get_parameter("fc.weight") == 3).all()
