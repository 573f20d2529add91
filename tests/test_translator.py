"""The translator: every sampling option reaches the sampler, costs what it should, and is refused where it is idle."""

import dataclasses
import io
from pathlib import Path

import jaxtyping
import numpy as np
import pytest
import torch
from PIL import Image

from ddpm_core import conditioning, guidance, images, samplers
from ddpm_core.checkpoint import Checkpoint, build
from ddpm_core.config import DiffusionConfig, GANConfig, ModelConfig, SamplingConfig, UNetConfig
from ddpm_core.diffusion import draw_noise, q_sample, seeded
from ddpm_core.encoders import AttributeClassifier, EncoderConfig, IdentityEncoder
from ddpm_core.errors import InputError
from ddpm_core.translator import Translator, check_sampling

TINY = ModelConfig(
    image_size=8,
    domains=("day", "night"),
    unet=UNetConfig(
        model_channels=16,
        channel_mult=(1,),
        num_res_blocks=1,
        attn_resolutions=(),
        head_channels=8,
        condition_channels=8,
        condition_tokens=2,
    ),
    gan=GANConfig(channels=8, num_levels=2, num_res_blocks=1, num_discriminator_levels=1),
    sampling=SamplingConfig(num_steps=4, guidance_scale=1.0),
)
V_PREDICTION = DiffusionConfig(prediction="v", zero_terminal_snr=True)


