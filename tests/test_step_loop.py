"""The step loop: what shares a pass, in which order, at what cost; and that company changes nothing."""

import dataclasses
import weakref
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from test_translator import TINY, V_PREDICTION, network, pictures, replace

from ddpm_core.config import DiffusionConfig, ModelConfig
from ddpm_core.errors import InputError
from ddpm_core.step_loop import StepLoop, Translation
from ddpm_core.translator import Translator

KINDS: list[dict[str, Any]] = [
    {},
    {"seed": 3},
    {"num_steps": 7},
    {"sampler": "ddpm"},
    {"sampler": "dpm_solver", "num_steps": 5},
    {"eta": 0.5},
    {"guidance_scale": 3.0},
    {"guidance_scale": 2.0, "domain_guidance_scale": 3.0, "guidance_rescale": 0.5},
    {"guidance_scale": 3.0, "guidance_interval": (0.3, 0.7), "num_steps": 6},
    {"start": "sdedit", "strength": 0.5},
    {"start": "ddib", "guidance_scale": 1.0},
]
"""One request of each kind."""


class ByRow:
    """A network whose rows do not feel their company: any difference would be the loop's. Counts its passes' rows."""

    def __init__(self) -> None:
        self.rows: list[int] = []

    def __call__(self, x_t: torch.Tensor, t: torch.Tensor, condition: torch.Tensor, domain: torch.Tensor, **_: Any):  # type: ignore[no-untyped-def]
        self.rows.append(len(x_t))
        share = (t / 1000)[:, None, None, None]
        return torch.sin(3 * x_t) * share + 0.3 * condition - 0.1 * domain[:, None, None, None]


def by_row(config: ModelConfig = TINY) -> Translator:
    translate = Translator(network(config), device="cpu", precision="fp32")
    translate.network = ByRow()
    return translate


def drain(loop: StepLoop) -> Iterator[list[Translation]]:
    while loop.translations:
        yield loop.step()


def test_company_changes_nothing() -> None:
    """Every kind of request at once, each joined a step after the one before."""
    translate, sources = by_row(replace(diffusion=V_PREDICTION)), pictures(len(KINDS))
    alone = [translate(source[None], "night", **kind)[0] for source, kind in zip(sources, KINDS, strict=True)]
    loop, joined = StepLoop(translate, max_rows=100, sizes=(4, 8, 16)), []
    for source, kind in zip(sources, KINDS, strict=True):
        joined.append(loop.add(source, "night", **kind))
        loop.step()
    list(drain(loop))
    for translation, right, kind in zip(joined, alone, KINDS, strict=True):
        assert np.array_equal(translation.result(), right), kind
    assert len({image.tobytes() for image in alone}) == len(KINDS)


@pytest.mark.parametrize("method", ["diffusion", "pix2pix", "cyclegan"])
@pytest.mark.parametrize("source_mask", [True, False])
def test_a_real_network_agrees_to_a_rounding(method: Any, source_mask: bool) -> None:
    unet = dataclasses.replace(TINY.unet, source_mask=source_mask)
    diffusion = DiffusionConfig(prediction="x_0" if source_mask else "eps")
    config = replace(
        method=method, unet=unet, diffusion=diffusion, target_domains=("night",) if method == "pix2pix" else ()
    )
    translate, sources = Translator(network(config), device="cpu", precision="fp32"), pictures(3)
    kinds: list[dict[str, Any]] = [{}, {"guidance_scale": 3.0}, {"num_steps": 6}] if method == "diffusion" else [{}] * 3
    loop = StepLoop(translate, max_rows=8)
    joined = [loop.add(source, "night", **kind) for source, kind in zip(sources, kinds, strict=True)]
    list(drain(loop))
    for translation, source, kind in zip(joined, sources, kinds, strict=True):
        right = translate(source[None], "night", **kind)[0].astype(int)
        assert np.abs(translation.result() - right).max() <= 1


@pytest.mark.parametrize(("precision", "share"), [("fp32", 0.0), ("bf16", 0.02)])
def test_company_changes_few_values_by_more_than_a_rounding(precision: str, share: float) -> None:
    """What `Translator` and docs/serving.md state, with one request among others of other options."""
    translate, sources = Translator(network(TINY), device="cpu", precision=precision), pictures(8)
    options: list[dict[str, Any]] = [{"num_steps": 4 + i % 3, "guidance_scale": 1.0 + i % 2} for i in range(8)]
    loop = StepLoop(translate, max_rows=100)
    joined = [loop.add(source, "night", **each) for source, each in zip(sources, options, strict=True)]
    list(drain(loop))
    alone = [translate(source[None], "night", **each)[0] for source, each in zip(sources, options, strict=True)]
    difference = np.abs(np.stack([each.result() for each in joined]).astype(int) - np.stack(alone))
    assert (difference > 1).mean() <= share


