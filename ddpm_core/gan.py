"""The baselines to beat: pix2pix for pairs (Isola et al. 2017), CycleGAN without (Zhu et al. 2017).

    pix2pix     made = G(source)                      D judges (source, image)
                G minimises adversarial + l1_weight |made - target|
    CycleGAN    made = G(image, other side)         D judges an image, one D a side
                G minimises adversarial + cycle_weight |G(made, own side) - image|
                                        + identity_weight |G(image, own side) - image|

    source, target    b 3 h w in [-1, 1]; source shows the other side of `domain`, target shows `domain`
    domain            b int64, the side to produce: each row goes through the networks of its own domain

Instance norm throughout, so that no image sees its neighbour. The dropout that pix2pix takes its noise from is left
out: it changes little (section 3.2 there), and without it a result depends on its image alone.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn

from ddpm_core.config import GANConfig, Method, ModelConfig
from ddpm_core.diffusion import seeded
from ddpm_core.errors import InputError
from ddpm_core.precision import autocast

HISTORY_SIZE = 50
"""Made images of a domain that CycleGAN's discriminators are shown again (Shrivastava et al. 2017)."""
BETAS = (0.5, 0.999)
"""Of Adam, as in both papers."""


def stride(config: ModelConfig) -> int:
    """The generator takes images whose sides are multiples of this many pixels."""
    return 2**config.gan.num_levels if config.method == "pix2pix" else 4


def check(config: ModelConfig) -> None:
    """Refuse networks that do not fit the images.

    Raises:
        InputError: naming the field, its value and what would be right.
    """
    try:
        check_size(config, config.image_size, config.image_size)
    except InputError as error:
        fewer = ", or give fewer --gan.num-levels" if config.method == "pix2pix" else ""
        raise InputError(f"{error}; prepare the data with another --image-size{fewer}") from None
    levels = config.gan.num_discriminator_levels
    if config.image_size < 3 * 2**levels:
        raise InputError(
            f"gan.num-discriminator-levels is {levels}, which takes images of {3 * 2**levels} px or more; "
            f"these have {config.image_size} px: give fewer"
        )


def check_size(config: ModelConfig, height: int, width: int) -> None:
    """Refuse images that the generator cannot take.

    Raises:
        InputError: naming the size and what would be right.
    """
    step = stride(config)
    if height % step or width % step or min(height, width) < 8:
        raise InputError(
            f"image of {width} x {height} pixels: for {config.method} both must be multiples of {step}, at least 8"
        )


# -- networks -----------------------------------------------------------------------------------------------------


