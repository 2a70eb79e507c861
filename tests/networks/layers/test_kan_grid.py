import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from monai_deqkan.networks.layers import (
    BSplineBasis,
    InputStatistics,
    KANActivation,
    KANConv1d,
    KANConv2d,
    KANConv3d,
    KANLinear,
    extend_grid,
    refit_grid,
    refit_grids,
)


def relative(after, before):
    return float((after - before).detach().double().square().mean().sqrt() / before.detach().square().mean().sqrt())


def quantiles(x):
    return np.quantile(x.double().numpy(), [0.001, 0.999], axis=0).T


def hostile(kind, generator, channels=3, dtype=torch.float32):
    def normal(rows):
        return torch.randn(rows, channels, generator=generator)

    x = {
        "constant": lambda: torch.full((64, channels), float(normal(1)[0, 0]) * 10),
        "constant channel": lambda: normal(64) * torch.tensor([1.0, 0.0, 5.0]) + torch.tensor([0.0, 7.0, 0.0]),
        "duplicates": lambda: normal(3).repeat(40, 1),
        "one sample": lambda: normal(1) * 100,
        "two samples": lambda: normal(2),
        "outliers": lambda: torch.cat((normal(200), 1e6 * normal(3))),
        "all huge": lambda: 1e6 * normal(100),
        "tiny": lambda: 1e-20 * normal(100),
        "huge": lambda: 1e37 * normal(100),
        "nan": lambda: torch.cat(
            (normal(50), torch.full((5, channels), torch.nan), torch.full((1, channels), torch.inf))
        ),
        "all nan": lambda: torch.full((9, channels), torch.nan),
        "binary": lambda: (normal(100) > 0).float(),
        "half": lambda: 1e4 * normal(100),
    }[kind]()
    return x.to(dtype)


KINDS = ["constant", "constant channel", "duplicates", "one sample", "two samples", "outliers", "all huge", "tiny"]
KINDS += ["huge", "nan", "all nan", "binary", "half"]


def test_500_refits_on_hostile_batches_stay_finite():
    generator = torch.Generator().manual_seed(0)
    refits = 0
    for round_ in range(5):
        for kind in KINDS:
            for outside in ("zero", "clamp", "linear", "half"):
                half = kind in ("half", "constant", "one sample") and outside == "half"
                torch.manual_seed(round_)
                settings = {} if outside == "half" else {"outside": outside}
                layer = KANLinear(3, 2, dtype=torch.float16 if half else torch.float32, **settings)
                x = hostile(kind, generator, dtype=layer.weight.dtype)
                for _ in range(2):  # again on the refitted grid
                    record = refit_grid(layer, x, max_growth=1 + round_ % 2)
                    refits += 1
                    assert record.channel_change.isfinite().all(), kind
                    assert record.new_range.isfinite().all()
                    assert all(bool(v.isfinite().all()) for v in layer.state_dict().values()), kind
                finite = x[x.isfinite().all(1)]
                if outside != "linear" and len(finite):  # tangents go on to 1e37
                    assert layer(finite).isfinite().all(), kind
    assert refits >= 500


@pytest.mark.parametrize(
    "data",
    [
        lambda n: torch.randn(n, 4),
        lambda n: torch.randn(n, 4) * torch.tensor([0.1, 0.5, 0.8, 0.95]),
        lambda n: torch.rand(n, 4) * 6 - 3,
        lambda n: torch.rand(n, 4),
        lambda n: 1e-3 * torch.randn(n, 4) + 1,
        lambda n: torch.randn(n, 4).relu(),
    ],
)
def test_range_is_that_of_the_quantiles_and_the_function_stays(data):
    for seed in range(5):
        torch.manual_seed(seed)
        layer = KANLinear(4, 8)
        x = data(3000)
        before = layer(x)
        record = refit_grid(layer, x)
        assert not record.kept
        expected = quantiles(x)
        assert np.allclose(record.new_range.numpy(), expected, atol=1e-5 * np.abs(expected).max(), rtol=1e-5)
        inside = ((x >= record.new_range[:, 0]) & (x <= record.new_range[:, 1])).all(1)
        assert relative(layer(x)[inside], before[inside]) < 0.01
        assert record.relative_change < 0.01
        assert record.channel_change.max() < 0.01


