"""Step zero: weights from a file, a run or torchvision, the whitening layer, and blocks dropped by identity."""

from __future__ import annotations

import itertools
import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torchvision.models import get_model

from resnet_dist.config import Recipe, WorkerRange
from resnet_dist.data.shards.index import read_index
from resnet_dist.driver.preflight import check_data, check_recipe, resolve_paths
from resnet_dist.errors import RecipeError, UserError
from resnet_dist.model import MODELS, ResNet, build_model, whitening_filters
from resnet_dist.model.table import FastArchitecture
from resnet_dist.train import loop
from resnet_dist.train.checkpoint.folder import read_checkpoint
from resnet_dist.train.checkpoint.load import load_model
from resnet_dist.train.start import init_from as weights
from resnet_dist.train.start import initial
from resnet_dist.train.start.initial import build, check_init_from, initial_state, initialize_weights
from resnet_dist.train.step.block_drops import block_scales
from resnet_dist.world import World
from tests.paths import list_checkpoints
from tests.reporter import RecordingReporter
from tests.train.runs import Recorder, assert_same, final_tensors, run
from tests.train.test_elastic import curve

WORLD = World.single()


def initialized(recipe: Recipe, num_classes: int = 10) -> tuple[torch.nn.Module, list[str]]:
    notes: list[str] = []
    state = initial_state(recipe, num_classes, WORLD)
    initialize_weights(state, recipe, read_index(recipe.data.train), WORLD, notes.append)
    return state.model, notes


@pytest.fixture
def source(digits_recipe: Recipe) -> torch.nn.Module:
    """A resnet8 for digits, drawn from another seed."""
    return build(digits_recipe.with_overrides(["seed=9"]), 10)


@pytest.mark.parametrize("kind", ["safetensors", "pth", "nested", "wrapped"])
def test_files_of_weights(digits_recipe: Recipe, source: torch.nn.Module, tmp_path: Path, kind: str) -> None:
    state = {name: value.contiguous() for name, value in source.state_dict().items()}
    path = tmp_path / ("weights.safetensors" if kind == "safetensors" else "weights.pth")
    if kind == "safetensors":
        save_file(state, path)
    elif kind == "pth":
        torch.save(state, path)
    elif kind == "nested":
        torch.save({"model": state, "epoch": 3}, path)
    else:
        torch.save({"state_dict": {f"module._orig_mod.{name}": v for name, v in state.items()}}, path)
    recipe = digits_recipe.with_overrides([f"model.init_from={path}"])
    check_init_from(recipe, 10)
    model, notes = initialized(recipe)
    assert notes == [f"model.init_from={path}: 47 of 47 tensors fit"]
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in state.items())


def test_fine_tuning_of_a_run_with_other_classes(digits_recipe: Recipe, tmp_path: Path) -> None:
    short = digits_recipe.with_overrides(["train.length=3 steps"])
    loop.train(short, tmp_path / "first", WORLD, Recorder())
    trained = load_model(tmp_path / "first", WORLD.device).model.state_dict()
    checkpoint = list_checkpoints(tmp_path / "first/checkpoints")[-1]
    for folder in (tmp_path / "first", checkpoint):
        recipe = short.with_overrides([f"model.init_from={folder}"])
        check_init_from(recipe, 7)
        model, (note,) = initialized(recipe, num_classes=7)
        assert "45 of 47 tensors fit; wrong shape: fc.weight (10, 64), the model has (7, 64), fc.bias" in note
        own = model.state_dict()
        assert own["fc.weight"].shape == (7, 64)
        body = [name for name in own if not name.startswith("fc.") and "num_batches" not in name]
        assert all(torch.equal(own[name], trained[name]) for name in body)


def test_a_resumed_run_reads_its_checkpoint_and_not_the_file(
    digits_recipe: Recipe, source: torch.nn.Module, tmp_path: Path
) -> None:
    path = tmp_path / "weights.pth"
    torch.save(source.state_dict(), path)
    recipe = digits_recipe.with_overrides([f"model.init_from={path}", "train.length=10 steps"])
    whole = Recorder()
    loop.train(recipe, tmp_path / "whole", WORLD, whole)
    assert whole.notes == [f"model.init_from={path}: 47 of 47 tensors fit"]
    calls = iter(range(100))
    loop.train(recipe, tmp_path / "stopped", WORLD, Recorder(), lambda: next(calls) == 5)
    path.unlink()
    resumed = Recorder()
    loop.train(recipe, tmp_path / "stopped", WORLD, resumed)
    assert resumed.notes == ["resumed at step 6 of 10"]
    assert_same(tmp_path / "stopped", tmp_path / "whole")
    loop.train(digits_recipe.with_overrides(["train.length=10 steps"]), tmp_path / "new", WORLD, Recorder())
    theirs, ours = final_tensors(tmp_path / "new"), final_tensors(tmp_path / "whole")
    assert not torch.equal(theirs["model/conv1.weight"], ours["model/conv1.weight"])


