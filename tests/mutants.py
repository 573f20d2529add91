"""Do the tests notice? Plants one realistic fault at a time in a copy of ddpm_core and runs the tests that should fail.

    python tests/mutants.py [module ...]    all, or those of the named modules; as many at a time as there are cores

Prints a table and exits with 1 if fewer than 95 % are caught. A fault is (module, text, faulty text); a text that is
not found exactly once is an error, so that the list follows the code.
"""

import contextlib
import functools
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import beartype  # noqa: F401
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
NEEDED = 0.95
"""Share of the faults that must be caught."""
TESTS = {
    "schedule": ["test_schedule"],
    "diffusion": ["test_diffusion", "test_samplers"],
    "samplers": ["test_samplers"],
    "guidance": ["test_guidance"],
    "losses": ["test_losses"],
}


class Mutant(NamedTuple):
    module: str
    old: str
    new: str


MUTANTS = [
    # -- schedule
    Mutant("schedule", "scale * 1e-4, scale * 0.02", "scale * 1e-4, scale * 0.2"),
    Mutant("schedule", "scale = 1000 / num_timesteps", "scale = 1.0"),
    Mutant("schedule", "return betas.clamp(max=0.999)", "return betas"),
    Mutant(
        "schedule",
        "scale * 0.02, num_timesteps, dtype=torch.float64",
        "scale * 0.02, num_timesteps + 1, dtype=torch.float64",
    ),
    Mutant("schedule", "offset = 0.008", "offset = 0.0008"),
    Mutant("schedule", "math.pi / 2) ** 2", "math.pi / 2)"),
    Mutant("schedule", "1 - abar[1:] / abar[:-1]", "1 - abar[:-1] / abar[1:]"),
    Mutant(
        "schedule", "torch.linspace(0, 1, num_timesteps + 1, dtype", "torch.linspace(0, 1, num_timesteps + 2, dtype"
    ),
    Mutant("schedule", "/ abar[:-1]).clamp(max=0.999)", "/ abar[:-1])"),
    Mutant("schedule", '"cosine": cosine_betas', '"cosine": linear_betas'),
    Mutant("schedule", "torch.cumprod(1 - SCHEDULES", "torch.cumprod(SCHEDULES"),
    Mutant(
        "schedule",
        "torch.cumprod(1 - SCHEDULES[config.schedule](config.num_timesteps), dim=0)",
        "1 - SCHEDULES[config.schedule](config.num_timesteps)",
    ),
    Mutant("schedule", "a = alphas_cumprod.sqrt()", "a = alphas_cumprod"),
    Mutant("schedule", "(a - a[-1]) * a[0] / (a[0] - a[-1])) ** 2", "(a - a[-1]) * a[0] / (a[0] - a[-1]))"),
    Mutant("schedule", "(a - a[-1]) * a[0] / (a[0] - a[-1])", "(a - a[-1]) / (a[0] - a[-1])"),
    Mutant("schedule", "(a - a[-1]) * a[0] / (a[0] - a[-1])", "(a - a[-1]) * a[0] / a[0]"),
    Mutant("schedule", "if config.zero_terminal_snr else abar", "if not config.zero_terminal_snr else abar"),
    # -- diffusion
    Mutant(
        "diffusion",
        "return abar.sqrt().to(like), (1 - abar).sqrt().to(like)",
        "return abar.to(like), (1 - abar).to(like)",
    ),
    Mutant("diffusion", "(1 - abar).sqrt().to(like)", "(1 - abar.sqrt()).to(like)"),
    Mutant("diffusion", "alphas_cumprod.to(t.device)[t].reshape", "alphas_cumprod.to(t.device)[t - 1].reshape"),
    Mutant("diffusion", "return a * x_0 + s * noise", "return s * x_0 + a * noise"),
    Mutant("diffusion", "return a * x_0 + s * noise", "return a * x_0 - s * noise"),
    Mutant("diffusion", "return a * noise - s * x_0", "return a * noise + s * x_0"),
    Mutant("diffusion", "return a * noise - s * x_0", "return s * x_0 - a * noise"),
    Mutant("diffusion", "return a * noise - s * x_0", "return s * noise - a * x_0"),
    Mutant("diffusion", "(x_t - s * output) / a, output", "(x_t - output) / a, output"),
    Mutant("diffusion", "(x_t - s * output) / a, output", "(x_t - s * output), output"),
    Mutant("diffusion", "a * x_t - s * output, s * x_t + a * output", "a * x_t + s * output, s * x_t + a * output"),
    Mutant("diffusion", "a * x_t - s * output, s * x_t + a * output", "a * x_t - s * output, a * x_t + s * output"),
    Mutant("diffusion", "output, (x_t - a * output) / s", "output, (x_t - output) / s"),
    Mutant("diffusion", "x_0 = x_0.clamp(-1, 1)", "x_0 = x_0.clamp(0, 1)"),
    Mutant("diffusion", "    if clip:\n", "    if not clip:\n"),
    Mutant("diffusion", "        eps = (x_t - a * x_0) / s\n", ""),
    Mutant("diffusion", '"/".join(map(str, parts))', '"".join(map(str, parts))'),
    Mutant("diffusion", "for generator in generators]", "for generator in [generators[0]] * len(generators)]"),
    Mutant("diffusion", "torch.randn(like.shape[1:]", "torch.rand(like.shape[1:]"),
    # -- samplers
    Mutant("samplers", "num_timesteps / num_steps).round().long() - 1", "num_timesteps / num_steps).round().long()"),
    Mutant(
        "samplers",
        "torch.arange(num_steps, 0, -1, dtype=torch.float64)",
        "torch.arange(num_steps - 1, -1, -1, dtype=torch.float64)",
    ),
    Mutant("samplers", "* num_timesteps // num_steps", "* (num_timesteps // num_steps)"),
    Mutant("samplers", "torch.arange(num_steps - 1, -1, -1) * num", "torch.arange(num_steps, 0, -1) * num"),
    Mutant("samplers", "torch.linspace(num_timesteps - 1, 0,", "torch.linspace(num_timesteps - 1, 1,"),
    Mutant("samplers", "if not 1 <= num_steps <= num_timesteps", "if not 0 <= num_steps <= num_timesteps"),
    Mutant("samplers", "if not 1 <= num_steps <= num_timesteps", "if not 1 <= num_steps <= num_timesteps + 1"),
    Mutant("samplers", "abars[:-1], abars[1:], strict=True", "abars[1:], abars[:-1], strict=True"),
    Mutant("samplers", ".tolist(), 1.0]", ".tolist(), float(alphas_cumprod[0])]"),
    Mutant("samplers", "zip(timesteps.tolist(), abars[:-1]", "zip((timesteps - 1).clamp(min=0).tolist(), abars[:-1]"),
    Mutant(
        "samplers",
        "sigma = eta * math.sqrt((1 - abar_prev) / (1 - abar) * (1 - abar / abar_prev))",
        "sigma = eta * ((1 - abar_prev) / (1 - abar) * (1 - abar / abar_prev))",
    ),
    Mutant(
        "samplers",
        "sigma = eta * math.sqrt((1 - abar_prev) / (1 - abar) * (1 - abar / abar_prev))",
        "sigma = eta * math.sqrt(1 - abar / abar_prev)",
    ),
    Mutant("samplers", "max(1 - abar_prev - sigma**2, 0.0)", "max(1 - abar_prev, 0.0)"),
    Mutant("samplers", "max(1 - abar_prev - sigma**2, 0.0)", "max(1 - abar_prev - sigma, 0.0)"),
    Mutant("samplers", "max(1 - abar_prev - sigma**2, 0.0)", "max(1 - abar - sigma**2, 0.0)"),
    Mutant("samplers", "max(1 - abar_prev - sigma**2, 0.0)", "(1 - abar_prev - sigma**2)"),
    Mutant("samplers", "math.sqrt(abar_prev) * pred.x_0", "abar_prev * pred.x_0"),
    Mutant("samplers", "x_t + sigma * draw_noise(generators, x_t)", "x_t + sigma**2 * draw_noise(generators, x_t)"),
    Mutant("samplers", "x_t + sigma * draw_noise(generators, x_t)", "x_t + sigma * torch.randn_like(x_t)"),
    Mutant("samplers", "callback(i + 1, pred.x_0)", "callback(i, pred.x_0)"),
    Mutant("samplers", "callback(i + 1, pred.x_0)", "callback(i + 1, x_t)"),
    Mutant("samplers", "partial(ddim, eta=1.0)", "partial(ddim, eta=0.0)"),
    Mutant("samplers", "partial(ddim, eta=1.0)", "partial(ddim, eta=0.5)"),
    Mutant(
        "samplers",
        "h = _half_log_snr(abar_prev) - _half_log_snr(abar)",
        "h = _half_log_snr(abar) - _half_log_snr(abar_prev)",
    ),
    Mutant("samplers", "slope = h / (2 * h_last)", "slope = h / h_last"),
    Mutant("samplers", "slope = h / (2 * h_last)", "slope = h_last / (2 * h)"),
    Mutant("samplers", "if math.isfinite(h) else 0.0", "if i > 0 else 0.0"),
    Mutant(
        "samplers",
        "shrink = math.sqrt((1 - abar_prev) / (1 - abar))",
        "shrink = math.sqrt((1 - abar) / (1 - abar_prev)) if abar_prev < 1 else 0.0",
    ),
    Mutant("samplers", "shrink * x_t - math.sqrt(abar_prev)", "shrink * x_t + math.sqrt(abar_prev)"),
    Mutant("samplers", "- math.sqrt(abar_prev) * math.expm1(-h)", "- math.sqrt(abar) * math.expm1(-h)"),
    Mutant("samplers", "math.expm1(-h) * (x_0 + slope", "math.expm1(-2 * h) * (x_0 + slope"),
    Mutant("samplers", "slope * (x_0 - x_0_last)", "slope * (x_0_last - x_0)"),
    Mutant("samplers", "        x_0_last, h_last = x_0, h\n", "        h_last = h\n"),
    Mutant("samplers", "return 0.5 * math.log(abar / (1 - abar))", "return math.log(abar / (1 - abar))"),
    Mutant("samplers", "return math.inf if abar else -math.inf", "return 0.0"),
    Mutant("samplers", "reversed(_steps(timesteps, alphas_cumprod))", "_steps(timesteps, alphas_cumprod)"),
    Mutant("samplers", "(x_prev + math.sin(d) * v) / math.cos(d)", "(x_prev - math.sin(d) * v) / math.cos(d)"),
    Mutant("samplers", "(x_prev + math.sin(d) * v) / math.cos(d)", "(x_prev + math.sin(d) * v)"),
    Mutant("samplers", "(x_prev + math.sin(d) * v) / math.cos(d)", "(x_t + math.sin(d) * v) / math.cos(d)"),
    Mutant("samplers", "clip=False)\n            v =", "clip=True)\n            v ="),
    Mutant("samplers", 'training_target("v", pred.x_0', "training_target(prediction, pred.x_0"),
    Mutant("samplers", "timesteps < round(strength * num_timesteps)", "timesteps <= round(strength * num_timesteps)"),
    Mutant(
        "samplers", "timesteps < round(strength * num_timesteps)", "timesteps < int((1 - strength) * num_timesteps)"
    ),
    Mutant("samplers", "_batch(int(remaining[0]), x_0)", "_batch(int(remaining[-1]), x_0)"),
    Mutant("samplers", "_batch(int(remaining[0]), x_0)", "_batch(int(timesteps[0]), x_0)"),
    Mutant("samplers", "own, wanted = drawn.chunk(2)", "wanted, own = drawn.chunk(2)"),
    Mutant("samplers", "return s / (a + s)", "return s"),
    Mutant("samplers", "(wanted - own - delta)", "(wanted - own)"),
    Mutant("samplers", "math.sqrt(abar) * (x_0 + delta) + noise", "math.sqrt(abar) * x_0 + noise"),
    Mutant("samplers", "1 - _flow_time(abar_prev) / _flow_time(abar)", "1 - _flow_time(abar_prev)"),
    # -- guidance
    Mutant("guidance", "(1 - guidance_scale, null_condition", "(-guidance_scale, null_condition"),
    Mutant(
        "guidance", "(1 - guidance_scale, null_condition, null_domain)", "(1 - guidance_scale, null_condition, domain)"
    ),
    Mutant(
        "guidance", "(1 - guidance_scale, null_condition, null_domain)", "(1 - guidance_scale, condition, null_domain)"
    ),
    Mutant("guidance", "torch.full_like(domain, num_domains)", "torch.full_like(domain, num_domains - 1)"),
    Mutant(
        "guidance",
        "(guidance_scale - domain_scale, condition, null_domain)",
        "(domain_scale - guidance_scale, condition, null_domain)",
    ),
    Mutant(
        "guidance",
        "(guidance_scale - domain_scale, condition, null_domain)",
        "(guidance_scale - domain_scale, null_condition, domain)",
    ),
    Mutant("guidance", "plain = (domain_scale, condition, domain)", "plain = (guidance_scale, condition, domain)"),
    Mutant("guidance", "for term in others if term[0] != 0]", "for term in others]"),
    Mutant("guidance", "if domain_scale != 0 or rescaled:", "if True:"),
    Mutant("guidance", "if domain_scale != 0 or rescaled:", "if domain_scale != 0:"),
    Mutant("guidance", "x_t.repeat(n, 1, 1, 1)", "x_t.repeat_interleave(n, 0)"),
    Mutant("guidance", ".repeat(n), all_conditions", ".repeat_interleave(n), all_conditions"),
    Mutant("guidance", "own = outputs[-1][:, : x_t.shape[1]]", "own = outputs[0][:, : x_t.shape[1]]"),
    Mutant("guidance", "own + (1 - m) * (mixed - own)", "own + m * (mixed - own)"),
    Mutant("guidance", "outputs[-1][:, -1:]", "outputs[0][:, -1:]"),
    Mutant("guidance", "max(guidance_scale, domain_scale) > 1", "max(guidance_scale, domain_scale) > 0"),
    Mutant("guidance", "mixed.std((1, 2, 3), keepdim=True).clamp", "mixed.std().clamp"),
    Mutant("guidance", "mixed.std((1, 2, 3), keepdim=True).clamp(min=1e-12)", "mixed.std((1, 2, 3), keepdim=True)"),
    Mutant("guidance", "own.std((1, 2, 3), keepdim=True)", "own.var((1, 2, 3), keepdim=True)"),
    Mutant(
        "guidance",
        "guidance_rescale * ratio * mixed + (1 - guidance_rescale) * mixed",
        "(1 - guidance_rescale) * ratio * mixed + guidance_rescale * mixed",
    ),
    Mutant("guidance", "weak + scale * (denoiser(x_t, t) - weak)", "weak + scale * (weak - denoiser(x_t, t))"),
    Mutant(
        "guidance", "weak + scale * (denoiser(x_t, t) - weak)", "denoiser(x_t, t) + scale * (denoiser(x_t, t) - weak)"
    ),
    Mutant("guidance", "share = (t + 1) / num_timesteps", "share = t / num_timesteps"),
    Mutant("guidance", "share = (t + 1) / num_timesteps", "share = 1 - (t + 1) / num_timesteps"),
    Mutant("guidance", "(low <= share) & (share <= high)", "(low <= share) | (share <= high)"),
    Mutant("guidance", "(low <= share) & (share <= high)", "(low <= share) & (share < high)"),
    Mutant(
        "guidance",
        "torch.where(inside.to(x_t.device)[:, None, None, None], guided(x_t, t), plain(x_t, t))",
        "guided(x_t, t)",
    ),
    Mutant("guidance", "scale * s**2 / a, 0)", "scale * s / a, 0)"),
    Mutant("guidance", "torch.where(a > 0, scale * s**2 / a, 0)", "(scale * s**2 / a)"),
    Mutant("guidance", "scale * s**2 / a, 0) * gradient", "-scale * s**2 / a, 0) * gradient"),
    Mutant("guidance", "scale * s**2 * gradient", "scale * gradient"),
    Mutant("guidance", "F.cosine_similarity(embed(x), wanted.clone(), dim=1)", "(embed(x) * wanted.clone()).sum(1)"),
    Mutant("guidance", "with torch.inference_mode(False):", "with torch.enable_grad():"),
    Mutant("guidance", "with torch.inference_mode(False):", "if True:"),
    Mutant("guidance", '"eps": -a / s', '"eps": a / s'),
    Mutant("guidance", '"eps": -a / s', '"eps": -1 / s'),
    Mutant("guidance", '"v": -1 / s', '"v": -a / s'),
    # -- losses
    Mutant("losses", "delta=config.huber_delta", "delta=1.0"),
    Mutant("losses", 'if config.loss == "huber"', 'if config.loss != "huber"'),
    Mutant("losses", "loss.flatten(1).mean(1)", "loss.flatten(1).sum(1)"),
    Mutant("losses", "loss.flatten(1).mean(1)", "loss.mean().expand(len(loss))"),
    Mutant("losses", "output.float(), target.float()", "output, target.to(output)"),
    Mutant("losses", "snr = abar / (1 - abar)\n", "snr = (1 - abar) / abar\n"),
    Mutant("losses", "snr = abar / (1 - abar)\n", "snr = (abar / (1 - abar)).sqrt()\n"),
    Mutant("losses", '"eps": snr, "v": snr + 1', '"eps": snr + 1, "v": snr'),
    Mutant("losses", "/ of_prediction).float()", "* of_prediction).float()"),
    Mutant("losses", '"min_snr": 0.0', '"min_snr": 1.0'),
    Mutant("losses", '"snr": 1.0', '"snr": 0.0'),
    Mutant("losses", "snr.clamp(floor, config.max_snr)", "snr.clamp(floor)"),
    Mutant("losses", "alphas_cumprod.to(t.device)[t]", "alphas_cumprod.to(t.device)[t - 1]"),
]


