import numpy as np
import pytest
import torch
from sklearn.metrics import log_loss

from monai_deqkan.engines import balanced_sampler, class_weights, sample_weights

ITEMS = [{"label": label} for label in [0] * 6 + [1] * 3 + [2]]


def test_every_class_has_the_same_share_of_a_loss():
    weights = class_weights(ITEMS, 3)
    assert torch.allclose(weights, torch.tensor([10 / 18, 10 / 9, 10 / 3]))
    rng = np.random.default_rng(0)
    probabilities, labels = rng.dirichlet(np.ones(3), 10), np.array([item["label"] for item in ITEMS])
    loss = torch.nn.CrossEntropyLoss(weight=weights.double())(
        torch.as_tensor(np.log(probabilities)), torch.as_tensor(labels)
    )
    means = [log_loss(labels[labels == c], probabilities[labels == c], labels=[0, 1, 2]) for c in range(3)]
    assert float(loss) == pytest.approx(np.mean(means))


def test_samples_are_drawn_equally_from_all_classes():
    sampler = balanced_sampler(ITEMS * 300, 3, generator=torch.Generator().manual_seed(0))
    drawn = np.bincount([(ITEMS * 300)[index]["label"] for index in sampler])
    assert drawn.sum() == 3000
    assert np.all(np.abs(drawn - 1000) < 5 * np.sqrt(1000 * 2 / 3))
    assert sample_weights(ITEMS, 3)[[0, 6, 9]].tolist() == pytest.approx([10 / 18, 10 / 9, 10 / 3])


def test_absent_and_unknown_classes_are_named():
    with pytest.raises(ValueError, match=r"there is none of \[3\]"):
        class_weights(ITEMS, 4)
    with pytest.raises(ValueError, match=r"must lie in \[0, 2\); got 0 to 2"):
        class_weights(ITEMS, 2)
