"""Exported equilibrium networks against the networks themselves."""

import pytest
import torch
from torch import nn

from monai_deqkan.networks import export_error, prepare_for_export
from monai_deqkan.networks.blocks import KANCell
from monai_deqkan.networks.layers import DEQLayer, certified_spectral_norm
from monai_deqkan.networks.layers.equilibrium_loop import EquilibriumLoop
from monai_deqkan.networks.nets import DEQKANClassifier, DEQReconstructor, DnCNN, UNetDenoiser
from monai_deqkan.operators import equispaced_mask, simulate_kspace, smooth_coil_maps
from monai_deqkan.solvers import ConvergenceError

pytestmark = pytest.mark.filterwarnings("ignore")  # torch's own, on scripting and on export
D = torch.export.Dim.DYNAMIC
SIZES = {2: ((40, 36), (70, 84)), 3: ((36, 34, 34), (40, 34, 48))}
KSPACE_SIZES = {2: ((24, 20), (30, 35)), 3: ((8, 12, 10), (10, 9, 14))}


def classifier(dims, **settings):
    torch.manual_seed(0)
    return DEQKANClassifier(dims, 1, 3, features=(4, 4, 6, 8), hidden_features=8, **settings).eval()


def reconstructor(dims, prior, **settings):
    torch.manual_seed(0)
    return DEQReconstructor(dims, prior, num_layers=2, features=4, num_cg_steps=3, **settings).eval()


def images(shape, batch=2):
    return torch.rand(batch, 1, *shape, generator=torch.Generator().manual_seed(1))


def scene(shape, batch=2, coils=4):
    """Return noisy undersampled k-space, real, with its mask and maps."""
    generator = torch.Generator().manual_seed(0)
    image = torch.rand(batch, *shape, generator=generator).cumsum(1) / shape[0]
    maps = smooth_coil_maps(shape, coils, generator=generator).to(torch.complex64)
    mask = equispaced_mask(shape[-1], 2, 0.3, generator=generator).view(*[1] * (len(shape) + 1), -1)
    kspace = simulate_kspace(image, maps)
    kspace = (kspace + 0.02 * torch.randn(kspace.shape, dtype=kspace.dtype, generator=generator)) * mask
    return torch.view_as_real(kspace), mask, torch.view_as_real(maps[None]).contiguous()


def case(name, dims):
    """Return a network and its inputs of two sizes and two batch sizes."""
    if name == "classifier":
        small, large = SIZES[dims]
        return classifier(dims), (images(small),), (images(large, 3),)
    small, large = KSPACE_SIZES[dims]
    return reconstructor(dims, name), scene(small)[:1], scene(large, 3)[:1]


CASES = [(name, dims) for name in ("classifier", "ridge", "dncnn") for dims in (2, 3)] + [("complex_ridge", 2)]
QUICK = [("classifier", 2), ("ridge", 2)]
SLOW = [pytest.param(*c, marks=() if c in QUICK else pytest.mark.slow) for c in CASES]


def dynamic(x, dims):
    return ({0: D, **{axis: D for axis in range(2, 2 + dims)}},)


def onnx_runner(program, path):
    runtime = pytest.importorskip("onnxruntime")
    program.save(path)
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])

    def run(*inputs):
        names = [value.name for value in session.get_inputs()]
        found = session.run(None, {name: x.numpy() for name, x in zip(names, inputs, strict=True)})
        return tuple(torch.as_tensor(value) for value in found)

    return run


def assert_solved_and_equal(network, exported, *inputs):
    residual = exported(*inputs)[1]
    assert residual.shape == (len(inputs[0]),)
    assert float(residual.max()) <= 1e-6
    assert export_error(network, exported, *inputs) < 1e-4


@pytest.mark.parametrize(("name", "dims"), CASES)
def test_scripted_network_agrees_on_two_sizes(name, dims, tmp_path):
    network, small, large = case(name, dims)
    torch.jit.script(prepare_for_export(network, return_residual=True)).save(tmp_path / "model.ts")
    scripted = torch.jit.load(tmp_path / "model.ts")
    for inputs in (small, large):
        assert_solved_and_equal(network, scripted, *inputs)


@pytest.mark.parametrize(("name", "dims"), SLOW)
def test_onnx_and_torch_export_agree_on_two_sizes(name, dims, tmp_path):
    pytest.importorskip("onnxscript")
    network, small, large = case(name, dims)
    form = prepare_for_export(network, return_residual=True)
    program = torch.export.export(form, small, dynamic_shapes=dynamic(small[0], dims))
    onnx = torch.onnx.export(program, dynamo=True, opset_version=18, verbose=False)
    for exported in (program.module(), onnx_runner(onnx, tmp_path / "model.onnx")):
        for inputs in (small, large):
            assert_solved_and_equal(network, exported, *inputs)