class Code:
    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(Path(__file__).with_name("made-by-a-pickle")),)


def test_weights_that_cannot_be_used(digits_recipe: Recipe, source: torch.nn.Module, tmp_path: Path) -> None:
    def refused(location: object) -> str:
        recipe = digits_recipe.with_overrides([f"model.init_from={location}"])
        with pytest.raises(UserError) as caught:
            check_init_from(recipe, 10)
        assert "\n" not in str(caught.value)
        with pytest.raises(UserError) as again:
            initialized(recipe)
        assert str(again.value).split(" could not")[0][:60] == str(caught.value)[:60]
        return str(caught.value)

    (tmp_path / "code.pth").write_bytes(pickle.dumps({"weight": Code()}))
    torch.save({"weight": Code()}, tmp_path / "zip.pth")
    torch.save({"epoch": 3}, tmp_path / "empty.pth")
    torch.save(torch.zeros(3), tmp_path / "tensor.pt")
    (tmp_path / "text.pth").write_text("not weights")
    (tmp_path / "text.safetensors").write_text("not weights")
    torch.save(build_model("resnet20", in_channels=1, num_classes=10).state_dict(), tmp_path / "twenty.pth")
    torch.save(build_model("wrn16_4", in_channels=1, num_classes=10).state_dict(), tmp_path / "wide.pth")
    assert "no such file or folder; give a .pth, .pt or" in refused(tmp_path / "nowhere.pth")
    assert "a run folder holds checkpoints/" in refused(tmp_path)
    for name in ("code.pth", "zip.pth", "text.pth"):
        assert "cannot be read as tensors alone" in refused(tmp_path / name)
    assert not Path(__file__).with_name("made-by-a-pickle").exists()
    for name in ("empty.pth", "tensor.pt"):
        assert "holds no state dict" in refused(tmp_path / name)
    assert "cannot be read as safetensors" in refused(tmp_path / "text.safetensors")
    assert "is another network: it has 100% of the model, and the model 28% of it (47 of 47" in refused(
        tmp_path / "twenty.pth"
    )
    assert "is another network: it has 0% of the model" in refused(tmp_path / "wide.pth")


def test_names_of_torchvision_are_checked_without_a_download(
    digits_recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: object, **options: object) -> None:
        raise OSError("no network")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", refuse)
    recipe = digits_recipe.with_overrides(["data.channels=3", "data.mean=[0,0,0]", "data.std=[1,1,1]"])
    fitting = recipe.with_overrides(
        ["model.name=resnet50", "model.init_from=torchvision:resnet50.IMAGENET1K_V2"]
    )
    check_init_from(fitting, 10)
    with pytest.raises(UserError, match=r"resnet50\.IMAGENET1K_V2' could not be downloaded: no network"):
        initialized(fitting)
    for location, message in (
        ("torchvision:resnet50", "weights of resnet50 are IMAGENET1K_V1, IMAGENET1K_V2"),
        ("torchvision:resnet50.V2", "weights of resnet50 are IMAGENET1K_V1, IMAGENET1K_V2"),
        ("torchvision:resnet51.V2", "torchvision has no model 'resnet51'"),
        ("torchvision:resnet18.IMAGENET1K_V1", "is another network"),
    ):
        with pytest.raises(UserError, match=message):
            check_init_from(fitting.with_overrides([f"model.init_from={location}"]), 10)


