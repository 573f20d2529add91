"""Samplers against data whose best denoiser is known in closed form.

For x_0 ~ N(m, c^2) independently for each pixel, E[noise | x_t] = s (x_t - a m) / (a^2 c^2 + s^2), with
a = sqrt(abar_t), s = sqrt(1 - abar_t). The probability-flow ODE then keeps z = (x_t - a m) / sqrt(a^2 c^2 + s^2).
"""

import itertools
import math

import pytest
import torch

from ddpm_core.config import DiffusionConfig, Prediction
from ddpm_core.diffusion import q_sample, seeded, training_target
from ddpm_core.errors import InputError
from ddpm_core.guidance import classifier_free, limited
from ddpm_core.samplers import (
    SAMPLERS,
    SPACINGS,
    ddim,
    ddpm,
    dpm_solver,
    flow_edit,
    invert,
    residual_edit,
    sdedit_start,
    sdedit_timesteps,
    trailing,
)
from ddpm_core.schedule import alphas_cumprod

MEAN, SPREAD = 0.3, 0.2
ABAR = alphas_cumprod(DiffusionConfig())
ZERO_ABAR = alphas_cumprod(DiffusionConfig(zero_terminal_snr=True, prediction="v"))
EACH = pytest.mark.parametrize("name", SAMPLERS)


def optimal(prediction="eps", abars=ABAR, mean=MEAN):
    """The best denoiser for N(mean, SPREAD^2), in the wanted form."""

    def denoise(x_t, t):
        abar = abars[t].reshape(-1, 1, 1, 1)
        z = (x_t - abar.sqrt() * mean) / (abar * SPREAD**2 + 1 - abar)
        x_0, eps = mean + abar.sqrt() * SPREAD**2 * z, (1 - abar).sqrt() * z
        return training_target(prediction, x_0, t, eps, abars)

    return denoise


def sample(sampler, timesteps, x_T, prediction="eps", abars=ABAR, **options):
    if isinstance(timesteps, int):
        timesteps = trailing(len(abars), timesteps)
    return sampler(
        options.pop("denoiser", None) or optimal(prediction, abars),
        x_T,
        timesteps=timesteps,
        alphas_cumprod=abars,
        prediction=prediction,
        generators=[seeded("sample", i) for i in range(len(x_T))],
        **{"clip": False, **options},
    )


def noise(b=4, side=64):
    return torch.randn(b, 1, side, side, generator=seeded("x_T"), dtype=torch.float64)


def close(actual, expected, tolerance=1e-10):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


# -- what comes out -------------------------------------------------------------------------------------------------


@EACH
def test_gaussian_data_comes_back_with_its_mean_and_spread(name):
    x_0 = sample(SAMPLERS[name], 1000, noise())
    assert x_0.mean().item() == pytest.approx(MEAN, abs=0.01)
    # DDPM's beta-tilde is the posterior variance for a single point, a lower bound: 2 % too narrow at 1000 steps
    assert x_0.std().item() == pytest.approx(SPREAD, rel=0.03)


@pytest.mark.parametrize("prediction", ["v", "x_0"])
@EACH
def test_what_the_network_predicts_makes_no_difference(name, prediction):
    close(sample(SAMPLERS[name], 100, noise(1, 8), prediction), sample(SAMPLERS[name], 100, noise(1, 8)), 1e-6)


def test_ddpm_is_too_narrow_by_an_error_of_order_one():
    missing = [SPREAD - sample(ddpm, n, noise(1, 256)).std().item() for n in (125, 250, 500)]
    ratios = [coarse / fine for coarse, fine in itertools.pairwise(missing)]
    assert all(1.6 < ratio < 2.4 for ratio in ratios), (missing, ratios)


def ode(x_t, abar, abar_end):
    """Where the probability-flow ODE takes x_t."""
    z = (x_t - abar**0.5 * MEAN) / (abar * SPREAD**2 + 1 - abar) ** 0.5
    return abar_end**0.5 * MEAN + (abar_end * SPREAD**2 + 1 - abar_end) ** 0.5 * z


