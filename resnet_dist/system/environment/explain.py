"""The limit behind an error that is nobody's defect."""

from __future__ import annotations

import errno
import resource
from collections.abc import Iterator

from resnet_dist.system.environment.limits import FILE_SIZE, MEMORY, OPEN_FILES, PROCESSES, Limit

_NUMBERS = {
    errno.EMFILE: OPEN_FILES,
    errno.EFBIG: FILE_SIZE,
    errno.ENOMEM: MEMORY,
    errno.EAGAIN: PROCESSES,
}
_PHRASES = {
    "Too many open files": OPEN_FILES,
    "File too large": FILE_SIZE,
    "failed to map segment": MEMORY,
    "annot allocate memory": MEMORY,
    "bad_alloc": MEMORY,
    "can't start new thread": PROCESSES,
    "Resource temporarily unavailable": PROCESSES,
}


def limit_behind(error: BaseException) -> str | None:
    """Return the sentence for an error that comes from a limit of `ulimit`; None for others, and without that limit."""
    for cause in _chain(error):
        limit = _limit_of(cause)
        if limit is not None and limit.now != resource.RLIM_INFINITY:
            text = str(cause).splitlines()[0] if str(cause) else type(cause).__name__
            return (
                f"{text}: {limit.described}; type `ulimit {limit.option} {limit.advice}` and the same command"
            )
    return None


def _limit_of(error: BaseException) -> Limit | None:
    if isinstance(error, MemoryError):
        return MEMORY
    if isinstance(error, OSError) and error.errno in _NUMBERS:
        return _NUMBERS[error.errno]
    return next((limit for phrase, limit in _PHRASES.items() if phrase in str(error)), None)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    seen = set[int]()
    while error is not None and id(error) not in seen:  # `raise error from error` makes a circle.
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__
