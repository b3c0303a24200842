"""Data sets, code and failures as the run's storage keeps them for its page: named apart, bounded, without secrets."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from resnet_dist.config import Recipe
from resnet_dist.data.shards.index import Index, Shard
from resnet_dist.driver import page
from resnet_dist.driver.page import begin_page, data_sets, index_value, record_failure
from resnet_dist.driver.request import Request
from resnet_dist.errors import RankFailed, TrainingError
from resnet_dist.runs.folder import RunFolder, failure_name
from resnet_dist.runs.page import CODE_FILE
from resnet_dist.runs.storage.open import open_storage
from resnet_dist.system.provenance import GitState
from resnet_dist.tracking.origin import ERROR_TAG

SECRET = "https://anna:hush@host/d/train/{}?Signature=hush"


def index_of(name: str, num_shards: int = 2) -> Index:
    shards = tuple(Shard(SECRET.format(f"{n}.tar"), 10, "sha256:00", 5) for n in range(num_shards))
    return Index(SECRET.format(name), shards, ("a", "b"))


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return RunFolder(open_storage(tmp_path / "runs/x"), "x", None, 1, {})


def test_an_index_on_the_page_has_no_secret_and_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page, "MAX_SHARDS", 3)
    few, many = index_value(index_of("index.json")), index_value(index_of("index.json", 5))
    assert "hush" not in json.dumps([few, many])
    assert few["shardlist"][0] == {
        "url": "https://***@host/d/train/0.tar?Signature=***",
        "nsamples": 5,
        "filesize": 10,
        "checksum": "sha256:00",
    }
    assert "shards_left_out" not in few
    assert (many["shards_left_out"], len(many["shardlist"]), many["samples"]) == (2, 3, 25)


def test_a_long_line_is_cut_before_it_is_searched() -> None:
    word = "-a" * page.MAX_TRACEBACK
    # Half of the URL would not show that it has a password.
    url = "at " + " " * (page.MAX_LINE - 20) + "http://anna:hush" + "h" * 20 + "@host"
    assert page.public_lines(f"a\n{word}\n{url}\ntoken=hush").split("\n") == [
        "a",
        "…",
        url[: url.index("http")] + "…",
        "token=***",
    ]


def test_two_sets_of_one_place_have_two_names(digits_recipe: Recipe) -> None:
    request = Request(digits_recipe, "x.py", "out")
    one = index_of("index.json")
    sets = data_sets(request, [one, one])
    assert [each.name for each in sets] == ["d/train", "d/train (eval)"]
    assert all(len(each.digest) == 36 for each in sets)
    assert sets[0].source == "digits"


def test_a_page_of_a_run_is_begun_and_begun_again(
    run: RunFolder, digits_recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    states = iter([GitState("abc-dirty", "main", "+token = 'hush'"), GitState("def", "main")])
    monkeypatch.setattr(page, "git_of", lambda source: next(states))
    request = Request(digits_recipe, "x.py", "out", tags={"note": "at http://anna:hush@host"})
    indexes = [index_of("index.json"), index_of("other.json")]
    made = begin_page(run, request, indexes)
    assert made.tags["note"] == "at http://***@host"
    assert run.page.read(CODE_FILE) == b"+token = '***'\n"
    begin_page(replace(run, attempt=2), request, indexes)
    assert run.page.read(CODE_FILE) is None  # The code of the newest attempt is that of its commit.
    stored = [run.page.read(found.name) or b"" for found in run.page.objects()]
    assert len(stored) == 3
    assert not [content for content in stored if b"hush" in content]


def test_a_failure_is_recorded_with_what_is_known_of_it(run: RunFolder) -> None:
    run.write()
    try:
        raise TrainingError("no data at http://anna:hush@host " + "x " * 2500)
    except TrainingError as error:
        failed = record_failure(run, error)
    assert failed.tags[ERROR_TAG].startswith("no data at http://***@host x")
    assert len(failed.tags[ERROR_TAG]) == 1000
    kept = run.storage.read(failure_name(1)) or b""
    assert b"test_a_failure_is_recorded" in kept
    assert b"hush" not in kept
    # What Ray knows of a rank is more than the traceback of the driver.
    second = replace(run, attempt=2)
    run.storage.write(failure_name(2), b"all that Ray knows")
    assert record_failure(second, RankFailed("rank 1 failed")).tags[ERROR_TAG] == "rank 1 failed"
    assert run.storage.read(failure_name(2)) == b"all that Ray knows"
    # A run that was removed is not made anew.
    run.remove()
    record_failure(replace(run, attempt=3), ValueError("x"))
    assert not Path(run.location).exists()
