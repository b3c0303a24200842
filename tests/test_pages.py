"""README.md, CHANGELOG.md and docs/: commands parse, links resolve, names exist, and the README stays short.

Commands in jobs and cluster files parse too.
"""

from __future__ import annotations

import re
import shlex
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from resnet_dist.cli import app
from resnet_dist.cli.main import run_command
from resnet_dist.config import Recipe, WorkerRange, check_world_size, load_recipe, load_study
from resnet_dist.config.part import fields
from resnet_dist.runs.choose import MAY_CHANGE
from tests.paths import ROOT

MAX_README_BYTES = 7168
GUIDES = sorted((ROOT / "docs").glob("*.md"))
PAGES = [ROOT / "README.md", *GUIDES]
LINKED_PAGES = [*PAGES, ROOT / "CHANGELOG.md", ROOT / "cluster/README.md"]
CODE_BLOCK = re.compile(r"^ *```(\w+)\n(.*?)^ *```$", re.M | re.S)
# Without a fence: in an indented block of a page, in the docstring of a job, in a comment of a cluster file.
BARE_COMMAND = re.compile(
    r"^(?:    |# +|Command +|          )((?:[A-Z_]+=\S+ )?resnet-dist .+?)(?: {3,}.*)?$", re.M
)
FILES_WITH_COMMANDS = [*PAGES, *sorted((ROOT / "jobs").glob("*.py")), *sorted((ROOT / "cluster").iterdir())]
REFUSED = "resnet-dist train jobs/digits.py --workers 3"  # shown with its error message
PART_NAMES = ("data", "model", "optim", "schedule", "train")


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


def command_lines(text: str) -> Iterator[str]:
    """Yield every command of this package: in blocks of sh, after the prompt in blocks of console, and inline or indented."""
    for language, block in CODE_BLOCK.findall(text):
        if language in ("sh", "console"):
            prompt = "$ " if language == "console" else ""
            for line in block.replace("\\\n", " ").splitlines():
                if line.strip().startswith(prompt):
                    yield line.strip().removeprefix(prompt)
    rest = CODE_BLOCK.sub("", text)
    yield from BARE_COMMAND.findall(rest)
    for span in re.findall(r"`([^`\n]+)`", rest):
        if len(span.split()) > 2:  # a shorter one names a command and calls nothing
            yield span


def words_of(line: str) -> list[str] | None:
    """Return the words after `resnet-dist`, or after torchrun's `-m resnet_dist`; None for another program."""
    found = re.search(
        r"^(?:.*\buv run )?(?:[A-Z_]+=\S+ )*resnet-dist (.+)|^torchrun .*-m resnet_dist (.+)", line
    )
    return shlex.split(found[1] or found[2], comments=True) if found else None


def parse(words: list[str]) -> tuple[str, dict[str, Any]]:
    """Return the command's name and its parameters, as the real command line reads them; run nothing."""
    command, name = typer.main.get_command(app), ""
    while hasattr(command, "commands"):
        if words == ["--help"]:
            return "", {}
        if command.invoke_without_command and (not words or words[0].startswith("-")):
            break
        name, *words = words
        command = command.commands[name]
    return name, dict(command.make_context(name, words).params)


COMMANDS = [
    pytest.param(line, id=f"{relative(path)}: {line}")
    for path in FILES_WITH_COMMANDS
    for line in dict.fromkeys(command_lines(path.read_text()))
    if words_of(line) and "{{" not in line  # a template of Prometheus
]


@pytest.mark.parametrize("line", COMMANDS)
def test_a_command_parses(line: str) -> None:
    words = words_of(line)
    assert words is not None
    name, parameters = parse(words)
    job = ROOT / str(parameters.get("recipe") or parameters.get("job"))
    if name in ("train", "submit") and job.is_file():
        recipe = load_recipe(job, parameters["overrides"] or ())
        if line != REFUSED:
            workers = parameters["workers"] or WorkerRange.exactly(processes_of(line))
            if not workers.is_range:
                check_world_size(recipe.data, workers.max)
            assert workers.sizes(recipe)
    if name == "study" and job.is_file():
        load_study(job, parameters["arguments"] or (), parameters["overrides"] or ())


def processes_of(line: str) -> int:
    """Return the number of ranks that a line of torchrun starts; 1 for another command."""
    numbers = re.findall(r"--n(?:nodes|proc-per-node) (\d+)", line)
    return int(numbers[0]) * int(numbers[-1]) if len(numbers) == 2 else int(numbers[0]) if numbers else 1


