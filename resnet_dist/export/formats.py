"""The formats of an export: each writes a file, and runs it again to be compared with its source.

Shapes: N images, S image size, C channels; N is free in every format.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from resnet_dist.config import Model
from resnet_dist.data.images.augment import normalize
from resnet_dist.errors import UserError
from resnet_dist.model import to_torchvision
from resnet_dist.train.checkpoint.load import TrainedModel, load_model
from resnet_dist.train.checkpoint.single_file import write_single_file
from resnet_dist.train.evaluate import logits_of

Run = Callable[[Tensor], Tensor]  # uint8 (N, S, S, C) on the CPU → logits (N, classes)
ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
# Fields of a model on which neither its weights' names nor its answers depend.
WITHOUT_WEIGHTS = ("name", "zero_init", "stochastic_depth")
DESCRIPTION = "resnet_dist.json"  # the extra file of a pt2


class Logits(nn.Module):
    """Maps the input of an exported file to logits: with `eval_flip` and `eval_shift` the mean over variants of the image.

    pixels: take uint8 (N, S, S, C) and normalize it, in place of normalized float32 (N, C, S, S).
    """

    mean: Tensor
    scale: Tensor

    def __init__(self, trained: TrainedModel, *, pixels: bool) -> None:
        super().__init__()
        # torch.export cannot store weights that are channels-last.
        self.model = copy.deepcopy(trained.model).to(memory_format=torch.contiguous_format)
        self.data, self.pixels = trained.recipe.data, pixels
        # In float64 until the last step, as `normalize` computes them.
        mean = torch.tensor(self.data.mean, dtype=torch.float64)[None, :, None, None] * 255
        scale = 1 / (torch.tensor(self.data.std, dtype=torch.float64)[None, :, None, None] * 255)
        self.register_buffer("mean", mean.float())
        self.register_buffer("scale", scale.float())

    def forward(self, images: Tensor) -> Tensor:
        if self.pixels:
            images = (images.permute(0, 3, 1, 2).float() - self.mean) * self.scale
        return logits_of(self.model, images, self.data)


@dataclass(frozen=True)
class Format:
    """A format: the ends of its file names, what writes a file, and what returns a function that runs it."""

    suffixes: tuple[str, ...]
    write: Callable[[TrainedModel, Path, bool], None]
    open: Callable[[TrainedModel, Path, bool], Run]
    takes_pixels: bool = False  # `--pixels` has a meaning
    averages: bool = True  # the file computes `eval_flip` and `eval_shift`, or its description has them


def describe(trained: TrainedModel, *, pixels: bool) -> dict[str, Any]:
    """Return what a program needs beside the graph: classes, and what its input is."""
    data = trained.recipe.data
    size, channels = data.evaluation_size, data.channels
    return {
        "classes": list(trained.classes),
        "step": trained.step,
        "input": f"uint8 (N, {size}, {size}, {channels})"
        if pixels
        else f"float32 (N, {channels}, {size}, {size})",
        "mean": list(data.mean),
        "std": list(data.std),
        "crop": data.eval_crop,
        "resize": f"{data.eval_resize}, antialiased",
    }


def _write_safetensors(trained: TrainedModel, path: Path, pixels: bool) -> None:
    recipe = trained.recipe.portable().model_dump(mode="json")
    write_single_file(path, trained.model.state_dict(), recipe, trained.classes, trained.step)


def _open_safetensors(trained: TrainedModel, path: Path, pixels: bool) -> Run:
    return source_of(load_model(path, torch.device("cpu")))


def source_of(trained: TrainedModel) -> Run:
    """Return the model itself, as `evaluate` runs it."""
    data = trained.recipe.data
    return lambda images: logits_of(trained.model, normalize(images, data), data)


def plain_source_of(trained: TrainedModel) -> Run:
    """Return the net of a model alone, without `eval_flip` and `eval_shift`."""
    return lambda images: trained.model(normalize(images, trained.recipe.data))


def _example(trained: TrainedModel, pixels: bool) -> Tensor:
    data = trained.recipe.data
    images = torch.zeros(2, data.evaluation_size, data.evaluation_size, data.channels, dtype=torch.uint8)
    return images if pixels else normalize(images, data)


def input_of(trained: TrainedModel, images: Tensor, pixels: bool) -> Tensor:
    return images if pixels else normalize(images, trained.recipe.data).contiguous()


def _write_pt2(trained: TrainedModel, path: Path, pixels: bool) -> None:
    graph = Logits(trained, pixels=pixels).eval()
    shapes = ({0: torch.export.Dim("N", min=1)},)
    program = torch.export.export(graph, (_example(trained, pixels).contiguous(),), dynamic_shapes=shapes)
    torch.export.save(program, path, extra_files={DESCRIPTION: json.dumps(describe(trained, pixels=pixels))})


def _open_pt2(trained: TrainedModel, path: Path, pixels: bool) -> Run:
    module = torch.export.load(path).module()

    def run(images: Tensor) -> Tensor:
        logits: Tensor = module(input_of(trained, images, pixels))
        return logits

    return run


def _write_onnx(trained: TrainedModel, path: Path, pixels: bool) -> None:
    check_onnx("--format onnx")
    import onnx

    graph = Logits(trained, pixels=pixels).eval()
    program = torch.onnx.export(
        graph,
        (_example(trained, pixels).contiguous(),),
        input_names=["images"],
        output_names=["logits"],
        dynamic_shapes=({0: torch.export.Dim("N", min=1)},),
        dynamo=True,
        verbose=False,
    )
    assert program is not None
    model = program.model_proto
    describe_onnx(model, describe(trained, pixels=pixels))
    onnx.save(model, path)


def describe_onnx(model: Any, about: Mapping[str, Any]) -> None:
    """Put a description into the metadata of an ONNX model, each value as JSON."""
    import onnx

    onnx.helper.set_model_props(model, {name: json.dumps(value) for name, value in about.items()})


def check_onnx(option: str) -> None:
    """Raise UserError where a package is missing that an option needs."""
    missing = [name for name in ONNX_PACKAGES if find_spec(name) is None]
    if missing:
        raise UserError(f"{option} needs {' and '.join(missing)}; pip install 'resnet-dist[onnx]'")


def _open_onnx(trained: TrainedModel, path: Path, pixels: bool) -> Run:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])

    def run(images: Tensor) -> Tensor:
        (logits,) = session.run(None, {"images": input_of(trained, images, pixels).numpy()})
        return torch.from_numpy(logits)

    return run


def _torchvision_net(trained: TrainedModel) -> nn.Module:
    """Return torchvision's own net of the model's name. Raises UserError where torchvision has none that is the same."""
    import torchvision

    recipe = trained.recipe
    changed = [
        f"model.{name}={value!r}"
        for name, value in recipe.model.options().items()
        if name not in WITHOUT_WEIGHTS
        and value != getattr(Model(), name)
        and (name, value) != ("stem", "imagenet")
    ]
    name = recipe.model.name
    build = getattr(torchvision.models, name, None)
    if build is None or changed or recipe.data.channels != 3:
        why = changed or ([f"data.channels={recipe.data.channels}"] if recipe.data.channels != 3 else [])
        of = f"{name} with {', '.join(why)}" if build is not None else name
        raise UserError(f"--format torchvision: torchvision has no {of}; use another format")
    with torch.random.fork_rng(devices=[]):
        net: nn.Module = build(num_classes=len(trained.classes))
    return net.eval()


def _write_torchvision(trained: TrainedModel, path: Path, pixels: bool) -> None:
    _torchvision_net(trained)
    state = {
        name: value.detach().cpu().contiguous()
        for name, value in to_torchvision(trained.model.state_dict()).items()
    }
    if path.suffix == ".safetensors":
        from safetensors.torch import save_file

        save_file(state, path, {"format": "pt"})
    else:
        torch.save(state, path)


def _open_torchvision(trained: TrainedModel, path: Path, pixels: bool) -> Run:
    net, data = _torchvision_net(trained), trained.recipe.data
    net.load_state_dict(_state_in(path))
    return lambda images: net(normalize(images, data))


def _state_in(path: Path) -> Mapping[str, Tensor]:
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        loaded: Mapping[str, Tensor] = load_file(path)
        return loaded
    state: Mapping[str, Tensor] = torch.load(path, weights_only=True)
    return state


FORMATS: dict[str, Format] = {
    "safetensors": Format((".safetensors",), _write_safetensors, _open_safetensors),
    "onnx": Format((".onnx",), _write_onnx, _open_onnx, takes_pixels=True),
    "pt2": Format((".pt2",), _write_pt2, _open_pt2, takes_pixels=True),
    "torchvision": Format(
        (".pth", ".pt", ".safetensors"), _write_torchvision, _open_torchvision, averages=False
    ),
}
