"""The part of a node that ranks can leave to another process."""

from __future__ import annotations

import pytest

from resnet_dist.launch.on_ray.placement import reserved
from resnet_dist.launch.on_ray.placement.fit import Node
from resnet_dist.launch.on_ray.placement.reserved import Reserved, room_beside

A, B = "a" * 56, "b" * 56  # ids of nodes, as Ray has them


@pytest.mark.parametrize(
    ("alive", "sizes", "gpu", "expected"),
    [
        ([Node(2, 0, "a", A)], [2], False, None),
        ([Node(2, 0, "a", A)], [1], False, Reserved(A, 1, 0)),
        ([Node(2, 0, "a", A)], [], False, Reserved(A, 2, 0)),
        # Ranks keep their number, and their CPUs where another node has room.
        ([Node(8, 0, "a", A), Node(4, 0, "b", B)], [1], False, Reserved(B, 4, 0)),
        ([Node(8, 2, "a", A), Node(8, 1, "b", B)], [2], True, Reserved(A, 1, 1)),
        ([Node(8, 2, "a", A), Node(6, 0, "b", B)], [2], True, Reserved(B, 6, 0)),
        ([Node(8, 0, "a", A)], [16], False, None),  # The ranks do not fit yet.
    ],
)
def test_the_room_beside_the_ranks(
    alive: list[Node], sizes: list[int], gpu: bool, expected: Reserved | None
) -> None:
    assert room_beside(alive, sizes, None, gpu=gpu) == expected


def test_the_room_of_many_nodes_is_found_among_their_kinds(monkeypatch: pytest.MonkeyPatch) -> None:
    alive = [Node(96, 8, f"n{number}", f"{number:056d}") for number in range(64)]
    tried = list[int]()
    choose = reserved.choose_placement
    monkeypatch.setattr(
        reserved, "choose_placement", lambda *given, **gpu: tried.append(1) or choose(*given, **gpu)
    )
    # 511 ranks of 512 GPUs: the one that is left, and the CPUs that a rank would have had.
    assert room_beside(alive, [511], None, gpu=True) == Reserved(alive[0].node_id, 12, 1)
    assert len(tried) < 30  # 64 nodes have 96 CPUs each.


def test_a_part_is_found_in_what_ranks_leave_free() -> None:
    alive, free = [Node(8, 0, "a", A), Node(8, 0, "b", B)], [Node(0, 0, "a", A), Node(3, 0, "b", B)]
    assert room_beside(alive, [1], 4, gpu=False, free=free) == Reserved(B, 3, 0)
    assert room_beside(alive, [1], 4, gpu=False, free=free[:1] * 2) is None