def test_wider_data_refine_the_basis_so_that_the_function_stays():
    torch.manual_seed(0)
    layer = KANLinear(3, 8)
    x = 2.0 * torch.randn(4000, 3)
    before = layer(x)
    weight = layer.weight
    record = refit_grid(layer, x)
    assert record.num_basis > record.old_num_basis == 8
    assert layer.basis.num_basis == record.num_basis
    assert layer.weight is weight
    assert layer.weight.shape == (8, 3 * (record.num_basis + 1))
    assert relative(layer(x), before) < 0.02
    assert record.outside_before == pytest.approx(0.134, abs=0.02)
    assert record.outside_after < 0.003


def test_without_growth_a_channel_that_would_change_keeps_its_grid_exactly():
    torch.manual_seed(0)
    layer = KANLinear(2, 8)
    x = torch.rand(2000, 2) * torch.tensor([2.0, 20.0]) - torch.tensor([1.0, 10.0])
    before = layer.coefficients.detach().clone()
    record = refit_grid(layer, x, max_growth=1)
    assert list(record.kept) == [1]
    assert "would change by" in record.kept[1]
    assert torch.equal(layer.coefficients[:, :, 1], before[:, :, 1])
    assert (layer.input_scale[1], layer.input_shift[1]) == (1.0, 0.0)
    assert torch.equal(record.new_range[1], record.old_range[1])
    assert record.channel_change[1] == 0
    assert refit_grid(layer, x, max_growth=1, max_change=10.0).kept == {}


@pytest.mark.parametrize("dead_band", [0.0, 0.4])
def test_a_finer_basis_does_not_change_channels_that_keep_their_grid(dead_band):
    # Splines that fade outside the grid fade sooner on a finer one.
    torch.manual_seed(0)
    layer = KANLinear(3, 3, base_activation=None, bias=False)
    x = torch.randn(2000, 3).exp()
    x[:, 1:] *= 0.5
    before = [layer.edge_functions(x[:, i]).detach()[..., i] for i in range(3)]
    low, high = quantiles(x).T
    record = refit_grid(layer, x, dead_band=dead_band)
    assert record.kept
    for i in range(3):
        after = layer.edge_functions(x[:, i]).detach()[..., i]
        inside = (x[:, i] >= low[i]) & (x[:, i] <= high[i])
        seen = torch.ones_like(inside) if i in record.kept else inside
        change = relative(after[seen], before[i][seen])
        assert change < 0.012
        assert float(record.channel_change[i]) == pytest.approx(change, rel=0.2, abs=1e-6)


def test_change_of_kept_channels_in_the_record_is_over_all_their_inputs():
    torch.manual_seed(0)
    layer = KANLinear(2, 3, base_activation=None)
    x = torch.stack((3.2 * torch.rand(2000), 2.5 * torch.randn(2000)), dim=1)
    before = layer.edge_functions(x[:, 0]).detach()[..., 0]
    record = refit_grid(layer, x, dead_band=0.6, max_change=0.06, max_growth=4)
    assert record.kept == {0: "within the dead band"}
    assert record.num_basis > record.old_num_basis
    change = relative(layer.edge_functions(x[:, 0]).detach()[..., 0], before)
    assert 0.001 < change < 0.06
    assert float(record.channel_change[0]) == pytest.approx(change, rel=0.1)


def test_change_in_the_record_is_that_of_the_edge_functions():
    torch.manual_seed(0)
    layer = KANLinear(2, 5, dtype=torch.float64)
    x = 0.9 * torch.randn(2000, 2, dtype=torch.float64)
    low, high = quantiles(x).T
    inside = [x[(x[:, i] >= low[i]) & (x[:, i] <= high[i]), i] for i in range(2)]
    before = [layer.edge_functions(points)[:, :, i] for i, points in enumerate(inside)]
    record = refit_grid(layer, x)
    after = [layer.edge_functions(points)[:, :, i] for i, points in enumerate(inside)]
    expected = [relative(a, b) for a, b in zip(after, before, strict=True)]
    assert record.channel_change.tolist() == pytest.approx(expected, rel=0.1)


