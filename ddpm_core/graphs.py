"""Passes of a network as CUDA graphs: launched at once instead of kernel by kernel, which takes longer than the kernels
themselves below some 64 images, and in training below some 256.

    network = Graphed(network)              without gradients; a batch is filled up to the next of a few sizes
    network = GraphedTraining(network)      with the gradients of its weights, for batches of one size or two
    network(x_t, t, condition, domain)      as before
"""

import warnings
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

SIZES = (1, 2, 4, 6, 8, 12, 16, 24, 32, 48, 64)
"""Rows that are captured for, each when it is first asked for; larger batches keep a GPU busy without."""

Call = Callable[..., Tensor]
Capture = Callable[[Callable[[], Any], Callable[[], object] | None], Callable[[], Any]]
"""From a call that reads fixed places of memory, what does the same again and gives the same place of memory; before
that, what is to be run beforehand."""
T = TypeVar("T")


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
                _tell(error)
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

        def call() -> Tensor:
            return self.network(*places, **options)

        return places, self.capture(call, call)


class GraphedTraining(nn.Module):
    """A network whose weights learn. Its inputs get no gradients. Weights may change in place."""

    def __init__(self, network: nn.Module, capture: Capture | None = None) -> None:
        super().__init__()
        self.network = network
        self.capture = capture or CUDACapture()
        self.steps: dict[Any, _Step] = {}
        self.works = True

    def forward(self, *inputs: Tensor) -> Tensor:
        if not (self.works and torch.is_grad_enabled()):
            return self.network(*inputs)
        key = tuple((each.shape, each.dtype) for each in inputs)
        if key not in self.steps:
            try:
                self.steps[key] = _Step(self.network, inputs, self.capture)
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # as above
                self.works = False
                _tell(error)
                return self.network(*inputs)
        step = self.steps[key]
        return _Replay.apply(step, inputs, *step.weights)


class _Step:
    """One size of batch: a graph of the forward pass, which leaves what the other, of the backward pass, needs."""

    def __init__(self, network: nn.Module, inputs: tuple[Tensor, ...], capture: Capture) -> None:
        self.weights = [weights for weights in network.parameters() if weights.requires_grad]
        self.places = tuple(each.clone() for each in inputs)
        device = inputs[0].device.type
        amp: dict[str, Any] = {"dtype": torch.get_autocast_dtype(device), "enabled": torch.is_autocast_enabled(device)}

        def forward() -> Tensor:
            with torch.autocast(device, **amp, cache_enabled=False):  # casts belong to the graph
                self.output = network(*self.places)
            return self.output

        def backward() -> tuple[Tensor | None, ...]:
            return torch.autograd.grad(self.output, self.weights, self.gradient, allow_unused=True)

        def both() -> None:
            self.gradient = torch.zeros_like(forward())
            backward()

        self.replay_forward = capture(forward, both)
        self.replay_backward = capture(backward, None)


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, step: _Step, inputs: tuple[Tensor, ...], *weights: Tensor) -> Tensor:
        ctx.step = step
        for place, given in zip(step.places, inputs, strict=True):
            place.copy_(given)
        return step.replay_forward().detach().clone()  # the next pass writes there again

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        ctx.step.gradient.copy_(gradient)
        # Copied where they are added up, for they are held here.
        return None, None, *ctx.step.replay_backward()


def _tell(error: Exception) -> None:
    warnings.warn(
        "passes are launched kernel by kernel, which takes longer: they cannot be captured: "
        + " ".join(str(error).split())[:300],
        stacklevel=3,
    )


class CUDACapture:
    """Captures that share memory: only one of them runs at a time, and what it gives is copied at once."""

    def __init__(self) -> None:
        self.pool: Any = None

    def __call__(self, call: Callable[[], T], before: Callable[[], object] | None = None) -> Callable[[], T]:
        """`before` runs beforehand: libraries set themselves up and kernels are compiled, which cannot be captured."""
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(2):
                if before is not None:
                    before()
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        # Other threads may go on using the GPU meanwhile.
        with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
            output = call()
        self.pool = graph.pool()

        def replay() -> T:
            graph.replay()
            return output

        return replay
