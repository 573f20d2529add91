"""Training options and the presets: Python, each with what it is for, its command, time and hardware."""

import dataclasses
from typing import Literal

from ddpm_core.config import DiffusionConfig, GANConfig, Method, SamplingConfig, UNetConfig
from ddpm_core.precision import Precision
from jobs.data import Pairing


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
    """AdamW's decoupled weight decay; diffusion only."""
    grad_clip: float = 1.0
    """Largest norm of the gradient; longer ones are scaled down; diffusion only."""
    ema_sigma_rels: tuple[float, ...] = (0.05, 0.1)
    """Lengths of the EMAs as shares of the run so far (power-function EMA). All are validated and kept."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """Everything that decides what a training run computes; it is saved with the run."""

    epochs: int = 54
    """Passes over the training pictures."""
    global_batch_size: int = 64
    """Pictures in one optimiser step, over all workers."""
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
    """The diffusion model, or a GAN to compare it with: pix2pix learns from pairs, cyclegan without."""
    unet: UNetConfig = UNetConfig()
    """The network."""
    diffusion: DiffusionConfig = DiffusionConfig()
    """The forward process and the loss."""
    gan: GANConfig = GANConfig()
    """Networks and losses of the GANs."""
    sampling: SamplingConfig = SamplingConfig()
    """Sampling defaults that the checkpoint carries."""
    optim: OptimConfig = OptimConfig()
    """Optimisation."""


@dataclasses.dataclass(frozen=True)
class Preset:
    """Options with the story behind them."""

    about: str
    options: TrainOptions


_MISSION_64 = UNetConfig(model_channels=128, channel_mult=(1, 2, 2, 4), condition_channels=128, dropout=0.1)
_MISSION_128 = dataclasses.replace(_MISSION_64, channel_mult=(1, 1, 2, 2, 4))

PRESETS: dict[str, Preset] = {
    "smoke": Preset(
        "any data set, one CPU, seconds: shows that everything is wired, the pictures are noise",
        TrainOptions(
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
        "`make demo`: Earth by day to Earth by night at 32 px, two CPU cores, about five minutes",
        TrainOptions(
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
        "the baseline on the demo's data: pix2pix, two CPU cores, about five minutes",
        TrainOptions(
            method="pix2pix",
            epochs=4,
            global_batch_size=16,
            target_domain="night",
            max_val_images=128,
            optim=OptimConfig(learning_rate=2e-4, warmup_steps=50, ema_sigma_rels=(0.1,)),
        ),
    ),
    "celeba-64": Preset(
        "the mission's recipe on CelebA at 64 px (54 epochs, Huber, 20 % dropout, linear schedule); for GPUs: "
        "--num-workers 8 --use-gpu",
        TrainOptions(global_batch_size=256, unet=_MISSION_64),
    ),
    "celeba-128": Preset(
        "the same at 128 px; for GPUs",
        TrainOptions(
            global_batch_size=128,
            unet=dataclasses.replace(_MISSION_128, attn_resolutions=(128, 64, 32)),
        ),
    ),
    "day2night-64": Preset(
        "the mission's recipe on Day2Night at 64 px, paired; one GPU",
        TrainOptions(global_batch_size=64, unet=_MISSION_64),
    ),
    "day2night-128": Preset(
        "the same at 128 px; one GPU",
        TrainOptions(
            global_batch_size=32,
            unet=dataclasses.replace(_MISSION_128, attn_resolutions=(128, 64, 32)),
        ),
    ),
}