class Mixing(nn.Module):
    """A linear denoiser that shrinks."""

    def forward(self, image):
        return 0.45 * (image + image.roll(1, -1))


def formed(form, dims, prior):
    """Return a network that converges: the U-Net's branch shrinks the image, as one that was trained does noise."""
    torch.manual_seed(0)
    if prior == "unet":
        prior = UNetDenoiser(dims, features=(4, 6, 8), num_blocks=1)
        with torch.no_grad():
            for layer in (prior.head, prior.tail):
                nn.init.dirac_(layer.weight)
            prior.head.weight[2, 2] = 0.02
            prior.tail.weight.mul_(0.05)
    return DEQReconstructor(dims, Mixing() if prior == "mixing" else prior, form=form, num_cg_steps=3).eval()


SLOW_CG = pytest.param("cg", "mixing", marks=pytest.mark.slow)
FORMED = [("cg", "unet"), ("prox", "unet"), ("grad", "mixing"), SLOW_CG]
EXPORTED = [pytest.param(form, "unet", marks=pytest.mark.slow) for form in ("cg", "prox")] + FORMED[2:]


@pytest.mark.parametrize("dims", [2, pytest.param(3, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("form", "prior"), FORMED)
def test_scripted_forms_without_a_certificate_agree(form, prior, dims):
    network = formed(form, dims, prior)
    if form == "cg":  # as far as float32 goes, so that equilibria can be compared
        network.equilibrium.cell.cg_rtol, network.equilibrium.cell.cg_max_iter = 1e-6, 20
    scripted = torch.jit.script(prepare_for_export(network, rtol=1e-5, return_residual=True))
    for shape in KSPACE_SIZES[dims]:
        inputs = scene(shape)
        image, residual = scripted(*inputs)
        assert float(residual.max()) <= 1e-5
        assert export_error(network, scripted, *inputs, rtol=1e-5) < 2e-3
        assert bool(torch.isfinite(image).all())


@pytest.mark.parametrize(("form", "prior"), EXPORTED)
def test_torch_export_of_forms_without_a_certificate_agrees(form, prior):
    network = formed(form, 2, prior)
    inputs = scene(KSPACE_SIZES[2][0])[:1]
    if form == "cg":
        network.equilibrium.cell.cg_rtol, network.equilibrium.cell.cg_max_iter = 1e-6, 20
    program = torch.export.export(prepare_for_export(network, rtol=1e-5), inputs)
    assert export_error(network, program.module(), *inputs, rtol=1e-5) < 2e-3


@pytest.mark.parametrize("shape", [(8, 12), (7, 9), (5, 6, 7)])
@pytest.mark.parametrize("blind", [False, True])
def test_the_u_net_prior_in_its_exported_form(shape, blind):
    torch.manual_seed(0)
    prior = UNetDenoiser(len(shape), features=(4, 6, 8), num_blocks=2, blind=blind)
    network = DEQReconstructor(len(shape), prior, form="cg")
    form = torch.jit.script(prepare_for_export(network).loop.cell.prior)
    x = torch.randn(2, 2, *shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = prior(x) if blind else prior(x, network.equilibrium.cell.noise_level)
        torch.testing.assert_close(form(x), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dims", [2, 3])
def test_scripted_reconstruction_with_mask_and_maps(dims):
    network = reconstructor(dims, "ridge")
    scripted = torch.jit.script(prepare_for_export(network, return_residual=True))
    for shape in KSPACE_SIZES[dims]:
        kspace, mask, maps = scene(shape)
        assert_solved_and_equal(network, scripted, kspace, mask, maps)
        assert_solved_and_equal(network, scripted, torch.view_as_complex(kspace), mask, torch.view_as_complex(maps))
    assert_solved_and_equal(network, scripted, scene(shape, coils=1)[0])  # a single coil has the map 1


def test_the_network_stays_as_it_is():
    network, (x,), _ = case("classifier", 2)
    network.train()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    form = prepare_for_export(network)
    assert network.training
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert all(parameter.requires_grad for parameter in network.parameters())
    assert not any(parameter.requires_grad for parameter in form.parameters())
    assert export_error(network.eval(), form, x) < 1e-5


def test_settings_have_an_effect():
    network, (x,), _ = case("classifier", 2)
    residuals = {}
    for key, settings in {"loose": {"rtol": 1e-2}, "tight": {"rtol": 1e-6}, "short": {"max_iter": 2}}.items():
        residuals[key] = prepare_for_export(network, return_residual=True, **settings)(x)[1]
    assert bool((residuals["tight"] <= 1e-6).all())
    assert bool((residuals["tight"] < residuals["loose"]).all())
    assert bool((residuals["loose"] <= 1e-2).all())
    assert bool((residuals["short"] > 1e-6).all())


class Network(nn.Module):
    """A network of a user's own with an equilibrium inside."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(3, 4)
        self.equilibrium = DEQLayer(Cell())

    def forward(self, x):
        return self.equilibrium(self.first(x))


class Cell(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = certified_spectral_norm(nn.Linear(4, 4), 0.9)

    def forward(self, z, x):
        return torch.tanh(self.linear(z)) + x


def test_a_network_of_ones_own():
    network, x = Network().eval(), torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    form = prepare_for_export(network)
    assert export_error(network, form, x) < 1e-5
    assert export_error(network, torch.jit.script(form), x) < 1e-5
    exported = torch.export.export(form, (x,), dynamic_shapes=({0: D},)).module()
    assert export_error(network, exported, x[:2]) < 1e-5


class Affine(nn.Module):
    """``z = W z + b``, whose equilibrium is known."""

    def __init__(self, factor):
        super().__init__()
        matrix = torch.randn(12, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        self.W = nn.Parameter(factor * matrix / torch.linalg.matrix_norm(matrix, 2), requires_grad=False)

    def forward(self, z: torch.Tensor, data: list[torch.Tensor]) -> torch.Tensor:
        return z @ self.W.T + data[0]


@pytest.mark.parametrize("history_size", [1, 6])
def test_loop_finds_the_closed_form(history_size):
    loop = EquilibriumLoop(Affine(0.95), rtol=1e-10, max_iter=500, history_size=history_size)
    b = torch.randn(3, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    b = b * torch.tensor([[1e-6], [1.0], [1e6]])
    exact = torch.linalg.solve(torch.eye(12, dtype=torch.float64) - loop.cell.W, b.T).T
    for run in (loop, torch.jit.script(loop)):
        z, residual = run(torch.zeros_like(b), [b])
        assert ((z - exact).norm(dim=1) / exact.norm(dim=1)).max() < 1e-8
        fz = loop.cell(z, [b])
        assert torch.allclose(residual, (fz - z).norm(dim=1) / fz.norm(dim=1), rtol=1e-6, atol=1e-16)


def test_a_broken_sample_leaves_the_others_and_says_so():
    loop = EquilibriumLoop(Affine(0.9), rtol=1e-10)
    b = torch.randn(3, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    clean = loop(torch.zeros_like(b), [b])[0]
    b[1, 0] = float("nan")
    z, residual = loop(torch.zeros_like(b), [b])
    assert torch.allclose(z[[0, 2]], clean[[0, 2]], rtol=1e-8)
    assert residual.isfinite().tolist() == [True, False, True]


def test_wrong_arguments_are_named():
    with pytest.raises(TypeError, match="must hold a DEQLayer; DnCNN has none"):
        prepare_for_export(DnCNN(2, 1, 1, 2, 4))
    with pytest.raises(TypeError, match=r"`return_residual` needs a DEQKANClassifier or .*; got Network"):
        prepare_for_export(Network(), return_residual=True)
    with pytest.raises(TypeError, match=r"must be a torch\.nn\.Module; got str"):
        prepare_for_export("network")
    with pytest.raises(ValueError, match="`max_iter` must be at least 1"):
        prepare_for_export(Network(), max_iter=0)
    with pytest.raises(ValueError, match="`rtol`"):
        prepare_for_export(Network(), rtol=-1.0)
    cell = Cell()
    cell.initial_state = torch.zeros_like
    with pytest.raises(TypeError, match="Cell has a method `initial_state`"):
        prepare_for_export(nn.Sequential(DEQLayer(cell)))
    form = prepare_for_export(reconstructor(2, "ridge"))
    with pytest.raises(ValueError, match=r"`kspace` must have 2 axes of space"):
        form(torch.zeros(1, 4, 8, 8))


class Drift(nn.Module):
    def forward(self, z, x):
        return z + x


def test_a_network_that_is_not_solved_is_no_reference():
    network = DEQLayer(Drift())
    with pytest.raises(ConvergenceError):
        export_error(network, network, torch.ones(2, 3))


def test_layer_under_two_names_is_replaced_under_both():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = self.second = DEQLayer(KANCell(4))

        def forward(self, x):
            return self.second(self.first(x))

    network = Twice().eval()
    form = prepare_for_export(network)
    assert form.first is form.second
    assert not isinstance(form.second, DEQLayer)
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    assert export_error(network, torch.jit.script(form), x) < 1e-4
