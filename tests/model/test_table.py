"""Every name: its parameters against the papers and other implementations, and the combinations that fail."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from resnet_dist.model import (
    MODELS,
    Options,
    build_model,
    check_batch_norm,
    check_model,
    count_parameters,
)
from resnet_dist.model.build import final_map_size
from resnet_dist.model.table import StemKind

CIFAR_A = {  # arXiv 1512.03385, table 6: 0.27, 0.46, 0.66, 0.85, 1.7, 19.4 M
    "resnet20": 269_722,
    "resnet32": 464_154,
    "resnet44": 658_586,
    "resnet56": 853_018,
    "resnet110": 1_727_962,
    "resnet1202": 19_421_274,
}
IMAGENET = {  # torchvision's documentation of each model
    "resnet18": 11_689_512,
    "resnet34": 21_797_672,
    "resnet50": 25_557_032,
    "resnet101": 44_549_160,
    "resnet152": 60_192_808,
    "resnext50_32x4d": 25_028_904,
    "resnext101_32x8d": 88_791_336,
    "resnext101_64x4d": 83_455_272,
    "wide_resnet50_2": 68_883_240,
    "wide_resnet101_2": 126_886_696,
}
# Millions, as the papers round them: wrn and preresnet from arXiv 1605.07146, tables 3 and 4; resnext29 from
# arXiv 1611.05431, table 7.
MILLIONS = {
    "wrn16_4": 2.7,
    "wrn16_8": 11.0,
    "wrn22_8": 17.2,
    "wrn28_10": 36.5,
    "wrn40_1": 0.6,
    "wrn40_2": 2.2,
    "wrn40_4": 8.9,
    "preresnet110": 1.7,
    "preresnet164": 1.7,
    "preresnet1001": 10.3,  # the table has 10.2, but the authors' own code builds 10.3
    "resnext29_8x64d": 34.4,
    "preresnet200": 64.7,
}

# Nets that repeat the blocks of shallower ones and take long to build.
DEEP = ("110", "1202", "152", "164", "200", "1001")
QUICK = [name for name in MODELS if not name.endswith(DEEP)]


def parameters(name: str, num_classes: int, **options: Any) -> int:
    # Many small layers are sooner filled than torch describes them.
    with torch.device("cpu" if name in ("resnet1202", "preresnet1001") else "meta"):
        return count_parameters(build_model(name, in_channels=3, num_classes=num_classes, **options))


@pytest.mark.parametrize("name", CIFAR_A)
def test_parameters_of_the_first_paper(name: str) -> None:
    assert parameters(name, 10, shortcut="zero-pad") == CIFAR_A[name]


@pytest.mark.parametrize("name", IMAGENET)
def test_parameters_of_torchvision(name: str) -> None:
    assert parameters(name, 1000) == IMAGENET[name]


@pytest.mark.parametrize("name", MILLIONS)
def test_parameters_as_papers_round_them(name: str) -> None:
    num_classes = 1000 if name == "preresnet200" else 10
    assert round(parameters(name, num_classes) / 1e6, 1) == MILLIONS[name]


def test_parameters_of_options() -> None:
    assert parameters("wrn28_10", 10) == 36_479_194
    assert parameters("resnet18", 10, stem="cifar") == 11_173_962
    deep = parameters("resnet50", 1000, stem="deep", shortcut="pool-projection")
    assert deep == 25_576_264  # ResNet-50-D
    # SE-ResNet-50 adds 2 C² / 16 weights and C + C / 16 biases per block (arXiv 1709.01507, equation 5).
    assert parameters("resnet50", 1000, se=True) == 28_088_024
    assert parameters("resnet50", 1000, blurpool=True) == IMAGENET["resnet50"]


@pytest.mark.parametrize("name", [name for name in QUICK if name != "resnet9_fast"])
def test_a_plain_net_has_the_parameters_of_option_a(name: str) -> None:
    with torch.device("meta"):
        residual, plain = (
            build_model(name, in_channels=3, num_classes=10, shortcut=shortcut).state_dict()
            for shortcut in ("zero-pad", "none")
        )
    assert {key: value.shape for key, value in residual.items()} == {
        key: value.shape for key, value in plain.items()
    }


@pytest.mark.parametrize("name", QUICK)
def test_every_name_returns_logits(name: str) -> None:
    with torch.device("meta"):
        model = build_model(name, in_channels=3, num_classes=7)
        assert model(torch.empty(2, 3, 33, 47)).shape == (2, 7)


@pytest.mark.parametrize("shortcut", ["projection", "pool-projection", "zero-pad", "none"])
@pytest.mark.parametrize("stem", ["auto", "cifar", "imagenet", "deep"])
@pytest.mark.parametrize("name", ["resnet8", "resnext29_8x64d", "preresnet20"])
def test_every_option_returns_logits_for_any_image_size(name: str, stem: str, shortcut: str) -> None:
    options = {"stem": stem, "shortcut": shortcut, "se": True, "blurpool": True}
    with torch.device("meta" if name == "resnext29_8x64d" else "cpu"), torch.inference_mode():
        model = build_model(name, in_channels=1, num_classes=7, **options)
        for height, width in ((9, 17), (1, 1)):
            assert model.eval()(torch.empty(2, 1, height, width)).shape == (2, 7)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("resnet21", {}, "model.name='resnet21': use one of resnet10_tutorial, .*resnet20, "),
        ("resnet8", {"shortcut": "projektion"}, "model.shortcut='projektion': use one of projection, "),
        ("resnet8", {"stem": "7x7"}, "model.stem='7x7': use one of auto, cifar"),
        ("resnet8", {"shortcut": "none", "zero_init": True}, "model.zero_init=true.*model.shortcut='none'"),
        ("resnet8", {"shortcut": "none", "stochastic_depth": 0.1}, "model.stochastic_depth=0.1.*plain block"),
        ("resnet9_fast", {"se": True}, "model.se=True: resnet9_fast is a fixed net; use False"),
        ("resnet9_fast", {"shortcut": "none"}, "model.shortcut='none': .*; use 'projection'"),
        ("resnet9_fast", {"stem": "cifar"}, "model.stem='cifar': .*; use 'auto'"),
        (
            "resnet8",
            {"whitening": "second-moment"},
            "'second-moment': resnet8 has no whitening layer; leave it",
        ),
        ("resnet9_fast", {"whitening": "zca"}, "model.whitening='zca': use one of covariance, second-moment"),
        ("resnet8", {"norm_eps": 0.0}, "model.norm_eps=0.0: use a number above 0"),
    ],
)
def test_what_cannot_work_is_refused(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_model(name, Options(**options))
    with pytest.raises(ValueError, match=message):
        build_model(name, in_channels=3, num_classes=10, **options)


@pytest.mark.parametrize(
    ("name", "stem"),
    [("resnet8", "auto"), ("resnet8", "imagenet"), ("preresnet20", "deep"), ("resnet9_fast", "auto")],
)
@pytest.mark.parametrize("image_size", [9, 16, 17, 33])
def test_batch_norm_with_one_value_per_channel_is_refused(name: str, stem: StemKind, image_size: int) -> None:
    """The check refuses exactly those image sizes at which torch raises."""
    options = Options(stem=stem)
    model = build_model(name, in_channels=1, num_classes=3, **vars(options)).train()
    check_batch_norm(name, options, image_size, num_samples=2)
    if final_map_size(name, options, image_size) > 1:
        check_batch_norm(name, options, image_size, num_samples=1)
        model(torch.zeros(1, 1, image_size, image_size))
        return
    with pytest.raises(ValueError, match=f"{image_size} pixels .*down to 1x1.*data.micro_batch_size"):
        check_batch_norm(name, options, image_size, num_samples=1)
    with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        model(torch.zeros(1, 1, image_size, image_size))


def test_the_fast_net_needs_nine_pixels() -> None:
    check_model("resnet9_fast", Options(), image_size=9)
    with pytest.raises(ValueError, match="8 pixels are too few for that .*data.eval_size.*; use 9 or more"):
        check_model("resnet9_fast", Options(), image_size=8)
    assert build_model("resnet9_fast", in_channels=1, num_classes=3)(torch.zeros(2, 1, 9, 9)).shape == (2, 3)