def network(config=TINY, *, seed=0, size=0.02) -> Checkpoint:
    """Random weights, those of the branches that start at zero too."""
    torch.manual_seed(seed)
    model = build(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(size * torch.randn_like(parameter))
    return Checkpoint(model=model.eval().requires_grad_(False), config=config, path=f"seed-{seed}")


def replace(config=TINY, *, sampling=None, **changes):
    return dataclasses.replace(config, sampling=dataclasses.replace(config.sampling, **(sampling or {})), **changes)


def translator(config=TINY, **options) -> Translator:
    return Translator(network(config), device="cpu", precision="fp32", **options)


def pictures(count=3):
    return np.random.default_rng(0).integers(0, 256, (count, 8, 8, 3), dtype=np.uint8)


def count_passes(translate: Translator) -> list[int]:
    """Grows by the number of images in each forward pass."""
    rows: list[int] = []
    translate.model.register_forward_hook(lambda module, args, output: rows.append(len(output)))
    return rows


def test_a_network_that_is_shown_structure_is_shown_it() -> None:
    """SDEdit still starts from the image itself."""
    translate, sources = translator(replace(shown="structure")), pictures(2)
    shown: list[torch.Tensor] = []
    translate.model.register_forward_pre_hook(lambda module, args: shown.append(args[2]))
    translate(sources, "night")
    assert torch.equal(shown[0], conditioning.structure(images.to_tensor(sources)))
    plain = translator(replace(sampling={"start": "sdedit", "strength": 0.01, "num_steps": 1000}))
    near = translator(replace(shown="structure", sampling={"start": "sdedit", "strength": 0.01, "num_steps": 1000}))
    for each in (plain, near):
        assert np.abs(each(sources, "night").astype(int) - sources).mean() < 12


# -- options --------------------------------------------------------------------------------------------------------


def test_the_defaults_are_ddim_over_trailing_steps():
    """Put together by hand from the parts."""
    translate, sources = translator(), pictures(2)
    condition = images.to_tensor(sources)
    generators = [seeded(7, images.content_hash(picture)) for picture in sources]
    with torch.no_grad():
        x_0 = samplers.ddim(
            guidance.classifier_free(
                translate.model, condition, torch.tensor([1, 1]), num_domains=2, guidance_scale=1.0
            ),
            draw_noise(generators, condition),
            timesteps=torch.tensor([999, 749, 499, 249]),
            alphas_cumprod=translate.alphas_cumprod,
            prediction="eps",
            generators=generators,
        )
    assert np.array_equal(translate(sources, "night", seed=7), images.to_uint8(x_0))


def test_a_network_with_a_source_mask_is_guided_in_what_it_draws():
    unet = dataclasses.replace(TINY.unet, source_mask=True)
    config = replace(unet=unet, diffusion=DiffusionConfig(prediction="x_0"))
    translate, sources = translator(config), pictures(2)
    condition, found = images.to_tensor(sources), []
    for source_mask in (True, False):
        with torch.no_grad():
            guided = guidance.classifier_free(
                translate.model,
                condition,
                torch.tensor([1, 1]),
                num_domains=2,
                guidance_scale=3.0,
                source_mask=source_mask,
            )
            generators = [seeded(7, images.content_hash(picture)) for picture in sources]
            x_0 = samplers.ddim(
                guided,
                draw_noise(generators, condition),
                timesteps=torch.tensor([999, 749, 499, 249]),
                alphas_cumprod=translate.alphas_cumprod,
                prediction="x_0",
                generators=generators,
            )
        found.append(images.to_uint8(x_0))
    result = translate(sources, "night", seed=7, guidance_scale=3.0)
    assert np.array_equal(result, found[0])
    assert not np.array_equal(result, found[1])


@pytest.mark.parametrize(
    "overrides",
    [
        {"sampler": "ddpm"},
        {"sampler": "dpm_solver"},
        {"num_steps": 7},
        {"spacing": "leading"},
        {"spacing": "linspace"},
        {"eta": 0.5},
        {"guidance_scale": 3.0},
        {"domain_guidance_scale": 3.0},
        {"guidance_scale": 3.0, "guidance_interval": [0.0, 0.5]},
        {"guidance_scale": 3.0, "guidance_rescale": 0.7},
        {"start": "sdedit", "strength": 0.5},
        {"start": "ddib"},
    ],
    ids=str,
)
def test_every_option_reaches_the_result(overrides):
    translate, sources = translator(), pictures()
    result = translate(sources, "night", **overrides)
    fewer = {name: value for name, value in overrides.items() if name == "guidance_scale" and len(overrides) > 1}
    assert not np.array_equal(result, translate(sources, "night", **fewer))
    as_default = translator(replace(sampling={k: tuple(v) if isinstance(v, list) else v for k, v in overrides.items()}))
    assert np.array_equal(result, as_default(sources, "night"))


def test_none_is_the_default():
    sampling = translator().options(sampler=None, num_steps=None, guidance_scale=None, strength=None)
    assert sampling == TINY.sampling
    assert translator().options(num_steps=9).num_steps == 9


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        ({"num_stepz": 5}, "num_stepz.*num_steps"),
        ({"num_stepz": None}, "num_stepz.*num_steps"),
        ({"num_steps": 0}, "num-steps is 0"),
        ({"num_steps": 1001}, "num-steps is 1001"),
        ({"num_steps": "many"}, "num_steps is 'many'"),
        ({"sampler": "euler"}, "sampler is 'euler'"),
        ({"spacing": "karras"}, "spacing is 'karras'"),
        ({"eta": 0.5, "sampler": "ddpm"}, "eta has no effect"),
        ({"strength": 0.5}, "strength has no effect"),
        ({"start": "ddib", "sampler": "ddpm"}, "ddib"),
        ({"start": "residual", "eta": 0.5}, "residual has steps of its own"),
        ({"start": "flowedit", "sampler": "dpm_solver"}, "flowedit has steps of its own"),
        ({"start": "flowedit", "strength": 0.1}, "strength is 0.1: none of the 4 steps is left"),
        ({"start": "sdedit", "strength": 0.1}, "strength is 0.1: none of the 4 steps is left; give at least 0.25"),
        ({"source_domain": "day"}, "source_domain has no effect"),
        ({"start": "ddib", "source_domain": "dusk"}, "unknown domain 'dusk'"),
    ],
    ids=str,
)
def test_options_that_cannot_work_are_refused_by_name(overrides, named):
    with pytest.raises(InputError, match=named) as raised:
        translator()(pictures(), "night", **overrides)
    assert "\n" not in str(raised.value)


def test_unknown_domains_are_refused():
    with pytest.raises(InputError, match=r"unknown domain 'nihgt' .*'night'"):
        translator()(pictures(), "nihgt")
    with pytest.raises(InputError, match="not trained to produce 'day', only night"):
        translator(replace(target_domains=("night",)))(pictures(), "day")


def test_no_images_give_no_images():
    assert translator()(pictures(0), "night").shape == (0, 8, 8, 3)


