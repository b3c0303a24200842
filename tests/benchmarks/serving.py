"""Measure `resnet-dist serve` beside `mlflow models serve` of a pyfunc that is written by hand, in one interleaved run.

Both serve a ResNet-18 of 224 pixels on this machine's CPUs and answer the same photographs, one a request: ours gets their
bytes, the other one base64 in JSON, which is how MLflow takes bytes. The pyfunc is the usual one: Pillow, torchvision's
transforms, torchvision's net. Both run all the time and are asked by turns.

    uv run python tests/benchmarks/serving.py --seconds 6 --rounds 3
"""

from __future__ import annotations

import argparse
import base64
import http.client
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from tests.checkpoints import COLORED, random_checkpoint
from tests.data.images.pictures import jpeg, photo

CLIENTS = (1, 8, 32)
NUM_PHOTOS = 32
START_SECONDS = 120.0
BY_HAND = """
import base64, io
import mlflow, torch
from PIL import Image
from torchvision import models, transforms

class Classifier(mlflow.pyfunc.PythonModel):
    def load_context(self, context):
        self.model = models.resnet18(num_classes=6).eval()
        self.transform = transforms.Compose([
            transforms.Resize(256), transforms.CenterCrop(224), transforms.ToTensor(),
            transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ])

    def predict(self, context, model_input, params=None):
        images = [Image.open(io.BytesIO(base64.b64decode(text))).convert("RGB") for text in model_input["image"]]
        with torch.no_grad():
            logits = self.model(torch.stack([self.transform(image) for image in images]))
        values, labels = logits.softmax(1).topk(5)
        return [{"classes": row, "probabilities": found} for row, found in zip(labels.tolist(), values.tolist())]

mlflow.models.set_model(Classifier())
"""


@dataclass(frozen=True)
class Contestant:
    """A server, and the requests that it gets."""

    name: str
    port: int
    path: str
    content_type: str
    bodies: Sequence[bytes]


@dataclass(frozen=True)
class Round:
    """The answers of some seconds: how many a second, and how long each took."""

    per_second: float
    seconds: list[float]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=6.0, help="of each round")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    photos = [jpeg(photo(480, 640, grain=12 + number)) for number in range(NUM_PHOTOS)]
    with tempfile.TemporaryDirectory() as text, ExitStack() as stack:
        folder = Path(text)
        ours = stack.enter_context(serve_ours(folder, photos))
        by_hand = stack.enter_context(serve_by_hand(folder, photos))
        found: dict[tuple[str, int], list[Round]] = {}
        for clients in CLIENTS:
            for _ in range(arguments.rounds):
                for contestant in (ours, by_hand):
                    measured = ask(contestant, clients, arguments.seconds)
                    found.setdefault((contestant.name, clients), []).append(measured)
    print_table([ours.name, by_hand.name], found)


@contextmanager
def serve_ours(folder: Path, photos: Sequence[bytes]) -> Iterator[Contestant]:
    checkpoint, _ = random_checkpoint(
        folder / "ours",
        *COLORED,
        "model.name=resnet18",
        "data.image_size=224",
        "data.eval_flip=false",
        "data.eval_shift=0",
    )
    port = free_port()
    command = [sys.executable, "-m", "resnet_dist", "serve", str(checkpoint), "--port", str(port), "--cpu"]
    with running(command, folder, port):
        yield Contestant("`resnet-dist serve`", port, "/predict", "image/jpeg", photos)


@contextmanager
def serve_by_hand(folder: Path, photos: Sequence[bytes]) -> Iterator[Contestant]:
    import mlflow

    (folder / "by_hand.py").write_text(BY_HAND)
    mlflow.pyfunc.save_model(
        folder / "model", python_model=str(folder / "by_hand.py"), pip_requirements=["mlflow"]
    )
    port = free_port()
    command = [
        sys.executable,
        "-m",
        "mlflow",
        "models",
        "serve",
        "-m",
        str(folder / "model"),
        "-p",
        str(port),
    ]
    bodies = [
        json.dumps(
            {"dataframe_split": {"columns": ["image"], "data": [[base64.b64encode(one).decode()]]}}
        ).encode()
        for one in photos
    ]
    with running([*command, "--env-manager", "local"], folder, port):
        yield Contestant("by hand", port, "/invocations", "application/json", bodies)


@contextmanager
def running(command: list[str], folder: Path, port: int) -> Iterator[None]:
    """Run a server until the block ends, which begins when it answers."""
    log = folder / f"{port}.log"
    # MLflow starts uvicorn by its name.
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    with log.open("wb") as file:
        server = subprocess.Popen(
            command, cwd=folder, env=environment, stdout=file, stderr=file, start_new_session=True
        )
    try:
        end = time.monotonic() + START_SECONDS
        while not answers(port):
            if server.poll() is not None or time.monotonic() > end:
                raise SystemExit(log.read_text())
            time.sleep(0.2)
        yield
    finally:
        with suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def answers(port: int) -> bool:
    try:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
        connection.request("GET", "/ping")
        return connection.getresponse().status == 200
    except OSError:
        return False


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def ask(contestant: Contestant, num_clients: int, seconds: float) -> Round:
    """Let clients ask for some seconds, each as soon as it has its last answer."""
    end = time.monotonic() + seconds

    def client(number: int) -> list[float]:
        connection = http.client.HTTPConnection("127.0.0.1", contestant.port, timeout=100)
        taken: list[float] = []
        while (start := time.monotonic()) < end:
            body = contestant.bodies[(number + len(taken)) % len(contestant.bodies)]
            connection.request("POST", contestant.path, body, {"Content-Type": contestant.content_type})
            answer = connection.getresponse()
            content = answer.read()
            if answer.status != 200:
                raise SystemExit(f"{contestant.name}: {answer.status} {content[:500]!r}")
            taken.append(time.monotonic() - start)
        connection.close()
        return taken

    start = time.monotonic()
    with ThreadPoolExecutor(num_clients) as pool:
        taken = [one for found in pool.map(client, range(num_clients)) for one in found]
    return Round(len(taken) / (time.monotonic() - start), taken)


def print_table(names: Sequence[str], found: dict[tuple[str, int], list[Round]]) -> None:
    cells: dict[str, Callable[[list[Round]], str]] = {
        "requests/s": lambda rounds: f"{statistics.median(one.per_second for one in rounds):.1f}",
        "lowest to highest": lambda rounds: (
            f"{min(one.per_second for one in rounds):.1f} to {max(one.per_second for one in rounds):.1f}"
        ),
        "p50": lambda rounds: percentile(rounds, 50),
        "p99": lambda rounds: percentile(rounds, 99),
    }
    print(f"| clients | server | {' | '.join(cells)} |")
    print("|---|---|" + "---|" * len(cells))
    for clients in CLIENTS:
        for name in names:
            row = " | ".join(cell(found[name, clients]) for cell in cells.values())
            print(f"| {clients} | {name} | {row} |")


def percentile(rounds: Sequence[Round], number: int) -> str:
    taken = sorted(one for measured in rounds for one in measured.seconds)
    return f"{taken[min(len(taken) - 1, len(taken) * number // 100)] * 1000:.0f} ms"


if __name__ == "__main__":
    main()
