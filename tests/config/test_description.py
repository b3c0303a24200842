"""A description keeps its lines on MLflow's page, whose Markdown swallows single line breaks."""

from __future__ import annotations

import pytest

from resnet_dist.config import load_recipe
from resnet_dist.config.description import markdown
from tests.paths import JOBS

WRAPPED = (
    "a paragraph that its writer's editor has broken at the end of a line, and\nthat goes on in the next"
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", ""),
        ("one line\n", "one line"),
        ("first\nsecond", "first  \nsecond"),
        (WRAPPED, WRAPPED),
        ("- a\n- b", "- a\n- b"),
        ("```sh\nx\n```", "```sh\nx\n```"),
        ("a\n\n\nb", "a\n\nb"),
        (
            "Title.\n\nSource    a paper\n          and its code\nCommand   run x\n          run y\nExpected  9 | 10",
            "Title.\n\n```sh\nrun x\nrun y\n```\n\n| | |\n|---|---|\n| **Source** | a paper and its code |\n"
            "| **Expected** | 9 \\| 10 |",
        ),
    ],
)
def test_lines_stay_apart(text: str, expected: str) -> None:
    assert markdown(text) == expected


@pytest.mark.parametrize("job", ["digits", "imagenet_rn50"])
def test_a_job_has_its_command_in_a_block(job: str) -> None:
    text = markdown(load_recipe(JOBS / f"{job}.py").description)
    assert f"```sh\nresnet-dist train jobs/{job}.py" in text
    assert "| **Expected** |" in text
