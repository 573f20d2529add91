"""What measures images where they are, on Ray's workers or in this process; only numbers travel back. `jobs.evaluate`
measures a network once, a sweep with one set of sampling options after the other.

A row asks for one image as in `jobs.translation.batch`; its `output` says what for:

    measure    translate it, measure the result and what it is compared with
    show       the same, and bring the images back
    sample     translate it with another seed, take the result's features; show-sample brings the image back too
    real       take the features of the image of side `to` that the data hold; train is the same of a training row

It comes back as id, to, seed, purpose and `found`, a pickled dict: METHOD/METRIC float, METHOD/features d,
METHOD/chances of each domain, METHOD/embedding of length 1, the images shown, and what it cost: `seconds` and
passes (`nfe`) of the translation, `judged_s` of what the nets say of the result, `spent_s` of all.
"""

import dataclasses
import functools
import pickle
import time
from collections.abc import Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor

from ddpm_core import nets
from ddpm_core.errors import InputError
from ddpm_core.identity import perceptual_distance
from ddpm_core.nets import EfficientNetLite0, Net
from ddpm_core.translator import NOT_FINITE
from jobs.datasets import reading
from jobs.evaluation import baselines
from jobs.evaluation.metrics import INCEPTION, MIN_SSIM_SIDE, feature_net, psnr, ssim
from jobs.translation.batch import Batch, Translate

