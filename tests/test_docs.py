"""What the documents say is there: commands, options, files, links and the tree."""

import importlib
import json
import re
from pathlib import Path
from typing import Any

import command_lines
import numpy as np
import pytest
from conftest import ROOT
from PIL import Image

from ddpm_core.errors import InputError
from jobs.benchmarks import full_size

README = ROOT / "README.md"
DOCS = [README, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "cluster" / "README.md"]
TODAY = [path for path in DOCS if path.name != "log.md"]
"""What must name the options of today; the log may name those that went."""
SUBCOMMANDS = {
    "prepare": ("earth", "celeba", "day2night", "folders", "rendered", "pairs", "inspect"),
    "evaluate": ("compare",),
    "runs": ("list", "compare", "remove"),
    "benchmark": ("network", "data", "size", "train", "validation", "sweep", "gpu", "full-size", "translate"),
}
FOREIGN_FLAGS = {
    "--working-dir",
    "--runtime-env-json",
    "--address",
    "--logdir",
    "--generate",
    "--data-binary",
    "--from-literal",
}
"""Options of ray, tensorboard, curl and kubectl."""


def commands() -> list[str]:
    return sorted({command for path in DOCS for command in command_lines.in_markdown(path.read_text())})


@pytest.mark.parametrize("command", commands())
def test_commands_are_accepted_by_their_own_parsers(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    command_lines.check(command, monkeypatch)


def test_every_command_is_documented() -> None:
    found = {match[1] for command in commands() if (match := re.search(r"-m jobs\.(\w+)", command))}
    assert found == {path.stem for path in (ROOT / "jobs").glob("*.py")} - {"__init__"}


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("```bash\npython -m jobs.train --data D \\\n    --output O --presett demo\n```\n", "--presett"),
        ("as in `python -m jobs.evaluate compare\nA B --num-imagez 3`.", "--num-imagez"),
        ("`ray job submit --working-dir . -- python -m jobs.sweep --data D --output O --num-trails 3`", "num-trails"),
        ("`serve run serve.app:build_app checkpoint=runs/mine max_batch=3`", "max_batch"),
    ],
)
def test_that_check_sees_a_typo(text: str, wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (command,) = command_lines.in_markdown(text)
    with pytest.raises(InputError, match=wrong):
        command_lines.check(command, monkeypatch)


def test_that_check_sees_a_target_that_make_does_not_know(monkeypatch: pytest.MonkeyPatch) -> None:
    command_lines.check("make PYTHON=python3.12 demo", monkeypatch)
    with pytest.raises(AssertionError):
        command_lines.check("make demonstration", monkeypatch)


def options(capsys: pytest.CaptureFixture[str]) -> set[str]:
    """Every option of every command, from their --help."""
    found: set[str] = set()
    for path in (ROOT / "jobs").glob("[a-z]*.py"):
        main = importlib.import_module(f"jobs.{path.stem}").main
        for words in ([], *([word] for word in SUBCOMMANDS.get(path.stem, ()))):
            with pytest.raises(SystemExit):
                main([*words, "--help"])
            found |= set(re.findall(r"--[a-z][\w.-]*\w", capsys.readouterr().out))
    return {option.replace("_", "-") for option in found}


def test_options_that_are_named_exist(capsys: pytest.CaptureFixture[str]) -> None:
    known = options(capsys) | FOREIGN_FLAGS
    for path in TODAY:
        spans = command_lines.CODE.findall(command_lines.FENCE.sub("", path.read_text()))
        named = {flag for span in spans for flag in re.findall(r"(?<![\w-])--[a-z][\w.-]*\w", span)}
        assert named <= known, path.name


@pytest.mark.parametrize("path", DOCS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_images_and_named_files_are_there(path: Path) -> None:
    text = command_lines.FENCE.sub("", path.read_text())
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        target, _, anchor = link.partition("#")
        if target.startswith("http"):
            continue
        there = (path.parent / target).resolve() if target else path
        assert there.exists(), link
        if anchor:
            assert anchor in anchors(there), link
    for span in command_lines.CODE.findall(text):
        if re.fullmatch(r"(ddpm_core|jobs|serve|cluster|tests|docs)/[\w./-]*", span):
            assert (ROOT / span).exists(), span


def anchors(path: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", command_lines.FENCE.sub("", path.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


def test_the_readme_is_short_and_leads_to_every_document() -> None:
    text = README.read_text()
    assert len(text.encode()) <= 8 * 1024
    for path in DOCS[1:]:
        assert f"]({path.relative_to(ROOT).as_posix()}" in text, path.name


def test_the_first_image_shows_real_scenes_and_their_truth() -> None:
    shown, side, step = np.asarray(Image.open(ROOT / "docs" / "first.png"), np.int16), 256, 260
    for i in range(full_size.NUM_SHOWN):
        rows = [shown[row * step :, i * step :][:side, :side] for row in range(3)]
        day, night = full_size.pair("landscapes", full_size.Options(), i, side)
        for row, right in ((rows[0], day), (rows[2], night)):
            assert np.abs(row - np.asarray(right)).max() <= 2
        assert np.abs(rows[1] - rows[2]).mean() < np.abs(rows[0] - rows[2]).mean() / 3  # what the network made


def test_the_notebook_runs(checkpoint_folder: str, dataset_folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    notebook = json.loads((ROOT / "docs" / "tour.ipynb").read_text())
    monkeypatch.setenv("TOUR_CHECKPOINT", checkpoint_folder)
    monkeypatch.setenv("TOUR_DATA", dataset_folder)
    found: dict[str, Any] = {}
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            assert cell["outputs"] == []
            exec("".join(cell["source"]), found)
    assert found["results"].shape == found["sources"].shape == (6, 16, 16, 3)
    assert len({made.tobytes() for made in found["by_weight"]}) == len(found["WEIGHTS"])


def test_the_tree_is_the_real_one() -> None:
    assert tree_in_readme() == folders(ROOT)


def tree_in_readme() -> set[str]:
    """Folders of the README's tree: names that end with a slash, a deeper one indented below its parent."""
    block = README.read_text().split("## The tree", 1)[1].split("```")[1]
    found, parent = set(), ""
    for line in block.splitlines():
        if match := re.match(r"( *)([\w]+)/", line):
            parent = parent if match[1] else match[2]
            found.add(f"{parent}/{match[2]}" if match[1] else match[2])
    return found


def folders(root: Path) -> set[str]:
    """Folders of the repository and of `jobs`, without what git ignores."""
    ignored = {line.strip("/") for line in (root / ".gitignore").read_text().splitlines()}

    def below(folder: Path) -> set[str]:
        names = {path.name for path in folder.iterdir() if path.is_dir()}
        return {name for name in names if name[0] not in "._" and not name.endswith(".egg-info")} - ignored

    return below(root) | {f"jobs/{name}" for name in below(root / "jobs")}
