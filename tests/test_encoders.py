"""Encoders and the losses that use them: exact values, no neighbour seen, and nets that learn what they are for."""

import dataclasses
import functools
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import S3Server
from PIL import Image

from ddpm_core import encoders, guidance, samplers, storage
from ddpm_core.config import DataCard, DiffusionConfig, EncoderNet, EncoderOptions, ModelConfig
from ddpm_core.diffusion import q_sample, seeded
from ddpm_core.encoders import AttributeClassifier, EncoderConfig, IdentityEncoder
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


def model_config(encoder: EncoderConfig, **facts) -> ModelConfig:
    """What a run that trains `encoder` is configured as."""
    options = {field.name: getattr(encoder, field.name) for field in dataclasses.fields(EncoderNet)}
    config = ModelConfig(method=encoder.kind, encoder=EncoderOptions(**options), data=DataCard(**facts))
    assert encoders.encoder_config(config) == dataclasses.replace(encoder, data=config.data)
    return config


def net_of(config: EncoderConfig) -> IdentityEncoder | AttributeClassifier:
    torch.manual_seed(0)
    return IdentityEncoder(config) if config.kind == "identity" else AttributeClassifier(config)


# -- the contrast -----------------------------------------------------------------------------------------------


def test_contrastive_loss_by_hand():
    """Ann at cosine 1 to herself, 0 to Bob, -1 to Bob; scale 2, margin 1/4, which her own image must win by."""
    embeddings = torch.tensor([[1.0, 0], [1, 0], [0, 1], [-1, 0]], dtype=torch.float64)
    loss = encoders.contrastive_loss(embeddings, torch.tensor([7, 7, 3, 3]), scale=2.0, margin=0.25)
    # logits of the others, the wanted one first
    logits = [(1.5, 0, -2), (1.5, 0, -2), (-0.5, 0, 0), (-0.5, -2, -2)]
    expected = [math.log(sum(map(math.exp, each))) - each[0] for each in logits]
    assert loss.tolist() == pytest.approx(expected, rel=1e-12)


def test_of_several_images_of_a_person_the_loss_is_the_mean():
    """Of unit vectors in any order; alone with the same person there is nothing to tell apart but the margin."""
    embeddings = F.normalize(torch.randn(6, 8, generator=seeded("contrast"), dtype=torch.float64), dim=1)
    people = [4, 9, 4, 4, 9, 4]
    loss = encoders.contrastive_loss(embeddings, torch.tensor(people), scale=16.0, margin=0.1)
    for i in range(6):
        others = [j for j in range(6) if j != i]
        logits = [16 * float(embeddings[i] @ embeddings[j]) - 1.6 * (people[i] == people[j]) for j in others]
        wanted = [place for place, j in enumerate(others) if people[j] == people[i]]
        found = F.cross_entropy(torch.tensor([logits] * len(wanted), dtype=torch.float64), torch.tensor(wanted))
        assert loss[i].item() == pytest.approx(found.item(), rel=1e-9)


# -- what else training and validation measure ------------------------------------------------------------------


def test_retrieval_by_hand():
    """Three images of two people, at right angles or alike: people who are the same are no rivals."""
    queries = torch.eye(3)
    partners = torch.tensor([[1.0, 0, 0], [0, 0, 1], [0, 0, 1]])
    people = torch.tensor([7, 7, 9])
    loss, first = encoders.retrieval(queries, partners, people, scale=2.0)
    # own cosine, the others' partners: 1 against (0); 0 against (0); 1 against (0, 1)
    expected = [math.log(1 + math.exp(-2)), math.log(2), math.log(2 + math.exp(-2))]
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    assert first.tolist() == [1, 0, 0]  # as near as another person's is not found


def test_retrieval_is_each_querys_own_however_many_there_are():
    queries, partners = F.normalize(torch.randn(2, 2100, 3, generator=seeded("retrieval")), dim=2)
    people = torch.arange(2100) // 3
    loss, first = encoders.retrieval(queries, partners, people, scale=16.0)
    for i in (0, 1023, 1024, 2099):
        rivals = [16 * queries[i] @ partners[j] for j in range(2100) if j // 3 != i // 3]
        own = 16 * queries[i] @ partners[i]
        assert loss[i].item() == pytest.approx((torch.stack([own, *rivals]).logsumexp(0) - own).item(), rel=1e-4)
        assert first[i].item() == (own > max(rivals))


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.875])
def test_both_sides_weigh_the_same_and_the_best_logit_is_still_that_of_the_rate(rate):
    """Of images that tell nothing: the loss is lowest, at log 2, where the sigmoid is the rate."""
    labels = (torch.arange(80)[:, None] < 80 * rate).long()
    logit = torch.logit(torch.tensor([rate])).requires_grad_()
    loss = encoders.balanced_loss(logit.expand(80, 1), labels, torch.tensor([rate]))
    torch.testing.assert_close(loss.mean(), torch.tensor(math.log(2)))
    assert loss[labels[:, 0] > 0].sum().item() == pytest.approx(loss[labels[:, 0] < 1].sum().item(), rel=1e-5)
    loss.mean().backward()
    assert logit.grad.item() == pytest.approx(0, abs=1e-7)


