"""`train.deterministic`: the switches of CUDA that it sets, and no operation that CUDA has in no deterministic form."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from resnet_dist.config import Recipe
from resnet_dist.errors import RecipeError, TrainingError
from resnet_dist.launch.attempt import Attempt
from resnet_dist.launch.rank import run_attempt
from resnet_dist.runs.folder import RunFolder
from resnet_dist.runs.storage.open import open_storage
from resnet_dist.train import loop, parts
from resnet_dist.train.device import (
    CUBLAS_VARIABLE,
    OWN_MARK,
    choose_kernels,
    explain_nondeterminism,
    prepare_device,
)
from resnet_dist.train.tracker import NullTracker
from resnet_dist.world import World
from tests.train.runs import assert_same, run

GPU = World(0, 0, 1, torch.device("cuda"))
# What torch's documentation of use_deterministic_algorithms lists for CUDA, as names of ATen operations.
REFUSED = (
    *("avg_pool3d_backward", "_adaptive_avg_pool2d_backward", "_adaptive_avg_pool3d_backward"),
    *("adaptive_max_pool2d_backward", "fractional_max_pool2d_backward", "fractional_max_pool3d_backward"),
    *("max_unpool2d", "max_unpool3d", "reflection_pad1d_backward", "reflection_pad2d_backward"),
    *("upsample_linear1d_backward", "upsample_bilinear2d_backward", "upsample_bicubic2d_backward"),
    *("_upsample_bilinear2d_aa_backward", "_upsample_bicubic2d_aa_backward", "nll_loss2d_forward"),
    *(
        "_ctc_loss_backward",
        "put_",
        "histc",
        "bincount",
        "median",
        "scatter_reduce",
        "grid_sampler_2d_backward",
    ),
)


class Recorded(TorchDispatchMode):
    """Records the names of the operations that run inside."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.names.add(func.name().removeprefix("aten::").partition(".")[0])
        return func(*args, **(kwargs or {}))


@pytest.fixture(autouse=True)
def _restored(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in (CUBLAS_VARIABLE, OWN_MARK):
        monkeypatch.setenv(name, "")  # so that it is restored
        monkeypatch.delenv(name)
    precision, filled = (
        torch.get_float32_matmul_precision(),
        torch.utils.deterministic.fill_uninitialized_memory,
    )
    cudnn = torch.backends.cudnn
    before = cudnn.benchmark, cudnn.deterministic, cudnn.allow_tf32
    yield
    cudnn.benchmark, cudnn.deterministic, cudnn.allow_tf32 = before
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = filled
    torch.set_float32_matmul_precision(precision)


def test_the_switches_follow_the_field_and_back(digits_recipe: Recipe) -> None:
    on = digits_recipe.with_overrides(["train.deterministic=true"]).train
    prepare_device(on, GPU)
    assert os.environ[CUBLAS_VARIABLE] == ":4096:8"
    assert torch.are_deterministic_algorithms_enabled()
    assert torch.backends.cudnn.deterministic
    assert not torch.backends.cudnn.benchmark
    prepare_device(digits_recipe.train, GPU)  # the next run of a study
    assert not torch.are_deterministic_algorithms_enabled()
    assert not torch.backends.cudnn.deterministic
    assert torch.backends.cudnn.benchmark


def test_a_workspace_of_the_shell_is_kept_or_refused(
    digits_recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    on = digits_recipe.with_overrides(["train.deterministic=true"]).train
    monkeypatch.setenv(CUBLAS_VARIABLE, ":16:8")
    prepare_device(on, GPU)
    assert os.environ[CUBLAS_VARIABLE] == ":16:8"
    monkeypatch.setenv(CUBLAS_VARIABLE, ":4096:2")
    with pytest.raises(RecipeError, match=r"CUBLAS_WORKSPACE_CONFIG=:4096:8 or :16:8, and it is ':4096:2'"):
        prepare_device(on, GPU)
    prepare_device(digits_recipe.train, GPU)  # Nothing else reads it.


@pytest.mark.parametrize(
    "overrides",
    [
        ["model.name=resnet8", "model.stochastic_depth=0.2", "data.mixup=0.2", "train.ema_decay=0.9"],
        ["model.name=resnet9_fast", "data.image_size=12", "optim.optimizer=muon", "data.cutmix=1"],
        ["model.name=resnet18", "data.image_size=32", "model.stem=imagenet", "train.loss=bce"],
        ["model.name=resnet8", "model.se=true", "model.blurpool=true", "model.shortcut=pool-projection"],
    ],
    ids=["cifar", "fast", "imagenet", "variants"],
)
def test_training_uses_no_operation_that_would_be_refused(
    digits_recipe: Recipe, tmp_path: Path, overrides: list[str]
) -> None:
    recipe = digits_recipe.with_overrides(
        [*overrides, "data.erase=0.5", "train.log_gradient_norms=true", "train.length=1 steps"]
    )
    with Recorded() as recorded:
        loop.train(recipe, tmp_path, World.single(), NullTracker())
    assert "convolution_backward" in recorded.names  # The backward pass was seen.
    assert recorded.names & set(REFUSED) == set()


def test_on_a_cpu_the_field_changes_nothing(digits_recipe: Recipe, tmp_path: Path) -> None:
    short = digits_recipe.with_overrides(["train.length=3 steps"])
    run(short, tmp_path / "plain")
    run(short.with_overrides(["train.deterministic=true"]), tmp_path / "deterministic")
    assert_same(tmp_path / "plain", tmp_path / "deterministic")


def test_an_operation_without_a_deterministic_form_is_named(
    digits_recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*arguments: object) -> None:
        torch.use_deterministic_algorithms(True)
        torch.zeros(2).put_(torch.tensor([0]), torch.ones(1))

    monkeypatch.setattr(parts, "restore_or_initialize", refused)
    folder = RunFolder(open_storage(tmp_path), "x", None, 1, {})
    folder.write()
    with pytest.raises(
        TrainingError, match=r"^train.deterministic=True: put_ of torch .* use train.deterministic=false$"
    ):
        run_attempt(Attempt.of(digits_recipe, folder, cpus=1), World.single())
    assert explain_nondeterminism(RuntimeError("something else")) is None


def test_the_workspace_is_taken_back_unless_a_person_set_it(monkeypatch: pytest.MonkeyPatch) -> None:
    choose_kernels(deterministic=True)
    choose_kernels(deterministic=True)  # The next trial of a study.
    assert os.environ[CUBLAS_VARIABLE] == ":4096:8"
    choose_kernels(deterministic=False)
    assert CUBLAS_VARIABLE not in os.environ
    monkeypatch.setenv(CUBLAS_VARIABLE, ":16:8")
    choose_kernels(deterministic=True)
    choose_kernels(deterministic=False)
    assert os.environ[CUBLAS_VARIABLE] == ":16:8"