def faulty(mutant: Mutant) -> str:
    """The module's text with the fault in it.

    Raises:
        ValueError: the text to replace is not there exactly once.
    """
    text = (ROOT / "ddpm_core" / f"{mutant.module}.py").read_text()
    count = text.count(mutant.old)
    if count != 1:
        raise ValueError(f"{mutant.module}.py holds {mutant.old!r} {count} times; a fault needs it exactly once")
    return text.replace(mutant.old, mutant.new)


def copy_to(folder: Path, modules: list[str]) -> list[str]:
    """ddpm_core and the modules' tests, so that the copy is what the tests import; returns the tests' paths."""
    shutil.copytree(ROOT / "ddpm_core", folder / "ddpm_core", ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "tests").mkdir()
    tests = sorted({f"tests/{name}.py" for module in modules for name in TESTS[module]})
    for path in ["pyproject.toml", "tests/conftest.py", *tests]:
        shutil.copy(ROOT / path, folder / path)
    return tests


class QuickestFirst:
    """What a fault breaks is mostly seen by a quick test."""

    def __init__(self, seconds: dict[str, float]) -> None:
        """`seconds`: of each test, where it is known; those of the tests that are run are put there."""
        self.seconds = seconds

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items.sort(key=lambda item: self.seconds.get(item.nodeid, 0.0))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call":
            self.seconds[report.nodeid] = report.duration