def test_ddim_converges_with_order_one_on_the_linear_schedule():
    x_T = noise(1, 16)
    exact = ode(x_T, ABAR[-1].item(), 1.0)
    errors = [(sample(ddim, n, x_T) - exact).abs().mean().item() for n in (25, 50, 100, 200)]
    ratios = [coarse / fine for coarse, fine in itertools.pairwise(errors)]
    assert all(1.7 < ratio < 2.3 for ratio in ratios), (errors, ratios)


@pytest.mark.parametrize(("sampler", "order"), [(ddim, 1), (dpm_solver, 2)])
def test_order_of_convergence(sampler, order):
    """From lambda = -4 to 4 in equal steps: the last prediction against the one at the exact end of the ODE."""
    x_T, errors = noise(1, 16), []
    for n in (32, 64, 128, 256):
        abars = torch.sigmoid(2 * torch.linspace(4, -4, n + 1, dtype=torch.float64))  # abar = sigmoid(2 lambda)
        end, start = abars[0].item(), abars[-1].item()
        exact = optimal("x_0", abars)(ode(x_T, start, end), torch.tensor([0]))
        errors.append((sample(sampler, n + 1, x_T, "x_0", abars) - exact).abs().mean().item())
    orders = [math.log2(coarse / fine) for coarse, fine in itertools.pairwise(errors)]
    assert orders == pytest.approx([order] * 3, abs=0.05), (errors, orders)


def test_dpm_solver_comes_nearer_than_ddim_with_the_same_steps():
    x_T = noise(1, 16)
    exact = ode(x_T, ABAR[-1].item(), 1.0)
    error = {f: (sample(f, 100, x_T) - exact).abs().mean().item() for f in (ddim, dpm_solver)}
    assert error[dpm_solver] < error[ddim] / 5, error


# -- exact steps ----------------------------------------------------------------------------------------------------


class Trace:
    """A denoiser with a fixed output for each visit, which keeps what it was shown."""

    def __init__(self, *outputs):
        self.outputs, self.shown, self.ts = list(outputs), [], []

    def __call__(self, x_t, t):
        self.shown.append(x_t)
        self.ts.append(t.tolist())
        return self.outputs[len(self.shown) - 1]


def test_ddim_steps_are_exact():
    x_700, outputs = noise(2, 4), (noise(2, 4) * 0.5, noise(2, 4) * 0.3)
    trace = Trace(*outputs)
    result = sample(ddim, torch.tensor([700, 300]), x_700, denoiser=trace)
    abar_700, abar_300 = ABAR[700].item(), ABAR[300].item()
    x_0 = (x_700 - (1 - abar_700) ** 0.5 * outputs[0]) / abar_700**0.5
    x_300 = abar_300**0.5 * x_0 + (1 - abar_300) ** 0.5 * outputs[0]  # Song et al. 2021, eq. 12
    assert trace.ts == [[700, 700], [300, 300]]
    close(trace.shown[1], x_300)
    close(result, (x_300 - (1 - abar_300) ** 0.5 * outputs[1]) / abar_300**0.5)


@pytest.mark.parametrize("eta", [0.3, 1.0])
def test_a_stochastic_ddim_step_is_eq_12_and_16(eta):
    x_700, output = noise(1, 4), noise(1, 4) * 0.5
    trace = Trace(output, output)
    sample(ddim, torch.tensor([700, 300]), x_700, denoiser=trace, eta=eta)
    abar, prev = ABAR[700].item(), ABAR[300].item()
    sigma = eta * ((1 - prev) / (1 - abar)) ** 0.5 * (1 - abar / prev) ** 0.5
    x_0 = (x_700 - (1 - abar) ** 0.5 * output) / abar**0.5
    draw = torch.randn(1, 4, 4, generator=seeded("sample", 0))[None].double()
    close(trace.shown[1], prev**0.5 * x_0 + (1 - prev - sigma**2) ** 0.5 * output + sigma * draw)


