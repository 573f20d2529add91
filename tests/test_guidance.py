"""Guidance: the formulas at scales 0, 1 and 3 and batch sizes 1, 2 and 3, what they cost, and closed forms."""

import functools

import pytest
import torch

from ddpm_core.config import DiffusionConfig
from ddpm_core.diffusion import predicted, q_sample, seeded, training_target
from ddpm_core.guidance import autoguidance, classifier_free, classifier_guidance, identity_guidance, limited
from ddpm_core.samplers import SAMPLERS, ddim, trailing
from ddpm_core.schedule import alphas_cumprod

NUM_DOMAINS = 2
ABAR = alphas_cumprod(DiffusionConfig())
ZERO_ABAR = alphas_cumprod(DiffusionConfig(zero_terminal_snr=True, prediction="v"))
PREDICTIONS = pytest.mark.parametrize("prediction", ["eps", "v", "x_0"])


class Recorder(torch.nn.Module):
    """A network whose output names what it was shown; it counts its forward passes and the images in each."""

    def __init__(self) -> None:
        super().__init__()
        self.passes: list[int] = []
        self.domains: list[list[int]] = []

    def forward(self, x_t, t, condition, domain):
        self.passes.append(len(x_t))
        self.domains.append(domain.tolist())
        return x_t * (1 + domain.reshape(-1, 1, 1, 1)) + 10 * condition + t.reshape(-1, 1, 1, 1) / 1000


def inputs(batch: int):
    x_t, condition = torch.randn(2, batch, 3, 4, 4, generator=seeded("guidance"), dtype=torch.float64)
    return x_t, torch.arange(batch) * 100, condition, torch.arange(batch) % NUM_DOMAINS


def terms(batch: int):
    """eps(∅, ∅), eps(c, ∅) and eps(c, d) of the recorder, each from a pass of its own."""
    x_t, t, condition, domain = inputs(batch)
    null, no_domain, model = torch.zeros_like(condition), torch.full_like(domain, NUM_DOMAINS), Recorder()
    return model(x_t, t, null, no_domain), model(x_t, t, condition, no_domain), model(x_t, t, condition, domain)


def guide(batch: int, scale: float, domain_scale: float | None = None, rescale: float = 0.0):
    """The guided output, and the recorder that was asked."""
    x_t, t, condition, domain = inputs(batch)
    model = Recorder()
    denoise = classifier_free(
        model,
        condition,
        domain,
        num_domains=NUM_DOMAINS,
        guidance_scale=scale,
        domain_guidance_scale=domain_scale,
        guidance_rescale=rescale,
    )
    return denoise(x_t, t), model


class Masked(Recorder):
    """Its mask is 1/4 on the left and 1 on the right for the condition, and elsewhere for none."""

    def forward(self, x_t, t, condition, domain, *, show_mask=False):
        output = super().forward(x_t, t, condition, domain)
        mask = torch.full_like(output[:, :1], 0.25)
        mask[..., 2:] = 1
        mask = torch.where(condition.any((1, 2, 3), keepdim=True), mask, 1 - mask)
        return torch.cat([output, mask], dim=1) if show_mask else output


def close(actual, expected, tolerance=1e-10):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


# -- classifier-free ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 2, 3])
@pytest.mark.parametrize("scale", [0.0, 1.0, 3.0])
def test_formula(scale: float, batch: int):
    uncond, _, cond = terms(batch)
    close(guide(batch, scale)[0], uncond + scale * (cond - uncond))


@pytest.mark.parametrize("rescale", [0.0, 0.5])
@pytest.mark.parametrize("scale", [0.0, 0.5, 1.0, 3.0])
def test_what_a_mask_keeps_of_the_source_is_not_guided(scale: float, rescale: float):
    x_t, t, condition, domain = inputs(2)
    given = {"num_domains": NUM_DOMAINS, "guidance_scale": scale, "guidance_rescale": rescale}
    found = classifier_free(Masked(), condition, domain, source_mask=True, **given)(x_t, t)
    uncond, _, cond = terms(2)
    if scale <= 1:  # nothing is driven beyond what the network says
        close(found, classifier_free(Recorder(), condition, domain, **given)(x_t, t))
        return
    wanted = cond + torch.tensor([0.75, 0.75, 0, 0]) * (scale - 1) * (cond - uncond)
    ratio = cond.std((1, 2, 3), keepdim=True) / wanted.std((1, 2, 3), keepdim=True)
    close(found, wanted * (rescale * ratio + 1 - rescale))


