"""A batch of samples that differ in mask, acceleration and difficulty gives each sample's own result."""

import pytest
import torch

from monai_deqkan.networks.blocks import Measurement
from monai_deqkan.networks.nets import DEQReconstructor
from monai_deqkan.operators import (
    MRIOperator,
    equispaced_mask,
    random_mask,
    simulate_kspace,
    smooth_coil_maps,
    smooth_phase,
)
from monai_deqkan.solvers import AndersonSolver, SolveRecorder

SHAPE = (20, 16)


def mixed_batch():
    """Four samples: two patterns, accelerations 1 to 5, noise, phase, scales, and an empty image."""
    generator = torch.Generator().manual_seed(0)
    width = SHAPE[-1]
    masks = torch.stack(
        [
            equispaced_mask(width, 2, 0.3, generator=generator),
            random_mask(width, 4, 0.1, generator=generator),
            torch.ones(width, dtype=torch.bool),
            random_mask(width, 5, 0.1, generator=generator),
        ]
    ).view(4, 1, 1, width)
    image = torch.zeros(4, *SHAPE, dtype=torch.float64)
    image[:2, 5:15, 4:12] = 1.0
    image[1, 7:10, 6:9] = 0.2
    image[2] = 1000 * torch.rand(SHAPE, generator=generator, dtype=torch.float64)
    image[3, 9:12, 7:10] = 1e-3
    maps = torch.stack([smooth_coil_maps(SHAPE, 4, generator=generator) for _ in range(4)]).to(torch.complex128)
    phase = torch.stack([smooth_phase(SHAPE, generator=generator) for _ in range(4)])
    kspace = simulate_kspace(image, maps, phase=phase, snr_db=25, generator=generator)
    return kspace * masks, masks, maps


def network(form, prior, rtol=1e-3, max_iter=40):
    torch.manual_seed(0)
    settings = {"features": (4, 6, 8), "num_layers": 1} if prior == "unet" else {"features": 6, "num_layers": 3}
    if prior == "weakly_convex_ridge":
        settings = {"features": (6, 4)}
    solver = AndersonSolver(rtol=rtol, max_iter=max_iter, on_failure="ignore")
    return DEQReconstructor(2, prior, form=form, num_cg_steps=3, solver=solver, **settings).double().eval()


FORMS = [
    ("contracting", "ridge"),
    ("contracting", "dncnn"),
    ("cg", "ridge"),
    ("cg", "complex_ridge"),
    ("cg", "unet"),
    ("prox", "dncnn"),
    ("grad", "unet"),
    ("reweighted", "weakly_convex_ridge"),
]


@pytest.mark.parametrize(("form", "prior"), FORMS)
@pytest.mark.parametrize("max_iter", [4, 40])
def test_each_sample_of_a_mixed_batch_has_its_own_result(form, prior, max_iter):
    model = network(form, prior, max_iter=max_iter)
    kspace, masks, maps = mixed_batch()
    with torch.no_grad():
        with SolveRecorder() as recorder:
            together = model(kspace, masks, maps)
        alone, evaluations, statuses = [], [], []
        for row in range(len(kspace)):
            with SolveRecorder() as single:
                alone.append(model(kspace[row : row + 1], masks[row : row + 1], maps[row : row + 1])[0])
            evaluations.append(int(single.evaluations()))
            statuses.append(int(single.status()))
    assert recorder.evaluations().tolist() == evaluations
    assert recorder.status().tolist() == statuses
    if max_iter == 40:
        assert len(set(evaluations)) > 1  # the samples differ in difficulty
    for mixed, own in zip(together, alone, strict=True):
        assert float((mixed - own).norm() / own.norm()) < 1e-9


@pytest.mark.parametrize(("form", "prior"), FORMS)
def test_order_and_mates_do_not_matter_for_estimated_maps_either(form, prior):
    model = network(form, prior, max_iter=15)
    kspace, masks, _ = mixed_batch()
    order = torch.tensor([2, 0, 3])
    with torch.no_grad():
        whole, part = model(kspace, masks), model(kspace[order], masks[order])
    for mixed, own in zip(whole[order], part, strict=True):
        assert float((mixed - own).norm() / own.norm()) < 1e-9


def test_a_sample_without_a_measured_centre_does_not_change_its_mates():
    model = network("reweighted", "weakly_convex_ridge")
    kspace, masks, maps = (data[:2] for data in mixed_batch())
    maps = maps.roll(3, dims=-1)  # far from the data: the misfit counts
    masks = masks.clone()
    masks[1, ..., SHAPE[-1] // 2] = False
    kspace = kspace * masks
    with torch.no_grad():
        together = model(kspace, masks, maps)
        alone = model(kspace[:1], masks[:1], maps[:1])
        per_coil = model(kspace[:1], masks[:1].expand(-1, kspace.shape[1], -1, -1), maps[:1])
    torch.testing.assert_close(together[:1], alone)
    torch.testing.assert_close(per_coil, alone)
    operator = MRIOperator.from_kspace(kspace, masks, maps, spatial_dims=2)
    cell = model.equilibrium.cell
    weights = cell.weights(Measurement.of(operator, kspace, model._misfit(kspace, masks, maps))).detach()
    assert float(weights[0]) > float(weights[1])
    assert float(weights[1]) == pytest.approx(float(cell.weight.detach()))
