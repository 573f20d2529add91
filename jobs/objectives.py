"""What a training step does, by method: the diffusion model's denoising, or the GANs' alternating updates.

Losses are named; `loss` is the one that validation measures too:

    diffusion   the weighted loss of the prediction        (the mission's Huber)
    pix2pix     |made - target|
    cyclegan    |there and back - picture|
"""

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ddpm_core import conditioning, diffusion, encoders, gan, identity, losses, precision, schedule
from ddpm_core.config import ModelConfig
from ddpm_core.unet import UNet
from jobs import storage
from jobs.presets import TrainOptions
from jobs.samples import Batch

GAN_LOSS = {"pix2pix": "l1", "cyclegan": "cycle"}
"""The GANs' `loss`."""


class Objective(Protocol):
    """Networks, optimisers and losses of one method."""

    comparable: bool
    """Whether a lower validation loss is a better network; where not, the last one counts as the best."""

    @property
    def network(self) -> nn.Module:
        """What the EMA follows and a checkpoint keeps."""

    def distribute(self, wrap: Callable[[nn.Module], nn.Module]) -> None:
        """Ready the network for this machine and, by `wrap`, for several workers; its weights are final by now."""

    def step(self, batch: Batch, learning_rate: float, step: int) -> dict[str, Tensor]:
        """The step'th update, on this worker's share of the batch; the losses by name."""

    def validation_loss(self, network: nn.Module, batch: Batch) -> Tensor:
        """`loss` of each picture, b."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


def objective(config: ModelConfig, options: TrainOptions, device: torch.device) -> Objective:
    return (Diffusion if config.method == "diffusion" else GAN)(config, options, device)


class Diffusion:
    """The conditional diffusion model under AdamW; `identity` and `perceptual` are losses that may be added."""

    comparable = True

    def __init__(self, config: ModelConfig, options: TrainOptions, device: torch.device) -> None:
        self.config, self.options, self.device = config, options, device
        self.network = UNet(config).to(device)
        self.model: nn.Module = self.network
        self.optimizer = torch.optim.AdamW(
            self.network.parameters(), lr=0.0, betas=(0.9, 0.99), weight_decay=options.optim.weight_decay, fused=True
        )
        self.alphas_cumprod = schedule.alphas_cumprod(config.diffusion).to(device)
        self.dtype = precision.resolve(options.precision, device)
        self.weights = {"identity": options.identity_weight, "perceptual": options.perceptual_weight}
        if options.identity_encoder is not None:
            self.encoder = encoders.load_identity_encoder(options.identity_encoder, read=storage.read_bytes).to(device)

    def distribute(self, wrap: Callable[[nn.Module], nn.Module]) -> None:
        if self.options.gradient_checkpointing:
            self.network.set_gradient_checkpointing(True)
        if self.options.compile:
            self.network.compile_blocks()
        self.model = wrap(self.network)

    def step(self, batch: Batch, learning_rate: float, step: int) -> dict[str, Tensor]:
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.model.train()
        x_t, output = self._denoise(self.model, batch)
        loss = self._denoising_loss(batch, output).mean()
        added = self._added_losses(batch, x_t, output)
        self.optimizer.zero_grad(set_to_none=True)
        (loss + sum(self.weights[name] * value for name, value in added.items())).backward()
        torch.nn.utils.clip_grad_norm_(self.network.parameters(), self.options.optim.grad_clip)
        self.optimizer.step()
        return {"loss": loss.detach(), **{f"loss_{name}": value.detach() for name, value in added.items()}}

    def validation_loss(self, network: nn.Module, batch: Batch) -> Tensor:
        return self._denoising_loss(batch, self._denoise(network, batch)[1])

    def _denoise(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """x_t and what the network makes of it."""
        condition, domain = conditioning.drop(
            batch.condition, batch.domain, batch.dropped, batch.domain_dropped, len(self.config.domains)
        )
        x_t = diffusion.q_sample(batch.x_0, batch.t, batch.noise, self.alphas_cumprod)
        with precision.autocast(self.device, self.dtype):
            return x_t, model(x_t, batch.t, condition, domain)

    def _denoising_loss(self, batch: Batch, output: Tensor) -> Tensor:
        config, abar = self.config.diffusion, self.alphas_cumprod
        target = diffusion.training_target(config.prediction, batch.x_0, batch.t, batch.noise, abar)
        weight = losses.timestep_weight(config, batch.t, abar)
        return weight * losses.per_image_loss(config, output, target)

    def _added_losses(self, batch: Batch, x_t: Tensor, output: Tensor) -> dict[str, Tensor]:
        """Of the x_0 that the output implies: is it like the source, whom it should show, and like the true picture?"""
        added: dict[str, Tensor] = {}
        if not any(self.weights.values()):
            return added
        abar = self.alphas_cumprod
        x_0 = diffusion.predicted(self.config.diffusion.prediction, output.float(), x_t, batch.t, abar).x_0
        if self.weights["identity"]:
            whom = batch.x_0 if self.config.shown == "structure" else batch.condition
            of_each = identity.identity_loss(x_0, whom, self.encoder, t=batch.t, alphas_cumprod=abar)
            # where the condition was dropped, the network cannot know whom to keep
            added["identity"] = torch.where(batch.dropped, 0.0, of_each).mean()
        if self.weights["perceptual"]:
            of_each = identity.perceptual_loss(x_0, batch.x_0, self.encoder.maps, t=batch.t, alphas_cumprod=abar)
            added["perceptual"] = of_each.mean()
        return added

    def state_dict(self) -> dict[str, Any]:
        return {"model": self.network.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.network.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])


class GAN:
    """pix2pix or CycleGAN: `ddpm_core.gan.GANTrainer`, which averages over workers by itself."""

    def __init__(self, config: ModelConfig, options: TrainOptions, device: torch.device) -> None:
        self.method = config.method
        self.comparable = config.method == "pix2pix"  # CycleGAN's: a generator that copies comes back exactly
        dtype = precision.resolve(options.precision, device)
        self.trainer = gan.GANTrainer(config, device=device, dtype=dtype, seed=options.seed)
        self.network: nn.Module = self.trainer.generator

    def distribute(self, wrap: Callable[[nn.Module], nn.Module]) -> None: ...

    def step(self, batch: Batch, learning_rate: float, step: int) -> dict[str, Tensor]:
        found = self.trainer.step(batch.condition, batch.x_0, batch.domain, learning_rate=learning_rate, step=step)
        loss = found.pop(GAN_LOSS[self.method])
        return {"loss": loss, **{f"loss_{name}": value for name, value in found.items()}}

    def validation_loss(self, network: nn.Module, batch: Batch) -> Tensor:
        with precision.autocast(self.trainer.device, self.trainer.dtype):
            return gan.validation_error(network, self.method, batch.condition, batch.x_0, batch.domain)

    def state_dict(self) -> dict[str, Any]:
        return self.trainer.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.trainer.load_state_dict(state)
