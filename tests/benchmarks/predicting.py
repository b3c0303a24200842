"""Measure `predict` on JPEG images: images per second in one process and on workers, as a share of the loader's.

    python -m tests.benchmarks.predicting FOLDER --model resnet20 --rounds 3 --workers 2

FOLDER has a folder of images for each class, such as 5,000 of CIFAR-10; 32 pixels, random weights. The loader's rate is that
of the same images from shards, without a model; the model's is that of its forward pass alone.
"""

from __future__ import annotations

import argparse
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from resnet_dist.data.findings import Findings
from resnet_dist.data.prepare.sources import open_source
from resnet_dist.data.prepare.split import prepare
from resnet_dist.data.shards.index import Index, read_index
from resnet_dist.predict.classify import decoded_batches, predictions
from resnet_dist.predict.inputs import inputs_of
from resnet_dist.predict.unread import Input
from resnet_dist.system.cpus import cpu_count
from resnet_dist.train.checkpoint.load import TrainedModel, load_model
from resnet_dist.train.evaluate import evaluation_loader
from resnet_dist.world import World
from tests.checkpoints import random_checkpoint

CIFAR = ("data.channels=3", "data.image_size=32", "data.mean=[0.49,0.48,0.45]", "data.std=[0.25,0.24,0.26]")
BATCH = ("data.global_batch_size=256", "data.micro_batch_size=256", "data.lanes=8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("--model", default="resnet8")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--without-ray", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(cpu_count())
    with tempfile.TemporaryDirectory() as place:
        path, _ = random_checkpoint(Path(place) / "m", f"model.name={given.model}", *CIFAR, *BATCH)
        trained = load_model(path, torch.device("cpu"))
        inputs = list(inputs_of([given.folder], trained.recipe.data, Findings()))
        prepare(open_source(given.folder), Path(place) / "shards")
        index = read_index(Path(place) / "shards/train")
        rates: dict[str, list[float]] = {name: [] for name in ("loader", "decoding", "model", "predict")}
        for _ in range(given.rounds):
            rates["loader"].append(load(trained, index))
            rates["decoding"].append(rate(inputs, lambda: decode(trained, inputs)))
            rates["model"].append(rate(inputs, lambda: forward(trained, len(inputs))))
            rates["predict"].append(rate(inputs, lambda: predict(trained, inputs)))
        print(f"{len(inputs):,} images, {given.model}, {torch.get_num_threads()} threads")
        base = statistics.median(rates["loader"])
        for name, values in rates.items():
            median = statistics.median(values)
            print(f"{name:<10}{median:10,.0f} images/s{median / base:8.1%} of the loader's")
        if not given.without_ray:
            seconds = command_seconds(str(path), given.folder, given.workers, Path(place))
            print(f"predict --workers {given.workers}: {seconds:.1f} s in all, with the start of Ray")


def rate(inputs: list[Input], call: object) -> float:
    begin = time.perf_counter()
    call()  # type: ignore[operator]
    return len(inputs) / (time.perf_counter() - begin)


def load(trained: TrainedModel, index: Index) -> float:
    """Return the images per second of the loader of an evaluation."""
    with evaluation_loader(index, trained.recipe.data, World.single()) as loader:
        begin = time.perf_counter()
        for step in range(loader.order.steps_per_epoch):
            loader.batch_at(step)
        return index.num_samples / (time.perf_counter() - begin)


def decode(trained: TrainedModel, inputs: list[Input]) -> None:
    for _ in decoded_batches(inputs, trained.recipe.data):
        pass


def forward(trained: TrainedModel, count: int) -> None:
    images = torch.zeros(256, 3, 32, 32).to(memory_format=torch.channels_last)
    with torch.inference_mode():
        for _ in range(-(-count // 256)):
            trained.model(images)


def predict(trained: TrainedModel, inputs: list[Input]) -> None:
    for _ in predictions(trained, inputs, torch.device("cpu"), 3):
        pass


def command_seconds(model: str, folder: str, workers: int, place: Path) -> float:
    command = [sys.executable, "-m", "resnet_dist", "predict", model, folder, "--to", "rows.jsonl"]
    begin = time.perf_counter()
    done = subprocess.run(
        [*command, "--workers", str(workers), "--cpu"],
        cwd=place,
        check=True,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert re.search(r"rows.jsonl: [\d,]+ rows", done.stdout)
    return time.perf_counter() - begin


if __name__ == "__main__":
    main()
