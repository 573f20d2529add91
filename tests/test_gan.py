"""The GAN baselines: exact losses, what each network sees, and toy problems they must learn."""

import contextlib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import Tensor, nn

from ddpm_core import gan
from ddpm_core.config import GANConfig, ModelConfig
from ddpm_core.errors import InputError

CPU = torch.device("cpu")
SMALL = GANConfig(channels=8, num_levels=3, num_res_blocks=1, num_discriminator_levels=1)


def config_of(method: str, **changes: Any) -> ModelConfig:
    return ModelConfig(**{"image_size": 16, "domains": ("day", "night"), "method": method, "gan": SMALL, **changes})


def trainer(method: str, **changes: Any) -> gan.GANTrainer:
    torch.manual_seed(0)
    return gan.GANTrainer(config_of(method, **changes), device=CPU, dtype=torch.float32, seed=0)


def batch(size: int = 4, side: int = 16, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """source, target, domain; each side is produced by every other row."""
    generator = torch.Generator().manual_seed(seed)
    source, target = torch.rand(2, size, 3, side, side, generator=generator) * 2 - 1
    return source, target, torch.arange(size) % 2


METHODS = pytest.mark.parametrize("method", ["pix2pix", "cyclegan"])


# -- losses


def test_adversarial_losses_are_the_papers() -> None:
    logits = torch.tensor([0.0, 2.0]).reshape(2, 1, 1, 1)
    softplus = [math.log(2), math.log(1 + math.exp(2))]
    assert gan.adversarial_loss("pix2pix", logits, real=False).item() == pytest.approx(sum(softplus) / 2)
    assert gan.adversarial_loss("pix2pix", logits, real=True).item() == pytest.approx((sum(softplus) - 2) / 2)
    assert gan.adversarial_loss("cyclegan", logits, real=True).item() == pytest.approx((1 + 1) / 2)
    assert gan.adversarial_loss("cyclegan", logits, real=False).item() == pytest.approx((0 + 4) / 2)


def test_a_discriminator_that_cannot_tell_has_the_known_loss() -> None:
    unsure = torch.zeros(2, 1, 3, 3)
    assert gan.discriminator_loss("pix2pix", unsure, unsure).item() == pytest.approx(math.log(2))
    assert gan.discriminator_loss("cyclegan", unsure + 0.5, unsure + 0.5).item() == pytest.approx(0.25)
    sure = gan.discriminator_loss("cyclegan", torch.ones(1, 1, 2, 2), torch.zeros(1, 1, 2, 2))
    assert sure.item() == 0


class Constant(nn.Module):
    """Makes 0.5 of anything, and -0.5 of that."""

    def forward(self, x: Tensor, domain: Tensor) -> Tensor:
        return torch.where(x[:, :1, :1, :1] == 0.5, -0.5, 0.5).expand_as(x)


def test_validation_errors_are_one_number_a_image() -> None:
    source, target = torch.zeros(2, 3, 8, 8), torch.tensor([0.5, -0.5]).reshape(2, 1, 1, 1).expand(2, 3, 8, 8)
    domain = torch.tensor([0, 1])
    assert gan.validation_error(Constant(), "pix2pix", source, target, domain).tolist() == [0, 1]
    assert gan.validation_error(Constant(), "cyclegan", source, target, domain).tolist() == [0.5, 0.5]


def test_the_losses_of_a_step_are_those_of_the_networks_before_it() -> None:
    source, target, domain = batch()
    paired = trainer("pix2pix")
    made = paired.generator(source, domain)
    on = [paired.discriminator(torch.cat([source, picture], dim=1), domain) for picture in (target, made)]
    losses = paired.step(source, target, domain, learning_rate=0.0, step=0)
    assert losses["l1"].item() == pytest.approx((made - target).abs().mean().item())
    assert losses["discriminator"].item() == pytest.approx(gan.discriminator_loss("pix2pix", *on).item())
    assert losses["adversarial"].item() == pytest.approx(gan.adversarial_loss("pix2pix", on[1], real=True).item())

    unpaired = trainer("cyclegan")
    make = unpaired.generator
    there, back = make(source, domain), make(target, 1 - domain)
    losses = unpaired.step(source, target, domain, learning_rate=0.0, step=0)
    cycle = (make(there, 1 - domain) - source).abs().mean() + (make(back, domain) - target).abs().mean()
    identity = (make(source, 1 - domain) - source).abs().mean() + (make(target, domain) - target).abs().mean()
    assert losses["cycle"].item() == pytest.approx(cycle.item() / 2)
    assert losses["identity"].item() == pytest.approx(identity.item() / 2)
    judge = unpaired.discriminator
    fooling = ((judge(there, domain) - 1) ** 2).mean() + ((judge(back, 1 - domain) - 1) ** 2).mean()
    assert losses["adversarial"].item() == pytest.approx(fooling.item() / 2)
    judging = (judge(target, domain) - 1).square().mean() + judge(there, domain).square().mean()
    judging = judging + (judge(source, 1 - domain) - 1).square().mean() + judge(back, 1 - domain).square().mean()
    assert losses["discriminator"].item() == pytest.approx(judging.item() / 4)


# -- networks


@pytest.mark.parametrize(("levels", "side"), [(1, 16), (2, 34), (3, 70)])
def test_a_patch_is_as_large_as_documented(levels: int, side: int) -> None:
    torch.manual_seed(0)
    network = gan.PatchDiscriminator(3, GANConfig(channels=4, num_discriminator_levels=levels)).double()
    for sequence in [network.layers]:  # a norm looks at the whole map: what is meant is the convolutions' reach
        for index, layer in enumerate(sequence):
            if isinstance(layer, gan.Norm):
                sequence[index] = nn.Identity()
    x = torch.randn(1, 3, 128, 128, dtype=torch.float64, requires_grad=True)
    out = network(x)
    out[0, 0, out.shape[2] // 2, out.shape[3] // 2].backward()
    assert x.grad is not None
    seen = x.grad[0].abs().sum(0) > 0
    assert (seen.any(0).sum().item(), seen.any(1).sum().item()) == (side, side)


@METHODS
@pytest.mark.parametrize("size", [(16, 16), (24, 40)])
def test_images_keep_their_size_and_range(method: str, size: tuple[int, int]) -> None:
    generator = trainer(method).generator
    out = generator(torch.randn(3, 3, *size) * 5, torch.tensor([0, 1, 0]))
    assert out.shape == (3, 3, *size)
    assert out.abs().max() <= 1


@METHODS
def test_other_sizes_are_refused_by_name(method: str) -> None:
    generator = trainer(method).generator
    with pytest.raises(
        InputError, match=rf"18 x 16 pixels: for {method} both must be multiples of {8 if 'p' in method else 4}"
    ):
        generator(torch.zeros(1, 3, 16, 18), torch.tensor([0]))
    with pytest.raises(InputError, match="image of 20 x 20 pixels"):
        gan.check(config_of("pix2pix", image_size=20))
    with pytest.raises(InputError, match="num-discriminator-levels is 3, which takes images of 24 px or more"):
        gan.check(config_of(method, gan=GANConfig(num_levels=3, num_discriminator_levels=3)))


@METHODS
def test_no_image_sees_its_neighbour(method: str) -> None:
    source, _, domain = batch(5)
    generator = trainer(method).generator
    together = generator(source, domain)
    alone = torch.cat([generator(source[i : i + 1], domain[i : i + 1]) for i in range(5)])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
    other = source.clone()
    other[1:] = -other[1:]
    assert torch.equal(generator(other, domain)[0], together[0])


def test_each_row_goes_through_the_generator_of_its_domain() -> None:
    generator = trainer("pix2pix").generator
    source, _, _ = batch(4)
    domain = torch.tensor([1, 0, 0, 1])
    right = torch.cat([generator.networks[str(side)](source[i : i + 1]) for i, side in enumerate(domain.tolist())])
    torch.testing.assert_close(generator(source, domain), right, rtol=1e-4, atol=1e-5)
    assert list(trainer("pix2pix", target_domains=("night",)).generator.networks) == ["1"]
    assert list(trainer("cyclegan", target_domains=("night",)).generator.networks) == ["0", "1"]  # the way back


@METHODS
def test_every_parameter_gets_a_gradient(method: str) -> None:
    ours = trainer(method)
    ours.step(*batch(), learning_rate=0.0, step=0)
    for network in (ours.generator, ours.discriminator):
        for name, parameter in network.named_parameters():
            assert parameter.grad is not None, name
            assert parameter.grad.abs().max() > 1e-8, name


@METHODS
def test_a_domain_that_a_batch_lacks_has_gradients_of_zero(method: str) -> None:
    """As averaging over processes needs: some may have a row of that domain."""
    ours = trainer(method)
    source, target, _ = batch()
    ours.step(source, target, torch.ones(4, dtype=torch.int64), learning_rate=0.0, step=0)
    gradients = [parameter.grad for parameter in ours.generator.networks["0"].parameters()]
    assert all(gradient is not None for gradient in gradients)
    assert any(gradient.any() for gradient in gradients) == (method == "cyclegan")


# -- the history


def test_the_history_fills_then_gives_back_half() -> None:
    def pictures(first: int, count: int) -> Tensor:
        return torch.arange(first, first + count).float().reshape(-1, 1, 1, 1).expand(-1, 3, 8, 8)

    history = gan.History()
    assert torch.equal(history.swap(pictures(0, 50), gan.seeded("x")), pictures(0, 50))
    shown = history.swap(pictures(50, 400), gan.seeded("y"))[:, 0, 0, 0]
    assert history.pictures is not None
    kept = history.pictures[:, 0, 0, 0].tolist()
    new = shown == torch.arange(50, 450)
    assert new.float().mean().item() == pytest.approx(0.5, abs=0.1)
    # nothing is lost or doubled: what went in is either kept or was shown once
    assert sorted([*kept, *shown.tolist()]) == [*range(450)]
    assert (shown[~new] < torch.arange(50, 450)[~new]).all()


# -- training


@METHODS
def test_a_resumed_training_equals_an_unbroken_one(method: str) -> None:
    def run(ours: gan.GANTrainer, steps: range) -> gan.GANTrainer:
        for step in steps:
            ours.step(*batch(8, seed=step), learning_rate=1e-3, step=step)
        return ours

    whole = run(trainer(method), range(10))  # 8 images a side and step: the history of 50 overflows
    half = run(trainer(method), range(8))
    again = trainer(method)
    again.load_state_dict(half.state_dict())
    run(again, range(8, 10))
    for name, tensor in whole.generator.state_dict().items():
        assert torch.equal(tensor, again.generator.state_dict()[name]), name
    for name, tensor in whole.discriminator.state_dict().items():
        assert torch.equal(tensor, again.discriminator.state_dict()[name]), name


@METHODS
def test_bf16_stays_near_fp32_and_norms_and_losses_are_fp32(method: str) -> None:
    exact, fast = trainer(method), trainer(method)
    fast.dtype = torch.bfloat16
    dtypes = set()
    for module in (*fast.generator.modules(), *fast.discriminator.modules()):
        if isinstance(module, gan.Norm):
            module.register_forward_hook(lambda module, args, output: dtypes.add(output.dtype))
    there, here = (each.step(*batch(), learning_rate=1e-3, step=0) for each in (exact, fast))
    assert dtypes == {torch.float32}
    for name, loss in here.items():
        assert loss.dtype == torch.float32
        assert loss.item() == pytest.approx(there[name].item(), rel=0.05)
        assert loss.item() != there[name].item()


@contextlib.contextmanager
def float64() -> Iterator[None]:
    """All of a trainer. Adam's first steps are the signs of gradients: in float32, rounding decides those near zero."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tensor, "float", Tensor.double)
        torch.set_default_dtype(torch.float64)
        try:
            yield
        finally:
            torch.set_default_dtype(torch.float32)


def one_of_two(rank: int, folder: str) -> None:
    """Half of every batch; what `test_two_processes...` does with all of it."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    with float64():
        for method in ("pix2pix", "cyclegan"):
            ours = trainer(method)
            for step in range(8):
                half = [part[4 * rank : 4 * rank + 4] for part in batch(8, seed=step)]
                ours.step(*half, learning_rate=1e-3, step=step)
            torch.save(ours.state_dict(), f"{folder}/{method}-{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_compute_what_one_does(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(one_of_two, args=(str(tmp_path),), nprocs=2)
    for method in ("pix2pix", "cyclegan"):
        with float64():
            whole = trainer(method)
            for step in range(8):
                whole.step(*batch(8, seed=step), learning_rate=1e-3, step=step)
        first, second = (torch.load(tmp_path / f"{method}-{rank}.pt", weights_only=True) for rank in (0, 1))
        for name in ("generator", "discriminator"):
            for key, tensor in first[name].items():
                assert torch.equal(tensor, second[name][key]), key
        for key, tensor in whole.generator.state_dict().items():
            torch.testing.assert_close(first["generator"][key], tensor, rtol=1e-6, atol=1e-9, msg=key)
        for side, history in whole.histories.items():
            if history.pictures is not None:
                torch.testing.assert_close(first["histories"][side], history.pictures, rtol=0.0, atol=0.1)


def images_of(seed: int, count: int) -> Tensor:
    """Bright discs of warm colours on dark ground, 16 px; inverted they are dark discs of cold colours on bright."""
    generator = torch.Generator().manual_seed(seed)
    places, colours = torch.rand(count, 3, generator=generator), torch.rand(count, 3, 1, 1, generator=generator)
    y, x = torch.meshgrid(torch.arange(16.0), torch.arange(16.0), indexing="ij")
    row, column, radius = (places * torch.tensor([8.0, 8.0, 2.0]) + torch.tensor([4.0, 4.0, 3.0])).T[..., None, None]
    disc = ((y - row) ** 2 + (x - column) ** 2 < radius**2)[:, None].float()
    colour = torch.tensor([1.0, 0.7, 0.2]).reshape(3, 1, 1) * (0.7 + 0.3 * colours)
    return -0.8 + disc * (colour + 0.8)


def test_pix2pix_learns_to_invert_colours() -> None:
    ours = trainer("pix2pix", gan=GANConfig(channels=16, num_levels=3, num_discriminator_levels=1))
    for step in range(150):
        day = images_of(step, 8)
        domain = torch.arange(8) % 2
        side = domain[:, None, None, None] == 1
        source = torch.where(side, day, -day)
        ours.step(source, -source, domain, learning_rate=2e-3, step=step)
    source = images_of(10_000, 16)
    for domain, picture in ((1, source), (0, -source)):
        made = ours.generator(picture, torch.full((16,), domain))
        assert (made + picture).abs().mean() < 0.1 * (2 * picture).abs().mean()  # the identity is off by 2 |x|


@pytest.mark.slow
def test_cyclegan_learns_to_invert_colours_without_pairs() -> None:
    ours = trainer("cyclegan", gan=GANConfig(channels=12, num_res_blocks=1, num_discriminator_levels=1))
    for step in range(100):
        day, night = images_of(2 * step, 4), -images_of(2 * step + 1, 4)
        ours.step(day, night, torch.ones(4, dtype=torch.int64), learning_rate=1e-3, step=step)
    source = images_of(10_000, 16)
    for domain, picture in ((1, source), (0, -source)):
        made = ours.generator(picture, torch.full((16,), domain))
        assert (made + picture).abs().mean() < 0.5 * (2 * picture).abs().mean()
