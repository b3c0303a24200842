"""The load of a run at 8, 64 and 512 nodes of eight GPUs, for 1.28 million and a billion samples: the tables of docs/scaling.md.

    uv run python tests/benchmarks/scale.py

Speeds are given, not measured: 2,500 images/s of a GPU, 25 Gbit/s of a node.
"""

from __future__ import annotations

from resnet_dist.bench.scale import DataSet, Load, Nodes, first_to_break, plan_scale
from resnet_dist.config import Recipe, load_recipe
from tests.paths import JOBS

SETS = {
    "1.28 million samples of 110 kB": DataSet(1_281_167, 110_000, 2**28),
    "a billion samples of 50 kB": DataSet(1_000_000_000, 50_000, 2**30),
}
NODES, RANKS, IMAGES_PER_SECOND, LINK = (8, 64, 512), 8, 2500.0, 25e9 / 8


def recipe_for(world_size: int, images_per_rank: int = 32) -> Recipe:
    """Return the recipe of ImageNet with a batch and lanes that so many ranks can share."""
    sets = [f"data.global_batch_size={images_per_rank * world_size}", f"data.lanes={max(64, world_size)}"]
    return load_recipe(JOBS / "imagenet_rn50.py", sets)


def print_table(data: DataSet) -> None:
    plans = [
        plan_scale(recipe_for(count * RANKS), data, Nodes(count, RANKS, IMAGES_PER_SECOND, LINK))
        for count in NODES
    ]
    print(f"| | {' | '.join(f'{count} nodes' for count in NODES)} | limit | moved by |")
    print("|---|" + "---|" * (len(NODES) + 2))
    for row in zip(*plans, strict=True):
        print(f"| {row[0].name} | {' | '.join(map(cell, row))} | {row[0].limit_text} | {row[0].setting} |")
    breaks = [f"{first.name} ({first.share:.0%})" for first in map(first_to_break, plans)]
    print(f"| **nearest to its limit** | {' | '.join(breaks)} | | |")


def cell(load: Load) -> str:
    return f"**{load.text}**" if load.share > 1 else load.text


if __name__ == "__main__":
    for title, data_set in SETS.items():
        print(f"\n### {title[0].upper()}{title[1:]}\n")
        print_table(data_set)
