import numpy as np
import pytest
import torch

from monai_deqkan.operators import (
    CoilOperator,
    FourierOperator,
    MRIOperator,
    SamplingOperator,
    smooth_coil_maps,
    take_rows,
)
from monai_deqkan.testing import check_operator

SPACES = [(6, 8), (5, 7), (4, 5, 6)]


def randn(*shape, dtype=torch.complex128, seed=0):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def random_bool(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) > 0.5


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("per_sample", [True, False])
def test_all_operators_conform(space, per_sample):
    batch = 3 if per_sample else 1
    dims = len(space)
    mask = random_bool(batch, 1, *space)
    maps = randn(batch, 4, *space)
    check_operator(lambda dtype: FourierOperator(dims), (3, 2, *space))
    check_operator(lambda dtype: SamplingOperator(mask), (3, 4, *space))
    check_operator(lambda dtype: CoilOperator(maps), (3, *space))
    check_operator(lambda dtype: MRIOperator(mask, maps, spatial_dims=dims), (3, *space))
    check_operator(lambda dtype: SamplingOperator(mask) @ FourierOperator(dims) @ CoilOperator(maps), (3, *space))


@pytest.mark.parametrize("space", SPACES)
def test_fourier_is_the_centred_sum_of_waves(space):
    x = randn(1, 1, *space)
    got = FourierOperator(len(space))(x)[0, 0].numpy()
    expected = x[0, 0].numpy()
    for axis, n in enumerate(space):
        position = np.arange(n) - n // 2
        matrix = np.exp(-2j * np.pi * np.outer(position, position) / n) / np.sqrt(n)
        expected = np.moveaxis(np.tensordot(matrix, expected, axes=(1, axis)), 0, axis)
    np.testing.assert_allclose(got, expected, atol=1e-12)


def test_fourier_agrees_with_fastmri():
    fastmri = pytest.importorskip("fastmri")
    x = randn(2, 3, 7, 10)
    expected = torch.view_as_complex(fastmri.fft2c(torch.view_as_real(x)))
    torch.testing.assert_close(FourierOperator(2)(x), expected)


def test_mri_operator_is_the_matrix_product():
    mask, maps = random_bool(1, 1, 1, 4), randn(1, 2, 3, 4)
    operator = MRIOperator(mask, maps, spatial_dims=2)
    columns = operator(torch.eye(12, dtype=torch.complex128).reshape(12, 3, 4)).reshape(12, -1).T
    x = randn(1, 3, 4, seed=1)
    torch.testing.assert_close(operator(x).flatten(), columns @ x.flatten())
    assert torch.linalg.matrix_norm(columns, 2) <= operator.norm_bound
    full = MRIOperator(torch.ones(1, 1, 1, 4), maps)
    columns = full(torch.eye(12, dtype=torch.complex128).reshape(12, 3, 4)).reshape(12, -1).T
    torch.testing.assert_close(torch.linalg.matrix_norm(columns, 2), full.norm_bound[0])


def test_norm_bound_is_per_sample_and_one_for_normalized_maps():
    maps = smooth_coil_maps((6, 6), 4)
    operator = MRIOperator(torch.ones(1, 1, 1, 6), torch.stack([maps, 2 * maps]))
    torch.testing.assert_close(operator.norm_bound, torch.tensor([1.0, 2.0]))


def test_no_maps_is_a_single_coil_of_one():
    x = randn(2, 5, 6)
    mask = random_bool(2, 1, 1, 6)
    expected = FourierOperator(2)(x).unsqueeze(1) * mask
    torch.testing.assert_close(MRIOperator(mask)(x), expected)


def test_adjoint_of_a_composition_reverses():
    outer, inner = SamplingOperator(random_bool(1, 1, 1, 6)), FourierOperator(2)
    x = randn(2, 1, 5, 6)
    torch.testing.assert_close((outer @ inner).H(x), (inner.H @ outer.H)(x))
    with pytest.raises(TypeError):
        outer @ torch.ones(3)


def test_take_rows_keeps_shared_data():
    data = torch.arange(6).reshape(3, 2)
    assert take_rows(data, torch.tensor([2, 0])).tolist() == [[4, 5], [0, 1]]
    assert take_rows(data[:1], torch.tensor([2, 0])).tolist() == [[0, 1]]


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: SamplingOperator(torch.ones(2, 6))(randn(2, 4, 5, 6)), ValueError, "must broadcast"),
        (lambda: SamplingOperator(randn(1, 1, 1, 6)), TypeError, "bool or real"),
        (lambda: CoilOperator(torch.ones(1, 2, 3, 3)), TypeError, "complex"),
        (lambda: CoilOperator(randn(3, 3)), ValueError, r"\(B, K, \*space\)"),
        (lambda: CoilOperator(randn(1, 2, 3, 3)).adjoint(randn(1, 4, 3, 3)), ValueError, "do not fit"),
        (lambda: CoilOperator(randn(1, 1, 1, 1)).adjoint(randn(1, 4, 3, 3)), ValueError, "do not fit"),
        (lambda: CoilOperator(randn(2, 2, 3, 3))(randn(3, 3, 3)), ValueError, "do not fit"),
        (lambda: CoilOperator(randn(1, 2, 3, 3))(torch.ones(1, 3, 3)), TypeError, "complex"),
        (lambda: FourierOperator(2)(torch.ones(3, 3)), TypeError, "complex"),
        (lambda: FourierOperator(3)(randn(3, 3)), ValueError, "at least 3 axes"),
        (lambda: FourierOperator(1), ValueError, "spatial_dims"),
        (lambda: MRIOperator(torch.ones(1, 6)), ValueError, "4 axes"),
        (lambda: MRIOperator(torch.ones(1, 1, 1, 6), randn(2, 3, 3)), ValueError, "4 axes"),
    ],
)
def test_bad_input_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()
