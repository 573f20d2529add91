"""What an earlier command left in a folder: read, compared, refused in one line."""

import json
from pathlib import Path

import pytest

from ddpm_core.errors import InputError
from jobs.common.resume import check_same, differences, read_record


def test_differences_have_dotted_names_and_what_is_missing_is_none() -> None:
    old = {"a": 1, "b": {"c": [1, 2], "d": {"e": 3}}, "gone": 4, "same": None}
    new = {"a": 2, "b": {"c": [1, 2], "d": {"e": 5}, "new": 6}}
    assert [*differences(old, new)] == [("a", 1, 2), ("b.d.e", 3, 5), ("b.new", None, 6), ("gone", 4, None)]
    assert [*differences({"a": {"b": 1}}, {"a": 1})] == [("a", {"b": 1}, 1)]


def test_the_first_difference_is_named_but_for_what_may_change() -> None:
    old, new = {"data": {"uri": "a", "hash": 1}, "data_seed": 0}, {"data": {"uri": "b", "hash": 2}, "data_seed": 1}
    with pytest.raises(InputError, match=r"^out holds a run with data\.hash = 1, this command says 2; give the old "):
        check_same("out", "a run", old, new, may_change=["data.uri"])
    with pytest.raises(InputError, match=r"with data_seed = 0, this command says 1; begin anew$"):
        check_same("out", "a run", old, new, may_change=["data"], remedy="begin anew")
    check_same("out", "a run", old, new, may_change=["data", "data_seed"])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "is not ours; give a new --output folder"),
        (b"\xff", "is not ours"),
        (b"[]", "is not ours"),
        (b'{"format": "theirs", "format_version": 2}', "is not ours"),
        (b'{"format": "ours"}', "has format version None, this program writes version 2; give a new --output folder"),
        (b'{"format": "ours", "format_version": 1}', "has format version 1, this program writes version 2"),
    ],
)
def test_what_cannot_be_gone_on_from_is_refused_in_one_line(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "record.json").write_bytes(content)
    with pytest.raises(InputError, match=f"record.json {message}") as raised:
        read_record(str(tmp_path / "record.json"), "ours", 2, what="ours")
    assert "\n" not in str(raised.value)


def test_a_record_is_read_and_none_is_none(tmp_path: Path) -> None:
    record = {"format": "ours", "format_version": 2, "options": {"a": 1}}
    (tmp_path / "record.json").write_text(json.dumps(record))
    assert read_record(str(tmp_path / "record.json"), "ours", 2) == record
    assert read_record(str(tmp_path / "none.json"), "ours", 2) is None
