"""The card of a logged model: what it is, what it was trained on, how well it does, its limits, and how to load it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.metadata import version

from resnet_dist.config import Recipe
from resnet_dist.model import build_model, count_parameters
from resnet_dist.train.start.shapes import shapes_only

MAX_CLASSES_NAMED = 100
METRICS = ("eval/top1", "eval/top5", "eval/loss", "eval/samples", "eval/bad_samples")


def card(
    recipe: Recipe,
    classes: Sequence[str],
    step: int,
    metrics: Mapping[str, float],
    requirements: Sequence[str],
) -> str:
    """Return the card as Markdown."""
    parts = [
        f"# {recipe.name}: {recipe.model.name}",
        _summary(recipe, classes, step),
        "## How to load it",
        _loading(requirements),
        "## What it was trained on",
        _data(recipe, classes),
        "## How well it does",
        _table(metrics),
        "## How it was trained",
        _training(recipe),
        "## Limits",
        _limits(recipe, classes),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _summary(recipe: Recipe, classes: Sequence[str], step: int) -> str:
    data = recipe.data
    with shapes_only():
        network = build_model(**recipe.model.options(), in_channels=data.channels, num_classes=len(classes))
    kind = "grey" if data.channels == 1 else "RGB"
    return (
        f"Classifies an image as one of {len(classes):,} classes. A {recipe.model.name} of "
        f"{count_parameters(network):,} parameters that sees {data.evaluation_size} x {data.evaluation_size} {kind} "
        f"pixels, after step {step:,} of its training by resnet_dist {version('resnet-dist')}."
    )


def _loading(requirements: Sequence[str]) -> str:
    return f"""\
The packages of `requirements.txt` suffice ({", ".join(requirements)}); resnet_dist is not needed, and nothing is
unpickled.

```python
import mlflow

model = mlflow.pyfunc.load_model("models:/…")  # or the folder of this file
model.predict([open("photo.jpg", "rb").read()])  # encoded images, as bytes or base64
model.predict(pixels)  # uint8 (N, H, W, C), of any size
model.predict({{"image": [data]}}, params={{"top_k": 3}})
```

```sh
mlflow models serve -m . -p 5001 --env-manager uv
curl -H 'Content-Type: application/json' -d "{{\\"inputs\\": [\\"$(base64 -w0 photo.jpg)\\"]}}" http://127.0.0.1:5001/invocations
```

A row of the answer has the names of the `top_k` (default: 5) best classes and their probabilities, the best first. A GPU
is used if there is one; `MLFLOW_DEFAULT_PREDICTION_DEVICE=cpu` prevents it. `requirements.txt` names releases, not builds:
on Linux the index's ordinary build of torch runs with and without a GPU, and `UV_TORCH_BACKEND=cpu` gets a smaller one
with uv."""


def _data(recipe: Recipe, classes: Sequence[str]) -> str:
    named = ", ".join(f"`{name}`" for name in classes[:MAX_CLASSES_NAMED])
    more = f" and {len(classes) - MAX_CLASSES_NAMED:,} more" if len(classes) > MAX_CLASSES_NAMED else ""
    source = f", written from `{recipe.data.source}`" if recipe.data.source else ""
    return (
        f"Trained on `{recipe.data.train}`, evaluated on `{recipe.data.eval}`{source}.\n\n"
        f"Classes: {named}{more}."
    )


def _table(metrics: Mapping[str, float]) -> str:
    rows = [f"| {name} | {metrics[name]:.6g} |" for name in METRICS if name in metrics]
    if not rows:
        return "It was not evaluated at this step."
    return "\n".join(["| metric of the held-out set | value |", "|---|---|", *rows])


def _training(recipe: Recipe) -> str:
    data, optim, train = recipe.data, recipe.optim, recipe.train
    start = f", from {recipe.model.init_from}" if recipe.model.init_from else ""
    lines = [
        f"Length {train.length}, {data.global_batch_size:,} samples a step{start}, {optim.optimizer} with a rate of "
        f"{optim.lr:g}, seed {recipe.seed}. The whole recipe is in `artifacts/checkpoint/checkpoint.json`."
    ]
    if recipe.description:
        lines.append("```text\n" + recipe.description.strip().replace("```", "'''") + "\n```")
    return "\n\n".join(lines)


def _limits(recipe: Recipe, classes: Sequence[str]) -> str:
    data = recipe.data
    share = f"{data.eval_crop:.1%} of " if data.eval_crop < 1 else ""
    return f"""\
- Every image gets one of the {len(classes):,} classes, also one that shows none of them. A probability is the softmax of
  the logits, which is no measured frequency.
- It sees the middle square of an image, {share}its short side. What lies outside is not seen.
- Images of more than {data.max_pixels:,} pixels are refused, unless a smaller scale of a JPEG suffices.
- HEIC and JPEG XL need `pillow-heif` and `pillow-jxl-plugin`; other formats need nothing more."""
