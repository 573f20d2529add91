"""Group norm with what follows it, in operators and as kernels in Triton's interpreter, against float64."""

import importlib.util
import multiprocessing
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from multiprocessing.pool import Pool
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ddpm_core import norms
from ddpm_core.conditioning import ConditionEncoder
from ddpm_core.config import ModelConfig, UNetConfig
from ddpm_core.norms import GroupNorm
from ddpm_core.unet import UNet

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is for Linux on x86-64")


class Case(NamedTuple):
    channels: int
    groups: int
    side: int
    modulated: bool
    silu: bool
    dtype: torch.dtype = torch.bfloat16


CASES = [
    Case(32, 4, 8, True, True),
    Case(32, 4, 8, True, True, torch.float32),
    Case(24, 3, 6, False, True),
    Case(40, 1, 5, False, False),
    Case(48, 6, 5, True, False, torch.float32),
    Case(64, 2, 7, True, True),
    Case(80, 1, 3, False, False, torch.float32),
    Case(16, 2, 33, True, True),  # on a CPU by the derivatives of this module
    Case(32, 4, 32, False, True),
    Case(8, 1, 32, False, False),
]


def inputs(case: Case, *, mean: float = 2.0) -> tuple[list[Tensor], Tensor]:
    """x, weight, bias and, where there is one, the modulation and a shift with it; and a gradient for y."""
    torch.manual_seed(0)
    shape = (2, case.channels, case.side, case.side + 1)
    x, dy = ((torch.randn(shape) + m).to(case.dtype).to(memory_format=torch.channels_last) for m in (mean, 0.0))
    weight, bias = torch.randn(2, case.channels)
    modulation = torch.randn(2, 2 * case.channels).to(case.dtype)
    shift = torch.randn(case.channels)
    return [x, weight, bias, *([modulation, shift] if case.modulated else [])], dy


def encoding(case: Case) -> Tensor | None:
    """Plain norms are followed by attention, which wants to know places."""
    if case.modulated or case.silu:
        return None
    return torch.linspace(-1, 1, case.channels * case.side * (case.side + 1)).reshape(1, case.channels, case.side, -1)


def by_definition(case: Case, given: list[Tensor], dy: Tensor) -> list[Tensor]:
    """In float64: y, and the gradient of each input."""
    leaves = [each.detach().double().requires_grad_() for each in given]
    x, weight, bias, *rest = leaves
    y = F.group_norm(x + rest[1][:, None, None] if rest else x, case.groups, weight, bias)
    for each in rest[:1]:
        scale, shift = each[:, :, None, None].chunk(2, dim=1)
        y = y * (1 + scale) + shift
    y = F.silu(y) if case.silu else y
    places = encoding(case)
    y = y if places is None else y + places
    return [y.detach(), *torch.autograd.grad(y, leaves, dy.double())]


def module(case: Case, weight: Tensor, bias: Tensor) -> GroupNorm:
    norm = GroupNorm(case.groups, case.channels, silu=case.silu)
    with torch.no_grad():
        norm.weight.copy_(weight)
        norm.bias.copy_(bias)
    return norm


def by_module(case: Case, given: list[Tensor], dy: Tensor) -> list[Tensor]:
    x, weight, bias, *rest = given
    norm, leaves = module(case, weight, bias), [each.detach().requires_grad_() for each in (x, *rest)]
    places = encoding(case)
    with torch.autocast("cpu", torch.bfloat16):
        y = norm(
            *leaves[:2],
            shift=leaves[2] if rest else None,
            encoding=None if places is None else places.to(x.dtype),
        )
    dx, *rest = torch.autograd.grad(y, [leaves[0], norm.weight, norm.bias, *leaves[1:]], dy)
    return [y.detach(), dx, *rest]


def by_kernels(case: Case, given: list[Tensor], dy: Tensor) -> list[Tensor]:
    """Through the module as on a GPU."""
    from ddpm_core import kernels

    norms._implementation = lambda x: (kernels.forward, kernels.backward)
    norms._derives_fast = lambda x, groups: False
    return by_module(case, given, dy)


