import copy
import pickle

import pytest
import torch
from torch import nn

from monai_deqkan.adjoints import ImplicitAdjoint, UnrolledAdjoint
from monai_deqkan.networks import certify
from monai_deqkan.networks.layers import remove_spectral_norm
from monai_deqkan.networks.nets import DEQReconstructor, DnCNN, SensitivityNet
from monai_deqkan.networks.nets.deq_reconstructor import _joined
from monai_deqkan.operators import (
    equispaced_mask,
    espirit_maps,
    estimate_sensitivity_maps,
    map_misfit,
    simulate_kspace,
    smooth_coil_maps,
)
from monai_deqkan.solvers import AndersonSolver, SolveRecorder
from monai_deqkan.variational import cg_sense

TIGHT = AndersonSolver(rtol=1e-11, max_iter=400, on_failure="ignore")


FORMS = ("contracting", "cg", "prox", "grad")
SHAPES = ((24, 20), (13, 15), (8, 9, 10))


def small(spatial_dims=2, **settings):
    torch.manual_seed(0)
    defaults = {"num_layers": 2, "features": 4, "num_cg_steps": 4, "solver": AndersonSolver(rtol=1e-5, max_iter=200)}
    return DEQReconstructor(spatial_dims, **{**defaults, **settings})


def scene(shape=(24, 20), coils=4, batch=2, full=False, dtype=torch.complex64):
    """Return undersampled k-space, mask, maps and the complex image of a box with a hole."""
    generator = torch.Generator().manual_seed(0)
    image = torch.zeros(batch, *shape)
    image[(slice(None), *(slice(size // 4, -size // 4) for size in shape))] = 1.0
    image[(slice(None), *(slice(size // 3, size // 2) for size in shape))] = 0.4
    image = (image * torch.linspace(1, 2, batch).view(-1, *[1] * len(shape))).to(dtype)
    maps = smooth_coil_maps(shape, coils, generator=generator).to(dtype)
    mask = torch.ones(shape[-1], dtype=torch.bool)
    if not full:
        mask = equispaced_mask(shape[-1], 2, 0.3, generator=generator)
    mask = mask.view(*[1] * (len(shape) + 1), -1)
    return simulate_kspace(image, maps) * mask, mask, maps[None], image


class Smoothing(nn.Module):
    """A linear denoiser that shrinks by 0.9 at least, blind to the unit, with something to learn."""

    def __init__(self, spatial_dims):
        super().__init__()
        self.mix = nn.Parameter(torch.tensor(0.6))
        self.axes = range(2, 2 + spatial_dims)

    def forward(self, image):
        neighbours = sum(image.roll(1, axis) + image.roll(-1, axis) for axis in self.axes) / (2 * len(self.axes))
        return 0.9 * (self.mix * image + (1 - self.mix) * neighbours)


def formed(form, spatial_dims=2, **settings):
    """Return a network of each form that has an equilibrium."""
    prior = "ridge" if form == "contracting" else Smoothing(spatial_dims)
    sizes = {} if form == "contracting" else {"num_layers": None, "features": None}
    return small(spatial_dims, prior=prior, form=form, **{**sizes, **settings})


def distance(a, b):
    return ((a - b).norm() / b.norm()).item()


def magnitude(channels):
    return channels.square().sum(1).sqrt()


@pytest.mark.parametrize("prior", ["ridge", "dncnn"])
@pytest.mark.parametrize("shape", [(24, 20), (8, 12, 10)])
def test_finite_nonzero_gradients_of_every_parameter(prior, shape):
    network = small(len(shape), prior=prior, num_cg_steps=1)
    kspace, mask, maps, image = scene(shape)
    kspace = kspace + 0.05 * torch.randn(kspace.shape, dtype=kspace.dtype) * mask
    output = network(kspace, mask, maps)
    (magnitude(output) - image.abs()).square().mean().backward()
    assert output.shape == (2, 2, *shape)
    for name, parameter in network.named_parameters():
        assert torch.isfinite(parameter.grad).all(), name
        assert parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("prior", ["ridge", "dncnn"])
def test_equilibrium_residual_is_small_and_recomputed(prior):
    network, (kspace, mask, maps, _) = small(prior=prior), scene()
    calls = []
    network.equilibrium.register_forward_hook(lambda module, args, output: calls.append((args[0], output)))
    with torch.no_grad(), SolveRecorder() as recorder:
        network(kspace, mask, maps)
        ((measurement, reference), z) = calls[0]
        fz = network.equilibrium.cell(z, (measurement, reference))
    assert (fz - z).flatten(1).norm(dim=1).div(fz.flatten(1).norm(dim=1)).max().item() <= 2e-5
    assert bool(recorder.converged("forward").all())
    assert distance(z, reference) > 1e-3  # the equilibrium is not just where it starts


@pytest.mark.parametrize("scale", [1e4, 1e-6])
def test_any_unit_of_kspace(scale):
    network, (kspace, mask, maps, _) = small(), scene()
    with torch.no_grad():
        assert distance(network(scale * kspace, mask, maps), scale * network(kspace, mask, maps)) < 1e-4


def test_units_may_differ_within_a_batch():
    network, (kspace, mask, maps, _) = small(), scene()
    scale = torch.tensor([1.0, 1e5]).view(2, 1, 1, 1)
    with torch.no_grad():
        assert distance(network(kspace * scale, mask, maps)[1], 1e5 * network(kspace, mask, maps)[1]) < 1e-4


def test_real_input_equals_complex_input():
    network, (kspace, mask, maps, _) = small(), scene()
    with torch.no_grad():
        expected = network(kspace, mask, maps)
        assert torch.equal(network(torch.view_as_real(kspace), mask, torch.view_as_real(maps)), expected)


def test_inferred_mask_equals_the_given_one():
    network, (kspace, mask, maps, _) = small(), scene()
    with torch.no_grad():
        assert distance(network(kspace, None, maps), network(kspace, mask, maps)) < 1e-5
        assert distance(network(kspace), network(kspace, mask)) < 1e-5


def test_sample_alone_equals_it_in_a_batch():
    network, (kspace, mask, maps, _) = small(), scene()
    with torch.no_grad():
        together = network(kspace, mask, maps)
        for row in range(2):
            assert distance(network(kspace[row : row + 1], mask, maps), together[row : row + 1]) < 1e-4


def test_masks_may_differ_within_a_batch():
    network, (kspace, _, maps, _) = small(), scene(full=True)
    masks = torch.cat([scene()[1], scene(full=True)[1]])
    with torch.no_grad():
        together = network(kspace * masks, masks, maps)
        for row in range(2):
            alone = network((kspace * masks)[row : row + 1], masks[row : row + 1], maps)
            assert distance(alone, together[row : row + 1]) < 1e-4


@pytest.mark.parametrize(("shape", "coils"), [((24, 20), 4), ((24, 20), 1), ((8, 12, 10), 4)])
@pytest.mark.parametrize("prior", ["ridge", "dncnn"])
def test_fully_sampled_noise_free_kspace_gives_the_image_back(shape, coils, prior):
    kspace, mask, maps, image = scene(shape, coils, full=True)
    with torch.no_grad():
        output = small(len(shape), prior=prior)(kspace, mask, maps)
    assert distance(torch.complex(output[:, 0], output[:, 1]), image) < (0.05 if prior == "ridge" else 0.6)


def test_single_coil_without_maps():
    _, mask, _, image = scene(coils=1)
    truth = simulate_kspace(image, torch.ones(1, 24, 20, dtype=torch.complex64)) * mask
    with torch.no_grad():
        output = small()(truth, mask)
    zero_filled = torch.fft.ifftshift(truth[:, 0], dim=(-2, -1))
    zero_filled = torch.fft.fftshift(torch.fft.ifft2(zero_filled, norm="ortho"), dim=(-2, -1)).abs()
    # Nothing fills the gaps of one coil without training; nothing gets lost either.
    assert distance(magnitude(output), image.abs()) < 1.1 * distance(zero_filled, image.abs())


def test_maps_are_estimated_as_told():
    kspace, mask, maps, _ = scene()
    learned = SensitivityNet(2, channels=(4, 8), grid_size=16)
    torch.nn.init.normal_(learned.head.weight, std=0.3)
    for sensitivity, estimate in (("espirit", espirit_maps), (learned, learned)):
        network = small(sensitivity=sensitivity)
        assert torch.equal(network(kspace, mask), network(kspace, mask, estimate(kspace, mask)))
        assert not torch.equal(network(kspace, mask), small()(kspace, mask))
        assert torch.equal(network(kspace, mask, maps), small()(kspace, mask, maps))
    network(kspace, mask).sum().backward()
    assert all(parameter.grad is None for parameter in learned.parameters())
    assert "sensitivity.head.weight" in network.state_dict()
    with pytest.raises(ValueError, match="Did you mean 'espirit'"):
        small(sensitivity="espirrit")


def test_more_trust_in_the_data_comes_nearer_to_the_measured_kspace():
    network, (kspace, mask, maps, image) = small(), scene()
    reference = cg_sense(kspace, mask, maps, max_iter=50)
    with torch.no_grad():
        output = network(kspace, mask, maps)
    found = torch.complex(output[:, 0], output[:, 1])
    assert distance(found, reference) < 0.2
    assert distance(found, image) < 0.3


def test_implicit_gradient_equals_the_unrolled_one():
    gradients = []
    kspace, mask, maps, _ = scene((10, 8), 2, dtype=torch.complex128)
    weight = torch.randn(2, 2, 10, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for adjoint in (ImplicitAdjoint(solver=TIGHT), UnrolledAdjoint()):
        network = small(solver=TIGHT, adjoint=adjoint, contraction=0.8, num_cg_steps=1).double()
        (network(kspace, mask, maps) * weight).sum().backward()
        gradients.append({name: parameter.grad for name, parameter in network.named_parameters()})
    for name, implicit in gradients[0].items():
        assert torch.allclose(implicit, gradients[1][name], rtol=1e-5, atol=1e-8), name


def test_no_gradient_flows_to_the_measurement():
    kspace, mask, maps, _ = scene((10, 8), 2)
    gradients = []
    for live in (False, True):
        network = small()
        inputs = [tensor.clone().requires_grad_(live) for tensor in (kspace, maps)]
        network(inputs[0], mask, inputs[1]).square().sum().backward()
        assert [tensor.grad for tensor in inputs] == [None, None]
        gradients.append([parameter.grad for parameter in network.parameters()])
    torch.testing.assert_close(gradients[1], gradients[0], rtol=0, atol=0)


def test_mixed_precision_outside_leaves_the_result_alone():
    network, (kspace, mask, maps, _) = small(), scene()
    with torch.no_grad():
        expected = network(kspace, mask, maps)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            mixed = network(kspace, mask, maps)
    assert mixed.dtype == torch.float32
    assert distance(mixed, expected) < 1e-5


def test_reload_deepcopy_and_pickle():
    network, (kspace, mask, maps, _) = small(), scene()
    with torch.no_grad():
        network.equilibrium.cell.raw_step_size.add_(0.7)
        for parameter in network.parameters():
            parameter.add_(0.05)
        expected = network(kspace, mask, maps)
        other = small()
        assert distance(other(kspace, mask, maps), expected) > 1e-4
        other.load_state_dict(network.state_dict())
        assert torch.equal(other(kspace, mask, maps), expected)
        assert torch.equal(copy.deepcopy(network)(kspace, mask, maps), expected)
        plain = pickle.loads(pickle.dumps(remove_spectral_norm(copy.deepcopy(network))))
        assert distance(plain(kspace, mask, maps), expected) < 1e-4


def test_kspace_of_zeros_gives_an_image_of_zeros_where_the_mask_is_known():
    network, (kspace, mask, maps, _) = small(), scene()
    with torch.no_grad():
        assert torch.equal(network(0 * kspace, mask, maps), torch.zeros(2, 2, 24, 20))
    with pytest.raises(ValueError, match="zero everywhere"):
        network(0 * kspace)


def test_wrong_arguments_are_named():
    network, (kspace, mask, maps, _) = small(), scene()
    with pytest.raises(ValueError, match=r"`kspace` must have shape \(B, K, H, W\).*Single-coil data need a coil axis"):
        network(kspace[:, 0])
    with pytest.raises(ValueError, match="must be complex, or real with a last axis of 2"):
        network(kspace.real)
    with pytest.raises(TypeError, match=r"`kspace` must be a torch.Tensor; got ndarray"):
        network(kspace.numpy())
    broken = kspace.clone()
    broken[0, 0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"`kspace` must be finite.*Remove broken slices"):
        network(broken)
    with pytest.raises(ValueError, match="`mask` must"):
        network(kspace, mask[0])
    with pytest.raises(ValueError, match="maps"):
        network(kspace, mask, maps[:, :3])
    with pytest.raises(ValueError, match=r"`sensitivity_maps` must be finite.*Set them to zero"):
        network(kspace, mask, maps * float("nan"))
    with pytest.raises(TypeError, match=r"`sensitivity_maps` must be a torch.Tensor; got ndarray"):
        network(kspace, mask, maps.numpy())
    with pytest.raises(ValueError, match=r"`kspace` must have shape .*got \(0, 4, 24, 20\)"):
        network(kspace[:0], mask, maps)
    with pytest.raises(
        ValueError,
        match=r"`prior` must be one of ridge, .*, dncnn, unet; got 'ridg'. Did you mean 'ridge'",
    ):
        small(prior="ridg")
    with pytest.raises(ValueError, match="leave them out with a module"):
        small(prior=DnCNN(2, 2, 2, 2, 4, residual=False, spectral_norm="certified"))
    with pytest.raises(ValueError, match="`num_cg_steps`"):
        small(num_cg_steps=0)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_solved_per_sample_on_images_and_volumes(form, shape):
    network, (kspace, mask, maps, _) = formed(form, len(shape)), scene(shape)
    masks = torch.cat((mask, scene(shape, full=True)[1]))
    calls = []
    network.equilibrium.register_forward_hook(lambda module, args, output: calls.append((args[0], output)))
    with torch.no_grad(), SolveRecorder() as recorder:
        together = network(kspace * masks, masks, maps)
        (inputs, z) = calls[0]
        fz = network.equilibrium.cell(z, inputs)
        assert (fz - z).flatten(1).norm(dim=1).div(fz.flatten(1).norm(dim=1)).max().item() <= 2e-5
        assert bool(recorder.converged("forward").all())
        assert distance(z, inputs[1]) > 1e-3
        for row in range(2):
            alone = network((kspace * masks)[row : row + 1], masks[row : row + 1], maps)
            assert distance(alone, together[row : row + 1]) < 2e-4
        assert distance(network(1e4 * kspace * masks, masks, maps), 1e4 * together) < 2e-4


@pytest.mark.parametrize("shape", [(6, 5), (3, 4, 4)])
@pytest.mark.parametrize("form", ["cg", "prox", "grad"])
def test_implicit_gradient_of_the_other_forms_equals_the_unrolled_one(form, shape):
    kspace, mask, maps, _ = scene(shape, 2, dtype=torch.complex128)
    weight = torch.randn(2, 2, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    solver, gradients = AndersonSolver(rtol=1e-9, max_iter=200), []
    for adjoint in (ImplicitAdjoint(solver=solver), UnrolledAdjoint()):
        network = formed(form, len(shape), solver=solver, adjoint=adjoint, num_cg_steps=1).double()
        if form == "cg":
            network.equilibrium.cell.cg_rtol, network.equilibrium.cell.cg_max_iter = 1e-11, 100
        (network(kspace, mask, maps) * weight).sum().backward()
        gradients.append({name: parameter.grad for name, parameter in network.named_parameters()})
    for name, implicit in gradients[0].items():
        assert torch.isfinite(implicit).all(), name
        assert torch.allclose(implicit, gradients[1][name], rtol=1e-4, atol=1e-6), name


@pytest.mark.parametrize("prior", ["ridge", "complex_ridge", "dncnn", "unet"])
@pytest.mark.parametrize("form", ["cg", "prox", "grad"])
def test_gradients_reach_every_parameter_of_every_prior(form, prior):
    sizes = {"num_layers": 1, "features": (4, 6)} if prior == "unet" else {"num_layers": 2, "features": 4}
    solver = AndersonSolver(rtol=1e-2, max_iter=8, on_failure="ignore")
    network = small(prior=prior, form=form, num_cg_steps=1, solver=solver, adjoint=("phantom", {}), **sizes)
    kspace, mask, maps, image = scene()
    kspace = kspace + 0.05 * torch.randn(kspace.shape, dtype=kspace.dtype) * mask
    (magnitude(network(kspace, mask, maps)) - image.abs()).square().mean().backward()
    for name, parameter in network.named_parameters():
        assert torch.isfinite(parameter.grad).all(), name
        assert parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("form", FORMS)
def test_map_sets_are_joined_by_root_sum_of_squares(form):
    network, (kspace, mask, maps, _) = formed(form), scene()
    with torch.no_grad():
        empty = torch.stack((maps, torch.zeros_like(maps)), dim=1)
        assert distance(network(kspace, mask, empty), network(kspace, mask, maps)) < 1e-3
        halves = torch.stack((0.6 * maps, 0.8j * maps), dim=1)
        calls = []
        network.equilibrium.register_forward_hook(lambda module, args, output: calls.append(output))
        joined, both = network(kspace, mask, halves), calls[0]
        ratio = (magnitude(joined) / both.square().sum(dim=(1, 2)).sqrt()).flatten(1)  # the brightness
        assert float((ratio.std(dim=1) / ratio.mean(dim=1)).max()) < 1e-5
        product = torch.complex(*joined.unbind(1)) * torch.complex(*both[:, :, 0].unbind(1)).conj()
        assert float(product.imag.abs().max() / product.abs().max()) < 1e-5
        assert float(product.real.min()) >= 0


def test_joined_map_sets_where_some_or_all_of_them_are_zero():
    images = torch.zeros(1, 2, 2, 3, 3)
    images[..., 0, 0] = 1.0
    images[:, 1, 1, 0, 1] = 3.0  # nothing in the first set: no phase to take
    images.requires_grad_()
    joined = _joined(images)
    expected = torch.zeros(1, 2, 3, 3)
    expected[..., 0, 0] = 2**0.5
    expected[:, 0, 0, 1] = 3.0
    torch.testing.assert_close(joined, expected)
    joined.sum().backward()
    assert bool(torch.isfinite(images.grad).all())
    assert float(images.grad[..., 0, 0].abs().max()) > 0


@pytest.mark.parametrize("form", FORMS)
def test_every_form_in_double_precision_and_reloaded(form, tmp_path):
    network, (kspace, mask, maps, _) = formed(form), scene()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.05)
        single = network(kspace, mask, maps)
        torch.save(network.state_dict(), tmp_path / "network.pt")
        other = formed(form)
        assert distance(other(kspace, mask, maps), single) > 1e-4
        other.load_state_dict(torch.load(tmp_path / "network.pt", weights_only=True))
        assert torch.equal(other(kspace, mask, maps), single)
        double = network.double()(kspace.to(torch.complex128), mask, maps.to(torch.complex128))
    assert double.dtype == torch.float64
    assert distance(single, double) < 3e-4


def test_certified_conjugate_gradients_contract_and_say_so():
    network, (kspace, mask, maps, _) = small(form="cg", contraction=0.9), scene()
    certificate = certify(network, kspace, mask, maps)
    assert certificate.is_certified
    assert certificate.factor <= 0.9
    assert certificate.largest_observed <= certificate.factor
    with pytest.raises(ValueError, match="prior with a certified Lipschitz constant"):
        small(form="cg", contraction=0.9, prior="unet", features=(4, 6))
    with pytest.raises(ValueError, match="'prox' has no certificate"):
        small(form="prox", contraction=0.9)
    with pytest.raises(ValueError, match=r"`form` must be one of .*Did you mean 'prox'"):
        small(form="proxx")


def test_kspace_of_another_precision_is_worked_on_in_that_of_the_weights() -> None:
    torch.manual_seed(0)
    network = DEQReconstructor(2, num_layers=1, features=2).eval()
    kspace = torch.randn(1, 2, 16, 16, dtype=torch.complex128)
    with torch.no_grad():
        single = network(kspace)
        torch.testing.assert_close(single, network(kspace.to(torch.complex64)))
        double = network.double()(kspace.to(torch.complex64))
    assert (single.dtype, double.dtype) == (torch.float32, torch.float64)


def test_weight_and_noise_level_are_where_the_cell_starts_and_refused_where_it_has_none():
    cell = DEQReconstructor(2, "unet", form="cg", features=(4, 6), weight=0.2, noise_level=0.07).equilibrium.cell
    assert cell.weight.item() == pytest.approx(0.2)
    assert cell.noise_level.item() == pytest.approx(0.07)
    energy = DEQReconstructor(2, "weakly_convex_ridge", form="reweighted", features=(3, 2), weight=2.0)
    assert energy.equilibrium.cell.weight.item() == pytest.approx(2.0)
    with pytest.raises(ValueError, match="weight"):
        DEQReconstructor(2, weight=0.1)
    with pytest.raises(ValueError, match="noise_level"):
        DEQReconstructor(2, "weakly_convex_ridge", form="reweighted", noise_level=0.1)
    with pytest.raises(TypeError, match="energy"):
        DEQReconstructor(2, "unet", form="reweighted")


def test_reweighted_form_sees_the_faults_of_maps_made_of_the_centre_itself():
    kspace, mask, maps, _ = scene((24, 20))
    network = small(2, prior="weakly_convex_ridge", form="reweighted", num_layers=None, features=(4, 3))
    made_of_it = estimate_sensitivity_maps(kspace, mask)
    assert float(map_misfit(kspace, made_of_it, mask).max()) < 1e-6
    found = network._misfit(kspace, mask, made_of_it)
    torch.testing.assert_close(found, map_misfit(kspace, made_of_it, mask, windowed=False), rtol=1e-3, atol=1e-6)
    assert float(found.min()) > 1e-3
    # Of other maps the windowed centre decides.
    wrong = maps.flip(1)
    torch.testing.assert_close(network._misfit(kspace, mask, wrong), map_misfit(kspace, wrong, mask))


def test_reweighted_form_takes_scales_masks_without_centre_volumes_and_map_sets():
    for shape, sets in (((24, 20), 2), ((13, 15), 1), ((8, 9, 10), 1)):
        kspace, mask, maps, _ = scene(shape)
        network = small(
            len(shape),
            prior="weakly_convex_ridge",
            form="reweighted",
            num_layers=None,
            features=(4, 3),
            solver=AndersonSolver(rtol=1e-3, max_iter=60),
        ).eval()
        if sets == 2:
            maps = torch.stack((maps, maps.flip(1)), dim=1) / 2
        with torch.no_grad(), SolveRecorder() as recorder:
            image, larger = network(kspace, mask, maps), network(1000 * kspace, mask, maps)
        assert image.shape == (2, 2, *shape)
        assert bool(recorder.converged().all())
        assert float((larger / 1000 - image).norm()) < 0.02 * float(image.norm())  # two solves to 1e-3
    holed = mask.clone()
    holed[..., mask.shape[-1] // 2] = False  # no central lines: nothing is known of the maps' misfit
    with torch.no_grad():
        assert bool(network(kspace * holed, holed, maps).isfinite().all())
