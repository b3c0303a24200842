"""The fixtures of the tests of `predict`: a model, and a command in this process."""

from tests.predict.conftest import command, model

__all__ = ["command", "model"]
