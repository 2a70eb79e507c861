import numpy as np
import pytest
from sklearn.decomposition import PCA
from sklearn.neighbors import KNeighborsClassifier

from monai_deqkan.visualize import embed_features, plot_embedding


def groups(per_class, classes=3, seed=0):
    rng = np.random.default_rng(seed)
    labels = np.repeat(np.arange(classes), per_class)
    return 4 * rng.normal(0, 1, (classes, 10))[labels] + rng.normal(0, 1, (classes * per_class, 10)), labels


def test_few_images_are_drawn_by_principal_components():
    features, _ = groups(4)
    points, method = embed_features(features)
    assert method == "principal components"
    np.testing.assert_allclose(np.abs(points), np.abs(PCA(2).fit_transform(features)), atol=1e-8)


def test_more_images_are_drawn_by_tsne_which_keeps_groups_and_repeats():
    features, labels = groups(15)
    points, method = embed_features(features)
    assert method == "t-SNE"
    assert KNeighborsClassifier(3).fit(points, labels).score(points, labels) > 0.95
    np.testing.assert_array_equal(points, embed_features(features)[0])


def test_equal_features_are_no_error():
    points, _ = embed_features(np.ones((31, 4)))
    assert np.isfinite(points).all()


def test_points_of_each_class_and_rings_of_wrong_ones():
    features, labels = groups(5)
    guess = labels.copy()
    guess[[0, 7]] = 2
    figure = plot_embedding(features, labels, ["a", "b", "c"], guess, max_images=10)
    counts = [len(points.get_offsets()) for points in figure.axes[0].collections]
    assert sum(counts[:3]) == 10
    assert "10 of 15 images" in figure.axes[0].get_title()


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match="at least 3 images"):
        plot_embedding(np.ones((2, 4)), [0, 1], ["a", "b"])
    with pytest.raises(ValueError, match="classes from 0 to 1; got"):
        plot_embedding(np.ones((3, 4)), [0, 1, 2], ["a", "b"])
