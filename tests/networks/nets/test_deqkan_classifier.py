import copy
import pickle

import pytest
import torch
from monai.data import MetaTensor
from monai.networks.nets import EfficientNetBNFeatures, ResNet
from torch import nn

from monai_deqkan.adjoints import ImplicitAdjoint, UnrolledAdjoint
from monai_deqkan.networks import certify, export_error, prepare_for_export
from monai_deqkan.networks.layers import GaussianBasis, remove_spectral_norm
from monai_deqkan.networks.nets import DEQKANClassifier
from monai_deqkan.solvers import AndersonSolver, SolveRecorder

TIGHT = AndersonSolver(rtol=1e-12, max_iter=200, on_failure="ignore")


def small(**settings):
    torch.manual_seed(0)
    defaults = {"spatial_dims": 2, "in_channels": 1, "out_channels": 3, "features": (4, 4, 6, 8), "hidden_features": 6}
    return DEQKANClassifier(**{**defaults, **settings})


def images(batch=4, channels=1, shape=(32, 28)):
    return torch.rand(batch, channels, *shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(("spatial_dims", "shape"), [(2, (32, 28)), (3, (16, 20, 18))])
@pytest.mark.parametrize("pool", ["max", "avg"])
def test_finite_nonzero_gradients_of_every_parameter(spatial_dims, shape, pool):
    network = small(spatial_dims=spatial_dims, in_channels=2, pool=pool)
    logits = network(images(4, 2, shape))
    assert logits.shape == (4, 3)
    nn.functional.cross_entropy(logits, torch.tensor([0, 1, 2, 0])).backward()
    for name, parameter in network.named_parameters():
        assert torch.isfinite(parameter.grad).all(), name
        assert parameter.grad.abs().max() > 0, name


def test_equilibrium_residual_is_small_for_every_sample():
    network = small().eval()
    with torch.no_grad(), SolveRecorder() as recorder:
        injection = []
        network.injection_norm.register_forward_hook(lambda module, args, output: injection.append(output))
        z = network.equilibrium_features(images())
    fz = network.equilibrium.cell(z, injection[0])
    assert ((fz - z).norm(dim=1) / fz.norm(dim=1)).max().item() < 1e-3
    assert bool(recorder.converged().all())
    # Not trivial: the equilibrium moved away from the injection.
    assert (z - injection[0]).norm() > 0.05 * z.norm()


def test_sample_alone_equals_it_in_a_batch():
    network, x = small(solver=AndersonSolver(rtol=1e-6)).eval(), images()
    with torch.no_grad():
        together = network(x)
        for row in range(len(x)):
            assert torch.allclose(network(x[row : row + 1]), together[row : row + 1], atol=1e-4)


def test_implicit_gradient_equals_the_unrolled_one():
    gradients = []
    for adjoint in (ImplicitAdjoint(solver=TIGHT), UnrolledAdjoint()):
        network = small(solver=TIGHT, adjoint=adjoint, dropout=0.0).double()
        nn.functional.cross_entropy(network(images().double()), torch.tensor([0, 1, 2, 0])).backward()
        gradients.append({name: parameter.grad for name, parameter in network.named_parameters()})
    for name, implicit in gradients[0].items():
        assert torch.allclose(implicit, gradients[1][name], rtol=1e-6, atol=1e-10), name


def test_meta_tensors_give_the_same_logits_and_gradients():
    network, x = small().eval(), images()
    tracked = MetaTensor(x, affine=torch.eye(4), meta={"filename_or_obj": "x.png"})
    assert torch.equal(torch.as_tensor(network(tracked)).as_subclass(torch.Tensor), network(x))
    network(tracked).sum().backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in network.parameters())


def test_mixed_precision_outside_of_the_solve():
    network, x = small().eval(), images()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16), SolveRecorder() as recorder:
        mixed = network(x).float()
        assert network.equilibrium_features(x).dtype == torch.float32
    assert bool(recorder.converged().all())
    with torch.no_grad():
        assert torch.allclose(mixed, network(x), atol=0.1)


def test_dropout_acts_on_the_equilibrium_in_training_only():
    network, x = small(dropout=0.5), images()
    network.backbone.eval()  # its batch normalization would differ between the modes too
    torch.manual_seed(0)
    assert not torch.equal(network(x), network(x))
    network.eval()
    assert torch.equal(network(x), network(x))


