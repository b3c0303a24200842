"""A served model in this process, and requests to it without a network."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from resnet_dist.serve.app import Settings, make_app, work_of
from resnet_dist.serve.body import Application
from resnet_dist.tracking.mlflow.logged.scoring import write_scored
from resnet_dist.train.checkpoint.load import load_model
from tests.checkpoints import COLORED, random_checkpoint


@dataclass(frozen=True)
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


async def request(
    application: Application,
    method: str,
    target: str,
    body: bytes | Sequence[bytes] = b"",
    content_type: str = "",
) -> Answer:
    """Send one request to an application, in the parts that `body` has."""
    path, _, query = target.partition("?")
    parts = [body] if isinstance(body, bytes) else list(body)
    sent: list[Any] = []

    async def receive() -> dict[str, Any]:
        if not parts:
            return {"type": "http.disconnect"}
        part = parts.pop(0)
        return {"type": "http.request", "body": part, "more_body": bool(parts)}

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": method,
        "path": path,
        "raw_path": path.encode(),
        "query_string": query.encode(),
        "headers": [(b"content-type", content_type.encode())] if content_type else [],
        "scheme": "http",
        "server": ("127.0.0.1", 80),
        "client": ("127.0.0.1", 9),
        "root_path": "",
    }
    await application(scope, receive, send)
    headers = {name.decode(): value.decode() for name, value in sent[0]["headers"]}
    return Answer(sent[0]["status"], headers, b"".join(message.get("body", b"") for message in sent[1:]))


Ask = Callable[..., Answer]


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_checkpoint(tmp_path_factory.mktemp("served"), *COLORED)[0]


@pytest.fixture(scope="session")
def application(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Application:
    trained = load_model(checkpoint, torch.device("cpu"))
    folder = tmp_path_factory.mktemp("scored") / "model"
    write_scored(folder, trained)
    return make_app(Settings(folder, "digits: resnet8", work_of(trained), 5, 2, gpu=False))


@pytest.fixture
def ask(application: Application) -> Ask:
    """Return a function that sends one request to the served model."""
    return lambda *what: asyncio.run(request(application, *what))


def form(*files: tuple[str, str, bytes]) -> tuple[bytes, str]:
    """Return a form with files, each (field, name, content), and its content type."""
    parts = [
        f'--cut\r\nContent-Disposition: form-data; name="{field}"; filename="{name}"\r\n\r\n'.encode()
        + content
        + b"\r\n"
        for field, name, content in files
    ]
    return b"".join(parts) + b"--cut--\r\n", "multipart/form-data; boundary=cut"