def of_network(on_kernels: bool) -> list[Tensor]:
    """A whole network's output and the gradients of its weights; with kernels, as on a GPU."""
    norms._HAS_KERNELS[torch.device("cpu")] = on_kernels
    derives_fast = norms._derives_fast
    if on_kernels:
        norms._derives_fast = lambda x, groups: False
    try:
        small: dict[str, Any] = {"model_channels": 16, "channel_mult": (1, 3), "num_res_blocks": 1, "head_channels": 8}
        every: Any = {"injection": ("concat", "cross_attention", "anchor"), "anchor_channels": 4, "condition_tokens": 4}
        unet = UNetConfig(**small, **every, condition_channels=16, attn_resolutions=(8,))
        torch.manual_seed(0)
        net = UNet(ModelConfig(image_size=8, domains=("day", "night"), unet=unet))
        for weights in net.parameters():
            torch.nn.init.normal_(weights, std=0.2)
        x_t, condition, dy = torch.randn(3, 2, 3, 8, 8)
        output = net(x_t, torch.tensor([3, 500]), condition, torch.tensor([0, 1]))
        gradients = torch.autograd.grad(output, list(net.parameters()), dy)
        return [output.detach(), *gradients]
    finally:
        norms._HAS_KERNELS[torch.device("cpu")] = False
        norms._derives_fast = derives_fast


def worst(case: Case, found: list[Tensor], given: list[Tensor], dy: Tensor) -> float:
    """The largest error of all results, each in units of its largest value."""
    wanted = by_definition(case, given, dy)
    assert [each.shape for each in found] == [each.shape for each in wanted]
    errors = [(mine.double() - true).abs().max() / true.abs().max() for mine, true in zip(found, wanted, strict=True)]
    return float(max(errors))


TOLERANCE = {torch.bfloat16: 2**-6, torch.float32: 1e-5}
"""Of bf16 two digits of eight are lost at most: each map is rounded a few times on its way."""


@pytest.mark.parametrize("case", CASES, ids=str)
def test_operators_compute_the_definition_and_its_derivatives(case: Case) -> None:
    given, dy = inputs(case)
    assert worst(case, by_module(case, given, dy), given, dy) < TOLERANCE[case.dtype]
    x, weight, bias, *rest = given  # the way of a GPU without kernels
    own = norms.forward(x, None, weight, bias, (rest or [None])[0], None, case.groups, 1e-5, case.silu)
    assert own[1].dtype == own[2].dtype == torch.float32
    torch.testing.assert_close(own[1], x.float().flatten(2).unflatten(1, (case.groups, -1)).mean((2, 3)))


@pytest.mark.parametrize("places", [16, 32])
@pytest.mark.parametrize("channels_last", [True, False])
def test_dtype_and_layout_are_kept_also_under_autocast(places: int, channels_last: bool) -> None:
    layout = torch.channels_last if channels_last else torch.contiguous_format
    x = torch.randn(2, 16, places, places).bfloat16().to(memory_format=layout).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = GroupNorm(2, 16, silu=True)(x, torch.randn(2, 32).bfloat16())
    (dx,) = torch.autograd.grad(y.float().sum(), x)
    for each in (y, dx):
        assert each.dtype == torch.bfloat16
        assert each.is_contiguous(memory_format=layout)


def test_a_mean_far_from_zero_costs_no_digits_of_a_sum() -> None:
    """bf16 keeps 8 bits: a sum of thousands of values in it would stop growing."""
    case = Case(32, 4, 64, False, False)
    given, dy = inputs(case, mean=30.0)
    y = by_module(case, given, dy)[0]
    wanted = by_definition(case, given, dy)[0]
    assert (y.double() - wanted).abs().max() <= 2**-7 * wanted.abs().max()


def test_kept_for_the_backward_pass_are_the_input_and_little_more() -> None:
    norm, x = GroupNorm(2, 16, silu=True), torch.randn(2, 16, 32, 32).bfloat16().requires_grad_()
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda each: kept.append(each) or each, lambda each: each):
        norm(x, torch.randn(2, 32))
    large = [each for each in kept if each.numel() >= x.numel()]
    assert [each.data_ptr() for each in large] == [x.data_ptr()]


