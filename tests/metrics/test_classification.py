import numpy as np
import pytest
import torch

from monai_deqkan.metrics import decide


@pytest.mark.parametrize("threshold", [0.0, 0.2, 0.5, 1.0])
def test_two_classes_compare_the_second_with_the_threshold(threshold):
    for chance in np.linspace(0, 1, 21):
        chosen = decide(torch.tensor([1 - chance, chance]), threshold)
        assert chosen.tolist() == ([0, 1] if chance >= threshold else [1, 0])


def test_more_classes_take_the_likeliest_whatever_the_threshold():
    rows = torch.rand(50, 4, generator=torch.Generator().manual_seed(0)).softmax(1)
    for row in rows:
        assert torch.equal(decide(row, 0.99), torch.eye(4)[row.argmax()])


def test_dtype_is_kept():
    assert decide(torch.tensor([0.4, 0.6], dtype=torch.float64)).dtype == torch.float64


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match=r"`threshold` must lie in \[0, 1\]; got 1.5"):
        decide(torch.tensor([0.4, 0.6]), 1.5)
    for wrong in (torch.rand(3, 2), torch.rand(1)):
        with pytest.raises(ValueError, match=r"shape \(C,\) with C >= 2"):
            decide(wrong)
