import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm

from monai_deqkan.adjoints import UnrolledAdjoint
from monai_deqkan.networks.layers import DEQLayer
from monai_deqkan.solvers import AndersonSolver, FixedPointIteration

SOLVER = AndersonSolver(rtol=1e-10, max_iter=100)


class TwoLayerCell(nn.Module):
    def __init__(self, size=3, hidden=64):
        super().__init__()
        self.first, self.second = spectral_norm(nn.Linear(size, hidden)), spectral_norm(nn.Linear(hidden, size))

    def forward(self, z, x):
        return 0.8 * self.second(torch.tanh(self.first(z))) + x


def layer(adjoint, solver=SOLVER):
    torch.manual_seed(0)
    return DEQLayer(TwoLayerCell().double(), solver, adjoint)


def test_checkpointing_gives_the_same_first_and_second_derivatives():
    results = []
    for adjoint in (UnrolledAdjoint(), UnrolledAdjoint(checkpoint=True)):
        deq = layer(adjoint)
        x = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
        wanted = (x, *deq.parameters())
        first = torch.autograd.grad(deq(x).cos().sum(), wanted, create_graph=True)
        second = torch.autograd.grad(sum(part.pow(2).sum() for part in first), wanted)
        results.append((*first, *second))
    for plain, checkpointed in zip(*results, strict=True):
        assert float(plain.detach().abs().max()) > 0
        assert torch.allclose(plain, checkpointed, rtol=1e-10, atol=1e-12)


def test_checkpointing_keeps_the_states_alone():
    def kept(adjoint):
        deq = layer(adjoint, FixedPointIteration(rtol=0.0, max_iter=20, on_failure="ignore"))
        storages = {}

        def pack(tensor):
            storages[tensor.untyped_storage().data_ptr()] = tensor  # kept, so that no address is used twice
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            z = deq(torch.ones(500, 3, dtype=torch.float64))
        assert z.requires_grad
        return sum(tensor.untyped_storage().nbytes() for tensor in storages.values())

    plain, checkpointed = kept(UnrolledAdjoint()), kept(UnrolledAdjoint(checkpoint=True))
    assert plain > 18 * 500 * 64 * 8  # the hidden layer of every step but the last
    assert checkpointed < 0.2 * plain


def test_wrong_settings():
    with pytest.raises(TypeError, match="`checkpoint` must be True or False"):
        UnrolledAdjoint(checkpoint="yes")
