"""Which kind a folder is of, outputs that would spoil one, and what `jobs.runs` does with them."""

import json
import os
import platform
import shutil
import time
from pathlib import Path
from typing import Any

import pytest

from ddpm_core.errors import InputError
from jobs import evaluate, experiments, prepare, runs, sweep, train, translate
from jobs.common import kinds
from jobs.common.kinds import KINDS, KindName, check_output, kind_of


def leave(folder: Path, kind: KindName, **record: Any) -> Path:
    """A folder of that kind, as far as it is told by its files."""
    folder.mkdir(parents=True)
    first, *others = KINDS[kind].files
    (folder / first).write_text(json.dumps({"format": KINDS[kind].format, **record}))
    for file in others:
        (folder / file).write_text("{}")
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_told_from_the_others(kind: KindName, tmp_path: Path) -> None:
    found = kind_of(str(leave(tmp_path / "a", kind, name="x")))
    assert found is not None
    assert (found[0], found[1]["name"]) == (kind, "x")


@pytest.mark.parametrize("content", ["", "[]", '{"format": "theirs"}', "\udce9"])
def test_files_of_other_programs_are_none_of_ours(content: str, tmp_path: Path) -> None:
    for kind in KINDS.values():
        for file in kind.files:
            if kind.format is not None:
                (tmp_path / file).write_bytes(content.encode(errors="surrogateescape"))
    assert kind_of(str(tmp_path)) is None


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("sweep/sweep.json", "is a file; give a folder"),
        ("data", "is --data; give a folder outside of it"),
        ("data/", "is --data"),
        ("link", "is --data"),
        ("data/run", "lies in --data"),
        ("link/run", "lies in --data"),
        (".", "contains --data"),
        ("other/deep/run", "lies in the data set .*/other; give a folder outside of it"),
        ("other", "holds a data set; give another folder"),
        ("sweep", "holds a sweep; give another folder"),
        ("evaluation", "holds an evaluation; give"),
        ("experiments", "holds experiments; give"),
    ],
)
def test_an_output_that_would_spoil_something_is_refused(output: str, message: str, tmp_path: Path) -> None:
    for name in ("sweep", "evaluation", "experiments"):
        leave(tmp_path / name, name)  # type: ignore[arg-type]
    for name in ("data", "other"):
        leave(tmp_path / name, "data set")
    (tmp_path / "link").symlink_to(tmp_path / "data")
    uri = os.path.normpath(tmp_path / output)
    with pytest.raises(InputError, match=rf"^--output {uri} {message}"):
        check_output(uri, "run", {"--data": str(tmp_path / "data")})


def test_an_output_of_its_own_is_taken(tmp_path: Path) -> None:
    data, run = str(leave(tmp_path / "data", "data set")), leave(tmp_path / "run", "run")
    check_output(str(tmp_path / "data-2"), "data set", {"--source": data})  # no part of its path
    check_output(str(run), "run", {"--data": data})
    check_output(str(run / "evaluation"), "evaluation", {"--data": data})
    check_output(str(tmp_path), "data set", {"--source": None, "--domain day": ""})


COMMANDS = {
    "train": (train.main, "--preset smoke --data DATA --output OUT"),
    "sweep": (sweep.main, "--preset smoke --data DATA --output OUT"),
    "evaluate": (evaluate.main, "--checkpoint c --data DATA --output OUT"),
    "translate": (translate.main, "--checkpoint c --input DATA --output OUT --domain night"),
    "prepare": (prepare.main, "folders --source DATA --output OUT"),
    "experiments": (experiments.main, "--celeba DATA --output OUT"),
}


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("output", ["data", "data/out", "."])
def test_every_command_refuses_its_own_input(name: str, output: str, tmp_path: Path) -> None:
    data = leave(tmp_path / "data", "data set")
    main, line = COMMANDS[name]
    words = line.replace("DATA", str(data)).replace("OUT", os.path.normpath(tmp_path / output)).split()
    with pytest.raises(InputError, match=r"^--output .* (is|lies in|contains) --"):
        main(words)
    assert sorted(os.listdir(tmp_path)) == ["data"]
    assert os.listdir(data) == ["dataset.json"]


# -- jobs.runs --------------------------------------------------------------------------------------------------------


