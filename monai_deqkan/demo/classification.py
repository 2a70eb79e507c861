"""Lesion or no lesion: the DEQ-KAN classification bundle on slices of the template."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np
import torch
from sklearn.metrics import roc_auc_score

from monai_deqkan.data import classification_items, write_sample
from monai_deqkan.demo.baselines import linear_model
from monai_deqkan.demo.section import Section
from monai_deqkan.demo.workflow import BundleRun
from monai_deqkan.networks.blocks import KANCell
from monai_deqkan.networks.layers import KANLinear
from monai_deqkan.networks.nets import DEQKANClassifier
from monai_deqkan.solvers import SolveRecorder
from monai_deqkan.transforms import LoadMedicalImage
from monai_deqkan.visualize import (
    plot_confusion_matrix,
    plot_image_grid,
    plot_kan_curves,
    plot_learning_curves,
    plot_reliability,
    plot_residuals,
    plot_roc,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["demo_classification"]


def demo_classification(folder: Path, quick: bool) -> Section:
    """Run the task in ``folder`` and return its section of the report."""
    data = write_sample("brain_lesion", folder / "data")
    settings = {
        "image_size": [80, 96],  # the pictures' own size, x first: nothing is resampled
        "features": [16, 32, 48, 64],
        # Small, faint lesions: the default backbone's smoothing and coarse maps would lose them.
        "network_settings": {
            "backbone": "resnet",
            "pool": "max",
            "hidden_features": 128,
            "kan_settings": {"basis": "bspline", "grid_size": 5},
        },
        "warmup_epochs": 0,
        "max_epochs": 1 if quick else 24,
        "patience": 24,
        "batch_size": 16,
        "learning_rate": 0.003,
        # The sample's pictures are turned, shifted and shaded already.
        "train#augmentation": [{"_target_": "RandFlipd", "keys": "image", "spatial_axis": 0, "prob": 0.5}],
    }
    bundle = BundleRun("chest_xray_deqkan_classification", folder / "bundle", data, settings)
    history = bundle.train()
    metrics, workflow = bundle.evaluate()
    bundle.infer(data / "test")

    with (bundle.folder / "eval" / "predictions.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    names = [name.removeprefix("probability_") for name in table[0] if name.startswith("probability_")]
    scores = np.array([[float(row[f"probability_{name}"]) for name in names] for row in table])
    labels = np.array([names.index(row["label"]) for row in table])
    predictions = np.array([names.index(row["prediction"]) for row in table])

    task = json.loads((bundle.folder / "models" / "model.json").read_text(encoding="utf-8"))
    load = LoadMedicalImage()
    train, test = (
        [{**item, "image": load(item["image"])} for item in classification_items(data, part)]
        for part in ("train", "evaluate")
    )
    linear = linear_model(train, test)
    # One class against the rest: with two classes every choice of the positive one gives the same area.
    auc, linear_auc = (float(roc_auc_score(labels, probability[:, 1])) for probability in (scores, linear))
    numbers = {
        "auc": auc,
        **{name: metrics[f"val_{name}"] for name in ("accuracy", "sensitivity", "specificity", "f1", "ece")},
        "auc_interval": [metrics["val_auc_low"], metrics["val_auc_high"]],
        "threshold": task["threshold"],
        "temperature": task["temperature"],
        "solve_evaluations": metrics["solve_evaluations"],
        "solve_converged": metrics["solve_converged"],
        "baseline": {
            "linear_model_auc": linear_auc,
            "linear_model_accuracy": float((linear.argmax(1) == labels).mean()),
        },
        "num_test_images": len(table),
        "seconds": bundle.seconds,
    }

    network = workflow.parser.get_parsed_content("network")
    images = torch.stack(
        [torch.as_tensor(item["image"]) for item in workflow.parser.get_parsed_content("validate#dataset")][:32]
    )
    with torch.no_grad(), SolveRecorder() as recorder:
        states = network.equilibrium_features(images.to(next(network.parameters()).device)).cpu()
    shown = np.linspace(0, len(test) - 1, 8).astype(int)
    captions = [f"{names[labels[i]]}: {scores[i, labels[i]]:.0%}" for i in shown]
    pictures = [np.asarray(test[i]["image"])[0].T for i in shown]
    figures = [
        (
            plot_learning_curves(
                {k: v for k, v in history.items() if k in ("train_loss", "train_accuracy", "val_auc", "val_accuracy")}
            ),
            "Learning curves of the training.",
            "Curves of loss, accuracy and AUC over the epochs.",
        ),
        (
            plot_roc(labels, scores, names, {"linear model on 16 x 16 pixels": linear}),
            "ROC curve on the test slab, beside a linear model.",
            f"ROC curve with an area of {auc:.3f}; the linear model has {linear_auc:.3f}.",
        ),
        (
            plot_confusion_matrix(labels, predictions, names),
            "Confusion matrix on the test slab.",
            "Counts of true and predicted classes.",
        ),
        (
            plot_reliability(labels, scores, names),
            f"Reliability: how often {names[1]} was true, given its probability.",
            f"Reliability diagram with an expected calibration error of {numbers['ece']:.3f}.",
        ),
        (
            plot_image_grid(pictures, captions, correct=[bool(labels[i] == predictions[i]) for i in shown]),
            "Test pictures with the probability that the network gives to the true class.",
            "Eight brain slices with true class and probability.",
        ),
        (
            plot_residuals([h[~h.isnan()] for h in _histories(recorder)], rtol=network.equilibrium.solver.rtol),
            "Residual of the equilibrium per evaluation, one line per image. The cell contracts by construction.",
            "Falling residual curves that end below the tolerance.",
        ),
        _kan_figure(network, states),
    ]
    return Section(
        title="Classification: is there a lesion? (DEQ-KAN)",
        text=[
            "Slices of the template with and without a synthetic lesion; training, validation and test come from "
            "slabs at "
            "least 10 mm apart. The network ends in the equilibrium of a Kolmogorov-Arnold layer.",
            "The area under the ROC curve says how well lesions are ranked above the rest. Accuracy, sensitivity and "
            f"specificity depend on the decision threshold: {task['threshold']:.2f}, chosen on the validation slab, as "
            "was the temperature of the probabilities. Chosen on one slab of one brain, both need not fit another: "
            "these scores can be poor where the area is high.",
        ],
        key_figures=[
            ("AUC", f"{auc:.3f}", f"linear model {linear_auc:.3f}"),
            (
                "Accuracy",
                f"{numbers['accuracy']:.3f}",
                f"linear model {numbers['baseline']['linear_model_accuracy']:.3f}",
            ),
            (
                "Solves converged",
                f"{numbers['solve_converged']:.0%}",
                f"{numbers['solve_evaluations']:.1f} evaluations each",
            ),
        ],
        header=["Measure on the test slab", "DEQ-KAN", "Linear model, 16 x 16 pixels"],
        rows=[
            ("AUC", f"{auc:.3f}", f"{linear_auc:.3f}"),
            ("Accuracy", f"{numbers['accuracy']:.3f}", f"{numbers['baseline']['linear_model_accuracy']:.3f}"),
            *(
                # The second class by name counts as the positive one, as everywhere in the bundle.
                (f"{label} for {names[1]}", f"{numbers[key]:.3f}", "")
                for label, key in (("Sensitivity", "sensitivity"), ("Specificity", "specificity"), ("F1", "f1"))
            ),
        ],
        numbers=numbers,
        figures=figures,
    )


def _histories(recorder: SolveRecorder) -> list[torch.Tensor]:
    """Return the relative residuals of each sample, NaN where it had stopped."""
    return [column for record in recorder.records for column in record.stats.history.cpu().unbind(1)]


def _kan_figure(network: DEQKANClassifier, states: torch.Tensor) -> tuple[Figure, str, str]:
    layer = cast(KANLinear, cast(KANCell, network.equilibrium.cell).kan)
    points = torch.linspace(-4, 4, 201)
    with torch.no_grad():
        curves = layer.edge_functions(points.to(next(layer.parameters()).device)).cpu()  # (P, out, in)
    strength = curves.std(dim=0)
    strongest = strength.flatten().topk(6).indices
    pairs = [(int(i) // strength.shape[1], int(i) % strength.shape[1]) for i in strongest]
    return (
        plot_kan_curves(
            points,
            torch.stack([curves[:, out, into] for out, into in pairs]),
            [f"feature {into} to {out}" for out, into in pairs],
            [np.histogram(states[:, into].clamp(-4, 4).numpy(), bins=24, range=(-4, 4)) for _, into in pairs],
        ),
        "The six strongest learned functions of the KAN cell, over the distribution of their inputs.",
        "Six curves of learned spline functions with input histograms.",
    )