MEASURE, SHOW, SAMPLE, SHOW_SAMPLE, REAL, TRAIN = "measure", "show", "sample", "show-sample", "real", "train"
NAMED = ("auto", INCEPTION)
"""Feature nets that are no files."""
Images = UInt8[np.ndarray, "b h w 3"]
Found = dict[str, Any]
"""What is known of one row."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Judges:
    """The nets that judge the images, by where they lie."""

    features: str = "auto"
    classifier: str | None = None
    identity: str | None = None


@functools.lru_cache(maxsize=8)
def load_judge(name: str, uri: str, domains: tuple[str, ...]) -> Net:
    """The net for `name`, a field of Judges; loaded once a process.

    Raises:
        InputError: no such net.
    """
    if name == "classifier":
        return nets.classifier(uri, domains)
    return {"features": feature_net, "identity": nets.identity_net}[name](uri)


class Measure:
    """A worker of a pool: translates images and measures the results. One network may be measured with any sampling
    options and weights, call by call."""

    def __init__(
        self,
        *,
        checkpoint_uri: str,
        sampling: Mapping[str, Any],
        judges: Mapping[str, Any],
        domains: tuple[str, ...],
        pairing: str,
        num_threads: int,
        ema: float | None = None,
        guides: Mapping[str, Any] = MappingProxyType({}),
        color_maps: Mapping[str, np.ndarray] = MappingProxyType({}),
        baselines: bool = True,
    ) -> None:
        """`judges`: fields of Judges. `color_maps`: of each side to produce, where the pairs are true. `baselines`
        False: of the model alone, and of its images by themselves PSNR and what the nets say."""
        self.sampling, self.ema, self.pairing = dict(sampling), ema, pairing
        self.color_maps, self.baselines = color_maps, baselines
        self._open = functools.partial(
            Translate, checkpoint_uri=checkpoint_uri, output=None, num_threads=num_threads, guides=guides
        )
        self._translates: dict[float | None, Translate] = {}
        self.device = str(self._translate(ema).translator.device)
        self.judges = {name: load_judge(name, uri, domains) for name, uri in judges.items() if uri is not None}
        self.passes = 0
        self._perceived: list[tuple[Images, np.ndarray, list[Tensor]]] = []
        """Of one batch: images, their features and maps, so that each passes through the net once."""

    def _translate(self, ema: float | None) -> Translate:
        """With the weights averaged over that length, kept from call to call."""
        if ema not in self._translates:
            found = self._open(ema=ema, sampling=self.sampling)
            found.translator.model.register_forward_hook(self._count)
            self._translates[ema] = found
        return self._translates[ema]

    def _count(self, module: Any, args: tuple[Any, ...], output: Any) -> None:
        self.passes += len(output)

    def __call__(self, batch: Batch, *, sampling: Mapping[str, Any] | None = None, ema: float | None = None) -> Batch:
        """`sampling`, `ema`: other options and weights than this object's own."""
        self._perceived.clear()
        purpose = batch["output"].astype(str)
        found: list[Found] = [{} for _ in purpose]
        began = time.perf_counter()
        self._real(batch, np.flatnonzero(purpose == REAL), found, leave_out=("identity",))
        self._real(batch, np.flatnonzero(purpose == TRAIN), found, leave_out=("identity", "classifier"))
        _spent("spent_s", found, np.flatnonzero(np.isin(purpose, (REAL, TRAIN))), began)
        made = np.flatnonzero(~np.isin(purpose, (REAL, TRAIN)))
        if len(made):
            began = time.perf_counter()
            drawn = {name: column[made] for name, column in batch.items()}
            images = np.zeros_like(batch["image"])
            images[made] = self._results(drawn, [found[i] for i in made], sampling, ema)
            self._sampled(images, np.flatnonzero(np.isin(purpose, (SAMPLE, SHOW_SAMPLE))), found)
            self._measured(batch, images, np.flatnonzero(np.isin(purpose, (MEASURE, SHOW))), found)
            _spent("spent_s", found, made, began)
            for i in np.flatnonzero(np.isin(purpose, (SHOW, SHOW_SAMPLE))):
                shown = {"source": batch["image"], "result": images, "truth": batch.get("truth")}
                found[i] |= {name: column[i] for name, column in shown.items() if column is not None}
        return {
            "id": batch["id"],
            "to": batch["to"],
            "seed": batch["seed"],
            "purpose": batch["output"],
            "found": np.array([pickle.dumps(each) for each in found], dtype=object),
        }

    def results(self, batch: Batch, sampling: Mapping[str, Any] | None = None, ema: float | None = None) -> Images:
        """The translated images."""
        translate = self._translate(self.ema if ema is None else ema)
        translate.sampling = self.sampling if sampling is None else dict(sampling)
        made = translate(batch)
        if broken := [str(name) for name, error in zip(made["id"], made["error"], strict=True) if error]:
            raise InputError(f"{len(broken)} images cannot be measured, the first {broken[0]}: {NOT_FINITE}")
        found: Images = made["result"]
        return found

    def _results(
        self, batch: Batch, found: list[Found], sampling: Mapping[str, Any] | None, ema: float | None
    ) -> Images:
        """The translated images; what they cost is noted with each."""
        self.passes, began = 0, time.perf_counter()
        results = self.results(batch, sampling, ema)
        seconds = time.perf_counter() - began
        for each in found:
            each |= {"nfe": self.passes / len(found), "seconds": seconds / len(found), "device": self.device}
        return results

    def judge(self, name: str, images: Images) -> np.ndarray:
        """What that net, a field of Judges, makes of each image."""
        return nets.features(self.judges[name].module, images, device=self.device).numpy()

    def _real(self, batch: Batch, rows: np.ndarray, found: list[Found], *, leave_out: Iterable[str]) -> None:
        column = "truth" if self.pairing == "paired" else "image"
        self._judged("real", batch[column][rows], rows, found, leave_out=leave_out)

    def _sampled(self, images: Images, rows: np.ndarray, found: list[Found]) -> None:
        self._judged("model", images[rows], rows, found, leave_out=("identity", "classifier"))

    def _measured(self, batch: Batch, results: Images, rows: np.ndarray, found: list[Found]) -> None:
        if not len(rows):
            return
        sources, truths = batch["image"][rows], batch["truth"][rows] if "truth" in batch else None
        methods = {"model": results[rows]}
        if self.baselines:
            methods["copy"] = sources
        if self.baselines and self.color_maps:
            maps = [self.color_maps[str(to)] for to in batch["to"][rows]]
            mapped = [baselines.apply_color_map(each, x[None]) for each, x in zip(maps, sources, strict=True)]
            methods["linear"] = np.concatenate(mapped)
        if self.baselines and self.pairing == "paired":
            assert truths is not None
            methods["truth"] = truths
        for name, images in methods.items():
            self._judged(name, images, rows, found)
        references: dict[str, Images | None] = {"": truths} if self.pairing == "paired" else {"_to_source": sources}
        if self.pairing == "matched":
            references["_to_proxy"] = truths
        for suffix, reference in references.items():
            for name, images in methods.items():
                if reference is None or reference is images:
                    continue  # a copy of the source is the source
                for metric, values in self._compared(images, reference).items():
                    _put(f"{name}/{metric}{suffix}", values, rows, found)

    def _compared(self, images: Images, references: Images) -> dict[str, np.ndarray]:
        """Each image to its reference."""
        values = {"psnr": psnr(images, references)}
        if not self.baselines:
            return values
        if min(images.shape[1:3]) >= MIN_SSIM_SIDE:
            values["ssim"] = ssim(images, references)
        if self._has_maps:
            maps = [self._perceive(each)[1] for each in (images, references)]
            values["perceptual"] = perceptual_distance(*maps).cpu().numpy().astype(np.float64)
        return values

    @property
    def _has_maps(self) -> bool:
        return isinstance(self.judges["features"].module, EfficientNetLite0)

    @torch.no_grad()
    def _perceive(self, images: Images) -> tuple[np.ndarray, list[Tensor]]:
        """Features of this very array of a batch and, on the net's device, the maps of the feature net."""
        for known, features, maps in self._perceived:
            if known is images:
                return features, maps
        net = self.judges["features"].module.to(self.device)
        assert isinstance(net, EfficientNetLite0)
        found, maps = net.perceive(torch.tensor(images).permute(0, 3, 1, 2).to(self.device))
        self._perceived.append((images, found.float().cpu().numpy(), maps))
        return self._perceived[-1][1:]

    def _judged(
        self, method: str, images: Images, rows: np.ndarray, found: list[Found], *, leave_out: Iterable[str] = ()
    ) -> None:
        """What each net makes of the images."""
        names, began = {"features": "features", "classifier": "chances", "identity": "embedding"}, time.perf_counter()
        for judge in self.judges:
            if judge not in leave_out and len(rows):
                once = judge == "features" and self._has_maps
                values = self._perceive(images)[0] if once else self.judge(judge, images)
                _put(f"{method}/{names[judge]}", values, rows, found)
        if method == "model":
            _spent("judged_s", found, rows, began)


