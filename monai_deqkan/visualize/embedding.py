"""Features of images drawn in the plane."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from monai_deqkan._checks import check_int
from monai_deqkan.visualize.learning import COLORS, as_array, check_lengths, new_figure, plain_text, style_axes

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["embed_features", "plot_embedding"]

_LEAST_FOR_TSNE = 30


def embed_features(features: ArrayLike | Tensor, seed: int = 0) -> tuple[NDArray[np.float64], str]:
    """Map features to the plane: by t-SNE, with fewer than 30 images by principal components.

    Args:
        features: shape ``(N, F)``, at least three images and two features.
        seed: seed of the embedding.

    Returns:
        Positions ``(N, 2)`` and the method's name.

    Raises:
        ValueError: if there are too few images or features, or they are not finite.

    Reference:
        L. van der Maaten, G. Hinton, "Visualizing data using t-SNE", JMLR 9 (2008) 2579-2605; scikit-learn's
        implementation, started from the principal components.
    """
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    table = as_array("features", features, 2).astype(np.float64)
    if table.shape[0] < 3 or table.shape[1] < 2:
        raise ValueError(f"`features` must hold at least 3 images and 2 features; got shape {table.shape}.")
    if len(table) < _LEAST_FOR_TSNE:
        return PCA(n_components=2, svd_solver="full").fit_transform(table), "principal components"
    perplexity = min(30.0, (len(table) - 1) / 3)
    flat = bool((table.std(axis=0) == 0).all())
    embedding = TSNE(perplexity=perplexity, init="random" if flat else "pca", random_state=check_int("seed", seed, 0))
    return embedding.fit_transform(table), "t-SNE"


def plot_embedding(
    features: ArrayLike | Tensor,
    labels: ArrayLike | Tensor,
    class_names: Sequence[str],
    predictions: ArrayLike | Tensor | None = None,
    *,
    max_images: int = 2000,
    seed: int = 0,
    title: str = "Equilibrium features",
) -> Figure:
    """Draw the features of images as points in the plane, see :func:`embed_features`, one color for each class.

    Distances between far groups mean little in such a picture.

    Args:
        features: shape ``(N, F)``.
        labels: true classes, integers from 0, shape ``(N,)``.
        class_names: ``C`` names.
        predictions: predicted classes, shape ``(N,)``; wrong ones get a ring.
        max_images: of more images, that many by chance are drawn.
        seed: seed of the choice and of the embedding.
        title: title of the figure.

    Returns:
        Figure, 900 pixels wide at 100 dpi.

    Raises:
        ValueError: if lengths differ, labels are no classes, or there are fewer than three images.

    Example:
        >>> figure = plot_embedding([[0, 1], [1, 0], [5, 5.0]], [0, 0, 1], ["healthy", "lesion"], [0, 1, 1])
        >>> [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
        ['healthy (2)', 'lesion (1)', 'predicted wrongly (1)']
    """
    table, truth = as_array("features", features, 2), as_array("labels", labels, 1).astype(int)
    guess = truth if predictions is None else as_array("predictions", predictions, 1).astype(int)
    check_lengths(features=table, labels=truth, predictions=guess)
    if truth.min() < 0 or truth.max() >= len(class_names):
        raise ValueError(f"`labels` must be classes from 0 to {len(class_names) - 1}; got {np.unique(truth).tolist()}.")
    total = len(truth)
    if total > check_int("max_images", max_images, 3):
        chosen = np.sort(np.random.default_rng(seed).choice(total, max_images, replace=False))
        table, truth, guess = table[chosen], truth[chosen], guess[chosen]
    points, method = embed_features(table, seed)
    figure, axes = new_figure(1, 1, 6.0, title)
    panel = axes[0, 0]
    for index, name in enumerate(class_names):
        here = truth == index
        label = plain_text(f"{name} ({int(here.sum())})")
        panel.scatter(*points[here].T, s=18, color=COLORS[index % len(COLORS)], alpha=0.75, linewidth=0, label=label)
    wrong = truth != guess
    if wrong.any():
        label = f"predicted wrongly ({int(wrong.sum())})"
        panel.scatter(*points[wrong].T, s=52, facecolor="none", edgecolor="black", linewidth=1, label=label)
    shown = f"{len(truth)} images" if total == len(truth) else f"{len(truth)} of {total} images"
    style_axes(panel, f"{method} of {table.shape[1]} features, {shown}; axes have no unit")
    panel.set(xticks=[], yticks=[])
    panel.legend(fontsize=9, loc="upper left", bbox_to_anchor=(1.02, 1.0))
    return figure
