import pytest
import torch

from monai_deqkan.solvers.products import inner_products, row_norms


def rows(*shape, scale=1.0, dtype=torch.float32):
    return scale * torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("length", [5, 16384, 20001])  # below the chunked sums, whole chunks, with a rest
@pytest.mark.parametrize("scale", [1e-25, 1.0, 1e22])  # squares leave float32's range at both ends
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_long_sums_agree_with_float64(length, scale, dtype):
    a, b = rows(2, 2, length, scale=scale, dtype=dtype), rows(2, 3, length, scale=scale, dtype=dtype)
    norms = torch.linalg.vector_norm(a.double(), dim=2)
    assert torch.allclose(row_norms(a[:, 0], a[:, 1]), norms.T, rtol=1e-6, atol=0)
    exact = torch.einsum("bin,bjn->bij", a.double(), b.double())
    size = norms[:, :, None] * torch.linalg.vector_norm(b.double(), dim=2)[:, None]
    found = inner_products(a, b)
    assert found.dtype == torch.float64
    assert bool(((found - exact).abs() <= 1e-8 * size).all())


def test_samples_of_very_different_units_do_not_disturb_each_other():
    a = rows(3, 1, 16384) * torch.tensor([1.0, 1e-30, 1e30])[:, None, None]
    exact = (a.double() ** 2).sum(2)
    assert torch.allclose(inner_products(a, a)[:, :, 0], exact, rtol=1e-6, atol=0)
    assert torch.allclose(row_norms(a[:, 0])[0] ** 2, exact[:, 0], rtol=1e-6, atol=0)


def test_gradient_of_long_sums():
    a = rows(1, 2, 16640).requires_grad_()
    b = rows(1, 3, 16640)
    weights = torch.arange(6.0, dtype=torch.float64).view(1, 2, 3)
    (gradient,) = torch.autograd.grad((weights * inner_products(a, b)).sum(), a)
    assert torch.allclose(gradient, (weights @ b.double()).float(), rtol=1e-5, atol=1e-5)
