"""The questions of the wizard: defaults, accepted answers, and messages about invalid ones."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from launcher import SetupWizard, WizardConfig
from launcher.config.loading import load_config
from launcher.config.schema import RunConfig
from launcher.core.errors import PlanError, Problem
from launcher.hardware.devices import Device, Hardware
from launcher.planning.dry_run import plan_here
from launcher.wizard.machine import MachineFacts
from launcher.wizard.prompter import Choice
from slurm.partitions import Partition
from tests.support.scripted_prompter import DEFAULT, ScriptedPrompter

CPU = Hardware(Device("cpu", 0, "AMD EPYC", 1 << 34, ("fp32", "fp64")), 1, {})
CLUSTER = (
    Partition("gpu", True, True, "1-00:00:00", 6, 96, 515000, 4, "h100"),
    Partition("cpu", False, False, "infinite", 12, 64, 256000, 0),
)
TOY: dict[str, Any] = {"Model": "tests.support.toy.Toy", "Data": "tests.support.toy.ToyData", "Passes": "1"}


_profiles: dict[str, Any] = {}


@pytest.fixture(autouse=True)
def _each_model_traced_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The plan is shown twice in each test, of the same few models: their traces take most of the time."""
    from launcher.planning import profile as memory_profile

    real = memory_profile.profile_model

    def once(config: RunConfig, *rest: Any, **settings: Any) -> Any:
        precision, micro_batch_size = rest[1:]
        key = repr((config.model, config.data, config.trainer, precision, micro_batch_size, settings))
        if key not in _profiles:
            _profiles[key] = real(config, *rest, **settings)
        return _profiles[key]

    monkeypatch.setattr(memory_profile, "profile_model", once)


def wizard(
    start: WizardConfig | None = None, *, partitions: tuple[Partition, ...] = (), **answers: Any
) -> tuple[WizardConfig | None, ScriptedPrompter, str]:
    """The answers, the prompter with its questions, and the screen."""
    prompter, screen = ScriptedPrompter(**answers), io.StringIO()
    machine = MachineFacts("laptop", CPU, partitions)
    made = SetupWizard(prompter, console=Console(file=screen, width=200), look=lambda: machine)
    return made.run(start), prompter, screen.getvalue()


def answers_of(**given: Any) -> WizardConfig:
    config, _, screen = wizard(**given)
    assert config is not None, screen
    return config


def test_enter_at_every_question_is_the_demo_without_a_request_that_the_machine_cannot_meet() -> None:
    config, prompter, screen = wizard(WizardConfig(accelerator="cpu"))
    assert config == WizardConfig(accelerator="cpu")
    assert not any(message.startswith("Data") for message, _ in prompter.asked), "the demo brings its own data"
    for number, title in enumerate(
        ("model and data", "hardware and cluster", "precision and strategy", "logging", "review")
    ):
        assert f"Step {number + 1} of 5: {title}" in screen
    assert "laptop: 1 x AMD EPYC (cpu), 16 GiB, native fp32, fp64" in screen
    assert "auto: the best that all ranks support (here 32-true)" in prompter.titles["Train in mixed precision?"]
    assert "use_amp was requested" not in screen, "no notice about what was not asked for"


def test_a_request_that_the_machine_cannot_meet_is_one_notice() -> None:
    config, _, screen = wizard(WizardConfig(accelerator="cpu"), Train=True)
    assert config is not None
    assert config.use_mixed_precision is True
    assert screen.count("notice: use_amp was requested") == 1
    assert "use_mixed_precision" not in screen, "the review has the keys of the file"
    assert "use_amp: " not in screen.split("Step 5 of 5")[1].split("# End of the config.")[1]


def test_the_review_has_the_keys_of_the_file() -> None:
    _, _, screen = wizard(**TOY | {"Passes": ""})
    assert "  trainer.max_epochs: neither max_epochs nor max_steps is set" in screen


@pytest.mark.parametrize(
    ("start", "empty"),
    [({}, "1000"), ({"max_steps": 9}, "no limit"), ({"settings": {"trainer.max_time": {"hours": 1}}}, "no limit")],
)
def test_the_question_for_epochs_says_what_empty_is(start: dict[str, Any], empty: str) -> None:
    _, prompter, _ = wizard(WizardConfig(**start), **TOY)
    (message,) = [message for message, _ in prompter.asked if message.startswith("Passes")]
    assert message == f"Passes over the data, in epochs (-1: no limit; empty: {empty})"


def test_every_answer_reaches_the_config() -> None:
    config = answers_of(
        Model="tests.support.toy.Toy", Its_arguments=["lr: 1e-3, by_rank: 1", "size: 32"],
        Data="tests.support.toy.ToyData",
        Samples="16", Passes="2", Begin="slurm-multi-node", Ranks="1", Nodes="2", Train=False, Strategy="ddp",
        Weights="offline", WandB_project="p", Name="run-1",
    )  # fmt: skip
    assert config == WizardConfig(
        model="tests.support.toy.Toy", model_args={"lr": 1e-3, "by_rank": 1}, data="tests.support.toy.ToyData",
        data_args={"size": 32},
        global_batch_size=16, max_epochs=2, devices=1, num_nodes=2, use_mixed_precision=False, strategy="ddp",
        wandb_mode="offline", name="run-1", settings={"resume": "auto", "checkpoint.every_n_steps": 500},
    )  # fmt: skip


