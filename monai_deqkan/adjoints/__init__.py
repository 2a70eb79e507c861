"""How gradients get through a solve."""

from monai_deqkan.adjoints.base import ADJOINTS, Adjoint
from monai_deqkan.adjoints.implicit import ImplicitAdjoint
from monai_deqkan.adjoints.phantom import PhantomAdjoint
from monai_deqkan.adjoints.unrolled import UnrolledAdjoint

__all__ = ["ADJOINTS", "Adjoint", "ImplicitAdjoint", "PhantomAdjoint", "UnrolledAdjoint"]
