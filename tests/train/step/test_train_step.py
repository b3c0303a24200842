"""One step: its precision, its rates, and what a device cannot do."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from resnet_dist.config import Recipe, Train
from resnet_dist.data.batches.loader import Batch, Loader
from resnet_dist.data.shards.index import read_index
from resnet_dist.errors import RecipeError
from resnet_dist.train.device import prepare_device
from resnet_dist.train.optim.build import set_learning_rate
from resnet_dist.train.plan import Plan, order_of
from resnet_dist.train.start.initial import initial_state
from resnet_dist.train.state.train_state import TrainState
from resnet_dist.train.step.gradient_sums import distribute
from resnet_dist.train.step.train_step import LossModel, TrainStep
from resnet_dist.world import World
from tests.train.runs import final_tensors, run

WORLD = World.single()
GPU = torch.device("cuda", 0)


def begin(recipe: Recipe) -> tuple[TrainState, TrainStep, Batch]:
    """Return a state, its step, and the first batch. It skips `prepare_device`: fp16 runs on a CPU too, slowly."""
    index = read_index(recipe.data.train)
    order = order_of(recipe, index)
    plan = Plan.of(recipe, order)
    state = initial_state(recipe, 10, WORLD)
    step = TrainStep(state, recipe, plan, WORLD)
    with Loader(index, order, recipe.data, WORLD, seed=0) as loader:
        return state, step, loader.batch_at(0)


def test_fp16_scales_the_loss_and_skips_what_overflows(digits_recipe: Recipe) -> None:
    recipe = digits_recipe.with_overrides(["train.precision=fp16", "optim.clip_norm=5"])
    state, step, batch = begin(recipe)
    assert state.scalars()["scaler"]["scale"] == 2.0**16
    step(batch)
    before = [p.clone() for p in state.model.parameters()]
    scale = state.scaler.get_scale()
    with torch.no_grad():
        state.model.get_parameter("fc.weight")[0, 0] = float("inf")
    step(batch)
    assert state.scaler.get_scale() == scale / 2
    for name, now in state.model.named_parameters():
        if name != "fc.weight":
            assert torch.equal(now, before.pop(0)), name
        else:
            before.pop(0)


def test_fp16_may_overflow_in_the_first_step(digits_recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    """A skipped step leaves no momentum: the step after it equals a first step."""
    empty_like = torch.empty_like

    def garbage(tensor: torch.Tensor, **options: Any) -> torch.Tensor:
        return empty_like(tensor, **options).fill_(7 if tensor.is_floating_point() else 0)

    monkeypatch.setattr(torch, "empty_like", garbage)
    recipe = digits_recipe.with_overrides(["train.precision=fp16"])
    state, step, batch = begin(recipe)
    start = {name: value.clone() for name, value in state.model.state_dict().items()}
    with torch.no_grad():
        state.model.get_parameter("fc.weight")[0, 0] = float("inf")
    step(batch)
    assert state.scaler.get_scale() == 2.0**15
    state.model.load_state_dict(start)
    step(batch)
    other, other_step, _ = begin(recipe)
    other.scaler.load_state_dict({**other.scaler.state_dict(), "scale": 2.0**15})
    other_step(batch)
    for ours, theirs in zip(state.model.parameters(), other.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_fp16_resumes_with_its_scale(digits_recipe: Recipe) -> None:
    recipe = digits_recipe.with_overrides(["train.precision=fp16"])
    state, step, batch = begin(recipe)
    for _ in range(2):
        step(batch)
        state.step += 1
    state.scaler.update(2.0**7)
    other, other_step, _ = begin(recipe)
    other.load(state.tensors(), state.scalars(), WORLD)
    step(batch)
    other_step(batch)
    assert other.scaler.state_dict() == state.scaler.state_dict()
    assert state.scaler.get_scale() == 2.0**7
    for ours, theirs in zip(other.model.parameters(), state.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_fp16_learns_what_fp32_learns(digits_recipe: Recipe) -> None:
    losses = []
    for precision in ("fp32", "fp16"):
        state, step, batch = begin(digits_recipe.with_overrides([f"train.precision={precision}"]))
        for _ in range(3):
            step(batch)
            state.step += 1
        losses.append(state.meter.flush(WORLD)["train/loss"])
    assert losses[0] != losses[1] == pytest.approx(losses[0], rel=0.01)


def test_the_scaler_is_off_in_other_precisions(digits_recipe: Recipe) -> None:
    state = initial_state(digits_recipe.with_overrides(["train.precision=bf16"]), 10, WORLD)
    assert not state.scaler.is_enabled()
    assert state.scalars()["scaler"] == {}


def test_rates_are_in_proportion_from_the_first_step(digits_recipe: Recipe) -> None:
    """Without momentum, 64 times the rate moves biases 64 times as far, and weights as far as before."""
    plain = digits_recipe.with_overrides(["optim.momentum=0", "optim.nesterov=false", "optim.lr=0.1"])
    moves = []
    for scale in (1, 64):
        state, step, batch = begin(plain.with_overrides([f"optim.bias_lr_scale={scale}"]))
        before = {name: p.detach().double() for name, p in state.model.named_parameters()}
        step(batch)
        moves.append({name: p.double() - before[name] for name, p in state.model.named_parameters()})
    assert torch.equal(moves[0]["fc.weight"], moves[1]["fc.weight"])
    torch.testing.assert_close(moves[1]["fc.bias"], 64 * moves[0]["fc.bias"], rtol=1e-3, atol=1e-9)
    assert moves[0]["fc.bias"].abs().max() > 0


def test_decay_norms_decays_norms(digits_recipe: Recipe) -> None:
    scales = []
    for decay in ("false", "true"):
        recipe = digits_recipe.with_overrides([f"optim.decay_norms={decay}", "optim.weight_decay=0.1"])
        state, step, batch = begin(recipe)
        set_learning_rate(state.optimizer, 0.1)
        step(batch)
        scales.append({name: p.detach() for name, p in state.model.named_parameters()})
    assert not torch.equal(scales[0]["bn1.weight"], scales[1]["bn1.weight"])
    assert torch.equal(scales[0]["conv1.weight"], scales[1]["conv1.weight"])


@pytest.mark.parametrize(
    "override",
    ["train.sync_batch_norm=true", "train.tf32=false", "optim.clip_norm=1e9"],
)
def test_neutral_on_one_cpu(digits_recipe: Recipe, tmp_path: Path, override: str) -> None:
    recipe = digits_recipe.with_overrides(["train.length=3 steps", "data.micro_batch_size=none"])
    run(recipe, tmp_path / "without")
    run(recipe.with_overrides([override]), tmp_path / "with")
    without, with_it = final_tensors(tmp_path / "without"), final_tensors(tmp_path / "with")
    assert without.keys() == with_it.keys()
    assert all(torch.equal(without[name], with_it[name]) for name in without)


def test_synchronised_norms_keep_names_and_parameters(digits_recipe: Recipe) -> None:
    """A World of two ranks is enough: the second one is not needed before the first forward pass."""
    model = initial_state(digits_recipe, 10, WORLD).model
    parameters, names = list(model.parameters()), list(model.state_dict())
    two = World(0, 0, 2, torch.device("cpu"))
    for synchronised, kind in ((False, nn.BatchNorm2d), (True, nn.SyncBatchNorm)):
        train = train_options(sync_batch_norm=synchronised, gradient_sums="fp64")
        network = LossModel(model, train, two.device)
        assert distribute(network, train, two) is network  # ExactSums takes the place of DDP
        norms = [
            module for module in network.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)
        ]
        assert {type(norm) for norm in norms} == {kind}
        assert len(norms) == 9
    assert list(model.state_dict()) == names
    assert all(ours is theirs for ours, theirs in zip(model.parameters(), parameters, strict=True))


def train_options(**fields: object) -> Train:
    return Train.model_validate({"length": "1 epochs", **fields})


def test_what_a_cpu_cannot_do_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    two = World(0, 0, 2, torch.device("cpu"))
    with pytest.raises(RecipeError, match=r"train\.precision='fp16' needs a GPU.*bf16 or fp32"):
        prepare_device(train_options(precision="fp16"), WORLD)
    with pytest.raises(RecipeError, match=r"train\.sync_batch_norm=True with 2 ranks needs GPUs"):
        prepare_device(train_options(sync_batch_norm=True), two)
    prepare_device(train_options(sync_batch_norm=True), WORLD)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(RecipeError, match=r"train\.compile='default' needs a compiler.* no c\+\+ or g\+\+"):
        prepare_device(train_options(compile="default"), WORLD)


@pytest.mark.parametrize("tf32", [True, False])
def test_tf32_is_a_switch_of_the_process(monkeypatch: pytest.MonkeyPatch, tf32: bool) -> None:
    precisions: list[str] = []
    monkeypatch.setattr(torch, "set_float32_matmul_precision", precisions.append)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", not tf32)
    prepare_device(train_options(tf32=tf32, precision="fp16"), World(0, 0, 2, GPU))
    assert precisions == ["high" if tf32 else "highest"]
    assert torch.backends.cudnn.allow_tf32 == tf32
    assert torch.backends.cudnn.benchmark
