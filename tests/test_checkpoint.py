"""Checkpoints: what is written is what is read, and what is wrong is said in one line."""

import dataclasses
import functools
import json
import os
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


# -- a checkpoint of anyone's


def with_config(**fields):
    """`config.json` with other values; `unet__num_res_blocks` is one of `unet`'s."""

    def change(data):
        config = json.loads(data)
        for name, value in fields.items():
            *above, last = name.split("__")
            functools.reduce(dict.__getitem__, above, config)[last] = value
        return json.dumps(config).encode()

    return lambda data: {"config.json": change(data["config.json"])}


def with_text(more):
    """`config.json` with something more before its last brace."""
    return lambda data: {"config.json": data["config.json"].rstrip()[:-1] + more.encode() + b"}"}


def with_header(change, *, length=None):
    """`model.safetensors` with another header."""

    def files(data):
        weights = data["model.safetensors"]
        end = 8 + int.from_bytes(weights[:8], "little")
        header = json.loads(weights[8:end])
        changed = change(header)
        text = changed if isinstance(changed, bytes) else json.dumps(header if changed is None else changed).encode()
        return {"model.safetensors": (length or len(text)).to_bytes(8, "little") + text + weights[end:]}

    return files


def first_tensor(**fields):
    return with_header(lambda header: next(iter(header.values())).update(fields))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (with_config(unet__num_res_blocks=100_000), "num-res-blocks is 100000; at most 32 can be used"),
        (with_config(unet__num_res_blocks=10**30), "num-res-blocks is 1000"),
        (with_config(unet__num_res_blocks=True), "num_res_blocks is True; it must be int"),
        (with_config(unet__num_res_blocks="9" * 10**6), "it must be int"),
        (with_config(unet__model_channels=1_200_000), "model-channels is 1200000; at most 8,192"),
        (with_config(unet__model_channels=8192), "the weights do not fit config.json"),
        (with_config(unet__channel_mult=[1] * 10**4), "levels of unet.channel-mult is 10000; at most 12"),
        (with_config(unet__channel_mult=[1] * (10**4 + 1)), "has 10,001 values"),
        (with_config(unet__condition_channels=30), "condition-channels is 30; it must be a multiple of 8"),
        (with_config(unet__dropout=float("nan")), "dropout is nan; it must be a finite number"),
        (with_config(unet__dropout=-float("inf")), "dropout is -inf; it must be a finite number"),
        (with_config(unet__dropout=10**400), "it must be a finite number"),
        (with_config(unet__injection=[[]]), "injection[0] is []; it must be one of"),
        (with_config(unet=None), "unet must be an object"),
        (with_config(diffusion__num_timesteps=1e30), "num_timesteps is 1e+30; it must be int"),
        (with_config(diffusion__num_timesteps=10**30), "at most 1,000,000 can be used"),
        (with_config(image_size=2**70), "image_size is 1180591620717411303424; at most 8,192"),
        (with_config(method="pix2pix", gan__num_levels=2**40), "gan.num-levels is 1099511627776; at most 12"),
        (with_config(method="pix2pix", domains=[str(i) for i in range(999)]), "999 domains, each with a generator"),
        (with_config(method="cyclegan"), "the weights do not fit config.json"),
        (with_config(domains=["\x1b[31m", "b"]), "none of them a control one"),
        (with_config(domains=["x" * 10**6, "b"]), "is no name"),
        (with_config(domains=["\ud800", "b"]), "it holds half a character"),
        (with_config(training=5), "training is 5; it must be dict"),
        (with_config(data__landmarks=[0.5] * 10), "landmarks is"),
        (with_config(**{"x" * 10**6: 1}), "unknown field 'xxx"),
        (with_text(', "image_size": 16'), "a name comes twice"),
        (with_text(', "more": ' + "[" * 10**5 + "]" * 10**5), "nested too deeply"),
        (with_text(', "more": ' + "[" * 20 + "]" * 20), "nested too deeply"),
        (with_text(', "more": 1e400'), "unknown field"),
        (with_text(', "more": ' + "9" * 5000), "4300 digits"),
        (with_text(" " * 5 * 10**6), "has more than 4,194,304 bytes"),
        (with_header(lambda header: None, length=2**63), "says that its header has 9,223,372,036,854,775,808 bytes"),
        (with_header(lambda header: b"[" * 10**5), "its header cannot be read"),
        (with_header(lambda header: []), "its header cannot be read"),
        (first_tensor(shape=[2**62, 4]), "the weights do not fit config.json"),
        (first_tensor(shape=[-32, -1]), "the weights do not fit config.json"),
        (first_tensor(shape="ab"), "its header cannot be read"),
        (first_tensor(dtype="I64"), "its header cannot be read"),
        (first_tensor(data_offsets=[0, 10**12]), "is damaged"),
        (with_header(lambda header: header.update(more=next(iter(header.values())))), "'more' is too much"),
        (with_header(lambda header: header.pop(next(iter(header))) and None), "is missing"),
        (lambda data: {"model.safetensors": data["model.safetensors"] + b"x" * 99}, "by its header it has"),
        (lambda data: {"model.safetensors": data["model.safetensors"][:-4] + b"\0\0\xc0\x7f"}, "not finite numbers"),
        (lambda data: {"model.safetensors": data["model.safetensors"][:-4] + b"\0\0\x80\xff"}, "not finite numbers"),
    ],
)
def test_a_hostile_checkpoint_costs_one_line(checkpoint_folder, tmp_path, monkeypatch, change, message):
    """No memory is taken for a network that is not that of the file of weights."""
    taken = []
    to_empty = torch.nn.Module.to_empty
    monkeypatch.setattr(torch.nn.Module, "to_empty", lambda net, **to: taken.append(net) or to_empty(net, **to))
    there = {path.name: path.read_bytes() for path in Path(checkpoint_folder).iterdir()}
    for name, content in {**there, **change(there)}.items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError) as error:
        checkpoint.load(str(tmp_path))
    assert message in str(error.value)
    assert len(str(error.value).replace(str(tmp_path), "")) < 400
    assert not taken or "damaged" in message or "finite" in message