def test_passes_are_shared_and_a_newcomer_joins_at_the_next() -> None:
    translate, source = by_row(), pictures(1)[0]
    rows, loop = translate.network.rows, StepLoop(translate, max_rows=8)  # type: ignore[attr-defined]
    first = loop.add(source, "night", num_steps=4)
    loop.step()
    second = loop.add(source, "night", num_steps=2, guidance_scale=3.0)
    finished = list(drain(loop))
    assert rows == [1, 3, 3, 1]  # guidance takes two rows
    assert finished == [[], [second], [first]]
    assert (first.num_passes, first.num_rows, second.num_passes, second.num_rows) == (4, 4, 2, 4)


def test_who_does_not_fit_goes_first_in_the_next_pass() -> None:
    translate, source = by_row(), pictures(1)[0]
    loop = StepLoop(translate, max_rows=4)
    joined = [loop.add(source, "night", num_steps=3, guidance_scale=3.0) for _ in range(3)]
    finished = list(drain(loop))
    assert translate.network.rows == [4, 4, 4, 4, 2]  # type: ignore[attr-defined]
    assert [each for step in finished for each in step] == [joined[0], joined[1], joined[2]]
    alone = StepLoop(translate, max_rows=1)
    big = alone.add(source, "night", guidance_scale=3.0)  # more than fits, but nothing is to come of waiting
    list(drain(alone))
    assert big.done


def test_passes_are_filled_up_to_few_sizes() -> None:
    translate, source = by_row(), pictures(1)[0]
    loop = StepLoop(translate, max_rows=8, sizes=(2, 4))
    for steps in (1, 2, 3):
        loop.add(source, "night", num_steps=steps)
    list(drain(loop))
    assert translate.network.rows == [4, 2, 2]  # type: ignore[attr-defined]


def test_what_was_cancelled_takes_no_further_part_and_leaves_nothing() -> None:
    translate, source = by_row(), pictures(1)[0]
    loop = StepLoop(translate, max_rows=8)
    gone, stays = loop.add(source, "night"), loop.add(source, "night")
    loop.step()
    memory = weakref.ref(gone.asked[0])
    loop.cancel(gone)
    del gone
    assert memory() is None
    list(drain(loop))
    assert translate.network.rows == [2, 1, 1, 1]  # type: ignore[attr-defined]
    assert stays.result().shape == source.shape


def test_previews_come_step_by_step() -> None:
    translate, source, seen = by_row(), pictures(1)[0], []
    loop = StepLoop(translate, max_rows=8)
    loop.add(source, "night", num_steps=3, preview=lambda done, image: seen.append((done, image)))
    for done in (1, 2, 3):
        loop.step()
        assert [count for count, _ in seen] == list(range(1, done + 1))
    assert all(image.shape == source.shape and image.dtype == np.uint8 for _, image in seen)


def test_wrong_options_are_refused_where_they_are_added_and_hurt_nobody() -> None:
    translate, source = by_row(), pictures(1)[0]
    loop = StepLoop(translate, max_rows=8)
    right = loop.add(source, "night")
    for wrong in ({"num_steps": 0}, {"start": "sdedit", "strength": 0.01}, {"colour": "red"}):
        with pytest.raises(InputError):
            loop.add(source, "night", **wrong)
    assert loop.translations == [right]


def test_a_failing_pass_fails_those_that_took_part() -> None:
    translate, source = by_row(), pictures(1)[0]
    loop = StepLoop(translate, max_rows=1)
    failing, waiting = loop.add(source, "night"), loop.add(source, "night")
    working = loop.network

    def broken(*inputs: torch.Tensor, **shown: bool) -> torch.Tensor:
        loop.network = working
        raise torch.OutOfMemoryError("no memory")

    loop.network = broken
    assert loop.step() == [failing]
    with pytest.raises(torch.OutOfMemoryError, match="no memory"):
        failing.result()
    list(drain(loop))
    assert waiting.result().shape == source.shape
