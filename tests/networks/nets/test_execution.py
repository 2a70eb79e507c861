"""The equilibrium networks as they are run in practice: each way against the plain one."""

import os
import socket
import subprocess
import sys
from threading import Thread

import pytest
import torch
from monai.data import MetaTensor
from monai.inferers import SlidingWindowInferer
from torch import nn
from torch.utils.checkpoint import checkpoint

from monai_deqkan.networks.layers import DEQLayer, certified_spectral_norm
from monai_deqkan.networks.nets import DEQKANClassifier, DEQReconstructor
from monai_deqkan.operators import equispaced_mask, simulate_kspace, smooth_coil_maps
from monai_deqkan.solvers import AndersonSolver, SolveRecorder, solve_budget

TIGHT = AndersonSolver(rtol=1e-6, max_iter=200)


def classifier(**settings):
    torch.manual_seed(0)
    defaults = {"features": (4, 4, 6, 8), "hidden_features": 6, "solver": TIGHT}
    return DEQKANClassifier(2, 1, 3, **{**defaults, **settings}).eval()


def reconstructor(**settings):
    torch.manual_seed(0)
    return DEQReconstructor(
        2, **{"num_layers": 2, "features": 4, "num_cg_steps": 2, "solver": TIGHT, **settings}
    ).eval()


def images(batch=4):
    return torch.rand(batch, 1, 32, 28, generator=torch.Generator().manual_seed(1))


def kspace(batch=2):
    generator = torch.Generator().manual_seed(0)
    image = torch.rand(batch, 16, 20, generator=generator).cumsum(1) / 16
    maps = smooth_coil_maps((16, 20), 4, generator=generator)
    return simulate_kspace(image, maps) * equispaced_mask(20, 2, 0.3, generator=generator)


CASES = [pytest.param(classifier, images, id="classifier"), pytest.param(reconstructor, kspace, id="reconstructor")]


def gradients(network):
    return {name: parameter.grad.clone() for name, parameter in network.named_parameters()}


def assert_same(found, expected, tolerance):
    """Compare gradients, each relative to its largest entry."""
    for name, value in expected.items():
        assert float(value.abs().max()) > 0, name
        assert float((found[name] - value).abs().max() / value.abs().max()) < tolerance, name


@pytest.mark.parametrize(("build", "data"), CASES)
def test_another_budget_without_retraining(build, data):
    network, x = build(), data()
    spent, residual, outputs = [], [], []
    for rtol in (1e-2, 1e-4, 1e-6):
        with torch.no_grad(), SolveRecorder() as recorder, solve_budget(rtol=rtol, max_iter=200):
            outputs.append(network(x))
        residual.append(recorder.relative_residual("forward"))
        assert bool((residual[-1] <= rtol).all())
        spent.append(recorder.evaluations("forward"))
        by_constructor = build(solver=AndersonSolver(rtol=rtol, max_iter=200))
        assert torch.equal(by_constructor(x), outputs[-1])
    for loose, tight in ((0, 1), (1, 2)):
        assert bool((spent[tight] > spent[loose]).all())  # for every sample
        assert bool((residual[tight] < residual[loose]).all())
    assert (outputs[1] - outputs[2]).norm() < (outputs[0] - outputs[2]).norm()


@pytest.mark.parametrize(("build", "data"), CASES)
def test_a_smaller_budget_is_kept_and_reported(build, data):
    network, x = build(), data()
    with torch.no_grad(), SolveRecorder() as recorder, solve_budget(max_iter=2, on_failure="ignore"):
        network(x)
    assert recorder.evaluations("forward").tolist() == [2] * len(x)
    assert not bool(recorder.converged("forward").any())


