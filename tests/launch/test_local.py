"""The launcher of one rank in this process."""

from __future__ import annotations

from typing import Any

import pytest

from resnet_dist.config import Recipe
from resnet_dist.launch import local
from resnet_dist.runs.choose import choose_run
from resnet_dist.system.cpus import cpu_count


@pytest.mark.parametrize(("cpus", "used"), [(None, cpu_count()), (1, 1), (10_000, cpu_count())])
def test_a_rank_gets_its_part_of_the_machine(
    digits_recipe: Recipe, tmp_path: Any, monkeypatch: pytest.MonkeyPatch, cpus: int | None, used: int
) -> None:
    seen: list[int] = []

    def run_attempt(attempt: Any, *others: Any, **options: Any) -> None:
        seen.append(attempt.cpus)

    monkeypatch.setattr(local, "run_attempt", run_attempt)
    folder = choose_run(tmp_path, digits_recipe, "x", resume=False)
    local.local_launcher(digits_recipe, gpu=False, cpus=cpus)(folder)
    assert seen == [used]
