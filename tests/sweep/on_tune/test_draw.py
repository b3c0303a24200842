"""The trials that are drawn: the seed decides, and more of them begin with the same."""

from __future__ import annotations

import pytest

from resnet_dist.errors import UserError
from resnet_dist.sweep.on_tune import draw as draw_module
from resnet_dist.sweep.on_tune.draw import draw
from resnet_dist.sweep.search import Search

SEARCHES = (
    Search("optim.lr", "log", 0.01, 1.0),
    Search("optim.momentum", "uniform", 0.5, 0.9),
    Search("seed", "int", 1, 3),
    Search("model.name", "list", choices=("resnet8", "resnet20")),
)


def test_the_seed_decides_and_more_trials_begin_with_the_same() -> None:
    few, many = draw(SEARCHES, 7, 5), draw(SEARCHES, 7, 40)
    assert many[:5] == few
    assert draw(SEARCHES, 8, 5) != few
    assert len(set(many)) == 40
    values = [dict(text.split("=") for text in sets) for sets in many]
    rates = [float(one["optim.lr"]) for one in values]
    assert 0.01 <= min(rates) < 0.1 < max(rates) <= 1
    assert 10 < sum(rate < 0.1 for rate in rates) < 30  # A half of the logarithm
    assert all(0.5 <= float(one["optim.momentum"]) <= 0.9 for one in values)
    assert {one["seed"] for one in values} == {"1", "2", "3"}
    assert {one["model.name"] for one in values} == {"resnet8", "resnet20"}


def test_all_combinations_can_be_drawn_but_no_more() -> None:
    searches = SEARCHES[2:]
    assert len(set(draw(searches, 0, 6))) == 6
    with pytest.raises(UserError, match=r"--trials 7: the searches have 6 different trials; give --trials 6"):
        draw(searches, 0, 7)


def test_more_than_all_combinations_is_refused_before_anything_is_drawn(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(draw_module, "generate_variants", lambda *a, **options: pytest.fail("drawn"))
    with pytest.raises(
        UserError, match=r"--trials 900: the searches have 6 different trials; give --trials 6"
    ):
        draw(SEARCHES[2:], 0, 900)
    monkeypatch.undo()
    monkeypatch.setattr(draw_module, "MAX_IN_VAIN", 50)
    narrow = (Search("optim.lr", "uniform", 0.1, 0.1001),)
    with pytest.raises(UserError, match=r"--trials 9: the searches have 2 different trials"):
        draw(narrow, 0, 9)