def test_own_backbone_of_maps_or_vectors():
    torch.manual_seed(0)
    maps = nn.Conv2d(1, 5, 3)
    network = small(backbone=maps, backbone_channels=5, pool="avg").eval()
    vectors = small(
        backbone=nn.Sequential(maps, nn.AdaptiveAvgPool2d(1), nn.Flatten()), backbone_channels=5, pool="avg"
    ).eval()
    vectors.load_state_dict({name.replace("backbone.", "backbone.0."): v for name, v in network.state_dict().items()})
    with torch.no_grad():
        assert torch.allclose(network(images()), vectors(images()), atol=1e-5)


def test_max_pooling_finds_a_small_thing_anywhere():
    torch.manual_seed(0)
    network = small(backbone=nn.Identity(), backbone_channels=1).eval()
    a, b = torch.zeros(1, 1, 16, 16), torch.zeros(1, 1, 16, 16)
    a[..., 2, 3], b[..., 12, 9] = 1, 1
    with torch.no_grad():
        assert torch.equal(network(a), network(b))


def test_reload_deepcopy_and_pickle():
    network, x = small().eval(), images()
    torch.manual_seed(5)
    other = DEQKANClassifier(2, 1, 3, features=(4, 4, 6, 8), hidden_features=6).eval()
    with torch.no_grad():
        logits = network(x)
        assert not torch.allclose(other(x), logits)
        other.load_state_dict(network.state_dict())
        assert torch.equal(other(x), logits)
        assert torch.equal(copy.deepcopy(network)(x), logits)
        plain = pickle.loads(pickle.dumps(remove_spectral_norm(copy.deepcopy(network))))
        assert torch.allclose(plain(x), logits, atol=1e-5)


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match=r"`image` must have shape \(B, 1, H, W\); got \(4, 3, 32, 28\)"):
        small()(images(channels=3))
    with pytest.raises(ValueError, match=r"\(B, 1, D, H, W\)"):
        small(spatial_dims=3)(images())
    with pytest.raises(ValueError, match="one entry for each stage"):
        small(features=(4, 4))
    with pytest.raises(ValueError, match="needs `backbone_channels`"):
        small(backbone=nn.Identity())
    with pytest.raises(ValueError, match="`pool` must be one of max, avg, both; got 'mean'"):
        small(pool="mean")
    with pytest.raises(ValueError, match="`spatial_dims`"):
        small(spatial_dims=4)
    with pytest.raises(ValueError, match="`dropout`"):
        small(dropout=1.0)


VARIANTS = [
    {"kan_settings": {"basis": "bspline", "grid_size": 5}},
    {"equilibrium_on": "map"},
    {"equilibrium_on": "map", "kernel_size": 3, "pool": "avg"},
    {"cell": "mlp"},
    {"cell": "mlp", "equilibrium_on": "map"},
    {"backbone": "none"},
    {"backbone": "none", "equilibrium_on": "map"},
]


def size(module):
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize("settings", VARIANTS)
@pytest.mark.parametrize(("spatial_dims", "shape"), [(2, (32, 28)), (3, (16, 20, 18))])
def test_variants_are_certified_solved_differentiable_and_reloaded(settings, spatial_dims, shape):
    network, x = small(spatial_dims=spatial_dims, **settings), images(3, 1, shape)
    nn.functional.cross_entropy(network(x), torch.tensor([0, 1, 2])).backward()
    for name, parameter in network.named_parameters():
        assert torch.isfinite(parameter.grad).all(), name
        assert parameter.grad.abs().max() > 0, name
    certificate = certify(network, x)
    assert certificate.is_certified
    assert certificate.factor <= 0.9 * (1 + 1e-4)
    assert max(certificate.relative_residual) < 1e-3
    other = small(spatial_dims=spatial_dims, **settings)
    other.load_state_dict(network.state_dict())
    with torch.no_grad():
        assert torch.equal(other.eval()(x), network.eval()(x))


@pytest.mark.parametrize("settings", VARIANTS)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_variants_are_scripted(settings):
    network, x = small(**settings).eval(), images()
    scripted = torch.jit.script(prepare_for_export(network, return_residual=True))
    assert float(scripted(x)[1].max()) <= 1e-6
    assert export_error(network, scripted, x) < 1e-4


