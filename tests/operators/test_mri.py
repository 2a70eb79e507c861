import math
import weakref

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from monai_deqkan.operators import (
    CoilOperator,
    FourierOperator,
    MRIOperator,
    SamplingOperator,
    combine_map_sets,
    smooth_coil_maps,
    take_rows,
)
from monai_deqkan.testing import check_operator

SPACES = [(6, 8), (5, 7), (4, 5, 6)]


def randn(*shape, dtype=torch.complex128, seed=0):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


class LargestAllocation(TorchDispatchMode):
    """Counts the bytes of all storages that operations have made and that are still alive."""

    def __enter__(self):
        self.alive, self.peak = {}, 0
        return super().__enter__()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        given = {tensor.untyped_storage()._cdata for tensor in tensors}
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and leaf.untyped_storage()._cdata not in given:
                storage = leaf.untyped_storage()
                self.alive[storage._cdata] = (weakref.ref(storage), storage.nbytes())
        self.alive = {key: entry for key, entry in self.alive.items() if entry[0]() is not None}
        self.peak = max(self.peak, sum(size for _, size in self.alive.values()))
        return result


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
@pytest.mark.parametrize("num_coils", [1, 9])
def test_two_map_sets_and_masks_per_sample_and_coil_conform(space, num_coils):
    dims = len(space)
    mask, maps = random_bool(3, num_coils, *space), randn(3, 2, num_coils, *space)
    check_operator(lambda dtype: MRIOperator(mask, maps, spatial_dims=dims), (3, 2, *space))
    check_operator(lambda dtype: MRIOperator(mask[:, :1], maps[:1], spatial_dims=dims), (3, 2, *space))
    check_operator(lambda dtype: CoilOperator(maps, spatial_dims=dims), (3, 2, *space))


@pytest.mark.parametrize("space", [(6, 8), (5, 7), (6, 7), (4, 5, 6)])
def test_operator_is_its_parts_with_any_number_of_coils_at_once(space, monkeypatch):
    mask, maps, x = random_bool(2, 1, *space), randn(2, 7, *space), randn(2, *space, seed=1)
    parts = SamplingOperator(mask) @ FourierOperator(len(space)) @ CoilOperator(maps)
    for group_bytes in (0, 4000, 2**20):
        monkeypatch.setattr("monai_deqkan.operators.mri._GROUP_BYTES", group_bytes)
        operator = MRIOperator(mask, maps, spatial_dims=len(space))
        y = parts(x)
        for grad in (True, False):
            with torch.set_grad_enabled(grad):
                torch.testing.assert_close(operator(x), y)
                torch.testing.assert_close(operator.adjoint(y), parts.adjoint(y))
                torch.testing.assert_close(operator.normal(x), parts.adjoint(y))


def test_soft_sense_is_the_sum_over_sets_and_one_set_is_plain_sense():
    mask, maps, x = random_bool(2, 1, 1, 7), randn(2, 3, 4, 6, 7), randn(2, 3, 6, 7, seed=1)
    expected = sum(MRIOperator(mask, maps[:, m])(x[:, m]) for m in range(3))
    torch.testing.assert_close(MRIOperator(mask, maps)(x), expected)
    torch.testing.assert_close(MRIOperator(mask, maps[:, :1])(x[:, :1]), MRIOperator(mask, maps[:, 0])(x[:, 0]))


def test_norm_of_map_sets_is_bounded_and_one_where_normalized():
    maps = randn(1, 2, 5, 3, 4)
    full = MRIOperator(torch.ones(1, 1, 1, 4), maps)
    basis = torch.eye(24, dtype=torch.complex128).reshape(24, 2, 3, 4)
    norm = torch.linalg.matrix_norm(full(basis).reshape(24, -1).T, 2)
    assert norm <= full.norm_bound[0] <= 1.5 * norm
    together = maps / maps.abs().square().sum((1, 2), keepdim=True).sqrt()
    assert MRIOperator(torch.ones(1, 1, 1, 4), together).norm_bound <= 1 + 1e-12
    # Orthogonal sets, each normalized: the eigenvectors that ESPIRiT finds.
    orthogonal = torch.linalg.qr(maps.permute(0, 3, 4, 2, 1)).Q.permute(0, 4, 3, 1, 2)
    torch.testing.assert_close(
        MRIOperator(torch.ones(1, 1, 1, 4), orthogonal).norm_bound, torch.ones(1, dtype=torch.float64)
    )


def test_map_sets_combine_to_the_root_sum_of_squares_and_keep_the_phase_of_one():
    images = randn(2, 3, 4, 5)
    torch.testing.assert_close(combine_map_sets(images).abs(), images.abs().square().sum(1).sqrt())
    images[:, 1:] = 0
    torch.testing.assert_close(combine_map_sets(images), images[:, 0])