@pytest.mark.parametrize(("t", "prev"), [(500, 499), (500, 200)])
def test_a_ddpm_step_is_the_posterior_of_eq_6_and_7(t, prev):
    x_t, output = noise(1, 4), noise(1, 4) * 0.5
    trace = Trace(output, output)
    sample(ddpm, torch.tensor([t, prev]), x_t, denoiser=trace)
    abar, abar_prev = ABAR[t].item(), ABAR[prev].item()
    beta = 1 - abar / abar_prev
    mean = (x_t - beta / (1 - abar) ** 0.5 * output) / (1 - beta) ** 0.5  # Ho et al. 2020, eq. 11
    variance = (1 - abar_prev) / (1 - abar) * beta
    draw = torch.randn(1, 4, 4, generator=seeded("sample", 0))[None].double()
    close(trace.shown[1], mean + variance**0.5 * draw, 1e-9)


@pytest.mark.parametrize("name", ["ddpm", "ddim", "dpm_solver"])
@pytest.mark.parametrize("prediction", ["eps", "v", "x_0"])
def test_the_last_step_is_the_prediction_of_x_0(name, prediction):
    x_t = noise(2, 4)
    result = sample(SAMPLERS[name], torch.tensor([300]), x_t, prediction)
    close(result, optimal("x_0")(x_t, torch.tensor([300, 300])))


def test_dpm_solver_steps_are_algorithm_2_by_hand():
    """First order, second order over unequal steps, first order."""
    ts = torch.tensor([900, 600, 450])
    x_900, x_0s = noise(1, 4), [noise(1, 4) * scale for scale in (0.5, 0.2, -0.4)]
    trace = Trace(*x_0s)
    result = sample(dpm_solver, ts, x_900, "x_0", denoiser=trace)
    a, s = ABAR[ts].sqrt().tolist(), (1 - ABAR[ts]).sqrt().tolist()
    lam = [math.log(x / y) for x, y in zip(a, s, strict=True)]
    h_1, h_2 = lam[1] - lam[0], lam[2] - lam[1]
    x_600 = s[1] / s[0] * x_900 - a[1] * (math.exp(-h_1) - 1) * x_0s[0]
    r = h_1 / h_2
    d = (1 + 1 / (2 * r)) * x_0s[1] - 1 / (2 * r) * x_0s[0]
    x_450 = s[2] / s[1] * x_600 - a[2] * (math.exp(-h_2) - 1) * d
    assert trace.ts == [[900], [600], [450]]
    close(trace.shown[1], x_600)
    close(trace.shown[2], x_450)
    close(result, x_0s[2])


def test_dpm_solver_of_first_order_is_ddim():
    x_T = noise(1, 8)
    steps = torch.tensor([800, 300])
    close(sample(dpm_solver, steps, x_T), sample(ddim, steps, x_T))


def test_ancestral_ddim_is_ddpm():
    x_T = noise(2, 8)
    assert torch.equal(sample(ddim, 50, x_T, eta=1.0), sample(ddpm, 50, x_T))


@EACH
def test_clipping_holds_every_prediction_of_x_0(name):
    seen = []
    x_0 = torch.full((1, 1, 4, 4), 3.0, dtype=torch.float64)
    result = sample(
        SAMPLERS[name],
        5,
        noise(1, 4),
        "x_0",
        denoiser=lambda x_t, t: x_0,
        clip=True,
        callback=lambda done, pred: seen.append(pred),
    )
    assert torch.equal(result, torch.ones_like(x_0))
    assert all(torch.equal(pred, torch.ones_like(x_0)) for pred in seen)


# -- pure noise at the start ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("prediction", ["v", "x_0"])
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("num_steps", [1, 2, 7, 200])
@EACH
def test_zero_terminal_snr_works_with_every_sampler_and_spacing(name, spacing, num_steps, prediction):
    timesteps = SPACINGS[spacing](1000, num_steps)
    x_0 = sample(SAMPLERS[name], timesteps, noise(2, 32), prediction, ZERO_ABAR, clip=True)
    assert x_0.isfinite().all()
    if spacing != "leading" and num_steps == 200:  # leading starts below pure noise
        assert x_0.mean().item() == pytest.approx(MEAN, abs=0.01)
        assert x_0.std().item() == pytest.approx(SPREAD, rel=0.1 if name == "ddpm" else 0.05)
    if timesteps.tolist() == [999]:  # nothing is known: the mean
        close(x_0, torch.full_like(x_0, MEAN))


