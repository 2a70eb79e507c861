import numpy as np
import pytest
import torch
from monai.networks.nets import UNet
from PIL import Image
from sklearn.utils.class_weight import compute_class_weight

from monai_deqkan.engines import choose_loss, has_kan_layers, mask_class_weights
from monai_deqkan.networks.nets import KANUNet


def masks(folder, values):
    rng = np.random.default_rng(0)
    arrays = [rng.choice(values, (7, 9), p=[0.7, 0.2, 0.1]).astype(np.uint8) for _ in range(3)]
    for index, array in enumerate(arrays):
        Image.fromarray(array).save(folder / f"{index}.png")
    return arrays, [{"label": str(folder / f"{index}.png")} for index in range(3)]


def test_weights_are_those_of_all_pixels_together(tmp_path):
    values = [0, 100, 255]
    arrays, items = masks(tmp_path, values)
    pixels = np.concatenate([array.ravel() for array in arrays])
    expected = compute_class_weight("balanced", classes=np.array(values), y=pixels)
    assert mask_class_weights(items, values).tolist() == pytest.approx(expected.tolist())
    with pytest.raises(ValueError, match="pixels in the training masks"):
        mask_class_weights(items, [0, 100, 200, 255])


def test_losses_by_name():
    losses = {"dice": torch.nn.MSELoss(), "ce": torch.nn.L1Loss()}
    assert choose_loss(losses, "ce") is losses["ce"]
    with pytest.raises(ValueError, match="must be one of dice, ce; got 'dise'"):
        choose_loss(losses, "dise")


def test_kan_layers_are_found():
    assert has_kan_layers(KANUNet(2, 1, 2, features=(2, 4)))
    assert not has_kan_layers(UNet(2, 1, 2, channels=(2, 4), strides=(2,)))