def test_default_is_sixteen_gaussians_below_a_million_parameters():
    network = DEQKANClassifier(2, 1, 2)
    layer = network.equilibrium.cell.kan
    assert layer.basis == GaussianBasis(grid_size=15, grid_range=(-3.0, 3.0))
    assert layer.basis.num_basis == 16
    assert size(network) < 1e6


@pytest.mark.parametrize("settings", [{}, {"equilibrium_on": "map"}, {"equilibrium_on": "map", "kernel_size": 3}])
def test_mlp_cell_has_as_many_parameters(settings):
    kan, mlp = (size(small(hidden_features=16, cell=cell, **settings).equilibrium) for cell in ("kan", "mlp"))
    assert abs(mlp / kan - 1) < 0.02


@pytest.mark.parametrize("settings", [{}, {"equilibrium_on": "map"}, {"cell": "mlp"}])
def test_explicit_steps_are_the_cell_applied_so_often(settings):
    network, x = small(num_steps=3, **settings).eval(), images()
    with torch.no_grad(), SolveRecorder() as recorder:
        p = network.injection(x)
        z = p
        for _ in range(3):
            z = network.steps.cell(z, p)
        z = torch.cat([z.flatten(2).mean(2), z.flatten(2).amax(2)], 1) if z.ndim > 2 else z
        assert torch.allclose(network(x), network.head(z), atol=1e-5)
    assert not recorder.records
    with pytest.raises(ValueError, match="there is no equilibrium"):
        network.equilibrium_features(x)
    with pytest.raises(TypeError, match="has none"):
        prepare_for_export(network)


def test_many_explicit_steps_reach_the_equilibrium():
    network, x = small(solver=AndersonSolver(rtol=1e-6)).eval(), images()
    steps = small(num_steps=60).eval()
    steps.load_state_dict({name.replace("equilibrium.", "steps."): v for name, v in network.state_dict().items()})
    with torch.no_grad():
        assert torch.allclose(steps(x), network(x), atol=1e-4)


def test_explicit_steps_in_mixed_precision_and_gradients():
    network, x = small(num_steps=2), images()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        features = network.state_features(x)
    assert features.dtype == torch.float32
    network(x).sum().backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in network.parameters())


def test_thumbnail_is_the_mean_over_blocks():
    network = small(backbone="none")
    image = images(2, 1, (64, 32))
    expected = image.view(2, 1, 16, 4, 16, 2).mean((3, 5)).flatten(1)
    assert torch.allclose(network.backbone(image), expected, atol=1e-6)


def test_monai_feature_extractors():
    torch.manual_seed(0)
    resnet = ResNet("basic", [1, 1, 1, 1], [4, 4, 6, 8], 2, 1, feed_forward=False)
    maps = EfficientNetBNFeatures("efficientnet-b0", pretrained=False, in_channels=1)
    for backbone, channels in ((resnet, 8), (maps, 320)):
        logits = small(backbone=backbone, backbone_channels=channels)(images(2, 1, (64, 64)))
        assert torch.isfinite(logits).all()
    with pytest.raises(ValueError, match="needs a backbone that returns maps"):
        small(backbone=resnet, backbone_channels=8, equilibrium_on="map")(images(2, 1, (64, 64)))


def test_wrong_variants_are_named():
    with pytest.raises(ValueError, match="`equilibrium_on` must be one of features, map"):
        small(equilibrium_on="maps")
    with pytest.raises(ValueError, match="`cell` must be one of kan, mlp"):
        small(cell="cnn")
    with pytest.raises(ValueError, match="`kernel_size` is for"):
        small(kernel_size=3)
    with pytest.raises(ValueError, match="num_steps"):
        small(num_steps=0)
    with pytest.raises(ValueError, match="`backbone` must be one of"):
        small(backbone="vgg")


@pytest.mark.parametrize("basis", ["chebyshev", ("fourier", {"num_frequencies": 3})])
@pytest.mark.parametrize("equilibrium_on", ["features", "map"])
def test_a_basis_without_a_grid_needs_no_further_setting(basis, equilibrium_on):
    network, x = small(equilibrium_on=equilibrium_on, kan_settings={"basis": basis}), images(2, 1, (32, 28))
    network(x).sum().backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in network.parameters())
    assert certify(network.eval(), x).is_certified
