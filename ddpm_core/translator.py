"""A checkpoint put to use: batches of source images in, translated images out.

from ddpm_core import checkpoint, images, translator
translate = translator.Translator(checkpoint.load("runs/earth"))
night = translate(day, "night")                # uint8 b h w 3, or Pillow images of any size → uint8 b h w 3
photos = translate.at_own_size(day, "night")   # Pillow images of any size → as many arrays, each of its image's size
"""

import functools
import io
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64, UInt8
from PIL import Image, ImageOps
from torch import Tensor, nn

from ddpm_core import config as configs
from ddpm_core import faces, full_size, graphs, guidance, images, samplers, schedule, tiles
from ddpm_core.checkpoint import Checkpoint
from ddpm_core.conditioning import shown
from ddpm_core.config import (
    FROM_SIDE,
    PARTIAL,
    Align,
    Faces,
    Framing,
    ModelConfig,
    SamplingConfig,
    domain_attributes,
)
from ddpm_core.diffusion import draw_noise, seeded
from ddpm_core.encoders import AttributeClassifier, IdentityEncoder
from ddpm_core.errors import InputError
from ddpm_core.graphs import Graphed
from ddpm_core.guidance import Denoiser, Network
from ddpm_core.precision import autocast, in_float32, resolve

Preview = Callable[[int, UInt8[np.ndarray, "b h w 3"]], None]
"""Called after each step with the number of steps done and how the images look by then."""
Progress = Callable[[int, int], None]
"""Called after each step with the number of steps done and of all steps (the way to the noise, of starts ddib and
residual, is none)."""
NUM_FIXED_POINT_STEPS = 3
"""Evaluations for each step of the inversion that starts ddib and residual make."""


class Translated(NamedTuple):
    """What came of a batch."""

    images: UInt8[np.ndarray, "b h w 3"]
    finite: Bool[np.ndarray, " b"]
    """False where the network gave something that is no number: there the image means nothing."""


NOT_FINITE = "the network gave values that are not finite numbers; take weaker guidance, or another checkpoint"
"""What is wrong with a result that is not `Translated.finite`."""


def check_sampling(
    config: ModelConfig, sampling: SamplingConfig, domain: str, *, source_domain: str | None = None
) -> None:
    """Refuse, before any work, all that a `Translator` of `config` would refuse: it makes this check itself.

    Raises:
        InputError: an option or a side that cannot be used, or has no effect, by name.
    """
    configs.check_sampling(sampling, config.diffusion.num_timesteps)
    target_index(config, domain)
    if source_domain is not None and sampling.start not in FROM_SIDE:
        raise InputError(f"source_domain has no effect with sampling.start {sampling.start}; leave it out")
    if config.method != "diffusion":
        return
    _timesteps(config, sampling)
    if config.shown == "nothing" and sampling.start == "noise":
        raise InputError(
            "sampling.start noise: this network is shown nothing of the source, so what it draws has nothing of it; "
            "take start flowedit, residual, sdedit or ddib"
        )
    if sampling.start in FROM_SIDE:
        _source_index(config, sampling, domain, source_domain)


def check_tiles(config: ModelConfig, sampling: SamplingConfig) -> None:
    """Raises InputError where images cannot be drawn in tiles."""
    if config.method != "diffusion":
        raise InputError(f"tiles have no effect on {config.method}, which draws in one pass; leave them out")
    if sampling.start in FROM_SIDE:
        raise InputError(
            f"tiles do not go with sampling.start {sampling.start}, which goes back and forth on whole images; take "
            "start noise or sdedit, or leave tiles out"
        )


def target_index(config: ModelConfig, domain: str) -> int:
    """Index of the side `domain`.

    Raises:
        InputError: there is no such side, or the network was not trained to produce it.
    """
    index = configs.domain_index(config, domain)
    known = config.target_domains or config.domains
    if domain not in known:
        raise InputError(f"this checkpoint was not trained to produce {domain!r}, only {', '.join(known)}")
    return index


