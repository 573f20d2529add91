"""The mission's plan: every command can be parsed, every claim and figure speaks of rows that are there."""

import pytest

from ddpm_core import config as configs
from ddpm_core.config import ModelConfig
from ddpm_core.errors import InputError
from jobs import experiments, train
from jobs.common import cli
from jobs.datasets.options import Command as Prepare
from jobs.evaluation.plan import EvaluateArgs
from jobs.suite import mission
from jobs.suite.plan import Command, Plan, argv, ordered
from jobs.translation.options import TranslateArgs

SIZES = list(mission.SIZES)


def plan(size: str = "smoke", **more: object) -> Plan:
    given = {"celeba": "/faces", "snapshots": "/photos", "judges": "/nets", **more}
    return mission.mission(size=size, **given)


def without_seed(command: Command) -> tuple[str, ...]:
    """Seeds and folders make no difference to what is allowed."""
    return tuple("0" if word.isdigit() else word.split("/seed-")[0] for word in command.argv)


@pytest.mark.parametrize("size", ["smoke", *(pytest.param(each, marks=pytest.mark.slow) for each in ("cpu", "gpu"))])
def test_every_command_is_one_that_a_user_could_type(size: str) -> None:
    distinct = {(each.module, without_seed(each)): each for each in plan(size).commands if "{out}" in each.argv}
    for command in distinct.values():
        words = argv(command, "/suite")
        if command.module == "jobs.train":
            args = train.parse(words)
            assert args.num_workers == "0"
            if command.key.startswith("runs/"):
                options = args.options
                config = ModelConfig(unet=options.unet, diffusion=options.diffusion, method=options.method)
                configs.check(config)
        elif command.module == "jobs.evaluate":
            assert cli.parse(EvaluateArgs, words, prog="jobs.evaluate").num_workers == 0
        elif command.module == "jobs.translate":
            args = cli.parse(TranslateArgs, words, prog="jobs.translate")
            assert (args.framing.align in ("auto", "none"), args.framing.output_size) == (True, "model")
            assert args.num_workers == 0
        else:
            assert command.module == "jobs.prepare"
            args = cli.parse(Prepare, words, prog="jobs.prepare")
            assert (args.output, args.num_workers) == (f"/suite/{command.key}", 0)
    assert len(distinct) > 40


@pytest.mark.parametrize("size", SIZES)
def test_claims_and_figures_speak_of_rows_that_are_there(size: str) -> None:
    found = plan(size)
    keys = {command.key for command in ordered(found.commands)}  # no key twice, nothing that waits for itself
    assert [section.key for section in found.sections] == list(mission.SECTIONS)
    for section in found.sections:
        names = [row.name for row in section.rows]
        assert len(set(names)) == len(names)
        assert {key for row in section.rows for key in row.evaluations} <= keys
        for claim in section.claims:
            assert claim.ours in names
            assert claim.theirs is None or claim.theirs in names
            assert claim.metric in section.metrics
            assert (claim.theirs is None) == (claim.kind == "at_least")
            assert (claim.threshold is not None) == (claim.kind in ("at_least", "not_worse_by"))
        for figure in section.figures:
            assert {*figure.rows} <= {*names}
            assert {*figure.runs, *figure.translations} <= keys
            assert figure.y in ("", *section.metrics)
            assert len(figure.groups) in (0, len(names))


def test_headline_rows_have_as_many_trainings_as_seeds() -> None:
    for seeds in (1, 3):
        found = plan(seeds=seeds)
        for section in found.sections[:4]:
            for claim in section.claims[:3]:
                (row,) = [row for row in section.rows if row.name == claim.ours]
                assert len(row.evaluations) == seeds


def test_judges_are_of_people_that_no_model_was_trained_on() -> None:
    commands = {command.key: command for command in plan().commands}
    for key in ("encoders/judge-identity", "encoders/judge-portraits"):
        assert "{data/people}" in commands[key].argv
    drawn = [commands[f"data/{name}"].argv for name in ("portraits", "people")]
    assert drawn[0][drawn[0].index("--seed") + 1] != drawn[1][drawn[1].index("--seed") + 1]
    trained = [key for key, command in commands.items() if key.startswith("runs/") and "{data/people}" in command.argv]
    assert not trained


def test_only_what_sections_need_is_in_the_plan() -> None:
    only = plan(sections=("day2night",))
    assert [section.key for section in only.sections] == ["day2night"]
    assert not [command.key for command in only.commands if "portraits" in command.key]
    everything = {command.key: command for command in plan().commands}
    assert all(everything[command.key] == command for command in only.commands)
    bare = mission.mission(size="smoke")
    assert "stress" not in [section.key for section in bare.sections]
    assert not [command.key for command in bare.commands if "faces" in command.key]


def test_wrong_sections_are_told() -> None:
    with pytest.raises(InputError, match=r"--sections guidence \(did you mean 'guidance'\?\)"):
        mission.mission(size="smoke", sections=("guidence",))
    with pytest.raises(InputError, match="stress needs your own photographs; give --snapshots"):
        experiments.main(["--output", "/nowhere", "--sections", "stress", "--dry-run"])