@pytest.mark.parametrize(
    ("config", "sampling", "named"),
    [
        ({}, {"start": "sdedit", "strength": 0.1}, "strength is 0.1: none of the 4 steps is left"),
        ({}, {"start": "sdedit", "strength": 0.01, "num_steps": 50, "spacing": "trailing"}, "none of the 50 steps"),
        ({"diffusion": V_PREDICTION}, {"start": "ddib", "num_steps": 1}, "one step from pure noise cannot be inverted"),
        ({"target_domains": ("night",)}, {"start": "ddib"}, "not trained to produce 'day'"),
        ({"domains": ("day", "dusk", "night")}, {"start": "ddib"}, "on any of the sides day, dusk"),
        ({"target_domains": ("day",)}, {}, "not trained to produce 'night'"),
        ({"domains": ("day", "dusk")}, {}, "unknown domain 'night'"),
        ({}, {"num_steps": 1001}, "num-steps is 1001"),
        ({"shown": "nothing"}, {}, "shown nothing of the source.*take start flowedit"),
        ({"shown": "nothing"}, {"start": "flowedit", "strength": 0.5}, ""),
        ({"domains": ("day", "dusk", "night")}, {"start": "flowedit"}, "on any of the sides day, dusk"),
        ({}, {"start": "sdedit", "strength": 0.01, "num_steps": 1000}, ""),
        ({}, {"start": "sdedit", "strength": 0.01, "num_steps": 50, "spacing": "leading"}, ""),
        ({"diffusion": V_PREDICTION}, {"start": "ddib", "num_steps": 2}, ""),
    ],
    ids=str,
)
def test_what_sampling_would_refuse_is_known_before_it(config, sampling, named):
    """Without a network; and the network agrees."""
    config = replace(**config)
    wanted = dataclasses.replace(config.sampling, **sampling)
    if not named:
        check_sampling(config, wanted, "night")
        return
    for refuse in (
        lambda: check_sampling(config, wanted, "night"),
        lambda: translator(config)(pictures(1), "night", **sampling),
    ):
        with pytest.raises(InputError, match=named):
            refuse()


# -- images in and out ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P", "1", "CMYK", "YCbCr", "HSV", "I;16", "F", "PA"])
def test_pillow_images_are_prepared_as_files_are(mode):
    photo = Image.fromarray(np.random.default_rng(1).integers(0, 256, (30, 20, 3), np.uint8))
    if mode == "I;16":
        photo = Image.fromarray(np.asarray(photo.convert("L")).astype(np.uint16) * 257)
    elif mode == "F":
        photo = Image.fromarray(np.asarray(photo.convert("L")).astype(np.float32) / 255)
    else:
        photo = photo.convert("RGBA" if mode == "PA" else mode)
        photo = photo.convert("PA") if mode == "PA" else photo
    translate = translator()
    upright = photo.convert("RGB") if mode not in ("I;16", "F") else photo
    file = io.BytesIO()
    upright.save(file, "TIFF")
    right = translate(images.read_square(file.getvalue(), 8)[None], "night")
    found = translate([photo], "night")
    assert found.shape == (1, 8, 8, 3)
    assert np.abs(found.astype(int) - right).max() <= 12  # YCbCr, CMYK and HSV have roundings of their own


def test_a_pillow_image_is_turned_upright_and_keeps_its_profile():
    photo = Image.fromarray(np.random.default_rng(1).integers(0, 256, (30, 20, 3), np.uint8))
    translate, exif = translator(), Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    turned, file = photo.transpose(Image.Transpose.ROTATE_90), io.BytesIO()
    turned.save(file, "PNG", exif=exif)
    opened = Image.open(io.BytesIO(file.getvalue()))
    assert np.array_equal(translate([opened, photo], "night")[0], translate([photo], "night")[0])