@pytest.mark.parametrize("eta", [1.0, 1.5])
def test_ancestral_steps_from_pure_noise_to_any_level_are_finite(eta):
    """All that is left of the noise is drawn anew: what remains of 1 - abar - sigma^2 is a rounding of either sign."""
    x_T = noise(1, 1)
    for prev in range(0, 999, 3):
        result = sample(ddim, torch.tensor([999, prev]), x_T, "x_0", ZERO_ABAR, eta=eta)
        assert result.isfinite().all(), prev


def test_the_first_step_from_pure_noise_is_exact():
    x_T, x_0 = noise(1, 4), noise(1, 4) * 0.5
    a, s = ZERO_ABAR[600].sqrt().item(), (1 - ZERO_ABAR[600]).sqrt().item()
    for sampler in (ddim, dpm_solver):
        trace = Trace(x_0, x_0, x_0)
        sample(sampler, torch.tensor([999, 600]), x_T, "x_0", ZERO_ABAR, denoiser=trace)
        close(trace.shown[1], a * x_0 + s * x_T)  # all of x_T is noise


def test_dpm_solver_has_no_slope_from_pure_noise():
    """lambda is -inf at the start: the second step is of first order, the third of second."""
    ts, x_T = torch.tensor([999, 700, 500, 400]), noise(1, 4)
    x_0s = [noise(1, 4) * scale for scale in (0.5, 0.2, -0.4, 0.1)]
    trace = Trace(*x_0s)
    sample(dpm_solver, ts, x_T, "x_0", ZERO_ABAR, denoiser=trace)
    abar = ZERO_ABAR[ts].tolist()
    x_500 = trace.shown[2]
    eps = (trace.shown[1] - abar[1] ** 0.5 * x_0s[1]) / (1 - abar[1]) ** 0.5
    close(x_500, abar[2] ** 0.5 * x_0s[1] + (1 - abar[2]) ** 0.5 * eps)
    lam = [0.5 * math.log(value / (1 - value)) for value in abar[1:]]
    d = x_0s[2] + (lam[2] - lam[1]) / (2 * (lam[1] - lam[0])) * (x_0s[2] - x_0s[1])
    eps = (x_500 - abar[2] ** 0.5 * d) / (1 - abar[2]) ** 0.5
    close(trace.shown[3], abar[3] ** 0.5 * d + (1 - abar[3]) ** 0.5 * eps)


# -- timesteps, callback, batch -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spacing", "num_timesteps", "num_steps", "visited"),
    [
        ("trailing", 1000, 4, [999, 749, 499, 249]),
        ("trailing", 10, 3, [9, 6, 2]),
        ("trailing", 10, 4, [9, 7, 4, 1]),  # 10, 7.5, 5, 2.5: halves to the even
        ("trailing", 10, 1, [9]),
        ("leading", 1000, 4, [750, 500, 250, 0]),
        ("leading", 10, 3, [6, 3, 0]),
        ("leading", 10, 6, [8, 6, 5, 3, 1, 0]),
        ("leading", 10, 1, [0]),
        ("linspace", 1000, 4, [999, 666, 333, 0]),
        ("linspace", 10, 3, [9, 4, 0]),
        ("linspace", 10, 4, [9, 6, 3, 0]),
        ("linspace", 10, 1, [9]),
    ],
)
def test_visited_timesteps_are_exact(spacing, num_timesteps, num_steps, visited):
    assert SPACINGS[spacing](num_timesteps, num_steps).tolist() == visited


@pytest.mark.parametrize("spacing", SPACINGS)
def test_every_spacing_descends_without_repeats_and_can_visit_all(spacing):
    for num_timesteps in (1, 2, 10, 37):
        for num_steps in range(1, num_timesteps + 1):
            visited = SPACINGS[spacing](num_timesteps, num_steps)
            assert visited.dtype == torch.int64
            assert len(visited) == num_steps
            assert (visited.diff() < 0).all()
            assert 0 <= visited[-1] <= visited[0] < num_timesteps
        assert visited.tolist() == list(range(num_timesteps - 1, -1, -1))


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("num_steps", [-1, 0, 11])
def test_impossible_numbers_of_steps_are_refused(spacing, num_steps):
    with pytest.raises(ValueError, match=r"num_steps is .* \[1, 10\]"):
        SPACINGS[spacing](10, num_steps)


