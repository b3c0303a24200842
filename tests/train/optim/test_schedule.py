"""Learning rates: compared with PyTorch's own schedulers where there is one, and properties of all of them."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.optim import lr_scheduler

from resnet_dist.config import Schedule, load_recipe, scaled_lr
from resnet_dist.order.samples import Order
from resnet_dist.train.optim.schedule import learning_rate, whitening_rate
from resnet_dist.train.plan import Plan
from tests.paths import JOBS

PEAK, TOTAL = 0.4, 100


def rates(schedule: Schedule, warmup: int = 0, milestones: tuple[int, ...] = ()) -> list[float]:
    lengths = {"total_steps": TOTAL, "warmup_steps": warmup, "milestones": milestones}
    return [learning_rate(step, schedule, peak=PEAK, **lengths) for step in range(TOTAL)]


def pytorch(make: Callable[[torch.optim.Optimizer], lr_scheduler.LRScheduler]) -> list[float]:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=PEAK)
    scheduler, values = make(optimizer), []
    for _ in range(TOTAL):
        values.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return values


def test_cosine() -> None:
    theirs = pytorch(lambda o: lr_scheduler.CosineAnnealingLR(o, TOTAL, eta_min=PEAK * 0.1))
    assert rates(Schedule(floor=0.1)) == pytest.approx(theirs)
    assert rates(Schedule())[-1] < 0.001


def test_steps() -> None:
    theirs = pytorch(lambda o: lr_scheduler.MultiStepLR(o, [30, 60, 90], gamma=0.2))
    schedule = Schedule(decay="step", milestones=("30 percent", "60 percent", "90 percent"), gamma=0.2)
    assert rates(schedule, milestones=(30, 60, 90)) == pytest.approx(theirs)


def test_polynomial() -> None:
    theirs = pytorch(lambda o: lr_scheduler.PolynomialLR(o, TOTAL, power=2))
    assert rates(Schedule(decay="polynomial", power=2)) == pytest.approx(theirs)


def test_linear_warmup() -> None:
    values = rates(Schedule(), warmup=10)
    assert values[:10] == pytest.approx([PEAK * (step + 1) / 10 for step in range(10)])
    assert values[9] == values[10] == max(values) == PEAK
    assert values[10:] == sorted(values[10:], reverse=True)
    assert values[55] == pytest.approx(PEAK / 2)
    # PyTorch's LinearLR begins at the start factor itself, and reaches the peak one step later.
    theirs = pytorch(lambda o: lr_scheduler.LinearLR(o, start_factor=0.01, total_iters=10))
    assert rates(Schedule(warmup_start=0.01), warmup=10)[:9] == pytest.approx(theirs[1:10])


def test_a_warmup_may_begin_at_its_start_as_pytorchs() -> None:
    theirs = pytorch(lambda o: lr_scheduler.LinearLR(o, start_factor=0.01, total_iters=10))
    ours = rates(Schedule(warmup="10 steps", warmup_start=0.01, warmup_at_start=True), warmup=10)
    assert ours[:11] == pytest.approx(theirs[:11])
    cosine = rates(Schedule(warmup="10 steps", warmup_shape="cosine", warmup_at_start=True), warmup=10)
    assert cosine[:11] == pytest.approx(
        [PEAK * (1 - math.cos(math.pi * step / 10)) / 2 for step in range(11)]
    )


def test_the_triangle_of_the_fast_job_is_its_sources() -> None:
    recipe = load_recipe(JOBS / "cifar10_fast.py")
    total, up = 476, int(476 * 0.23)

    def theirs(step: int) -> float:
        if step < up:
            return 0.2 * (1 - step / up) + step / up
        part = (step - up) / (total - up)
        return (1 - part) + 0.07 * part

    lengths = {"total_steps": total, "warmup_steps": up}
    found = [learning_rate(step, recipe.schedule, peak=1.0, **lengths) for step in range(total)]
    assert found == pytest.approx([theirs(step) for step in range(total)])
    order = Order((25_000, 25_000), 1024, 8, 4096, 0, training=True)
    plan = Plan.of(recipe, order)
    assert (plan.total, plan.warmup, plan.whitening, plan.ema) == (total, up, 3 * 48, 5)


def test_the_bias_of_whitening_follows_the_schedule_then_stands_or_falls_to_zero() -> None:
    follows, falls = (
        Schedule(whitening_bias="4 steps"),
        Schedule(whitening_bias="4 steps", whitening_bias_decay="linear"),
    )
    found = [whitening_rate(step, 0.3, follows, peak=PEAK, steps=4) for step in range(6)]
    assert found == [0.3, 0.3, 0.3, 0.3, 0, 0]
    found = [whitening_rate(step, 0.3, falls, peak=PEAK, steps=4) for step in range(6)]
    assert found == pytest.approx([PEAK, PEAK * 0.75, PEAK * 0.5, PEAK * 0.25, 0, 0])
    assert whitening_rate(5, 0.3, Schedule(), peak=PEAK, steps=None) == 0.3


def test_constant_warmup_of_the_110_layers() -> None:
    schedule = Schedule(
        decay="step", milestones=("50 percent",), warmup_shape="constant", warmup_start=0.1, warmup="10 steps"
    )
    expected = [0.04] * 10 + [0.4] * 40 + [0.04] * 50
    assert rates(schedule, warmup=10, milestones=(50,)) == pytest.approx(expected)


def test_one_cycle_is_a_long_warmup() -> None:
    """PyTorch's schedule starts and ends on its extremes; ours starts one step later, and ends one step earlier."""
    cosine = Schedule(warmup_shape="cosine", warmup_start=0.04, floor=0.04 / 1e4)
    triangular = Schedule(warmup_start=0.04, decay="polynomial", floor=0.04 / 1e4)
    for schedule, anneal in ((cosine, "cos"), (triangular, "linear")):
        theirs = pytorch(
            lambda o, anneal=anneal: lr_scheduler.OneCycleLR(
                o, PEAK, TOTAL + 1, pct_start=31 / 101, anneal_strategy=anneal, cycle_momentum=False
            )
        )
        ours = rates(schedule, warmup=30)
        assert ours[:30] == pytest.approx(theirs[1:][:30])
        assert ours[30:] == pytest.approx(theirs[30:], abs=0.01)