def test_an_untrained_classifier_starts_at_the_rates():
    config = model_config(ATTRIBUTES, attribute_rates=(0.1, 0.6))
    network = encoders.task(config).network
    with torch.no_grad():
        network.head.weight.zero_()
    torch.testing.assert_close(torch.sigmoid(network(pictures(2, 3, 16, 16))), torch.tensor([[0.1, 0.6]] * 2))


def test_what_validation_finds_of_a_classifier():
    """Logits of 2 and 0 for attributes that are there and not: cross-entropy and right or wrong, by hand."""
    task = encoders.task(model_config(ATTRIBUTES, attribute_rates=(0.5, 0.5)))
    with torch.no_grad():
        task.network.head.weight.zero_()
        task.network.head.bias.copy_(torch.tensor([2.0, 0.0]))
        images, labels = pictures(2, 3, 16, 16), torch.tensor([[1, 0], [0, 1]])
        measured = task.measured(task.network, images, images, labels)
    assert measured.shape == (2, task.num_measured)
    found = {name: values.tolist() for name, values in task.values(measured).items()}
    near, far = (math.log(1 + math.exp(-2)) + math.log(2)) / 2, (math.log(1 + math.exp(2)) + math.log(2)) / 2
    assert found.pop("loss") == pytest.approx([near, far], rel=1e-6)
    assert found == {"accuracy": [1, 0], "accuracy_square": [1, 0], "accuracy_red": [1, 0]}


def test_what_validation_finds_of_an_identity_encoder():
    """Whoever looks at single batches, all images are compared with all."""
    task = encoders.task(model_config(IDENTITY, num_people=4))
    images, partners = (pictures(6, 3, 16, 16, seed=name) for name in ("images", "partners"))
    labels = torch.tensor([0, 0, 1, 1, 2, 2])
    with torch.no_grad():
        of_batches = [
            task.measured(task.network, images[i:j], partners[i:j], labels[i:j, None]) for i, j in ((0, 1), (1, 6))
        ]
        found = task.values(torch.cat(of_batches))
        queries, gallery = task.network(images), task.network(partners)
    assert of_batches[0].shape == (1, task.num_measured)
    loss, first = encoders.retrieval(queries, gallery, labels, scale=16.0)
    torch.testing.assert_close(found["loss"], loss)
    assert found["rank_1"].tolist() == first.tolist()


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
        loss = identity_loss(x_0_pred, source, flat, t=T, alphas_cumprod=ABAR, unpaired=True)
        torch.testing.assert_close(loss, distance * (1 - ABAR[T].float()), rtol=1e-6, atol=1e-7)


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


def test_embeddings_are_unit_vectors_of_images_of_any_side():
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

    def test_no_image_sees_its_neighbour(self, config):
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


def test_a_noise_aware_net_listens_to_t_and_takes_clean_images_for_t_0():
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
    with pytest.raises(InputError, match="clean images only; train one with noise_aware"):
        net_of(ATTRIBUTES)(pictures(1, 3, 16, 16), torch.tensor([0]))