def test_on_gpus_pytorchs_norm_gets_planes_of_the_weights_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its CUDA kernel takes nothing else; the meta device stands for a GPU, and keeps layouts."""
    native, layouts = torch.native_group_norm, []

    def cuda_like(x: Tensor, weight: Tensor, *rest: Any) -> Any:
        layouts.append((x.is_contiguous(), x.dtype == weight.dtype))
        return native(x, weight, *rest)

    monkeypatch.setattr(torch, "native_group_norm", cuda_like)
    x = torch.empty(2, 16, 4, 5, device="meta", dtype=torch.bfloat16).to(memory_format=torch.channels_last)
    weight, bias = torch.empty(2, 16, device="meta")
    y, *statistics = norms.forward(x, None, weight, bias, None, None, 2, 1e-5, True)
    dx, *_ = norms.backward(y, None, x, None, weight, bias, None, *statistics, 2, 1e-5, True)
    assert layouts == [(True, True)] * 2
    assert all(each.dtype == x.dtype and each.stride() == x.stride() for each in (y, dx))


def test_names_of_weights_are_those_of_pytorchs_norm() -> None:
    assert GroupNorm(2, 16, silu=True).state_dict().keys() == torch.nn.GroupNorm(2, 16).state_dict().keys()
    names = set(ConditionEncoder(3, 8, 1).state_dict())
    assert names == {f"{layer}.{kind}" for layer in ("stem", "levels.0.0", "levels.0.2") for kind in ("weight", "bias")}


def test_kernels_that_fail_or_differ_are_told_once_and_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(norms, "_HAS_KERNELS", {})
    monkeypatch.setattr(norms, "_tried", lambda device: "CompilationError: no")
    with pytest.warns(UserWarning, match=r"cuda:3: norms and sums run in PyTorch's operators.*CompilationError: no"):
        assert not norms.has_kernels(torch.device("cuda:3"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not norms.has_kernels(torch.device("cuda:3"))


# -- the kernels, in Triton's interpreter -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def interpreter() -> Iterator[Pool]:
    """A process of its own: Triton decides when it is imported."""
    before = os.environ.get("TRITON_INTERPRET")
    os.environ["TRITON_INTERPRET"] = "1"
    try:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            pool.apply(torch.set_num_threads, (1,))
            yield pool
    finally:
        os.environ.pop("TRITON_INTERPRET")
        if before is not None:
            os.environ["TRITON_INTERPRET"] = before


def error_of_kernels(case: Case, mean: float = 2.0) -> float:
    given, dy = inputs(case, mean=mean)
    return worst(case, by_kernels(case, given, dy), given, dy)


@needs_triton
@pytest.mark.parametrize("case", CASES, ids=str)
def test_kernels_compute_the_definition_and_its_derivatives(case: Case, interpreter: Pool) -> None:
    assert interpreter.apply(error_of_kernels, (case,)) < TOLERANCE[case.dtype]


@needs_triton
def test_kernels_lose_no_digits_to_a_mean_far_from_zero(interpreter: Pool) -> None:
    case = Case(32, 4, 16, True, True, torch.float32)
    assert interpreter.apply(error_of_kernels, (case, 1000.0)) < 1e-4  # x itself has 1000 * 2**-24


@needs_triton
def test_a_network_computes_with_kernels_what_it_computes_without(interpreter: Pool) -> None:
    for mine, theirs in zip(interpreter.apply(of_network, (True,)), of_network(False), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-4 * float(theirs.abs().max()))


def trial(spoil: bool) -> str:
    from ddpm_core import kernels

    if spoil:
        kept = kernels.forward
        kernels.forward = lambda *given: (kept(*given)[0] + 0.5, *kept(*given)[1:])
    return norms._tried(torch.device("cpu"))


@needs_triton
def test_the_trial_tells_kernels_that_work_from_others(interpreter: Pool) -> None:
    assert interpreter.apply(trial, (False,)) == ""
    assert interpreter.apply(trial, (True,)).startswith("AssertionError")


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from ddpm_core import kernels as kernels

for kernel in (kernels._forward_kernel, kernels._backward_kernel):
    for one_group in (True, False):
        names = ("FORKED", "SHIFTED", "MODULATED", "SILU", "ENCODED", "ONE_GROUP")
        chosen = dict.fromkeys(names, one_group)
        chosen = {n: v for n, v in dict(chosen, SPAN=32, PLACES=64).items() if n in kernel.arg_names}
        types = dict.fromkeys(kernel.arg_names, "i32") | dict.fromkeys(chosen, "constexpr") | {"eps": "fp32"}
        maps = ("x", "y", "dy", "dx", "passed_on", "modulation", "modulation_out", "encoding")
        types |= dict.fromkeys(maps, "*bf16")
        floats = [n for n in types if n in ("shift", "weight", "bias") or n.endswith(("_in", "_out"))]
        types |= {n: "*fp32" for n in floats if n not in maps}
        types = {name: types[name] for name in kernel.arg_names}
        source = ASTSource(kernel, types, constexprs=chosen)
        assert triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["cubin"]
"""


@needs_triton
@pytest.mark.slow
def test_kernels_compile_for_a_gpu_without_one(tmp_path: Any) -> None:
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path), "TRITON_INTERPRET": "0"}
    done = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
