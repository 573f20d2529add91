"""Training options and the presets: Python, each with what it is for, its command, time and hardware."""

import dataclasses
from typing import Any, TypeVar

import tyro

from ddpm_core import config as configs
from ddpm_core.config import (
    DiffusionConfig,
    GANConfig,
    SamplingConfig,
    UNetConfig,
)
from ddpm_core.errors import InputError
from jobs.common import cli
from jobs.training.networks import MISSION_64, MISSION_128
from jobs.training.options import OptimConfig, TrainArgs, TrainOptions


@dataclasses.dataclass(frozen=True, kw_only=True)
class Preset:
    """Options with the story behind them."""

    about: str
    command: str = "--num-workers 1"
    """What to give beside --preset, --data and --output."""
    time: str
    """How long it takes, and on what."""
    memory: str = ""
    """Of a GPU, where one is needed."""
    expect: str
    """What comes out."""
    options: TrainOptions

    def __str__(self) -> str:
        """For `--help`."""
        return "\n      ".join(filter(None, (self.about, self.command, self.time, self.memory, self.expect)))


_ENCODER = TrainOptions(
    max_shift=4,
    max_val_images=1024,
    optim=OptimConfig(learning_rate=1e-3, lr_schedule="cosine", warmup_steps=50, weight_decay=0.05),
)
_OF_AN_H100 = "{} hours of one H100 by {} images/s measured there"
_MEMORY_64 = "1.1 GiB of a GPU and 0.09 for each image of its share (measured on an H100)"
_MEMORY_128 = "1.2 GiB of a GPU and 0.29 for each image of its share (measured on an H100)"
_NOT_RUN = "not run yet at full length"
_TWO_FOLDERS = TrainOptions(
    global_batch_size=32,
    max_val_images=256,
    unet=UNetConfig(
        channel_mult=(1, 2, 2),
        num_res_blocks=1,
        attn_resolutions=(16, 8),
        condition_channels=48,
        source_mask=True,
        patch_size=2,
    ),
    diffusion=DiffusionConfig(prediction="x_0", p_uncond=0.1, p_uncond_domain=0.15),
    optim=OptimConfig(learning_rate=1e-3, lr_schedule="cosine", warmup_steps=50, ema_sigma_rels=(0.1,)),
)
"""Of a prior and of its student, which is the same network; at 32 px."""

