import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.transforms import Compose, Invertd, Resized, ResizeWithPadOrCropd, Spacingd
from scipy import ndimage

from monai_deqkan.transforms import SmoothInversed


@pytest.mark.parametrize("dims", [2, 3])
def test_the_way_back_is_linear(dims):
    size = (33, 47, 25)[:dims]
    image = MetaTensor(torch.rand(1, *size, generator=torch.Generator().manual_seed(0)))
    way = Compose([Resized("image", spatial_size=12, size_mode="longest"), ResizeWithPadOrCropd("image", [12] * dims)])
    data = SmoothInversed("image")(way({"image": image}))
    data["pred"] = MetaTensor(data["image"].as_tensor().clone())
    back = Invertd("pred", transform=way, orig_keys="image", nearest_interp=False)(data)["pred"][0].numpy()
    assert back.shape == size
    # SciPy with half-pixel centres, edges repeated, from the part that is no padding.
    small = way({"image": image})["image"][0].numpy()
    inner = tuple(round(12 * n / max(size)) for n in size)
    start = [(12 - n) // 2 for n in inner]
    small = small[tuple(slice(s, s + n) for s, n in zip(start, inner, strict=True))]
    grid = np.meshgrid(*[(np.arange(n) + 0.5) * m / n - 0.5 for n, m in zip(size, inner, strict=True)], indexing="ij")
    assert np.abs(back - ndimage.map_coordinates(small, grid, order=1, mode="nearest")).max() < 1e-5


def test_other_transforms_and_the_image_are_left_as_they_are():
    image = MetaTensor(torch.rand(1, 8, 9, 10), affine=torch.diag(torch.tensor([1.0, 2.0, 1.5, 1.0])))
    way = Compose([Spacingd("image", pixdim=[1.2, 1.2, 1.2])])
    before = way({"image": image})
    after = SmoothInversed("image")(before)
    assert torch.equal(before["image"].as_tensor(), after["image"].as_tensor())
    plain, smooth = (way.inverse(dict(data))["image"] for data in (before, after))
    assert torch.equal(plain.as_tensor(), smooth.as_tensor())


def test_plain_tensors_are_refused():
    with pytest.raises(TypeError, match="must be a MetaTensor"):
        SmoothInversed("image")({"image": torch.zeros(1, 2, 2)})