@pytest.mark.parametrize("cls", [KANConv1d, KANConv2d, KANConv3d])
def test_channels_of_a_grouped_convolution_get_their_own_grids(cls):
    torch.manual_seed(0)
    layer = cls(4, 6, 3, groups=2, padding=1)
    space = {1: (2000,), 2: (48, 40), 3: (12, 12, 12)}[cls.spatial_dims]
    scale = torch.tensor([0.1, 0.4, 0.7, 1.0]).view(1, 4, *[1] * cls.spatial_dims)
    x = torch.randn(2, 4, *space) * scale
    before = layer(x)
    record = refit_grid(layer, x)
    rows = x.movedim(1, -1).reshape(-1, 4)
    assert np.allclose(record.new_range.numpy(), quantiles(rows), rtol=1e-5, atol=1e-5)
    assert relative(layer(x), before) < 0.01


def test_map_takes_quantiles_to_the_ends_of_the_grid():
    layer = KANLinear(1, 1, grid_range=(0.0, 2.0))
    x = torch.linspace(0, 1000, 1001)[:, None]
    refit_grid(layer, x)
    t = layer.input_scale * torch.tensor([1.0, 999.0]) + layer.input_shift
    assert torch.allclose(t, torch.tensor([0.0, 2.0]), atol=1e-6)


def test_margin_and_dead_band():
    x = torch.linspace(0, 1000, 1001)[:, None]
    record = refit_grid(KANLinear(1, 1), x, margin=0.1)
    assert record.new_range.tolist() == [[pytest.approx(1 - 99.8), pytest.approx(999 + 99.8)]]
    layer = KANLinear(1, 1)
    refit_grid(layer, x)
    assert refit_grid(layer, x * 1.03, dead_band=0.05).kept == {0: "within the dead band"}
    assert refit_grid(layer, x * 1.03, dead_band=0.01).kept == {}


def test_constant_inputs_keep_the_grid_or_move_it_around_them():
    layer = KANLinear(2, 3)
    before = layer(x := torch.tensor([[1.0, 50.0]]).repeat(20, 1))
    record = refit_grid(layer, x)
    assert record.new_range[0].tolist() == [-3.0, 3.0]
    assert "on the grid" in record.kept[0]
    assert record.new_range[1].tolist() == [47.0, 53.0]
    assert "outside" in record.kept[1]
    assert torch.allclose(layer(x), before, atol=1e-4)


def test_values_that_are_not_finite_are_left_out_and_counted():
    torch.manual_seed(0)
    x = torch.randn(1000, 2)
    layers = KANLinear(2, 2), KANLinear(2, 2)
    layers[1].load_state_dict(layers[0].state_dict())
    bad = torch.cat((x, torch.tensor([[torch.nan, 0.0], [torch.inf, 0.0], [-torch.inf, 0.0]])))
    clean, dirty = refit_grid(layers[0], x), refit_grid(layers[1], bad)
    assert (clean.non_finite, dirty.non_finite) == (0, 3)
    assert torch.equal(clean.new_range[0], dirty.new_range[0])
    assert refit_grid(KANLinear(1, 1), torch.full((4, 1), torch.nan)).kept == {0: "no finite inputs"}


@pytest.mark.parametrize("basis", ["gaussian", "mexican_hat", "chebyshev", "fourier"])
def test_other_bases_are_refitted_or_kept(basis):
    torch.manual_seed(0)
    layer = KANLinear(3, 4, basis=basis)
    low, high = layer.basis.grid_range
    x = (low + (high - low) * torch.rand(2000, 3)) * 0.6
    before = layer(x)
    record = refit_grid(layer, x)
    assert relative(layer(x), before) < 0.01
    assert bool(record.kept) == (basis == "fourier")  # its functions repeat with the old period


def test_training_goes_on_with_the_same_parameter():
    torch.manual_seed(0)
    layer = KANLinear(2, 1)
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.05)
    x = 5.0 * torch.rand(500, 2)
    y = torch.sin(x).sum(1, keepdim=True)
    losses = []
    for step in range(80):
        if step == 20:
            refit_grid(layer, x, max_growth=1, max_change=1.0)
        optimizer.zero_grad()
        loss = (layer(x) - y).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[19]


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = KANConv2d(1, 3, 3, padding=1)
        self.norm = nn.BatchNorm2d(3)
        self.act = KANActivation(3)
        self.head = KANLinear(3, 2)
        self.unused = KANLinear(3, 2)

    def forward(self, x):
        return self.head(self.act(self.norm(self.conv(x))).mean((2, 3)))