@EACH
def test_the_callback_sees_the_prediction_of_each_step(name):
    x_0s, seen = [noise(2, 4) * scale for scale in (0.5, 0.2, -0.4)], []
    trace = Trace(*x_0s)
    timesteps = torch.tensor([900, 600, 450])
    callback = lambda done, x_0: seen.append((done, x_0))  # noqa: E731
    sample(SAMPLERS[name], timesteps, noise(2, 4), "x_0", denoiser=trace, callback=callback)
    assert [done for done, _ in seen] == [1, 2, 3]
    assert all(torch.equal(pred, x_0) for (_, pred), x_0 in zip(seen, x_0s, strict=True))


@EACH
def test_a_images_result_does_not_depend_on_its_batch(name):
    x_T = noise(3, 8)
    options = {"eta": 0.5} if name == "ddim" else {}
    whole = sample(SAMPLERS[name], 10, x_T, **options)
    close(whole[:1], sample(SAMPLERS[name], 10, x_T[:1], **options), 1e-12)


# -- inversion, SDEdit ----------------------------------------------------------------------------------------------


def inverted(x_0, num_steps, prediction="eps", abars=ABAR, **options):
    return invert(
        optimal(prediction, abars),
        x_0,
        timesteps=trailing(len(abars), num_steps),
        alphas_cumprod=abars,
        prediction=prediction,
        **options,
    )


@pytest.mark.parametrize(
    ("prediction", "zero"), [("eps", False), ("v", False), ("x_0", False), ("v", True), ("x_0", True)]
)
def test_inversion_then_sampling_returns_the_input(prediction, zero):
    abars = ZERO_ABAR if zero else ABAR
    x_0 = MEAN + SPREAD * noise(2, 8)
    x_T = inverted(x_0, 20, prediction, abars, num_fixed_point_steps=60)
    close(sample(ddim, 20, x_T, prediction, abars), x_0, 1e-9)


def test_each_fixed_point_step_brings_the_round_trip_closer():
    x_0 = MEAN + SPREAD * noise(2, 8)
    errors = []
    for num in (1, 2, 4, 8):
        x_T = inverted(x_0, 50, num_fixed_point_steps=num)
        errors.append((sample(ddim, 50, x_T) - x_0).abs().max().item())
    assert errors[0] > 2 * errors[1] > 4 * errors[2] > 8 * errors[3], errors


def test_one_inversion_step_by_hand():
    x_0, output = noise(1, 4) * 0.1, noise(1, 4) * 0.5
    trace = Trace(output, output)
    options = {"timesteps": torch.tensor([400, 100]), "alphas_cumprod": ABAR, "prediction": "eps"}
    result = invert(trace, x_0, **options)
    assert trace.ts == [[100], [400]]
    x_t = x_0
    for abar, prev in ((ABAR[100].item(), 1.0), (ABAR[400].item(), ABAR[100].item())):
        a, s = abar**0.5, (1 - abar) ** 0.5
        v = (output - s * x_t) / a  # a eps - s x_0 with x_0 = (x_t - s eps) / a
        cos, sin = a * prev**0.5 + s * (1 - prev) ** 0.5, s * prev**0.5 - a * (1 - prev) ** 0.5
        x_t = (x_t + sin * v) / cos
    close(result, x_t)


def test_inversion_without_an_iteration_is_refused():
    with pytest.raises(ValueError, match="num_fixed_point_steps is 0"):
        inverted(noise(1, 4), 5, num_fixed_point_steps=0)


def test_one_step_from_pure_noise_has_no_inverse():
    with pytest.raises(InputError, match="num-steps is 1"):
        inverted(noise(1, 4), 1, "v", ZERO_ABAR)
    assert inverted(noise(1, 4), 1).isfinite().all()  # from almost pure noise it has


