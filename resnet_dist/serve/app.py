"""The routes: those of MLflow's scoring server as they are, and beside them one for the bytes of images, and a page."""

from __future__ import annotations

import asyncio
import copy
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from fastapi import Request
from fastapi.responses import HTMLResponse, JSONResponse, Response

from resnet_dist.data.batches.decode_threads import start_threads
from resnet_dist.serve.batches import Batches, Views
from resnet_dist.serve.body import Application, Limits, Message, Receive, Refused, Send, images_in
from resnet_dist.tracking.mlflow.logged.scoring import BadInput, ScoredModel
from resnet_dist.train.checkpoint.load import TrainedModel
from resnet_dist.train.start.threads import WORK_PER_THREAD, work_per_layer

PAGE = Path(__file__).with_name("page.html")
# Requests of a process that are computed at a time; the others wait for a thread.
NUM_REQUESTS = 32
MAX_DIGITS = 9  # of a number in a request; Python refuses to read very long ones
# The page needs nothing but itself and this server, whatever a class is called.
PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "img-src blob: data:; connect-src 'self'",
    "X-Content-Type-Options": "nosniff",
}
_NUMBER = re.compile(r"image (\d+)(?=: )")


@dataclass(frozen=True)
class Settings:
    """The settings of a server, as each of its processes gets them."""

    folder: Path  # of the model, in MLflow's format
    name: str  # of the model, for the page
    work_per_image: float  # multiplications of a layer, as a mean
    top_k: int
    cpus: int  # of each process
    gpu: bool


def work_of(trained: TrainedModel) -> float:
    """Return the multiplications of a layer for one image, as a mean over the layers."""
    data = trained.recipe.data
    model = copy.deepcopy(trained.model).cpu()
    return work_per_layer(model, channels=data.channels, size=data.evaluation_size, batch=1)


def make_app(settings: Settings) -> Application:
    """Load the model, and return the application of one process."""
    scored = ScoredModel(settings.folder, gpu=settings.gpu)
    share_threads(scored, settings)
    app = scored.mlflow_app()
    add_routes(app, scored, settings)
    return Limits(_with_threads(app))


def share_threads(scored: ScoredModel, settings: Settings) -> None:
    """Let all requests, those of MLflow's routes too, share threads: one per CPU that decodes, and one that computes."""
    classifier = scored.classifier
    batches = Batches(classifier.probabilities, partial(_num_threads, settings))
    decoders, view_of = start_threads(settings.cpus), classifier.views

    def views(images: list[Any], first: int = 0) -> Views:
        tasks = [decoders.submit(view_of, [image], number) for number, image in enumerate(images, first)]
        return np.concatenate([task.result() for task in tasks])

    classifier.views, classifier.probabilities = views, batches.probabilities


def _num_threads(settings: Settings, num_images: int) -> int:
    """Return the CPU threads for a forward pass: a small one takes longer on several, see docs/performance.md."""
    return max(1, min(settings.cpus, int(num_images * settings.work_per_image / WORK_PER_THREAD)))


def add_routes(app: Any, scored: ScoredModel, settings: Settings) -> None:
    """Add POST /predict, GET /model and the page to MLflow's application."""
    page = PAGE.read_text(encoding="utf-8")

    async def predict(request: Request) -> Response:
        try:
            top_k = _top_k(request.query_params.get("top"), settings.top_k)
            images = images_in(await request.body(), request.headers.get("content-type", ""))
            # MLflow's own route waits in this pool too.
            found = await asyncio.to_thread(_classified, scored, images, top_k)
        except Refused as refused:
            return Response(refused.content, refused.status, media_type="application/json")
        return JSONResponse({"predictions": found})

    async def model() -> Response:
        return JSONResponse(
            {"name": settings.name, "num_classes": len(scored.classes), "top": settings.top_k}
        )

    async def index() -> Response:
        return HTMLResponse(page, headers=PAGE_HEADERS)

    app.add_api_route("/predict", predict, methods=["POST"])
    app.add_api_route("/model", model, methods=["GET"])
    app.add_api_route("/", index, methods=["GET"], include_in_schema=False)


def _top_k(text: str | None, default: int) -> int:
    if text is None:
        return default
    if not text.isdecimal() or len(text) > MAX_DIGITS or int(text) < 1:
        raise Refused(400, f"top={text[:40]!r}; it must be 1 or more, of at most {MAX_DIGITS} digits")
    return int(text)


def _classified(
    scored: ScoredModel, images: list[tuple[str | None, bytes]], top_k: int
) -> list[dict[str, Any]]:
    """Return a row for each image, with the name of its file where it has one. Raises Refused."""
    try:
        rows = scored.classify([content for _, content in images], top_k)
    except BadInput as bad:
        raise Refused(400, _named(str(bad), images)) from None
    return [
        row if name is None else {"file": name, **row} for (name, _), row in zip(images, rows, strict=True)
    ]


def _named(message: str, images: list[tuple[str | None, bytes]]) -> str:
    """Return a message about "image 1" with the name of its file; one image alone needs no number."""
    found = _NUMBER.match(message)
    if found is None:
        return message
    (name, _), rest = images[int(found[1])], message[found.end() :]
    if name is not None:
        return f"{found[0]} ({name}){rest}"
    return rest.removeprefix(": ") if len(images) == 1 else message


def _with_threads(application: Application) -> Application:
    """Return an application whose event loop has threads for as many requests as are computed at a time."""

    async def run(scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(NUM_REQUESTS, "request"))
        await application(scope, receive, send)

    return run
