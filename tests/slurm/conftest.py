"""The cluster of all SLURM tests: started once, ended after the last test."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.support.slurm_cluster import Cluster, missing_parts


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    missing = missing_parts()
    if missing:
        reason = (
            f"a real SLURM needs {', '.join(missing)}: apt-get install slurm-wlm slurmdbd munge mariadb-server iproute2"
        )
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    made = Cluster(tmp_path_factory.mktemp("cluster"))
    made.start()
    try:
        yield made
    finally:
        made.stop()
