"""The launcher that a request asks for: in this process, by torchrun, or on Ray, which several runs may share."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from types import ModuleType

from resnet_dist.driver.gauges import GAUGES, Sink
from resnet_dist.driver.request import Reporter, Request
from resnet_dist.errors import UserError
from resnet_dist.launch.attempt import RankLauncher
from resnet_dist.launch.local import local_launcher
from resnet_dist.launch.torchrun import torchrun_launcher
from resnet_dist.system.signals import defer_signals


def launcher_of(request: Request, reporter: Reporter) -> AbstractContextManager[RankLauncher]:
    """Return the launcher that the request asks for, with its resources.

    Raises UserError where they are missing.
    """
    if request.torchrun is not None:
        return nullcontext(
            torchrun_launcher(request.recipe, request.torchrun, gpu=request.gpu, report=reporter.note)
        )
    if request.local:
        return nullcontext(
            local_launcher(request.recipe, gpu=request.gpu, cpus=request.cpus, report=reporter.note)
        )
    return _import_ray_train().ray_launcher(  # type: ignore[no-any-return]
        request.recipe,
        workers=request.ranks,
        gpu=request.gpu,
        address=request.address,
        wait_seconds=request.wait_seconds,
        report=reporter.note,
        cpus=request.cpus,
    )


def shared_ray(request: Request, reporter: Reporter) -> AbstractContextManager[None]:
    """Return the connection to Ray that several runs like that of the request share; nothing without Ray.

    Raises UserError where there is no cluster.
    """
    if request.local or request.torchrun is not None:
        return nullcontext()
    return _import_ray_train().shared_ray(  # type: ignore[no-any-return]
        request.ranks, gpu=request.gpu, address=request.address, report=reporter.note
    )


def ray_sinks(request: Request) -> list[Sink]:
    """Return the sink for the gauges of a run on Ray, once its launcher has connected to the cluster."""
    if request.local or request.torchrun is not None:
        return []
    from resnet_dist.launch.on_ray.gauges import RayGauges

    return [RayGauges(GAUGES)]


def _import_ray_train() -> ModuleType:
    """Import Ray late: `--local` and torchrun work without it. Raises UserError where it is not installed."""
    try:
        with defer_signals():  # An exception in the middle of Ray's import would leave it broken.
            from resnet_dist.launch.on_ray import launcher as ray_train
    except ImportError as error:
        if (error.name or "").partition(".")[0] != "ray":
            raise  # Ray is installed but broken.
        raise UserError(f"Ray is not installed ({error}); --local trains in this process") from None
    return ray_train
