"""Recipes: one value, validated, JSON both ways; a mistake is explained in one sentence."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from resnet_dist.config import (
    Data,
    Recipe,
    Schedule,
    Train,
    check_classes,
    check_world_size,
    load_recipe,
    steps_of,
)
from resnet_dist.config.unread import unread_fields
from resnet_dist.errors import RecipeError


def make(**data: object) -> Recipe:
    fields = {"train": "a", "eval": "b", "image_size": 8, "global_batch_size": 32, **data}
    return Recipe(name="x", data=Data.model_validate(fields), train=Train(length="2 epochs"))


@given(st.integers(0, 2**32 - 1), st.floats(1e-6, 1e6), st.text(max_size=30), st.booleans())
def test_json_both_ways(seed: int, lr: float, text: str, flip: bool) -> None:
    recipe = make(flip=flip).with_overrides([f"seed={seed}", f"optim.lr={lr!r}"])
    recipe = recipe.model_copy(update={"description": text})
    again = Recipe.from_json(recipe.to_json())
    assert again == recipe
    assert again.digest() == recipe.digest()
    assert again.optim.lr == lr


def test_overrides_are_typed_and_validated() -> None:
    recipe = make().with_overrides(
        ["optim.lr=0.2", "data.micro_batch_size=8", "data.flip=true", "data.mean=[0,0,0]", "name=123"]
    )
    assert recipe.optim.lr == 0.2
    assert recipe.data.micro_batches == 4
    assert recipe.data.flip is True
    assert recipe.data.mean == (0, 0, 0)
    assert recipe.name == "123"
    assert recipe.with_overrides(["data.micro_batch_size=none"]).data.micro_batch_size is None
    worded = recipe.with_overrides(["model.shortcut=none", "data.crop=none", "model.init_from=none"])
    assert (worded.model.shortcut, worded.data.crop, worded.model.init_from) == ("none", "none", None)
    assert recipe.digest() != make().digest()


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("data.global_batchsize=1", "did you mean data.global_batch_size?"),
        ("lr=0.1", "did you mean optim.lr?"),
        ("optim.learning_rate=1", "did you mean optim.lr?"),
        ("batch_size=1", "did you mean data.global_batch_size?"),
        ("optim.whatever=1", "known are optim.optimizer, optim.lr, "),
        ("optim=1", "not a field of the recipe, but a part of it; its fields are optim.optimizer, "),
        ("name=a/b", "name='a/b': use letters, digits, '.', '_' and '-'"),
        ("nonsense", "must be KEY=VALUE"),
        ("optim.lr=fast", "optim.lr='fast'"),
        ("optim.lr=-1", "optim.lr=-1: input should be greater than 0"),
        ("optim.lr=NaN", "optim.lr"),
        ("data.lanes=5", "global_batch_size=32 is not a multiple of lanes=5; use lanes from [1, 2, 4"),
        ("data.micro_batch_size=5", "use one of [1, 2, 4, 8, 16, 32]"),
        ("data.micro_batch_size=2", "use one of [4, 8, 16, 32]"),
        ("data.channels=1", "one per channel"),
        ("data.std=[1,0,1]", "greater than zero"),
        ("train.length=10 lightyears", "'10 epochs'"),
        ("train.precision=fp8", "'fp32', 'bf16' or 'fp16'"),
        ("optim.momentum=0", "nesterov=True needs momentum greater than 0"),
        (
            "optim.betas=[0.9,0.99]",
            "betas=(0.9, 0.99) is not read with optimizer='sgd', only with 'adamw' or 'lamb'",
        ),
        ("optim.eps=1e-6", "eps=1e-06 is not read with optimizer='sgd'"),
        ("optim.trust_coefficient=0.01", "is not read with optimizer='sgd', only with 'lars'"),
        ("optim.sgd_lr=0.1", "only with 'muon'"),
        ("optim.sgd_momentum=0.5", "only with 'muon'"),
        ("optim.optimizer=adam", "optim.optimizer='adam'"),
        ("optim.clip_norm=0", "optim.clip_norm=0"),
        ("schedule.milestones='1 epochs'", "schedule.milestones"),
        ('schedule.milestones=["1 epochs"]', "is not read with decay='cosine', only with 'step'"),
        ("schedule.decay=step", 'needs milestones, such as ["50 percent", "75 percent"]'),
        ("schedule.gamma=0.5", "gamma=0.5 is not read with decay='cosine'"),
        ("schedule.power=2", "power=2.0 is not read with decay='cosine', only with 'polynomial'"),
        ("schedule.warmup_shape=constant", "needs warmup_start greater than 0"),
        ("schedule.warmup_start=2", "schedule.warmup_start=2"),
        ("train.length=50 percent", "percent of itself; use epochs, steps or samples"),
        ("train.bce_target_threshold=0.2", "is not read with loss='cross-entropy', only with 'bce'"),
        ("train.ema_decay=1", "train.ema_decay=1"),
        ("train.compile=fast", "'none', 'default', 'reduce-overhead' or 'max-autotune'"),
        ("name=../x", "name='../x'"),
        ("train.length=0 epochs", "length='0 epochs': nothing would be trained"),
        ("data.pad=2", "pad=2 is not read with crop='none', only with 'pad-crop'"),
        ("data.policy_ops=3", "policy_ops=3 is not read with policy='none', only with 'rand-augment'"),
        ("data.policy_magnitude=3", "policy_magnitude=3 is not read with policy='none'"),
        ("data.train_size_curve=linear", "train_size_curve='linear' is not read without train_sizes"),
        ("train.ema_every=2 steps", "ema_every='2 steps' is not read without ema_decay"),
        ("train.ema_rise=3", "ema_rise=3.0 is not read without ema_decay; leave it out, or set ema_decay"),
        ("train.ema_replaces=true", "ema_replaces=True is not read without ema_decay"),
        (
            "data.eval_shift=8",
            "eval_shift=8 needs an image of more than 8 pixels, and image_size=8; use a smaller",
        ),
        ("data.eval_shift=-1", "data.eval_shift=-1: input should be greater than or equal to 0"),
        (
            "data.eval_confidence=0.9",
            "eval_confidence=0.9 is not read without eval_flip or eval_shift; leave it",
        ),
        ("data.eval_confidence=1.5", "data.eval_confidence=1.5: input should be less than or equal to 1"),
        ("model.norm_eps=0", "model.norm_eps=0: input should be greater than 0"),
        ("model.whitening=zca", "model.whitening='zca': input should be 'covariance' or 'second-moment'"),
        ("schedule.whitening_bias=3", "schedule.whitening_bias"),
        ("schedule.whitening_bias_decay=linear", "is not read without whitening_bias"),
        (
            "optim.normalize_weights=true",
            "normalize_weights=True is not read with optimizer='sgd', only with 'muon'",
        ),
        ("train.ema_warmup=false", "ema_warmup=False is not read without ema_decay; leave it out"),
        (
            "schedule.warmup_at_start=true",
            "warmup_at_start=True is not read with warmup='0 steps'; leave it out, or set warmup",
        ),
    ],
)
def test_a_mistake_is_one_sentence(override: str, words: str) -> None:
    with pytest.raises(RecipeError) as caught:
        make().with_overrides([override])
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_fields_that_another_choice_does_not_read() -> None:
    """Off and the default are no settings: another optimizer can be asked for with one override."""
    slow = make().with_overrides(["optim.nesterov=false", "optim.momentum=0", "schedule.floor=0.1"])
    assert slow.with_overrides(["optim.optimizer=adamw"]).optim.momentum == 0
    assert slow.with_overrides(["optim.optimizer=lars"]).optim.nesterov is False
    for optimizer in ("adamw", "lamb"):
        make().with_overrides([f"optim.optimizer={optimizer}", "optim.betas=[0.9,0.95]", "optim.eps=1e-5"])
    with pytest.raises(RecipeError, match=r"momentum=0\.8 is not read with optimizer='adamw'"):
        make().with_overrides(["optim.optimizer=adamw", "optim.momentum=0.8"])
    with pytest.raises(RecipeError, match=r"nesterov=True needs sgd_momentum"):
        make().with_overrides(["optim.optimizer=muon", "optim.sgd_momentum=0"])
    with pytest.raises(RecipeError, match=r"floor=0\.1 is not read with decay='constant'"):
        slow.with_overrides(["schedule.decay=constant"])
    steps = ["schedule.decay=step", 'schedule.milestones=["50 %", "75 percent", "80 epochs"]']
    assert make().with_overrides(steps).schedule.milestones == ("50 percent", "75 percent", "80 epochs")


def test_a_length_of_zero_is_off() -> None:
    started = make().with_overrides(["schedule.warmup=1 steps", "schedule.warmup_at_start=true"])
    for zero in ("0 steps", "0 epochs", "0 percent"):
        with pytest.raises(
            RecipeError, match=r"warmup_at_start=True is not read with warmup='0 [a-z]+'; leave"
        ):
            started.with_overrides([f"schedule.warmup={zero}"])
    decayed = ["schedule.whitening_bias=0 steps", "schedule.whitening_bias_decay=linear"]
    with pytest.raises(
        RecipeError, match="whitening_bias_decay='linear' is not read with whitening_bias='0 steps'"
    ):
        make().with_overrides(decayed)


def test_what_nothing_reads_is_accepted_where_an_earlier_version_did() -> None:
    assert list(unread_fields(make())) == []
    unread = [
        "optim.nesterov=false",
        "optim.sgd_momentum=0",
        "train.bce_target_threshold=0",
        "data.train_size_multiple=16",
    ]
    recipe = make().with_overrides(unread)
    assert list(unread_fields(Recipe.from_json(recipe.to_json()))) == [
        "optim.sgd_momentum=0.0 is not read with optim.optimizer='sgd', only with 'muon'",
        "train.bce_target_threshold=0.0 is not read with train.loss='cross-entropy', only with 'bce'",
        "data.train_size_multiple=16 is not read with data.train_size_curve='steps', only with 'linear'",
    ]
    sizes = ["data.train_sizes=[['0 epochs', 16]]", "data.image_size=16", "data.train_size_curve=linear"]
    read = [
        "optim.optimizer=muon",
        "optim.nesterov=false",
        "train.loss=bce",
        *[one.replace("'", '"') for one in sizes],
    ]
    assert list(unread_fields(recipe.with_overrides(read))) == []


def test_the_choice_none_differs_from_no_value() -> None:
    overrides = ["train.compile=none", "data.crop=none", "model.shortcut=none", "optim.clip_norm=none"]
    recipe = make().with_overrides(["optim.clip_norm=1", *overrides])
    assert recipe.train.compile == recipe.data.crop == recipe.model.shortcut == "none"
    assert recipe.optim.clip_norm is None


def test_synchronised_norms_and_fixed_micro_batches_exclude_each_other() -> None:
    synchronised = make().with_overrides(["train.sync_batch_norm=true"])
    with pytest.raises(RecipeError, match=r"train\.sync_batch_norm=True .*data\.micro_batch_size=8"):
        synchronised.with_overrides(["data.micro_batch_size=8"])


def test_what_does_not_suit_the_number_of_classes() -> None:
    top5 = make().with_overrides(["train.best_metric=eval/top5"]).train
    check_classes(top5, 6)
    with pytest.raises(RecipeError, match=r"train\.best_metric='eval/top5' is not measured with 5 classes"):
        check_classes(top5, 5)
    bce = make().with_overrides(["train.loss=bce", "train.label_smoothing=0.4"])
    for threshold, fits in ((0.03, False), (0.05, True), (0.6, True), (0.64, False), (0.9, False)):
        train = bce.with_overrides([f"train.bce_target_threshold={threshold}"]).train
        if fits:
            check_classes(train, 10)
            continue
        message = rf"train\.bce_target_threshold={threshold} .*train\.label_smoothing=0\.4 .* targets are 0\.04 and 0\.64"
        with pytest.raises(RecipeError, match=message):
            check_classes(train, 10)
    check_classes(bce.with_overrides(["train.label_smoothing=0", "train.bce_target_threshold=0"]).train, 10)


def test_lengths() -> None:
    size = {"steps_per_epoch": 11, "global_batch_size": 128}
    assert steps_of(make().train.length, **size) == 22
    for text, steps in [
        ("10 epochs", 110),
        ("1 epoch", 11),
        ("64_000 steps", 64000),
        ("1e6 samples", 7812),
        ("0.01 epochs", 1),
        ("0 steps", 0),
    ]:
        assert steps_of(Schedule(warmup=text).warmup, **size) == steps


def test_percent_are_of_the_run() -> None:
    size = {"steps_per_epoch": 11, "global_batch_size": 128, "total_steps": 64000}
    for text, steps in [("50 percent", 32000), ("75%", 48000), ("0 %", 0), ("0.0001 percent", 1)]:
        schedule = make().with_overrides([f"schedule.warmup={text}"]).schedule
        assert schedule.warmup.endswith(" percent")
        assert steps_of(schedule.warmup, **size) == steps


def test_world_sizes() -> None:
    data = make(lanes=8, micro_batch_size=8).data
    for size in (1, 2, 4):
        check_world_size(data, size)
    with pytest.raises(RecipeError, match=r"--workers 3: .*use one of \[1, 2, 4\]"):
        check_world_size(data, 3)
    with pytest.raises(RecipeError, match=r"use one of \[1, 2, 4, 8\]"):
        check_world_size(make(lanes=8).data, 16)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("1 / 0", "line 1: ZeroDivisionError"),
        ("def recipe():\n    raise SystemExit(3)", "line 2: SystemExit"),
        ("def recipe():\n    return 3", "returned int"),
        ("x = 1", "defines no function recipe"),
        ("def recipe(:", "line 1: SyntaxError"),
        ("from resnet_dist import *\ndef recipe():\n    return Optim(lrr=1)", "did you mean"),
        (
            "from resnet_dist import *\ndef recipe():\n    return Recipe(name='x', dta=3)",
            "dta is not a field",
        ),
    ],
)
def test_recipe_files_that_cannot_be_run(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "bad.py"
    path.write_text(text)
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    assert words in str(caught.value)
    assert str(path) in str(caught.value)
    with pytest.raises(RecipeError, match="no such recipe"):
        load_recipe(tmp_path / "absent.py")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "is no JSON (Expecting property name"),
        ("[" * 100_000, "is no JSON ("),
        ("[1]", "input should be an object"),
        ('{"name": "x"}', "data is missing"),
    ],
)
def test_files_of_json_that_hold_no_recipe_are_named(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "run.json"
    path.write_text(text)
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    assert str(caught.value).startswith(f"{path}: {words}")
