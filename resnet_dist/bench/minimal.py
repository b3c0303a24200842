"""The baseline of `bench launch`: the smallest program that trains one step, with Ray Train or without.

`bench launch` runs it as a script. It reads no data, writes no metrics and keeps no checkpoint.
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path
from typing import Any


def train_one_step(config: dict[str, Any]) -> None:
    """Train one step on random images, on one rank. Rank 0 then creates the file `config["mark"]`."""
    import torch
    from torch.nn import functional as F

    from resnet_dist.model import build_model

    device, rank, size, channels = torch.device("cpu"), 0, config["image_size"], config["channels"]
    model: torch.nn.Module = build_model(config["model"], in_channels=channels, num_classes=config["classes"])
    if config["ranks"]:
        import ray.train.torch

        device, rank = ray.train.torch.get_device(), ray.train.get_context().get_world_rank()
        model = ray.train.torch.prepare_model(model)
    elif config["gpu"]:
        device = torch.device("cuda")
        model = model.to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    images = torch.randn(config["batch_size"], channels, size, size, device=device)
    labels = torch.randint(config["classes"], (config["batch_size"],), device=device)
    F.cross_entropy(model(images), labels).backward()
    optimizer.step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    if rank == 0:
        Path(config["mark"]).touch()


def train_on_ray(config: dict[str, Any], folder: str, cpus: int) -> None:
    """Run `train_one_step` on `config["ranks"]` workers of a new local Ray instance."""
    import ray
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    ray.init(
        address="local",  # Never join another cluster that runs on this machine.
        num_cpus=cpus,
        include_dashboard=False,
        logging_level=logging.ERROR,
        log_to_driver=False,
    )
    TorchTrainer(
        train_one_step,
        train_loop_config=config,
        scaling_config=ScalingConfig(num_workers=config["ranks"], use_gpu=config["gpu"]),
        run_config=RunConfig(name="minimal", storage_path=folder),
    ).fit()


def main() -> None:
    parser = argparse.ArgumentParser()
    for name in ("--model", "--mark", "--folder"):
        parser.add_argument(name, required=True)
    for name in ("--image-size", "--channels", "--classes", "--batch-size", "--cpus", "--ranks"):
        parser.add_argument(name, type=int, required=True)
    parser.add_argument("--gpu", action="store_true")
    config = vars(parser.parse_args())
    folder, cpus = config.pop("folder"), config.pop("cpus")
    if config["ranks"]:
        train_on_ray(config, folder, cpus)
    else:
        train_one_step(config)


if __name__ == "__main__":
    main()