@pytest.mark.parametrize(
    ("given", "named"),
    [
        (np.zeros((1, 8, 8, 3)), "images are float64 1 x 8 x 8 x 3; give uint8"),
        (np.zeros((8, 8, 3), np.uint8), "images are uint8 8 x 8 x 3"),
        (np.zeros((1, 3, 8, 8), np.uint8), "images are uint8 1 x 3 x 8 x 8"),
        (["photo.jpg"], "an image is a str"),
    ],
    ids=["float", "one", "channels-first", "name"],
)
def test_what_is_no_image_is_refused(given, named, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as it is outside of the tests
    with pytest.raises(InputError, match=named):
        translator()(given, "night")


def test_no_values_are_no_image():
    """Neither black squares nor the end of the other images."""
    translate, sources = translator(), pictures(3)
    alone = translate(sources[1:2], "night")
    translate.model.register_forward_hook(
        lambda module, args, output: torch.where(args[2].sum((1, 2, 3), keepdim=True) == broken, torch.nan, output)
    )
    broken = images.to_tensor(sources)[0].sum()
    made = translate.attempt(sources, "night")
    assert made.finite.tolist() == [False, True, True]
    assert np.abs(made.images[1:2].astype(int) - alone).max() <= 1
    with pytest.raises(InputError, match="images 0 of the batch: the network gave values that are not finite numbers"):
        translate(sources, "night")


@pytest.mark.parametrize(
    ("overrides", "steps"),
    [
        ({}, 4),
        ({"start": "sdedit", "strength": 0.5}, 2),
        ({"start": "ddib"}, 4),
        ({"start": "flowedit"}, 4),
        ({"sampler": "dpm_solver"}, 4),
    ],
    ids=str,
)
def test_progress_is_told_step_by_step(overrides, steps):
    told = []
    translator()(pictures(1), "night", progress=lambda done, total: told.append((done, total)), **overrides)
    assert told == [(done, steps) for done in range(1, steps + 1)]


# -- what a result depends on ---------------------------------------------------------------------------------------

WAYS = pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"sampler": "ddpm"},
        {"sampler": "dpm_solver"},
        {"eta": 0.7},
        {"start": "sdedit", "strength": 0.5},
        {"start": "ddib"},
        {"start": "residual", "strength": 0.5},
        {"start": "flowedit", "strength": 0.5, "guidance_scale": 2.0},
        {"guidance_scale": 2.0, "domain_guidance_scale": 3.0, "guidance_rescale": 0.5, "guidance_interval": [0.2, 0.9]},
    ],
    ids=str,
)


@WAYS
def test_a_images_result_does_not_depend_on_its_batch(overrides):
    translate, sources = translator(), pictures()
    together = translate(sources, "night", **overrides).astype(int)
    alone = np.concatenate([translate(sources[i : i + 1], "night", **overrides) for i in range(3)])
    assert np.abs(together - alone).max() <= 1


@WAYS
def test_the_same_call_gives_the_same_result(overrides):
    translate, sources = translator(), pictures()
    assert np.array_equal(translate(sources, "night", **overrides), translate(sources, "night", **overrides))


@WAYS
def test_the_seed_matters_where_noise_is_drawn(overrides):
    translate, sources = translator(), pictures()
    results = [translate(sources, "night", seed=seed, **overrides) for seed in (0, 1)]
    assert np.array_equal(*results) == (overrides.get("start") in ("ddib", "residual"))


@pytest.mark.parametrize("sampler", samplers.SAMPLERS)
@pytest.mark.parametrize("spacing", samplers.SPACINGS)
def test_a_network_for_zero_terminal_snr_works_with_everything(sampler, spacing):
    translate = translator(replace(diffusion=V_PREDICTION))
    result = translate(pictures(), "night", sampler=sampler, spacing=spacing, guidance_scale=2.0)
    assert len({picture.tobytes() for picture in result}) == 3


# -- cost -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "passes"),
    [
        ({}, [3] * 4),
        ({"guidance_scale": 0.0}, [3] * 4),
        ({"guidance_scale": 2.0}, [6] * 4),
        ({"guidance_scale": 2.0, "domain_guidance_scale": 3.0}, [9] * 4),
        ({"guidance_scale": 2.0, "guidance_interval": [0.3, 0.8]}, [3, 6, 6, 3]),  # shares 1, 0.75, 0.5, 0.25
        ({"start": "sdedit", "strength": 0.5, "sampler": "dpm_solver"}, [3, 3]),
        ({"start": "ddib"}, [3] * 4 * 3 + [3] * 4),
        ({"start": "residual", "strength": 0.5}, [3] * 2 * 3 + [6] * 2),
        ({"start": "flowedit", "strength": 0.75}, [6] * 3),
        ({"start": "flowedit", "guidance_scale": 2.0}, [12] * 4),
    ],
    ids=str,
)
def test_passes_through_the_network(overrides, passes):
    translate = translator()
    rows = count_passes(translate)
    translate(pictures(), "night", **overrides)
    assert rows == passes


# -- starts ---------------------------------------------------------------------------------------------------------


