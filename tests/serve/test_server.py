"""`resnet-dist serve` as a program: many clients at once, several processes, its end, and its page in a browser."""

from __future__ import annotations

import base64
import http.client
import json
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from tests.data.images.pictures import jpeg, photo, saved
from tests.serve.test_app import predicted

pytestmark = pytest.mark.long
BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
NUM_CLIENTS, NUM_REQUESTS = 16, 5


@contextmanager
def serving(folder: Path, *words: str) -> Iterator[str]:
    """Run the command in `folder`; yield the address that it prints, and see that Ctrl-C ends it with 0 and no words."""
    command = [sys.executable, "-m", "resnet_dist", "serve", *words]
    with subprocess.Popen(
        command, cwd=folder, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
    ) as process:
        assert process.stdout is not None
        try:
            lines = [process.stdout.readline() for _ in range(3)]
            if "in use" in lines[0]:
                lines = [*lines[1:], process.stdout.readline()]
            found = re.match(r"open +(http://\S+)/\n", lines[0])
            assert found, process.communicate(timeout=60)
            yield found[1]
        except BaseException:
            process.kill()
            raise
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (0, "", "")


def post(connection: http.client.HTTPConnection, image: bytes) -> tuple[int, Any]:
    connection.request("POST", "/predict?top=2", image, {"Content-Type": "image/jpeg"})
    answer = connection.getresponse()
    return answer.status, json.loads(answer.read())


def connect(address: str) -> http.client.HTTPConnection:
    return http.client.HTTPConnection(address.removeprefix("http://"), timeout=100)


@pytest.mark.parametrize("workers", ["1", "2"])
def test_many_clients_at_once_get_the_answers_of_one(checkpoint: Path, tmp_path: Path, workers: str) -> None:
    images = [jpeg(photo(60 + 3 * number, 80, grain=2 + number)) for number in range(NUM_CLIENTS)]
    expected = predicted(checkpoint, *images, top=2)

    def ask(number: int) -> None:
        connection = connect(address)
        for _ in range(NUM_REQUESTS):
            status, found = post(connection, images[number])
            (row,) = found["predictions"]
            assert status == 200
            assert row["probabilities"] == pytest.approx(expected[number]["probabilities"], rel=1e-4)
            status, found = post(connection, b"hello\n")
            assert (status, found["message"]) == (400, "not a readable image: a text file")
        connection.close()

    with (
        serving(tmp_path, str(checkpoint), "--workers", workers, "--cpu") as address,
        ThreadPoolExecutor(NUM_CLIENTS) as pool,
    ):
        list(pool.map(ask, range(NUM_CLIENTS)))
    assert not list(tmp_path.iterdir())  # Nothing is left beside what a person has there.


@pytest.mark.skipif(BROWSER is None, reason="no browser: `apt-get install chromium` brings one")
@pytest.mark.skipif(
    find_spec("playwright") is None, reason="playwright, which drives a browser, is not installed"
)
def test_a_browser_shows_the_classes_of_dropped_and_chosen_images(checkpoint: Path, tmp_path: Path) -> None:
    from playwright.sync_api import sync_playwright

    picture, text = tmp_path / "owl <b>.png", tmp_path / "notes.txt"
    picture.write_bytes(saved(photo(90, 120), "PNG"))
    text.write_text("hello\n")
    (expected,) = predicted(checkpoint, picture.read_bytes())
    # A page cannot take a file from a disk: it is made of its bytes.
    drop = """([name, content]) => {
        const data = new DataTransfer();
        const bytes = Uint8Array.from(atob(content), letter => letter.charCodeAt(0));
        data.items.add(new File([bytes], name, {type: "image/png"}));
        document.getElementById("drop").dispatchEvent(new DragEvent("drop", {dataTransfer: data, bubbles: true, cancelable: true}));
    }"""
    with serving(tmp_path, str(checkpoint)) as address, sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        page = browser.new_page()
        problems: list[str] = []
        page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: problems.append(str(error)))
        foreign: list[str] = []
        page.on(
            "request", lambda request: foreign.append(request.url) if "127.0.0.1" not in request.url else None
        )
        page.goto(address)
        page.get_by_text("6 classes; the 5 most probable ones are shown.").wait_for()
        page.set_input_files("input", [str(picture), str(text)])
        page.locator("article li").nth(4).wait_for()
        page.get_by_text("not a readable image: a text file").wait_for()
        shown = page.locator("article").first.inner_text()
        widths = page.eval_on_selector_all("article li b", "all => all.map(one => one.style.width)")
        page.evaluate(drop, ["dropped.png", base64.b64encode(picture.read_bytes()).decode()])
        page.get_by_text("dropped.png").wait_for()
        page.locator("article").first.locator("li").nth(4).wait_for()
        page.screenshot(path=str(tmp_path.parent / "page.png"), full_page=True)
        browser.close()
        picture.unlink()
        text.unlink()
    lines = [line.strip() for line in shown.splitlines() if line.strip()]
    assert lines[0] == "owl <b>.png"
    percents = [f"{100 * value:.1f}" for value in expected["probabilities"]]
    assert lines[1:] == [
        text
        for name, value in zip(expected["classes"], percents, strict=True)
        for text in (name, f"{value} %")
    ]
    assert [float(width.removesuffix("%")) for width in widths] == [float(value) for value in percents]
    assert [one for one in foreign if not one.startswith(("blob:", "data:"))] == []
    # The browser itself reports the answer to the text.
    assert [one for one in problems if "400" not in one] == []
