"""Losses that are mixed, smoothed and weighted."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from resnet_dist.config import Train
from resnet_dist.train.step.loss import sample_losses

M, K = 6, 5


@pytest.fixture
def batch() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(M, K, generator=generator) * 3
    return logits, torch.randint(0, K, (M,), generator=generator), torch.ones(M)


def options(**fields: object) -> Train:
    return Train.model_validate({"length": "1 epochs", **fields})


def share_of(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


def dense(labels: Tensor, share: float, smoothing: float) -> Tensor:
    one_hot = F.one_hot(labels, K).float()
    return (share * one_hot + (1 - share) * one_hot.roll(1, 0)) * (1 - smoothing) + smoothing / K


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("share", [None, 0.3])
def test_cross_entropy_is_that_of_the_dense_target(
    batch: tuple[Tensor, Tensor, Tensor], share: float | None, smoothing: float
) -> None:
    logits, labels, weights = batch
    mixed = None if share is None else share_of(share)
    ours = sample_losses(logits, labels, weights, mixed, options(label_smoothing=smoothing))
    target = dense(labels, 1.0 if share is None else share, smoothing)
    torch.testing.assert_close(ours, F.cross_entropy(logits, target, reduction="none"))
    assert ours.dtype == torch.float32


@pytest.mark.parametrize("threshold", [None, 0.2])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("share", [None, 0.3, 0.9])
def test_bce_is_that_of_timm(
    batch: tuple[Tensor, Tensor, Tensor], share: float | None, smoothing: float, threshold: float | None
) -> None:
    from timm.loss import BinaryCrossEntropy

    logits, labels, weights = batch
    mixed = None if share is None else share_of(share)
    fields = {"loss": "bce", "label_smoothing": smoothing, "bce_target_threshold": threshold}
    ours = sample_losses(logits, labels, weights, mixed, options(**fields))
    target = dense(labels, 1.0 if share is None else share, smoothing)
    torch.testing.assert_close(ours.mean(), BinaryCrossEntropy(0.0, threshold)(logits, target))
    assert ours.dtype == torch.float32


@pytest.mark.parametrize("loss", ["cross-entropy", "bce"])
def test_a_bad_sample_does_not_count(batch: tuple[Tensor, Tensor, Tensor], loss: str) -> None:
    logits, labels, weights = batch
    weights[2] = weights[3] = 0
    unmixed = sample_losses(logits, labels, weights, None, options(loss=loss))
    assert (unmixed[2:4] == 0).all()
    assert (unmixed[[0, 1, 4, 5]] > 0).all()
    ours = sample_losses(logits, labels, weights, share_of(0.3), options(loss=loss))
    assert ours[3] == 0  # a mix of 3 and 2: both are bad
    alone = sample_losses(logits, labels, torch.ones(M), None, options(loss=loss))
    others = sample_losses(logits, labels.roll(1, 0), torch.ones(M), None, options(loss=loss))
    assert ours[2] == pytest.approx(0.7 * others[2].item())  # a mix of 2 and 1: only 1 counts
    assert ours[4] == pytest.approx(0.3 * alone[4].item())  # a mix of 4 and 3: only 4 counts


@pytest.mark.parametrize("loss", ["cross-entropy", "bce"])
def test_mixing_with_a_share_of_one_is_not_mixing(batch: tuple[Tensor, Tensor, Tensor], loss: str) -> None:
    mixed = sample_losses(*batch, share_of(1.0), options(loss=loss))
    assert torch.equal(mixed, sample_losses(*batch, None, options(loss=loss)))
