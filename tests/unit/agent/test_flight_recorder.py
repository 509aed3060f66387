"""Flight records in torch's format, written by the tests and by a real process group of one rank."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from launcher.agent.flight_recorder import (
    Collective,
    FlightRecord,
    find_absent_ranks,
    parse_flight_record,
    read_flight_record,
)
from launcher.agent.hang_detection import RankState, find_blocking_ranks
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


def test_the_last_and_the_incomplete_collectives_are_read() -> None:
    record = _record(_entry(1), _entry(2, done=False), groups={"0": [0, 1]})
    assert record.last == {"default_pg": 2}
    assert record.waiting == (Collective("default_pg", 2, "all_reduce", ((97,),), ("Float",)),)
    assert record.members == {"default_pg": (0, 1)}
    assert str(record.waiting[0]) == "all_reduce of [97] Float (number 2 of default_pg)"


def test_a_timed_out_collective_of_nccl_is_incomplete_and_a_retired_one_of_gloo_complete() -> None:
    timed_out = _entry(2, done=False) | {"retired": True}
    assert len(_record(timed_out).waiting) == 1
    assert _record(_entry(2, backend="gloo")).waiting == ()
    assert len(_record(_entry(2, backend="gloo", done=False)).waiting) == 1


def test_sends_and_receives_are_not_collectives() -> None:
    assert _record(_entry(7, "send", p2p=True, done=False)) == FlightRecord({}, (), {})


def test_the_absent_rank_is_reported_with_the_collective_and_the_waiting_ranks() -> None:
    waits, absent = _record(_entry(40), _entry(41, done=False)), _record(_entry(40))
    assert find_absent_ranks({0: waits, 1: absent, 2: waits}) == {
        1: "it did not enter all_reduce of [97] Float (number 41 of default_pg), in which ranks 0, 2 wait"
    }


def test_a_rank_without_any_collective_is_absent() -> None:
    records = {0: _record(_entry(1, done=False)), 1: FlightRecord()}
    assert list(find_absent_ranks(records)) == [1]


def test_without_waiting_ranks_no_rank_is_absent() -> None:
    # The source of a broadcast continues before the other ranks enter it.
    assert find_absent_ranks({0: _record(_entry(5, "broadcast")), 1: _record(_entry(4))}) == {}
    assert find_absent_ranks({}) == {}


def test_a_rank_that_waits_for_another_one_is_not_blamed() -> None:
    # Rank 0 waits for rank 1 in the default group; rank 1 waits for rank 2 in another group.
    pair = ("1", "tensor_parallel")
    groups = {"0": [0, 1, 2], "1": [1, 2]}
    records = {
        0: _record(_entry(3, done=False), groups={"0": [0, 1, 2]}),
        1: _record(_entry(2), _entry(9, group=pair, done=False), groups=groups),
        2: _record(_entry(2), _entry(8, group=pair), groups=groups),
    }
    named = find_absent_ranks(records)
    assert list(named) == [2]
    assert "(number 3 of default_pg)" in named[2]
    both_wait = records | {2: _record(_entry(2), _entry(8, group=pair), _entry(1, group=("2", "other"), done=False))}
    assert list(find_absent_ranks(both_wait)) == [1, 2]


def test_only_members_of_a_group_can_be_absent() -> None:
    pair = ("1", "tensor_parallel")
    records = {
        0: _record(_entry(3, group=pair, done=False), groups={"1": [0, 1]}),
        1: _record(_entry(2, group=pair), groups={"1": [0, 1]}),
        2: _record(_entry(1)),
    }
    assert list(find_absent_ranks(records)) == [1]
    unlisted = {rank: FlightRecord(record.last, record.waiting) for rank, record in records.items()}
    assert list(find_absent_ranks(unlisted)) == [1]


def test_the_rank_that_entered_a_different_collective_is_reported() -> None:
    usual, other = _record(_entry(4, done=False)), _record(_entry(4, "broadcast", done=False))
    assert find_absent_ranks({0: usual, 1: usual, 2: other}) == {
        2: "it entered broadcast of [97] Float (number 4 of default_pg), where ranks 0, 1 entered "
        "all_reduce of [97] Float (number 4 of default_pg)"
    }
    assert list(find_absent_ranks({0: usual, 1: other})) == [0, 1], "with two ranks it is unknown which one is right"


def test_sizes_count_only_for_operations_that_need_equal_sizes() -> None:
    def pair(operation: str) -> dict[int, FlightRecord]:
        return {rank: _record(_entry(4, operation, done=False, size=rank + 1)) for rank in range(2)}

    assert list(find_absent_ranks(pair("all_reduce"))) == [0, 1]
    assert find_absent_ranks(pair("all_gather")) == {}


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"version": "2.10", "entries": [{}]}',
                                  '{"version": "2.10", "entries": [{"is_p2p": false}]}',
                                  '{"version": "2.10", "entries": 3}', "\x80\x02}q"])  # fmt: skip
def test_a_file_with_other_content_is_not_a_record(tmp_path: Path, text: str) -> None:
    path = tmp_path / "record.json"
    assert read_flight_record(path) is None
    path.write_text(text, encoding="latin-1")
    assert read_flight_record(path) is None


def test_flight_records_decide_before_counts_and_stacks() -> None:
    waits, absent = _record(_entry(41, done=False)), _record(_entry(40))
    heartbeat = Heartbeat(3, 1.0, 41, True)
    states = {rank: RankState(heartbeat, flight_record=record) for rank, record in enumerate((waits, absent))}
    (named,) = find_blocking_ranks(states).items()
    assert named[0] == 1
    assert named[1].endswith(
        "; it did not enter all_reduce of [97] Float (number 41 of default_pg), in which rank 0 waits"
    )
    stopped = states | {0: RankState(heartbeat, "stopped", flight_record=waits)}
    assert list(find_blocking_ranks(stopped)) == [0]


def test_states_of_all_nodes_are_exchanged_and_compared() -> None:
    import torch.distributed as dist

    waits = _record(_entry(41, done=False), groups={"0": [0, 1, 2]})
    waiting = RankState(Heartbeat(3, 1.0, 41, True), "sleeping", "the stacks", waits)
    zero = {0: waiting, 2: RankState(None, "disk-sleep")}
    one = {1: RankState(Heartbeat(3, 1.0, 40, True), flight_record=_record(_entry(40)))}
    store = dist.HashStore()
    exchanges = [NodeExchange(store, node, 2) for node in range(2)]
    assert exchanges[0].exchange_states(zero, 0.0) == zero, "the other node has not published its states in time"
    all_states = exchanges[1].exchange_states(one, 0.0)
    assert all_states == zero | one
    assert exchanges[0].exchange_states(zero, 0.0) == all_states
    del all_states[2]
    assert list(find_blocking_ranks(all_states)) == [1], "no node finds it from its own ranks only"


def test_a_record_of_torch_itself_is_read() -> None:
    import torch
    import torch.distributed as dist

    from launcher.process.collectives import dump_flight_record, enable_flight_recorder

    enable_flight_recorder()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        # All groups of the process share the recorder: a new group separates this test's entries.
        before = parse_flight_record(dump_flight_record()).last
        dist.all_reduce(torch.ones(3), group=dist.new_group([0]))
        after = parse_flight_record(dump_flight_record())
    finally:
        dist.destroy_process_group()
    assert list(after.last.items() - before.items()) == [(max(after.last.keys() - before.keys()), 1)]
