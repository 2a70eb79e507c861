import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from torch import nn

from monai_deqkan.networks.layers import InputStatistics, KANActivation, KANConv2d, KANLinear, record_kan_inputs


def test_counts_and_quantiles_are_numpys():
    torch.manual_seed(0)
    layer = KANLinear(2, 1)
    batches = [3 * torch.randn(n, 2) for n in (1, 700, 50)]
    with InputStatistics(layer) as statistics:
        for batch in batches:
            layer(batch)
    found = statistics.layers[""]
    x = torch.cat(batches)
    q = [0.001, 0.3, 0.999]
    assert np.allclose(found.quantiles(q).numpy(), np.quantile(x.double().numpy(), q, axis=0))
    assert torch.equal(found.minimum, x.amin(0).double())
    assert torch.equal(found.maximum, x.amax(0).double())
    assert torch.allclose(found.below, (x < -3).float().mean(0))
    assert torch.allclose(found.above, (x > 3).float().mean(0))
    assert found.outside == pytest.approx(float((x.abs() > 3).float().mean()))
    assert found.count == 751
    assert sorted(found.samples[:, 0].tolist()) == sorted(x[:, 0].tolist())


def test_sample_is_bounded_uniform_over_batches_and_the_same_in_each_run():
    layer = KANLinear(1, 1)

    def run():
        with InputStatistics(layer, max_samples=1000) as statistics:
            for start, stop in ((0, 9000), (9000, 9500), (9500, 30000)):
                layer(torch.arange(start, stop, dtype=torch.float32)[:, None])
        return statistics.layers[""]

    found = run()
    values = found.samples[:, 0]
    assert len(values) == 1000 == len(values.unique())
    assert found.count == 30000
    assert float((values < 9000).float().mean()) == pytest.approx(0.3, abs=0.05)  # 3.5 standard deviations
    assert float(values.mean()) == pytest.approx(15000, abs=1000)
    assert found.maximum.item() == 29999
    assert torch.equal(values, run().samples[:, 0])


def test_grid_is_that_of_the_input_map():
    layer = KANLinear(2, 1)
    layer.set_input_map(torch.tensor([0.1, -1.0]), torch.tensor([0.0, 10.0]))
    with InputStatistics(layer) as statistics:
        layer(torch.tensor([[29.0, 6.0], [31.0, 12.0]]))  # t = 2.9, 3.1 and 4, -2
    found = statistics.layers[""]
    assert found.above.tolist() == [0.5, 0.5]
    assert found.below.tolist() == [0.0, 0.0]


def test_values_that_are_not_finite_are_counted():
    layer = KANLinear(2, 1)
    with InputStatistics(layer) as statistics:
        layer(torch.tensor([[torch.nan, 1.0], [torch.inf, 2.0], [5.0, 9.0]]))
    found = statistics.layers[""]
    assert found.non_finite.tolist() == [2, 0]
    assert found.above.tolist() == pytest.approx([1.0, 1 / 3])
    assert found.minimum.tolist() == [5.0, 1.0]
    assert found.quantiles([0.5]).tolist() == [[5.0, 2.0]]


def test_layers_anywhere_and_meta_tensors_and_half_precision():
    network = nn.Sequential(KANConv2d(2, 3, 1), nn.Sequential(KANActivation(3), KANActivation()))
    with InputStatistics(network) as statistics:
        y = network(MetaTensor(torch.arange(36.0).reshape(1, 2, 3, 6)))
    assert isinstance(y, MetaTensor)
    assert list(statistics.layers) == ["0", "1.0.functions", "1.1.functions"]
    assert type(statistics.layers["0"].samples) is torch.Tensor
    assert statistics.layers["0"].maximum.tolist() == [17.0, 35.0]
    assert statistics.layers["1.0.functions"].count == 18
    assert statistics.layers["1.1.functions"].count == 54
    half = KANLinear(1, 1, dtype=torch.float16)
    with InputStatistics(half) as statistics:
        half(torch.full((3, 1), 6e4, dtype=torch.float16))
    assert statistics.layers[""].above.tolist() == [1.0]
    assert statistics.layers[""].maximum.item() == 60000.0


def test_no_hook_is_left_behind_and_nothing_is_recorded_outside():
    layer = KANLinear(1, 1)
    statistics = InputStatistics(layer)
    layer(torch.zeros(1, 1))
    assert statistics.layers == {}
    with pytest.raises(TypeError, match="dtype"), statistics:
        layer(torch.zeros(2, 1, dtype=torch.float64))
    layer(torch.zeros(4, 1))
    assert statistics.layers[""].count == 2
    assert not layer._forward_pre_hooks


def test_errors():
    with pytest.raises(ValueError, match="must hold KAN layers; Linear has none"):
        InputStatistics(nn.Linear(1, 1))
    with pytest.raises(TypeError, match=r"torch.nn.Module; got str"):
        InputStatistics("network")
    with pytest.raises(ValueError, match="max_samples"):
        InputStatistics(KANLinear(1, 1), max_samples=0)


def test_recording_keeps_every_call_and_restores_the_network():
    torch.manual_seed(0)
    network = nn.Sequential(KANLinear(3, 3), nn.Dropout(), KANLinear(3, 3)).train()
    network.append(network[0])
    network[1].eval()
    x = torch.randn(5, 3)
    found = record_kan_inputs(network, x)
    assert set(found) == {"0", "2"}
    assert not network[1].training
    assert network[0].training
    with torch.no_grad():
        hidden = network[2](network[0](x))
    torch.testing.assert_close(found["0"], torch.cat((x, hidden)).double(), atol=1e-6, rtol=0)
    assert len(network[0]._forward_pre_hooks) == 0
    assert list(record_kan_inputs(network[0], x)) == [""]
    few = record_kan_inputs(network, x, max_values=2)["0"]
    assert torch.equal(few, record_kan_inputs(network, x, max_values=2)["0"])
    assert len({tuple(row) for row in few.tolist()} & {tuple(row) for row in found["0"].tolist()}) == 2


def test_recording_says_why_it_fails():
    network = nn.ModuleDict({"idle": KANLinear(2, 2), "used": nn.Linear(2, 2)})
    network.forward = lambda x: network["used"](x)
    with pytest.raises(ValueError, match="must call at least one KAN layer; ModuleDict called none"):
        record_kan_inputs(network, torch.zeros(1, 2))
    with pytest.raises(ValueError, match="has none"):
        record_kan_inputs(nn.Linear(2, 2), torch.zeros(1, 2))
    with pytest.raises(ValueError, match="KAN layer '1' must be finite; 1 of them were not"):
        record_kan_inputs(nn.Sequential(nn.Identity(), KANLinear(2, 2)), torch.tensor([[0.0, torch.inf]]))
