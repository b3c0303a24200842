"""Optimizers: what each parameter gets, and restarts that change nothing with any of them."""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops._utils import split_normalization_params

from resnet_dist.config import Optim, Recipe, load_recipe
from resnet_dist.errors import UserError
from resnet_dist.model import build_model
from resnet_dist.train.optim.build import build_optimizer, parameter_groups, set_learning_rate
from resnet_dist.train.optim.muon import COEFFICIENTS, orthogonalize
from resnet_dist.train.start.initial import initial_state
from resnet_dist.world import World
from tests.paths import JOBS
from tests.train.runs import final_tensors, run

OPTIMIZERS = {
    "sgd": ["optim.lr=0.1"],
    "adamw": ["optim.lr=0.003", "optim.weight_decay=0.05"],
    "lamb": ["optim.lr=0.01", "optim.clip_norm=1.0"],
    "lars": ["optim.lr=8", "optim.nesterov=false"],
    "muon": ["optim.lr=0.05", "optim.sgd_lr=0.1", "optim.sgd_momentum=0.8"],
}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.conv3 = nn.Conv2d(8, 8, 3, bias=False), nn.Conv2d(8, 8, 3, bias=False)
        self.down = nn.Conv2d(8, 16, 1, bias=False)
        self.fc = nn.Linear(16, 4)
        self.to(memory_format=torch.channels_last)

    def fill_gradients(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for p in self.parameters():
            p.grad = torch.empty_like(p).copy_(torch.randn(p.shape, generator=generator))


def rates_and_decays(model: nn.Module, optim: Optim) -> dict[str, tuple[float, float]]:
    names = {id(p): name for name, p in model.named_parameters()}
    return {
        names[id(p)]: (group["lr_scale"], group["weight_decay"])
        for group in parameter_groups(model, optim)
        for p in group["params"]
    }


def test_what_each_parameter_gets() -> None:
    model = Net()
    usual = rates_and_decays(model, Optim(weight_decay=0.1))
    assert {name: decay for name, (_, decay) in usual.items() if decay} == {
        f"{name}.weight": 0.1 for name in ("conv1", "conv2", "conv3", "down", "fc")
    }
    assert {scale for scale, _ in usual.values()} == {1.0}
    everywhere = rates_and_decays(model, Optim(weight_decay=0.1, decay_norms=True))
    assert set(everywhere.values()) == {(1.0, 0.1)}
    fast = rates_and_decays(model, Optim(weight_decay=0.1, decay_norms=True, bias_lr_scale=64))
    assert {name for name, (scale, _) in fast.items() if scale != 1} == {"bn1.bias", "fc.bias"}
    assert fast["fc.bias"] == (64.0, 0.1 / 64)
    assert fast["bn1.weight"] == fast["fc.weight"] == (1.0, 0.1)
    whitening = build_model("resnet9_fast", in_channels=3, num_classes=10)
    fast = rates_and_decays(whitening, Optim(weight_decay=0.1, decay_norms=True, bias_lr_scale=64))
    assert fast["whitening.bias"] == fast["fc.weight"] == (1.0, 0.1)
    assert fast["stages.0.norm.bias"] == (64.0, 0.1 / 64)
    own = Optim(weight_decay=0.1, decay_norms=True, whitening_bias_lr_scale=8)
    assert rates_and_decays(whitening, own)["whitening.bias"] == (8.0, 0.1 / 8)
    model.conv1.weight.requires_grad_(False)
    assert rates_and_decays(model, Optim()).keys() == usual.keys() - {"conv1.weight"}


@pytest.mark.parametrize("source", ["torchvision", "ffcv"])
def test_the_decayed_parameters_are_those_of_the_source(source: str) -> None:
    """torchvision's V2 recipe exempts what is in a norm, FFCV's script what has "bn" in its name."""
    theirs = torchvision.models.resnet18(num_classes=10)
    if source == "torchvision":
        _, decayed = split_normalization_params(theirs)
        optim = Optim(weight_decay=0.1, decay_biases=True)
    else:
        decayed = [p for name, p in theirs.named_parameters() if "bn" not in name]
        optim = Optim(weight_decay=0.1, decay_biases=True, decay_shortcut_norms=True)
    ours = build_model("resnet18", in_channels=3, num_classes=10)
    found = {name for name, (_, decay) in rates_and_decays(ours, optim).items() if decay}
    shapes = dict(ours.named_parameters())
    assert sorted(tuple(shapes[name].shape) for name in found) == sorted(tuple(p.shape) for p in decayed)
    assert {name for name in found if shapes[name].ndim == 1} >= {"fc.bias"}
    assert all(decay in (0.0, 0.1) for _, decay in rates_and_decays(ours, optim).values())


def test_fields_of_decay_leave_the_groups_of_other_recipes_alone() -> None:
    model = build_model("resnet18", in_channels=3, num_classes=10)
    for norms in (False, True):
        groups = parameter_groups(model, Optim(decay_norms=norms))
        assert [len(group["params"]) for group in groups] == [21, 20, 21]
    for name in ("decay_biases", "decay_shortcut_norms"):
        with pytest.raises(ValueError, match=f"{name}=True with decay_norms=True, which includes it"):
            Optim.model_validate({name: True, "decay_norms": True})


def test_rates_follow_the_schedule_in_their_proportions() -> None:
    optimizer = build_optimizer(Net(), Optim(optimizer="muon", lr=0.2, sgd_lr=0.5, bias_lr_scale=64))
    set_learning_rate(optimizer, 0.02)
    rates = {
        (group["orthogonalize"], p.ndim, group["lr"])
        for group in optimizer.param_groups
        for p in group["params"]
    }
    assert {(orthogonal, ndim) for orthogonal, ndim, _ in rates} == {(True, 4), (False, 2), (False, 1)}
    assert sorted({rate for _, _, rate in rates}) == pytest.approx([0.02, 0.05, 64 * 0.05])


@pytest.mark.parametrize("nesterov", [False, True])
def test_muon_is_torch_muon_and_sgd(nesterov: bool) -> None:
    """torch.optim.Muon accepts matrices: it gets each weight as one, in the order in which PyTorch flattens it."""
    ours, theirs = Net(), Net()
    decay = {"weight_decay": 0.1}
    optim = Optim(optimizer="muon", lr=0.05, momentum=0.8, nesterov=nesterov, sgd_lr=0.2, **decay)
    optimizer = build_optimizer(ours, optim)
    set_learning_rate(optimizer, optim.lr)
    filters = [p for p in theirs.parameters() if p.ndim == 4]
    matrices = [nn.Parameter(p.detach().flatten(1).clone()) for p in filters]
    momentum = {"momentum": 0.8, "nesterov": nesterov}
    muon = torch.optim.Muon(matrices, lr=0.05, **momentum, **decay)
    sgd = torch.optim.SGD(
        [
            {"params": [theirs.fc.weight], **decay},
            {"params": [p for p in theirs.parameters() if p.ndim == 1]},
        ],
        lr=0.2,
        **momentum,
    )
    for seed in range(4):
        ours.fill_gradients(seed)
        theirs.fill_gradients(seed)
        for matrix, p in zip(matrices, filters, strict=True):
            assert p.grad is not None
            matrix.grad = p.grad.flatten(1).clone()
        optimizer.step()
        muon.step()
        sgd.step()
    ours_by_name = dict(ours.named_parameters())
    for name, p in theirs.named_parameters():
        if p.ndim != 4:
            torch.testing.assert_close(ours_by_name[name], p)
    ours_4d = [p for p in ours.parameters() if p.ndim == 4]
    for matrix, p, start in zip(matrices, ours_4d, filters, strict=True):
        moved = (matrix - start.flatten(1)).norm()
        assert (p.flatten(1) - matrix).norm() < 0.04 * moved  # bfloat16 rounds differently in another order


def test_orthogonalized_matrices_have_singular_values_near_one() -> None:
    torch.manual_seed(0)
    for shape in ((3, 16, 144), (2, 32, 16)):
        values = torch.linalg.svdvals(orthogonalize(torch.randn(shape)).float())
        assert values.min() > 0.5
        assert values.max() < 1.3
    assert torch.equal(orthogonalize(torch.zeros(1, 4, 9)).float(), torch.zeros(1, 4, 9))


def test_muon_normalizes_weights_before_its_update_as_the_source_does() -> None:
    model = Net()
    before = copy.deepcopy(model)
    optim = Optim(
        optimizer="muon",
        lr=0.24,
        momentum=0.6,
        ns_steps=3,
        normalize_weights=True,
        sgd_lr=0.1,
        weight_decay=0.01,
    )
    optimizer = build_optimizer(model, optim)
    model.fill_gradients(0)
    optimizer.step()
    for new, old in zip(model.parameters(), before.parameters(), strict=True):
        if new.ndim == 4:
            # One step of the source: the momentum holds the gradient, and Nesterov adds 0.6 of it once more.
            matrix = (new.grad + 0.6 * new.grad).permute(0, 2, 3, 1).flatten(1)  # type: ignore[operator]
            update = orthogonalize(matrix[None], 3)[0].float().reshape(*new.permute(0, 2, 3, 1).shape)
            scaled = old * (len(old) ** 0.5 / old.norm())
            # The factor of a tall matrix is not the source's, whose net has none.
            rate = 0.24 * max(1, matrix.shape[0] / matrix.shape[1]) ** 0.5
            torch.testing.assert_close(new, scaled - rate * update.permute(0, 3, 1, 2), rtol=0, atol=6e-3)
    assert {g["weight_decay"] for g in optimizer.param_groups} == {0.0, 0.01}
    with pytest.raises(ValueError, match="normalize_weights=True is not read with optimizer='sgd'"):
        Optim(normalize_weights=True)


def test_the_rates_of_the_muon_job_move_logits_as_those_of_its_source() -> None:
    """The source sums the loss over 2,000 images, and divides the logits of a last layer of deviation 1 by 256."""
    recipe = load_recipe(JOBS / "cifar10_fast_muon.py")
    optim, ratio = recipe.optim, 9 / 256
    torch.manual_seed(0)
    features, labels = torch.randn(2000, 256).double(), torch.randint(0, 10, (2000,))
    theirs = nn.Linear(256, 10, bias=False).double()
    nn.init.normal_(theirs.weight)
    norm_bias = nn.Parameter(torch.randn(256).double())
    ours, our_bias = copy.deepcopy(theirs), copy.deepcopy(norm_bias)
    ours.weight.data *= ratio
    smoothing = {"label_smoothing": recipe.train.label_smoothing}
    source = torch.optim.SGD(
        [
            {"params": [norm_bias], "lr": 0.053, "weight_decay": 0.004 / 0.053},
            {"params": theirs.parameters(), "lr": 0.67, "weight_decay": 0.004 / 0.67},
        ],
        momentum=0.85,
        nesterov=True,
    )
    assert optim.sgd_lr is not None
    bias = {
        "lr": optim.sgd_lr * optim.bias_lr_scale,
        "weight_decay": optim.weight_decay / optim.bias_lr_scale,
    }
    head = {"lr": optim.sgd_lr, "weight_decay": optim.weight_decay}
    job = torch.optim.SGD(
        [{"params": [our_bias], **bias}, {"params": ours.parameters(), **head}],
        momentum=optim.sgd_momentum or 0,
        nesterov=optim.nesterov,
    )
    for _ in range(3):
        source.zero_grad()
        F.cross_entropy(theirs(features + norm_bias) / 256, labels, reduction="sum", **smoothing).backward()
        source.step()
        job.zero_grad()
        F.cross_entropy(ours(features + our_bias) / 9, labels, **smoothing).backward()
        job.step()
    torch.testing.assert_close(ours(features + our_bias) / 9, theirs(features + norm_bias) / 256)
    assert optim.bias_lr_scale == optim.whitening_bias_lr_scale
    # Beside the source's gain of a step: no convolution of the net is a tall matrix, whose rate would be raised.
    net = build_model(recipe.model.name, in_channels=3, num_classes=10)
    assert all(p.shape[0] <= p[0].numel() for p in net.parameters() if p.ndim == 4 and p.requires_grad)


def test_fewer_iterations_are_the_same_polynomial_applied_fewer_times() -> None:
    torch.manual_seed(0)
    start, (a, b, c) = torch.linspace(0.1, 1, 8), COEFFICIENTS
    matrices = torch.linalg.qr(torch.randn(1, 8, 8)).Q @ torch.diag(start)
    for ns_steps in (1, 3):
        values = start / start.norm()
        for _ in range(ns_steps):
            values = a * values + b * values**3 + c * values**5
        found = torch.linalg.svdvals(orthogonalize(matrices, ns_steps)[0].float())
        torch.testing.assert_close(found, values.sort(descending=True).values, rtol=0.05, atol=0.02)


def test_the_recipe_sets_the_iterations_of_muon_alone() -> None:
    updates = []
    for ns_steps in (3, 5):
        model = Net()
        optimizer = build_optimizer(model, Optim(optimizer="muon", lr=1, ns_steps=ns_steps, weight_decay=0))
        model.fill_gradients(0)
        optimizer.step()
        updates.append([p.detach().clone() for p in model.parameters()])
    same = [torch.equal(a, b) for a, b in zip(*updates, strict=True)]
    assert same == [p.ndim != 4 for p in updates[0]]
    with pytest.raises(ValueError, match="ns_steps=3 is not read with optimizer='sgd'"):
        Optim(ns_steps=3)


@pytest.mark.parametrize("name", ["lamb", "lars"])
def test_rates_of_layers_adapt_without_decay_too(name: str) -> None:
    """The norm of a layer's update is that of its weights, times the rate and (lars) the trust coefficient."""
    model = Net()
    fields = {"nesterov": False, "momentum": 0} if name == "lars" else {}
    optim = Optim.model_validate({"optimizer": name, "lr": 0.5, "weight_decay": 0, **fields})
    optimizer = build_optimizer(model, optim)
    before = copy.deepcopy(model)
    model.fill_gradients(0)
    optimizer.step()
    rate = 0.5 * (0.001 if name == "lars" else 1.0)
    for new, old in zip(model.parameters(), before.parameters(), strict=True):
        if new.ndim > 1:
            torch.testing.assert_close((new - old).norm(), rate * old.norm(), rtol=1e-4, atol=0)


def test_lamb_does_not_clip_by_itself() -> None:
    optimizer = build_optimizer(Net(), Optim(optimizer="lamb"))
    assert optimizer.defaults["max_grad_norm"] is None
    assert optimizer.defaults["eps"] == 1e-6
    assert build_optimizer(Net(), Optim(optimizer="adamw")).defaults["eps"] == 1e-8


def test_a_library_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm.optim", None)
    with pytest.raises(UserError, match=r"optim\.optimizer='lamb' comes from timm.*pip install timm"):
        build_optimizer(Net(), Optim(optimizer="lamb"))


def test_clip_norm_limits_the_gradient(digits_recipe: Recipe, tmp_path: Path) -> None:
    """Without momentum and decay, the first update is the gradient times the rate, so its norm shows the clipping."""
    plain = digits_recipe.with_overrides(
        ["optim.momentum=0", "optim.nesterov=false", "optim.weight_decay=0", "train.length=1 steps"]
    )
    start = dict(initial_state(plain, 10, World.single()).model.named_parameters())

    def length(overrides: list[str], folder: str) -> Tensor:
        recipe = plain.with_overrides([*overrides, "schedule.warmup=0 steps", "optim.lr=0.1"])
        run(recipe, tmp_path / folder)
        after = final_tensors(tmp_path / folder)
        steps = [after[f"model/{name}"] - p.detach() for name, p in start.items()]
        return torch.stack([step.norm() for step in steps]).norm() / 0.1

    free = length([], "free")
    assert free > 0.5
    torch.testing.assert_close(
        length(["optim.clip_norm=0.25"], "clipped"), torch.tensor(0.25), rtol=1e-4, atol=0
    )
    assert length(["optim.clip_norm=1e6"], "loose") == free


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_resumed_equals_uninterrupted_bitwise(digits_recipe: Recipe, tmp_path: Path, name: str) -> None:
    overrides = [f"optim.optimizer={name}", "train.ema_decay=0.9", "train.length=9 steps", *OPTIMIZERS[name]]
    recipe = digits_recipe.with_overrides(overrides)
    whole = run(recipe, tmp_path / "whole")
    assert 0 < whole["train/loss", 9] < 2.5
    run(recipe, tmp_path / "stopped", stop_after=2)
    run(recipe, tmp_path / "stopped", stop_after=4)
    run(recipe, tmp_path / "stopped")
    ours, theirs = final_tensors(tmp_path / "stopped"), final_tensors(tmp_path / "whole")
    assert ours.keys() == theirs.keys()
    assert [key for key in ours if not torch.equal(ours[key], theirs[key])] == []
    assert any(key.startswith("optimizer/groups.0/step") for key in ours) == (name == "lamb")
    assert any(key.endswith("conv1.weight/momentum_buffer") for key in ours) == (
        name in ("sgd", "lars", "muon")
    )
    assert any(key.endswith("conv1.weight/exp_avg_sq") for key in ours) == (name in ("adamw", "lamb"))


def test_each_optimizer_is_another_one(digits_recipe: Recipe, tmp_path: Path) -> None:
    recipe = digits_recipe.with_overrides(["train.length=2 steps", "optim.lr=0.01"])
    weights = []
    for name in OPTIMIZERS:
        run(recipe.with_overrides([f"optim.optimizer={name}"]), tmp_path / name)
        weights.append(final_tensors(tmp_path / name)["model/fc.weight"])
    assert len({tuple(w.flatten().tolist()) for w in weights[:-1]}) == 4
    # SGD updates the linear layer of muon too, but after the first step its input comes from other convolutions.
    assert not torch.equal(weights[0], weights[-1])


def test_muon_skips_parameters_without_a_gradient() -> None:
    model = Net()
    optimizer = build_optimizer(model, Optim(optimizer="muon"))
    before = copy.deepcopy(model.state_dict())
    optimizer.step()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