def test_the_parser_finds_commands_and_refuses_wrong_ones() -> None:
    assert len(COMMANDS) > 100
    with pytest.raises(Exception, match="--ranks"):
        parse(["train", "jobs/digits.py", "--ranks", "2"])
    assert words_of("pip install uv && uv run resnet-dist ui  # serve") == ["ui"]
    assert words_of("EPOCHS=88 resnet-dist train x.py") == ["train", "x.py"]
    assert words_of("ray job stop") is None


def test_the_commands_of_the_data_page_print_what_it_shows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Run every command of its console blocks, in order, and compare each line that is not left out by an ellipsis."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(ROOT / "jobs", tmp_path / "jobs")
    blocks = [
        block for kind, block in CODE_BLOCK.findall((ROOT / "docs/data.md").read_text()) if kind == "console"
    ]
    assert len(blocks) == 3
    for block in blocks:
        first, *shown = block.splitlines()
        monkeypatch.setattr(sys, "argv", shlex.split(first.removeprefix("$ ")))
        run_command()
        printed = "".join(capsys.readouterr()).splitlines()
        assert [line for line in shown if line != "…"] == [line for line in printed if line in shown]


def slug(heading: str) -> str:
    """Return the anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def anchors_of(path: Path) -> set[str]:
    return {slug(heading) for heading in re.findall(r"^#+ (.+)$", CODE_BLOCK.sub("", path.read_text()), re.M)}


def links_of(path: Path) -> list[str]:
    return re.findall(r"\]\(([^)\s]+)\)", CODE_BLOCK.sub("", path.read_text()))


@pytest.mark.parametrize("path", LINKED_PAGES, ids=relative)
def test_links_and_anchors_resolve(path: Path) -> None:
    for link in links_of(path):
        if link.startswith("https://"):
            continue
        name, _, anchor = link.partition("#")
        target = (path.parent / name).resolve() if name else path
        assert target.exists(), link
        if anchor and target.suffix == ".md":  # tests/test_learning_page.py holds references to lines of code
            assert anchor in anchors_of(target), link


def test_every_page_is_linked_from_the_readme() -> None:
    linked = {ROOT / link.partition("#")[0] for link in links_of(ROOT / "README.md")}
    assert {*GUIDES, ROOT / "CHANGELOG.md", *(ROOT / "jobs").glob("*.py")} <= linked


@pytest.mark.parametrize("path", LINKED_PAGES, ids=relative)
def test_a_page_names_fields_that_exist_and_no_path_of_a_machine(path: Path) -> None:
    text = path.read_text()
    known = {key for key, _ in fields(Recipe)}
    for key in re.findall(rf"`((?:{'|'.join(PART_NAMES)})\.(?!safetensors|py)[a-z_0-9]+)[`=]", text):
        assert key in known, key
    assert not re.search(r"/work/|/root/|/tmp/", text)


def test_the_readme_is_short() -> None:
    assert (ROOT / "README.md").stat().st_size <= MAX_README_BYTES


def test_the_readme_maps_every_folder() -> None:
    """A folder of the package has one line in README's map, and a line one folder."""
    (block,) = [
        text for _, text in CODE_BLOCK.findall((ROOT / "README.md").read_text()) if "resnet_dist/\n" in text
    ]
    rooms = re.findall(r"^  (\w+)/ ", block, re.M)
    assert sorted(rooms) == sorted(path.parent.name for path in (ROOT / "resnet_dist").glob("*/__init__.py"))
    assert all((ROOT / name).is_dir() for name in re.findall(r"^(\w+)/", block, re.M))


def test_the_restarts_page_lists_all_fields_that_may_change() -> None:
    text = (ROOT / "docs/restarts.md").read_text()
    table = text[text.index("## What may change") : text.index("`train.length` may change")]
    listed = set(re.findall(r"`([a-z_.]+)`", "".join(re.findall(r"^\|.*$", table, re.M))))
    assert listed == MAY_CHANGE


def test_the_changelog_names_modules_that_exist() -> None:
    rows = re.findall(r"^ *\| `resnet_dist.* \| (`.*`) \|$", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert len(rows) > 10
    for row in rows:
        first, *others = re.findall(r"`([\w.]+)`", row)
        parent = first.rpartition(".")[0]
        for name in (
            first,
            *(other if other.startswith("resnet_dist") else parent + other for other in others),
        ):
            assert (ROOT / f"{name.replace('.', '/')}.py").is_file(), name
