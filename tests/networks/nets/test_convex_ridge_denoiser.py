import copy

import pytest
import torch
import torch.nn.functional as F

from monai_deqkan.networks.layers import frozen_weights, remove_spectral_norm
from monai_deqkan.networks.nets import ConvexRidgeDenoiser


def noisy_steps(seed=0, size=32):
    generator = torch.Generator().manual_seed(seed)
    clean = (torch.rand(6, 2, 4, 4, generator=generator) > 0.5).float()
    clean = F.interpolate(clean, size=(size, size), mode="nearest")
    return clean, clean + 0.2 * torch.randn(clean.shape, generator=generator)


def trained(steps=60):
    torch.manual_seed(0)
    net = ConvexRidgeDenoiser(2, num_layers=3, features=8, threshold=0.1)
    optimizer = torch.optim.Adam(net.parameters(), lr=0.02)
    for step in range(steps):
        clean, noisy = noisy_steps(step + 1)
        optimizer.zero_grad()
        F.mse_loss(net(noisy), clean).backward()
        optimizer.step()
    return net


def test_one_layer_is_the_formula():
    torch.manual_seed(0)
    net = ConvexRidgeDenoiser(2, num_layers=1, features=3, kernel_size=3, threshold=0.05).double()
    x = torch.randn(1, 2, 6, 7, dtype=torch.float64)
    kernel = net.analysis[0].weight
    threshold = F.softplus(net.raw_threshold[0]).view(1, -1, 1, 1)
    response = torch.maximum(torch.minimum(F.conv2d(x, kernel, padding=1), threshold), -threshold)
    expected = x - 2 * torch.sigmoid(net.raw_step_size[0]) * F.conv_transpose2d(response, kernel, padding=1)
    assert torch.allclose(net(x), expected, atol=1e-12)
    assert torch.allclose(threshold, torch.full_like(threshold, 0.05))


