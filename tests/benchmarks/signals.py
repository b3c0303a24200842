"""Seconds from a signal to the end of a command, whatever the network does: a table command × server × signal.

Run: python -m tests.benchmarks.signals [COMMAND...] [SERVER...]
A command must end within 5 s of its first SIGINT or SIGTERM, and within 1 s of a second one.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from resnet_dist.config import load_recipe
from resnet_dist.runs.folder import checkpoint_name
from resnet_dist.runs.storage.open import open_storage
from resnet_dist.train.checkpoint.folder import write_checkpoint
from resnet_dist.train.start.initial import build
from tests.paths import ROOT

LOCALHOST = "127.0.0.1"
MAX_SECONDS, MAX_SECONDS_AFTER_SECOND = 5.0, 1.0
START_SECONDS = 40.0  # a command has asked the server by then
SETTLE_SECONDS = 1.5  # between the first request and the signal
SERVERS = ("busy", "stalled", "trickle", "dead", "s3-dead", "s3-busy")
COMMANDS = ("index", "verify", "prepare", "bench", "evaluate", "train")
SIGNALS = (signal.SIGINT, signal.SIGTERM)
INDEX = {
    "shardlist": [{"url": f"train-{n}.tar", "nsamples": 100, "filesize": 102400} for n in range(3)],
    "classes": ["a", "b"],
    "__kind__": "wids-shard-index-v1",
    "wids_version": 1,
}


@dataclass
class Server:
    """A server that answers a request for an index and misbehaves for every other one; `asked` counts the latter."""

    url: str
    environment: dict[str, str]
    asked: threading.Event


@contextmanager
def server(kind: str) -> Iterator[Server]:
    """Serve in a way that never delivers a shard.

    busy: 503. stalled: the headers, then nothing. trickle: a byte every second. dead: a listener that never answers.
    s3-…: the same as an endpoint of S3.
    """
    asked, base = threading.Event(), kind.removeprefix("s3-")
    closing = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.do_GET()

        def do_CONNECT(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            if self.path.partition("?")[0].endswith("index.json"):
                body = json.dumps(INDEX).encode()
                self.send_response(200)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                if self.command == "GET":
                    self.wfile.write(body)
                return
            asked.set()
            if base == "busy":
                self.send_response(503)
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            if base != "dead":
                self.send_response(200)
                self.send_header("Content-Length", "102400")
                self.end_headers()
            while not closing.wait(1.0):
                if base == "trickle":
                    self.wfile.write(b"\0")

        def log_message(self, *args: object) -> None:
            pass

    httpd = ThreadingHTTPServer((LOCALHOST, 0), Handler)
    httpd.daemon_threads = True
    httpd.handle_error = lambda *args: None  # type: ignore[method-assign]
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    url = f"http://{LOCALHOST}:{httpd.server_port}"
    environment = {}
    if kind.startswith("s3-"):
        environment = {
            "AWS_ACCESS_KEY_ID": "testing",
            "AWS_SECRET_ACCESS_KEY": "testing",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_ENDPOINT_URL": url,
        }
        url = "s3://bucket"
    try:
        yield Server(f"{url}/set", environment, asked)
    finally:
        closing.set()
        httpd.shutdown()
        httpd.server_close()


def arguments(command: str, url: str, folder: Path) -> list[str]:
    cache = str(folder / "cache")
    if command == "index":
        return ["index", f"{url}/train-{{0..2}}.tar", "--out", str(folder / "own"), "--shard-cache", cache]
    if command == "verify":
        return ["index", f"{url}/index.json", "--verify", "--shard-cache", cache]
    if command == "prepare":  # the download of the data goes through a proxy
        return ["prepare", "cifar10", str(folder / "out")]
    if command == "bench":
        return ["bench", "loader", f"{url}/index.json", "--image-size", "8", "--global-batch-size", "8"]
    if command == "evaluate":
        return ["evaluate", str(write_model(folder / "model")), f"{url}/index.json", "--cpu"]
    if command == "train":
        changes = [
            f"data.train={url}/index.json",
            f"data.eval={url}/index.json",
            "data.source=none",
            f"data.shard_cache={cache}",
            "model.name=resnet8",
            "train.label_smoothing=0",
        ]
        sets = [word for change in changes for word in ("--set", change)]
        return [
            "train",
            str(ROOT / "jobs/digits.py"),
            "--local",
            "--cpu",
            "--output",
            str(folder / "out"),
            *sets,
        ]
    raise ValueError(command)


def write_model(folder: Path) -> Path:
    """Write a checkpoint of a model of two classes below `folder`, as it is before its first step; return it."""
    recipe = load_recipe(ROOT / "jobs/digits.py", ["model.name=resnet8"])
    model = build(recipe, len(INDEX["classes"]))  # type: ignore[arg-type]
    manifest = {"scalars": {"step": 0}, "recipe": recipe.model_dump(mode="json"), "classes": INDEX["classes"]}
    write_checkpoint(open_storage(folder), 0, {"model": model.state_dict()}, manifest)
    return folder / checkpoint_name(0)


def measure(command: str, kind: str, number: signal.Signals, *, twice: bool) -> float | None:
    """Return the seconds from the last signal to the end; None where the command ended before the signal."""
    with tempfile.TemporaryDirectory() as name, server(kind) as running:
        folder = Path(name) / "work"
        folder.mkdir()
        own = {"HOME": name, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **running.environment}
        if command == "prepare":
            own |= {"https_proxy": running.url.removesuffix("/set"), "no_proxy": ""}
        process = subprocess.Popen(
            [sys.executable, "-m", "resnet_dist", *arguments(command, running.url, folder)],
            cwd=folder,
            env={**os.environ, **own},
            start_new_session=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        try:
            if not running.asked.wait(START_SECONDS) or process.poll() is not None:
                process.kill()
                print(process.communicate()[0], file=sys.stderr)
                return None
            time.sleep(SETTLE_SECONDS)
            if process.poll() is not None:
                return None  # an error ended it, such as torchvision's, which does not retry
            process.send_signal(number)
            if twice:
                time.sleep(1.1)
                if process.poll() is None:
                    process.send_signal(number)
            start = time.monotonic()
            output, _ = process.communicate(timeout=60)
            # A second signal may end the interpreter while it shuts down; a shell sees 130 or 143 there too.
            assert process.returncode in (130, -number), (process.returncode, output)
            return time.monotonic() - start
        except subprocess.TimeoutExpired:
            return float("inf")
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def main() -> None:
    commands = [word for word in sys.argv[1:] if word in COMMANDS] or COMMANDS
    kinds = [word for word in sys.argv[1:] if word in SERVERS] or SERVERS
    print(f"{'command':<10} {'server':<10} {'SIGINT':>8} {'SIGTERM':>8} {'second':>8}")
    for command in commands:
        for kind in kinds:
            if command == "prepare" and kind.startswith("s3-"):
                continue
            cells = [measure(command, kind, number, twice=False) for number in SIGNALS]
            cells.append(measure(command, kind, signal.SIGINT, twice=True))
            texts = ("-" if cell is None else f"{cell:.1f} s" for cell in cells)
            print(f"{command:<10} {kind:<10} " + " ".join(f"{text:>8}" for text in texts), flush=True)


if __name__ == "__main__":
    main()
