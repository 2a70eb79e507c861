"""Conformance checks that any plug-in can run."""

from monai_deqkan.testing.adjoints import check_adjoint
from monai_deqkan.testing.basis import check_basis
from monai_deqkan.testing.operators import check_operator
from monai_deqkan.testing.solvers import check_solver

__all__ = ["check_adjoint", "check_basis", "check_operator", "check_solver"]