class Norm(nn.InstanceNorm2d):
    """Each map of each image to mean 0 and variance 1, in float32 also under autocast; then a learned affine map."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, affine=True)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        return super().forward(x.float())


class UNetGenerator(nn.Module):
    """pix2pix's: halve the side `num_levels` times and come back, each level beside its skip."""

    def __init__(self, config: GANConfig) -> None:
        super().__init__()
        widths = [config.channels * min(2**level, 8) for level in range(config.num_levels)]
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        for level, width in enumerate(widths):
            first, last = level == 0, level == len(widths) - 1
            outer = 3 if first else widths[level - 1]
            plain = first or last  # no norm: the first keeps the colours, the last may be a single pixel
            self.down.append(
                nn.Sequential(
                    nn.Identity() if first else nn.LeakyReLU(0.2),
                    nn.Conv2d(outer, width, 4, stride=2, padding=1, bias=plain),
                    nn.Identity() if plain else Norm(width),
                )
            )
            self.up.append(
                nn.Sequential(
                    nn.ReLU(),
                    nn.ConvTranspose2d(width if last else 2 * width, outer, 4, stride=2, padding=1, bias=first),
                    nn.Tanh() if first else Norm(outer),
                )
            )

    def forward(self, x: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 3 h w"]:
        skips = []
        for level in self.down:
            x = level(x)
            skips.append(x)
        x = self.up[-1](skips.pop())
        for level in reversed(self.up[:-1]):
            x = level(torch.cat([x, skips.pop()], dim=1))
        return x


class ResNetGenerator(nn.Module):
    """CycleGAN's: a quarter of the side, residual blocks, and back (Johnson et al. 2016)."""

    def __init__(self, config: GANConfig) -> None:
        super().__init__()
        c = config.channels
        self.layers = nn.Sequential(
            *(nn.ReflectionPad2d(3), nn.Conv2d(3, c, 7, bias=False), Norm(c), nn.ReLU()),
            *(nn.Conv2d(c, 2 * c, 3, stride=2, padding=1, bias=False), Norm(2 * c), nn.ReLU()),
            *(nn.Conv2d(2 * c, 4 * c, 3, stride=2, padding=1, bias=False), Norm(4 * c), nn.ReLU()),
            *(ResBlock(4 * c) for _ in range(config.num_res_blocks)),
            *(nn.ConvTranspose2d(4 * c, 2 * c, 3, 2, 1, 1, bias=False), Norm(2 * c), nn.ReLU()),
            *(nn.ConvTranspose2d(2 * c, c, 3, 2, 1, 1, bias=False), Norm(c), nn.ReLU()),
            *(nn.ReflectionPad2d(3), nn.Conv2d(c, 3, 7), nn.Tanh()),
        )

    def forward(self, x: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 3 h w"]:
        return self.layers(x)


class ResBlock(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()

        def conv() -> list[nn.Module]:
            return [nn.ReflectionPad2d(1), nn.Conv2d(channels, channels, 3, bias=False), Norm(channels)]

        self.layers = nn.Sequential(*conv(), nn.ReLU(), *conv())

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        return x + self.layers(x)


class PatchDiscriminator(nn.Module):
    """One logit for each patch of 16, 34 or 70 pixels (1, 2 or 3 levels): does it look real?"""

    def __init__(self, in_channels: int, config: GANConfig) -> None:
        super().__init__()
        channels = config.channels
        layers: list[nn.Module] = [nn.Conv2d(in_channels, channels, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for level in range(1, config.num_discriminator_levels + 1):
            width = config.channels * min(2**level, 8)
            side = 1 if level == config.num_discriminator_levels else 2
            layers += [nn.Conv2d(channels, width, 4, side, 1, bias=False), Norm(width), nn.LeakyReLU(0.2)]
            channels = width
        self.layers = nn.Sequential(*layers, nn.Conv2d(channels, 1, 4, padding=1))

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b 1 p q"]:
        return self.layers(x)


class Generator(nn.Module):
    """A checkpoint's network: one generator for each side it produces."""

    def __init__(self, config: ModelConfig) -> None:
        check(config)
        super().__init__()
        self.config = config
        network = UNetGenerator if config.method == "pix2pix" else ResNetGenerator
        self.networks = per_domain(config, lambda: network(config.gan))

    def forward(self, condition: Float[Tensor, "b 3 h w"], domain: Int64[Tensor, " b"]) -> Float[Tensor, "b 3 h w"]:
        """
        Raises:
            InputError: h or w is not a multiple of the network's stride.
        """
        check_size(self.config, condition.shape[2], condition.shape[3])
        return route(self.networks, condition, domain)


class Discriminator(nn.Module):
    """One patch discriminator for each side that is produced."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        in_channels = 6 if config.method == "pix2pix" else 3
        self.networks = per_domain(config, lambda: PatchDiscriminator(in_channels, config.gan))

    def forward(self, x: Float[Tensor, "b c h w"], domain: Int64[Tensor, " b"]) -> Float[Tensor, "b 1 p q"]:
        return route(self.networks, x, domain)


def per_domain(config: ModelConfig, make: Callable[[], nn.Module]) -> nn.ModuleDict:
    """A network for each side to produce, by the side's index; CycleGAN needs the way back as well."""
    wanted = config.target_domains if config.method == "pix2pix" else ()
    sides = [config.domains.index(name) for name in wanted or config.domains]
    networks = nn.ModuleDict({str(side): make() for side in sides})
    for module in networks.modules():
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
            nn.init.normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    return networks


def route(networks: nn.ModuleDict, x: Float[Tensor, "b c h w"], domain: Int64[Tensor, " b"]) -> Tensor:
    """Each row through the network of its domain."""
    rows = {side: (domain == int(side)).nonzero()[:, 0] for side in networks}
    order = torch.cat(list(rows.values())).argsort()
    assert len(order) == len(x), f"no network for one of the domains {domain.tolist()}"
    return torch.cat([networks[side](x[index]) for side, index in rows.items() if len(index)])[order]


# -- losses -------------------------------------------------------------------------------------------------------


def adversarial_loss(method: Method, logits: Float[Tensor, "b 1 p q"], *, real: bool) -> Float[Tensor, ""]:
    """How far the discriminator is from calling every patch real, or made.

    Cross-entropy for pix2pix (Goodfellow et al. 2014), least squares for CycleGAN (Mao et al. 2017).
    """
    wanted = torch.full_like(logits, float(real))
    return F.mse_loss(logits, wanted) if method == "cyclegan" else F.binary_cross_entropy_with_logits(logits, wanted)


def discriminator_loss(
    method: Method, on_real: Float[Tensor, "b 1 p q"], on_made: Float[Tensor, "b 1 p q"]
) -> Float[Tensor, ""]:
    """Real images called real, made ones made; halved, to slow it down beside the generator (Isola et al., 3.3)."""
    return (adversarial_loss(method, on_real, real=True) + adversarial_loss(method, on_made, real=False)) / 2


def validation_error(
    generator: nn.Module,
    method: Method,
    source: Float[Tensor, "b 3 h w"],
    target: Float[Tensor, "b 3 h w"],
    domain: Int64[Tensor, " b"],
) -> Float[Tensor, " b"]:
    """|made - target| of each image for pix2pix; |there and back - source| for CycleGAN, which has no target."""
    made = generator(source, domain)
    error = made - target if method == "pix2pix" else generator(made, 1 - domain) - source
    return error.float().abs().flatten(1).mean(1)


# -- training -----------------------------------------------------------------------------------------------------


class History:
    """The last made images of one domain: half of the time the discriminator is shown one of them instead."""

    def __init__(self) -> None:
        self.pictures: Tensor | None = None

    def swap(self, made: Float[Tensor, "b 3 h w"], generator: torch.Generator) -> Float[Tensor, "b 3 h w"]:
        """`made`, or for some of them an earlier one whose place they take; every row costs the same two draws."""
        known = made if self.pictures is None else torch.cat([self.pictures, made])
        kept, shown = list(range(len(known) - len(made))), []
        for new, (coin, slot) in enumerate(torch.rand(len(made), 2, generator=generator).tolist(), start=len(kept)):
            if len(kept) < HISTORY_SIZE:
                kept.append(new)
            elif coin < 0.5:
                place = int(slot * HISTORY_SIZE)
                new, kept[place] = kept[place], new
            shown.append(new)
        self.pictures = known[kept]
        return known[shown]


class GANTrainer:
    """Generator and discriminator and the alternating updates of both.

    With torch.distributed set up, each process gives its share of the batch, in order, and all take the same update.
    """

    def __init__(self, config: ModelConfig, *, device: torch.device, dtype: torch.dtype, seed: int) -> None:
        self.config, self.method, self.device, self.dtype, self.seed = config, config.method, device, dtype, seed
        self.generator, self.discriminator = Generator(config).to(device), Discriminator(config).to(device)
        self.optimizers = {
            name: torch.optim.Adam(network.parameters(), lr=0.0, betas=BETAS)
            for name, network in (("generator", self.generator), ("discriminator", self.discriminator))
        }
        self.histories = {int(side): History() for side in self.generator.networks}

    def step(
        self,
        source: Float[Tensor, "b 3 h w"],
        target: Float[Tensor, "b 3 h w"],
        domain: Int64[Tensor, " b"],
        *,
        learning_rate: float,
        step: int,
    ) -> dict[str, Float[Tensor, ""]]:
        """One update of either network, the step'th of the run; the losses by name, before the update."""
        for optimizer in self.optimizers.values():
            for group in optimizer.param_groups:
                group["lr"] = learning_rate
        self.generator.train()
        if self.method == "pix2pix":
            losses = self._pix2pix(source, target, domain)
        else:
            losses = self._cyclegan(source, target, domain, step)
        return {name: loss.detach() for name, loss in losses.items()}

    def _pix2pix(self, source: Tensor, target: Tensor, domain: Tensor) -> dict[str, Tensor]:
        made = self._generate(source, domain)
        on_real = self._judge(torch.cat([source, target], dim=1), domain)
        on_made = self._judge(torch.cat([source, made.detach()], dim=1), domain)
        judging = discriminator_loss(self.method, on_real, on_made)
        self._update("discriminator", judging)
        on_made = self._judge(torch.cat([source, made], dim=1), domain)
        fooling, l1 = adversarial_loss(self.method, on_made, real=True), F.l1_loss(made, target)
        self._update("generator", fooling + self.config.gan.l1_weight * l1)
        return {"l1": l1, "adversarial": fooling, "discriminator": judging}

    def _cyclegan(self, source: Tensor, target: Tensor, domain: Tensor, step: int) -> dict[str, Tensor]:
        pictures, to = interleave(source, target), interleave(domain, 1 - domain)
        own, gan = 1 - to, self.config.gan
        made = self._generate(pictures, to)
        shown = self._from_history(made.detach(), to, step)
        judging = discriminator_loss(self.method, self._judge(pictures, own), self._judge(shown, to))
        self._update("discriminator", judging)
        fooling = adversarial_loss(self.method, self._judge(made, to), real=True)
        cycle = F.l1_loss(self._generate(made, own), pictures)
        identity = F.l1_loss(self._generate(pictures, own), pictures)
        self._update("generator", fooling + gan.cycle_weight * cycle + gan.identity_weight * identity)
        return {"cycle": cycle, "identity": identity, "adversarial": fooling, "discriminator": judging}

    def _generate(self, x: Tensor, domain: Tensor) -> Tensor:
        with autocast(self.device, self.dtype):
            return self.generator(x, domain).float()

    def _judge(self, x: Tensor, domain: Tensor) -> Tensor:
        with autocast(self.device, self.dtype):
            return self.discriminator(x, domain).float()

    def _update(self, name: str, loss: Tensor) -> None:
        """A step of one of the two networks; the gradients are averaged over processes, zero where there are none."""
        optimizer = self.optimizers[name]
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
        if dist.is_initialized() and dist.get_world_size() > 1:
            flat = torch.cat([gradient.flatten() for gradient in gradients])
            dist.all_reduce(flat)
            parts = (flat / dist.get_world_size()).split([parameter.numel() for parameter in parameters])
            gradients = tuple(part.view_as(parameter) for part, parameter in zip(parts, parameters, strict=True))
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        optimizer.step()

    def _from_history(self, made: Tensor, to: Tensor, step: int) -> Tensor:
        """What the discriminators are shown for `made`. Every process sees the images of all, so that the histories
        are the same everywhere."""
        every, sides, share = gather(made), gather(to), len(made)
        shown = torch.empty_like(every)
        for side, history in self.histories.items():
            rows = (sides == side).nonzero()[:, 0]
            shown[rows] = history.swap(every[rows], seeded("history", self.seed, step, side))
        first = (dist.get_rank() if dist.is_initialized() else 0) * share
        return shown[first : first + share]

    def state_dict(self) -> dict[str, Any]:
        return {
            "generator": self.generator.state_dict(),
            "discriminator": self.discriminator.state_dict(),
            "optimizers": {name: optimizer.state_dict() for name, optimizer in self.optimizers.items()},
            "histories": {side: history.pictures for side, history in self.histories.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.generator.load_state_dict(state["generator"])
        self.discriminator.load_state_dict(state["discriminator"])
        for name, optimizer in self.optimizers.items():
            optimizer.load_state_dict(state["optimizers"][name])
        for side, history in self.histories.items():
            pictures = state["histories"][side]
            history.pictures = None if pictures is None else pictures.to(self.device)


def interleave(first: Tensor, second: Tensor) -> Tensor:
    """first[0], second[0], first[1], ...: a share of the interleaved is the interleaved shares."""
    return torch.stack([first, second], dim=1).flatten(0, 1)


def gather(share: Tensor) -> Tensor:
    """Every process's share, in order."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return share
    shares = [torch.empty_like(share) for _ in range(dist.get_world_size())]
    dist.all_gather(shares, share.contiguous())
    return torch.cat(shares)
