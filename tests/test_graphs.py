"""Passes that are captured: which sizes, what is filled up, what happens where it does not work. Without a GPU."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ddpm_core.graphs import SIZES, Graphed, GraphedTraining, can_be_captured


class Captures:
    """What a GPU's driver does, on a CPU: a call is made once, and its operations again on the same memory."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, call: Callable[[], Any], before: Callable[[], object] | None) -> Callable[[], Any]:
        self.count += 1
        if before is not None:
            before()
        output = call()
        held = output if isinstance(output, tuple) else (output,)

        @torch.enable_grad()  # what was captured with gradients is done so again
        def replay() -> Any:
            again = call()
            with torch.no_grad():
                for place, new in zip(held, again if isinstance(again, tuple) else (again,), strict=True):
                    if place is not None:
                        place.copy_(new)
            return output

        return replay


def network(x: Tensor, t: Tensor, *, show_mask: bool = False) -> Tensor:
    output = 2 * x + t[:, None, None, None]
    return torch.cat([output, x[:, :1]], 1) if show_mask else output


def inputs(rows: int, side: int = 2, start: int = 0) -> tuple[Tensor, Tensor]:
    numbers = start + torch.arange(rows)
    return numbers[:, None, None, None].expand(rows, 3, side, side).float(), 100 * numbers


@torch.no_grad()
def test_every_batch_comes_out_as_without_captures_by_few_of_them() -> None:
    captures = Captures()
    graphed = Graphed(network, captures)
    kept = []
    for rows in (*range(1, 70), 5, 1, 3):
        given = inputs(rows, start=rows)
        output = graphed(*given)
        assert torch.equal(output, network(*given)), rows
        kept.append((output, output.clone()))
    assert captures.count == len(SIZES)
    assert all(torch.equal(output, before) for output, before in kept)  # no later pass writes into a result


@torch.no_grad()
def test_shapes_dtypes_and_options_are_captured_apart() -> None:
    captures = Captures()
    graphed = Graphed(network, captures)
    for given in (inputs(3), inputs(3, side=4), (inputs(3)[0].double(), inputs(3)[1]), inputs(4)):
        for show_mask in (False, True):
            output = graphed(*given, show_mask=show_mask)
            assert torch.equal(output, network(*given, show_mask=show_mask))
            assert output.dtype == given[0].dtype
    assert captures.count == 3 * 2  # three and four rows share one


@pytest.mark.parametrize(("rows", "with_gradients"), [(0, False), (65, False), (3, True)])
def test_what_cannot_be_captured_or_need_not_runs_as_it_is(rows: int, with_gradients: bool) -> None:
    captures = Captures()
    with torch.set_grad_enabled(with_gradients):
        assert torch.equal(Graphed(network, captures)(*inputs(rows)), network(*inputs(rows)))
    assert captures.count == 0


@torch.no_grad()
def test_a_capture_that_fails_is_told_once_and_costs_no_result() -> None:
    def refuses(call: Callable[[], Any], before: Callable[[], object] | None) -> Callable[[], Any]:
        raise RuntimeError("operation not permitted when stream is capturing")

    graphed = Graphed(network, refuses)
    with pytest.warns(UserWarning, match="kernel by kernel.*not permitted when stream is capturing"):
        assert torch.equal(graphed(*inputs(2)), network(*inputs(2)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for rows in (2, 8):
            assert torch.equal(graphed(*inputs(rows)), network(*inputs(rows)))


def test_networks_on_a_cpu_are_not_captured() -> None:
    assert not can_be_captured(torch.nn.Linear(1, 1))


class Learning(nn.Module):
    """Of two weights the second takes no part."""

    def __init__(self) -> None:
        super().__init__()
        self.slope, self.unused = nn.Parameter(torch.tensor(3.0)), nn.Parameter(torch.tensor(5.0))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return (self.slope * x).square() + t[:, None, None, None]


def test_training_gets_the_gradients_that_it_gets_without_captures() -> None:
    """Also where two batches are added up, weights change in between, sizes take turns."""
    captures, plain, net = Captures(), Learning(), Learning()
    graphed = GraphedTraining(net, captures)
    for first, second in ((2, 3), (3, 2), (2, 2)):
        outputs = []
        for model in (plain, graphed):
            outputs.append([])
            for rows in (first, second):
                output = model(*inputs(rows, start=rows))
                output.sum().backward()
                outputs[-1].append(output.detach())
        assert all(map(torch.equal, *outputs))
        assert torch.equal(net.slope.grad, plain.slope.grad)
        assert net.unused.grad is None
        for weights in (net.slope, plain.slope):
            with torch.no_grad():
                weights -= 1e-4 * weights.grad
            weights.grad = None
    assert captures.count == 2 * 2  # forward and backward of two sizes
    with torch.no_grad():
        assert torch.equal(graphed(*inputs(5)), plain(*inputs(5)))
    assert captures.count == 4


def test_training_that_cannot_be_captured_goes_on_without() -> None:
    def refuses(call: Callable[[], Any], before: Callable[[], object] | None) -> Callable[[], Any]:
        raise RuntimeError("operation not permitted when stream is capturing")

    graphed = GraphedTraining(Learning(), refuses)
    with pytest.warns(UserWarning, match="kernel by kernel.*not permitted"):
        graphed(*inputs(2)).sum().backward()
    assert graphed.network.slope.grad is not None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        graphed(*inputs(2))
