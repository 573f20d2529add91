"""Many translations at once, each at a step of its own: they share every pass of the network.

    loop = StepLoop(translator, max_rows=16)
    one = loop.add(day, "night", seed=0, num_steps=50)
    two = loop.add(dusk, "night", seed=7, num_steps=5, guidance_scale=3.0)      at any time, between two steps
    while loop.translations:
        loop.step()                                                             one pass of the network
    one.result()

A sampler is a plain loop that calls a network (`samplers`). Here each image's sampler runs in a greenlet of its own:
where it calls the network it is suspended, `step` puts what all of them ask into one batch and resumes each with its
rows. So whatever `Translator` can do can share passes: other samplers, numbers of steps, guidance, seeds, starts.

rows   places in a batch of the network: an image takes one, under classifier-free guidance two or three
"""

import copy
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import greenlet
import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor

from ddpm_core.translator import Preview, Translator


@dataclasses.dataclass(eq=False)
class Translation:
    """One image on its way."""

    greenlet: greenlet.greenlet
    asked: tuple[Tensor, ...] = ()
    """What its sampler waits for: the network's inputs, one row each."""
    show_mask: bool = False
    """Whether it asks for the source mask too."""
    num_passes: int = 0
    """Passes of the network it was part of."""
    num_rows: int = 0
    """Rows it took in them."""
    num_images: int = 0
    """Images that these passes had in all, its own included."""
    done: bool = False
    image: UInt8[np.ndarray, "h w 3"] | None = None
    error: Exception | None = None

    def result(self) -> UInt8[np.ndarray, "h w 3"]:
        """The image, once `done`; raises what its sampler raised."""
        if self.error is not None:
            raise self.error
        assert self.image is not None, "not done, or cancelled"
        return self.image


class StepLoop:
    """Translations that share passes. All of its methods belong to one thread, that of the first `add`.

    Whether gradients are on belongs to a thread, not to a greenlet: each method switches them off for the samplers it
    lets run, and back.
    """

    def __init__(self, translator: Translator, *, max_rows: int, sizes: Sequence[int] = ()) -> None:
        """`max_rows`: of one pass; whoever does not fit goes first in the next. A single image may take more.

        `sizes`: passes are filled up to the next of these numbers of rows: kernels that depend on the batch's size, and
        captured graphs, then know few sizes.
        """
        self.network = translator.network
        self.max_rows, self.sizes = max_rows, sorted(sizes)
        self.translator = copy.copy(translator)
        self.translator.network = self._ask
        self.translations: list[Translation] = []
        """Those on their way, the one that waited longest first."""

    @property
    def num_rows(self) -> int:
        """Rows that the next pass would have, were it not for `max_rows`."""
        return sum(len(each.asked[0]) for each in self.translations)

    @torch.no_grad()
    def add(
        self,
        image: UInt8[np.ndarray, "h w 3"],
        domain: str,
        *,
        preview: Callable[[int, UInt8[np.ndarray, "h w 3"]], None] | None = None,
        **options: Any,
    ) -> Translation:
        """Start to translate `image`; `options` as `Translator` takes them, and `seed`.

        `preview`: called in `step`, with the number of steps done and how the image looks by then.

        Raises:
            InputError: an option that cannot be used, by name.
        """
        seen: Preview | None = None if preview is None else lambda done, images: preview(done, images[0])
        translation = Translation(
            greenlet.greenlet(lambda: self.translator(image[None], domain, callback=seen, **options)[0])
        )
        self._resume(translation)
        if translation.error is not None:
            raise translation.error
        if not translation.done:
            self.translations.append(translation)
        return translation

    @torch.no_grad()
    def cancel(self, translation: Translation) -> None:
        """Take no part in any further pass."""
        translation.done = True
        self.translations.remove(translation)
        translation.greenlet.throw()  # unwinds its frames

    @torch.no_grad()
    def step(self) -> list[Translation]:
        """One pass of the network; the translations that are done after it. If it fails, all that took part do."""
        chosen = self._chosen()
        if not chosen:
            return []
        try:
            outputs: list[Tensor | Exception] = [*self._pass(chosen)]
        except Exception as error:
            outputs = [error] * len(chosen)
        for each, output in zip(chosen, outputs, strict=True):
            each.num_passes += 1
            each.num_rows += len(each.asked[0])
            each.num_images += len(chosen)
            self._resume(each, output)
        self.translations = self.translations[len(chosen) :] + [each for each in chosen if not each.done]
        return [each for each in chosen if each.done]

    def _chosen(self) -> list[Translation]:
        """Who takes part in the next pass: in order, as far as the rows go."""
        chosen: list[Translation] = []
        rows = 0
        for each in self.translations:
            asked = len(each.asked[0])
            if chosen and rows + asked > self.max_rows:
                break
            chosen.append(each)
            rows += asked
        return chosen

    def _pass(self, chosen: list[Translation]) -> list[Tensor]:
        inputs = [torch.cat(parts) for parts in zip(*(each.asked for each in chosen), strict=True)]
        rows = len(inputs[0])
        padding = next((size for size in self.sizes if size >= rows), rows) - rows
        if padding:
            inputs = [torch.cat([part, part[-1:].expand(padding, *part.shape[1:])]) for part in inputs]
        shown = any(each.show_mask for each in chosen)
        output = self.network(*inputs, **({"show_mask": True} if shown else {}))[:rows]
        parts = output.split([len(each.asked[0]) for each in chosen])
        return [part if each.show_mask or not shown else part[:, :-1] for each, part in zip(chosen, parts, strict=True)]

    def _ask(self, *inputs: Tensor, show_mask: bool = False) -> Tensor:
        """What a sampler calls instead of the network."""
        this = greenlet.getcurrent()
        assert this.parent is not None
        return this.parent.switch(inputs, show_mask)

    def _resume(self, translation: Translation, *output: Tensor | Exception) -> None:
        """Let its sampler go on, with the network's output or failure, to where it asks again or to its end."""
        worker = translation.greenlet
        worker.parent = greenlet.getcurrent()
        try:
            found = worker.throw(output[0]) if output and isinstance(output[0], Exception) else worker.switch(*output)
        except Exception as error:
            translation.done, translation.error = True, error
            return
        if worker.dead:
            translation.done, translation.image = True, found
        else:
            translation.asked, translation.show_mask = found
