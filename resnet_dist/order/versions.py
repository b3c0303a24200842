"""The versions of the order of samples. A run keeps the one that it began with; `lanes` describes how they differ.

Knows no NumPy, whose import takes long: a command reads what a run records before it imports that.
"""

from __future__ import annotations

FIRST_VERSION = 1  # the order of runs that recorded no version
NEWEST_VERSION = 2
VERSIONS = (FIRST_VERSION, NEWEST_VERSION)