def _source_index(config: ModelConfig, sampling: SamplingConfig, domain: str, source_domain: str | None) -> int:
    """Index of the side the images are on, by default the other of two."""
    others = [name for name in config.domains if name != domain]
    if source_domain is None and len(others) != 1:
        raise InputError(
            f"sampling.start {sampling.start}: the images may be on any of the sides {', '.join(others)}; give "
            "source_domain (of the library's Translator), or take another start"
        )
    return target_index(config, source_domain or others[0])


def _timesteps(config: ModelConfig, sampling: SamplingConfig) -> Int64[Tensor, " n"]:
    """The visited timesteps.

    Raises:
        InputError: none is left, or they cannot be gone back.
    """
    num_timesteps = config.diffusion.num_timesteps
    timesteps = samplers.SPACINGS[sampling.spacing](num_timesteps, sampling.num_steps)
    if sampling.start in PARTIAL:
        timesteps = samplers.sdedit_timesteps(timesteps, sampling.strength, num_timesteps)
    if sampling.start in ("ddib", "residual"):
        samplers.check_invertible(timesteps, schedule.alphas_cumprod(config.diffusion))
    return timesteps


class Translator:
    """A checkpoint ready to translate batches.

    The result for an image is a function of its pixels, the seed and the options, not of its batch but for a rounding:
    on CPUs, matrix products of fewer than six rows and group norms that threads share add up in another order. In
    float32 that is 1 of 255 at most; in bf16 single values may differ by more.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        device: str | None = None,
        precision: str = "auto",
        guide: Checkpoint | None = None,
        guide_scale: float = 1.5,
        classifier: AttributeClassifier | None = None,
        classifier_scale: float = 1.0,
        identity_encoder: IdentityEncoder | None = None,
        identity_scale: float = 1.0,
    ) -> None:
        """What leads the sampling beside the network's own condition; all of it composes.

        `guide`: an earlier or smaller network of the same kind, to be led away from with weight `guide_scale`
        (autoguidance). `classifier`: trained on x_t of the same chain, leads towards what it takes for the wanted
        domain. `identity_encoder`: leads towards what it takes for the person or place of the source.

        Raises:
            InputError: one of them is of another kind.
        """
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.config = checkpoint.config
        self.model = checkpoint.model.to(self.device)
        self.dtype = resolve(precision, self.device)
        self.network = self._in_precision(self.model)
        """Every pass of the model goes through it."""
        self.alphas_cumprod = schedule.alphas_cumprod(self.config.diffusion)  # on the CPU, as samplers' t
        self.guide_scale = guide_scale
        self.guide: Network | None = None
        if guide is not None:
            _check_guide(checkpoint, guide)
            self.guide = self._in_precision(guide.model.to(self.device))
        self.classifier, self.classifier_scale = None, classifier_scale
        if classifier is not None:
            _check_classifier(self.config, classifier, classifier_scale)
            self.classifier = classifier.to(self.device)
        self.identity_encoder, self.identity_scale = None, identity_scale
        if identity_encoder is not None:
            _check_net(self.config, "identity", identity_scale)
            self.identity_encoder = identity_encoder.to(self.device)

    def options(self, **overrides: Any) -> SamplingConfig:
        """The checkpoint's sampling defaults with any of `SamplingConfig`'s fields in their place; None is the default.

        Raises:
            InputError: an option that is unknown, cannot work or has no effect, by name.
        """
        sampling = configs.override_sampling(self.config, overrides)
        nets = {"classifier": self.classifier, "identity": self.identity_encoder}
        if sampling.start in FROM_SIDE and (led := [name for name, net in nets.items() if net is not None]):
            raise InputError(
                f"{' and '.join(led)} guidance does not go with sampling.start {sampling.start}, which draws by the "
                "sides' labels alone; leave it out"
            )
        return sampling

    def __call__(
        self,
        pictures: UInt8[np.ndarray, "b h w 3"] | Sequence[Image.Image],
        domain: str,
        *,
        seed: int = 0,
        source_domain: str | None = None,
        callback: Preview | None = None,
        progress: Progress | None = None,
        **overrides: Any,
    ) -> UInt8[np.ndarray, "b h w 3"]:
        """Translate images to `domain`.

        `pictures`: square images of the side `config.image_size`, as `images.read_square` makes them; or Pillow images
        of any size, which are turned upright and cut to such squares. The results are squares of the same side.
        `overrides`: as `options` takes them. `source_domain`: of start ddib, the side the images are on, by default
        the other of two. `callback`, `progress`: called after each step.

        Raises:
            InputError: an option or a side that cannot be used, by name; or what comes out are no numbers.
        """
        made = self.attempt(
            pictures,
            domain,
            seed=seed,
            source_domain=source_domain,
            callback=callback,
            progress=progress,
            **overrides,
        )
        if not made.finite.all():
            raise InputError(f"images {', '.join(map(str, np.flatnonzero(~made.finite)))} of the batch: {NOT_FINITE}")
        return made.images

    def at_own_size(
        self,
        photos: Sequence[Image.Image],
        domain: str,
        *,
        align: Align = "auto",
        which: Faces = "largest",
        **options: Any,
    ) -> list[UInt8[np.ndarray, "_ _ 3"]]:
        """Translate Pillow images of any size to results of their own size and shape (see `full_size`).

        `align`: see `Framing`, and `which` its `faces`. `options`: as a call takes them.

        Raises:
            InputError: as a call; or an image without a face where faces are translated.
        """
        template = faces.template_of(self.config.data.landmarks, Framing(align=align, faces=which))
        side = self.config.image_size
        decoded = [images.decode(_as_file(photo)) for photo in photos]
        views = [
            full_size.views_of(
                photo, side, template, square=functools.partial(images.to_square, photo, side), which=which
            )
            for photo in decoded
        ]
        seen = [view.pixels for each in views for view in each]
        made = iter(self(np.array(seen, np.uint8).reshape(-1, side, side, 3), domain, **options))
        return [
            full_size.carry_all(photo, each, list(itertools.islice(made, len(each))))
            for photo, each in zip(decoded, views, strict=True)
        ]

    @torch.no_grad()
    def in_tiles(
        self,
        photo: Image.Image,
        domain: str,
        *,
        seed: int = 0,
        batch_size: int = 16,
        progress: Progress | None = None,
        **overrides: Any,
    ) -> UInt8[np.ndarray, "h w 3"]:
        """Translate a Pillow image of any shape at its own size, drawn in overlapping windows (see `tiles`).

        `batch_size`: windows that the network sees at once. `progress`: called with the number of windows drawn and of
        all, over all steps. `overrides`: as `options` takes them.

        Raises:
            InputError: as `check_tiles` and a call; or the image is too small or too large.
        """
        sampling = self.options(**overrides)
        check_sampling(self.config, sampling, domain)
        check_tiles(self.config, sampling)
        if self.classifier is not None or self.identity_encoder is not None:
            raise InputError("tiles do not go with classifier or identity guidance, which judge whole images")
        pixels, side = np.asarray(images.decode(_as_file(photo))), self.config.image_size
        height, width = pixels.shape[:2]
        tiles.check(width, height, side)
        target = target_index(self.config, domain)
        source = images.to_tensor(pixels[None], self.device)
        generators = [seeded(seed, images.content_hash(pixels))]
        timesteps = _timesteps(self.config, sampling)
        drawn, total = 0, len(timesteps) * tiles.count(width, height, side)

        def done(windows: int) -> None:
            nonlocal drawn
            drawn += windows
            if progress is not None:
                progress(drawn, total)

        def denoiser_of(seen: Float[Tensor, "b 3 s s"]) -> Denoiser:
            condition = shown(self.config.shown, seen)
            return self._denoiser(seen, condition, _labels(target, condition), sampling)

        denoiser = tiles.tiled(denoiser_of, source, side, batch_size=batch_size, done=done)
        x_0 = self._from_noise(denoiser, source, generators, sampling, timesteps, lambda step, x_0: None)
        if not x_0.isfinite().all():
            raise InputError(NOT_FINITE)
        return images.to_uint8(x_0)[0]

    @torch.no_grad()
    def attempt(
        self,
        pictures: UInt8[np.ndarray, "b h w 3"] | Sequence[Image.Image],
        domain: str,
        *,
        seed: int = 0,
        source_domain: str | None = None,
        callback: Preview | None = None,
        progress: Progress | None = None,
        **overrides: Any,
    ) -> Translated:
        """As a call, but an image that comes to nothing does not take the others of its batch with it.

        Raises:
            InputError: an option or a side that cannot be used, by name.
        """
        sampling = self.options(**overrides)
        check_sampling(self.config, sampling, domain, source_domain=source_domain)
        target = target_index(self.config, domain)
        source = _source_index(self.config, sampling, domain, source_domain) if sampling.start in FROM_SIDE else None
        pictures = self._squares(pictures)
        if len(pictures) == 0:
            return Translated(pictures, np.ones(0, bool))
        source_images = images.to_tensor(pictures, self.device)
        condition = shown(self.config.shown, source_images)
        if self.config.method != "diffusion":
            x_0 = self.network(condition, _labels(target, condition))
            _told(callback, progress, 1)(1, x_0)
        else:
            generators = [seeded(seed, images.content_hash(picture)) for picture in pictures]
            told = functools.partial(_told, callback, progress)
            x_0 = self._sample(source_images, condition, target, source, generators, sampling, told)
        finite = x_0.isfinite().flatten(1).all(1)
        return Translated(images.to_uint8(x_0.nan_to_num()), finite.cpu().numpy())

    def _squares(self, pictures: UInt8[np.ndarray, "b h w 3"] | Sequence[Image.Image]) -> UInt8[np.ndarray, "b h w 3"]:
        """See `__call__`."""
        side = self.config.image_size
        if not isinstance(pictures, np.ndarray):
            pictures = np.array([_square(picture, side) for picture in pictures], np.uint8).reshape(-1, side, side, 3)
        if pictures.dtype != np.uint8 or pictures.ndim != 4 or pictures.shape[3] != 3:
            raise InputError(
                f"images are {pictures.dtype} {' x '.join(map(str, pictures.shape))}; give uint8 b x {side} x {side} "
                "x 3, or a list of Pillow images"
            )
        return pictures

    def _in_precision(self, model: nn.Module) -> Network:
        """`model` in the precision it is to run in; what samplers do with its output stays in float32."""

        def network(*inputs: Tensor, **shown: bool) -> Tensor:
            with autocast(self.device, self.dtype):
                return model(*inputs, **shown)

        return Graphed(network) if graphs.can_be_captured(model) else network

    def _sample(
        self,
        pictures: Float[Tensor, "b 3 h w"],
        condition: Float[Tensor, "b 3 h w"],
        target: int,
        source: int | None,
        generators: list[torch.Generator],
        sampling: SamplingConfig,
        told: Callable[[int], samplers.Callback],
    ) -> Float[Tensor, "b 3 h w"]:
        """x_0 for each of the images; `source` is the side they are on where start needs to know."""
        chain: Any = {"alphas_cumprod": self.alphas_cumprod, "prediction": self.config.diffusion.prediction}
        timesteps = _timesteps(self.config, sampling)
        chain["timesteps"] = timesteps
        if source is not None:
            return self._edit(pictures, target, source, generators, sampling, chain, told(len(timesteps)))
        denoiser = self._denoiser(pictures, condition, _labels(target, condition), sampling)
        return self._from_noise(denoiser, pictures, generators, sampling, timesteps, told(len(timesteps)))

    def _from_noise(
        self,
        denoiser: Denoiser,
        pictures: Float[Tensor, "b 3 h w"],
        generators: list[torch.Generator],
        sampling: SamplingConfig,
        timesteps: Int64[Tensor, " n"],
        callback: samplers.Callback,
    ) -> Float[Tensor, "b 3 h w"]:
        """x_0 drawn from noise, or from the noised images."""
        x_T = draw_noise(generators, pictures)
        if sampling.start == "sdedit":
            x_T, _ = samplers.sdedit_start(
                pictures, timesteps, sampling.strength, noise=x_T, alphas_cumprod=self.alphas_cumprod
            )
        sampler = samplers.SAMPLERS[sampling.sampler]
        if sampling.eta:
            sampler = functools.partial(samplers.ddim, eta=sampling.eta)
        return sampler(
            denoiser,
            x_T,
            timesteps=timesteps,
            alphas_cumprod=self.alphas_cumprod,
            prediction=self.config.diffusion.prediction,
            generators=generators,
            callback=callback,
        )

    def _edit(
        self,
        pictures: Float[Tensor, "b 3 h w"],
        target: int,
        source: int,
        generators: list[torch.Generator],
        sampling: SamplingConfig,
        chain: dict[str, Any],
        callback: samplers.Callback,
    ) -> Float[Tensor, "b 3 h w"]:
        """x_0 by a way that shows the network none of the image but through x_t: the sides' labels make the
        difference."""
        own, wanted = _labels(source, pictures), _labels(target, pictures)
        nothing = torch.zeros_like(pictures)
        plain = self._classifier_free(self.network, nothing, own, guidance_scale=1.0)
        if sampling.start == "ddib":
            x_T = samplers.invert(plain, pictures, num_fixed_point_steps=NUM_FIXED_POINT_STEPS, **chain)
            denoiser = self._denoiser(pictures, nothing, wanted, sampling)
            # inversion does not clip: the way back must not either
            return samplers.ddim(denoiser, x_T, generators=generators, clip=False, callback=callback, **chain)
        both = self._denoiser(pictures, torch.cat([nothing, nothing]), torch.cat([own, wanted]), sampling)
        if sampling.start == "flowedit":
            return samplers.flow_edit(both, pictures, generators=generators, callback=callback, **chain)
        return samplers.residual_edit(
            plain, both, pictures, num_fixed_point_steps=NUM_FIXED_POINT_STEPS, callback=callback, **chain
        )

    def _denoiser(
        self,
        pictures: Float[Tensor, "b 3 h w"],
        condition: Float[Tensor, "n 3 h w"],
        domain: Int64[Tensor, " n"],
        sampling: SamplingConfig,
    ) -> Denoiser:
        """The network with all of the configured guidance, n the number of `pictures` or, without nets that lead,
        twice that."""
        plain = self._classifier_free(self.network, condition, domain, guidance_scale=1.0)
        guided = self._classifier_free(
            self.network,
            condition,
            domain,
            guidance_scale=sampling.guidance_scale,
            domain_guidance_scale=sampling.domain_guidance_scale,
            guidance_rescale=sampling.guidance_rescale,
            # where nothing is shown nothing is kept, whatever the mask says
            source_mask=self.config.unet.source_mask and sampling.start not in FROM_SIDE,
        )
        if self.guide is not None:
            weak = self._classifier_free(self.guide, condition, domain, guidance_scale=1.0)
            guided = guidance.autoguidance(guided, weak, self.guide_scale)
        chain: Any = {"alphas_cumprod": self.alphas_cumprod, "prediction": self.config.diffusion.prediction}
        if self.classifier is not None:
            attribute, present = _asked(self.config, int(domain[0]))
            log_prob = in_float32(functools.partial(self.classifier.log_prob, attribute, present))
            guided = guidance.classifier_guidance(guided, log_prob, self.classifier_scale, **chain)
        if self.identity_encoder is not None:
            embed = in_float32(self.identity_encoder)
            guided = guidance.identity_guidance(guided, embed, pictures, self.identity_scale, **chain)
        return guidance.limited(guided, plain, sampling.guidance_interval, len(self.alphas_cumprod))

    def _classifier_free(
        self, network: Network, condition: Float[Tensor, "b 3 h w"], domain: Int64[Tensor, " b"], **scales: Any
    ) -> Denoiser:
        return guidance.classifier_free(network, condition, domain, num_domains=len(self.config.domains), **scales)


def _labels(domain: int, like: Float[Tensor, "b c h w"]) -> Int64[Tensor, " b"]:
    return torch.full((len(like),), domain, dtype=torch.int64, device=like.device)


def _told(preview: Preview | None, progress: Progress | None, num_steps: int) -> samplers.Callback:
    """What a sampler of that many steps calls after each of them."""

    def step_done(done: int, x_0: Float[Tensor, "b 3 h w"]) -> None:
        if progress is not None:
            progress(done, num_steps)
        if preview is not None:
            preview(done, images.to_uint8(x_0))

    return step_done


def _square(picture: Image.Image, side: int) -> UInt8[np.ndarray, "side side 3"]:
    """A Pillow image of any mode and size as training stored it."""
    return images.read_square(_as_file(picture), side)


def _as_file(picture: Image.Image) -> bytes:
    """A Pillow image as a file, of which `images` knows what colours mean in other modes and with a profile."""
    if not isinstance(picture, Image.Image):
        raise InputError(f"an image is a {type(picture).__name__}; give an array b h w 3, or a list of Pillow images")
    upright, file = ImageOps.exif_transpose(picture), io.BytesIO()
    if "transparency" in upright.info or upright.mode in ("HSV", "RGBa", "La"):
        upright = upright.convert("RGBA")
    upright.save(file, "TIFF")
    return file.getvalue()


def _asked(config: ModelConfig, domain: int) -> tuple[str, bool]:
    """What to ask a classifier for the side `domain`: which attribute, and whether it must be there."""
    attributes = domain_attributes(config.domains)
    own = next((name for name, side in attributes.items() if side == domain), None)
    return (own, True) if own is not None else (next(iter(attributes)), False)


def _check_net(config: ModelConfig, name: str, scale: float) -> None:
    if config.method != "diffusion":
        raise InputError(f"{name} guidance has no effect on {config.method}, which does not sample; leave it out")
    if not (math.isfinite(scale) and scale > 0):
        raise InputError(f"{name} guidance: its scale is {scale:g}; it must be positive, or leave the guidance out")


def _check_classifier(config: ModelConfig, classifier: AttributeClassifier, scale: float) -> None:
    _check_net(config, "classifier", scale)
    if not classifier.config.noise_aware:
        raise InputError(
            "classifier guidance: this classifier knows clean images only; train one with --encoder.noise-aware"
        )
    known, asked = classifier.config.attributes, domain_attributes(config.domains)
    if not asked:
        raise InputError(f"classifier guidance has no effect with one domain, {config.domains[0]}; leave it out")
    if unknown := [name for name in asked if name not in known]:
        raise InputError(
            f"classifier guidance: this classifier does not know {', '.join(unknown)}, only {', '.join(known)}; "
            "train one on data with the domains of the network"
        )
    for name in ("num_timesteps", "schedule", "zero_terminal_snr"):
        its, wanted = getattr(classifier.config.diffusion, name), getattr(config.diffusion, name)
        if its != wanted:
            raise InputError(
                f"classifier guidance: the classifier's diffusion.{name} is {its}, it must be {wanted}, the network's"
            )


def _check_guide(checkpoint: Checkpoint, guide: Checkpoint) -> None:
    ours, theirs = checkpoint.config, guide.config
    if ours.method != "diffusion":
        raise InputError(f"guide has no effect on {ours.method}, which does not sample; leave it out")
    for name in ("method", "image_size", "domains", "target_domains"):
        if getattr(theirs, name) != getattr(ours, name):
            raise InputError(
                f"guide {guide.path}: its {name} is {getattr(theirs, name)}, it must be {getattr(ours, name)}"
            )
    for name in ("num_timesteps", "schedule", "zero_terminal_snr", "prediction"):
        if (its := getattr(theirs.diffusion, name)) != (wanted := getattr(ours.diffusion, name)):
            raise InputError(f"guide {guide.path}: its diffusion.{name} is {its}, it must be {wanted}")
