"""Every command whose disk fills up, or that is told to end, at any of its writes: one line, and the same goes on."""

import errno
import importlib
import os
import signal
import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jobs.common import cli

COMMANDS = {
    "prepare": "folders --source {images} --output {output} --image-size 16",
    "train": "--preset smoke --data {data} --output {output} --epochs 1",
    "translate": "--checkpoint {checkpoint} --input {images}/day --output {output} --domain night",
    "evaluate": "--checkpoint {checkpoint} --data {data} --output {output} --domain night --num-diverse 0",
    "sweep": "--checkpoint {checkpoint} --data {data} --output {output} --num-points 2 --num-images 4",
}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, random = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for number in range(24):
        file = folder / ("day", "night")[number % 2] / f"{number}.png"
        file.parent.mkdir(exist_ok=True)
        Image.fromarray(random.integers(0, 255, (16, 16, 3), np.uint8)).save(file)
    return folder


def exit_code(name: str, argv: list[str]) -> int:
    with pytest.raises(SystemExit) as stop:
        cli.run(lambda: importlib.import_module(f"jobs.{name}").main(argv))
    assert isinstance(stop.value.code, int)
    return stop.value.code


class Writes:
    """Each file that is written whole comes by here (`os.fsync`); at the `turn`th of the main thread it happens."""

    def __init__(self, turn: int, fault: str) -> None:
        self.turn, self.fault, self.count, self.fsync = turn, fault, 0, os.fsync

    def __call__(self, descriptor: int) -> None:
        self.count += threading.current_thread() is threading.main_thread()
        if self.count == self.turn and self.fault == "SIGTERM":
            self.fault = ""
            signal.raise_signal(signal.SIGTERM)
        elif self.count >= self.turn and self.fault == "full":
            raise OSError(errno.ENOSPC, "No space left on device")
        self.fsync(descriptor)


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_that_is_cut_short_says_so_and_goes_on(
    name: str,
    images: Path,
    dataset_folder: str,
    checkpoint_folder: str,
    signals: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    output = tmp_path / "out"
    places = {"images": images, "data": dataset_folder, "checkpoint": checkpoint_folder, "output": output}
    argv = [*COMMANDS[name].format_map(places).split(), "--num-workers", "0"]

    def cut_short(fault: str, turn: int) -> tuple[int, str]:
        """Exit code and the last line."""
        with monkeypatch.context() as patch:
            writes = Writes(turn, fault)
            patch.setattr(os, "fsync", writes)
            code = exit_code(name, argv)
        said = capfd.readouterr().err
        assert writes.count >= turn
        assert "Traceback" not in said
        assert not list(output.rglob("*.tmp"))
        return code, said.strip().splitlines()[-1]

    code, line = cut_short("full", 3)
    assert code == cli.WRONG_INPUT
    assert line.startswith((f"error: {output}/", f"error: --output {output}"))
    assert line.endswith(": no space left on the device; free some or write elsewhere")
    assert cut_short("SIGTERM", 2) == (143, "stopped by SIGTERM; the same command goes on from here")
    assert exit_code(name, argv) == cli.DONE