def test_sdedit_starts_from_the_noised_source():
    translate, sources, shown = translator(), pictures(2), []
    translate.model.register_forward_pre_hook(lambda module, args: shown.append(args[:2]))
    translate(sources, "night", start="sdedit", strength=0.5, seed=3)
    condition = images.to_tensor(sources)
    noise = draw_noise([seeded(3, images.content_hash(picture)) for picture in sources], condition)
    x_t, t = shown[0]
    assert [step[1].tolist() for step in shown] == [[499, 499], [249, 249]]
    torch.testing.assert_close(x_t, q_sample(condition, t, noise, translate.alphas_cumprod))


@pytest.mark.parametrize("diffusion", [DiffusionConfig(), V_PREDICTION], ids=["eps", "v"])
def test_ddib_to_the_images_own_side_is_the_image(diffusion):
    """There and back through the same labels; through others it is another image."""
    translate, sources = translator(replace(diffusion=diffusion)), pictures(1)
    if diffusion.prediction == "eps":  # as a trained network: at the noisy end eps is x_t, or inversion is hopeless
        with torch.no_grad():
            translate.model.shortcut.weight.zero_()
            translate.model.shortcut.bias.copy_(torch.tensor([1.0, 1, 1, 0, 0, 0]))
    back = translate(sources, "day", start="ddib", source_domain="day", num_steps=50).astype(int)
    assert np.abs(back - sources).max() <= 2
    assert np.abs(translate(sources, "night", start="ddib", num_steps=10).astype(int) - sources).max() > 2


def test_ddib_shows_the_network_no_image_and_the_right_labels():
    translate, seen = translator(), []
    translate.model.register_forward_pre_hook(
        lambda module, args: seen.append((args[2].abs().max().item(), *args[3].tolist()))
    )
    translate(pictures(1), "night", start="ddib")
    assert seen == [(0.0, 0)] * 12 + [(0.0, 1)] * 4


@pytest.mark.parametrize("start", ["residual", "flowedit"])
def test_an_edit_shows_the_network_no_image_and_both_labels(start):
    translate, seen = translator(), []
    translate.model.register_forward_pre_hook(lambda module, args: seen.append((args[2].abs().max().item(), args[3])))
    translate(pictures(1), "night", start=start, guidance_scale=2.0)
    assert {shown for shown, _ in seen} == {0.0}
    assert [labels.tolist() for _, labels in seen][-4:] == [[2, 2, 0, 1]] * 4  # no domain, its own and the wanted one


def test_a_source_mask_keeps_nothing_of_what_is_not_shown():
    """An edit is guided wherever it draws, which is everywhere: not by 1 - m as where the source is shown."""
    unet = dataclasses.replace(TINY.unet, source_mask=True)
    translate = translator(replace(unet=unet, diffusion=DiffusionConfig(prediction="x_0")))
    masks = []
    translate.model.register_forward_pre_hook(
        lambda module, args, options: masks.append(options.get("show_mask")), with_kwargs=True
    )
    translate(pictures(1), "night", start="flowedit", guidance_scale=3.0)
    assert {*masks} == {None}
    translate(pictures(1), "night", guidance_scale=3.0)
    assert masks[-1] is True


def test_an_edit_to_the_images_own_side_is_the_image():
    translate, sources = translator(), pictures()
    for start in ("residual", "flowedit"):
        assert np.array_equal(translate(sources, "day", start=start, source_domain="day", strength=0.5), sources)


def test_ddib_must_know_the_images_side():
    three = replace(domains=("day", "dusk", "night"))
    with pytest.raises(InputError, match="day, dusk; give source_domain"):
        translator(three)(pictures(), "night", start="ddib")
    assert translator(three)(pictures(), "night", start="ddib", source_domain="dusk").shape == (3, 8, 8, 3)
    with pytest.raises(InputError, match="not trained to produce 'day'"):
        translator(replace(target_domains=("night",)))(pictures(), "night", start="ddib")


# -- previews, guide, GANs ------------------------------------------------------------------------------------------


@WAYS
def test_previews_end_in_the_result(overrides):
    seen = []
    result = translator()(pictures(), "night", callback=lambda done, shown: seen.append((done, shown)), **overrides)
    assert [done for done, _ in seen] == list(range(1, 3 if overrides.get("strength") else 5))
    assert all(shown.dtype == np.uint8 and shown.shape == result.shape for _, shown in seen)
    assert np.array_equal(seen[-1][1], result)


