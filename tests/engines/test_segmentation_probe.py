import copy

import numpy as np
import pytest
import torch
from monai.inferers import SlidingWindowInferer
from monai.networks.nets import UNet
from sklearn.metrics import f1_score
from torch import nn

from monai_deqkan.engines import SegmentationProbe
from monai_deqkan.engines.segmentation_probe import live_edges
from monai_deqkan.networks.layers import KANConv2d, make_pruning_permanent, prune_edges
from monai_deqkan.networks.nets import KANUNet


@pytest.fixture
def batches():
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(4, 1, 16, 16, generator=generator)
    labels = (images + 0.3 * torch.randn(images.shape, generator=generator) > 0.5).long()
    return [{"image": images[:3], "label": labels[:3]}, {"image": images[3:], "label": labels[3:]}]


@pytest.fixture
def network():
    """Three KAN channels of the image; only the first counts for the logits, by weight, and the last is pruned."""
    torch.manual_seed(0)
    network = nn.Sequential(KANConv2d(1, 3, 1, grid_size=8, base_activation=None, bias=False), nn.Conv2d(3, 2, 1))
    layer, head = network
    points = torch.linspace(-3, 3, 401, dtype=torch.float64)
    with torch.no_grad():
        layer.coefficients[0, :, 0, 0, 0] = layer.basis.fit(points, points).float()
        layer.coefficients[2] = 0.0
        head.weight.copy_(torch.tensor([[0.0, 0.0, 0.5], [1.0, 0.0, 0.5]])[..., None, None])
        head.bias.copy_(torch.tensor([0.5, 0.0]))  # class 1 where the image is above 0.5
    return network


def expected_dice(probe, logits):
    chosen = torch.cat(logits).argmax(1)
    labels = torch.cat([labels[:, 0] for labels in probe.labels])
    return np.mean([f1_score(y.flatten(), p.flatten()) for y, p in zip(labels, chosen, strict=True)])


def test_dice_is_the_f1_score_of_each_image(network, batches):
    probe = SegmentationProbe(network, batches)
    logits = probe.logits()
    assert probe.num_images == 4
    assert probe.dice(logits) == pytest.approx(expected_dice(probe, logits))
    single = [row[:, 1:] - row[:, :1] for row in logits]  # one logit: class 1 against the background
    assert probe.dice(single) == pytest.approx(probe.dice(logits))


def test_channels_that_count_and_channels_that_do_not(network, batches):
    probe = SegmentationProbe(network, batches)
    found = {row.channel: row for row in probe.channel_sensitivity()}
    assert set(found) == {0, 1, 2}
    assert (found[1].dice_lost, found[1].logit_change) == (0, 0)  # weight zero
    assert (found[2].dice_lost, found[2].logit_change) == (0, 0)  # pruned: already its mean
    layer, head = network
    with torch.no_grad():
        before = torch.cat(probe.logits())
        features = layer(torch.cat(probe.images))
        features[:, 0] = features[:, 0].mean()
        after = head(features)
    lost = expected_dice(probe, [before]) - expected_dice(probe, [after])
    assert lost > 0.5
    assert found[0].dice_lost == pytest.approx(lost)
    assert found[0].logit_change == pytest.approx(float((after - before).norm() / before.norm()), rel=1e-5)


def test_only_channels_that_change_the_output_most_are_tried(network, batches):
    found = SegmentationProbe(network, batches).channel_sensitivity(num_channels=1)
    assert [(row.layer, row.channel) for row in found] == [("0", 0)]


def test_head_is_left_out_and_the_network_is_left_as_it_was(batches):
    torch.manual_seed(0)
    network = KANUNet(2, 1, 2, features=(2, 4)).train()
    before = copy.deepcopy(network.state_dict())
    probe = SegmentationProbe(network, batches, inferer=SlidingWindowInferer((16, 16)))
    layers = {row.layer for row in probe.channel_sensitivity(1)}
    assert layers
    assert not any(name.startswith("head") for name in layers)
    assert len(probe.pruning_cost((0.5,))) == 1
    assert network.training
    assert list(network.state_dict()) == list(before)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in network.modules())


def test_head_is_left_out_though_its_output_is_scaled_and_interpolated(batches):
    torch.manual_seed(0)
    network = KANUNet(2, 1, 2, features=(2, 4), stem_stride=2)
    for _ in range(2):
        layers = {row.layer for row in SegmentationProbe(network, batches).channel_sensitivity(1)}
        assert {name.split(".")[0] for name in layers} == {"stem", "encoder", "ups", "decoder"}
        prune_edges(network, 0.25)


def test_pruning_costs_what_pruning_a_copy_costs(batches):
    torch.manual_seed(0)
    network = KANUNet(2, 1, 2, features=(2, 4))
    probe = SegmentationProbe(network, batches)
    rows = probe.pruning_cost((0.0, 0.5))
    assert rows[0].dice == probe.dice(probe.logits())
    assert rows[0].logit_change == 0
    edges = sum(m.weight.numel() // m.num_features for m in network.modules() if isinstance(m, KANConv2d))
    assert [row.num_edges for row in rows] == [edges, edges - round(0.5 * edges)]
    pruned = copy.deepcopy(network)
    prune_edges(pruned, 0.5, inputs=[(images,) for images in probe.images])
    assert rows[1].dice == probe.dice(probe.logits(pruned))
    make_pruning_permanent(pruned)
    assert live_edges(pruned) == rows[1].num_edges  # zeros count, whoever put them there
    assert SegmentationProbe(pruned, batches).pruning_cost((0.25,))[0].num_edges == rows[1].num_edges


def test_activations_are_not_pruned(batches):
    network = UNet(2, 1, 2, channels=(4, 8), strides=(2,), act="kan")
    assert SegmentationProbe(network, batches).pruning_cost() == []


def test_what_cannot_be_used(network, batches):
    with pytest.raises(ValueError, match="no image"):
        SegmentationProbe(network, [])
    with pytest.raises(ValueError, match="label"):
        SegmentationProbe(network, [{"image": torch.rand(1, 1, 8, 8), "label": torch.zeros(1, 2, 8, 8)}])
    with pytest.raises(ValueError, match="KAN layers"):
        SegmentationProbe(nn.Conv2d(1, 2, 1), batches).channel_sensitivity()
    with pytest.raises(TypeError, match="Module"):
        SegmentationProbe(torch.relu, batches)
