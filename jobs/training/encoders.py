"""Training of encoders (`ddpm_core.encoders`) by `jobs.train`: what a step does, and what data must be like for it."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from ddpm_core import config as configs
from ddpm_core import diffusion, encoders, precision, schedule
from ddpm_core.config import EncoderOptions, Method, ModelConfig, domain_attributes
from ddpm_core.errors import InputError
from jobs.datasets import cache
from jobs.datasets.cache import Labels
from jobs.datasets.format import DatasetCard
from jobs.training import distributed
from jobs.training.batches import Batch, EncoderTargets, has_counterparts, training_rows
from jobs.training.options import TrainOptions

ALL = ("all",)
"""`--encoder.attributes all`."""


BOTH = ("encoder.", "optim.weight_decay", "optim.grad_clip")
CHAIN = ("diffusion.num_timesteps", "diffusion.schedule", "diffusion.zero_terminal_snr")
"""What a noise-aware classifier has in common with the model that it guides."""


class Encoder:
    """An identity encoder or an attribute classifier under AdamW."""

    looks_at: ClassVar[dict[Method, tuple[str, ...]]] = {
        "identity": (*BOTH, "encoder.embedding_channels", "encoder.scale", "encoder.margin"),
        "attributes": (*BOTH, "encoder.attributes", "encoder.noise_aware"),
    }
    comparable = True

    def __init__(self, config: ModelConfig, options: TrainOptions, device: torch.device) -> None:
        self.config, self.options, self.device = config, options, device
        self.task = encoders.task(config).to(device)
        self.network: nn.Module = self.task.network
        self.model: nn.Module = self.task
        weights = [*self.task.parameters()]
        decay = options.optim.weight_decay
        groups = [  # biases and the norms' gains have nothing to be kept small for
            {"params": [each for each in weights if each.ndim > 1], "weight_decay": decay},
            {"params": [each for each in weights if each.ndim <= 1], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=0.0, fused=True)
        self.alphas_cumprod = schedule.alphas_cumprod(config.diffusion).to(device)
        self.dtype = precision.resolve(options.precision, device)
        self.num_measured = self.task.num_measured

    def distribute(self) -> None:
        import ray.train.torch  # the driver, which asks below what data are like, needs none of it

        self.model = ray.train.torch.prepare_model(self.task)

    def step(self, batch: Batch, learning_rate: float, step: int) -> dict[str, Tensor]:
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.model.train()
        self.optimizer.zero_grad(set_to_none=True)
        images, t = self._seen(batch)
        with precision.autocast(self.device, self.dtype):
            outputs = self.model(images, batch.condition, t)
        # An identity encoder's loss compares images, so that every worker reckons the whole batch's.
        rows = self.options.global_batch_size
        loss = self.task.losses(distributed.joined(outputs, rows), distributed.joined(batch.labels, rows)).mean()
        (loss * distributed.world_size()).backward()  # the workers' gradients are averaged, each is of its own rows
        torch.nn.utils.clip_grad_norm_(self.task.parameters(), self.options.optim.grad_clip)
        self.optimizer.step()
        return {"loss": loss.detach()}

    def validation_loss(self, network: nn.Module, batch: Batch) -> Tensor:
        images, t = self._seen(batch)
        with precision.autocast(self.device, self.dtype):
            return self.task.measured(network, images, batch.condition, batch.labels, t)

    def validated(self, measured: Tensor) -> dict[str, Tensor]:
        return self.task.values(measured)

    def _seen(self, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """What the network looks at: x_t and t where it is to know noise, else x_0."""
        if not self.config.encoder.noise_aware:
            return batch.x_0, None
        return diffusion.q_sample(batch.x_0, batch.t, batch.noise, self.alphas_cumprod), batch.t

    @staticmethod
    def files(
        state: dict[str, Tensor], config: ModelConfig, *, others: Mapping[float, dict[str, Tensor]] | None = None
    ) -> dict[str, bytes]:
        return encoders.encoder_files(state, encoders.encoder_config(config), others=others)

    def state_dict(self) -> dict[str, Any]:
        return {"task": self.task.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state["task"].keys() != self.task.state_dict().keys():
            raise InputError(
                "this run was begun by another version of the program, which trained encoders otherwise: give another "
                "--output"
            )
        self.task.load_state_dict(state["task"])
        distributed.load_optimizer(self.optimizer, state["optimizer"])


# -- what the data say ------------------------------------------------------------------------------------------


def resolved(card: DatasetCard, options: TrainOptions) -> EncoderOptions:
    """The encoder's options with every attribute named that it is to learn, the domain's first.

    Raises:
        InputError: an attribute that the data set does not have.
    """
    given = options.encoder
    if options.method != "attributes":
        return given
    sides = [*domain_attributes(card.domains)]
    known = [*sides, *card.attribute_names]
    wanted = card.attribute_names if given.attributes == ALL else given.attributes
    for name in wanted:
        if name not in known:
            raise InputError(
                f"--encoder.attributes {name}{configs.did_you_mean(name, known)}: {', '.join(known) or 'none'}"
            )
    if not sides and not wanted:
        raise InputError(
            f"{card.name} has one domain, {card.domains[0]!r}, which a classifier cannot learn to tell apart; give "
            f"--encoder.attributes: {', '.join(known) or 'it has none'}"
        )
    return dataclasses.replace(given, attributes=tuple(dict.fromkeys([*sides, *wanted])))


def informed(config: ModelConfig, options: TrainOptions, card: DatasetCard, uri: str) -> ModelConfig:
    """`config` with what the encoder must know of its training images; reads the labels, not the images.

    Raises:
        InputError: from these data this encoder cannot be trained, or not validated.
    """
    found = {split: cache.read_labels(uri, card, split) for split in ("train", "val")}
    facts = _people if config.method == "identity" else _rates
    return dataclasses.replace(
        config, data=dataclasses.replace(config.data, **facts(found["train"], found["val"], config, options))
    )


def _people(train: Labels, val: Labels, config: ModelConfig, options: TrainOptions) -> dict[str, Any]:
    for split, labels in (("val", val), ("train", train)):
        known = np.unique(labels.identity[labels.identity != cache.NOBODY])
        if not len(known):
            raise InputError(
                f"{config.data.name} does not say whom the images of its {split} split show; an identity encoder "
                "learns from several images of each person (CelebA: prepare it with identity_CelebA.txt beside it)"
            )
        people = EncoderTargets(labels, config, options).people
        if len(people) < 2 or len(people) < len(known) / 10:
            raise InputError(
                f"{config.data.name} has two images or more of only {len(people):,} of the {len(known):,} people in "
                f"its {split} split; an identity encoder learns from several images of each person"
            )
    if options.global_batch_size < 2:
        raise InputError(
            f"--global-batch-size is {options.global_batch_size}; an identity encoder compares the people of a batch: "
            "give at least 2, better 64"
        )
    rows = training_rows(train, config, options)
    if len(rows) < options.global_batch_size:
        raise InputError(
            f"--global-batch-size {options.global_batch_size} is more than the {len(rows)} training rows with people "
            f"of whom there are several images; give at most {len(rows)}"
        )
    return {"num_people": len(people)}


def _is_binary(labels: Labels, name: str) -> bool:
    assert labels.attributes is not None
    values = set(np.unique(labels.attributes[:, labels.attribute_names.index(name)]).tolist())
    return values <= {-1, 1} or values <= {0, 1}


def _rates(train: Labels, val: Labels, config: ModelConfig, options: TrainOptions) -> dict[str, Any]:
    names = config.encoder.attributes
    others = names[len(domain_attributes(config.domains)) :]
    for split, labels in (("train", train), ("val", val)):
        if others and labels.attributes is None:
            raise InputError(
                f"--encoder.attributes {others[0]}: {config.data.name} has rows without attributes in its {split} "
                "split; prepare it again"
            )
        if unfit := [name for name in others if not _is_binary(labels, name)]:
            fit = [name for name in others if name not in unfit]
            more = f" and {len(unfit) - 3} more" if len(unfit) > 3 else ""
            raise InputError(
                f"--encoder.attributes {' '.join(unfit[:3])}{more}: more than two values in {config.data.name}; a "
                "classifier learns what is there or not (1 or -1, 1 or 0)"
                + (f"; give --encoder.attributes {' '.join(fit)}" if fit else "; leave it out to learn the domain")
            )
    truth = EncoderTargets(train, config, options)
    rows = training_rows(train, config, options)
    seen = [truth(rows, train.domain[rows])]
    if has_counterparts(train, config):  # either side is looked at
        seen.append(truth(rows, 1 - train.domain[rows]))
    rates = np.concatenate(seen).mean(0)
    if constant := [name for name, rate in zip(names, rates, strict=True) if rate in (0, 1)]:
        varying = [name for name in others if name not in constant]
        raise InputError(
            f"{', '.join(constant)}: the same in all training images of {config.data.name}, nothing to learn"
            + (f"; give --encoder.attributes {' '.join(varying)}" if varying else "")
        )
    return {"attribute_rates": tuple(rates.tolist())}