def test_a_guide_leads_away_from_itself():
    strong, weak = network(), network(seed=1)
    sources = pictures()
    one_step = {"num_steps": 1, "spacing": "leading"}  # x_0 is then linear in the prediction, and small

    def x_0(**options):
        return Translator(strong, device="cpu", precision="fp32", **options)(sources, "night", **one_step).astype(int)

    plain = x_0()
    assert np.array_equal(x_0(guide=strong, guide_scale=3.0), plain)
    assert np.array_equal(x_0(guide=weak, guide_scale=1.0), plain)
    only_weak = Translator(weak, device="cpu", precision="fp32")(sources, "night", **one_step)
    assert np.array_equal(x_0(guide=weak, guide_scale=0.0), only_weak)
    assert not np.array_equal(x_0(guide=weak, guide_scale=50.0), plain)


def test_a_guide_of_another_kind_is_refused_by_name():
    for changes, named in [
        ({"domains": ("night", "day")}, "its domains"),
        ({"image_size": 16}, "its image_size"),
        ({"diffusion": DiffusionConfig(prediction="v")}, "its diffusion.prediction is v, it must be eps"),
        ({"diffusion": DiffusionConfig(schedule="cosine")}, "its diffusion.schedule"),
        ({"method": "pix2pix"}, "its method is pix2pix"),
    ]:
        with pytest.raises(InputError, match=f"guide seed-0: {named}"):
            translator(guide=network(replace(**changes)))
    with pytest.raises(InputError, match="no effect on pix2pix"):
        translator(replace(method="pix2pix"), guide=network())


def classifier(**changes) -> AttributeClassifier:
    torch.manual_seed(0)
    options = {"kind": "attributes", "image_size": 8, "widths": (8, 16), "attributes": ("night",), "noise_aware": True}
    net = AttributeClassifier(EncoderConfig(**{**options, **changes}))
    torch.nn.init.normal_(net.head.weight)
    return net.eval().requires_grad_(False)


def identity_encoder() -> IdentityEncoder:
    torch.manual_seed(0)
    config = EncoderConfig(kind="identity", image_size=8, widths=(8, 16), embedding_channels=4)
    return IdentityEncoder(config).eval().requires_grad_(False)


def test_a_classifier_leads_to_the_wanted_domain():
    """One step of small scale raises log p of whichever side is wanted, by the wanted side's own attribute."""
    judge, sources = classifier(), pictures(8)
    t = torch.zeros(8, dtype=torch.int64)

    def log_p(domain, **options):
        results = translator(**options)(sources, domain, num_steps=8)
        return judge.log_prob("night", domain == "night", images.to_tensor(results), t).mean()

    for domain in ("day", "night"):
        plain = log_p(domain)
        weakly, strongly = (log_p(domain, classifier=judge, classifier_scale=scale) for scale in (2.0, 20.0))
        assert plain < weakly < strongly


def test_of_several_domains_each_is_asked_for_by_its_own_attribute():
    config = replace(domains=("a", "b", "c"))
    judge = classifier(attributes=("c", "a", "b"))
    t = torch.zeros(3, dtype=torch.int64)
    for domain in config.domains:
        plain = translator(config)(pictures(), domain)
        led = translator(config, classifier=judge, classifier_scale=20.0)(pictures(), domain)
        before, after = (judge.log_prob(domain, True, images.to_tensor(each), t).mean() for each in (plain, led))
        assert after > before


def test_an_identity_encoder_leads_to_the_source():
    net, sources = identity_encoder(), pictures(8)

    def cosine(**options):
        results = translator(**options)(sources, "night", num_steps=8)
        return (net(images.to_tensor(results)) * net(images.to_tensor(sources))).sum(1).mean()

    led = [cosine(identity_encoder=net, identity_scale=scale) for scale in (2.0, 9.0)]
    assert cosine() < led[0] < led[1]


