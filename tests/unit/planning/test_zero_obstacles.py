"""Obstacles for ZeRO: fp16 on a CPU, a missing NVMe folder, a precision plugin of the user."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.plugins.precision import DoublePrecision

from launcher.agreement.facts import Agreement, RankFacts, make_identical_ranks
from launcher.config.schema import RunConfig
from launcher.config.validation import find_problems
from launcher.coordinator import TrainingCoordinator
from launcher.core.errors import ConfigError, PlanError
from launcher.core.terminal import make_console
from launcher.hardware.nvme import NvmeFolder, find_offload_folders, inspect_folders
from launcher.planning.deepspeed_facts import deepspeed_facts
from launcher.planning.deepspeed_limits import nvme_room
from launcher.planning.memory import plan_with_memory
from launcher.planning.plan import Plan, make_plan
from launcher.planning.table import print_memory
from strategies.deepspeed_config import NVME_PATH
from strategies.gpus import find_gpu
from strategies.registry import list_zero_variants
from tests.support.rank_threads import CPU, H100, facts
from tests.support.toy import Toy
from tests.unit.strategies.test_comparison import GIB, profile

NVME = "deepspeed_stage_3_offload_nvme"
VARIANTS = list_zero_variants()


def planned(*ranks: RankFacts, billions: float = 0.1, host: int | None = None, **given: Any) -> Plan:
    return plan_with_memory(
        RunConfig(**given), Agreement(ranks), profile(billions), host_memory_bytes=host
    )  # fmt: skip


def reasons(plan: Plan) -> dict[str, str]:
    """The reason of each candidate that is not eligible on these ranks."""
    assert plan.memory is not None
    return {entry["name"]: entry["reason"] for entry in plan.memory["assessments"] if not entry["eligible"]}


def seen(rank: int, free: int, path: str = NVME_PATH, problem: str | None = None, **known: Any) -> RankFacts:
    return facts(rank, H100, nvme=(NvmeFolder(path, free, problem),), **known)


class TestFp16OnACpu:
    """`strategy: auto` must not choose a strategy that is rejected on request."""

    RANKS = (facts(0, CPU), facts(1, CPU, deepspeed_fp16=False))

    @pytest.mark.parametrize("precision", ["16-mixed", "bf16-mixed"])
    def test_no_variant_is_a_candidate_if_one_rank_lacks_fp16(self, precision: str) -> None:
        found = reasons(planned(*self.RANKS, precision=precision))
        rejected = [name for name, reason in found.items() if "AVX512-FP16, which node1 lacks" in reason]
        plain = [name for name in VARIANTS if not VARIANTS[name].offloads]
        assert rejected == (plain if precision == "16-mixed" else [])

    def test_variant_without_fp16_is_not_picked_if_nothing_else_fits(self) -> None:
        # DDP needs 18.6 GiB of each rank, ZeRO 14.9, FSDP2 less; averages of whole parameters exclude FSDP2.
        small = dataclasses.replace(CPU, memory_bytes=18 * GIB)
        able = [dataclasses.replace(f, hardware=facts(0, small).hardware, local_world_size=1) for f in self.RANKS]
        averaging = [dataclasses.replace(f, traits={**f.traits, "weight_callbacks": ["Averaging"]}) for f in able]
        assert planned(*averaging, billions=1, precision="bf16-mixed").strategy.name.startswith("deepspeed_stage_")
        with pytest.raises(PlanError, match="no strategy fits"):
            planned(*averaging, billions=1, precision="16-mixed")
        assert planned(*able, billions=1, precision="16-mixed").strategy.name == "fsdp2", "an obstacle of ZeRO only"

    @pytest.mark.parametrize("given", [{"precision": "16-mixed"}, {"deepspeed_config": {"fp16": {"enabled": True}}}])
    def test_requested_variant_is_rejected_with_the_host(self, given: dict[str, Any]) -> None:
        with pytest.raises(PlanError, match=r"which node1 lacks; use bf16-mixed, or debug fp16 with `strategy: ddp`"):
            make_plan(RunConfig(strategy="deepspeed_stage_2", **given), Agreement(self.RANKS))
        make_plan(RunConfig(strategy="ddp", precision="16-mixed"), Agreement(self.RANKS))

    def test_rank_reports_fp16_support_of_its_cpu(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("launcher.planning.deepspeed_facts._has_fp16", lambda: False)
        assert not deepspeed_facts(RunConfig(), "cpu", {})["deepspeed_fp16"]
        assert deepspeed_facts(RunConfig(), "cpu", {"LAUNCHER_TEST_DEEPSPEED_CPU_FP16": "1"})["deepspeed_fp16"]
        assert deepspeed_facts(RunConfig(), "cuda", {})["deepspeed_fp16"]


class TestNoDeepSpeed:
    """DeepSpeed is not installed on one node."""

    RANKS = (facts(0, H100), facts(1, H100, {"deepspeed": None}))

    def test_auto_chooses_among_ddp_and_fsdp2(self) -> None:
        plans = [planned(*self.RANKS, billions=size) for size in (0.1, 7)]
        assert [plan.strategy.name for plan in plans] == ["ddp", "fsdp2_grad_op"]
        found = reasons(plans[1])
        assert {found[name] for name in VARIANTS} == {"DeepSpeed is not installed on node1"}
        assert not any("DeepSpeed" in reason for name, reason in found.items() if name not in VARIANTS)

    def test_requested_variant_is_rejected_with_advice(self) -> None:
        advice = r"DeepSpeed is not installed on node1; install it .*, or use `strategy: fsdp2`"
        with pytest.raises(PlanError, match=advice):
            make_plan(RunConfig(strategy="deepspeed_stage_2"), Agreement(self.RANKS))
        assert make_plan(RunConfig(strategy="fsdp2"), Agreement(self.RANKS)).strategy.name == "fsdp2"


class TestNvme:
    """Each rank checks the folder before the plan is made."""

    def test_rank_reports_its_folder(self, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        here, gone, file = inspect_folders([str(tmp_path), str(tmp_path / "gone"), str(tmp_path / "file")])
        status = os.statvfs(tmp_path)
        assert here.problem is None
        assert abs(here.free_bytes - status.f_bavail * status.f_frsize) < GIB
        assert (gone.free_bytes, gone.problem, file.problem) == (0, "does not exist", "is not a folder")
        assert not (tmp_path / "gone").exists()

    def test_unwritable_folder_is_reported(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write anywhere
        assert inspect_folders([str(tmp_path)])[0].problem == "cannot be written"

    def test_folder_facts_survive_the_store(self) -> None:
        fact = seen(3, 5, problem="is not a folder", deepspeed_fp16=False)
        assert RankFacts.from_json(fact.to_json()) == fact

    def test_user_folder_is_checked_and_passed_to_deepspeed(self, tmp_path: Path) -> None:
        path = str(tmp_path)
        zero = {name: {"nvme_path": path} for name in ("offload_optimizer", "offload_param")}
        given = {"strategy": NVME, "deepspeed_config": {"zero_optimization": zero}}
        assert find_offload_folders(RunConfig(**given)) == (path, NVME_PATH)
        found = inspect_folders([path])
        plan = make_plan(RunConfig(**given), Agreement((facts(0, H100, nvme=found), facts(1, H100, nvme=found))))
        assert plan.deepspeed is not None
        for name in zero:
            assert plan.deepspeed["zero_optimization"][name] == {
                "device": "nvme", "pin_memory": True, "nvme_path": path,
            }  # fmt: skip
        own = {"strategy": "deepspeed_stage_3", "deepspeed_config": {
            "zero_optimization": {"offload_optimizer": {"device": "nvme", "nvme_path": path}}}}  # fmt: skip
        assert find_offload_folders(RunConfig(**own)) == (path, NVME_PATH)
        assert find_offload_folders(RunConfig()) == (NVME_PATH,)

    def test_nvme_offload_without_a_folder_is_rejected(self) -> None:
        zero = {"offload_optimizer": {"device": "nvme"}}
        config = RunConfig(strategy="deepspeed_stage_3", deepspeed_config={"zero_optimization": zero})
        with pytest.raises(PlanError, match="offload_optimizer: given device nvme without nvme_path; name a folder"):
            make_plan(config, Agreement((facts(0, H100), facts(1, H100))))

    def test_missing_folder_makes_the_candidate_ineligible_with_the_host(self) -> None:
        found = reasons(planned(seen(0, 10**15), seen(1, 0, problem="does not exist")))
        assert found.pop("single_device")
        assert found == {NVME: f"its NVMe folder {NVME_PATH} does not exist on node1"}
        assert NVME not in reasons(planned(seen(0, 10**15), seen(1, 10**15)))

    def test_requested_nvme_offload_is_rejected_with_advice(self) -> None:
        agreement = Agreement((seen(0, 10**15), seen(1, 0, problem="cannot be written")))
        with pytest.raises(
            PlanError, match=r"cannot be written on node1; create it on every node, or set another nvme_path"
        ):
            make_plan(RunConfig(strategy=NVME), agreement)
        make_plan(RunConfig(strategy="deepspeed_stage_3_offload"), agreement)

    def test_insufficient_nvme_space_does_not_fit(self) -> None:
        # 149 GiB for each of two ranks that share the folder.
        known = {"local_world_size": 2, "node_rank": 0}
        wide = [seen(n, 10**13, **known) for n in range(2)]
        assert planned(*wide, billions=20, host=256 * GIB).strategy.name == NVME
        narrow = [seen(n, 200 * GIB, **known) for n in range(2)]
        with pytest.raises(PlanError, match="no strategy fits"):
            planned(*narrow, billions=20, host=256 * GIB)
        asked = planned(*narrow, billions=20, host=256 * GIB, strategy=NVME)
        assert "does not fit: 149 GiB on NVMe a rank, where there is room for 100 GiB" in asked.notices[-1]

    def test_space_of_a_shared_disk_counts_once(self) -> None:
        folders = tuple(NvmeFolder(path, 100, device=7) for path in ("/nvme/a", "/nvme/b"))
        user = {"zero_optimization": {f"offload_{part}": {"device": "nvme", "nvme_path": f.path}
                                      for part, f in zip(("optimizer", "param"), folders, strict=True)}}  # fmt: skip
        assert nvme_room(NVME, Agreement((facts(0, H100, nvme=folders),)), user) == 100
        apart = (folders[0], dataclasses.replace(folders[1], device=8))
        assert nvme_room(NVME, Agreement((facts(0, H100, nvme=apart),)), user) == 200

    def test_other_machines_are_assumed_to_have_the_folder(self) -> None:
        first = dataclasses.replace(facts(0, H100), local_world_size=8)
        there = Agreement(make_identical_ranks(first, 16), assumed=True)
        plan = plan_with_memory(RunConfig(), there, profile(1))
        assert plan.memory is not None
        assert f"not checked on the nodes: {NVME} assumes" in plan.memory["notes"][-1]
        assert f"for each rank on {NVME_PATH}" in plan.memory["notes"][-1]
        assert plan.memory["machine"]["source"] == find_gpu("h100").source
        console = make_console()
        with console.capture() as printed:
            print_memory(plan, console)
        assert f"numbers of the device: {find_gpu('h100').source}" in printed.get()
        asked = make_plan(RunConfig(strategy=NVME), there)
        assert asked.notices == (f"not checked on the nodes: {NVME} assumes that {NVME_PATH} exists and has room",)
        assert not any(NVME in n for n in (planned(seen(0, 10**15), seen(1, 10**15)).memory or {})["notes"])

    def test_missing_build_tools_make_nvme_offload_ineligible(self) -> None:
        found = reasons(planned(seen(0, 10**15), seen(1, 10**15, versions={"ninja": None})))
        assert "compiles DeepSpeed's async_io at its first start, but ninja not on the PATH of node1" in found[NVME]


class TestOwnPrecisionPlugin:
    """DeepSpeed takes only Lightning's DeepSpeedPrecision."""

    def test_no_variant_is_a_candidate(self) -> None:
        own = [facts(n, H100, traits={"precision_plugin": "my.Plugin"}) for n in range(2)]
        found = reasons(planned(*own))
        assert set(VARIANTS) <= set(found)
        assert all("the user's own my.Plugin decides the precision" in found[name] for name in VARIANTS)
        assert planned(*own).precision == "custom"

    def test_requested_variant_is_rejected(self) -> None:
        own = [facts(n, H100, traits={"precision_plugin": "my.Plugin"}) for n in range(2)]
        with pytest.raises(PlanError, match=r"user's own my.Plugin .*; remove yours and set `precision`"):
            make_plan(RunConfig(strategy="deepspeed_stage_2"), Agreement(tuple(own)))

    def test_config_with_plugin_and_deepspeed_is_rejected(self) -> None:
        plugins = {"trainer": {"plugins": [{"class_path": "my.Plugin"}]}}
        problems = find_problems({"strategy": "deepspeed_stage_2", **plugins})
        assert [p.path for p in problems] == ["trainer.plugins"]
        assert not find_problems({"strategy": "ddp", **plugins})
        assert not find_problems({"strategy": "deepspeed_stage_2", "trainer": {"plugins": None}})

    def test_coordinator_with_plugin_and_deepspeed_starts_no_rank(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(TrainingCoordinator, "_fit", lambda *_: pytest.fail("ranks were started"))
        coordinator = TrainingCoordinator(
            tmp_path, strategy="deepspeed_stage_2", devices=2, plugins=[DoublePrecision()]
        )  # fmt: skip
        with pytest.raises(ConfigError, match=r"plugins: a precision plugin was given, but DeepSpeed's engine"):
            coordinator.train(Toy())
