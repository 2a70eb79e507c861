import pytest
import torch

from monai_deqkan.networks.nets import SensitivityNet
from monai_deqkan.operators import espirit_maps, estimate_sensitivity_maps, simulate_kspace, smooth_coil_maps


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def measured(*space, coils=4):
    """Two samples with 8 and 13 central lines, and the maps they were made with."""
    grid = torch.meshgrid(*(torch.linspace(-1, 1, n) for n in space), indexing="ij")
    image = (sum(axis**2 for axis in grid) < 0.7).float().expand(2, *space)
    truth = smooth_coil_maps(space, coils, generator=seeded())
    kspace = simulate_kspace(image, truth, snr_db=30, generator=seeded())
    mask = torch.zeros(2, 1, *[1] * (len(space) - 1), space[-1])
    middle = space[-1] // 2
    mask[0, ..., middle - 4 : middle + 4] = 1
    mask[1, ..., middle - 6 : middle + 7] = 1
    return kspace * mask, mask, truth


def small(spatial_dims=2, **settings):
    torch.manual_seed(0)
    return SensitivityNet(spatial_dims, channels=(4, 8), grid_size=16, **settings)


def stirred(spatial_dims=2, **settings):
    """A network that no longer returns its start."""
    network = small(spatial_dims, **settings)
    torch.nn.init.normal_(network.head.weight, std=0.3, generator=seeded())
    return network


@pytest.mark.parametrize("space", [(24, 28), (14, 16, 20)])
@pytest.mark.parametrize(
    ("start", "estimate"), [("espirit", espirit_maps), ("low_frequency", estimate_sensitivity_maps)]
)
def test_untrained_it_is_its_start_and_trained_it_stays_normalized(space, start, estimate):
    kspace, mask, _ = measured(*space)
    expected = estimate(kspace, mask, spatial_dims=len(space))
    inside = expected.abs().square().sum(1, keepdim=True).expand_as(expected.real) > 0.5
    assert inside.float().mean() > 0.5
    maps = small(len(space), start=start)(kspace, mask)
    torch.testing.assert_close(maps[inside], expected[inside])
    changed = stirred(len(space), start=start)(kspace, mask)
    assert (changed - maps).abs().mean() > 1e-3
    for result in (maps, changed):
        torch.testing.assert_close(result.abs().square().sum(1), torch.ones(2, *space))


def test_unit_batch_mates_inferred_masks_order_and_number_of_coils_do_not_matter():
    network = stirred().double()
    kspace, mask, _ = measured(24, 28)
    kspace = kspace.to(torch.complex128)
    maps = network(kspace, mask)
    torch.testing.assert_close(network(kspace), maps)
    torch.testing.assert_close(network(torch.view_as_real(kspace)), maps)
    torch.testing.assert_close(network(1e-3 * kspace, mask), maps, atol=1e-6, rtol=0)
    torch.testing.assert_close(network(kspace[1:], mask[1:]), maps[1:], atol=1e-6, rtol=0)
    order = torch.tensor([2, 0, 3, 1])
    torch.testing.assert_close(network(kspace[:, order], mask), maps[:, order], atol=1e-5, rtol=0)
    # A coil that receives nothing has no sensitivity in the start, and changes that of no other.
    assert network(measured(24, 28, coils=7)[0]).shape == (2, 7, 24, 28)
    assert torch.equal(network(kspace[:, :1], mask), torch.ones_like(kspace[:, :1]))


def test_gradients_reach_all_parameters_and_training_brings_the_truth_nearer():
    kspace, mask, truth = measured(24, 28)
    network = small(start="low_frequency")
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-2)
    losses = []
    for _ in range(15):
        optimizer.zero_grad()
        agreement = (network(kspace, mask).conj() * truth).sum(1).abs()
        loss = (1 - agreement).mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    for name, parameter in network.named_parameters():
        assert bool(torch.isfinite(parameter.grad).all()), name
    assert float(network.unet.model[0].conv.unit0.conv.weight.grad.abs().sum()) > 0
    copy = small(start="low_frequency")
    copy.load_state_dict(network.state_dict())
    assert torch.equal(copy(kspace, mask), network(kspace, mask))


def test_zero_kspace_gives_equal_maps_and_finite_gradients():
    kspace, mask, _ = measured(24, 28)
    kspace[0] = 0
    torch.testing.assert_close(small()(kspace, mask)[0], torch.full((4, 24, 28), 0.5 + 0j))
    network = stirred()
    maps = network(kspace, mask)
    torch.testing.assert_close(maps.abs().square().sum(1), torch.ones(2, 24, 28))
    maps.real.sum().backward()
    assert all(bool(torch.isfinite(parameter.grad).all()) for parameter in network.parameters())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: SensitivityNet(1), "spatial_dims"),
        (lambda: SensitivityNet(2, start="walsh"), "`start` must be one of espirit, low_frequency"),
        (lambda: SensitivityNet(2, channels=(4,)), "two levels"),
        (lambda: SensitivityNet(2, channels=(4, 8, 8), grid_size=18), "`grid_size` must be a multiple of 4"),
        (lambda: small()(torch.ones(1, 2, 8, 8)), "last axis of 2"),
        (lambda: small()(torch.ones(2, 8, 8) + 0j), "spatial axes"),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
