"""Passes of a network as CUDA graphs: launched at once instead of kernel by kernel, which below some 64 images takes
longer than the kernels themselves.

    network = Graphed(network)
    network(x_t, t, condition, domain)      as before

A batch is filled up to the next of a few sizes, so that few graphs serve all.
"""

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

SIZES = (1, 2, 4, 6, 8, 12, 16, 24, 32, 48, 64)
"""Rows that are captured for, each when it is first asked for; larger batches keep a GPU busy without."""

Call = Callable[..., Tensor]
Capture = Callable[[Callable[[], Tensor]], Callable[[], Tensor]]
"""From a call that reads fixed places of memory, what does the same again and gives the same place of memory."""


def can_be_captured(model: nn.Module) -> bool:
    """Whether the model lies on one GPU as a whole: what is brought together from several cannot be captured."""
    return all(weights.is_cuda and not hasattr(weights, "placements") for weights in model.parameters())


class Graphed:
    """A network without gradients. Inputs have one row an image, on one GPU; weights may change in place."""

    def __init__(self, network: Call, capture: Capture | None = None) -> None:
        self.network = network
        self.capture = capture or CUDACapture()
        self.replays: dict[Any, tuple[tuple[Tensor, ...], Callable[[], Tensor]]] = {}
        self.works = True

    def __call__(self, *inputs: Tensor, **options: Any) -> Tensor:
        rows = len(inputs[0])
        size = next((size for size in SIZES if size >= rows), 0)
        if not (size and rows and self.works) or torch.is_grad_enabled():
            return self.network(*inputs, **options)
        kinds = tuple((each.shape[1:], each.dtype, each.device) for each in inputs)
        key = (size, kinds, tuple(sorted(options.items())))
        if key not in self.replays:
            try:
                self.replays[key] = self._captured(inputs, size, options)
            except Exception as error:  # of the driver, of a library, of an operator that cannot be captured
                self.works = False
                warnings.warn(
                    "passes are launched kernel by kernel, which takes longer: they cannot be captured: "
                    + " ".join(str(error).split())[:300],
                    stacklevel=2,
                )
                return self.network(*inputs, **options)
        places, replay = self.replays[key]
        for place, given in zip(places, inputs, strict=True):
            place[:rows].copy_(given)
        return replay()[:rows].clone()  # the next pass writes there again

    def _captured(
        self, inputs: tuple[Tensor, ...], size: int, options: dict[str, Any]
    ) -> tuple[tuple[Tensor, ...], Callable[[], Tensor]]:
        """Places for inputs of `size` rows, and what computes from there. Rows beyond a batch hold the last ones that
        were there: some images, whose results nobody sees."""
        filled = torch.arange(size, device=inputs[0].device).clamp(max=len(inputs[0]) - 1)
        places = tuple(each[filled] for each in inputs)
        return places, self.capture(lambda: self.network(*places, **options))


class CUDACapture:
    """Captures that share memory: only one of them runs at a time, and what it gives is copied at once."""

    def __init__(self) -> None:
        self.pool: Any = None

    def __call__(self, call: Callable[[], Tensor]) -> Callable[[], Tensor]:
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):  # libraries set themselves up and kernels are compiled, which cannot be captured
            for _ in range(2):
                call()
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        # Other threads may go on using the GPU meanwhile.
        with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
            output = call()
        self.pool = graph.pool()

        def replay() -> Tensor:
            graph.replay()
            return output

        return replay
