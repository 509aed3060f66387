"""Every pair of strategies, optimizers, precisions and contents of a checkpoint, on two ranks that start once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from tests.support.program_ranks import run_program
from tests.support.sharded_changes import CHANGES
from tests.support.sharded_ranks import BIT_EQUAL, KINDS, PAIRS

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
NAMES = ("Adapter", "Renamed", "RenamedInside")
ROUTES = ("fsdp2 fsdp2", "fsdp2 ddp", "ddp fsdp2")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[Mapping[str, Any]]:
    """The results of both ranks."""
    return run_program("tests.support.sharded_ranks", tmp_path_factory.mktemp("ranks"), timeout=280)


@pytest.mark.parametrize("case", [*(f"fsdp2 {kind}" for kind in KINDS), *BIT_EQUAL])
def test_the_same_strategy_resumes_equal_to_the_bit(ranks: list[Mapping[str, Any]], case: str) -> None:
    for rank in ranks:
        found = rank[case]
        resumed = {batch for batch, _ in found["again"]}
        assert resumed
        assert found["again"] == [pair for pair in found["whole"] if pair[0] in resumed]
        assert len(resumed) < len(found["whole"]), "it started in the middle"
        assert found["weights"]
        assert found["rates"][0] == found["rates"][1]


@pytest.mark.parametrize(("one", "other"), PAIRS)
def test_another_strategy_resumes_with_the_losses_of_the_uninterrupted_one(
    ranks: list[Mapping[str, Any]], one: str, other: str
) -> None:
    for rank in ranks:
        whole, again = dict(rank["matrix"][one]), dict(rank["matrix"][f"{one}-{other}"])
        assert sorted(again) == [3, 4, 5]
        assert [again[n] for n in sorted(again)] == pytest.approx([whole[n] for n in sorted(again)], rel=1e-5)


def test_the_uninterrupted_losses_do_not_depend_on_the_strategy(ranks: list[Mapping[str, Any]]) -> None:
    matrix = ranks[0]["matrix"]
    plain = [loss for _, loss in matrix["ddp"]]
    for name in {one for one, _ in PAIRS}:
        assert [loss for _, loss in matrix[name]] == pytest.approx(plain, rel=1e-5), name
    # A resume without the optimizer's states would differ by more.
    assert ranks[0]["without states"] > 1e-3


@pytest.mark.parametrize(("one", "other"), CHANGES)
def test_a_precision_resumes_another(ranks: list[Mapping[str, Any]], one: str, other: str) -> None:
    batches, distance, dtype = ranks[0]["precisions"][f"{one} {other}"]
    assert batches == [3, 4, 5]
    # fp16 skips its first step when a new scale overflows.
    limit = 0 if one == other else 0.1 if other == "16-mixed" else 0.03
    assert distance <= limit
    assert dtype == {"bf16-true": "torch.bfloat16", "16-true": "torch.float16"}.get(other, "torch.float32")


def test_the_loss_scale_is_restored(ranks: list[Mapping[str, Any]]) -> None:
    for route, (restored, saved) in ranks[0]["scales"].items():
        assert restored == saved, route
        assert saved[1] > 0, "it has counted steps since the start"


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("name", NAMES)
def test_hooks_and_filters_of_the_state_dict_work_as_under_ddp(
    ranks: list[Mapping[str, Any]], name: str, route: str
) -> None:
    assert all(rank["names"][f"{name} {route}"] for rank in ranks)


def test_a_group_that_a_callback_adds_is_restored(ranks: list[Mapping[str, Any]]) -> None:
    for rank in ranks:
        # As under DDP, a callback does not unfreeze the layer again in the middle of an epoch.
        _, as_under_ddp = rank["finetuned"]["ddp ddp"]
        for groups, distance in rank["finetuned"].values():
            assert (groups, distance) == (2, pytest.approx(as_under_ddp, abs=1e-5))


def test_strict_loading_is_the_modules(ranks: list[Mapping[str, Any]]) -> None:
    for rank in ranks:
        for one in ("fsdp2", "ddp"):
            assert rank["strictness"][f"{one} False"] == [3, 4, 5]
            assert rank["strictness"][f"{one} True"].startswith("Error(s) in loading state_dict for ")


def test_sharded_tensors_of_callbacks_are_saved_whole(ranks: list[Mapping[str, Any]]) -> None:
    for rank in ranks:
        for route in ROUTES:
            expected = {"equal": True, "sharded": True, "by position": True, "in lists": True, "rest": 3}
            assert rank["callbacks"][route] == expected, route


def test_values_of_the_module_are_saved_as_they_are(ranks: list[Mapping[str, Any]]) -> None:
    for rank in ranks:
        found = rank["extras"]
        assert found["kept"]
        assert found["extra"] == [True, True]
        assert found["buffers"] == [True] * 12, "of rank zero, as under DDP"
        untrusted, trusted, devices, is_loaded = found["hyperparameters"]
        assert "not loaded" in untrusted
        assert (trusted, devices) == ([["Called", True]] * 2, ["meta"]), "the weights are saved once"
        assert is_loaded


def test_an_evaluation_loads_folders_and_files(ranks: list[Mapping[str, Any]]) -> None:
    for rank in ranks:
        first, *others = rank["evaluated"]
        assert len(first) == 20
        for other in others:
            assert [value for row in other for value in row] == pytest.approx(
                [v for row in first for v in row], rel=1e-5
            )


def test_an_object_with_a_shard_in_it_is_one_error(ranks: list[Mapping[str, Any]]) -> None:
    assert "holds a sharded tensor (DTensor) of shape (11, 5)" in ranks[0]["objects"]


@pytest.mark.parametrize(
    ("name", "error", "text"),
    [("part of rank 0", "StorageError", "limit of a file's size"),
     ("part of rank 1", "StorageError", "limit of a file's size"),
     ("object", "TrainingError", "mine (builtins.function)")],
)  # fmt: skip
def test_a_save_that_fails_on_one_rank_is_one_error_on_all(
    ranks: list[Mapping[str, Any]], name: str, error: str, text: str
) -> None:
    for rank in ranks:
        kind, message = rank["failures"][name]
        assert kind == error
        assert text in message
        assert rank["failures"][f"{name} kept"] == [None, []]


@pytest.mark.parametrize("route", ["ours from its folder", "ours from its file", "plain from ours"])
def test_plain_lightning_and_the_launcher_read_each_others_checkpoints(
    ranks: list[Mapping[str, Any]], route: str
) -> None:
    for rank in ranks:
        again, whole = (dict(pairs) for pairs in rank["lightning"][route])
        assert sorted(again) == [3, 4, 5]
        assert [again[n] for n in sorted(again)] == pytest.approx([whole[n] for n in sorted(again)], rel=1e-5)