@pytest.mark.parametrize(
    ("best", "message"),
    [
        ('{"checkpoint": 5}', "names no checkpoint"),
        ('{"checkpoint": "c\\u0000"}', "a name that cannot be used"),
        ('{"checkpoint": "\\ud800"}', "not valid UTF-8"),
        ('{"checkpoint": "gs://bucket/x"}', "gs:// is not supported"),
        ('{"checkpoint": "c", "num_steps": 1e30}', "num_steps is 1e+30; it must be int"),
        ('{"checkpoint": "c", "guidance_scale": NaN}', "guidance_scale is nan; it must be a finite number"),
        ('{"checkpoint": "c", "ema_sigma_rel": {}}', "ema_sigma_rel is {}; it must be a number"),
        ("[" * 10**5, "nested too deeply"),
    ],
)
def test_a_hostile_best_json_costs_one_line(checkpoint_folder, tmp_path, best, message):
    shutil.copytree(checkpoint_folder, tmp_path / "c")
    (tmp_path / "best.json").write_text(best)
    with pytest.raises(InputError) as error:
        checkpoint.load(str(tmp_path))
    assert message in str(error.value)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "best.json"])
def test_what_is_no_file_is_not_waited_for(checkpoint_folder, tmp_path, name):
    shutil.copytree(checkpoint_folder, tmp_path, dirs_exist_ok=True)
    (tmp_path / name).unlink(missing_ok=True)
    os.mkfifo(tmp_path / name)
    with pytest.raises(InputError, match=f"{name} is not a file"):
        checkpoint.load(str(tmp_path))


def test_weights_of_half_precision_are_taken(checkpoint_folder, tmp_path):
    shutil.copytree(checkpoint_folder, tmp_path, dirs_exist_ok=True)
    whole = checkpoint.load(checkpoint_folder).model.state_dict()
    half = {name: tensor.bfloat16() for name, tensor in whole.items()}
    (tmp_path / "model.safetensors").write_bytes(checkpoint.serialised(half))
    found = checkpoint.load(str(tmp_path)).model.state_dict()
    assert all(torch.equal(tensor, half[name].float()) for name, tensor in found.items())
    assert all(found[name].stride() == tensor.stride() for name, tensor in whole.items())


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
