"""The callback trains under the oldest and the newest Lightning 2, and under Lightning 1."""

from __future__ import annotations

import json
from concurrent.futures import Future, ThreadPoolExecutor

import pytest

from tests.support.lightning_versions import VERSIONS, check

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def trainings() -> dict[str, Future[list[tuple[str, str]]]]:
    """All versions at once: they mostly wait for the package index."""
    with ThreadPoolExecutor(len(VERSIONS)) as pool:
        return {requirement: pool.submit(check, [requirement]) for requirement in VERSIONS}


@pytest.mark.case(49)
@pytest.mark.parametrize("requirement", VERSIONS)
def test_the_callback_logs_the_same_under_every_lightning(
    requirement: str, trainings: dict[str, Future[list[tuple[str, str]]]]
) -> None:
    ((_, line),) = trainings[requirement].result()
    result = json.loads(line)
    package, _, version = requirement.partition("==")
    assert result["version"].startswith(version.rstrip("*"))
    # Lightning 1 has the short spelling.
    assert result["precision"] == ("16" if package == "pytorch_lightning" else "16-mixed")
    assert result["steps"] == [4, 8, 12, 16]
    # The first scale of 65536 overflows in fp16, and step 4 overflows on purpose.
    assert (result["scale"], result["skipped"]) == (16384.0, 2)