def test_torchvision_weights_are_renamed(digits_recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = get_model("resnet18").state_dict()
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", lambda *_, **__: theirs)
    source = "torchvision:resnet18.IMAGENET1K_V1"
    assert torch.equal(weights.read_weights(source)["stages.3.1.bn2.weight"], theirs["layer4.1.bn2.weight"])


def test_paths_are_resolved_and_names_are_not(digits_recipe: Recipe, tmp_path: Path) -> None:
    def resolved(source: str) -> str | None:
        recipe = digits_recipe.with_overrides([f"model.init_from={source}"])
        return resolve_paths(recipe, tmp_path).model.init_from

    assert resolved("weights.pth") == str(Path("weights.pth").absolute())
    assert resolved("{output}/runs/first") == f"{tmp_path}/runs/first"
    assert resolved("torchvision:resnet18.IMAGENET1K_V1") == "torchvision:resnet18.IMAGENET1K_V1"
    assert resolve_paths(digits_recipe, tmp_path).model.init_from is None


def test_impossible_models_are_recipe_errors(digits_recipe: Recipe) -> None:
    for override, message in (
        ("model.zero_init=true", "model.zero_init=true with model.shortcut='none'"),
        ("model.name=resnet9_fast", "model.shortcut='none': resnet9_fast is a fixed net"),
    ):
        with pytest.raises(RecipeError, match=message):
            check_recipe(
                digits_recipe.with_overrides(["model.shortcut=none", override]), WorkerRange.exactly(1)
            )
    for override in ("model.stem=big", "model.stochastic_depth=1", "model.shortcut=some"):
        with pytest.raises(RecipeError, match=override.split("=")[0]):
            digits_recipe.with_overrides([override])


@pytest.mark.parametrize(
    ("overrides", "workers", "message"),
    [
        (["data.image_size=32", "data.eval_size=8", "model.name=resnet9_fast"], 1, "8 pixels are too few"),
        (
            ["data.image_size=32", 'data.train_sizes=[["0 epochs", 8]]', "model.name=resnet9_fast"],
            1,
            "8 pixels are too few .*data.train_sizes",
        ),
        (["model.name=resnet18", "data.global_batch_size=8", "data.micro_batch_size=1"], 1, "down to 1x1"),
        (
            ["model.name=resnet18", "data.global_batch_size=8", "data.micro_batch_size=none"],
            8,
            "down to 1x1, and a forward pass has one image",
        ),
    ],
)
def test_images_that_are_too_small_for_the_net_are_refused(
    digits_recipe: Recipe, overrides: list[str], workers: int, message: str
) -> None:
    recipe = digits_recipe.with_overrides(overrides)
    with pytest.raises(RecipeError, match=message):
        check_recipe(recipe, WorkerRange.exactly(workers))
    check_recipe(recipe.with_overrides(["model.name=resnet8"]), WorkerRange.exactly(workers))
    if workers > 1:  # a batch norm over all ranks sees several images
        check_recipe(recipe.with_overrides(["train.sync_batch_norm=true"]), WorkerRange.exactly(workers))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.best_metric=eval/top5", "with 5 classes"),
        (
            "train.ema_every=25 steps",
            "train.ema_every='25 steps' is 25 steps, more than the 24 of train.length",
        ),
    ],
)
def test_what_does_not_suit_the_data_is_refused_at_the_start(
    digits_recipe: Recipe, tmp_path: Path, override: str, message: str
) -> None:
    folders = []
    for part in ("train", "eval"):
        shutil.copytree(Path(getattr(digits_recipe.data, part)), tmp_path / part)
        path = tmp_path / part / "index.json"
        index = json.loads(path.read_text())
        path.write_text(json.dumps({**index, "classes": index["classes"][:5]}))
        folders.append(f"data.{part}={tmp_path / part}")
    recipe = digits_recipe.with_overrides([*folders, "train.ema_decay=0.9"])
    reporter = RecordingReporter()
    check_data(recipe, reporter, is_new=True)
    assert reporter.notes == []
    with pytest.raises(RecipeError, match=message):
        check_data(recipe.with_overrides([override]), reporter, is_new=True)


def test_a_warmup_that_is_longer_than_the_run_is_reported(digits_recipe: Recipe) -> None:
    """It is not refused: two steps of any recipe are a dry run."""
    reporter = RecordingReporter()
    check_data(digits_recipe, reporter, is_new=True)
    assert reporter.notes == []
    check_data(digits_recipe.with_overrides(["train.length=21 steps"]), reporter, is_new=True)
    assert reporter.notes == [
        "schedule.warmup='2 epochs' is longer than train.length='21 steps': the rate does not reach optim.lr"
    ]


