"""What in an image mattered to a classifier, as a picture."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

import torch
from ignite.engine import Engine, Events
from monai.visualize import GradCAM
from PIL import Image
from torch import Tensor, nn

from monai_deqkan.handlers.best_model import unwrapped
from monai_deqkan.handlers.table import image_name
from monai_deqkan.metrics.classification import decide
from monai_deqkan.visualize.saliency import overlay_saliency

__all__ = ["SaliencyWriter"]


class SaliencyWriter:
    """Write a GradCAM overlay of each image for its predicted class: ``saliency/<image>_saliency.png``.

    MONAI's :class:`~monai.visualize.GradCAM`, one image at a time. Gradients reach the maps through the head and, by
    the implicit function theorem, through the equilibrium. The picture is the preprocessed one, as the network saw it.
    A map tells where a change would have altered the score, not that the network is right, nor where a disease is.

    Args:
        output_dir: folder of the pictures; made where absent.
        network: a classifier of 2-D images with 1 or 3 channels.
        dataset_dir: folder that image paths are written relative to.
        threshold: see :func:`~monai_deqkan.metrics.decide`.
        target_layer: name of the module whose output is the map of features.
    """

    def __init__(
        self,
        output_dir: str | os.PathLike[str],
        network: nn.Module,
        dataset_dir: str | os.PathLike[str],
        threshold: float = 0.5,
        target_layer: str = "backbone",
    ) -> None:
        self.folder = Path(output_dir) / "saliency"
        self.network = network
        self.dataset_dir = Path(dataset_dir)
        self.threshold = threshold
        self.target_layer = target_layer
        self._cam: GradCAM | None = None

    def attach(self, engine: Engine) -> None:
        """Attach to an evaluator whose output has ``image`` and, as probabilities, ``pred``."""
        engine.add_event_handler(Events.STARTED, self._start)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._write)
        engine.add_event_handler(Events.COMPLETED, self._end)

    def _start(self, engine: Engine) -> None:
        # A copy: MONAI's hooks cannot be taken off again, and the gradients of parameters are not ours to change.
        network = copy.deepcopy(unwrapped(self.network)).eval()
        if self.target_layer not in dict(network.named_modules()):
            names = ", ".join(name for name, _ in network.named_children())
            raise ValueError(f"The network has no module '{self.target_layer}' for `target_layer`; it has {names}.")
        self._cam = GradCAM(nn_module=network, target_layers=self.target_layer, postprocessing=_as_it_is)

    def _write(self, engine: Any) -> None:
        if self._cam is None:
            return
        device = next(unwrapped(self.network).parameters()).device
        for sample in engine.state.output:
            image = torch.as_tensor(sample["image"]).as_subclass(Tensor).to(device)
            chosen = int(decide(torch.as_tensor(sample["pred"]).flatten(), self.threshold).argmax())
            with torch.enable_grad():
                # A leaf that requires a gradient: else torch warns of backward hooks without one.
                saliency = self._cam(image[None].clone().requires_grad_(), class_idx=chosen)
            # Axis 0 of our images is x, in pictures it is y.
            overlay = overlay_saliency(image.cpu().mT, torch.as_tensor(saliency).detach().cpu()[0, 0].mT)
            target = self.folder / f"{image_name(sample, self.dataset_dir)}_saliency.png"
            target.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(overlay).save(target)

    def _end(self, engine: Engine) -> None:
        self._cam = None


def _as_it_is(values: Tensor) -> Tensor:
    return values
