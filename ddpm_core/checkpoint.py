"""Checkpoints: a folder with `model.safetensors` (EMA weights), `config.json` and `card.md`.

Beside them lie the weights of the EMA's other lengths, `ema-0.050.safetensors`; `config.json` says under `training`
which were kept (`optim.ema_sigma_rels`) and which of them became `model.safetensors` (`ema_sigma_rel`).

A checkpoint may come from anyone. Nothing here unpickles anything; what is read before it is known to fit is small, and
no memory is taken for a network whose shapes are not those of the file of weights. Paths are local or s3:// URIs, as
`ddpm_core.storage` reads them.
"""

import dataclasses
import hashlib
import json
import math
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from ddpm_core import config as configs
from ddpm_core import storage
from ddpm_core.config import ModelConfig
from ddpm_core.errors import InputError
from ddpm_core.gan import Generator
from ddpm_core.unet import UNet

FORMAT, ENCODER_FORMAT = "ddpm-translate", "ddpm-translate-encoder"
FORMATS = {FORMAT: "a ddpm-translate checkpoint's", ENCODER_FORMAT: "an encoder's"}
"""What a `config.json` may be of, in words."""
MAX_JSON_BYTES, MAX_JSON_LEVELS = 4 * 2**20, 16
"""Longest and deepest `config.json` and `best.json`; ours have some kilobytes and four levels."""
MAX_HEADER_BYTES = 8 * 2**20
"""Longest header of a file of weights; 100 bytes a tensor are usual."""
ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
"""Numbers that weights may be stored as, by safetensors' names."""

M = TypeVar("M", bound=nn.Module)


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A network ready to sample from, with what is needed to prepare its inputs."""

    model: UNet | Generator
    """By the configuration's `method`."""
    config: ModelConfig
    path: str
    """The checkpoint's own folder (a run resolves to its best one)."""
    ema: float | None = None
    """The length of the EMA whose weights these are, where a run or the caller chose it."""
    fingerprint: str = ""
    """Hash of the file of weights, which tells it from another one at the same place."""


def build(config: ModelConfig) -> UNet | Generator:
    """The network that `config` describes, with fresh weights."""
    return UNet(config) if config.method == "diffusion" else Generator(config)


def files(
    state: dict[str, Tensor], config: ModelConfig, *, others: Mapping[float, dict[str, Tensor]] | None = None
) -> dict[str, bytes]:
    """A checkpoint as file name → bytes, for the caller to write where it likes.

    `others`: weights of the EMA's other lengths by their `sigma_rel`. `config.json` comes last: a folder that has it
    is complete.
    """
    meta = {"format": FORMAT, "format_version": configs.FORMAT_VERSION, **configs.to_dict(config)}
    return {
        "model.safetensors": serialised(state),
        **{ema_file(sigma_rel): serialised(other) for sigma_rel, other in (others or {}).items()},
        "card.md": card(config).encode(),
        "config.json": json.dumps(meta, indent=2).encode(),
    }


def serialised(state: dict[str, Tensor]) -> bytes:
    return safetensors.torch.save({name: tensor.detach().cpu().contiguous() for name, tensor in state.items()})


def ema_file(sigma_rel: float) -> str:
    return f"ema-{sigma_rel:.3f}.safetensors"


def resolve(path: str) -> tuple[str, dict[str, Any]]:
    """The checkpoint folder meant by `path` and its run's `best.json` ({} for a bare checkpoint).

    Raises:
        InputError: `path` holds neither a checkpoint nor a finished run.
    """
    path = path.rstrip("/")
    try:
        best = read_foreign_json(f"{path}/best.json")
    except FileNotFoundError:
        best = {}
    except storage.NOT_JSON as error:
        raise InputError(
            f"{path}/best.json is damaged ({error}); name a folder under {path}/checkpoints instead"
        ) from None
    if best:
        if not isinstance(best, dict) or not isinstance(best.get("checkpoint"), str):
            raise InputError(f"{path}/best.json names no checkpoint; name a folder under {path}/checkpoints instead")
        folder = best["checkpoint"]
        elsewhere = folder.startswith("/") or "://" in folder  # as sweeps of earlier versions have it
        return storage.absolute(folder, flag=f"{path}/best.json:") if elsewhere else f"{path}/{folder}", best
    return path, {}


def read_config(path: str) -> ModelConfig:
    """The configuration in a checkpoint folder.

    Raises:
        InputError: there is none, it is damaged, or it is of another version.
    """
    nothing = "no checkpoint here (no best.json, no config.json); give a run's folder or one of its checkpoints"
    meta = read_meta(path, FORMAT, configs.FORMAT_VERSION, nothing=nothing)
    config = configs.from_dict(ModelConfig, meta, where=f"{path}/config.json")
    configs.check(config)
    return config


