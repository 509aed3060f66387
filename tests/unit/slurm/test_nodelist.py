"""SLURM's short form of node lists: lists built as SLURM builds them are read back."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slurm.nodelist import NodeListError, expand_nodes


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("n1", ["n1"]),
        ("n[1-3]", ["n1", "n2", "n3"]),
        ("n[01-03,7,10-11]", ["n01", "n02", "n03", "n7", "n10", "n11"]),
        ("n[098-101]", ["n098", "n099", "n100", "n101"]),
        ("login,n[1-2]-ib,gpu-a", ["login", "n1-ib", "n2-ib", "gpu-a"]),
        ("r[1-2]-n[01-02]", ["r1-n01", "r1-n02", "r2-n01", "r2-n02"]),
        ("cn-0001.site.org", ["cn-0001.site.org"]),
    ],
)
def test_a_node_list_expands_as_scontrol_does(text: str, names: list[str]) -> None:
    assert expand_nodes(text) == names


@pytest.mark.parametrize(
    "text", ["", "n[1-2", "n1-2]", "n[[1]]", "n[2-1]", "n[]", "n[a-b]", "n1,,n2", "n[1-9999999999]"]
)
def test_an_invalid_list_is_rejected_with_its_text(text: str) -> None:
    with pytest.raises(NodeListError) as refused:
        expand_nodes(text)
    assert repr(text) in str(refused.value)


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 150), st.integers(0, 5)), min_size=1, max_size=5))
def test_ranges_with_any_padding_expand_in_order(ranges: list[tuple[int, int, int]]) -> None:
    names = [f"n{number:0{padding}}" for padding, first, more in ranges for number in range(first, first + more + 1)]
    items = [f"{first:0{padding}}-{first + more:0{padding}}" if more else f"{first:0{padding}}"
             for padding, first, more in ranges]  # fmt: skip
    assert expand_nodes(f"n[{','.join(items)}]") == names
