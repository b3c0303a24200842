"""torchvision's weights: equal logits from both nets, renaming both ways, the report of what does not fit."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torchvision.models import get_model

from resnet_dist.model import build_model, from_torchvision, load_fitting, match, to_torchvision

NAMES = [
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "resnet152",
    "resnext50_32x4d",
    "wide_resnet50_2",
]


def randomise_(model: nn.Module) -> None:
    """Give norms weights and statistics as in a trained net: no zeros, no ones, no two equal values."""
    torch.manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.0)
            nn.init.normal_(module.bias, std=0.2)
            nn.init.normal_(module.running_mean, std=0.2)  # type: ignore[arg-type]
            nn.init.uniform_(module.running_var, 0.5, 1.5)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", NAMES)
def test_logits_agree_with_torchvision(name: str) -> None:
    theirs = get_model(name).eval()
    randomise_(theirs)
    ours = build_model(name, in_channels=3, num_classes=1000).eval()
    found = load_fitting(ours, from_torchvision(theirs.state_dict()))
    assert (found.missing, found.unexpected, found.wrong_shape) == ((), (), ())
    images = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        expected, logits = theirs(images), ours(images)
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)
    # The logits depend on the image, so their agreement means something.
    assert expected.std(dim=0).max() > 1e-3
    back = to_torchvision(ours.state_dict())
    assert back.keys() == theirs.state_dict().keys()
    assert all(torch.equal(back[key], value) for key, value in theirs.state_dict().items())


def test_every_name_goes_both_ways() -> None:
    with torch.device("meta"):
        for name in ("resnet18", "preresnet50", "wrn16_4", "resnet9_fast"):
            state = build_model(name, in_channels=3, num_classes=10, stem="auto").state_dict()
            assert list(from_torchvision(to_torchvision(state))) == list(state)
            assert list(from_torchvision(state)) == list(state)


def test_a_head_of_other_classes_keeps_its_values_and_is_reported() -> None:
    weights = from_torchvision(get_model("resnet18").state_dict())
    weights["extra.weight"] = torch.zeros(1)
    del weights["stages.1.0.conv1.weight"]
    model = build_model("resnet18", in_channels=3, num_classes=10, seed=0)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = load_fitting(model, weights)
    assert found.missing == ("stages.1.0.conv1.weight",)
    assert found.unexpected == ("extra.weight",)
    assert found.wrong_shape[0] == "fc.weight (1000, 512), the model has (10, 512)"
    assert 0.99 < found.model_share < 1
    assert 0.99 < found.weights_share < 1
    assert str(found).startswith("99 of 102 tensors fit; wrong shape: fc.weight (1000, 512), the model has")
    assert str(found).endswith("missing: stages.1.0.conv1.weight; not used: extra.weight")
    after = model.state_dict()
    kept = {"fc.weight", "fc.bias", "stages.1.0.conv1.weight"}
    for name, value in after.items():
        if name in kept:
            assert torch.equal(value, before[name])
        elif name in weights:
            assert torch.equal(value, weights[name])
    assert str(match(model, {})).endswith("and 96 more")


def test_the_head_is_loaded_where_the_number_of_classes_agrees() -> None:
    source = build_model("resnet8", in_channels=1, num_classes=10, seed=1)
    model = build_model("resnet8", in_channels=1, num_classes=10, seed=2)
    assert load_fitting(model, source.state_dict()).wrong_shape == ()
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in source.state_dict().items())
