"""Running statistics of batch norm over several micro-batches."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from resnet_dist.train.step.batch_norm import RunningStatistics
from resnet_dist.world import World


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("count", [1, 2, 5])
def test_micro_batches_move_the_statistics_once(count: int, compiled: bool) -> None:
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(3, momentum=0.3)
    norm.running_mean, norm.running_var = torch.randn(3), torch.rand(3) + 0.5
    before = norm.running_mean.clone(), norm.running_var.clone()
    batches = [torch.randn(4, 3, 5, 5) * 2 + number for number in range(count)]
    statistics = RunningStatistics(norm, World.single(), compiled=compiled)
    momenta = set()
    for number, batch in enumerate(batches):
        statistics.begin_micro_batch(number, count)
        momenta.add(norm.momentum)
        norm(batch)
    assert len(momenta) == (1 if compiled else count)  # each would compile the model once more
    mean = torch.stack([batch.mean(dim=(0, 2, 3)) for batch in batches]).mean(0)
    var = torch.stack([batch.var(dim=(0, 2, 3)) for batch in batches]).mean(0)
    torch.testing.assert_close(norm.running_mean, 0.7 * before[0] + 0.3 * mean)
    torch.testing.assert_close(norm.running_var, 0.7 * before[1] + 0.3 * var)