@pytest.mark.parametrize("batch", [1, 2, 3])
@pytest.mark.parametrize("domain_scale", [0.0, 1.0, 3.0])
@pytest.mark.parametrize("scale", [0.0, 1.0, 2.0])
def test_formula_of_two_weights(scale: float, domain_scale: float, batch: int):
    uncond, image, both = terms(batch)
    expected = uncond + scale * (image - uncond) + domain_scale * (both - image)
    close(guide(batch, scale, domain_scale)[0], expected)


@pytest.mark.parametrize("scale", [0.0, 1.0, 3.0])
def test_two_equal_weights_are_one(scale: float):
    one, two = guide(3, scale), guide(3, scale, scale)
    assert torch.equal(one[0], two[0])
    assert one[1].passes == two[1].passes


@pytest.mark.parametrize(
    ("scale", "domain_scale", "domains"),
    [
        (0.0, None, [[2, 2]]),
        (1.0, None, [[0, 1]]),
        (1.5, None, [[2, 2, 0, 1]]),
        (1.5, 1.5, [[2, 2, 0, 1]]),
        (1.0, 3.0, [[2, 2, 0, 1]]),  # eps(c, ∅) and eps(c, d)
        (1.0, 0.0, [[2, 2]]),  # eps(c, ∅)
        (1.5, 3.0, [[2, 2, 2, 2, 0, 1]]),
    ],
)
def test_one_forward_pass_with_no_more_than_it_needs(scale, domain_scale, domains):
    _, model = guide(2, scale, domain_scale)
    assert model.domains == domains


def test_scale_one_is_the_network_itself():
    assert torch.equal(guide(2, 1.0)[0], terms(2)[2])


@pytest.mark.parametrize("scale", [0.0, 1.0, 3.0])
@pytest.mark.parametrize("rescale", [0.7, 1.0])
def test_rescale_is_that_of_section_3_4(scale: float, rescale: float):
    uncond, _, cond = terms(3)
    mixed = uncond + scale * (cond - uncond)
    expected = torch.stack(
        [rescale * x * (y.std() / x.std()) + (1 - rescale) * x for x, y in zip(mixed, cond, strict=True)]
    )
    output, model = guide(3, scale, rescale=rescale)
    close(output, expected)
    assert model.passes == [3 if scale == 1 else 6]
    if rescale == 1:
        close(output.std((1, 2, 3)), cond.std((1, 2, 3)))


def test_rescale_of_two_weights_is_towards_the_plain_prediction():
    uncond, image, both = terms(2)
    mixed = uncond + 2 * (image - uncond) + 4 * (both - image)
    close(guide(2, 2.0, 4.0, 1.0)[0].std((1, 2, 3)), both.std((1, 2, 3)))
    close(
        guide(2, 2.0, 4.0, 1.0)[0] / mixed, (both.std((1, 2, 3)) / mixed.std((1, 2, 3))).reshape(2, 1, 1, 1) + 0 * mixed
    )


def test_rescale_of_a_flat_prediction_is_finite():
    """As a network puts out whose last layer is still zero."""
    x = torch.zeros(1, 3, 4, 4)
    denoise = classifier_free(
        lambda x_t, t, condition, domain: 0 * x_t,
        x,
        torch.tensor([0]),
        num_domains=2,
        guidance_scale=2.0,
        guidance_rescale=0.7,
    )
    assert torch.equal(denoise(x, torch.tensor([5])), x)


# -- autoguidance, interval -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 2, 3])
@pytest.mark.parametrize("scale", [0.0, 1.0, 3.0])
def test_autoguidance_leads_away_from_the_weak_network(scale: float, batch: int):
    x_t, t, *_ = inputs(batch)
    output = autoguidance(lambda x_t, t: 2 * x_t + 1, lambda x_t, t: 5 * x_t, scale)(x_t, t)
    close(output, 5 * x_t + scale * (1 - 3 * x_t))


def test_autoguidance_at_scale_one_does_not_ask_the_weak_network():
    x_t, t, *_ = inputs(2)
    close(autoguidance(lambda x_t, t: 2 * x_t, lambda x_t, t: 1 / 0, 1.0)(x_t, t), 2 * x_t)


@pytest.mark.parametrize(
    ("t", "inside"), [(999, False), (800, False), (799, True), (500, True), (299, True), (298, False), (0, False)]
)
def test_guidance_is_limited_to_its_interval(t: int, inside: bool):
    x_t, asked = torch.ones(2, 3, 4, 4), []
    denoise = limited(
        lambda x_t, t: asked.append("guided") or 3 * x_t, lambda x_t, t: asked.append("plain") or x_t, (0.3, 0.8), 1000
    )
    output = denoise(x_t, torch.full((2,), t))
    assert asked == ["guided" if inside else "plain"]
    assert torch.equal(output, (3 if inside else 1) * x_t)