def test_a_layer_is_the_gradient_of_a_convex_function():
    # Its Jacobian is symmetric with eigenvalues in [1 - step, 1], whatever the weights.
    torch.manual_seed(0)
    net = ConvexRidgeDenoiser(2, num_layers=1, features=4, kernel_size=3, threshold=0.3).double()
    x = torch.randn(1, 2, 5, 5, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(lambda z: net(z.view(1, 2, 5, 5)).flatten(), x.flatten())
    assert torch.allclose(jacobian, jacobian.T, atol=1e-12)
    eigenvalues = torch.linalg.eigvalsh(jacobian)
    step = float(2 * torch.sigmoid(net.raw_step_size.detach()[0]))
    assert float(eigenvalues.max()) <= 1 + 1e-9
    assert float(eigenvalues.min()) >= 1 - step - 1e-9
    assert float(eigenvalues.min()) < 0.9  # the step does something


def complex_ridge(**settings):
    torch.manual_seed(0)
    options = {"num_layers": 2, "features": 4, "kernel_size": 3, "threshold": 0.3, "phase_invariant": True, **settings}
    return ConvexRidgeDenoiser(2, **options).double()


def turned(x, angle):
    z = torch.complex(x[:, 0], x[:, 1]) * torch.polar(torch.tensor(1.0), torch.tensor(angle)).to(torch.complex128)
    return torch.stack((z.real, z.imag), dim=1)


def test_phase_turns_through_the_phase_invariant_form_and_not_through_the_other():
    x = torch.randn(2, 2, 7, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    net = complex_ridge(num_repeats=2)
    torch.testing.assert_close(net(turned(x, 1.0)), turned(net(x), 1.0))
    assert (net(x) - x).abs().max().item() > 0.1
    plain = complex_ridge(phase_invariant=False)
    assert not torch.allclose(plain(turned(x, 1.0)), turned(plain(x), 1.0), atol=1e-3)


def test_phase_invariant_layer_is_the_formula_and_the_gradient_of_a_convex_function():
    net = complex_ridge(num_layers=1)
    x = torch.randn(1, 2, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    kernel, step = net.analysis[0].weight, 2 * torch.sigmoid(net.raw_step_size[0])
    responses = torch.complex(*(F.conv2d(x[:, i : i + 1], kernel, padding=1) for i in (0, 1)))
    threshold = F.softplus(net.raw_threshold[0]).view(1, -1, 1, 1)
    limited = responses * (threshold / responses.abs()).clamp_max(1)
    back = [F.conv_transpose2d(part, kernel, padding=1) for part in (limited.real, limited.imag)]
    torch.testing.assert_close(net(x), x - step * torch.cat(back, dim=1))
    jacobian = torch.autograd.functional.jacobian(lambda z: net(z.view(1, 2, 5, 5)).flatten(), x.flatten())
    torch.testing.assert_close(jacobian, jacobian.T)
    eigenvalues = torch.linalg.eigvalsh(jacobian)
    assert 1 - step.item() - 1e-9 <= float(eigenvalues.min()) < 0.9
    assert float(eigenvalues.max()) <= 1 + 1e-9


def test_repeats_are_the_layers_again():
    x = torch.randn(1, 2, 9, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    once, twice = complex_ridge(), complex_ridge(num_repeats=2)
    torch.testing.assert_close(twice(x), once(once(x)))
    remove_spectral_norm(twice)
    with torch.no_grad():
        twice.analysis[0].weight.mul_(3)
        twice.raw_step_size.fill_(2.0)
    jacobian = torch.autograd.functional.jacobian(twice, torch.zeros_like(x)).reshape(144, 144)
    assert 1 < float(torch.linalg.matrix_norm(jacobian, 2)) <= twice.certified_lipschitz()


def test_level_is_the_unit_of_the_thresholds():
    x = torch.randn(2, 2, 7, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    told, blind = complex_ridge(blind=False), complex_ridge()
    torch.testing.assert_close(told(x, 1.0), blind(x))
    torch.testing.assert_close(told(0.1 * x, 0.1), 0.1 * blind(x))
    both = told(x, torch.tensor([0.2, 2.0]))
    torch.testing.assert_close(both[:1], told(x[:1], 0.2))
    torch.testing.assert_close(both[1:], told(x[1:], 2.0))
    with torch.no_grad():
        blind.raw_threshold.copy_((0.2 * F.softplus(told.raw_threshold)).expm1().log())
    torch.testing.assert_close(told(x, 0.2), blind(x))
    with pytest.raises(ValueError, match="This network is blind: leave `noise_level` out"):
        blind(x, 0.1)
    with pytest.raises(ValueError, match="must be told the `noise_level`"):
        told(x)
    with pytest.raises(ValueError, match=r"shape \(2,\), one per sample; got \(3,\)"):
        told(x, torch.ones(3))


def test_gradients_where_responses_are_zero():
    net = complex_ridge()
    x = torch.zeros(1, 2, 6, 6, dtype=torch.float64, requires_grad=True)
    (net(x) - 1).square().sum().backward()
    assert torch.isfinite(x.grad).all()
    assert all(torch.isfinite(parameter.grad).all() for parameter in net.parameters())


def test_trained_network_denoises_and_stays_nonexpansive():
    net = trained()
    clean, noisy = noisy_steps(0)
    with torch.no_grad():
        denoised = net(noisy)
        assert float(F.mse_loss(denoised, clean)) < 0.5 * float(F.mse_loss(noisy, clean))
    assert net.certified_lipschitz() == 1.0
    # The largest singular value of the Jacobian; small inputs lie between all thresholds, large ones beyond most.
    net.double()
    for seed, size in enumerate((1e-3, 0.1, 1.0, 10.0)):
        x = size * torch.randn(2 * 9 * 8, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        jacobian = torch.autograd.functional.jacobian(lambda z: net(z.view(1, 2, 9, 8)).flatten(), x)
        norm = float(torch.linalg.matrix_norm(jacobian, ord=2))
        assert 0.5 < norm <= 1 + 1e-9


@pytest.mark.parametrize("threshold", [1e-6, 0.015, 1.0, 100.0, 1e6])
def test_network_starts_from_the_given_threshold(threshold):
    found = F.softplus(ConvexRidgeDenoiser(2, threshold=threshold).raw_threshold)
    torch.testing.assert_close(found, torch.full_like(found, threshold), rtol=1e-5, atol=0)


def test_three_dimensions_and_gradients():
    net = ConvexRidgeDenoiser(3, channels=1, num_layers=2, features=4, kernel_size=3)
    x = torch.randn(2, 1, 6, 7, 5, generator=torch.Generator().manual_seed(0))
    net(x).square().sum().backward()
    for name, parameter in net.named_parameters():
        assert torch.isfinite(parameter.grad).all(), name
        assert parameter.grad.abs().sum() > 0, name


def test_constant_follows_kernels_that_are_no_longer_normalized():
    torch.manual_seed(0)
    net = ConvexRidgeDenoiser(2, num_layers=1, features=4, kernel_size=3, threshold=0.3).double()
    image = torch.randn(1, 2, 8, 8, dtype=torch.float64)
    before = net(image)
    remove_spectral_norm(net)
    assert net.certified_lipschitz() == 1.0
    assert torch.allclose(net(image), before)
    with torch.no_grad():
        net.raw_step_size.fill_(2.0)
        net.analysis[0].weight.mul_(3)
    zero = torch.zeros(1, 2, 12, 12, dtype=torch.float64)  # where every response is below its threshold
    jacobian = torch.autograd.functional.jacobian(net, zero).reshape(288, 288)
    norm = torch.linalg.matrix_norm(jacobian, 2).item()
    assert norm > 5
    assert norm <= net.certified_lipschitz() <= 1.2 * norm
    with torch.no_grad():
        net.analysis[0].weight.div_(3)
    assert net.certified_lipschitz() == 1.0


def test_frozen_weights_and_copies_give_the_same():
    net = ConvexRidgeDenoiser(2)
    x = torch.randn(1, 2, 9, 8, generator=torch.Generator().manual_seed(0))
    with frozen_weights(net):
        frozen = net(x)
    other = ConvexRidgeDenoiser(2)
    other.load_state_dict(net.state_dict())
    assert torch.equal(frozen, net(x))
    assert torch.equal(copy.deepcopy(net)(x), net(x))
    assert torch.allclose(other(x), net(x), atol=1e-6)


def test_wrong_arguments():
    with pytest.raises(ValueError, match="`phase_invariant` needs 2 channels"):
        ConvexRidgeDenoiser(2, channels=1, phase_invariant=True)
    with pytest.raises(ValueError, match="odd"):
        ConvexRidgeDenoiser(2, kernel_size=4)
    for threshold in (0.0, 1e-7, 1e7, float("nan")):
        with pytest.raises(ValueError, match=r"`threshold` must lie in \[1e-06, 1e\+06\]"):
            ConvexRidgeDenoiser(2, threshold=threshold)
    with pytest.raises(ValueError, match=r"\(B, 2, H, W\)"):
        ConvexRidgeDenoiser(2)(torch.zeros(1, 3, 8, 8))
