"""What a training step does, by method: the diffusion model's denoising, or the GANs' alternating updates.

Losses are named; `loss` is the one that validation measures too:

    diffusion   the weighted loss of the prediction        (the mission's Huber)
    pix2pix     |made - target|
    cyclegan    |there and back - image|
    encoders    `jobs.training.encoders`
"""

import copy
import math
import traceback
from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from ddpm_core import checkpoint, conditioning, diffusion, encoders, gan, graphs, identity, losses, precision, schedule
from ddpm_core import config as configs
from ddpm_core.config import DiffusionConfig, Method, ModelConfig
from ddpm_core.unet import UNet
from jobs.training import distributed
from jobs.training.batches import Batch
from jobs.training.encoders import CHAIN, Encoder
from jobs.training.options import Parallel, TrainOptions

GAN_LOSS = {"pix2pix": "l1", "cyclegan": "cycle"}
"""The GANs' `loss`."""


class Objective(Protocol):
    """Networks, optimisers and losses of one method."""

    comparable: bool
    """Whether a lower validation loss is a better network; where not, the last one counts as the best."""
    num_measured: int
    """Numbers that `validation_loss` gives of an image."""

    @property
    def network(self) -> nn.Module:
        """What the EMA follows and a checkpoint keeps."""

    def distribute(self) -> None:
        """Ready the network for this machine and for several workers; its weights are loaded by now."""

    def step(self, batch: Batch, learning_rate: float, step: int) -> dict[str, Tensor]:
        """The step'th update, on this worker's share of the batch; by name the losses, whose means over the workers are
        the means over the batch."""

    def validation_loss(self, network: nn.Module, batch: Batch) -> Tensor:
        """Of each image the loss, b, or b `num_measured`: what `validated` finds it from."""

    def validated(self, measured: Tensor) -> dict[str, Tensor]:
        """From what was measured of all images, n `num_measured`: `loss`, and what else there is to know, of each."""

    def files(
        self,
        state: dict[str, Tensor],
        config: ModelConfig,
        *,
        others: Mapping[float, dict[str, Tensor]] | None = None,
    ) -> dict[str, bytes]:
        """A checkpoint as `ddpm_core.checkpoint.files`."""

    def state_dict(self) -> dict[str, Any]:
        """What training goes on from; every worker must ask for it."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Before `distribute`."""


def objective(
    config: ModelConfig, options: TrainOptions, device: torch.device, parallel: Parallel = "ddp"
) -> Objective:
    if config.method == "diffusion":
        return Diffusion(config, options, device, parallel)
    return (Encoder if config.method in configs.ENCODERS else GAN)(config, options, device)


def only_loss(measured: Tensor) -> dict[str, Tensor]:
    """`Objective.validated` where the loss is what was measured."""
    return {"loss": measured[:, 0]}