PRESETS: dict[str, Preset] = {
    "smoke": Preset(
        about="shows that everything is wired, on any data set",
        time="one CPU core: seconds",
        expect="noise",
        options=TrainOptions(
            epochs=2,
            global_batch_size=16,
            max_train_images=64,
            max_val_images=16,
            unet=UNetConfig(
                model_channels=32,
                channel_mult=(1, 2),
                num_res_blocks=1,
                attn_resolutions=(32, 16, 8),
                condition_channels=32,
                patch_size=2,
            ),
            gan=GANConfig(channels=8, num_levels=3, num_res_blocks=1, num_discriminator_levels=1),
            sampling=SamplingConfig(num_steps=4),
            optim=OptimConfig(warmup_steps=2, ema_sigma_rels=(0.1,)),
        ),
    ),
    "demo": Preset(
        about="what `make demo` trains: Earth by day to Earth by night at 32 px",
        command="--num-workers 2",
        time="two CPU cores: about three minutes (reckoned)",
        expect="KID 0.09 to 0.12 on held-out tiles, by seed (a linear colour map: 0.21)",
        options=TrainOptions(
            epochs=2,
            global_batch_size=16,
            target_domain="night",
            max_val_images=128,
            # No attention on maps of 32 and 16 px, and few channels there: twice as many images a second (docs/log.md).
            unet=UNetConfig(
                model_channels=32,
                channel_mult=(1, 2, 4),
                num_res_blocks=1,
                attn_resolutions=(),
                condition_channels=32,
            ),
            # A chain of as many steps as sampling takes: nothing is learned of noise that sampling never meets. In so
            # few steps, predicting the clean image gets the colours right long before predicting noise does; the
            # weighting makes up for the fine detail that it would neglect (docs/log.md).
            diffusion=DiffusionConfig(
                num_timesteps=8,
                schedule="cosine",
                prediction="x_0",
                loss_weighting="snr",
                max_snr=100.0,
                p_uncond=0.1,
            ),
            # 12 network evaluations an image: the four least noisy steps are guided.
            sampling=SamplingConfig(num_steps=8, guidance_scale=2.4, guidance_interval=(0.065, 0.58)),
            optim=OptimConfig(learning_rate=1e-3, lr_schedule="cosine", warmup_steps=50, ema_sigma_rels=(0.1,)),
        ),
    ),
    "demo-pix2pix": Preset(
        about="the baseline on the demo's data: pix2pix",
        command="--num-workers 2",
        time="two CPU cores: five minutes",
        expect=_NOT_RUN,
        options=TrainOptions(
            method="pix2pix",
            epochs=4,
            global_batch_size=16,
            target_domain="night",
            max_val_images=128,
            optim=OptimConfig(learning_rate=2e-4, warmup_steps=50, ema_sigma_rels=(0.1,)),
        ),
    ),
    "prior": Preset(
        about="two folders, no pairs: a prior of both sides, with which images are edited (--sampling.start flowedit)",
        command="--num-workers 2",
        time="two CPU cores: about five minutes for 3,200 drawn portraits (10 minutes of one core)",
        expect="what the sides differ in changes, the rest stays: flips 96 and 90 %, the person found 100 %",
        options=dataclasses.replace(
            _TWO_FOLDERS,
            pairing="none",
            epochs=16,
            sampling=SamplingConfig(num_steps=10, guidance_scale=3.0, start="flowedit", strength=0.7),
        ),
    ),
    "student": Preset(
        about="then: learns to draw from the pairs that a prior made (jobs.prepare pairs, --init-from the prior)",
        command="--num-workers 2",
        time="two CPU cores: about four minutes for 1,500 pairs (8 minutes of one core)",
        expect="less noise than the prior's edits: KID 0.15 for 0.19, flips 95 and 90 %, the person found 100 %",
        options=dataclasses.replace(
            _TWO_FOLDERS,
            epochs=10,
            sampling=SamplingConfig(num_steps=10, guidance_scale=1.0, domain_guidance_scale=3.0),
            optim=dataclasses.replace(_TWO_FOLDERS.optim, learning_rate=7e-4),
        ),
    ),
    "identity-encoder": Preset(
        about="an encoder that tells people apart, from several images of each",
        time="one CPU core: four minutes for 8,000 drawn people at 32 px, three images of each, 3 epochs",
        expect="rank-1 among 400 others at another moment 0.60 (of 512 people: 0.48; pixels: 0.04)",
        options=dataclasses.replace(_ENCODER, method="identity", epochs=20),
    ),
    "attribute-classifier": Preset(
        about="a classifier of the domain, and of --encoder.attributes",
        time="one CPU core: 34 s for 799 faces of CelebA",
        expect="accuracy on held-out faces 0.83 (male), 0.84 (Smiling)",
        options=dataclasses.replace(_ENCODER, method="attributes", epochs=10),
    ),
    "celeba-64": Preset(
        about="CelebA at 64 px, 54 epochs, Huber loss, 20 % condition dropout, linear schedule",
        command="--num-workers 8 --use-gpu --cpus-per-worker 4",
        time=_OF_AN_H100.format("1.5", "1,680"),
        memory=f"{_MEMORY_64}: 32 take 4, 256 take 24",
        expect=_NOT_RUN,
        options=TrainOptions(global_batch_size=256, unet=MISSION_64),
    ),
    "celeba-128": Preset(
        about="the same recipe at 128 px",
        command="--num-workers 8 --use-gpu --cpus-per-worker 4",
        time=_OF_AN_H100.format("4", "640"),
        memory=f"{_MEMORY_128}: 16 take 6, 128 take 38",
        expect=_NOT_RUN,
        options=TrainOptions(global_batch_size=128, unet=MISSION_128),
    ),
    "day2night-64": Preset(
        about="the same recipe on 18,000 pairs of Day2Night at 64 px",
        command="--num-workers 1 --use-gpu --cpus-per-worker 4",
        time="0.2 hours of one H100 (reckoned from celeba-64's 1,680 images/s)",
        memory=f"{_MEMORY_64}: 64 take 7",
        expect=_NOT_RUN,
        options=TrainOptions(global_batch_size=64, unet=MISSION_64),
    ),
    "day2night-128": Preset(
        about="the same recipe at 128 px",
        command="--num-workers 1 --use-gpu --cpus-per-worker 4",
        time="0.5 hours of one H100 (reckoned from celeba-128's 640 images/s)",
        memory=f"{_MEMORY_128}: 32 take 11",
        expect=_NOT_RUN,
        options=TrainOptions(global_batch_size=32, unet=MISSION_128),
    ),
}

T = TypeVar("T")


def parse_from_preset(cls: type[T], argv: list[str], *, prog: str, description: str) -> T:
    """The preset first, then the flags that change it; `cls` has data, output, preset, options and given, as
    `TrainArgs`."""
    name = preset_name(argv)
    presets = "\n".join(f"  {key:<20} {preset}" for key, preset in PRESETS.items())
    given = {word.partition("=")[0].replace("_", "-") for word in argv if word.startswith("--")}
    fields: Any = {"data": tyro.MISSING, "output": tyro.MISSING, "preset": name, "given": tuple(sorted(given))}
    fields["options"] = PRESETS[name].options
    return cli.parse(cls, argv, prog=prog, description=f"{description}\npresets:\n{presets}", default=cls(**fields))


def preset_name(argv: list[str]) -> str:
    name = TrainArgs.preset
    for flag, value in zip(argv, [*argv[1:], ""], strict=False):
        if flag == "--preset":
            name = value
        elif flag.startswith("--preset="):
            name = flag.removeprefix("--preset=")
    if name not in PRESETS:
        raise InputError(f"--preset {name}{configs.did_you_mean(name, PRESETS)}: {', '.join(PRESETS)}")
    return name
