"""Flight records in torch's own form, made by hand and by a real process group of one rank."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from launcher.agent.flight_recorder import (
    Collective,
    FlightRecord,
    parse_flight_record,
    ranks_that_did_not_enter,
    read_flight_record,
)
from launcher.agent.hang_detection import RankState, ranks_behind
from launcher.agent.node_exchange import NodeExchange
from launcher.process.heartbeat import Heartbeat


def _entry(number: int, operation: str = "all_reduce", *, backend: str = "nccl", done: bool = True, size: int = 97,
           group: tuple[str, str] = ("0", "default_pg"), p2p: bool = False) -> dict[str, Any]:  # fmt: skip
    return {
        "record_id": number - 1, "pg_id": 0, "process_group": list(group), "collective_seq_id": number,
        "p2p_seq_id": 0, "op_id": number, "profiling_name": f"{backend}:{operation}", "time_created_ns": 1,
        "input_sizes": [[size]], "input_dtypes": ["Float"], "output_sizes": [[size]], "output_dtypes": ["Float"],
        "state": "completed" if done and backend == "nccl" else "scheduled", "retired": done, "is_p2p": p2p,
        "timeout_ms": 600000, "time_discovered_started_ns": 0, "time_discovered_completed_ns": 0,
    }  # fmt: skip


def _record(*entries: dict[str, Any], groups: dict[str, list[int]] | None = None) -> FlightRecord:
    config = {name: {"name": name, "desc": "", "ranks": str(ranks)} for name, ranks in (groups or {}).items()}
    return parse_flight_record(json.dumps({"version": "2.10", "entries": entries, "pg_config": config}))


def test_the_last_collective_and_those_that_are_not_done_are_read() -> None:
    record = _record(_entry(1), _entry(2, done=False), groups={"0": [0, 1]})
    assert record.last == {"default_pg": 2}
    assert record.waiting == (Collective("default_pg", 2, "all_reduce", ((97,),), ("Float",)),)
    assert record.members == {"default_pg": frozenset({0, 1})}
    assert str(record.waiting[0]) == "all_reduce of [97] Float (number 2 of default_pg)"


def test_what_nccls_watchdog_gave_up_is_not_done_and_gloos_is_when_it_is_retired() -> None:
    timed_out = _entry(2, done=False) | {"retired": True}
    assert len(_record(timed_out).waiting) == 1
    assert _record(_entry(2, backend="gloo")).waiting == ()
    assert len(_record(_entry(2, backend="gloo", done=False)).waiting) == 1


def test_sends_and_receives_are_no_collectives() -> None:
    assert _record(_entry(7, "send", p2p=True, done=False)) == FlightRecord({}, (), {})


def test_the_rank_that_never_came_is_named_with_the_collective_and_those_who_wait() -> None:
    waits, absent = _record(_entry(40), _entry(41, done=False)), _record(_entry(40))
    assert ranks_that_did_not_enter({0: waits, 1: absent, 2: waits}) == {
        1: "it did not enter all_reduce of [97] Float (number 41 of default_pg), in which each of ranks 0, 2 waits"
    }


def test_a_rank_that_entered_nothing_at_all_is_late_too() -> None:
    records = {0: _record(_entry(1, done=False)), 1: FlightRecord()}
    assert list(ranks_that_did_not_enter(records)) == [1]


def test_where_nobody_waits_nobody_is_late() -> None:
    # The source of a broadcast goes on before the others have come.
    assert ranks_that_did_not_enter({0: _record(_entry(5, "broadcast")), 1: _record(_entry(4))}) == {}
    assert ranks_that_did_not_enter({}) == {}


def test_a_rank_that_is_late_because_it_waits_for_another_is_not_accused() -> None:
    # Rank 0 waits for 1 in everybody's group; 1 waits for 2 in a group of their own.
    pair = ("1", "tensor_parallel")
    groups = {"0": [0, 1, 2], "1": [1, 2]}
    records = {
        0: _record(_entry(3, done=False), groups={"0": [0, 1, 2]}),
        1: _record(_entry(2), _entry(9, group=pair, done=False), groups=groups),
        2: _record(_entry(2), _entry(8, group=pair), groups=groups),
    }
    named = ranks_that_did_not_enter(records)
    assert list(named) == [2]
    assert "(number 3 of default_pg)" in named[2]
    both_wait = records | {2: _record(_entry(2), _entry(8, group=pair), _entry(1, group=("2", "other"), done=False))}
    assert list(ranks_that_did_not_enter(both_wait)) == [1, 2]


def test_a_group_concerns_its_own_ranks_alone() -> None:
    pair = ("1", "tensor_parallel")
    records = {
        0: _record(_entry(3, group=pair, done=False), groups={"1": [0, 1]}),
        1: _record(_entry(2, group=pair), groups={"1": [0, 1]}),
        2: _record(_entry(1)),
    }
    assert list(ranks_that_did_not_enter(records)) == [1]
    unlisted = {rank: FlightRecord(record.last, record.waiting) for rank, record in records.items()}
    assert list(ranks_that_did_not_enter(unlisted)) == [1]


def test_the_rank_that_entered_another_collective_is_named() -> None:
    usual, other = _record(_entry(4, done=False)), _record(_entry(4, "broadcast", done=False))
    assert ranks_that_did_not_enter({0: usual, 1: usual, 2: other}) == {
        2: "it entered broadcast of [97] Float (number 4 of default_pg), where each of ranks 0, 1 entered "
        "all_reduce of [97] Float (number 4 of default_pg)"
    }
    assert list(ranks_that_did_not_enter({0: usual, 1: other})) == [0, 1], "of two nobody knows which is right"


def test_other_sizes_are_another_collective_only_where_they_must_be_equal() -> None:
    def pair(operation: str) -> dict[int, FlightRecord]:
        return {rank: _record(_entry(4, operation, done=False, size=rank + 1)) for rank in range(2)}

    assert list(ranks_that_did_not_enter(pair("all_reduce"))) == [0, 1]
    assert ranks_that_did_not_enter(pair("all_gather")) == {}


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"version": "2.10", "entries": [{}]}',
                                  '{"version": "2.10", "entries": [{"is_p2p": false}]}',
                                  '{"version": "2.10", "entries": 3}', "\x80\x02}q"])  # fmt: skip
def test_a_file_of_another_form_is_no_record(tmp_path: Path, text: str) -> None:
    path = tmp_path / "record.json"
    assert read_flight_record(path) is None
    path.write_text(text, encoding="latin-1")
    assert read_flight_record(path) is None


def test_hangs_are_explained_by_the_records_before_counts_and_stacks() -> None:
    waits, absent = _record(_entry(41, done=False)), _record(_entry(40))
    states = {
        rank: RankState(Heartbeat(3, 1.0, 41, True), record=record) for rank, record in enumerate((waits, absent))
    }
    (named,) = ranks_behind(states).items()
    assert named[0] == 1
    assert named[1].endswith(
        "; it did not enter all_reduce of [97] Float (number 41 of default_pg), in which rank 0 waits"
    )
    stopped = states | {0: RankState(Heartbeat(3, 1.0, 41, True), "T", record=waits)}
    assert list(ranks_behind(stopped)) == [0]


def test_states_cross_to_other_nodes_as_plain_values_and_all_are_judged_together() -> None:
    import torch.distributed as dist

    waits = _record(_entry(41, done=False), groups={"0": [0, 1, 2]})
    zero = {0: RankState(Heartbeat(3, 1.0, 41, True), "S", "the stacks", waits), 2: RankState(None, "D")}
    one = {1: RankState(Heartbeat(3, 1.0, 40, True), record=_record(_entry(40)))}
    store = dist.HashStore()
    exchanges = [NodeExchange(store, node, 2) for node in range(2)]
    assert exchanges[0].states(zero, 0.0) == zero, "the other node has not told in time"
    everybody = exchanges[1].states(one, 0.0)
    assert everybody == zero | one
    assert exchanges[0].states(zero, 0.0) == everybody
    del everybody[2]
    assert list(ranks_behind(everybody)) == [1], "neither node could tell this from its own ranks"


def test_torchs_own_record_is_understood() -> None:
    import torch
    import torch.distributed as dist

    from launcher.training.heartbeat_callback import flight_record

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        # The recorder is the process's: a group of this test's own tells its entries from those of others.
        before = parse_flight_record(flight_record()).last
        dist.all_reduce(torch.ones(3), group=dist.new_group([0]))
        after = parse_flight_record(flight_record())
    finally:
        dist.destroy_process_group()
    assert list(after.last.items() - before.items()) == [(max(after.last.keys() - before.keys()), 1)]
