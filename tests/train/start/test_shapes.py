"""Networks without weights have the names and shapes of those with weights."""

from __future__ import annotations

import pytest
import torch

from resnet_dist.model import build_model
from resnet_dist.train.start.shapes import shapes_only


@pytest.mark.parametrize("name", ["resnet8", "resnet50", "preresnet18", "resnet9_fast"])
def test_names_and_shapes_are_those_of_the_network(name: str) -> None:
    drawn = build_model(name, in_channels=3, num_classes=10)
    with shapes_only():
        model = build_model(name, in_channels=3, num_classes=10)
    assert all(tensor.is_meta for tensor in model.state_dict().values())
    shapes = [{key: value.shape for key, value in one.state_dict().items()} for one in (drawn, model)]
    assert shapes[0] == shapes[1]
    assert not torch.empty(1).is_meta  # It ends with its block.
    weight = torch.nn.Conv2d(1, 1, 3).weight
    before = weight.detach().clone()
    assert not torch.equal(torch.nn.init.kaiming_normal_(weight), before)
