import pytest
import torch

from monai_deqkan.operators import LinearOperator
from monai_deqkan.testing import check_operator


class PhaseOperator(LinearOperator):
    """Multiplies by i; each fault breaks one property."""

    def __init__(self, fault: str = "") -> None:
        self.fault = fault
        self.norm_bound = torch.tensor([0.99 if fault == "norm" else 1.0])

    def forward(self, x):
        x = x.real + 0j if self.fault == "linear" else x
        x = x.detach() + 0 * x if self.fault == "gradient" else x
        x = x.flip(0) if self.fault == "mixing" else x
        return 1j * x

    def adjoint(self, y):
        y = y.flip(0) if self.fault == "mixing" else y
        sign = 1j if self.fault == "adjoint" else -1j
        return (sign * y).to(torch.complex64 if self.fault == "dtype" else y.dtype)

    def take(self, rows):
        return self


def test_a_right_operator_passes():
    check_operator(lambda dtype: PhaseOperator(), (3, 4))


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("adjoint", "<A x, y>"),
        ("linear", "linearity|<A x, y>"),
        ("gradient", "gradient"),
        ("mixing", "take"),
        ("dtype", "keep the dtype"),
        ("norm", "norm_bound"),
    ],
)
def test_a_wrong_operator_is_caught(fault, message):
    with pytest.raises(AssertionError, match=message):
        check_operator(lambda dtype: PhaseOperator(fault), (3, 4))


def test_a_single_sample_is_refused():
    with pytest.raises(ValueError, match="two samples"):
        check_operator(lambda dtype: PhaseOperator(), (1, 4))
