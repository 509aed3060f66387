"""Which metrics share a plot."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launcher.report.metric_pairs import group_metrics, split_stage

TRAIN = ("train", "training", "Train", "trn")
VALIDATION = ("val", "valid", "validation", "Val", "eval", "dev")
QUANTITIES = ("loss", "acc", "f1_macro", "MulticlassAccuracy", "head_2/loss", "top-5", "recall@10")
FORMS = ("{stage}_{name}", "{stage}/{name}", "{stage}-{name}", "{stage}.{name}", "{name}_{stage}", "{name}/{stage}",
         "{stage} {name}", "metrics/{stage}/{name}", "metrics/{stage}_{name}")  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", QUANTITIES)
def test_training_and_validation_share_a_plot_in_every_spelling(form: str, name: str) -> None:
    for train, validation in itertools.product(TRAIN, VALIDATION):
        pair = [form.format(stage=validation, name=name), form.format(stage=train, name=name)]
        (group,) = group_metrics(pair)
        assert group.names == (pair[1], pair[0]), "training comes first"
        assert group.title == form.format(stage="", name=name).replace("//", "/").replace("s/_", "s/").strip("_/-. ")


@pytest.mark.parametrize("suffixes", [("", "_step", "_epoch"), ("_step", "_epoch"), ("_step",), ("", "_epoch")])
@pytest.mark.parametrize("loaders", [("",), ("/dataloader_idx_0", "/dataloader_idx_1")])
@pytest.mark.parametrize("train", ["train_", "train/", ""])
def test_the_suffixes_of_lightning_stay_in_the_plot(
    suffixes: tuple[str, ...], loaders: tuple[str, ...], train: str
) -> None:
    trained = [f"{train}loss{suffix}" for suffix in suffixes]
    validated = [f"val_loss{suffix}{loader}" for suffix in suffixes for loader in loaders]
    (group,) = group_metrics([*validated, *trained])
    assert group.title == "loss"
    assert sorted(group.names) == sorted([*trained, *validated])
    assert set(group.names[: len(trained)]) == set(trained)


@pytest.mark.parametrize(
    "names",
    [
        ("train_loss", "train_acc"),
        ("loss", "aux_loss"),
        ("time_per_step", "time_per_epoch"),
        ("global_step", "global"),
        ("interval_time", "time"),
        ("retrain_count", "count"),
        ("step", "epoch"),
        ("train", "val"),
        ("a_val_b", "a_train_b"),
        ("val/head_1/loss", "train/head_2/loss"),
        ("lr-Adam", "lr-SGD"),
        ("acc_class_1", "acc_class_2"),
    ],
)
def test_different_quantities_have_their_own_plots(names: tuple[str, ...]) -> None:
    groups = group_metrics(names)
    assert sorted(group.names for group in groups) == sorted((name,) for name in names)
    assert sorted(group.title for group in groups) == sorted(names), "a metric alone keeps its name"


def test_a_metric_without_a_stage_is_that_of_training() -> None:
    assert group_metrics(["val_loss", "loss", "test_loss"])[0].names == ("loss", "val_loss", "test_loss")
    assert split_stage("valLoss") == ("validation", "Loss")
    assert [group.title for group in group_metrics(["trainLoss", "val_loss"])] == ["Loss"]


def test_pairs_come_first_and_numbers_are_sorted_as_numbers() -> None:
    names = ["zeta", "val_acc", "layer_10/norm", "layer_9/norm", "train_acc"]
    assert [group.title for group in group_metrics(names)] == ["acc", "layer_9/norm", "layer_10/norm", "zeta"]


@given(st.lists(st.text(st.sampled_from("valtrainstep_/0 -E\u00b2"), max_size=12), max_size=12))
def test_every_metric_is_in_exactly_one_plot(names: list[str]) -> None:
    groups = group_metrics(names)
    assert sorted(name for group in groups for name in group.names) == sorted(set(names))
