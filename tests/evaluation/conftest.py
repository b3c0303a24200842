"""The fixture `command` of the tests of predict."""

from tests.predict.conftest import command

__all__ = ["command"]
