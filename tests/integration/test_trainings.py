"""Three short trainings from a fixed seed that must beat a stated number: the parts learn, not only run."""

import torch
import torch.nn.functional as F

from monai_deqkan._complex import complex_to_channels
from monai_deqkan.losses import PerpendicularLoss
from monai_deqkan.metrics import magnitude, psnr
from monai_deqkan.networks.nets import DEQKANClassifier, DEQReconstructor, KANUNet
from monai_deqkan.operators import equispaced_mask, simulate_kspace, smooth_coil_maps
from monai_deqkan.solvers import SolveRecorder
from monai_deqkan.variational import cg_sense_path


def squares(count, seed, size=32):
    """Pictures of noise with a bright square somewhere, and the squares' masks."""
    generator = torch.Generator().manual_seed(seed)
    images = 0.5 * torch.randn(count, 1, size, size, generator=generator)
    masks = torch.zeros(count, 1, size, size)
    for mask in masks:
        row, column = torch.randint(2, size - 10, (2,), generator=generator).tolist()
        mask[0, row : row + 8, column : column + 8] = 1
    return images, masks


def test_classifier_finds_a_square_anywhere():
    torch.manual_seed(0)
    network = DEQKANClassifier(2, 1, 2, features=(8, 16, 16, 32), hidden_features=16, dropout=0.0)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-2)

    def batch(seed, count=32):
        images, masks = squares(count, seed)
        labels = torch.arange(count) % 2
        return images + masks * labels.view(-1, 1, 1, 1), labels

    for step in range(60):
        images, labels = batch(step + 1)
        optimizer.zero_grad()
        F.cross_entropy(network(images), labels).backward()
        optimizer.step()
    network.eval()
    with torch.no_grad(), SolveRecorder() as recorder:
        images, labels = batch(0, 64)
        accuracy = float((network(images).argmax(1) == labels).float().mean())
    assert accuracy >= 0.9
    assert bool(recorder.converged().all())


def test_kan_unet_segments_a_square():
    torch.manual_seed(0)
    network = KANUNet(2, 1, 2, features=(6, 12))
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-2)
    for step in range(40):
        images, masks = squares(4, step + 1)
        optimizer.zero_grad()
        F.cross_entropy(network(images + masks), masks[:, 0].long()).backward()
        optimizer.step()
    network.eval()
    with torch.no_grad():
        images, masks = squares(16, 0)
        found = network(images + masks).argmax(1, keepdim=True)
    dice = float(2 * (found * masks).sum() / (found.sum() + masks.sum()))
    assert dice >= 0.8


def test_reconstructor_beats_the_best_cg_sense():
    maps = smooth_coil_maps((40, 40), 4)[None]
    masks = equispaced_mask(40, 3.0, 0.15, generator=torch.Generator().manual_seed(0)).view(1, 1, 1, 40)

    def batch(seed, count=4):
        generator = torch.Generator().manual_seed(seed)
        image = F.interpolate(torch.rand(count, 1, 5, 5, generator=generator), size=(28, 28), mode="nearest")
        image = F.pad(image, (6, 6, 6, 6))[:, 0]
        kspace = simulate_kspace(image, maps[0], snr_db=20, generator=generator) * masks
        return kspace, image

    torch.manual_seed(0)
    network = DEQReconstructor(2, num_layers=2, features=8)
    optimizer = torch.optim.Adam(network.parameters(), lr=2e-2)
    loss_function = PerpendicularLoss()
    for step in range(40):
        kspace, image = batch(step + 1)
        optimizer.zero_grad()
        target = complex_to_channels(torch.complex(image, torch.zeros_like(image)))
        loss_function(network(kspace, masks, maps.expand(len(image), -1, -1, -1)), target).backward()
        optimizer.step()
    kspace, image = batch(0, 8)
    reference = image[:, None]
    with torch.no_grad(), SolveRecorder() as recorder:
        result = magnitude(network(kspace, masks, maps.expand(8, -1, -1, -1)))
    rivals = [
        psnr(x.abs()[:, None], reference) for x in cg_sense_path(kspace, masks, maps.expand(8, -1, -1, -1), max_iter=15)
    ]
    gain = psnr(result, reference) - torch.stack(rivals).amax(0)
    assert float(gain.mean()) >= 1.0
    assert bool(recorder.converged().all())
