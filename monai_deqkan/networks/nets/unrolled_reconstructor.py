"""UnrolledReconstructor: the twin of DEQReconstructor that does a fixed number of steps."""

from __future__ import annotations

from collections.abc import Sequence
from contextvars import copy_context
from typing import cast

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from monai_deqkan._checks import check_int
from monai_deqkan.networks.blocks.data_consistency import Measurement
from monai_deqkan.networks.blocks.deq_cell import CertifiedMap
from monai_deqkan.networks.layers.lipschitz import frozen_weights
from monai_deqkan.networks.nets.deq_reconstructor import Reconstructor, reconstruction_cell

__all__ = ["UnrolledReconstructor"]


class UnrolledReconstructor(Reconstructor):
    """Reconstruct an image by a fixed number of steps of the cell of :class:`DEQReconstructor`.

    Its steps share their weights, and their number is part of the network: another number gives another image. Training
    memory grows with it, unless ``checkpointing`` trades it for time. To compare an equilibrium with.

    Args:
        spatial_dims: as in :class:`DEQReconstructor`, like all that are not explained here.
        prior: as there; None takes ``"unet"``, and ``"weakly_convex_ridge"`` for the form ``"reweighted"``.
        form: as there.
        num_steps: number of steps.
        num_layers: as there.
        features: as there.
        contraction: as there.
        num_cg_steps: as there.
        sensitivity: as there.
        checkpointing: whether each step is computed again for its gradient, in place of being remembered.

    Raises:
        ValueError: as there.

    Reference:
        H. K. Aggarwal, M. P. Mani and M. Jacob, "MoDL: model-based deep learning architecture for inverse problems",
        IEEE Trans. Med. Imaging 38 (2019) 394-405: that network with ``form="cg"``.
    """

    def __init__(
        self,
        spatial_dims: int,
        prior: str | nn.Module | CertifiedMap | None = None,
        *,
        form: str = "cg",
        num_steps: int = 10,
        num_layers: int | None = None,
        features: int | Sequence[int] | None = None,
        contraction: float | None = None,
        num_cg_steps: int = 8,
        sensitivity: str | nn.Module = "low_frequency",
        checkpointing: bool = False,
    ) -> None:
        super().__init__(spatial_dims, num_cg_steps, sensitivity)
        self.form = form
        self.num_steps = check_int("num_steps", num_steps)
        self.checkpointing = checkpointing
        if prior is None and form != "reweighted":
            prior = "unet"
        self.cell = reconstruction_cell(
            spatial_dims, prior, form=form, num_layers=num_layers, features=features, contraction=contraction
        )
        self.needs_misfit = getattr(self.cell, "needs_misfit", False)

    def find_image(self, inputs: tuple[Measurement, Tensor]) -> Tensor:
        """Return the image after the last step."""
        z = self.cell.initial_state(inputs)
        with frozen_weights(self.cell):
            # Steps are repeated after this block, in another thread on a GPU: with the weights that are frozen here.
            frozen = copy_context()

            def step(z: Tensor) -> Tensor:
                return cast(Tensor, frozen.copy().run(self.cell, z, inputs))

            for _ in range(self.num_steps):
                z = checkpoint(step, z, use_reentrant=False) if self.checkpointing else self.cell(z, inputs)
        return z
