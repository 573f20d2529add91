"""Training options and the presets: Python, each with what it is for, its command, time and hardware."""

import dataclasses
from typing import Annotated, Literal

import tyro

from ddpm_core.config import DiffusionConfig, EncoderOptions, GANConfig, Method, SamplingConfig, UNetConfig
from ddpm_core.precision import Precision
from jobs.data import Pairing

Parallel = Literal["ddp", "fsdp"]
"""Workers with a copy of the network each, or with a part of it each."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """Optimisation."""

    learning_rate: float = 2e-4
    """Peak learning rate of AdamW, or of the GANs' Adam, which wants 2e-4."""
    lr_schedule: Literal["constant", "cosine"] = "constant"
    """After the warm-up: constant, or a cosine down to zero at the last step."""
    warmup_steps: int = 200
    """Steps over which the learning rate rises from zero."""
    weight_decay: float = 0.0
    """AdamW's decoupled weight decay; the GANs have none."""
    grad_clip: float = 1.0
    """Largest norm of the gradient; longer ones are scaled down, but not the GANs'."""
    ema_sigma_rels: tuple[float, ...] = (0.05, 0.1)
    """Lengths of the EMAs as shares of the run so far (power-function EMA). All are validated and kept."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """Everything that decides what a training run computes; it is saved with the run."""

    epochs: int = 54
    """Passes over the training pictures."""
    global_batch_size: int = 64
    """Pictures in one optimiser step, over all workers."""
    accumulate: int = 1
    """Parts that a worker takes its share of a step in, one after the other: large batches in less memory."""
    seed: int = 0
    """Order of samples, noise, timesteps, dropout and initial weights are functions of it."""
    target_domain: str | None = None
    """Train this direction only; without it one network learns every direction."""
    pairing: Pairing | None = None
    """What the network is shown beside x_0, as the data set was prepared unless given. paired, matched: the
    counterpart. unpaired: any picture of another side. self: the structure of the very picture it is to make."""
    flip: bool = True
    """Mirror source and target together, half of the time."""
    max_shift: int = 0
    """Move source and target together by up to this many pixels each way, edges mirrored."""
    max_train_images: int | None = None
    """Use only this many training rows, spread evenly over the ids: of folders, which sort by domain, some of each."""
    max_val_images: int = 512
    """Validate on at most this many rows, spread evenly over the split."""
    validate_every_epochs: int = 1
    """Validate and write a checkpoint after every so many epochs, and after the last."""
    precision: Precision = "auto"
    """Arithmetic of the network: auto takes bf16 where the hardware has it."""
    gradient_checkpointing: bool = False
    """Compute activations again instead of keeping them: large pictures in less memory, for one more forward pass."""
    compile: bool = False
    """torch.compile the network's repeated blocks."""
    identity_encoder: str | None = None
    """Checkpoint of an encoder, local or s3://, that says how alike two pictures are to the losses below."""
    identity_weight: float = 0.0
    """Weight of the loss that keeps who is in the source, by the encoder's embedding."""
    perceptual_weight: float = 0.0
    """Weight of the loss that keeps what the source looks like, by the encoder's feature maps."""
    method: Method = "diffusion"
    """The diffusion model, or a GAN to compare it with: pix2pix learns from pairs, cyclegan without. Or an encoder:
    identity tells people apart, attributes says what a picture shows."""
    unet: UNetConfig = UNetConfig()
    """The network."""
    diffusion: DiffusionConfig = DiffusionConfig()
    """The forward process and the loss."""
    gan: GANConfig = GANConfig()
    """Networks and losses of the GANs."""
    encoder: EncoderOptions = EncoderOptions()
    """An encoder and its loss."""
    sampling: SamplingConfig = SamplingConfig()
    """Sampling defaults that the checkpoint carries."""
    optim: OptimConfig = OptimConfig()
    """Optimisation."""
    measured_by: Annotated[DiffusionConfig | None, tyro.conf.Suppress] = None
    """Whose loss validation measures, where it is not `diffusion`'s own: trials of a sweep over the loss must be
    compared by one."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Preset:
    """Options with the story behind them."""

    about: str
    command: str = "--num-workers 1"
    """What to give beside --preset, --data and --output."""
    time: str
    """How long it takes, and on what."""
    expect: str
    """What comes out."""
    options: TrainOptions

    def __str__(self) -> str:
        """For `--help`."""
        return "\n      ".join((self.about, self.command, self.time, self.expect))


_MISSION_64 = UNetConfig(model_channels=128, channel_mult=(1, 2, 2, 4), condition_channels=128)
_MISSION_128 = dataclasses.replace(_MISSION_64, channel_mult=(1, 1, 2, 2, 4))

_ENCODER = TrainOptions(
    max_shift=4,
    max_val_images=1024,
    optim=OptimConfig(learning_rate=1e-3, lr_schedule="cosine", warmup_steps=50, weight_decay=0.05),
)
_RECKONED = "{} hours of one H200, reckoned from its peak"
"""137 GFLOP a picture of 64 px and 355 of 128 px, at a fifth to two fifths of 790 TFLOP/s in bf16."""
_NOT_RUN = "not run yet at full length"

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
        time="two CPU cores: five minutes",
        expect="KID 0.11 to 0.15 on 345 held-out tiles (a linear colour map: 0.21)",
        options=TrainOptions(
            epochs=4,
            global_batch_size=16,
            target_domain="night",
            max_val_images=128,
            unet=UNetConfig(
                model_channels=48,
                channel_mult=(1, 2, 2),
                num_res_blocks=1,
                attn_resolutions=(32, 16),
                head_channels=24,
                condition_channels=48,
            ),
            # In so few steps, predicting the clean picture gets the colours right long before predicting noise does;
            # the weighting makes up for the fine detail that it would neglect (docs/log.md).
            diffusion=DiffusionConfig(prediction="x_0", loss_weighting="snr", max_snr=100.0),
            sampling=SamplingConfig(num_steps=25, guidance_scale=1.0),
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
    "identity-encoder": Preset(
        about="an encoder that tells people apart, from several pictures of each",
        time="one CPU core: 7 s for 26 people of AT&T at 32 px, 15 epochs of a narrower network",
        expect="rank-1 of ten other people 0.86 (pixels: 0.66); of thousands of people it learns little yet",
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
        time=_RECKONED.format("1 to 2"),
        expect=_NOT_RUN,
        options=TrainOptions(global_batch_size=256, unet=_MISSION_64),
    ),
    "celeba-128": Preset(
        about="the same recipe at 128 px",
        command="--num-workers 8 --use-gpu --cpus-per-worker 4",
        time=_RECKONED.format("3 to 5"),
        expect=_NOT_RUN,
        options=TrainOptions(
            global_batch_size=128,
            unet=dataclasses.replace(_MISSION_128, attn_resolutions=(128, 64, 32)),
        ),
    ),
    "day2night-64": Preset(
        about="the same recipe on 18,000 pairs of Day2Night at 64 px",
        command="--num-workers 1 --use-gpu --cpus-per-worker 4",
        time=_RECKONED.format("1/4"),
        expect=_NOT_RUN,
        options=TrainOptions(global_batch_size=64, unet=_MISSION_64),
    ),
    "day2night-128": Preset(
        about="the same recipe at 128 px",
        command="--num-workers 1 --use-gpu --cpus-per-worker 4",
        time=_RECKONED.format("1/2"),
        expect=_NOT_RUN,
        options=TrainOptions(
            global_batch_size=32,
            unet=dataclasses.replace(_MISSION_128, attn_resolutions=(128, 64, 32)),
        ),
    ),
}