@given(
    st.sampled_from(["cosine", "constant", "step", "polynomial"]),
    st.sampled_from(["linear", "cosine", "constant"]),
    st.floats(0.01, 1),
    st.floats(0, 1),
    st.integers(0, TOTAL),
    st.floats(0.5, 3),
)
def test_rates_rise_to_the_peak_and_fall(
    decay: str, shape: str, start: float, floor: float, warmup: int, power: float
) -> None:
    chosen = {
        "cosine": {"floor": floor},
        "polynomial": {"floor": floor, "power": power},
        "step": {"milestones": ("50 percent",)},
        "constant": {},
    }[decay]
    schedule = Schedule.model_validate(
        {"decay": decay, "warmup_shape": shape, "warmup_start": start, **chosen}
    )
    values = rates(schedule, warmup, milestones=(50,))
    assert all(0 <= value <= PEAK * (1 + 1e-9) for value in values)
    rising, falling = values[:warmup], values[warmup:]
    assert rising == sorted(rising)
    assert all(later <= earlier * (1 + 1e-9) for earlier, later in zip(falling, falling[1:], strict=False))
    if warmup < 50:
        assert falling[0] == pytest.approx(PEAK)
    assert all(math.isfinite(value) for value in values)


def test_scaled_lr() -> None:
    assert scaled_lr(0.1, global_batch_size=8192) == pytest.approx(3.2)
    assert scaled_lr(0.1, global_batch_size=64, per=128) == pytest.approx(0.05)
