"""What an earlier command left in a folder: read, compared, refused in one line."""

import dataclasses
import json
from pathlib import Path

import pytest

from ddpm_core.errors import InputError
from jobs.common.resume import check_same, differences, flags_of, read_record


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


@dataclasses.dataclass
class Options:
    num_steps: int = 1
    unet: None = None


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("num_steps", "--num-steps 1"),
        ("num_steps_more", "num_steps_more = 1"),
        ("unet.model_channels", "--unet.model-channels 1"),
        ("training.unet.dropout", "--unet.dropout 1"),
        ("hash", "hash = 1"),
    ],
)
def test_an_option_is_named_as_its_flag(name: str, told: str) -> None:
    flags = flags_of(Options) | flags_of(Options, "training.")
    with pytest.raises(InputError, match=f"^out holds a run with {told}, this command says 2; give"):
        check_same("out", "a run", {name: 1}, {name: 2}, flags=flags)


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
