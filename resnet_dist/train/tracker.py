"""The interface through which the loop reports: rank 0 has a tracker that writes, all others a NullTracker."""

from __future__ import annotations

from typing import Protocol

from resnet_dist.train.predictions import Predictions


class Tracker(Protocol):
    """The receiver of metrics and notes, callable from any thread. It never raises into training or makes it wait."""

    def log(self, metrics: dict[str, float], step: int) -> None:
        """Record metrics by name after `step` completed steps."""

    def log_layers(self, name: str, values: dict[str, float], step: int) -> None:
        """Record one value per layer, by the layer's name, for the quantity `name`."""

    def log_predictions(self, predictions: Predictions, step: int) -> None:
        """Record the predictions of the evaluation after `step` completed steps, for figures."""

    def log_checkpoint(self, step: int, sha256: str | None) -> None:
        """Record that the checkpoint of a step is there, by the SHA-256 of its model; None: it was removed."""

    def note(self, text: str) -> None:
        """Show one line of text to the person who started the run."""

    def flush(self) -> None:
        """Wait until all that was recorded is in the run's storage. Raises OSError where it cannot be."""


class NullTracker:
    """The tracker of every rank but rank 0: it drops everything."""

    def log(self, metrics: dict[str, float], step: int) -> None:
        pass

    def log_layers(self, name: str, values: dict[str, float], step: int) -> None:
        pass

    def log_predictions(self, predictions: Predictions, step: int) -> None:
        pass

    def log_checkpoint(self, step: int, sha256: str | None) -> None:
        pass

    def note(self, text: str) -> None:
        pass

    def flush(self) -> None:
        pass