def test_gradient_reaches_the_maps():
    mask, x, y = random_bool(2, 1, 1, 3), randn(2, 2, 3), randn(2, 3, 2, 3, seed=2)
    maps = randn(2, 3, 2, 3, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda s: MRIOperator(mask, s)(x), maps)
    assert torch.autograd.gradcheck(lambda s: MRIOperator(mask, s).adjoint(y), maps)
    assert torch.autograd.gradcheck(lambda s: MRIOperator(mask, s).normal(x), maps)


def test_an_application_needs_at_most_three_coil_stacks(monkeypatch):
    operator = MRIOperator(random_bool(1, 1, 1, 128), randn(1, 8, 96, 128))
    x, y = randn(1, 96, 128), randn(1, 8, 96, 128)
    stack = y.numel() * y.element_size()
    for call in (lambda: operator(x), lambda: operator.adjoint(y), lambda: operator.normal(x)):
        for grad in (True, False):
            with torch.set_grad_enabled(grad), LargestAllocation() as seen:
                call()
            assert seen.peak <= 3 * stack


def test_wrong_kspace_is_refused_when_the_operator_is_built():
    kspace, mask, maps = randn(2, 4, 6, 8), random_bool(2, 1, 1, 8), randn(2, 4, 6, 8)
    build = MRIOperator.from_kspace
    with pytest.raises(ValueError, match=r"`kspace` must be finite; 1 of"):
        build(torch.where(torch.arange(384).reshape(2, 4, 6, 8) == 3, torch.nan, kspace), mask, maps)
    with pytest.raises(ValueError, match="coil axis of size 1"):
        build(kspace[:, 0], mask, maps)
    with pytest.raises(TypeError, match="`kspace` must be complex"):
        build(kspace.real, mask, maps)
    with pytest.raises(ValueError, match=r"shape \(2, 3, 6, 8\) do not fit coil images of shape \(2, 4, 6, 8\)"):
        build(kspace, mask, maps[:, :3])
    with pytest.raises(ValueError, match="do not fit"):
        build(kspace, mask, maps[..., :5, :])
    with pytest.raises(ValueError, match="must agree in batch, coils and space"):
        build(kspace, mask, maps[..., :7])
    with pytest.raises(ValueError, match="must broadcast to k-space"):
        build(kspace, random_bool(2, 1, 5, 1), torch.ones(1, 4, 1, 1, dtype=torch.complex64))
    mask[1] = False
    with pytest.raises(ValueError, match=r"samples \[1\] of its batch keep none"):
        build(kspace, mask, maps)


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


@pytest.mark.parametrize("sets", [None, 2])
@pytest.mark.parametrize("space", [(6, 7), (4, 3, 5)])
def test_diagonals_are_those_of_the_matrix_among_pixels_and_frequencies(space, sets):
    lead, axes, number = (sets,) if sets else (), tuple(range(-len(space), 0)), math.prod(space)
    operator = MRIOperator(
        random_bool(2, 3, *space), randn(1, *lead, 3, *space), spatial_dims=len(space)
    )  # a mask of each coil, shared maps
    units = torch.eye(number, dtype=torch.complex128).view(number, *space)
    for index, waves in enumerate((units, torch.fft.ifftn(units, dim=axes, norm="ortho"))):
        found = operator.normal_diagonals()[index]
        assert found.shape == (2, *lead, *space)
        for row in range(2):
            one = operator.take(torch.tensor([row]))
            torch.testing.assert_close(one.normal_diagonals()[index][0], found[row])
            for place in np.ndindex(*lead):
                images = torch.zeros(number, *lead, *space, dtype=torch.complex128)
                images[(slice(None), *place)] = waves
                back = torch.cat([one.normal(image.unsqueeze(0)) for image in images])[(slice(None), *place)]
                expected = (waves.conj() * back).flatten(1).sum(dim=1).real.view(space)
                torch.testing.assert_close(found[(row, *place)], expected)


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
        (lambda: SamplingOperator(torch.full((1, 1, 1, 6), torch.nan)), ValueError, "NaN would count as measured"),
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
        (lambda: MRIOperator(torch.ones(1, 1, 1, 6), torch.ones(1, 2, 3, 6)), TypeError, "complex"),
        (lambda: MRIOperator(torch.zeros(1, 1, 1, 6)), ValueError, "keep at least one"),
        (
            lambda: MRIOperator(torch.ones(1, 1, 1, 6), randn(1, 2, 3, 4, 6))(randn(2, 3, 4, 6)),
            ValueError,
            "do not fit",
        ),
        (lambda: MRIOperator(torch.ones(1, 1, 1, 6))(randn(2, 4, 5)), ValueError, "must broadcast"),
        (lambda: MRIOperator(torch.ones(1, 1, 1, 6)).adjoint(randn(2, 3, 4, 6)), ValueError, "do not fit"),
        (lambda: combine_map_sets(torch.ones(1, 2, 3, 3)), TypeError, "complex"),
    ],
)
def test_bad_input_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()