def test_what_a_run_ends_before_and_what_nothing_reads_is_reported(digits_recipe: Recipe) -> None:
    reporter = RecordingReporter()
    steps = ["schedule.decay=step", 'schedule.milestones=["50 percent", "24 steps", "3 epochs"]']
    check_data(
        digits_recipe.with_overrides(
            [*steps, "optim.nesterov=false", "optim.sgd_momentum=0", "train.length=24 steps"]
        ),
        reporter,
        is_new=True,
    )
    assert reporter.notes == [
        "optim.sgd_momentum=0.0 is not read with optim.optimizer='sgd', only with 'muon'",
        "schedule.milestones: '24 steps', '3 epochs' are not before the end of train.length='24 steps': the rate does not "
        "fall there",
    ]


LENGTHS = ["train.length=14 steps", "train.log_every=1 steps", "train.eval_every=7 steps"]


@pytest.fixture
def fast_recipe(digits_recipe: Recipe) -> Recipe:
    return digits_recipe.with_overrides(
        [*LENGTHS, "model.name=resnet9_fast", "data.image_size=12", "data.micro_batch_size=64"]
    )


def test_the_whitening_layer_is_the_same_on_any_number_of_ranks(fast_recipe: Recipe, tmp_path: Path) -> None:
    model, notes = initialized(fast_recipe)
    again, _ = initialized(fast_recipe.with_overrides(["data.cache=ram", "data.crop=pad-crop"]))
    drawn = initial_state(fast_recipe, 10, WORLD).model
    assert notes == []
    assert torch.equal(model.whitening.weight, again.whitening.weight)
    assert not torch.equal(model.whitening.weight, drawn.whitening.weight)
    one = curve(1, fast_recipe, tmp_path / "1")
    assert curve(2, fast_recipe, tmp_path / "2") == pytest.approx(one, rel=1e-4)
    for folder in (tmp_path / "1", tmp_path / "2"):
        assert torch.equal(final_tensors(folder)["model/whitening.weight"], model.whitening.weight)


