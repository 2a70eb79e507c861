"""Brain tissues: the KANUNet segmentation bundle on slices of the template."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np
import torch

from monai_deqkan.data import mask_values, segmentation_items, write_sample
from monai_deqkan.demo.baselines import fit_thresholds, mean_dice, threshold
from monai_deqkan.demo.section import Section
from monai_deqkan.demo.workflow import BundleRun
from monai_deqkan.networks.blocks import KANBlock
from monai_deqkan.networks.nets import KANUNet
from monai_deqkan.transforms import LoadMask, LoadMedicalImage
from monai_deqkan.visualize import plot_bars, plot_kan_curves, plot_learning_curves, plot_segmentation

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["demo_segmentation"]

_NAMES = ["background", "CSF", "grey matter", "white matter"]


def demo_segmentation(folder: Path, quick: bool) -> Section:
    """Run the task in ``folder`` and return its section of the report."""
    data = write_sample("brain_tissue", folder / "data")
    settings = {
        "class_names": _NAMES,
        "image_size": [80, 96],  # the pictures' own size, x first: nothing is resampled
        "features": [8, 16, 32],
        "stem_stride": 1,  # tissues are thin
        "max_epochs": 1 if quick else 10,
        "patience": 10,
        "batch_size": 4,
        "learning_rate": 0.001,
        # The training slices come with bias fields of their own; little else varies in one brain.
        "train#augmentation": [
            {"_target_": "RandFlipd", "keys": ["image", "label"], "spatial_axis": 0, "prob": 0.5},
            {"_target_": "RandBiasFieldd", "keys": "image", "coeff_range": [0.0, 0.2], "prob": 0.3},
        ],
    }
    bundle = BundleRun("lung_xray_kanunet_segmentation", folder / "bundle", data, settings)
    history = bundle.train()
    metrics, workflow = bundle.evaluate()
    masks = bundle.infer(data / "test" / "images")

    values = mask_values(data)
    load_image, load_mask = LoadMedicalImage(), LoadMask(values)
    train, test = (
        [
            {"image": load_image(item["image"]), "label": load_mask(item["label"])}
            for item in segmentation_items(data, part)
        ]
        for part in ("train", "evaluate")
    )
    levels = fit_thresholds([s["image"] for s in train], [s["label"] for s in train], len(values))
    by_threshold = [threshold(sample["image"], levels) for sample in test]
    baseline = float(np.mean([mean_dice(p, s["label"], len(values)) for p, s in zip(by_threshold, test, strict=True)]))

    # The masks that inference wrote, read back: what a user gets is what is shown and scored here.
    stems = [Path(item["image"]).stem for item in segmentation_items(data, "evaluate")]
    predicted = [load_mask(masks / f"{stem}_mask.png") for stem in stems]
    dices = [mean_dice(p, s["label"], len(values)) for p, s in zip(predicted, test, strict=True)]
    dice = float(np.mean(dices))
    classes = _class_dice(predicted, [s["label"] for s in test]), _class_dice(by_threshold, [s["label"] for s in test])
    numbers = {
        "mean_dice": dice,
        "mean_dice_at_network_resolution": metrics["val_mean_dice"],
        "mean_iou": metrics["val_mean_iou"],
        "hd95_pixels": metrics["val_hd95"],
        "dice": dict(zip(_NAMES[1:], classes[0], strict=True)),
        "baseline": {"thresholds_mean_dice": baseline, "dice": dict(zip(_NAMES[1:], classes[1], strict=True))},
        "num_test_images": len(test),
        "seconds": bundle.seconds,
    }
    shown = [0, len(test) // 2, len(test) - 1]
    figures = [
        (
            plot_learning_curves(
                {
                    k: v
                    for k, v in history.items()
                    if k in ("train_loss", "train_mean_dice", "val_mean_dice", "val_mean_iou")
                }
            ),
            "Learning curves of the training.",
            "Curves of loss, Dice and IoU over the epochs.",
        ),
        (
            plot_segmentation(
                [np.asarray(test[i]["image"])[0].T for i in shown],
                [np.asarray(test[i]["label"])[0].T for i in shown],
                [np.asarray(predicted[i])[0].T for i in shown],
                _NAMES,
                [f"slice {i + 1} of {len(test)}, mean Dice {dices[i]:.3f}" for i in shown],
            ),
            "Test slices with the true and the predicted tissues.",
            "Three brain slices with reference and predicted tissue overlays.",
        ),
        (
            plot_bars(
                {
                    "KANUNet": dict(zip(_NAMES[1:], classes[0], strict=True)),
                    "best thresholds": dict(zip(_NAMES[1:], classes[1], strict=True)),
                },
                highlight="KANUNet",
                title="Dice per tissue",
            ),
            "Dice per tissue beside the best intensity thresholds (fitted on the training slices).",
            "Bars of Dice per tissue for both methods.",
        ),
        _kan_figure(workflow.parser.get_parsed_content("network")),
    ]
    return Section(
        title="Segmentation: brain tissues (KANUNet)",
        text=[
            "T1 slices with background, cerebrospinal fluid, grey and white matter, and a simulated bias field that "
            "shifts intensities across the image. Every convolution of the network is a convolution of learned "
            "splines; there "
            "are no activation functions between.",
        ],
        key_figures=[
            ("Mean Dice", f"{dice:.3f}", f"best thresholds {baseline:.3f}"),
            ("Mean IoU", f"{numbers['mean_iou']:.3f}", "foreground classes"),
            ("95 % Hausdorff distance", f"{numbers['hd95_pixels']:.1f} px", "lower is better"),
        ],
        header=["Dice on the test slab", "KANUNet", "Best thresholds"],
        rows=[
            ("Mean of the foreground", f"{dice:.3f}", f"{baseline:.3f}"),
            *((name, f"{a:.3f}", f"{b:.3f}") for name, a, b in zip(_NAMES[1:], *classes, strict=True)),
        ],
        numbers=numbers,
        figures=figures,
    )


def _class_dice(predictions: Sequence[torch.Tensor], labels: Sequence[torch.Tensor]) -> list[float]:
    """Return the Dice of each foreground class over all pixels of the test part together."""
    result = []
    for index in range(1, len(_NAMES)):
        pairs = [
            (torch.as_tensor(p) == index, torch.as_tensor(t) == index) for p, t in zip(predictions, labels, strict=True)
        ]
        both = sum(int((p & t).sum()) for p, t in pairs)
        result.append(2 * both / max(sum(int(p.sum()) + int(t.sum()) for p, t in pairs), 1))
    return result


def _kan_figure(network: KANUNet) -> tuple[Figure, str, str]:
    convolution = cast(KANBlock, network.stem[0]).conv
    points = torch.linspace(-4, 4, 201)
    with torch.no_grad():
        curves = convolution.edge_functions(points.to(next(network.parameters()).device)).cpu()[:, :, 0]
    flat = curves.flatten(1)  # (P, out * height * width)
    strongest = flat.std(dim=0).topk(8).indices.tolist()
    _, _, height, width = curves.shape
    titles = [f"filter {i // (height * width)}, tap {i % (height * width) // width},{i % width}" for i in strongest]
    return (
        plot_kan_curves(points, flat[:, strongest].T, titles),
        "The eight strongest spline functions of the first layer, one per filter and tap, over normalized intensity.",
        "Eight learned spline curves.",
    )
