"""What the check finds in real sets, in the folder that ``MONAI_DEQKAN_SHARED_DATA`` names, else in ``shared/data``."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from monai_deqkan.data import check_dataset

BESIDE = Path(__file__).parents[3] / "shared" / "data"
ROOT = Path(os.environ.get("MONAI_DEQKAN_SHARED_DATA", BESIDE))
pytestmark = pytest.mark.shared_data


def shared(name: str) -> Path:
    path = ROOT / "classification" / name
    if not path.exists():
        pytest.skip(f"No shared data: {name}")
    return path


def test_one_image_a_patient_in_the_tuberculosis_set() -> None:
    report = check_dataset(shared("tb_chest_xray"), patients=r"CHNCXR_(\d+)", progress=False)
    assert not report.has_errors
    assert report.counts["val"] == {"normal": 35, "tuberculosis": 35}
    assert {finding.topic: finding.count for finding in report.findings}["patients"] == 462


def test_copies_of_a_set_made_by_augmentation() -> None:
    report = check_dataset(shared("lung_histopathology"), progress=False)
    assert not report.has_errors
    assert [pair.kind for pair in report.pairs] == ["exact"] * 4
