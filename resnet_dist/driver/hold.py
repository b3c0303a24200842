"""Hold the run of a request: nobody else trains it meanwhile, and a loss of that right is the end of this driver."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from functools import partial

from resnet_dist.driver.request import Request
from resnet_dist.errors import StorageError, UserError
from resnet_dist.runs.choose import choose_run, run_of_launch
from resnet_dist.runs.folder import RunFolder
from resnet_dist.runs.storage.holder import Holder
from resnet_dist.runs.storage.lease import log_loss
from resnet_dist.runs.storage.protocol import Storage
from resnet_dist.system.signals import handle_signals, raise_on_second


def choose(request: Request) -> RunFolder:
    """Return the run that a request begins or continues; write nothing."""
    ranks, name = request.torchrun, request.name
    # torchrun --max-restarts starts the same command again, which must then resume its own run.
    if name is None and ranks is not None and ranks.restarted:
        name = run_of_launch(request.output, request.recipe, ranks.launch)
    run = choose_run(request.output, request.recipe, name, resume=request.resume)
    return replace(run, launch=ranks.launch if ranks is not None else "")


@contextmanager
def locked(
    request: Request, run: RunFolder, report: Callable[[str], None] = lambda text: None
) -> Iterator[RunFolder]:
    """Hold the lock of `run`; yield the run as read again under it, with its lease.

    Another process may have begun or ended an attempt since `run` was chosen. A new run whose name we made up
    is replaced by one with an unused name. Raises UserError where a run that the person named is being
    trained.
    """
    named_by_us = run.attempt == 1 and run.name != request.name
    while True:
        with ExitStack() as stack:
            try:
                lease = stack.enter_context(run.lock(report, partial(_stop_after_loss, run.storage)))
            except UserError:
                if not named_by_us:
                    raise
            else:
                again = choose(replace(request, name=run.name, resume=False))
                if again.attempt == run.attempt or not named_by_us:
                    yield replace(again, lease=lease)
                    return
        # A run that began in the same second has taken the name: choose another one.
        run = choose(request)


@contextmanager
def loss_reported(run: RunFolder) -> Iterator[None]:
    """Raise Superseded, whatever else ended the block, where another driver has taken the run over meanwhile."""
    try:
        yield
    except BaseException:
        if not run.is_lost:
            raise
    if run.is_lost:
        run.check_lease()


def _stop_after_loss(storage: Storage, holder: Holder | None) -> None:
    """Stop this process as SIGTERM does: another one has taken its run over, while it could not renew the lease."""
    if holder is None:
        with suppress(StorageError):
            if storage.is_gone():  # The ranks find that out too, and name the folder.
                return
        log_loss(holder)
    os.kill(os.getpid(), signal.SIGTERM)


def has_lost(run: RunFolder) -> bool:
    """Report whether another driver has taken `run` over; ask its storage where this process stood still."""
    # The loss sends one signal; a second one ends the wait for the storage.
    with handle_signals(raise_on_second), suppress(StorageError, KeyboardInterrupt):
        run.check_lease()
    return run.is_lost
