"""Write docs/recipes.md from the classes in resnet_dist/config/, the jobs, and docs/recipe_sources.toml.

    uv run python docs/generate_recipes.py

A test fails while the page differs from what this script writes.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
import tomllib
from collections.abc import Iterator
from itertools import groupby, pairwise
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from resnet_dist.config import Data, Length, Model, Optim, Recipe, Result, Schedule, Study, Train, Trial
from resnet_dist.config.part import Part, fields
from resnet_dist.config.recipe import load_recipe
from resnet_dist.runs.choose import MAY_CHANGE

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs/recipes.md"
EXAMPLE = ROOT / "jobs/digits.py"
SOURCES = ROOT / "docs/recipe_sources.toml"

TYPE_NAMES = {bool: "`True` or `False`", int: "integer", float: "number", str: "text"}
SIGNS = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}

INTRODUCTION = """\
# Recipes

<!-- Written by docs/generate_recipes.py: change resnet_dist/config/ or the script, and run it again. -->

A recipe is one frozen value that determines a run: the data, the network, the optimizer and the length. It knows
nothing about machines, so the same recipe trains in one process on a laptop and on the ranks of a cluster. Every
field is validated when the recipe is built: a mistake ends the command with exit code 2 and one sentence that names
the field, its value and what would be accepted, before anything is started.

## A recipe file

A recipe file is a Python file that defines `recipe() -> Recipe`. This is the whole function of
[jobs/digits.py](../jobs/digits.py); all fields that it leaves out have the defaults below.

```python
from resnet_dist import Data, Model, Optim, Recipe, Schedule, Train


{example}
```

The file is ordinary Python: constants, environment variables and helper functions may compute fields. Nothing is
computed behind the recipe. In particular, the learning rate does not follow the batch size, unless the file has
`lr=scaled_lr(0.1, global_batch_size=GLOBAL_BATCH_SIZE)`: linear scaling from 0.1 at 256 samples.

Train it with `resnet-dist train FILE.py`. The recipe limits the number of ranks: it must divide the number of
micro-batches in a step where `data.micro_batch_size` is set, and `data.lanes` otherwise.

## Lengths

A field of type *length* is text with a number and a unit:

| example | steps |
|---|---|
| `"300 steps"` | 300 optimizer steps; `"64_000 steps"` and `"1e3 steps"` are accepted too |
| `"2 epochs"` | twice the training set, in steps of `data.global_batch_size` samples; `"0.5 epochs"` is half of it |
| `"50000 samples"` | 50000 divided by `data.global_batch_size` |
| `"10%"`, `"10 percent"` | a tenth of `train.length`, which itself cannot be in percent |

A length is converted once, when the training set is known: to the nearest step, and to at least one step unless it
is zero. An interval of zero, such as `eval_every="0 steps"`, means "at the end only". An epoch ends with the last
whole step: samples that are left over are dropped, other ones in each epoch.

## Change a field: `--set KEY=VALUE`

`--set` changes one field of the recipe that the file returns; repeat it for more. KEY is the dotted name. VALUE is
JSON where it can be read as JSON, and text otherwise:

    resnet-dist train jobs/digits.py --set optim.lr=0.2 --set train.length="2 epochs"
    resnet-dist train jobs/digits.py --set data.flip=true --set data.micro_batch_size=none

- `none` is the choice `"none"` where the field has one (`data.crop=none`), and `None` elsewhere.
- Lists are JSON, in quotes for the shell: `--set schedule.decay=step --set 'schedule.milestones=["50%", "75%"]'`.
- An unknown name is refused with the nearest field that exists: `--set lr: not a field of the recipe; did you mean
  optim.lr?`
- A value that the other choices do not read is refused: `optim.betas` would change nothing with `optimizer="sgd"`.
- Overrides are applied after `recipe()`, so values that the file has computed do not follow: `optim.lr` keeps its value
  when `data.global_batch_size` changes.

`resnet-dist study` applies `--set` to every recipe of the study, and `--with NAME=VALUE` to the arguments of `study()`.

## Continue a run

`--name NAME` continues the run of that name, `--resume` the newest run of the recipe. A continued run draws the curve
that it would have drawn without the interruption, so it may change only fields on which no sample, gradient or curve
depends; a change of any other field is refused, with its old and its new value:

