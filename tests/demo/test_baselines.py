import numpy as np
import torch

from monai_deqkan.demo.baselines import (
    best_cg_sense,
    fit_thresholds,
    linear_model,
    mean_dice,
    threshold,
    zero_filled,
)
from monai_deqkan.metrics import psnr
from monai_deqkan.operators import equispaced_mask, simulate_kspace, smooth_coil_maps


def test_linear_model_separates_what_is_linear():
    rng = np.random.default_rng(0)
    items = []
    for index in range(60):
        image = rng.normal(size=(1, 40, 32)).astype(np.float32)
        image[:, :20] += 0.5 * (index % 2)
        items.append({"image": torch.from_numpy(image), "label": index % 2})
    probabilities = linear_model(items[:40], items[40:])
    assert probabilities.shape == (20, 2)
    assert np.allclose(probabilities.sum(1), 1)
    assert (probabilities.argmax(1) == [item["label"] for item in items[40:]]).all()


def test_thresholds_are_found_where_they_separate():
    label = torch.arange(4).repeat_interleave(100).view(1, 20, 20)
    image = label.float() + 0.2 * torch.rand(1, 20, 20, generator=torch.Generator().manual_seed(0))
    levels = fit_thresholds([image], [label], num_classes=4)
    # The levels are quantiles of the image: they may miss a gap between classes by a few pixels.
    assert mean_dice(threshold(image, levels), label, 4) >= 0.98
    assert mean_dice(threshold(image, [0.5, 1.5, 2.5]), label, 4) >= 0.5


def test_mean_dice_by_hand():
    label = torch.tensor([[[0, 1, 1, 2]]])
    prediction = torch.tensor([[[0, 1, 0, 2]]])
    assert abs(mean_dice(prediction, label, 3) - (2 / 3 + 1) / 2) < 1e-6


def test_best_cg_sense_is_the_best_iterate_and_beats_zero_filling():
    maps = smooth_coil_maps((48, 40), 6)
    generator = torch.Generator().manual_seed(0)
    image = torch.zeros(2, 48, 40)
    image[:, 10:38, 8:32] = torch.rand(2, 28, 24, generator=generator) * 0.2 + 0.8
    mask = equispaced_mask(40, 3.0, 0.2, generator=generator).view(1, 1, 1, 40).expand(2, 1, 1, 40)
    kspace = simulate_kspace(image, maps, snr_db=25, generator=generator) * mask
    reference = image[:, None]
    best, scores, iterations = best_cg_sense(kspace, mask, maps[None].expand(2, -1, -1, -1), reference, max_iter=12)
    assert torch.allclose(psnr(best, reference), scores)
    assert ((iterations >= 1) & (iterations <= 12)).all()
    assert (scores > psnr(zero_filled(kspace), reference) + 1).all()