def test_a_batch_on_both_sides_of_the_interval_gets_each_its_own():
    output = limited(lambda x_t, t: 3 * x_t, lambda x_t, t: x_t, (0.3, 0.8), 1000)(
        torch.ones(3, 1, 2, 2), torch.tensor([100, 500, 900])
    )
    assert output[:, 0, 0, 0].tolist() == [1, 3, 1]


@pytest.mark.parametrize("t", [0, 500, 999])
def test_the_whole_chain_is_guided_by_default(t: int):
    x_t = torch.ones(1, 1, 2, 2)
    assert torch.equal(limited(lambda x, t: 3 * x, lambda x, t: x, (0.0, 1.0), 1000)(x_t, torch.tensor([t])), 3 * x_t)


# -- classifier guidance: Gaussian data seen through a noisy measurement --------------------------------------------

MEAN, SPREAD, ERROR, SEEN = 0.3, 0.5, 0.4, -0.6
"""x_0 ~ N(MEAN, SPREAD^2); y = x_0 + ERROR * noise was measured to be SEEN."""
POSTERIOR_SPREAD = (1 / SPREAD**2 + 1 / ERROR**2) ** -0.5
POSTERIOR_MEAN = POSTERIOR_SPREAD**2 * (MEAN / SPREAD**2 + SEEN / ERROR**2)


def optimal(prediction, mean, spread, abars):
    """The best denoiser for N(mean, spread^2)."""

    def denoise(x_t, t):
        abar = abars[t].reshape(-1, 1, 1, 1)
        z = (x_t - abar.sqrt() * mean) / (abar * spread**2 + 1 - abar)
        return training_target(prediction, mean + abar.sqrt() * spread**2 * z, t, (1 - abar).sqrt() * z, abars)

    return denoise


def log_prob(x_t, t, abars):
    """log p(SEEN | x_t), up to a constant: x_0 given x_t is Gaussian, and so is y."""
    abar = abars[t].reshape(-1, 1, 1, 1)
    total = abar * SPREAD**2 + 1 - abar
    mean = MEAN + abar.sqrt() * SPREAD**2 * (x_t - abar.sqrt() * MEAN) / total
    variance = SPREAD**2 * (1 - abar) / total + ERROR**2
    return (-((SEEN - mean) ** 2) / (2 * variance)).sum((1, 2, 3))


def bayes(prediction, abars=ABAR, scale=1.0):
    return classifier_guidance(
        optimal(prediction, MEAN, SPREAD, abars),
        functools.partial(log_prob, abars=abars),
        scale,
        prediction=prediction,
        alphas_cumprod=abars,
    )


@PREDICTIONS
def test_classifier_guidance_is_bayes_rule(prediction):
    """Guided by the true likelihood, the prior's best denoiser is the posterior's."""
    t = torch.tensor([0, 50, 300, 700, 999])
    x_t = torch.randn(5, 2, 4, 4, generator=seeded("bayes"), dtype=torch.float64)
    expected = optimal(prediction, POSTERIOR_MEAN, POSTERIOR_SPREAD, ABAR)(x_t, t)
    close(bayes(prediction)(x_t, t), expected, 1e-9)


@pytest.mark.parametrize("prediction", ["v", "x_0"])
def test_pure_noise_says_nothing_of_the_class(prediction):
    t, x_t = torch.tensor([999]), torch.randn(1, 2, 4, 4, dtype=torch.float64, generator=seeded("bayes"))
    output = bayes(prediction, ZERO_ABAR)(x_t, t)
    close(output, optimal(prediction, MEAN, SPREAD, ZERO_ABAR)(x_t, t))


@PREDICTIONS
@pytest.mark.parametrize("switch", [torch.no_grad, torch.inference_mode])
def test_sampling_with_classifier_guidance_draws_from_the_posterior(prediction, switch):
    with switch():
        x_T = torch.randn(1, 1, 64, 64, generator=seeded("posterior"), dtype=torch.float64)
        x_0 = ddim(
            bayes(prediction),
            x_T,
            timesteps=trailing(1000, 500),
            alphas_cumprod=ABAR,
            prediction=prediction,
            generators=[seeded(0)],
            clip=False,
        )
    assert x_0.mean().item() == pytest.approx(POSTERIOR_MEAN, abs=0.01)
    assert x_0.std().item() == pytest.approx(POSTERIOR_SPREAD, rel=0.03)