def read_foreign_json(uri: str) -> Any:
    """The content of a JSON file that anyone may have written.

    Raises:
        FileNotFoundError: there is none.
        NOT_JSON: it is no JSON, says a thing twice, or is deeper than any of ours.
        InputError: it is longer than any of ours.
    """

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise json.JSONDecodeError("a name comes twice in one object", "", 0)
        return found

    def parse(content: bytes) -> Any:
        try:
            found = json.loads(content, object_pairs_hook=once)
        except RecursionError:
            raise json.JSONDecodeError("nested too deeply", "", 0) from None
        except ValueError as error:  # a number of more digits than Python takes
            raise error if isinstance(error, storage.NOT_JSON) else json.JSONDecodeError(str(error), "", 0) from None
        if _deeper(found, MAX_JSON_LEVELS):
            raise json.JSONDecodeError("nested too deeply", "", 0)
        return found

    if storage.num_bytes(uri) > MAX_JSON_BYTES:
        raise InputError(f"{uri} has more than {MAX_JSON_BYTES:,} bytes; it is not what its name says")
    return storage.read_parsed(uri, parse)


def _deeper(value: Any, levels: int) -> bool:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return levels == 0 or any(_deeper(each, levels - 1) for each in inner)


def read_meta(path: str, wanted: str, version: int, *, nothing: str) -> dict[str, Any]:
    """The fields of the `config.json` of a checkpoint or an encoder, without its format and version.

    Raises:
        InputError: there is none (`nothing` says so), it is damaged, or of another format or version.
    """
    try:
        meta = read_foreign_json(f"{path}/config.json")
    except FileNotFoundError:
        raise InputError(f"{path}: {nothing}") from None
    except storage.NOT_JSON as error:
        raise InputError(f"{path}/config.json is damaged: {error}") from None
    found = meta.pop("format", None) if isinstance(meta, dict) else None
    if found == FORMAT != wanted and meta.get("method") in configs.ENCODERS:
        raise InputError(
            f"{path}: a run that has no encoder yet (no best.json: nothing was validated); the same jobs.train command "
            "goes on with it"
        )
    if found != wanted:
        instead = f" but {FORMATS[found]}" if found in FORMATS else ""
        raise InputError(f"{path}/config.json is not {FORMATS[wanted]}{instead}; give another folder")
    found_version = meta.pop("format_version", None)
    if found_version != version:
        raise InputError(
            f"{path}: format version {found_version}, this program reads version {version}: "
            "use the release that wrote it, or train again"
        )
    return meta


def load(path: str, *, ema: float | None = None) -> Checkpoint:
    """A checkpoint folder, or a run (its best checkpoint), as a network in eval mode on the CPU.

    A run's or a sweep's `best.json` overrides the sampling defaults. `ema` picks the weights averaged over another
    share of the run than what `best.json`, or else the checkpoint, takes for the best.

    Raises:
        InputError: nothing there, damaged files, another version, weights that do not fit the configuration, no
            weights of that `ema`.
    """
    folder, best = resolve(path)
    config = read_config(folder)
    if config.method in configs.ENCODERS:
        raise InputError(f"{path} is an encoder's run; it translates no images")
    chosen = {f.name: best[f.name] for f in dataclasses.fields(config.sampling) if best.get(f.name) is not None}
    sampling = configs.from_dict(
        configs.SamplingConfig, {**configs.to_dict(config.sampling), **chosen}, where=f"{path}/best.json"
    )
    config = dataclasses.replace(config, sampling=sampling)
    configs.check(config)
    ema = best.get("ema_sigma_rel") if ema is None else ema
    if not isinstance(ema, float | int | None):
        raise InputError(f"{path}/best.json: ema_sigma_rel is {str(ema)[:100]}; it must be a number")
    file = weights_file(folder, config, ema)
    model, fingerprint = load_weights(lambda: build(config), folder, file)
    model.eval().requires_grad_(False)
    return Checkpoint(model=model, config=config, path=folder, ema=ema, fingerprint=fingerprint)