def test_inversion_follows_the_ode_with_order_one():
    x_0 = MEAN + SPREAD * noise(1, 16)
    exact = ode(x_0, 1.0, ABAR[-1].item())
    errors = [(inverted(x_0, n) - exact).abs().mean().item() for n in (50, 100, 200)]
    ratios = [coarse / fine for coarse, fine in itertools.pairwise(errors)]
    assert all(1.6 < ratio < 2.4 for ratio in ratios), (errors, ratios)


@pytest.mark.parametrize(
    ("strength", "remaining"),
    [
        (1.0, [999, 899, 799, 699, 599, 499, 399, 299, 199, 99]),
        (0.3, [299, 199, 99]),
        (0.299, [199, 99]),
        (0.1, [99]),
    ],
)
def test_sdedit_starts_at_the_first_remaining_step(strength, remaining):
    x_0, x_T = noise(2, 4), noise(2, 4).flip(0)
    x_t, left = sdedit_start(x_0, trailing(1000, 10), strength, noise=x_T, alphas_cumprod=ABAR)
    assert left.tolist() == remaining
    abar = ABAR[remaining[0]].item()
    close(x_t, abar**0.5 * x_0 + (1 - abar) ** 0.5 * x_T)


def test_sdedit_of_no_steps_is_refused_with_the_remedy():
    with pytest.raises(InputError, match=r"strength is 0.05: none of the 10 steps .* at least 0.1"):
        sdedit_start(noise(), trailing(1000, 10), 0.05, noise=noise(), alphas_cumprod=ABAR)


def test_sdedit_at_strength_one_is_from_noise():
    x_0, x_T = noise(1, 8), noise(1, 8).flip(2)
    x_t, left = sdedit_start(x_0, trailing(1000, 10), 1.0, noise=x_T, alphas_cumprod=ZERO_ABAR)
    assert torch.equal(x_t, x_T)
    close(sample(ddim, left, x_t, "v", ZERO_ABAR), sample(ddim, 10, x_T, "v", ZERO_ABAR))


def test_sdedit_keeps_what_its_strength_leaves():
    """The ODE keeps z: the sample lies where its noised start lay, and less strength stays nearer to the source."""
    x_0, x_T = MEAN + SPREAD * noise(1, 32), noise(1, 32).flip(2)
    distances = []
    for strength in (0.2, 0.5, 1.0):
        x_t, left = sdedit_start(x_0, trailing(1000, 200), strength, noise=x_T, alphas_cumprod=ABAR)
        result = sample(ddim, left, x_t)
        abar = ABAR[left[0]].item()
        close(result, ode(q_sample(x_0, left[:1], x_T, ABAR), abar, 1.0), 0.02)
        distances.append((result - x_0).abs().mean().item())
    assert distances[0] < distances[1] < distances[2]


# -- editing: two sides, N(MEAN, SPREAD^2) and N(OTHER, SPREAD^2) -----------------------------------------------------

OTHER = -0.4
CHAINS = pytest.mark.parametrize(
    ("prediction", "abars"),
    [("eps", ABAR), ("v", ABAR), ("x_0", ABAR), ("v", ZERO_ABAR)],
    ids=["eps", "v", "x_0", "zero-terminal"],
)


