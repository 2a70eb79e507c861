import pytest
import torch
from torch import nn

from monai_deqkan.networks import margin_bound
from monai_deqkan.networks.nets import DEQKANClassifier
from monai_deqkan.networks.nets.deqkan_classifier import pool_space
from monai_deqkan.solvers import solve_budget


def network_and_images(contraction=0.9, classes=3, seed=0, **settings):
    torch.manual_seed(seed)
    network = DEQKANClassifier(
        2, 1, classes, features=(4, 4, 8, 8), hidden_features=16, contraction=contraction, **settings
    )
    network = network.double().eval()
    nn.init.normal_(network.head.weight, generator=torch.Generator().manual_seed(seed))
    images = torch.rand(5, 1, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return network, images


def scaled(values, factors):
    return values * factors.view(-1, *[1] * (values.ndim - 1))


def worst_logits(network, p, predictions, radius, steps=12):
    """Climb towards the nearest other class inside a ball around each injection."""
    worst = torch.full((len(p),), torch.inf, dtype=p.dtype)
    delta = 1e-3 * torch.randn(p.shape, dtype=p.dtype, generator=torch.Generator().manual_seed(0))
    for _ in range(steps):
        delta = delta.detach().requires_grad_()
        z = network.equilibrium(p + delta)
        logits = network.head(pool_space(z, network.pool) if network.on_map else z)
        own = logits.gather(1, predictions[:, None])[:, 0]
        other = logits.scatter(1, predictions[:, None], -torch.inf).amax(1)
        gap = own - other
        worst = torch.minimum(worst, gap.detach())
        direction = torch.autograd.grad(gap.sum(), delta)[0]
        delta = delta - scaled(direction, 0.5 * radius / direction.flatten(1).norm(dim=1))
        delta = scaled(delta, (radius / delta.flatten(1).norm(dim=1)).clamp_max(1))
    return worst


@pytest.mark.parametrize(("contraction", "settings"), [(0.5, {}), (0.9, {}), (0.9, {"cell": "mlp"})])
def test_no_ascent_within_the_radius_changes_the_class_and_one_not_far_outside_does(contraction, settings):
    network, images = network_and_images(contraction, **settings)
    with solve_budget(rtol=1e-9, max_iter=200):
        bound = margin_bound(network, images)
        p = network.injection(images).detach()
        assert bound.factor == pytest.approx(contraction, rel=1e-3)
        torch.testing.assert_close(bound.relative_radius, bound.radius / p.norm(dim=1))
        assert bool((bound.radius > 0).all())
        assert bool((worst_logits(network, p, bound.predictions, bound.radius) > 0).all())
        # Not vacuous: what moves the injection by d moves the equilibrium by d / (1 + c) at least.
        further = 2 * bound.radius * (1 + contraction) / (1 - contraction)
        assert bool((worst_logits(network, p, bound.predictions, further) < 0).all())


@pytest.mark.parametrize("pool", ["max", "avg", "both"])
def test_no_ascent_within_the_radius_changes_the_class_where_the_state_is_a_map(pool):
    network, images = network_and_images(equilibrium_on="map", pool=pool)
    with solve_budget(rtol=1e-9, max_iter=200):
        bound = margin_bound(network, images)
        p = network.injection(images).detach()
        assert bool((bound.radius > 0).all())
        assert bool((worst_logits(network, p, bound.predictions, bound.radius) > 0).all())


def test_margins_are_those_of_the_logits_and_unsolved_equilibria_cost_radius():
    network, images = network_and_images()
    with solve_budget(rtol=1e-9, max_iter=200):
        exact = margin_bound(network, images)
        logits = network(images)
    first, second = logits.topk(2, dim=1).values.T
    torch.testing.assert_close(exact.margins, (first - second).detach())
    assert torch.equal(exact.predictions, logits.argmax(1))
    with solve_budget(rtol=1e-2):
        loose = margin_bound(network, images)
    with solve_budget(max_iter=1, on_failure="ignore"):
        unsolved = margin_bound(network, images)
    assert bool((loose.radius < exact.radius).all())
    assert bool((unsolved.radius == 0).any())


def test_one_logit_is_the_second_of_two_classes():
    two, images = network_and_images(classes=2)
    one, _ = network_and_images(classes=1)
    one.load_state_dict(
        {**two.state_dict(), **{name: value for name, value in one.state_dict().items() if "head" in name}}
    )
    with torch.no_grad():
        one.head.weight.copy_(two.head.weight[1:] - two.head.weight[:1])
        one.head.bias.copy_(two.head.bias[1:] - two.head.bias[:1])
    a, b = margin_bound(one, images), margin_bound(two, images)
    assert torch.equal(a.predictions, b.predictions)
    torch.testing.assert_close(a.radius, b.radius)


def test_other_networks_are_refused():
    network, images = network_and_images()
    with pytest.raises(TypeError, match="DEQKANClassifier"):
        margin_bound(nn.Flatten(), images)
    with pytest.raises(TypeError, match="NoneType"):
        margin_bound(network_and_images(num_steps=5)[0], images)
    network.head = nn.Sequential(network.head, nn.ReLU())
    with pytest.raises(TypeError, match="linear head"):
        margin_bound(network, images)
