from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from monai_deqkan._checks import (
    check_choice,
    check_empty_folder,
    check_finite,
    check_folder,
    check_int,
    check_range,
    check_shape,
    check_spatial_dims,
    check_tensor,
)


def test_check_tensor_names_the_kind_that_came() -> None:
    value = torch.zeros(2)
    assert check_tensor("x", value) is value
    with pytest.raises(TypeError, match=r"`x` must be a torch.Tensor; got list. Use torch.tensor.$"):
        check_tensor("x", [1.0], "Use torch.tensor.")


@pytest.mark.parametrize("axes", [("B", 3, "H"), (2, 3, 4), ("B", "C", "H")])
def test_check_shape_accepts(axes: tuple[str | int, ...]) -> None:
    check_shape("x", torch.zeros(2, 3, 4), axes)


@pytest.mark.parametrize(
    ("shape", "axes"), [((2, 3), ("B", 4)), ((2, 3), ("B", 3, "H")), ((0, 3), ("B", 3)), ((), ("B",))]
)
def test_check_shape_refuses(shape: tuple[int, ...], axes: tuple[str | int, ...]) -> None:
    expected = ", ".join(map(str, axes))
    with pytest.raises(ValueError, match=rf"`x` must have shape \({expected}\)") as caught:
        check_shape("x", torch.zeros(shape), axes, "Add an axis.")
    assert f"got {shape}. Add an axis." in str(caught.value)


def test_check_finite_counts() -> None:
    check_finite("x", torch.ones(3))
    check_finite("x", torch.ones(3, dtype=torch.int64))
    with pytest.raises(ValueError, match="2 of 4 values are NaN or infinite"):
        check_finite("x", torch.tensor([1.0, math.nan, -math.inf, 0.0]))
    with pytest.raises(ValueError, match="1 of 1 values"):
        check_finite("x", torch.tensor([complex(0.0, math.nan)]))


def test_check_int() -> None:
    assert check_int("n", 1) == 1
    assert check_int("n", 0, minimum=0) == 0
    for wrong in (True, 1.0, "1", None):
        with pytest.raises(TypeError, match="`n` must be an integer"):
            check_int("n", wrong)
    with pytest.raises(ValueError, match="`n` must be at least 1; got 0"):
        check_int("n", 0)


def test_check_range_has_open_and_closed_ends() -> None:
    assert check_range("d", 1, 0, 1) == 1.0
    assert isinstance(check_range("d", 1, 0, 1), float)
    with pytest.raises(ValueError, match=r"`d` must lie in \[0, 1\); got 1"):
        check_range("d", 1, 0, 1, open_high=True)
    with pytest.raises(ValueError, match=r"`d` must lie in \(0, 1\]; got 0"):
        check_range("d", 0, 0, 1, open_low=True)
    with pytest.raises(ValueError, match="got nan"):
        check_range("d", math.nan)
    for wrong in (True, "1", None, 1j):
        with pytest.raises(TypeError, match="`d` must be a number"):
            check_range("d", wrong)


def test_check_choice_suggests() -> None:
    assert check_choice("mode", "wrap", ["wrap", "clip"]) == "wrap"
    with pytest.raises(ValueError, match=r"one of wrap, clip; got 'clop'. Did you mean 'clip'\?"):
        check_choice("mode", "clop", ["wrap", "clip"])
    with pytest.raises(ValueError, match=r"`spatial_dims` must be one of 2, 3; got 1\.$"):
        check_spatial_dims(1)
    assert check_spatial_dims(1, allowed=(1, 2)) == 1


def test_folders(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    assert check_folder(str(tmp_path), "data") == tmp_path
    with pytest.raises(FileNotFoundError, match=r"The folder for data does not exist: .*gone. Check the path."):
        check_folder(tmp_path / "gone", "data")
    with pytest.raises(NotADirectoryError, match="it is a file"):
        check_folder(file, "data")

    assert check_empty_folder(tmp_path / "new", "results") == tmp_path / "new"
    assert not (tmp_path / "new").exists()
    with pytest.raises(FileExistsError, match="The folder for results already holds files"):
        check_empty_folder(tmp_path, "results")
    with pytest.raises(NotADirectoryError, match="it is a file"):
        check_empty_folder(file, "results")
    with pytest.raises(NotADirectoryError, match="results would lie in"):
        check_empty_folder(file / "a" / "b", "results")


def test_home_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    assert check_folder("~", "data") == tmp_path
    assert check_empty_folder("~/new", "results") == tmp_path / "new"