def test_guides_are_the_librarys_guidance_put_together():
    """Over classifier-free guidance, the classifier's first, and not outside of the interval."""
    judge, net, sources = classifier(), identity_encoder(), pictures(2)
    translate = translator(classifier=judge, classifier_scale=3.0, identity_encoder=net, identity_scale=2.0)
    interval = (0.3, 0.8)
    found = translate(sources, "night", seed=7, guidance_scale=2.0, guidance_interval=interval)
    condition, labels = images.to_tensor(sources), torch.tensor([1, 1])
    chain = {"prediction": "eps", "alphas_cumprod": translate.alphas_cumprod}
    cfg = {"num_domains": 2, "guidance_scale": 2.0}
    with torch.no_grad():
        guided = guidance.classifier_free(translate.model, condition, labels, **cfg)
        plain = guidance.classifier_free(translate.model, condition, labels, **{**cfg, "guidance_scale": 1.0})
        guided = guidance.classifier_guidance(guided, lambda x, t: judge.log_prob("night", True, x, t), 3.0, **chain)
        guided = guidance.identity_guidance(guided, net, condition, 2.0, **chain)
        generators = [seeded(7, images.content_hash(picture)) for picture in sources]
        x_0 = samplers.ddim(
            guidance.limited(guided, plain, interval, 1000),
            draw_noise(generators, condition),
            timesteps=samplers.SPACINGS["trailing"](1000, 4),
            generators=generators,
            **chain,
        )
    assert np.array_equal(found, images.to_uint8(x_0))


def test_a_guided_result_does_not_depend_on_its_batch():
    translate = translator(
        classifier=classifier(), classifier_scale=5.0, identity_encoder=identity_encoder(), identity_scale=5.0
    )
    together = translate(pictures(), "night").astype(int)
    alone = np.concatenate([translate(picture[None], "night") for picture in pictures()])
    assert np.abs(together - alone).max() <= 1


def test_guides_work_in_bf16():
    judge = classifier()
    translate = Translator(network(), device="cpu", precision="bf16", classifier=judge, classifier_scale=20.0)
    exact = translator(classifier=judge, classifier_scale=20.0)
    assert np.abs(translate(pictures(), "night").astype(int) - exact(pictures(), "night")).mean() < 3


def test_guides_that_cannot_lead_are_refused_by_name():
    for options, named in [
        ({"classifier": classifier(noise_aware=False)}, "knows clean images only"),
        ({"classifier": classifier(attributes=("Smiling",))}, "does not know night, only Smiling"),
        ({"classifier": classifier(diffusion=DiffusionConfig(num_timesteps=500))}, "num_timesteps is 500, it must be"),
        ({"classifier": classifier(diffusion=DiffusionConfig(schedule="cosine"))}, "diffusion.schedule is cosine"),
        ({"classifier": classifier(), "classifier_scale": 0.0}, "classifier guidance: its scale is 0"),
        ({"identity_encoder": identity_encoder(), "identity_scale": -1.0}, "identity guidance: its scale is -1"),
    ]:
        with pytest.raises(InputError, match=named):
            translator(**options)
    with pytest.raises(InputError, match="no effect on pix2pix"):
        translator(replace(method="pix2pix"), identity_encoder=identity_encoder())
    with pytest.raises(InputError, match="no effect with one domain, day"):
        translator(replace(domains=("day",)), classifier=classifier())
    with pytest.raises(InputError, match="identity guidance does not go with"):
        translator(identity_encoder=identity_encoder()).options(start="ddib")


@pytest.mark.parametrize("method", ["pix2pix", "cyclegan"])
def test_a_gan_draws_in_one_pass(method):
    translate, sources = translator(replace(method=method)), pictures()
    with torch.no_grad():
        expected = images.to_uint8(translate.model(images.to_tensor(sources), torch.ones(3, dtype=torch.int64)))
    rows = count_passes(translate)
    assert np.array_equal(translate(sources, "night", seed=5), expected)
    assert rows == [3]


def test_sampling_options_are_refused_for_a_gan():
    translate = translator(replace(method="pix2pix"))
    with pytest.raises(InputError, match="num-steps: no effect on pix2pix"):
        translate(pictures(), "night", num_steps=9, guidance_scale=1.0)
    # What callers hand on without having been asked, the checkpoint's own values, is no mistake.
    assert translate.options(num_steps=4, sampler="ddim") == TINY.sampling


# -- the documents --------------------------------------------------------------------------------------------------


def test_the_documents_library_example_runs():
    text = (Path(__file__).parents[1] / "docs" / "model.md").read_text()
    examples = [block.split("```")[0] for block in text.split("```python\n")[1:]]
    example = next(block for block in examples if "pairs" in block)
    pairs = [torch.rand(2, 2, 3, 32, 32, generator=seeded("pairs")) * 2 - 1]
    found = {"pairs": [tuple(pair) for pair in pairs]}
    exec(example, found)
    assert found["night"].shape == (2, 3, 32, 32)
    assert found["night"].isfinite().all()