def test_the_model_is_checked_at_once_and_its_parameters_counted() -> None:
    wrong = ["nodots", "tests.no_such", "tests.support.toy.Toyy", "tests.support.toy.NoModule", "tests.support.toy.Toy"]
    config, prompter, screen = wizard(**TOY | {"Model": wrong})
    assert config is not None
    assert config.model == "tests.support.toy.Toy"
    for text in (
        "model: given 'nodots'; expected an import path",
        "model.class_path: module tests has no no_such",
        "model.class_path: module tests.support.toy has no Toyy",
        "model.class_path: tests.support.toy.NoModule is not a LightningModule",
        "Toy(lr: float = 0.05",
        "161 parameters",
    ):
        assert text in screen, text
    offered = [default for message, default in prompter.asked if message.startswith("Model")]
    assert offered == ["", *wrong[:-1]], "the invalid answer can be corrected"


def test_arguments_are_asked_until_the_class_takes_them() -> None:
    given = ["just text", "lr", "rate: 1", "lr: fast", "{lr: 0.25}", DEFAULT]
    config, _, screen = wizard(**TOY | {"Its_arguments": given})
    assert config is not None
    assert config.model_args == {"lr": 0.25}
    for text in (
        "given 'just text'; expected arguments as in lr: 1e-4",
        "given 'lr'; expected a value after each name",
        "model.init_args.rate: Toy takes no rate",
        "model.init_args.lr: given 'fast'",
    ):
        assert text in screen, text


def test_a_model_that_fails_on_the_meta_device_is_kept_only_after_a_question() -> None:
    broken = "tests.unit.user_code.test_inspection.ReadsWeights"
    config, _, screen = wizard(Model=broken, Its_parameters=True)
    assert config is not None
    assert config.model == broken
    assert "ReadsWeights cannot be created on the meta device" in screen

    config, _, _ = wizard(Model=[broken, "tests.support.toy.Toy"], Its_parameters=False)
    assert config is not None
    assert config.model == "tests.support.toy.Toy"


def test_an_answer_out_of_range_is_reported_and_asked_again() -> None:
    samples, passes = ["0", "many", "8"], ["-2", "1.5", "3"]
    given = {"Samples": samples, "Passes": passes, "Ranks": ["0", "2"], "Name": ["../x", "ok"], "No_plan": False}
    config, _, screen = wizard(**TOY | given)
    assert config is not None
    assert (config.global_batch_size, config.max_epochs, config.devices, config.name) == (8, 3, 2, "ok")
    for text in (
        "global_batch_size: given 0; expected at least 1",
        "global_batch_size: given 'many'; expected a whole number",
        "max_epochs: given -2; expected at least -1",
        "max_epochs: given '1.5'; expected a whole number",
        "devices: given 0; expected at least 1",
        "name: given '../x'; expected up to 100 letters",
    ):
        assert text in screen, text


def test_partitions_are_offered_and_limit_ranks_and_nodes() -> None:
    config, prompter, screen = wizard(partitions=CLUSTER, Ranks=["8", "4"], Nodes=["7", "6"], No_plan=False)
    assert config is not None
    assert (config.partition, config.devices, config.num_nodes) == ("gpu", 4, 6)
    assert prompter.titles["SLURM partition"] == ["gpu", "cpu", "none: without SLURM"]
    assert "cpu (down)" in screen
    assert "devices: given 8; expected at most 4: the GPUs on a node of partition gpu" in screen
    assert "num_nodes: given 7; expected at most 6: the nodes in partition gpu" in screen
    # `submit` takes it from there.
    assert "slurm:\n  partition: gpu\n" in config.to_yaml()
    assert config.to_run_config().slurm.partition == "gpu"


def test_without_slurm_no_partition_is_asked_for() -> None:
    _, prompter, _ = wizard()
    assert "SLURM partition" not in prompter.titles


def test_facts_that_could_not_be_read_are_shown() -> None:
    machine, screen = MachineFacts("laptop", CPU, remarks=("sinfo did not answer",)), io.StringIO()
    SetupWizard(ScriptedPrompter(), console=Console(file=screen), look=lambda: machine).run()
    assert "sinfo did not answer" in screen.getvalue()


def test_the_plan_is_shown_before_and_after_the_answers() -> None:
    _, _, screen = wizard(
        WizardConfig(accelerator="cpu"), **TOY | {"Ranks": "2", "Train": "name", "Precision": "bf16-mixed"}
    )
    first, second = screen.split("Step 3")[1].split("\nPlan")[1:3]
    assert "32-true" in first
    assert "bf16-mixed" in second
    assert "2 x " in first