def load_weights(make: Callable[[], M], folder: str, file: str) -> tuple[M, str]:
    """The network that `make` builds, filled from a safetensors file, on the CPU; and the file's fingerprint.

    Raises:
        InputError: the file is missing or damaged, holds another network's weights, or some that are not numbers.
    """
    uri = f"{folder}/{file}"
    try:
        size = storage.num_bytes(uri)
        shapes, num_bytes = read_header(uri)
        with torch.device("meta"):  # shapes without memory
            network = make()
        _check_fits(folder, {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}, shapes)
        if size != num_bytes:
            raise InputError(f"{uri} is damaged: by its header it has {num_bytes:,} bytes, it has {size:,}")
        content = storage.read_bytes(uri)
        network.to_empty(device="cpu").load_state_dict(safetensors.torch.load(content))
    except FileNotFoundError:
        raise InputError(
            f"{folder}: {file} is missing; the folder is incomplete (a run has no best checkpoint before its first "
            "validation: the same jobs.train command goes on with it)"
        ) from None
    except safetensors.SafetensorError as error:
        raise InputError(f"{uri} is damaged: {error}") from None
    for name, tensor in network.state_dict().items():
        if not tensor.isfinite().all():
            raise InputError(
                f"{uri}: {name} holds values that are not finite numbers; take another checkpoint of the run, "
                "or train again with a lower learning rate"
            )
    return network, hashlib.blake2b(content, digest_size=8).hexdigest()


def read_header(uri: str) -> tuple[dict[str, tuple[int, ...]], int]:
    """Of a safetensors file each tensor's shape, and the bytes that the file must then have; reads its header only.

    Raises:
        FileNotFoundError: there is no such file.
        InputError: the header makes no sense, or tells of tensors that are no weights.
    """
    length = int.from_bytes(storage.read_bytes(uri, first=8), "little")
    if not 2 <= length <= MAX_HEADER_BYTES:
        raise InputError(f"{uri} is damaged: it says that its header has {length:,} bytes")
    shapes: dict[str, tuple[int, ...]] = {}
    num_bytes = 8 + length
    try:
        header = json.loads(storage.read_bytes(uri, first=8 + length)[8:])
        for name, tensor in header.items():
            if name != "__metadata__":
                shapes[name] = tuple(tensor["shape"])
                num_bytes += ITEM_BYTES[tensor["dtype"]] * math.prod(shapes[name])
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise InputError(f"{uri} is damaged: its header cannot be read ({error or type(error).__name__})") from None
    return shapes, num_bytes


def _check_fits(folder: str, wanted: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]]) -> None:
    def refuse(what: str) -> None:
        raise InputError(f"{folder}: the weights do not fit config.json: {what}")

    for name in {**wanted, **found}:
        if name not in found:
            refuse(f"{name} is missing")
        if name not in wanted:
            refuse(f"{name[:100]!r} is too much")
        if wanted[name] != found[name]:
            refuse(f"{name} is {_by(found[name])}, it must be {_by(wanted[name])}")


def _by(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))[:100] or "a single number"


def weights_file(folder: str, config: ModelConfig, ema: float | None) -> str:
    """The file with the weights of that `ema`.

    Raises:
        InputError: there is none; lists those there are.
    """
    best, optim = config.training.get("ema_sigma_rel"), config.training.get("optim")
    if ema is None or ema == best:
        return "model.safetensors"
    told = optim.get("ema_sigma_rels") if isinstance(optim, dict) and best is not None else None
    kept = [length for length in told if isinstance(length, float)] if isinstance(told, list) else []
    if ema not in kept:
        there = f"there are {', '.join(map(str, kept))}" if kept else "this checkpoint does not say which it holds"
        raise InputError(f"{folder} holds no weights of EMA length {ema}; {there}")
    return ema_file(ema)


def card(config: ModelConfig) -> str:
    """The checkpoint's card: what it is, on what it was trained, what it may be used for."""
    sampling = config.sampling
    sides = ", ".join(config.target_domains or config.domains)
    kind = {"diffusion": "conditional DDPM", "pix2pix": "pix2pix generator", "cyclegan": "CycleGAN generator"}
    diffusion, origin = config.diffusion, config.origin
    begun = (
        "" if origin is None else f"| began with the weights of | {origin.checkpoint} (trained on {origin.data}) |\n"
    )
    how = f"""| prediction, schedule, loss | {diffusion.prediction}, {diffusion.schedule}, {diffusion.loss} |
| sampling defaults | {sampling.sampler}, {sampling.num_steps} steps, guidance {sampling.guidance_scale} |
"""
    return f"""# {config.data.name}: {" / ".join(config.domains)}

A {kind[config.method]} that turns {config.image_size} x {config.image_size} images into: {sides}.

| | |
|---|---|
| data | {config.data.name} (hash `{config.data.content_hash}`), pairing {config.data.pairing} |
| licence of the data, which binds this checkpoint and what is made with it | {config.data.licence} |
{begun}{how if config.method == "diffusion" else ""}
Load it with `ddpm_core.checkpoint.load(folder)` or give the folder to anything that takes `--checkpoint`.
"""
