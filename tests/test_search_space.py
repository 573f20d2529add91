"""What --space says, and what becomes of it."""

import json
from typing import Any

import optuna
import pytest

from ddpm_core import config as configs
from ddpm_core.config import SamplingConfig
from ddpm_core.errors import InputError
from jobs.training.options import TrainOptions
from jobs.training.presets import PRESETS
from jobs.tuning import search_space as spaces
from jobs.tuning.search_space import Choices, Range


@pytest.mark.parametrize(
    ("text", "name", "wanted"),
    [
        ("optim.learning_rate=1e-5:1e-2:log", "optim.learning_rate", Range(low=1e-5, high=1e-2, log=True)),
        ("optim.learning-rate=0.1:0.2", "optim.learning_rate", Range(low=0.1, high=0.2)),
        ("optim.warmup_steps=0:500", "optim.warmup_steps", Range(low=0, high=500, integer=True)),
        ("global_batch_size=8,16", "global_batch_size", Choices(values={"8": 8, "16": 16})),
        (
            "optim.lr_schedule=constant, cosine",
            "optim.lr_schedule",
            Choices(values={"constant": "constant", "cosine": "cosine"}),
        ),
        ("flip=true,false", "flip", Choices(values={"true": True, "false": False})),
        ("max_train_images=none,100", "max_train_images", Choices(values={"none": None, "100": 100})),
        ("max_train_images=50:100", "max_train_images", Range(low=50, high=100, integer=True)),
        (
            "unet.injection=concat,concat+anchor",
            "unet.injection",
            Choices(values={"concat": ["concat"], "concat+anchor": ["concat", "anchor"]}),
        ),
        ("unet.channel_mult=1+2,1+2+2", "unet.channel_mult", Choices(values={"1+2": [1, 2], "1+2+2": [1, 2, 2]})),
        ("optim.ema_sigma_rels=0.02:0.2:log", "optim.ema_sigma_rels", Range(low=0.02, high=0.2, log=True)),
    ],
)
def test_training_options_by_their_own_types(text: str, name: str, wanted: Range | Choices) -> None:
    assert spaces.parse([text]) == ({name: wanted}, {})


def test_sampling_options_go_to_the_other_stage() -> None:
    training, sampling = spaces.parse(
        [
            "sampling.guidance-scale=1:4",
            "sampling.num_steps=5:50:log",
            "sampling.sampler=ddim,ddpm",
            "sampling.ema=0.05,0.1",
        ]
    )
    assert training == {}
    assert sampling == {
        "guidance_scale": Range(low=1.0, high=4.0),
        "num_steps": Range(low=5, high=50, log=True, integer=True),
        "sampler": Choices(values={"ddim": "ddim", "ddpm": "ddpm"}),
        "ema": Choices(values={"0.05": 0.05, "0.1": 0.1}),
    }


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("optim.learning_rate", "write NAME=LOW:HIGH"),
        ("optim.learning_rate=", "write NAME=LOW:HIGH"),
        ("optim.lerning_rate=1:2", "did you mean 'optim.learning_rate'"),
        ("lr=1:2", "unknown option"),
        ("optim=1:2", "is a group of options; name one of optim.learning_rate"),
        ("optim.learning_rate.x=1:2", "unknown option"),
        ("optim.learning_rate=fast:slow", "'fast' is not a number"),
        ("optim.learning_rate=nan:1", "'nan' is not a number"),
        ("optim.learning_rate=1e-2:1e-5:log", "low before high"),
        ("optim.learning_rate=0:1e-2:log", "positive and low before high"),
        ("optim.learning_rate=1:1", "low before high"),
        ("optim.learning_rate=1:2:lin", "LOW:HIGH:log"),
        ("optim.warmup_steps=0.5:3", "'0.5' is not a whole number"),
        ("optim.lr_schedule=constant,cosin", "did you mean 'cosine'"),
        ("optim.lr_schedule=1:2", "A,B,C for anything else"),
        ("flip=yes,no", "'yes' is not true or false"),
        ("flip=true,true", "give different values"),
        ("global_batch_size=8,,16", "give different values"),
        ("seed=0,1", "luck is not an option to tune"),
        ("epochs=2:4", "train equally long"),
        ("diffusion.prediction=eps,v", "different predictions do not compare"),
        ("diffusion.schedule=linear,cosine", "different chains do not compare"),
        ("method=diffusion,pix2pix", "run jobs.experiments"),
        ("validation_loss_config=none", "cannot be searched"),
        ("sampling.guidence_scale=1:2", "did you mean 'guidance_scale'"),
        ("sampling.guidance_interval=0:1", "unknown option"),
    ],
)
def test_what_cannot_be_searched_is_told_in_one_line(text: str, said: str) -> None:
    with pytest.raises(InputError, match=said.replace("(", r"\(")) as raised:
        spaces.parse([text])
    assert "\n" not in str(raised.value)
    assert str(raised.value).startswith("--space")