@pytest.mark.parametrize(("build", "data"), CASES)
def test_autocast_to_bfloat16_stays_close(build, data):
    network, x = build(), data()
    with torch.no_grad(), SolveRecorder() as recorder:
        expected = network(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = network(x)
    assert bool(recorder.converged("forward").all())  # to 1e-6, which bfloat16 could not tell from 1
    assert (found.float() - expected).norm() < 0.05 * expected.norm()


@pytest.mark.parametrize(("build", "data"), CASES)
def test_activation_checkpointing_leaves_value_and_gradient(build, data):
    network, x = build(), data()
    expected = network(x)
    expected.square().sum().backward()
    wanted = gradients(network)
    network.zero_grad()
    found = checkpoint(network, x, use_reentrant=False)
    found.square().sum().backward()
    assert torch.equal(found, expected)
    assert_same(gradients(network), wanted, 1e-5)


@pytest.mark.parametrize(("build", "data"), CASES)
def test_same_bits_under_a_seed(build, data):
    runs = []
    for _ in range(2):
        network = build().train()
        torch.manual_seed(7)
        output = network(data())
        output.square().sum().backward()
        runs.append([output, *gradients(network).values()])
    for first, second in zip(*runs, strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize(("build", "data"), CASES)
def test_metatensor_in_metatensor_out(build, data):
    network, x = build(), data()
    affine = torch.diag(torch.tensor([2.0, 3.0, 4.0, 1.0], dtype=torch.float64))
    with torch.no_grad():
        found, expected = network(MetaTensor(x, affine=affine)), network(x)
    assert isinstance(found, MetaTensor)
    assert torch.equal(found.affine, affine)
    assert torch.equal(found.as_tensor(), expected)


class _Smoother(nn.Module):
    """Map an image to the equilibrium of ``z = tanh(W * z) + image``, as a denoiser or a segmentation head would."""

    def __init__(self, compiled=False):
        super().__init__()
        torch.manual_seed(0)
        cell = _ConvolutionCell()
        self.equilibrium = DEQLayer(torch.compile(cell, backend="aot_eager") if compiled else cell, TIGHT)

    def forward(self, x):
        return self.equilibrium(x)


class _ConvolutionCell(nn.Module):
    def __init__(self):
        super().__init__()
        self.convolution = certified_spectral_norm(nn.Conv2d(1, 1, 3, padding=1), 0.8)

    def forward(self, z, x):
        return torch.tanh(self.convolution(z)) + x


def test_sliding_windows():
    network, x = _Smoother(), torch.rand(1, 1, 24, 16, generator=torch.Generator().manual_seed(2))
    inferer = SlidingWindowInferer(roi_size=(8, 8), sw_batch_size=3, overlap=0.0)
    with torch.no_grad(), SolveRecorder() as recorder:
        found = inferer(x, network)
        tiles = [[network(x[..., i : i + 8, j : j + 8]) for j in (0, 8)] for i in (0, 8, 16)]
    assert torch.allclose(found, torch.cat([torch.cat(row, dim=-1) for row in tiles], dim=-2), atol=1e-5)
    assert len(recorder.evaluations("forward")) == 12  # six windows, and the same again
    assert bool(recorder.converged("forward").all())


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # torch's own, while it traces frozen weights
def test_compiled_cell_gives_values_and_gradients_of_the_plain_one():
    x = torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(2))
    outputs, found = [], []
    for compiled in (False, True):
        network = _Smoother(compiled)
        outputs.append(network(x))
        backward = Thread(target=outputs[-1].square().sum().backward)  # as on a GPU, which has a thread of its own
        backward.start()
        backward.join()
        found.append([parameter.grad for parameter in network.parameters()])
    assert torch.allclose(outputs[1], outputs[0], atol=1e-5)
    for plain, other in zip(*found, strict=True):
        assert float(plain.abs().max()) > 0
        assert torch.allclose(other, plain, rtol=1e-3, atol=1e-4)


_PROCESS = """
import sys, torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from monai_deqkan.networks.nets import DEQKANClassifier
from monai_deqkan.solvers import AndersonSolver

rank, folder = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", rank=rank, world_size=2)
torch.manual_seed(0)
solver = AndersonSolver(rtol=1e-6, max_iter=200)
network = DEQKANClassifier(2, 1, 3, features=(4, 4, 6, 8), hidden_features=6, solver=solver).eval()
parallel = DistributedDataParallel(network)
x = torch.load(folder + "/images.pt")[2 * rank : 2 * rank + 2]
parallel(x).square().mean().backward()
torch.save({name: p.grad for name, p in network.named_parameters()}, f"{folder}/{rank}.pt")
dist.destroy_process_group()
"""


def test_distributed_gradients_are_those_of_one_process(tmp_path):
    torch.save(images(), tmp_path / "images.pt")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen([sys.executable, "-c", _PROCESS, str(rank), str(tmp_path)], env=environment)
        for rank in range(2)
    ]
    assert [process.wait(timeout=300) for process in processes] == [0, 0]
    network = classifier()
    network(images()).square().mean().backward()
    for rank in range(2):
        assert_same(torch.load(tmp_path / f"{rank}.pt"), gradients(network), 1e-3)
