"""A served model answers as `predict` does, whatever an image is wrapped in; a bad request is one sentence."""

from __future__ import annotations

import asyncio
import base64
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from resnet_dist.predict.classify import predictions
from resnet_dist.predict.unread import Input
from resnet_dist.serve import body as limits
from resnet_dist.serve.body import Application
from resnet_dist.train.checkpoint.load import load_model
from tests.checkpoints import CLASSES
from tests.data.images.pictures import huge_png, jpeg, photo, saved
from tests.serve.conftest import Ask, form, request

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:mlflow", "ignore::FutureWarning:mlflow")

PHOTO, PNG = jpeg(photo(80, 120)), saved(photo(33, 44), "PNG")


def predicted(checkpoint: Path, *images: bytes, top: int = 5) -> list[dict[str, Any]]:
    """Return what `predict` finds, an image at a time."""
    trained = load_model(checkpoint, torch.device("cpu"))
    rows: list[dict[str, Any]] = []
    for image in images:
        given = Input("image", lambda image=image: image)  # type: ignore[misc]
        for (row,) in predictions(trained, [given], torch.device("cpu"), top):
            rows.append({"classes": list(row.classes), "probabilities": list(row.probabilities)})
    return rows


@pytest.mark.parametrize(
    "content_type", ["image/jpeg", "application/octet-stream", "application/x-www-form-urlencoded", ""]
)
def test_the_bytes_of_an_image(ask: Ask, checkpoint: Path, content_type: str) -> None:
    answer = ask("POST", "/predict", PHOTO, content_type)
    assert (answer.status, answer.json) == (200, {"predictions": predicted(checkpoint, PHOTO)})
    (row,) = ask("POST", "/predict?top=2", PHOTO, content_type).json["predictions"]
    assert len(row["classes"]) == 2
    assert len(ask("POST", "/predict?top=99", PHOTO, content_type).json["predictions"][0]["classes"]) == len(
        CLASSES
    )


def test_a_form_of_several_files_in_their_order(ask: Ask, checkpoint: Path) -> None:
    given, kind = form(("a", "ä 1.jpg", PHOTO), ("b", "2.png", PNG), ("a", "", PHOTO))
    answer = ask("POST", "/predict?top=3", given, kind)
    assert answer.status == 200, answer.body
    rows = answer.json["predictions"]
    assert [row.pop("file", None) for row in rows] == ["ä 1.jpg", "2.png", None]
    for row, expected in zip(rows, predicted(checkpoint, PHOTO, PNG, PHOTO, top=3), strict=True):
        assert row["classes"] == expected["classes"]
        # Images that share a forward pass may be summed in another order.
        assert row["probabilities"] == pytest.approx(expected["probabilities"], rel=1e-5)


def test_the_routes_of_mlflow_are_as_they_are(ask: Ask, checkpoint: Path) -> None:
    import mlflow

    given = json.dumps({"inputs": [base64.b64encode(PHOTO).decode()], "params": {"top_k": 3}}).encode()
    answer = ask("POST", "/invocations", given, "application/json")
    assert (answer.status, answer.json) == (200, {"predictions": predicted(checkpoint, PHOTO, top=3)})
    assert ask("POST", "/invocations", b'{"inputs": ["aGVsbG8="]}', "application/json").status == 400
    assert [ask("GET", path).status for path in ("/ping", "/health")] == [200, 200]
    assert ask("GET", "/version").body.decode() == mlflow.__version__


def test_the_page_is_one_file_that_loads_nothing_else(ask: Ask) -> None:
    page = ask("GET", "/")
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    assert page.headers["content-security-policy"].startswith("default-src 'none'")
    text = page.body.decode()
    assert "://" not in text
    assert "src=" not in text
    assert ask("GET", "/model").json == {"name": "digits: resnet8", "num_classes": len(CLASSES), "top": 5}


@pytest.mark.parametrize(
    ("target", "given", "kind", "status", "message"),
    [
        ("/predict", b"hello\n", "image/jpeg", 400, "not a readable image: a text file"),
        ("/predict", b"", "image/jpeg", 400, "the body is empty; send the bytes of an image"),
        ("/predict", huge_png(), "image/png", 400, "10000 x 10000 pixels are more than 80,000,000"),
        ("/predict?top=0", PHOTO, "image/jpeg", 400, "top='0'; it must be 1 or more"),
        (
            f"/predict?top={'9' * 5000}",
            PHOTO,
            "image/jpeg",
            400,
            f"top='{'9' * 40}'; it must be 1 or more, of at",
        ),
        ("/predict?top=many", PHOTO, "image/jpeg", 400, "top='many'; it must be 1 or more"),
        ("/predict", b"{}", "application/json", 415, "the body is JSON, which /invocations takes"),
        ("/predict", *form(), 400, "the form has no files; send each image as a file"),
        ("/predict", b"nothing", "multipart/form-data", 400, "the form cannot be read: Missing boundary"),
        ("/predict", b"nothing", "multipart/form-data; boundary=cut", 400, "the form cannot be read"),
        (
            "/predict",
            *form(("a", "a.jpg", PHOTO), ("b", "b.txt", b"hello\n")),
            400,
            "image 1 (b.txt): not a readable image: a text file",
        ),
        (
            "/predict",
            *form(("a", "a.jpg", PHOTO), ("b", "", b"hello\n")),
            400,
            "image 1: not a readable image: a text file",
        ),
        (
            "/predict",
            *form(("a", "", b"hello\n")),
            400,
            "not a readable image: a text file",
        ),
        ("/predict", *form(*[("a", "a", b"x")] * 257), 413, "the form has 257 images; send at most 256"),
        ("/predict", *form(*[("a", "a", b"x")] * 1025), 413, "send at most 256 images at once"),
    ],
    ids=lambda value: value[:30] if isinstance(value, str) else "",
)
def test_a_bad_request_is_one_sentence(
    ask: Ask, target: str, given: bytes, kind: str, status: int, message: str
) -> None:
    answer = ask("POST", target, given, kind)
    assert answer.status == status
    assert answer.json.keys() == {"error_code", "message"}
    assert message in answer.json["message"]
    assert "\n" not in answer.json["message"]


def test_a_body_has_a_limit_and_so_have_all_together(monkeypatch: pytest.MonkeyPatch) -> None:
    reached: list[bytes] = []

    async def application(scope: Any, receive: Any, send: Any) -> None:
        reached.append((await receive())["body"])
        if reached[-1] == b"ask again":
            assert (await request(limited, "POST", "/", b"x" * 12)).status == 503
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    limited: Application = limits.Limits(application, max_body_bytes=12, max_waiting_bytes=20)
    assert asyncio.run(request(limited, "POST", "/", [b"x" * 6, b"x" * 6])).status == 200
    too_large = asyncio.run(request(limited, "POST", "/", [b"x" * 6, b"x" * 6, b"x", b"x"]))
    assert (too_large.status, too_large.json["message"]) == (
        413,
        "the body has more than 12 bytes; send fewer or smaller images",
    )
    assert asyncio.run(request(limited, "POST", "/", b"ask again")).status == 200
    for _ in range(3):  # What was answered or refused waits no more.
        assert asyncio.run(request(limited, "POST", "/", b"x" * 12)).status == 200
    monkeypatch.setattr(limits, "MAX_DROPPED_BYTES", 12)
    parts = [b"x" * 5] * 50
    assert asyncio.run(request(limited, "POST", "/", parts)).status == 413
    assert reached == [b"x" * 12, b"ask again", *[b"x" * 12] * 3]
