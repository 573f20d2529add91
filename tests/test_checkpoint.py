"""Checkpoints: what is written is what is read, and what is wrong is said in one line."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from ddpm_core import checkpoint, gan, images
from ddpm_core.config import FORMAT_VERSION, GANConfig, ModelConfig
from ddpm_core.errors import InputError
from ddpm_core.translator import Translator


def test_a_loaded_checkpoint_is_the_saved_one(checkpoint_folder):
    first, second = checkpoint.load(checkpoint_folder), checkpoint.load(checkpoint_folder)
    assert first.config == second.config
    again = checkpoint.files(first.model.state_dict(), first.config)
    assert again["model.safetensors"] == Path(checkpoint_folder, "model.safetensors").read_bytes()
    assert json.loads(again["config.json"])["format_version"] == FORMAT_VERSION


def test_a_run_means_its_best_checkpoint_and_its_sampling(checkpoint_folder, tmp_path):
    shutil.copytree(checkpoint_folder, tmp_path / "checkpoints/step-00000002")
    best = {
        "checkpoint": "checkpoints/step-00000002",
        "guidance_scale": 2.5,
        "num_steps": 3,
        "sampler": "ddpm",
    }
    (tmp_path / "best.json").write_text(json.dumps(best))
    loaded = checkpoint.load(str(tmp_path))
    assert loaded.path.endswith("step-00000002")
    sampling = loaded.config.sampling
    assert (sampling.guidance_scale, sampling.num_steps, sampling.sampler) == (2.5, 3, "ddpm")


def test_a_sweep_may_mean_a_checkpoint_elsewhere_and_another_length_of_the_ema(checkpoint_folder, tmp_path):
    config = dataclasses.replace(
        checkpoint.read_config(checkpoint_folder),
        training={"optim": {"ema_sigma_rels": [0.05, 0.1]}, "ema_sigma_rel": 0.1},
    )
    state = checkpoint.load(checkpoint_folder).model.state_dict()
    other = {name: tensor + 1 for name, tensor in state.items()}
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for name, content in checkpoint.files(state, config, others={0.05: other}).items():
        (elsewhere / name).write_bytes(content)
    sweep = tmp_path / "sweep"
    sweep.mkdir()
    for ema, weights in ((0.05, other), (0.1, state)):
        best = {"checkpoint": str(elsewhere), "ema_sigma_rel": ema, "guidance_scale": 2.5}
        (sweep / "best.json").write_text(json.dumps(best))
        loaded = checkpoint.load(str(sweep))
        assert (loaded.path, loaded.ema) == (str(elsewhere), ema)
        assert loaded.config.sampling.guidance_scale == 2.5
        assert all(torch.equal(tensor, weights[name]) for name, tensor in loaded.model.state_dict().items())
    chosen = checkpoint.load(str(sweep), ema=0.05)  # the caller's word is the last
    assert all(torch.equal(tensor, other[name]) for name, tensor in chosen.model.state_dict().items())


@pytest.mark.parametrize("method", ["pix2pix", "cyclegan"])
def test_the_method_decides_the_network(tmp_path, method):
    config = ModelConfig(
        image_size=16,
        domains=("day", "night"),
        method=method,
        gan=GANConfig(channels=4, num_levels=2, num_res_blocks=1, num_discriminator_levels=1),
        training={"optim": {"ema_sigma_rels": [0.05, 0.1]}, "ema_sigma_rel": 0.1},
    )
    torch.manual_seed(0)
    best, other = checkpoint.build(config), checkpoint.build(config)
    for name, content in checkpoint.files(best.state_dict(), config, others={0.05: other.state_dict()}).items():
        (tmp_path / name).write_bytes(content)
    loaded = checkpoint.load(str(tmp_path))
    assert isinstance(loaded.model, gan.Generator)
    pictures = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), dtype=np.uint8)
    condition = images.to_tensor(pictures)
    for ema, network in ((None, best), (0.1, best), (0.05, other)):
        translate = Translator(checkpoint.load(str(tmp_path), ema=ema), precision="fp32")
        right = images.to_uint8(network(condition, torch.tensor([1, 1])).detach())
        assert np.array_equal(translate(pictures, "night", seed=3), right)
    with pytest.raises(InputError, match=r"holds no weights of EMA length 0\.2; there are 0\.05, 0\.1"):
        checkpoint.load(str(tmp_path), ema=0.2)
    (tmp_path / "ema-0.050.safetensors").unlink()
    with pytest.raises(InputError, match=r"ema-0\.050\.safetensors is missing"):
        checkpoint.load(str(tmp_path), ema=0.05)


def test_a_checkpoint_that_does_not_say_which_ema_it_holds(checkpoint_folder):
    with pytest.raises(InputError, match=r"EMA length 0\.1; this checkpoint does not say"):
        checkpoint.load(checkpoint_folder, ema=0.1)


def damage(folder, name, change):
    path = folder / name
    path.write_bytes(change(path.read_bytes()))


def edited(**changes):
    return lambda data: json.dumps({**json.loads(data), **changes}).encode()


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("config.json", lambda data: data[:40], "config.json is damaged"),
        ("config.json", edited(format_version=99), f"format version 99, this program reads version {FORMAT_VERSION}"),
        ("config.json", edited(format="diffusers"), "is not a ddpm-translate checkpoint's"),
        ("config.json", edited(colour="red"), "unknown field 'colour'"),
        ("config.json", edited(domains=["day", "night", "dusk"]), "the weights do not fit config.json"),
        ("model.safetensors", lambda data: data[:1000], "model.safetensors is damaged"),
        ("model.safetensors", lambda data: b"\x80\x04pickle", "model.safetensors is damaged"),
    ],
)
def test_damage_is_named_in_one_line(checkpoint_folder, tmp_path, name, change, message):
    shutil.copytree(checkpoint_folder, tmp_path, dirs_exist_ok=True)
    damage(tmp_path, name, change)
    with pytest.raises(InputError, match=message) as error:
        checkpoint.load(str(tmp_path))
    assert "\n" not in str(error.value)


def test_nothing_there(tmp_path):
    with pytest.raises(InputError, match="no checkpoint here"):
        checkpoint.load(str(tmp_path))


def test_half_a_checkpoint(checkpoint_folder, tmp_path):
    shutil.copy(f"{checkpoint_folder}/config.json", tmp_path)
    with pytest.raises(InputError, match=r"model\.safetensors is missing"):
        checkpoint.load(str(tmp_path))


@pytest.mark.parametrize("options", [{}, {"sampler": "ddpm", "num_steps": 3}, {"guidance_scale": 1.0}])
def test_a_translation_does_not_depend_on_its_batch(checkpoint_folder, options):
    translate = Translator(checkpoint.load(checkpoint_folder), precision="fp32")
    pictures = np.random.default_rng(0).integers(0, 256, (5, 16, 16, 3), dtype=np.uint8)
    together = translate(pictures, "night", **options)
    assert together.shape == pictures.shape
    assert together.dtype == np.uint8
    alone = np.concatenate([translate(pictures[i : i + 1], "night", **options) for i in range(5)])
    assert np.abs(together.astype(int) - alone).max() <= 1  # a rounding between kernels of different batch
    assert not np.array_equal(together, translate(pictures, "night", seed=1, **options))


def test_wrong_options_are_refused_by_name(checkpoint_folder):
    translate = Translator(checkpoint.load(checkpoint_folder))
    picture = np.zeros((1, 16, 16, 3), np.uint8)
    for options, message in (
        ({"domain": "nite"}, "did you mean 'night'"),
        ({"domain": "night", "num_steps": 0}, "num-steps is 0"),
        ({"domain": "night", "sampler": "euler"}, "must be one of ddpm, ddim"),
        ({"domain": "night", "guidance_scale": -1.0}, "guidance-scale is -1.0"),
    ):
        with pytest.raises(InputError, match=message):
            translate(picture, **options)