def test_a_name_given_twice_is_refused() -> None:
    with pytest.raises(InputError, match="twice"):
        spaces.parse(["flip=true,false", "flip=false"])


def test_values_reach_the_options_and_nothing_else_changes() -> None:
    base = PRESETS["smoke"].options
    values = {
        "optim.learning_rate": 0.003,
        "optim.ema_sigma_rels": 0.07,
        "unet.injection": ["concat", "anchor"],
        "max_train_images": None,
        "flip": False,
    }
    changed = spaces.applied(base, values)
    assert (changed.optim.learning_rate, changed.optim.ema_sigma_rels) == (0.003, (0.07,))
    assert (changed.unet.injection, changed.max_train_images, changed.flip) == (("concat", "anchor"), None, False)
    told = {name: json.loads(json.dumps(spaces.value_of(changed, name))) for name in values}
    assert told == {**values, "optim.ema_sigma_rels": [0.07]}
    back = spaces.applied(changed, {name: spaces.value_of(base, name) for name in values})
    assert back == base


def test_every_option_that_can_be_searched_has_a_type_that_is_understood() -> None:
    for name in spaces._leaves(TrainOptions):
        assert spaces._hint(name) is not None
        value = spaces.value_of(TrainOptions(), name)
        assert spaces.applied(TrainOptions(), {name: value}) == TrainOptions()


def test_the_hand_choice_in_optunas_words() -> None:
    base = PRESETS["smoke"].options
    space, _ = spaces.parse(
        ["optim.learning_rate=1e-5:1e-2:log", "optim.ema_sigma_rels=0.02:0.2", "unet.injection=concat,anchor"]
    )
    values = spaces.own_values(base, space)
    assert values == {"optim.learning_rate": 2e-4, "optim.ema_sigma_rels": 0.1, "unet.injection": ["concat"]}
    assert spaces.parameters(values, space) == {**values, "unet.injection": "concat"}
    outside, _ = spaces.parse(["optim.learning_rate=1e-3:1e-2:log"])
    assert spaces.parameters(spaces.own_values(base, outside), outside) is None


def test_suggestions_lie_in_the_space_and_a_trial_keeps_what_it_has() -> None:
    space, _ = spaces.parse(["optim.learning_rate=1e-5:1e-2:log", "optim.warmup_steps=0:9", "flip=true,false"])
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    seen = []
    for _ in range(30):
        trial = study.ask()
        values = spaces.suggest(trial, space)
        assert spaces.suggest(trial, space) == values
        assert 1e-5 <= values["optim.learning_rate"] <= 1e-2
        assert isinstance(values["optim.warmup_steps"], int)
        assert 0 <= values["optim.warmup_steps"] <= 9
        seen.append(values)
    assert {row["flip"] for row in seen} == {True, False}
    below = sum(row["optim.learning_rate"] < 10**-3.5 for row in seen)
    assert 8 <= below <= 22  # uniform in the logarithm: half of them


@pytest.mark.parametrize("changes", [{}, {"guidance_interval": (0.2, 0.7), "sampler": "dpm_solver", "num_steps": 7}])
def test_a_point_is_the_sampling_options_by_other_names(changes: dict[str, Any]) -> None:
    sampling = SamplingConfig(**changes)
    fields, ema = spaces.sampling_options(spaces.sampling_values(sampling, 0.1))
    assert configs.from_dict(SamplingConfig, fields) == sampling
    assert ema == 0.1


@pytest.mark.parametrize(
    "sampling",
    [SamplingConfig(), SamplingConfig(guidance_scale=7.0, num_steps=100), SamplingConfig(num_steps=2, eta=0.5)],
)
def test_the_default_space_holds_what_the_checkpoint_says(sampling: SamplingConfig) -> None:
    space = spaces.default_sampling(sampling, [0.05, 0.1], 1000)
    point = spaces.sampling_values(sampling, 0.1)
    found = spaces.parameters(point, space)
    assert found is not None
    assert found["guidance_scale"] == sampling.guidance_scale
    assert found["ema"] == "0.1"
    assert ("sampler" in space) == (not sampling.eta)  # eta is ddim's alone
    assert "ema" not in spaces.default_sampling(sampling, [0.1], 1000)


@pytest.mark.parametrize(
    ("num_steps", "num_timesteps", "low", "high"), [(8, 8, 4, 8), (1, 2, 1, 2), (5, 40, 4, 40), (100, 1000, 4, 100)]
)
def test_no_more_steps_are_tried_than_the_chain_has(num_steps: int, num_timesteps: int, low: int, high: int) -> None:
    space = spaces.default_sampling(SamplingConfig(num_steps=num_steps), [], num_timesteps)
    assert space["num_steps"].corners == [low, high]


def test_the_default_learning_rates_hold_the_presets() -> None:
    for name, preset in PRESETS.items():
        space = spaces.default_training(preset.options)
        assert spaces.parameters(spaces.own_values(preset.options, space), space) is not None, name
    assert spaces.to_json(space) == {"optim.learning_rate": {"low": 2e-5, "high": 1e-2, "log": True, "integer": False}}
