"""Compare the step time while a ResNet-50's checkpoint is uploaded, to a server of 50 MB/s, with that of quiet steps.

    python tests/benchmarks/upload_beside_training.py --model resnet18 --batch 16 --rounds 10

Each round trains for some steps without an upload and for as many beside one, in an order that alternates. The server
discards what it gets and runs in a process of its own, on this machine: on few cores its work counts as ours.
"""

from __future__ import annotations

import argparse
import os
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import torch

from resnet_dist.model import build_model
from resnet_dist.runs.storage.open import open_storage
from resnet_dist.runs.storage.scratch import SCRATCH_VARIABLE
from resnet_dist.train.checkpoint.folder import Tensors, write_checkpoint
from tests.s3_server import variables

BLOCK_BYTES = 256 * 1024
LIST = b"<ListBucketResult><Name>b</Name><KeyCount>0</KeyCount><IsTruncated>false</IsTruncated></ListBucketResult>"
BEGIN = b"<InitiateMultipartUploadResult><UploadId>1</UploadId></InitiateMultipartUploadResult>"
DELETED = b"<DeleteResult><Deleted><Key>x</Key></Deleted></DeleteResult>"
END = b'<CompleteMultipartUploadResult><ETag>"1"</ETag></CompleteMultipartUploadResult>'


def serve(bytes_per_second: float) -> None:
    """Answer the requests of an upload to S3 and discard the bytes, at a limited rate over all connections."""
    lock, free_at = threading.Lock(), 0.0

    def take(num_bytes: int) -> None:
        nonlocal free_at
        with lock:
            begin = max(free_at, time.monotonic())
            free_at = begin + num_bytes / bytes_per_second
        time.sleep(max(0.0, begin - time.monotonic()))

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def answer(self) -> None:
            left = int(self.headers.get("Content-Length") or 0)
            while left:
                block = self.rfile.read(min(BLOCK_BYTES, left))
                left -= len(block)
                take(len(block))
            body = b""
            if self.command == "POST":
                body = BEGIN if re.search(r"[?&]uploads", self.path) else END
                body = DELETED if self.path.endswith("?delete") else body
            elif self.command == "GET":
                body = LIST
            self.send_response(200)
            self.send_header("ETag", '"1"')
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_GET = do_PUT = do_POST = do_DELETE = answer

        def log_message(self, *arguments: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    print(server.server_port, flush=True)
    server.serve_forever()


def state_of(name: str) -> Tensors:
    """Return tensors of the size of a checkpoint: the weights, and as many of the optimizer."""
    weights = {
        key: value.contiguous()
        for key, value in build_model(name=name, in_channels=3, num_classes=1000).state_dict().items()
    }
    momentum = {key: torch.zeros_like(value) for key, value in weights.items()}
    return {"model": weights, "optimizer": momentum, "meter": {"sums": torch.zeros(4)}}


class Uploads:
    """Uploads checkpoints one after another, while it is switched on."""

    def __init__(self, url: str, tensors: Tensors) -> None:
        self._storage, self._tensors = open_storage(url), tensors
        self._on, self._idle = threading.Event(), threading.Event()
        self._idle.set()
        self.done = 0
        threading.Thread(target=self._run, daemon=True).start()

    def switch(self, on: bool) -> None:
        if on:
            self._idle.clear()
            self._on.set()
        else:
            self._on.clear()
            self._idle.wait()  # for the upload under way: no quiet step runs beside it

    def _run(self) -> None:
        while self._on.wait():
            write_checkpoint(self._storage, self.done, self._tensors, {})
            self.done += 1
            if not self._on.is_set():
                self._idle.set()


def measure(
    model: str, batch: int, rounds: int, steps: int, uploads: Uploads
) -> tuple[list[float], list[float]]:
    """Return the seconds of all quiet steps, and of those beside an upload."""
    torch.manual_seed(0)
    net = build_model(name=model, in_channels=3, num_classes=1000)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9)
    images_NCHW, labels_N = torch.randn(batch, 3, 224, 224), torch.randint(1000, (batch,))
    seconds: dict[bool, list[float]] = {False: [], True: []}
    for number in range(rounds + 1):
        for on in (False, True) if number % 2 else (True, False):
            uploads.switch(on)
            for _ in range(steps):
                begin = time.perf_counter()
                optimizer.zero_grad()
                torch.nn.functional.cross_entropy(net(images_NCHW), labels_N).backward()
                optimizer.step()
                if number:  # The first round warms up.
                    seconds[on].append(time.perf_counter() - begin)
            uploads.switch(False)
    return seconds[False], seconds[True]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--steps", type=int, default=6, help="in each half of a round")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rate", type=float, default=50e6, help="of the server, in bytes per second")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(options.rate)
    torch.set_num_threads(options.threads)
    command = [sys.executable, __file__, "--serve", "--rate", str(options.rate)]
    with (
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server,
        tempfile.TemporaryDirectory() as folder,
    ):
        try:
            assert server.stdout is not None
            os.environ.update(variables(f"http://127.0.0.1:{int(server.stdout.readline())}"))
            os.environ[SCRATCH_VARIABLE] = str(Path(folder) / "scratch")
            uploads = Uploads("s3://b/run/checkpoints", state_of("resnet50"))
            quiet, beside = measure(options.model, options.batch, options.rounds, options.steps, uploads)
        finally:
            server.kill()
    print(
        f"{options.model}, batches of {options.batch}, {options.threads} thread(s), {uploads.done} uploads; median step "
        f"{statistics.median(quiet):.4f} s, beside an upload {statistics.median(beside):.4f} s: "
        f"{statistics.median(beside) / statistics.median(quiet):.3f} ×"
    )


if __name__ == "__main__":
    main()