@pytest.mark.parametrize(
    ("config", "changes", "message"),
    [
        (IDENTITY, {"image_size": 0}, "encoder.image-size is 0"),
        (IDENTITY, {"embedding_channels": 0}, "encoder.embedding-channels is 0"),
        (IDENTITY, {"widths": ()}, "widths is"),
        (IDENTITY, {"crop_box": (0.5, 0.0, 0.5, 1.0)}, "encoder.crop-box is .*x0 < x1"),
        (IDENTITY, {"crop_box": (0.0, 0.0, 1.0)}, "encoder.crop-box is"),
        (IDENTITY, {"crop_box": (0.0, 0.0, 64.0, 64.0)}, "encoder.crop-box is"),
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


def trained(config: ModelConfig, images: np.ndarray, labels: np.ndarray, *, num_steps: int = 200) -> encoders.Encoder:
    """The network after some steps of AdamW on random batches, mirrored or not."""
    torch.manual_seed(0)
    task, x_0, labels = encoders.task(config), to_tensor(images), torch.from_numpy(labels).reshape(len(images), -1)
    optimizer = torch.optim.AdamW(task.parameters(), lr=3e-3, weight_decay=0.05)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, num_steps)

    def partners_of(rows: torch.Tensor) -> torch.Tensor:
        """Of each row any image with the same labels."""
        alike = (labels[rows, None] == labels[None]).all(2).float()
        return x_0[torch.multinomial(alike, 1)[:, 0]]

    for _ in range(num_steps):
        rows = torch.randint(len(images), (32,))
        x, t = torch.where(torch.rand(32, 1, 1, 1) < 0.5, x_0[rows], x_0[rows].flip(3)), None
        if config.encoder.noise_aware:
            t = torch.randint(len(ABAR), (32,))
            x = q_sample(x, t, torch.randn_like(x), ABAR)
        optimizer.zero_grad()
        task.losses(task(x, partners_of(rows) if config.method == "identity" else x, t), labels[rows]).mean().backward()
        optimizer.step()
        decay.step()
    return task.network.eval().requires_grad_(False)


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
    """Grey noise of 16 px; `square` (one image in six): a white square somewhere. `red` (one in two): a red cast."""
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


def test_the_identity_encoder_finds_people_again_in_new_images():
    images, labels = draw_people(40, seed=1)
    gallery, names = draw_people(1, seed=2)
    queries, truth = draw_people(25, seed=3)
    encoder = trained(model_config(IDENTITY, num_people=8), images, labels)
    found = rank_1(encoder(to_tensor(gallery)).numpy(), names, encoder(to_tensor(queries)).numpy(), truth)
    by_pixels = rank_1(gallery.reshape(8, -1), names, queries.reshape(200, -1), truth)
    assert found > 0.9 > 0.6 > by_pixels  # chance is 1/8


def balanced_accuracy(logits: torch.Tensor, attributes: np.ndarray, rates: np.ndarray) -> np.ndarray:
    """Mean of the shares found among those with and those without, at the threshold where both weigh the same."""
    said = torch.sigmoid(logits).numpy() > rates
    return np.array([[said[a > 0, i].mean(), 1 - said[a < 0, i].mean()] for i, a in enumerate(attributes.T)]).mean(1)


@pytest.mark.slow
def test_the_classifiers_learn_and_the_noise_aware_one_knows_what_it_cannot_see():
    images, attributes = draw_attributes(600, seed=1)
    test, truth = draw_attributes(400, seed=2)
    rates = (attributes > 0).mean(0)
    clean, noise_aware = (
        trained(model_config(config, attribute_rates=tuple(rates.tolist())), images, (attributes > 0).astype(np.int64))
        for config in (ATTRIBUTES, NOISE_AWARE)
    )
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
    # Of pure noise nothing can be known: the rate in the training images, though both kinds weighed the same.
    unseen = torch.sigmoid(logits[999]).numpy()
    np.testing.assert_allclose(unseen.mean(0), rates, atol=0.06)
    assert (unseen.std(0) < 0.1).all()
    # And of clean images, probabilities that are right on average.
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
        ("config.json", edited(crop_box=[1, 0, 0, 1]), "encoder.crop-box is"),
        ("config.json", edited(embedding_channels=8), "the weights do not fit config.json"),
        ("config.json", edited(widths=[16, 32, 32]), "the weights do not fit config.json"),
        ("config.json", edited(widths=[8] * 10**4), "stages of encoder.widths is 10000; at most 12 can be used"),
        ("config.json", edited(widths=[10**30]), "at most 65,536 can be used"),
        ("config.json", edited(image_size=10**30), "at most 8,192 can be used"),
        ("config.json", edited(crop_box=[0, 0, float("nan"), 1]), "crop_box\\[2\\] is nan; it must be a finite number"),
        ("config.json", lambda data: b"[" * 10**5, "nested too deeply"),
        ("model.safetensors", lambda data: data[:-4] + b"\0\0\xc0\x7f", "values that are not finite numbers"),
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


def test_a_run_stands_for_its_best_checkpoint(tmp_path):
    folder = tmp_path / "checkpoints/step-1"
    folder.mkdir(parents=True)
    write(folder, encoders.encoder_files(net_of(IDENTITY).state_dict(), IDENTITY))
    (tmp_path / "best.json").write_text('{"checkpoint": "checkpoints/step-1"}')
    assert encoders.load_encoder(str(tmp_path)).config == IDENTITY


@pytest.mark.parametrize(
    ("config", "told"),
    [
        (dataclasses.replace(IDENTITY, data=DataCard(num_people=1234)), "from 1,234 people"),
        (ATTRIBUTES, "whether they show: square, red. It learned from clean images"),
        (NOISE_AWARE, "at any noise of its chain"),
    ],
)
def test_the_card_says_what_it_is_and_how_it_may_be_used(config, told):
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, licence="research only"))
    card = encoders.encoder_files(net_of(config).state_dict(), config)["card.md"].decode()
    assert told in card
    assert "research only" in card


def test_what_is_missing_or_of_another_kind_is_named(tmp_path, checkpoint_folder):
    with pytest.raises(InputError, match="no encoder here"):
        encoders.load_encoder(str(tmp_path))
    with pytest.raises(InputError, match="is not an encoder's but a ddpm-translate checkpoint's"):
        encoders.load_encoder(checkpoint_folder)
    write(tmp_path, {"config.json": json.dumps({"format": "ddpm-translate", "method": "identity"}).encode()})
    with pytest.raises(InputError, match=r"a run that has no encoder yet .* the same jobs\.train command goes on"):
        encoders.load_encoder(str(tmp_path))
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


def test_files_may_lie_in_a_bucket(s3: S3Server) -> None:
    files = encoders.encoder_files(net_of(IDENTITY).state_dict(), IDENTITY)
    assert list(files)[-1] == "config.json"  # written last: a folder that has it is complete
    for name, content in files.items():
        storage.write_bytes(f"{s3.uri}/nets/a face/{name}", content)
    encoder = encoders.load_encoder(f"{s3.uri}/nets/a face")
    assert encoder.config == IDENTITY