def _put(name: str, values: np.ndarray, rows: np.ndarray, found: list[Found]) -> None:
    for row, value in zip(rows, values, strict=True):
        found[row][name] = value


def _spent(name: str, found: list[Found], rows: np.ndarray, began: float) -> None:
    """Note with each of the rows what it took of the time since then."""
    for row in rows:
        found[row][name] = (time.perf_counter() - began) / len(rows)


def opened(batch: Batch) -> Iterator[tuple[tuple[str, str, int, str], Found]]:
    """(to, id, seed, purpose) and what was found, of each row of what `Measure` gives back."""
    for i, found in enumerate(batch["found"]):
        to, name, seed, purpose = (batch[key][i] for key in ("to", "id", "seed", "purpose"))
        yield (str(to), str(name), int(seed), str(purpose)), pickle.loads(found)


# -- the colour map -----------------------------------------------------------------------------------------------


def color_moments(piece: reading.Piece, *, split: reading.Split, wanted: tuple[str, ...]) -> np.ndarray:
    """Of a piece's pairs, what `baselines.solve_color_map` needs to turn them into each wanted side."""
    rows, found = split.read(piece), []
    image, target = (reading.pixels_of(rows, name) for name in ("image", "target"))
    sides = np.asarray(split.card.domains)[rows["domain"].to_numpy()]
    for domain in wanted:
        swap = (sides == domain)[:, None, None, None]
        found.append(baselines.color_moments(np.where(swap, target, image), np.where(swap, image, target)))
    return np.stack(found)