def test_the_whitening_layer_is_computed_from_as_many_images_as_are_stated(
    fast_recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(initial, "WHITENING_IMAGES", 200)
    index = read_index(fast_recipe.data.train)
    images = torch.cat(list(initial.plain_images(fast_recipe.data, index, WORLD)))
    assert len(images) == 200
    for kind in ("covariance", "second-moment"):
        model, _ = initialized(fast_recipe.with_overrides([f"model.whitening={kind}"]))
        assert torch.equal(model.whitening.weight, whitening_filters([images], kind))


BIAS = "model/whitening.bias"


@pytest.mark.parametrize("decay", ["none", pytest.param("linear", marks=pytest.mark.long)])
def test_the_bias_of_whitening_stands_still_after_its_time_across_restarts_too(
    fast_recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, decay: str
) -> None:
    monkeypatch.setitem(
        MODELS, "resnet9_fast", FastArchitecture((8, 8, 8))
    )  # narrow: its checkpoints are small
    recipe = fast_recipe.with_overrides(
        [
            *("train.length=4 steps", "schedule.warmup=0 steps", "train.checkpoint_every=1 steps"),
            *("train.keep_checkpoints=9", "optim.decay_norms=true", "data.image_size=9"),
            *("data.global_batch_size=32", "data.micro_batch_size=32", "train.eval_every=0 steps"),
            *("schedule.whitening_bias=2 steps", f"schedule.whitening_bias_decay={decay}"),
        ]
    )
    run(recipe, tmp_path / "whole")
    read = [read_checkpoint(place)[0]["model"] for place in list_checkpoints(tmp_path / "whole/checkpoints")]
    biases, others = ([one[name].clone() for one in read] for name in ("whitening.bias", "fc.weight"))
    assert len(biases) == 4
    assert [torch.equal(a, b) for a, b in itertools.pairwise(biases)] == [False, True, True]
    assert not any(torch.equal(a, b) for a, b in itertools.pairwise(others))
    run(recipe, tmp_path / "stopped", stop_after=1)
    run(recipe, tmp_path / "stopped")
    assert_same(tmp_path / "stopped", tmp_path / "whole")
    run(
        recipe.with_overrides(["schedule.whitening_bias=none", "schedule.whitening_bias_decay=none"]),
        tmp_path / "free",
    )
    assert not torch.equal(final_tensors(tmp_path / "free")[BIAS], final_tensors(tmp_path / "whole")[BIAS])


@pytest.mark.parametrize("field", ["schedule.whitening_bias='3 steps'", "optim.whitening_bias_lr_scale=2.0"])
def test_fields_of_whitening_need_a_whitening_layer(
    digits_recipe: Recipe, fast_recipe: Recipe, field: str
) -> None:
    override = field.replace("'", "")
    check_recipe(fast_recipe.with_overrides([override]), WorkerRange.exactly(1))
    with pytest.raises(
        RecipeError, match=f"^{field}: resnet8 has no whitening layer; leave it out, or use model.name="
    ):
        check_recipe(digits_recipe.with_overrides([override, "model.name=resnet8"]), WorkerRange.exactly(1))


@pytest.fixture
def dropping_recipe(digits_recipe: Recipe, source: torch.nn.Module, tmp_path: Path) -> Recipe:
    torch.save(source.state_dict(), tmp_path / "weights.pth")
    return digits_recipe.with_overrides(
        [
            *LENGTHS,
            "model.stochastic_depth=0.5",
            f"model.init_from={tmp_path}/weights.pth",
            "data.micro_batch_size=64",
        ]
    )


def test_ranks_and_restarts_begin_from_the_same_weights_and_drop_the_same_blocks(
    dropping_recipe: Recipe, tmp_path: Path
) -> None:
    one = curve(1, dropping_recipe, tmp_path / "one")
    assert curve(2, dropping_recipe, tmp_path / "two") == pytest.approx(one, rel=1e-4)
    undropped = dropping_recipe.with_overrides(["model.stochastic_depth=0"])
    assert curve(1, undropped, tmp_path / "none") != pytest.approx(one, rel=1e-2)
    calls = iter(range(100))
    loop.train(dropping_recipe, tmp_path / "stopped", WORLD, Recorder(), lambda: next(calls) == 5)
    torch.manual_seed(123)  # the generator of the process does not matter
    loop.train(dropping_recipe, tmp_path / "stopped", WORLD, Recorder())
    assert_same(tmp_path / "stopped", tmp_path / "one")


def test_scales_belong_to_seed_step_and_place(dropping_recipe: Recipe) -> None:
    model = build(dropping_recipe, 10)
    assert isinstance(model, ResNet)

    def scales(places: range, *, seed: int = 0, step: int = 3) -> torch.Tensor:
        return block_scales(model, seed=seed, step=step, places=places, device=WORLD.device)[0]

    whole = scales(range(128))
    assert whole.shape == (128, 3)
    assert torch.equal(torch.cat([scales(range(32)), scales(range(32, 128))]), whole)
    assert not torch.equal(scales(range(128), step=4), whole)
    assert not torch.equal(scales(range(128), seed=1), whole)
    dropped = (whole == 0).float().mean(dim=0)
    assert dropped.tolist() == pytest.approx([1 / 6, 2 / 6, 3 / 6], abs=0.1)
    rest = build_model("resnet8", in_channels=1, num_classes=10)
    assert block_scales(rest, seed=0, step=0, places=range(4), device=WORLD.device) == ()


def test_a_checkpoint_holds_the_options_of_its_model(digits_recipe: Recipe, tmp_path: Path) -> None:
    overrides = ["model.se=true", "model.blurpool=true", "model.zero_init=true", "model.stem=deep"]
    recipe = digits_recipe.with_overrides([*overrides, "train.length=2 steps"])
    loop.train(recipe, tmp_path, WORLD, Recorder())
    model = load_model(tmp_path, WORLD.device).model
    assert model.stages[0][0].se.fc1.out_features == 1  # type: ignore[index, union-attr]
    trained = final_tensors(tmp_path)
    assert all(torch.equal(value, trained[f"model/{name}"]) for name, value in model.state_dict().items())


def test_a_checkpoint_from_before_the_options_still_loads(digits_recipe: Recipe, tmp_path: Path) -> None:
    loop.train(digits_recipe.with_overrides(["train.length=2 steps"]), tmp_path, WORLD, Recorder())
    path = list_checkpoints(tmp_path / "checkpoints")[-1] / "checkpoint.json"
    manifest = json.loads(path.read_text())
    del manifest["manifest_sha256"]
    manifest["recipe"]["model"] = {"name": "resnet8", "shortcut": "projection"}
    path.write_text(json.dumps(manifest))
    assert load_model(tmp_path, WORLD.device).recipe.model == digits_recipe.model
    assert loop.train(
        digits_recipe.with_overrides(["train.length=2 steps"]), tmp_path, WORLD, Recorder()
    ).finished