@pytest.fixture
def there(tmp_path: Path) -> Path:
    """A data set, a run that is whole, one that is not, and an evaluation."""
    root = tmp_path / "runs"
    leave(root / "data", "data set", splits={"train": 40, "val": 8}, image_size=16)
    for name, loss, epochs in (("one", 0.5, 2), ("two", 0.25, 1)):
        run = leave(root / name, "run", training={"epochs": 2, "optim": {"learning_rate": loss}})
        rows = [{"split": "train", "epoch": epochs, "step": 4, "loss": 0.3}]
        (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        leave(run / "checkpoints" / "step-00000004", "checkpoint")
        best = {"checkpoint": "checkpoints/step-00000004", "metric": {"loss": loss}, "epochs": epochs}
        (run / "best.json").write_text(json.dumps(best))
    (root / "one" / "environment.json").write_text('{"packages": {"torch": "2.8"}, "git_commit": "abc"}')
    metrics = {"kid": {"mean": 0.125, "low": 0.1, "high": 0.2}}
    told = {"num_images": 8, "methods": {"model": {"metrics": metrics}}}
    leave(root / "evaluation", "evaluation", domains={"night": told})
    an_hour_ago = time.time() - 3600
    for path in root.rglob("*"):
        os.utime(path, (an_hour_ago, an_hour_ago))
    return root


def test_what_there_is_is_listed(there: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert runs.main(["list", str(there)]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    data, evaluation, one, two, total = lines[1:]
    assert data[:8] == ["data", "set", "complete", "48", "rows", "of", "16", "px"]
    assert evaluation[:6] == ["evaluation", "complete", "8", "images", "night", "kid"]
    assert one[:9] == ["run", "complete", "2", "of", "2", "epochs", "val", "loss", "0.5"]
    assert two[:9] == ["run", "unfinished", "1", "of", "2", "epochs", "val", "loss", "0.25"]
    assert (one[-2:], total[0]) == (["one", "checkpoints/step-00000004"], "4")


def test_two_runs_side_by_side(there: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert runs.main(["compare", str(there / "one"), str(there / "two")]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["training.optim.learning_rate", "0.5", "0.25"] in lines
    assert ["torch", "2.8", "None"] in lines
    assert ["best", "validation", "loss", "0.5", "0.25"] in lines
    with pytest.raises(InputError, match=r"^A is a run, B a data set: give two of one kind"):
        runs.main(["compare", str(there / "one"), str(there / "data")])


def test_one_folder_is_removed_and_no_other(there: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert runs.main(["remove", str(there / "one"), "--yes"]) == 0
    assert "deleted: run" in capsys.readouterr().out
    assert sorted(os.listdir(there)) == ["data", "evaluation", "two"]


def test_what_is_not_to_be_removed_stays(there: Path, tmp_path: Path) -> None:
    def refused(*words: str) -> str:
        with pytest.raises(InputError) as raised:
            runs.main(["remove", *words])
        return str(raised.value)

    assert "no folder that one of the commands has left" in refused(str(there), "--yes")
    assert "no folder that one of the commands has left" in refused(str(tmp_path / "nothing"), "--yes")
    assert "give --yes to delete it" in refused(str(there / "one"))  # nobody to ask
    (tmp_path / "link").symlink_to(there / "one")
    assert "is a link; give the folder itself" in refused(str(tmp_path / "link"), "--yes")
    shutil.copytree(there / "evaluation", there / "one" / "evaluation")
    assert "also holds an evaluation" in refused(str(there / "one"), "--yes")
    (there / "two" / "metrics.jsonl").touch()
    assert "is at work (written to 0 s ago)" in refused(str(there / "two"), "--yes")
    study = leave(there / "study", "sweep", num_trials=4)
    driver = {"host": platform.node(), "pid": os.getppid(), "renewed": time.time()}
    (study / "driver.json").write_text(json.dumps(driver))
    assert f"is at work (process {os.getppid()} on" in refused(str(study), "--yes")
    assert sorted(os.listdir(there)) == ["data", "evaluation", "one", "study", "two"]
    assert runs.main(["remove", str(there / "two"), "--yes", "--force"]) == 0
    assert sorted(os.listdir(there)) == ["data", "evaluation", "one", "study"]


def test_an_empty_place_is_told(tmp_path: Path) -> None:
    for words in (["list", str(tmp_path)], ["list", str(tmp_path / "none")]):
        with pytest.raises(InputError, match="is empty or not there"):
            runs.main(words)
    (tmp_path / "note.txt").write_text("mine")
    with pytest.raises(InputError, match="holds nothing that one of the commands has left"):
        runs.main(["list", str(tmp_path)])


def test_articles() -> None:
    assert [kinds.a(name) for name in ("run", "evaluation", "experiments")] == ["a run", "an evaluation", "experiments"]