@pytest.mark.parametrize("scale", [0.0, 1.0, 3.0])
@pytest.mark.parametrize("batch", [1, 2, 3])
def test_classifier_guidance_of_eps_is_algorithm_2(scale, batch):
    x_t, t, *_ = inputs(batch)
    t = t + 200
    weight = torch.arange(1.0, 4.0, dtype=torch.float64).reshape(1, 3, 1, 1)
    denoise = classifier_guidance(
        lambda x_t, t: 0.5 * x_t,
        lambda x_t, t: (weight * x_t).sum((1, 2, 3)),
        scale,
        prediction="eps",
        alphas_cumprod=ABAR,
    )
    close(denoise(x_t, t), 0.5 * x_t - scale * (1 - ABAR[t]).sqrt().reshape(-1, 1, 1, 1) * weight)


# -- identity guidance ----------------------------------------------------------------------------------------------

MATRIX = torch.randn(3 * 4 * 4, 5, generator=seeded("embed"), dtype=torch.float64)


def embed(x):
    return x.flatten(1) @ MATRIX


def identity_case(prediction, abars, t, scale):
    """(x_0 predicted with guidance, without, the reference)."""
    b = len(t)
    x_0, noise, reference = torch.randn(3, b, 3, 4, 4, generator=seeded("identity"), dtype=torch.float64) * 0.3
    x_t = q_sample(x_0, t, noise, abars)
    target = training_target(prediction, x_0, t, noise, abars)
    denoise = identity_guidance(
        lambda x_t, t: target, embed, reference, scale, prediction=prediction, alphas_cumprod=abars
    )
    return predicted(prediction, denoise(x_t, t), x_t, t, abars, clip=False).x_0, x_0.clamp(-1, 1), reference, x_0


@PREDICTIONS
@pytest.mark.parametrize("scale", [0.0, 1.0, 3.0])
@pytest.mark.parametrize("switch", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_identity_guidance_adds_the_gradient_of_the_cosine(prediction, scale, switch):
    t = torch.tensor([100, 500, 999])
    with switch():
        moved, seen, reference, x_0 = identity_case(prediction, ABAR, t, scale)
    e, r = embed(seen), embed(reference)
    e_norm, r_norm = e.norm(dim=1, keepdim=True), r.norm(dim=1, keepdim=True)
    cosine = (e * r).sum(1, keepdim=True) / (e_norm * r_norm)
    gradient = ((r / r_norm - cosine * e / e_norm) / e_norm) @ MATRIX.T
    expected = x_0 + scale * (1 - ABAR[t]).reshape(-1, 1, 1, 1) * gradient.reshape_as(x_0)
    close(moved.clone(), expected, 1e-7)


def test_identity_guidance_moves_the_embedding_towards_the_reference():
    def cosine(x, y):
        return torch.nn.functional.cosine_similarity(embed(x), embed(y), dim=1)

    moved, _, reference, x_0 = identity_case("eps", ABAR, torch.tensor([100, 500, 999]), 0.2)
    assert (cosine(moved, reference) > cosine(x_0, reference) + 1e-3).all()


@pytest.mark.parametrize("prediction", ["v", "x_0"])
def test_identity_guidance_is_finite_at_pure_noise(prediction):
    moved, _, _, x_0 = identity_case(prediction, ZERO_ABAR, torch.tensor([999]), 1.0)
    assert moved.isfinite().all()
    assert (moved - x_0).abs().max() > 1e-3


# -- together -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("prediction", ["v", "x_0"])
def test_all_of_it_together_is_finite_and_each_image_its_own(name, prediction):
    condition = torch.randn(3, 3, 4, 4, generator=seeded("condition"), dtype=torch.float64)
    x_T = torch.randn(3, 3, 4, 4, generator=seeded("x_T"), dtype=torch.float64)

    def run(rows):
        def network(x_t, t, condition, domain):
            return 0.3 * x_t + 0.2 * condition + 0.1 * domain.reshape(-1, 1, 1, 1)

        domain = torch.zeros(len(rows), dtype=torch.int64)
        make = functools.partial(classifier_free, network, condition[rows], domain, num_domains=NUM_DOMAINS)
        guided = make(guidance_scale=2.0, domain_guidance_scale=3.0, guidance_rescale=0.5)
        guided = autoguidance(guided, lambda x_t, t: 0.1 * x_t, 1.5)
        chain = {"prediction": prediction, "alphas_cumprod": ZERO_ABAR}
        guided = identity_guidance(guided, embed, condition[rows], 1.0, **chain)
        guided = classifier_guidance(guided, functools.partial(log_prob, abars=ZERO_ABAR), 0.5, **chain)
        denoise = limited(guided, make(guidance_scale=1.0), (0.2, 1.0), 1000)
        generators = [seeded("together", row) for row in rows]
        with torch.no_grad():
            return SAMPLERS[name](denoise, x_T[rows], timesteps=trailing(1000, 10), generators=generators, **chain)

    whole = run([0, 1, 2])
    assert whole.isfinite().all()
    close(run([1]), whole[1:2], 1e-9)