{may_change}
- `train.length` where `schedule.decay` is `"constant"` and `train.ema_rise` is 0: every other decay depends on it. Lengths in
  percent of it that a curve depends on would move, which is refused. `schedule.warmup`, `schedule.milestones`,
  `schedule.whitening_bias`, `train.ema_every` and `data.train_sizes` may be written in another unit, if they are the same steps.

`data.train` and `data.eval` may name another place, not other samples: digests of the indexes are compared. A new
`train.best_metric` starts a new search for the best checkpoint. The number of ranks is no field of the recipe and may
change as well; `train.gradient_sums` decides whether the curve then stays the same to the last bit.
"""

FIELDS = """\
## Fields

The column *type* has the choices or the range; *required* fields have no default. `None` means that the field is off or
that its value is derived, as its description says.
"""

STUDIES = """\
## Studies

A job file may also define `study() -> Study`: several recipes that answer one question, and the rules of the figure
that shows the answer ([jobs/plain_vs_residual.py](../jobs/plain_vs_residual.py)). `resnet-dist study FILE.py` trains
them one after another.
"""

JOBS = """\
## Jobs

The files in [jobs/](../jobs), each with the command and what was measured in its docstring. The figures are those of
the source, unless the docstring names a measurement.
"""

COMPARED = """\
## Jobs beside their sources

Each job was compared with the files that its source is trained by. The column *here* is read from the job. Rows with
**differs** are those that the job's docstring states under "Differs"; all others are the same in effect.

Two things differ in every job with large images, by less than a pixel or by rounding: a crop of at least twice the
wanted size is decoded at 1/2, 1/4 or 1/8 of the scale and moved onto the grid of that scale, and evaluation cuts the
middle out of the image before it is resized instead of after.
"""


def page() -> str:
    """Return the text of docs/recipes.md."""
    return "\n".join(
        [
            INTRODUCTION.format(example=example(), may_change="\n".join(changeable())),
            FIELDS,
            *(section(part) for part in (Recipe, Data, Model, Optim, Schedule, Train)),
            STUDIES,
            *(section(record) for record in (Study, Trial, Result)),
            JOBS,
            "\n".join([*jobs(), ""]),
            COMPARED,
            *comparisons(),
        ]
    )


def example() -> str:
    """Return the source of `recipe()` in the example job."""
    text = EXAMPLE.read_text()
    (function,) = (node for node in ast.parse(text).body if isinstance(node, ast.FunctionDef))
    return ast.get_source_segment(text, function) or ""


def changeable() -> Iterator[str]:
    """Yield a list item for each part of the recipe, with the fields that a continued run may change."""
    names = [name for name, _ in fields(Recipe) if name in MAY_CHANGE]
    for _, of_part in groupby(names, key=lambda name: name.rpartition(".")[0]):
        yield f"- {', '.join(f'`{name}`' for name in of_part)}"


def section(cls: type[Any]) -> str:
    """Return heading, docstring and table of fields of a class."""
    descriptions = field_docstrings(cls)
    lines = [f"### {cls.__name__}", "", inspect.cleandoc(cls.__doc__ or ""), ""]
    lines += ["| field | type | default | meaning |", "|---|---|---|---|"]
    rows = model_rows(cls) if issubclass(cls, Part) else dataclass_rows(cls)
    for name, kind, default in rows:
        lines.append(row(f"`{name}`", kind, default, descriptions[name]))
    return "\n".join([*lines, ""])


def field_docstrings(cls: type[Any]) -> dict[str, str]:
    """Return the string below each field of a class, as one line; a field without a string is left out.

    The fields of the groups that a part is made of come first, as pydantic has them.
    """
    groups = [base for base in reversed(cls.__mro__) if issubclass(base, Part) and base is not Part]
    return {name: text for one in groups or [cls] for name, text in own_docstrings(one).items()}


def own_docstrings(cls: type[Any]) -> dict[str, str]:
    (definition,) = ast.parse(inspect.getsource(cls)).body
    assert isinstance(definition, ast.ClassDef)
    return {
        field.target.id: " ".join(below.value.value.split())
        for field, below in pairwise(definition.body)
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
        if isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant)
        if isinstance(below.value.value, str)
    }


def model_rows(part: type[Part]) -> Iterator[tuple[str, str, str]]:
    for name, field in part.model_fields.items():
        kind = describe(field.annotation, field.metadata)
        default = None if field.is_required() else literal(field.get_default(call_default_factory=True))
        yield name, kind, default or "required"


def dataclass_rows(cls: type[Any]) -> Iterator[tuple[str, str, str]]:
    for field in dataclasses.fields(cls):
        default = "required" if field.default is dataclasses.MISSING else literal(field.default)
        yield field.name, f"`{field.type}`", default


def describe(kind: Any, metadata: list[Any]) -> str:
    """Return a field's type as text: its choices, or its range."""
    origin, arguments = get_origin(kind), get_args(kind)
    if get_args(Length)[1] in metadata:
        return "length"
    if origin is Annotated:
        constraints = [c for item in arguments[1:] for c in getattr(item, "metadata", [item])]
        return describe(arguments[0], constraints)
    if origin in (Union, UnionType):
        kinds = [describe(argument, metadata) for argument in arguments if argument is not NoneType]
        return " or ".join([*kinds, "`None`"] if NoneType in arguments else kinds)
    if origin is Literal:
        return ", ".join(literal(choice) for choice in arguments)
    if origin is tuple and arguments[-1] is Ellipsis:
        return f"tuple of {plural(describe(arguments[0], []))}"
    if origin is tuple:
        return f"({', '.join(describe(argument, []) for argument in arguments)})"
    if isinstance(kind, type) and issubclass(kind, Part):
        return f"[{kind.__name__}](#{kind.__name__.lower()})"
    return TYPE_NAMES[kind] + limits(metadata)