def test_an_impossible_strategy_is_reported_and_asked_again() -> None:
    start = WizardConfig(accelerator="cpu", devices=2)
    config, prompter, screen = wizard(start, **TOY | {"Strategy": ["single_device", "ddp"], "No_plan": "again"})
    assert config is not None
    assert config.strategy == "ddp"
    assert "no plan for this machine: no plan meets the config" in screen
    assert ("No plan here. What do you change?", "ranks") in prompter.asked


def test_a_batch_that_the_ranks_cannot_share_leads_back_to_ranks_or_batch() -> None:
    start = WizardConfig(accelerator="cpu")
    question = "Batch and ranks do not fit. What do you change?"
    answers = {"Samples": ["7", "9"], "Ranks": ["2", "3"], "Batch": ["batch", "ranks"]}
    config, prompter, screen = wizard(start, **TOY | answers)
    assert config is not None
    assert (config.global_batch_size, config.devices) == (9, 3)
    assert "global_batch_size 7 cannot be shared by 2 ranks" in screen
    asked = [message for message, _ in prompter.asked]
    assert asked.count(question) == 2
    assert asked.index(question) < asked.index("Train in mixed precision?")


@pytest.mark.parametrize("strategy", ["auto", "single_device", "ddp", "hsdp"])
@pytest.mark.parametrize("samples", ["7", "8"])
@pytest.mark.parametrize(("ranks", "nodes"), [("", ""), ("2", ""), ("1", "2"), ("2", "2")])
def test_each_config_that_the_review_writes_loads_and_has_a_plan(
    samples: str, ranks: str, nodes: str, strategy: str, tmp_path: Path
) -> None:
    class Writes(ScriptedPrompter):
        """Writes the config if the review offers it."""

        def select(self, message: str, choices: Sequence[Choice], default: Any = None) -> Any:
            offered = [choice.value for choice in choices]
            return super().select(message, choices, "cancel" if default == "write" not in offered else default)

    answers = {"Samples": [samples, "8"], "Ranks": ranks, "Nodes": nodes, "Strategy": strategy, "No_plan": False}
    prompter = Writes(**TOY | answers, Batch="batch")
    machine = MachineFacts("laptop", CPU)
    made = SetupWizard(prompter, console=Console(file=io.StringIO(), width=80), look=lambda: machine)
    config = made.run(WizardConfig(accelerator="cpu"))
    assert (config is None) == (strategy == "single_device" and (ranks, nodes) != ("", ""))
    if config is not None:
        config.save(tmp_path / "run.yaml")
        written = load_config([tmp_path / "run.yaml"])
        if (strategy, ranks) == ("hsdp", ""):
            with pytest.raises(PlanError, match="there is one rank; start several"):
                plan_here(written, "laptop")
        else:
            assert plan_here(written, "laptop").plan.batch.global_batch_size in (7, 8)


def test_a_precision_by_name_and_a_plain_answer_replace_each_other() -> None:
    start = WizardConfig(accelerator="cpu", precision="16-mixed")
    config, _, _ = wizard(start)
    assert config is not None
    assert (config.precision, config.use_mixed_precision) == ("16-mixed", None), "the set value is the default"
    config, _, _ = wizard(start, Train=True)
    assert config is not None
    assert (config.precision, config.use_mixed_precision) == (None, True)


def test_enter_keeps_everything_of_a_config_that_is_edited() -> None:
    start = WizardConfig(
        model="tests.support.toy.Toy", model_args={"lr": 1e-5}, data="tests.support.toy.ToyData", data_args={"size": 8},
        global_batch_size=8, max_epochs=2, accelerator="cpu", devices=1, num_nodes=1, strategy="single_device",
        use_mixed_precision=False, wandb_mode="disabled", name="x",
        settings={"seed": 3, "trainer.max_time": {"hours": 1}},
    )  # fmt: skip
    config, _, _ = wizard(start)
    assert config == start


def test_after_the_review_a_step_can_be_answered_again_with_another_preset() -> None:
    config, prompter, _ = wizard(
        WizardConfig(accelerator="cpu"), Begin=["debug", "ddp-node"], What=[1, "write"], No_plan=False
    )
    assert config is not None
    assert (config.preset, config.strategy, config.devices, config.max_epochs) == ("ddp-node", "ddp", "auto", None)
    assert [m for m, _ in prompter.asked].count("Begin with a preset?") == 2


def test_cancelling_at_the_review_returns_nothing() -> None:
    assert wizard(What="cancel")[0] is None


def test_answers_that_contradict_each_other_cannot_be_written() -> None:
    prompter = ScriptedPrompter(What="cancel", No_plan=False)
    start = WizardConfig(settings={"sed": 3})
    SetupWizard(prompter, console=Console(file=io.StringIO()), look=lambda: MachineFacts("h", CPU)).run(start)
    assert "write the config" not in prompter.titles["What now?"]
    assert start.errors()[0] == Problem("sed", "unknown key; did you mean seed?")


@pytest.mark.parametrize("question", ["Model", "Data", "Begin", "Train", "Weights", "What"])
def test_ctrl_c_at_any_question_ends_it(question: str) -> None:
    with pytest.raises(KeyboardInterrupt):
        wizard(**TOY | {question: KeyboardInterrupt()})
