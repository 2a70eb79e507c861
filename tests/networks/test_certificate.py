import json
import math
import warnings

import pytest
import torch
from torch import nn

from monai_deqkan.networks import CertificateError, ContractionWarning, certify, check_contraction
from monai_deqkan.networks.blocks import CertifiedCell, ContractionBound, KANCell, Measurement, ReconstructionCell
from monai_deqkan.networks.layers import DEQLayer, remove_spectral_norm
from monai_deqkan.networks.nets import ConvexRidgeDenoiser, DEQKANClassifier, DEQReconstructor, DnCNN
from monai_deqkan.operators import MRIOperator, equispaced_mask, smooth_coil_maps
from monai_deqkan.solvers import AndersonSolver, FixedPointIteration, SolveRecorder, solve_fixed_point


def random(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


class LinearCell(nn.Module):
    """``z W + x`` that claims a contraction factor of its norm, or another one."""

    def __init__(self, norm, size=8, claim=None, seed=0, dtype=torch.float64):
        super().__init__()
        matrix = random(size, size, seed=seed, dtype=dtype)
        self.matrix = matrix * (norm / torch.linalg.matrix_norm(matrix, 2))
        self.claim = claim

    def forward(self, z, x):
        return z @ self.matrix + x

    def certified_contraction(self, x=None):
        claim = float(torch.linalg.matrix_norm(self.matrix, 2)) if self.claim is None else self.claim
        return ContractionBound(claim, ("The largest singular value of a stored matrix.",))


class PlainCell(nn.Module):
    def __init__(self, slope):
        super().__init__()
        self.slope = slope

    def forward(self, z, x):
        return self.slope * torch.tanh(z) + x


def mri(shape=(16, 12), batch=2, coils=3):
    maps = smooth_coil_maps(shape, coils, generator=torch.Generator().manual_seed(0))[None]
    mask = equispaced_mask(shape[-1], 2, 0.2, generator=torch.Generator().manual_seed(0)).reshape(1, 1, 1, -1)
    operator = MRIOperator(mask, maps, spatial_dims=2)
    kspace = operator(torch.complex(random(batch, *shape).float(), random(batch, *shape, seed=1).float()))
    return kspace, mask, maps, operator


def test_observed_numbers_are_those_of_the_matrix():
    cell = LinearCell(0.9)
    certificate = certify(cell, random(3, 8), num_iter=200)
    singular = torch.linalg.svdvals(cell.matrix).max().item()
    radius = torch.linalg.eigvals(cell.matrix).abs().max().item()
    assert certificate.factor == pytest.approx(0.9)
    assert certificate.jacobian_norm == pytest.approx([singular] * 3, rel=1e-6)
    assert certificate.spectral_radius == pytest.approx([radius] * 3, rel=0.02)
    assert all(radius <= value <= singular * (1 + 1e-9) for value in certificate.observed_factor)
    assert certificate.is_certified


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("factor", [0.3, 0.9, 0.99])
def test_error_is_never_above_its_bound(seed, factor):
    cell, x = LinearCell(factor, seed=seed), random(5, 8, seed=100 + seed)
    exact = x @ torch.linalg.inv(torch.eye(8, dtype=torch.float64) - cell.matrix)
    certificate = certify(cell, x)
    for max_iter in (1, 2, 5, 40):
        for solver in (FixedPointIteration, AndersonSolver):
            settings = solver(rtol=1e-8, max_iter=max_iter, on_failure="ignore")
            solution = solve_fixed_point(cell, torch.zeros_like(x), settings, x)
            error = solution.z - exact
            assert (error.pow(2).mean(1).sqrt() <= certificate.error_bound(solution) * (1 + 1e-9) + 1e-14).all()
            assert (error.norm(dim=1) <= certificate.error_bound(solution, norm="euclidean") * (1 + 1e-9) + 1e-14).all()
            relative = error.norm(dim=1) / cell(solution.z, x).norm(dim=1)
            assert (relative <= certificate.error_bound(solution, norm="relative") * (1 + 1e-9) + 1e-14).all()


def test_error_bound_is_reached_by_the_worst_map():
    class Shrinking(LinearCell):
        def forward(self, z, x):
            return 0.75 * z + x

    certificate = certify(Shrinking(0.75), torch.ones(1, 8, dtype=torch.float64))
    with SolveRecorder() as recorder:
        solution = solve_fixed_point(
            lambda z, x: 0.75 * z + x,
            torch.zeros(1, 8, dtype=torch.float64),
            FixedPointIteration(max_iter=4, on_failure="ignore"),
            torch.ones(1, 8, dtype=torch.float64),
        )
    error = (solution.z - 4).pow(2).mean().sqrt()
    assert certificate.error_bound(solution).item() == pytest.approx(error.item())
    assert certificate.error_bound(recorder.records[0].stats).item() == pytest.approx(error.item())
    with pytest.raises(TypeError, match="Euclidean norm needs the size"):
        certificate.error_bound(recorder.records[0].stats, norm="euclidean")
    with pytest.raises(ValueError, match="norm"):
        certificate.error_bound(solution, norm="max")


def test_error_bound_of_a_kan_cell_and_of_an_mri_reconstruction():
    torch.manual_seed(0)
    kan, x = KANCell(6, contraction=0.8).double(), random(4, 6)
    kspace, _, _, operator = mri()
    step = ReconstructionCell(DnCNN(2, 2, 2, 3, 6, residual=False, spectral_norm="certified"), contraction=0.9)
    data = (Measurement.of(operator, kspace), random(2, 2, 16, 12).float())
    for cell, injection, start, tight in ((kan, x, x, 1e-13), (step, data, data[1], 1e-7)):
        exact = solve_fixed_point(cell, start.detach(), FixedPointIteration(rtol=tight, max_iter=500), injection).z
        certificate = certify(cell, injection)
        for rtol in (1e-1, 1e-2, 1e-3):
            with torch.no_grad():
                loose = solve_fixed_point(cell, start, AndersonSolver(rtol=rtol), injection)
            error = (loose.z - exact).double().flatten(1).pow(2).mean(1).sqrt()
            bound = certificate.error_bound(loose)
            assert (error <= bound).all()
            assert (error >= bound / 100).any()  # not vacuous


def test_nothing_certified_means_no_bound():
    x = random(2, 4)
    certificate = certify(PlainCell(0.5), x)
    assert certificate.factor == math.inf
    assert not certificate.is_certified
    assert "Observed only" in str(certificate)
    assert certificate.jacobian_norm < (0.5 + 1e-9,) * 2
    solution = solve_fixed_point(PlainCell(0.5), torch.zeros_like(x), FixedPointIteration(), x)
    assert certificate.error_bound(solution).tolist() == [math.inf] * 2
    unsolved = solve_fixed_point(LinearCell(0.5, 4), x, FixedPointIteration(max_iter=0, on_failure="ignore"), x)
    assert certify(LinearCell(0.5, 4), x).error_bound(unsolved).tolist() == [math.inf] * 2
    broken = solve_fixed_point(lambda z: z * math.nan, x, FixedPointIteration(on_failure="ignore"))
    assert certify(LinearCell(0.5, 4), x).error_bound(broken).tolist() == [math.inf] * 2


def test_false_claim_is_found_out():
    cell, x = LinearCell(1.5, claim=0.9), random(2, 8)
    with pytest.raises(
        CertificateError, match=r"observed jacobian norm 1\.5 exceeds the certified factor 0\.9"
    ) as error:
        certify(cell, x, num_iter=200)
    assert error.value.certificate.factor == 0.9
    with pytest.warns(ContractionWarning, match="exceeds the certified factor"):
        certificate = certify(cell, x, on_violation="warn")
    assert not certificate.is_certified
    assert "CONTRADICTED" in str(certificate)
    assert certify(cell, x, on_violation="ignore") == certificate
    solution = solve_fixed_point(cell, torch.zeros_like(x), FixedPointIteration(max_iter=1, on_failure="ignore"), x)
    assert certificate.error_bound(solution).tolist() == [math.inf] * 2


def test_weights_changed_after_the_norm_was_removed():
    torch.manual_seed(0)
    cell, x = KANCell(6), random(2, 6).float()
    remove_spectral_norm(cell)
    assert certify(cell, x).factor == pytest.approx(0.9, rel=1e-4)
    with torch.no_grad():
        cell.kan.weight.mul_(10)
    certificate = certify(cell, x)
    assert certificate.factor == pytest.approx(9.0, rel=1e-4)  # from the weights as they are
    assert not certificate.is_certified


def test_prior_that_was_changed_is_measured_anew_and_one_that_lies_is_found_out():
    torch.manual_seed(0)
    kspace, _, _, operator = mri()
    x = (Measurement.of(operator, kspace), random(2, 2, 16, 12).float())
    prior = remove_spectral_norm(ConvexRidgeDenoiser(2, num_layers=1, features=4, threshold=10.0))
    step = ReconstructionCell(prior)
    with torch.no_grad():
        prior.analysis[0].weight.mul_(10)
        step.raw_relaxation.fill_(3.0)
    certificate = certify(step, x)
    assert prior.certified_lipschitz() > 50
    assert certificate.is_certified  # the step's weight is divided by the prior's constant
    assert "0 of its 1 layers are kept normalized" in str(certificate)
    prior.certified_lipschitz = lambda: 1.0
    with pytest.raises(CertificateError, match="exceeds the certified factor"):
        certify(step, x)


def test_measurement_of_too_small_a_curvature_is_noticed():
    torch.manual_seed(0)
    cell = ReconstructionCell(ConvexRidgeDenoiser(2, num_layers=1, features=4), contraction=0.9)
    kspace, _, _, operator = mri()
    measurement, reference = Measurement.of(operator, kspace), random(2, 2, 16, 12).float()
    sound = cell.certified_contraction((measurement, reference))
    assert sound.factor == pytest.approx(0.9 * torch.sigmoid(torch.tensor(3.0)).item())
    assert "sum |S|^2 / L is 1 at most (checked)" in " ".join(sound.assumptions)
    wrong = Measurement(operator, measurement.back_projection, measurement.curvature / 5)
    unsound = cell.certified_contraction((wrong, reference))
    assert unsound.factor == pytest.approx(sound.factor * 4)  # |1 - 1 * 5|
    assert certify(cell, (wrong, reference), solver=FixedPointIteration(on_failure="ignore")).factor > 1


def test_network_is_certified_by_a_call_and_left_as_it_was():
    torch.manual_seed(0)
    network = DEQKANClassifier(2, 1, 2, features=(4, 4, 8, 8), hidden_features=6)
    network.backbone.eval()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    modes = [part.training for part in network.modules()]
    image = random(3, 1, 32, 32).float()
    certificate = certify(network, image)
    assert certificate.cell == "KANCell"
    assert certificate.factor == pytest.approx(0.9, rel=1e-4)
    assert certificate.status == ("CONVERGED",) * 3
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert [part.training for part in network.modules()] == modes
    assert not any(part._forward_pre_hooks for part in network.modules())
    with torch.no_grad():
        x = network.eval().injection(image)
    assert certify(network.equilibrium, x).jacobian_norm == pytest.approx(certificate.jacobian_norm)


def test_arguments_of_the_layer_by_name_in_any_order():
    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = DEQLayer(PlainCell(0.5), AndersonSolver(rtol=1e-8))

        def forward(self, x):
            return self.layer(z0=torch.full_like(x, 7.0), x=x)

    x = random(3, 5)
    network = Network()
    by_name = certify(network, x)
    expected = certify(network.layer, x, torch.full_like(x, 7.0))
    assert by_name.jacobian_norm == expected.jacobian_norm
    assert by_name.evaluations == expected.evaluations


def test_reconstruction_network_with_maps():
    torch.manual_seed(0)
    kspace, mask, maps, _ = mri()
    network = DEQReconstructor(2, num_layers=1, features=4)
    certificate = certify(network, kspace, mask, maps.expand(2, -1, -1, -1))
    assert certificate.is_certified
    assert 0.5 < certificate.largest_observed <= certificate.factor
    with pytest.raises(ValueError, match="solved 2"):
        certify(Twice(), random(2, 4))


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = DEQLayer(PlainCell(0.5))

    def forward(self, x):
        return self.layer(x) + self.layer(x=x)


def test_check_warns_with_numbers_where_the_cell_expands():
    x = random(2, 4)
    with pytest.warns(ContractionWarning, match=r"spectral radius 2.*moves away.*KANCell"):
        check_contraction(PlainCell(2.0), 0 * x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_contraction(PlainCell(0.9), x)
        check_contraction(LinearCell(0.9, 4), x)
    shear = LinearCell(1.0, 2)
    shear.matrix = torch.tensor([[0.1, 3.0], [0.0, 0.1]], dtype=torch.float64)
    shear.claim = math.inf
    with pytest.warns(ContractionWarning, match="may converge from this start"):
        check_contraction(shear, random(2, 2))
    with pytest.warns(ContractionWarning, match="exceeds the certified factor"):
        check_contraction(LinearCell(1.5, 4, claim=0.5), x)


def test_complex_and_tuple_states():
    class Pair(nn.Module):
        def forward(self, z, x):
            return 0.5j * z[0] + x, 0.25 * z[1] + z[0].real[:, :2]

        def initial_state(self, x):
            return torch.zeros_like(x), torch.zeros_like(x.real[:, :2])

    x = torch.complex(random(2, 3), random(2, 3, seed=1))
    certificate = certify(Pair(), x, num_iter=200)
    dense = torch.zeros(8, 8, dtype=torch.float64)  # on (Re z0, Im z0, z1)
    dense[:3, 3:6] = -0.5 * torch.eye(3)
    dense[3:6, :3] = 0.5 * torch.eye(3)
    dense[6:, :2] = torch.eye(2)
    dense[6:, 6:] = 0.25 * torch.eye(2)
    norm = torch.linalg.matrix_norm(dense, 2).item()
    assert certificate.jacobian_norm == pytest.approx([norm] * 2, rel=1e-4)
    assert all(0.5 < value <= norm * (1 + 1e-9) for value in certificate.observed_factor)


def test_batch_statistics_and_dropout_are_named():
    cell = nn.Sequential(nn.Dropout(0.5))
    cell.forward = lambda z, x: 0.5 * cell[0](z) + x
    assert "Dropout: all of this is about evaluation mode only" in str(certify(cell, random(2, 4)))
    assert "no dropout" in str(certify(PlainCell(0.5), random(2, 4)))


def test_to_dict_is_json():
    certificate = certify(PlainCell(0.5), random(2, 4))
    stored = json.loads(json.dumps(certificate.to_dict(), allow_nan=False))
    assert stored["factor"] is None
    assert stored["jacobian_norm"] == list(certificate.jacobian_norm)
    assert stored["is_certified"] is False


def test_arguments_are_checked_and_have_effect():
    x = random(2, 8)
    with pytest.raises(TypeError, match=r"`module` must be a torch\.nn\.Module; got function"):
        certify(lambda z, x: z, x)
    with pytest.raises(ValueError, match="`num_iter` must be at least 2"):
        certify(LinearCell(0.5), x, num_iter=1)
    with pytest.raises(ValueError, match="on_violation"):
        certify(LinearCell(0.5), x, on_violation="stop")
    solver = FixedPointIteration(max_iter=3, on_failure="ignore")
    assert certify(LinearCell(0.5), x, solver=solver).evaluations == (3, 3)
    assert certify(DEQLayer(LinearCell(0.5), solver), x).evaluations == (3, 3)
    assert max(certify(DEQLayer(LinearCell(0.5), solver), x, solver="anderson").evaluations) > 3
    exact = x @ torch.linalg.inv(torch.eye(8, dtype=torch.float64) - LinearCell(0.5).matrix)
    assert certify(LinearCell(0.5), x, exact).evaluations == (1, 1)
    few, many = (certify(LinearCell(0.9), x, num_iter=num).jacobian_norm[0] for num in (2, 100))
    assert few < many
    assert isinstance(KANCell(2), CertifiedCell)
    assert not isinstance(PlainCell(1.0), CertifiedCell)