def two_sides(prediction, abars, other=OTHER):
    """Of 2b images the first b as the own side, the others as the wanted one."""
    sides = torch.tensor([MEAN, other], dtype=torch.float64)

    def denoise(x_t, t):
        mean = sides.repeat_interleave(len(x_t) // 2).reshape(-1, 1, 1, 1)
        return optimal(prediction, abars, mean)(x_t, t)

    return denoise


def edited(edit, num_steps, prediction="eps", abars=ABAR, *, strength=0.6, other=OTHER, **options):
    """x_0 and what an edit makes of it."""
    x_0, both = MEAN + SPREAD * noise(3, 8), two_sides(prediction, abars, other)
    timesteps = sdedit_timesteps(trailing(len(abars), num_steps), strength, len(abars))
    chain = {"timesteps": timesteps, "alphas_cumprod": abars, "prediction": prediction, **options}
    if edit is residual_edit:
        return x_0, residual_edit(optimal(prediction, abars), both, x_0, **chain)
    return x_0, flow_edit(both, x_0, generators=[seeded("edit", i) for i in range(len(x_0))], **chain)


@pytest.mark.parametrize("strength", [0.6, 1.0])
@pytest.mark.parametrize("edit", [residual_edit, flow_edit])
@CHAINS
def test_equal_sides_give_back_the_source_to_the_last_bit(prediction, abars, edit, strength):
    x_0, result = edited(edit, 7, prediction, abars, strength=strength, other=MEAN)
    assert torch.equal(result, x_0)


@CHAINS
def test_a_linear_denoiser_moves_all_images_alike(prediction, abars):
    """However few the steps: what the inversion misses is in both and cancels, and so does the noise."""
    for edit in (residual_edit, flow_edit):
        x_0, result = edited(edit, 5, prediction, abars)
        moved = result - x_0
        close(moved, moved.mean().expand_as(moved))
        assert moved.mean() < -0.1


@pytest.mark.parametrize("strength", [0.2, 0.5, 1.0])
def test_residual_editing_moves_by_what_the_chain_allows(strength):
    """z is kept between the sides: the image moves by (OTHER - MEAN) (1 - a c / sqrt(a^2 c^2 + s^2))."""
    x_0, result = edited(residual_edit, 500, strength=strength, num_fixed_point_steps=2)
    abar = ABAR[round(1000 * strength) - 1].item()
    left = math.sqrt(abar) * SPREAD / math.sqrt(abar * SPREAD**2 + 1 - abar)
    close(result - x_0, torch.full_like(x_0, (OTHER - MEAN) * (1 - left)), 2e-3)


@pytest.mark.parametrize("num_steps", [1, 4, 20])
@CHAINS
def test_flow_editing_follows_its_recursion(prediction, abars, num_steps):
    """What is missing of OTHER - MEAN shrinks at each step by 1 - (1 - tau_prev / tau) s^2 / (a^2 c^2 + s^2)."""
    x_0, result = edited(flow_edit, num_steps, prediction, abars, strength=1.0)
    abar = abars[trailing(1000, num_steps)]
    tau = (1 - abar).sqrt() / (abar.sqrt() + (1 - abar).sqrt())
    after = torch.cat([tau[1:], torch.zeros(1, dtype=tau.dtype)])
    missing = (1 - (1 - after / tau) * (1 - abar) / (abar * SPREAD**2 + 1 - abar)).prod()
    close(result - x_0, ((OTHER - MEAN) * (1 - missing)).expand_as(x_0))


@pytest.mark.parametrize("edit", [residual_edit, flow_edit])
def test_previews_of_an_edit_end_in_its_result(edit):
    seen = []
    _, result = edited(edit, 5, callback=lambda done, x_0: seen.append((done, x_0)))
    assert [done for done, _ in seen] == [1, 2, 3]
    close(seen[-1][1], result)


@pytest.mark.parametrize("prediction", ["eps", "v", "x_0"])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_no_sampler_waits_for_the_device(sampler: str, prediction: Prediction):
    """A meta tensor has no values: whoever asks for one fails, where with a GPU he would wait."""
    x_T = torch.zeros(2, 3, 4, 4, device="meta")

    def network(x_t, t, condition, domain):
        assert t.device == x_t.device
        return 0.5 * x_t

    network_of = {"condition": x_T, "domain": torch.zeros(2, dtype=torch.int64, device="meta"), "num_domains": 2}
    guided, plain = (classifier_free(network, **network_of, guidance_scale=scale) for scale in (1.5, 1.0))
    x_0 = SAMPLERS[sampler](
        limited(guided, plain, (0.2, 0.7), 10),
        x_T,
        timesteps=trailing(10, 5),
        alphas_cumprod=alphas_cumprod(DiffusionConfig(num_timesteps=10)),
        prediction=prediction,
        generators=[seeded("a"), seeded("b")],
    )
    assert x_0.shape == x_T.shape
