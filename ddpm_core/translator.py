"""A checkpoint put to use: batches of source pictures in, translated pictures out.

from ddpm_core import checkpoint, images, translator
translate = translator.Translator(checkpoint.load("runs/earth"))
night = translate(day, "night")          # uint8 b h w 3 → uint8 b h w 3
"""

import dataclasses

import numpy as np
import torch
from jaxtyping import UInt8

from ddpm_core import config as configs
from ddpm_core import guidance, images, samplers, schedule
from ddpm_core.checkpoint import Checkpoint
from ddpm_core.config import SamplingConfig
from ddpm_core.diffusion import draw_noise, seeded
from ddpm_core.errors import InputError
from ddpm_core.precision import autocast, resolve


class Translator:
    """A checkpoint ready to translate batches.

    The result for a picture is a function of its pixels, the seed and the options, not of its batch (to the
    last bit where the kernels allow it; batched convolutions may differ by a rounding).
    """

    def __init__(self, checkpoint: Checkpoint, *, device: str | None = None, precision: str = "auto") -> None:
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.config = checkpoint.config
        self.model = checkpoint.model.to(self.device)
        self.dtype = resolve(precision, self.device)
        self.alphas_cumprod = schedule.alphas_cumprod(self.config.diffusion).to(self.device)

    def options(
        self, *, sampler: str | None = None, num_steps: int | None = None, guidance_scale: float | None = None
    ) -> SamplingConfig:
        """The checkpoint's sampling defaults with what is given put in their place.

        Raises:
            InputError: an option that cannot work, by name.
        """
        given = {"sampler": sampler, "num_steps": num_steps, "guidance_scale": guidance_scale}
        values = {
            **configs.to_dict(self.config.sampling),
            **{k: v for k, v in given.items() if v is not None},
        }
        sampling = configs.from_dict(SamplingConfig, values, where="sampling")
        configs.check(dataclasses.replace(self.config, sampling=sampling))
        return sampling

    def domain_index(self, domain: str) -> int:
        """Index of the side `domain`.

        Raises:
            InputError: there is no such side, or this checkpoint was not trained to produce it.
        """
        index = configs.domain_index(self.config, domain)
        known = self.config.target_domains or self.config.domains
        if domain not in known:
            raise InputError(f"this checkpoint was not trained to produce {domain!r}, only {', '.join(known)}")
        return index

    @torch.inference_mode()
    def __call__(
        self,
        pictures: UInt8[np.ndarray, "b h w 3"],
        domain: str,
        *,
        sampler: str | None = None,
        num_steps: int | None = None,
        guidance_scale: float | None = None,
        seed: int = 0,
    ) -> UInt8[np.ndarray, "b h w 3"]:
        """Translate square pictures of the model's size to `domain`; options default to the checkpoint's."""
        sampling = self.options(sampler=sampler, num_steps=num_steps, guidance_scale=guidance_scale)
        index = self.domain_index(domain)
        if len(pictures) == 0:
            return pictures
        condition = images.to_tensor(pictures, self.device)
        generators = [seeded(seed, images.content_hash(picture)) for picture in pictures]
        x_T = draw_noise(generators, condition)
        denoiser = guidance.classifier_free(
            self.model,
            condition,
            torch.full((len(pictures),), index, dtype=torch.int64, device=self.device),
            num_domains=len(self.config.domains),
            guidance_scale=sampling.guidance_scale,
        )
        with autocast(self.device, self.dtype):
            x_0 = samplers.SAMPLERS[sampling.sampler](
                denoiser,
                x_T,
                timesteps=samplers.trailing_timesteps(self.config.diffusion.num_timesteps, sampling.num_steps),
                alphas_cumprod=self.alphas_cumprod,
                prediction=self.config.diffusion.prediction,
                generators=generators,
            )
        return images.to_uint8(x_0)