class Diffusion:
    """The conditional diffusion model under AdamW; `identity` and `perceptual` are losses that may be added."""

    looks_at = (
        *("unet.", "diffusion.", "sampling.", "accumulate", "gradient_checkpointing"),
        *("target_domain", "pairing", "optim.weight_decay", "optim.grad_clip"),
        *("identity_encoder", "identity_weight", "perceptual_weight", "init_from"),
    )
    comparable, num_measured = True, 1
    validated, files = staticmethod(only_loss), staticmethod(checkpoint.files)

    def __init__(
        self, config: ModelConfig, options: TrainOptions, device: torch.device, parallel: Parallel = "ddp"
    ) -> None:
        self.config, self.options, self.device = config, options, device
        self.sharded = parallel == "fsdp"
        self.network = UNet(config).to("cpu" if self.sharded else device)  # sharded, it may not fit on the device whole
        self.model: nn.Module = self.network
        self.optimizer = self._optimizer()
        self.alphas_cumprod = schedule.alphas_cumprod(config.diffusion).to(device)
        self.dtype = precision.resolve(options.precision, device)
        self.weights = {"identity": options.identity_weight, "perceptual": options.perceptual_weight}
        if options.identity_encoder is not None:
            self.encoder = encoders.load_identity_encoder(options.identity_encoder).to(device)

    def _optimizer(self) -> torch.optim.AdamW:
        return torch.optim.AdamW(
            self.network.parameters(),
            lr=0.0,
            betas=(0.9, 0.99),
            weight_decay=self.options.optim.weight_decay,
            fused=True,
        )

    def distribute(self) -> None:
        if self.options.gradient_checkpointing:
            self.network.set_gradient_checkpointing(True)
        if self.sharded:
            whole = self.optimizer.state_dict()
            distributed.shard(self.network, self.device)
            self.optimizer = self._optimizer()  # of this worker's parts
            distributed.load_optimizer(self.optimizer, whole)
            return
        if self.device.type == "cuda" and not self.options.gradient_checkpointing:  # which keeps a state of its own
            self.model = graphs.GraphedTraining(self.network)
        if distributed.world_size() > 1:
            import ray.train.torch  # the driver, which asks what options are looked at, needs none of it

            self.model = ray.train.torch.prepare_model(
                self.model, parallel_strategy_kwargs={"gradient_as_bucket_view": True, "broadcast_buffers": False}
            )

    def step(self, batch: Batch, learning_rate: float, step: int) -> dict[str, Tensor]:
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.model.train()
        self.optimizer.zero_grad(set_to_none=True)
        *first, last = batch.parts(self.options.accumulate)
        self._exchange_gradients(False)
        found = [self._backward(part) for part in first]
        self._exchange_gradients(True)  # once a step, with the last part's backward pass
        found.append(self._backward(last))
        torch.nn.utils.clip_grad_norm_(self.network.parameters(), self.options.optim.grad_clip)
        self.optimizer.step()
        return {name: torch.stack([losses[name] for losses in found]).sum() for name in found[0]}

    def _exchange_gradients(self, yes: bool) -> None:
        if isinstance(self.model, DistributedDataParallel):
            self.model.require_backward_grad_sync = yes
        elif isinstance(self.model, FSDPModule):
            self.model.set_requires_gradient_sync(yes)

    def _backward(self, batch: Batch) -> dict[str, Tensor]:
        """Add the gradient of one part of the step; its part of the losses by name."""
        x_t, output = self._denoise(self.model, batch)
        loss = self._denoising_loss(batch, output, self.config.diffusion)
        found = {"loss": loss, **self._added_losses(batch, x_t, output)}
        # The workers' gradients are averaged, and their shares need not be of one size.
        share = distributed.world_size() / self.options.global_batch_size
        sums = {name: of_each.sum() * share for name, of_each in found.items()}
        torch.stack([self.weights.get(name, 1.0) * value for name, value in sums.items()]).sum().backward()
        return {name if name == "loss" else f"loss_{name}": value.detach() for name, value in sums.items()}

    def what_fits(self, batch: Batch) -> str:
        """What to do about a step that was too large for the GPU's memory, as tried. The run cannot go on after it."""
        size, parts = len(batch.t), self.options.accumulate
        self.optimizer.zero_grad(set_to_none=True)
        more = "" if self.options.gradient_checkpointing else "--gradient-checkpointing, "
        if self.sharded:  # to try would take all workers
            return f"give --accumulate {2 * parts} or more, {more}or more workers"
        self.model = copy.deepcopy(self.network)  # of which the other workers hear nothing
        while parts < size:
            parts = min(2 * parts, size)
            if self._fits(batch.parts(parts)[0]):
                at_a_time = math.ceil(size / parts)
                return f"{at_a_time} at a time do: give --accumulate {parts}, {more}more workers, or --parallel fsdp"
        return f"not even one does: give {more}--parallel fsdp with more workers, or a smaller network"

    def _fits(self, part: Batch) -> bool:
        self.model.zero_grad(set_to_none=True)
        try:
            for _ in range(2):  # the second beside the first one's gradients
                self._backward(part)
        except torch.OutOfMemoryError as error:
            traceback.clear_frames(error.__traceback__)
            return False
        return True

    def validation_loss(self, network: nn.Module, batch: Batch) -> Tensor:
        output = self._denoise(network, batch)[1]
        return self._denoising_loss(batch, output, self.options.validation_loss_config or self.config.diffusion)

    def _denoise(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """x_t and what the network makes of it."""
        condition, domain = conditioning.drop(
            batch.condition, batch.domain, batch.dropped, batch.domain_dropped, len(self.config.domains)
        )
        x_t = diffusion.q_sample(batch.x_0, batch.t, batch.noise, self.alphas_cumprod)
        with precision.autocast(self.device, self.dtype):
            return x_t, model(x_t, batch.t, condition, domain)

    def _denoising_loss(self, batch: Batch, output: Tensor, config: DiffusionConfig) -> Tensor:
        abar = self.alphas_cumprod
        target = diffusion.training_target(config.prediction, batch.x_0, batch.t, batch.noise, abar)
        weight = losses.timestep_weight(config, batch.t, abar)
        return weight * losses.per_image_loss(config, output, target)

    def _added_losses(self, batch: Batch, x_t: Tensor, output: Tensor) -> dict[str, Tensor]:
        """Of each x_0 that the output implies: is it like the source, and like the true image?"""
        added: dict[str, Tensor] = {}
        if not any(self.weights.values()):
            return added
        abar = self.alphas_cumprod
        x_0 = diffusion.predicted(self.config.diffusion.prediction, output.float(), x_t, batch.t, abar).x_0
        if self.weights["identity"]:
            whom = batch.x_0 if self.config.shown == "structure" else batch.condition
            of_each = identity.identity_loss(
                x_0,
                whom,
                self.encoder,
                t=batch.t,
                alphas_cumprod=abar,
                unpaired=self.config.data.pairing == "unpaired",
            )
            # where the condition was dropped, the network cannot know whom to keep
            added["identity"] = torch.where(batch.dropped, 0.0, of_each)
        if self.weights["perceptual"]:
            maps = self.encoder.maps
            added["perceptual"] = identity.perceptual_loss(x_0, batch.x_0, maps, t=batch.t, alphas_cumprod=abar)
        return added

    def state_dict(self) -> dict[str, Any]:
        return distributed.gathered({"model": self.network.state_dict(), "optimizer": self.optimizer.state_dict()})

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.network.load_state_dict(state["model"])
        distributed.load_optimizer(self.optimizer, state["optimizer"])


class GAN:
    """pix2pix or CycleGAN: `ddpm_core.gan.GANTrainer`, which averages over workers by itself."""

    looks_at = ("gan.", "target_domain", "pairing")
    num_measured = 1
    validated, files = staticmethod(only_loss), staticmethod(checkpoint.files)

    def __init__(self, config: ModelConfig, options: TrainOptions, device: torch.device) -> None:
        self.method = config.method
        self.comparable = config.method == "pix2pix"  # CycleGAN's: a generator that copies comes back exactly
        dtype = precision.resolve(options.precision, device)
        self.trainer = gan.GANTrainer(config, device=device, dtype=dtype, seed=options.seed)
        self.network: nn.Module = self.trainer.generator

    def distribute(self) -> None: ...

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


LOOKS_AT: dict[Method, tuple[str, ...]] = {
    "diffusion": Diffusion.looks_at,
    **dict.fromkeys(configs.GANS, GAN.looks_at),
    **Encoder.looks_at,
}
"""Options that not every method looks at, by how their dotted names begin."""


def has_effect(name: str, options: TrainOptions) -> bool:
    """Whether the method of `options` looks at the option of this dotted name; the longest beginning decides."""
    if options.encoder.noise_aware and name in CHAIN:
        return True
    by_length: dict[int, set[Method]] = {}
    for method, beginnings in LOOKS_AT.items():
        for beginning in filter(name.startswith, beginnings):
            by_length.setdefault(len(beginning), set()).add(method)
    return not by_length or options.method in by_length[max(by_length)]
