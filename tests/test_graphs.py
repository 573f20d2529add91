"""Passes that are captured: which sizes, what is filled up, what happens where it does not work. Without a GPU."""

import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from ddpm_core.graphs import SIZES, Graphed, can_be_captured


class Captures:
    """What a GPU's driver does, on a CPU: a call is made once, and its operations again on the same memory."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, call: Callable[[], Tensor]) -> Callable[[], Tensor]:
        self.count += 1
        output = call()

        def replay() -> Tensor:
            return output.copy_(call())

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
    def refuses(call: Callable[[], Tensor]) -> Callable[[], Tensor]:
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
