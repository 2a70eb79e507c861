from __future__ import annotations

import csv

import pytest
import torch
from torch import nn

from monai_deqkan.networks.layers import KANConv2d, KANLinear, edge_importance
from monai_deqkan.visualize import write_edge_table


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        KANConv2d(1, 2, (1, 2)), nn.Flatten(), KANLinear(8, 1, base_activation=None, outside="linear")
    ).double()


def read(path):
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_table_lists_importance_ranges_and_formulas_of_recorded_inputs(tmp_path):
    net = network()
    t = torch.linspace(-3, 3, 300, dtype=torch.float64)
    with torch.no_grad():
        net[2].weight.zero_()
        net[2].coefficients[0, :, 5] = net[2].basis.fit(t, 0.5 * t**2)
    x = torch.randn(40, 1, 4, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rows = read(write_edge_table(tmp_path / "edges.csv", net, x, num_formulas=1))
    assert [row["layer"] for row in rows] == ["0"] * 4 + ["2"] * 8
    importance = edge_importance(net[0], x)
    for row in rows[:4]:
        place = int(row["out_channel"]), int(row["in_channel"]), *map(int, row["kernel_offset"].split())
        assert float(row["importance"]) == pytest.approx(float(importance[place]), rel=1e-5)
    assert [bool(row["formula"]) for row in rows] == [True, False, False, False, True] + [False] * 7
    hidden = net[:2](x)[:, 5].detach()
    best = rows[4]
    assert (best["in_channel"], best["out_channel"], best["kernel_offset"]) == ("5", "0", "")
    assert float(best["input_low"]) == pytest.approx(float(hidden.min()), rel=1e-4)
    assert best["formula"].startswith("0.5 (x") or best["formula"].startswith("0.5000 (x")
    assert float(best["r2"]) > 0.999


def test_without_inputs_the_grid_is_taken(tmp_path):
    rows = read(write_edge_table(tmp_path / "edges.csv", network(), num_edges=2, num_formulas=0))
    assert len(rows) == 4
    assert {(row["input_low"], row["input_high"]) for row in rows} == {("-3", "3")}


def test_bad_input_is_rejected(tmp_path):
    path = tmp_path / "edges.csv"
    with pytest.raises(ValueError, match="must hold KAN layers"):
        write_edge_table(path, nn.Linear(2, 2))
    with pytest.raises(FileNotFoundError, match="folder for the table"):
        write_edge_table(tmp_path / "none" / "edges.csv", network())
    path.write_text("mine", encoding="utf-8")
    with pytest.raises(FileExistsError, match="would overwrite"):
        write_edge_table(path, network())
    assert path.read_text(encoding="utf-8") == "mine"