def plural(kind: str) -> str:
    return f"{kind} pairs" if kind.startswith("(") else f"{kind}s"


def limits(metadata: list[Any]) -> str:
    """Return the bounds of a number, such as " ≥ 1"; empty without any."""
    bounds = [(sign, getattr(item, name, None)) for item in metadata for name, sign in SIGNS.items()]
    texts = [f" {sign} {number(limit)}" for sign, limit in bounds if limit is not None]
    return " and".join(texts)


def number(value: float) -> str:
    """Return a number as Python source, where a large power of two is not written out."""
    if not isinstance(value, int):
        return f"{value:g}"
    factor, rest = divmod(value, 2**30)
    if factor == 0 or rest:
        return str(value)
    return f"2**{value.bit_length() - 1}" if factor.bit_count() == 1 else f"{factor} * 2**30"


def literal(value: Any) -> str:
    """Return a default or a choice as Python source."""
    if isinstance(value, Part):
        return f"`{type(value).__name__}()`"
    if type(value) is int:
        return f"`{number(value)}`"
    return "`" + re.sub(r"'([^']*)'", r'"\1"', repr(value)) + "`"


def jobs() -> Iterator[str]:
    """Yield the lines of the table of jobs, from the docstrings of the files in jobs/."""
    yield "| job | content | source | expected result |"
    yield "|---|---|---|---|"
    for path in sorted((ROOT / "jobs").glob("*.py")):
        text = ast.get_docstring(ast.parse(path.read_text())) or ""
        title = text.partition("\n")[0]
        yield row(
            f"[{path.name}](../jobs/{path.name})", title, heading(text, "Source"), heading(text, "Expected")
        )


def comparisons() -> Iterator[str]:
    """Yield the table of each job of SOURCES: its values and those of its source, with the file that has them."""
    sources = tomllib.loads(SOURCES.read_text())
    for name, rows in sources["jobs"].items():
        values = load_recipe(ROOT / f"jobs/{name}.py").flat()
        lines = [f"### {name}", "", "| | here | there | file | |", "|---|---|---|---|---|"]
        for item in rows:
            label, url = sources["files"][item["file"]]
            what, here = item.get("topic"), item.get("here")
            if what is None:
                what, here = f"`{item['field']}`", f"`{values[item['field']]}`"
            mark = "**differs**" if item.get("differs") else ""
            lines.append(row(what, here, item["there"], f"[{label}]({url})", mark))
        yield "\n".join([*lines, ""])


def heading(docstring: str, name: str) -> str:
    """Return the paragraph that starts with `name` in a job's docstring, with the indented lines after it."""
    found = re.search(rf"^{name} +(.*(?:\n +.*)*)", docstring, re.MULTILINE)
    assert found, f"no {name} in {docstring!r}"
    return " ".join(found[1].split())


def row(*cells: str) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


if __name__ == "__main__":
    PAGE.write_text(page())