def passes(folder: Path, tests: list[str], seconds: dict[str, float]) -> bool:
    """Whether the tests in `folder` pass; in this process, which is good for nothing else afterwards.

    Raises:
        RuntimeError: they could not be run.
    """
    os.chdir(folder)
    sys.path.insert(0, str(folder))
    sys.dont_write_bytecode = False
    with open(folder / "said", "w+") as said, contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        options = ["-x", "-q", "-p", "no:cacheprovider", "-p", "pytest_timeout", "--timeout=300", "-m", "not slow"]
        code = pytest.main([*options, *tests], plugins=[QuickestFirst(seconds)])
        if code not in (0, 1, 2):  # 2: a fault that is met at import
            said.seek(0)
            raise RuntimeError(said.read()[-4000:])
    return code == 0


def is_caught(mutant: Mutant, clean: Path, seconds: dict[str, float]) -> bool:
    """`clean`: a copy without a fault in which the tests have run, so that only what differs is compiled."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name, "copy")
        shutil.copytree(clean, folder)
        (folder / "ddpm_core" / f"{mutant.module}.py").write_text(faulty(mutant))
        tempfile.tempdir = name
        return not passes(folder, [f"tests/{name}.py" for name in TESTS[mutant.module]], seconds)


def without_a_fault(clean: Path, modules: list[str]) -> dict[str, float]:
    """Makes a copy and runs the tests there; the seconds of each.

    Raises:
        RuntimeError: one fails.
    """
    seconds: dict[str, float] = {}
    if not passes(clean, copy_to(clean, modules), seconds):
        raise RuntimeError("the tests fail without any fault: mend them first\n" + (clean / "said").read_text()[-4000:])
    return seconds


def main() -> int:
    modules = sys.argv[1:] or list(TESTS)
    torch.set_num_threads(1)
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # some take seconds to import, and these tests use none
    mutants = [mutant for mutant in MUTANTS if mutant.module in modules]
    for mutant in mutants:
        faulty(mutant)
    start, survivors = time.monotonic(), []
    # Each in a fork of this process, which has imported what takes long, and nothing of ddpm_core.
    with (
        tempfile.TemporaryDirectory() as clean,
        multiprocessing.get_context("fork").Pool(maxtasksperchild=1) as pool,
    ):
        seconds = pool.apply(without_a_fault, (Path(clean), modules))
        test = functools.partial(is_caught, clean=Path(clean), seconds=seconds)
        for mutant, caught in zip(mutants, pool.imap(test, mutants), strict=True):
            old, new = (" ".join(text.split()) for text in (mutant.old, mutant.new))
            print(
                f"{'caught  ' if caught else 'SURVIVED'}  {mutant.module:10} {old}  →  {new or '(nothing)'}", flush=True
            )
            if not caught:
                survivors.append(mutant)
    share = 1 - len(survivors) / len(mutants)
    print(f"{len(mutants) - len(survivors)} of {len(mutants)} caught ({share:.1%}) in {time.monotonic() - start:.0f} s")
    for mutant in survivors:
        print(f"survived: {mutant.module}: {mutant.old!r} → {mutant.new!r}")
    return 0 if share >= NEEDED else 1


if __name__ == "__main__":
    sys.exit(main())
