"""The number of ranks that fit on some nodes, and the CPUs that each has."""

from __future__ import annotations

import pytest

from resnet_dist.errors import UserError
from resnet_dist.launch.on_ray.placement.fit import Node, Placement, choose_placement, cpus_per_rank

GPU_NODES = [Node(8, 1), Node(8, 1)]


def test_ranks_that_do_not_fit_are_refused() -> None:
    assert cpus_per_rank(GPU_NODES, 2, gpu=True) == 8
    assert cpus_per_rank(GPU_NODES, 3, gpu=False) == 4  # two on one node, one on the other
    assert cpus_per_rank(GPU_NODES, 16, gpu=False) == 1
    with pytest.raises(
        UserError, match=r"--workers 3: each needs one CPU and one GPU.*use --workers 2 or fewer"
    ):
        cpus_per_rank(GPU_NODES, 3, gpu=True)
    with pytest.raises(UserError, match="use --cpu"):
        cpus_per_rank([Node(4, 0)], 1, gpu=True)


def test_the_largest_size_that_fits_is_chosen_with_the_threads_of_before() -> None:
    assert choose_placement(GPU_NODES, [4, 2, 1], None, gpu=True) == Placement(2, 8, gpu=True)
    assert choose_placement(GPU_NODES, [4, 2, 1], 3, gpu=False) == Placement(4, 3, gpu=False)
    assert choose_placement([Node(2, 0)], [2], 2, gpu=False) == Placement(2, 1, gpu=False)  # fewer CPUs
    assert choose_placement([], [2, 1], None, gpu=False) is None