def test_all_layers_of_a_network_are_refitted_in_one_pass():
    torch.manual_seed(0)
    network = Network().train()
    batches = [0.5 * torch.randn(4, 1, 16, 16) for _ in range(6)]
    statistics = network.norm.running_mean.clone()
    with torch.no_grad():
        before = network.eval()(torch.cat(batches))
    network.train()
    records = refit_grids(network, batches)
    assert [record.layer for record in records] == ["conv", "act.functions", "head"]
    assert network.training
    assert network.norm.training
    assert torch.equal(network.norm.running_mean, statistics)
    assert not network.conv._forward_pre_hooks
    values = torch.cat(batches).movedim(1, -1).reshape(-1, 1)
    assert np.allclose(records[0].new_range.numpy(), quantiles(values), rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        assert relative(network.eval()(torch.cat(batches)), before) < 0.02
    assert "grids refitted" in str(records[0])


def test_forward_of_choice_and_recorded_statistics():
    torch.manual_seed(0)
    network = nn.Sequential(KANLinear(2, 2), nn.Tanh())
    batch = {"image": torch.rand(100, 2), "other": None}
    twin = nn.Sequential(KANLinear(2, 2), nn.Tanh())
    twin.load_state_dict(network.state_dict())
    refit_grids(network, [batch], forward=lambda net, item: net(item["image"]))
    with InputStatistics(twin) as statistics:
        twin(batch["image"])
    refit_grids(twin, statistics)
    assert torch.equal(network[0].weight, twin[0].weight)


class Double(nn.Module):
    def forward(self, weight):
        return 2 * weight


def test_parametrized_layers_are_refused_or_left_alone():
    network = nn.Sequential(KANLinear(2, 2), KANLinear(2, 2))
    parametrize.register_parametrization(network[1], "weight", Double())
    with pytest.raises(ValueError, match="parametrized"):
        refit_grid(network[1], torch.rand(10, 2))
    assert [record.layer for record in refit_grids(network, [torch.rand(10, 2)])] == ["0"]


def test_errors_say_what_to_do():
    layer = KANLinear(2, 2)
    with pytest.raises(ValueError, match="must hold a sample"):
        refit_grid(layer, torch.empty(0, 2))
    with pytest.raises(ValueError, match=r"of shape \(\*, 2\); got \(5, 3\)"):
        refit_grid(layer, torch.rand(5, 3))
    with pytest.raises(TypeError, match="`functions`"):
        refit_grid(KANActivation(), torch.rand(5, 1))
    with pytest.raises(ValueError, match="max_growth"):
        refit_grid(layer, torch.rand(5, 2), max_growth=0)
    with pytest.raises(ValueError, match="has none"):
        refit_grids(nn.Linear(2, 2), [])
    with pytest.raises(ValueError, match="received an input"):
        refit_grids(layer, [])
    layer.weight.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"layer\.weight"):
        refit_grid(layer, torch.rand(5, 2))


def test_reload_into_a_new_layer():
    torch.manual_seed(0)
    layer = KANLinear(2, 3)
    refit_grid(layer, x := 4 * torch.randn(1000, 2))
    fresh = KANLinear(2, 3)
    fresh.load_state_dict(layer.state_dict())
    assert isinstance(fresh.basis, BSplineBasis)
    assert fresh.basis == layer.basis
    assert torch.equal(fresh(x), layer(x))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_gives_the_same_grids_and_functions():
    torch.manual_seed(0)
    layer = KANConv2d(2, 3, 3)
    twin = KANConv2d(2, 3, 3).cuda()
    twin.load_state_dict(layer.state_dict())
    x = 2 * torch.randn(4, 2, 32, 32)
    record, other = refit_grid(layer, x), refit_grids(twin, [x.cuda()])[0]
    assert other.num_basis == record.num_basis
    assert torch.allclose(other.new_range, record.new_range, rtol=1e-5)
    assert twin.weight.is_cuda
    assert torch.allclose(twin.weight.cpu(), layer.weight, atol=1e-3)
    extend_grid(layer)
    extend_grid(twin)
    assert torch.allclose(twin(x.cuda()).cpu(), layer(x), atol=1e-2)
