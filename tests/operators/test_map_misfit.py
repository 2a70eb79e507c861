import pytest
import torch

from monai_deqkan.operators import MRIOperator, espirit_maps, estimate_sensitivity_maps, map_misfit, smooth_coil_maps


def test_misfit_of_maps():
    generator = torch.Generator().manual_seed(0)
    maps = smooth_coil_maps((32, 24), 4, generator=generator)
    image = torch.rand(32, 24, generator=generator)
    operator = MRIOperator(torch.ones(1, 1, 32, 24), maps[None], spatial_dims=2)
    kspace = operator.forward(image.to(torch.complex64)[None])
    right, wrong = map_misfit(kspace, maps[None]), map_misfit(kspace, maps[None].flip(1))
    assert 0 <= float(right) < 0.01 < 0.1 < float(wrong) <= 1
    assert float(map_misfit(kspace[:, :1], torch.ones(1, 1, 32, 24, dtype=torch.complex64))) < 1e-12
    full = torch.ones(1, 1, 1, 24)
    assert map_misfit(0 * kspace, maps[None], full).tolist() == [0.0]
    lines = {"mask": full, "max_center_lines": 8}
    made_of_them = estimate_sensitivity_maps(kspace, **lines)
    assert float(map_misfit(kspace, made_of_them, **lines)) < 1e-9
    assert float(map_misfit(kspace, made_of_them, windowed=False, **lines)) > 0.005
    two = espirit_maps(kspace, num_sets=2)
    assert float(map_misfit(kspace, two)) < float(map_misfit(kspace, two[:, 0])) + 1e-6
    with pytest.raises(ValueError, match="sensitivity_maps"):
        map_misfit(kspace, maps[None, :2])
    mask = torch.ones(1, 1, 1, 24)
    mask[..., 12] = 0
    with pytest.raises(ValueError, match="zero frequency"):
        map_misfit(kspace * mask, maps[None], mask)
