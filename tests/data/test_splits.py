from __future__ import annotations

import itertools
import logging
import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from monai_deqkan.data import hold_out, hold_out_patients, patients_of


def test_hold_out_splits_without_overlap_and_repeats() -> None:
    items = list(range(50))
    train, val = hold_out(items, "train", seed=3), hold_out(items, "val", seed=3)
    assert sorted(train + val) == items
    assert len(val) == 10
    assert val == hold_out(items, "val", seed=3) != hold_out(items, "val", seed=4)


@pytest.mark.parametrize(("count", "fraction"), [(2, 0.01), (2, 0.99), (3, 0.2)])
def test_hold_out_leaves_one_on_each_side(count: int, fraction: float) -> None:
    assert {len(hold_out(range(count), part, fraction=fraction)) for part in ("train", "val")} == {1, count - 1}


def test_hold_out_refuses_a_single_item() -> None:
    with pytest.raises(ValueError, match=r"at least 2 items; got 1"):
        hold_out(["a"], "val")


def made_up(seed: int, patients: int = 120) -> tuple[list[str], list[int]]:
    """Return who 1 to 9 images of each patient are of, and their classes, three of very different sizes."""
    rng = random.Random(seed)
    who, labels = [], []
    for patient in range(patients):
        label = rng.choices([0, 1, 2], [10, 4, 1])[0]
        for _ in range(rng.randint(1, 9)):
            who.append(f"p{patient}")
            labels.append(label if rng.random() < 0.95 else rng.randrange(3))
    return who, labels


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("fraction", [0.1, 0.2, 0.5])
def test_patients_stay_together_and_classes_keep_their_share(seed: int, fraction: float) -> None:
    who, labels = made_up(seed)
    items = list(range(len(who)))
    train, val = (hold_out_patients(items, part, who, labels, seed, fraction) for part in ("train", "val"))
    assert sorted(train + val) == items
    assert not {who[item] for item in train} & {who[item] for item in val}
    shares = Counter(labels[item] for item in val)
    totals = Counter(labels)
    for label, total in totals.items():
        # No nearer than half a patient can be asked for; 9 images are the largest.
        assert abs(shares[label] - fraction * total) <= max(5, 0.03 * total)
    assert val == hold_out_patients(items, "val", who, labels, seed, fraction)
    assert val != hold_out_patients(items, "val", who, labels, seed + 1, fraction)


def test_every_patient_may_be_held_out() -> None:
    """Neither large nor small patients are favored: of 40 seeds, each patient is held out in some."""
    who = [f"p{patient}" for patient in range(20) for _ in range(patient % 5 + 1)]
    labels = [int(patient[1:]) % 2 for patient in who]
    counts = Counter(patient for seed in range(40) for patient in set(hold_out_patients(who, "val", who, labels, seed)))
    assert set(counts) == set(who)
    assert max(counts.values()) < 30


def test_one_image_per_patient_gives_the_count_of_a_plain_split() -> None:
    items, labels = list(range(53)), [0] * 30 + [1] * 23
    val = hold_out_patients(items, "val", items, labels, seed=1)
    assert Counter(labels[item] for item in val) == {0: 6, 1: 5}


def test_few_large_patients_are_parted_as_well_as_possible() -> None:
    """Against all splits: as no split is within a fifth, each class gets its smallest spare patient."""
    who = list("aaaaabbbbccc") + list("dddddd") + list("ee")
    labels = [0] * 12 + [1] * 8
    val = hold_out_patients(list(range(20)), "val", who, labels)
    sizes = Counter(who)
    best = min(
        (
            chosen
            for count in range(1, 5)
            for chosen in itertools.combinations("abcde", count)
            if 0 < sum(sizes[p] for p in chosen if p in "abc") < 12
            and 0 < sum(sizes[p] for p in chosen if p in "de") < 8
        ),
        key=lambda chosen: np.square(
            [
                (sum(sizes[p] for p in chosen if p in "abc") - 2) / 12,
                (sum(sizes[p] for p in chosen if p in "de") - 2) / 8,
            ]
        ).sum(),
    )
    assert {who[item] for item in val} == set(best)


def test_a_class_of_one_patient_stays_in_training(caplog: pytest.LogCaptureFixture) -> None:
    who, labels = ["a", "a", "b", "c", "d", "e"], [1, 1, 0, 0, 0, 0]
    val = hold_out_patients(who, "val", who, labels)
    assert len(val) == 1
    assert val != ["a", "a"]
    assert "All images of class 1 are of patients that training needs" in caplog.text


def test_one_patient_cannot_be_parted() -> None:
    with pytest.raises(ValueError, match=r"the 1 patient\(s\) of 3 items.*Add patients"):
        hold_out_patients([1, 2, 3], "val", ["a"] * 3, [0, 0, 1])
    with pytest.raises(ValueError, match=r"lengths are 3, 2 and 3"):
        hold_out_patients([1, 2, 3], "val", ["a"] * 2, [0, 0, 1])


def test_the_group_that_matches_is_the_patient(caplog: pytest.LogCaptureFixture) -> None:
    files = ["person7_a.png", "person7_b.png", "IM-7-1.png", "IM-8-1.png", "other.png", "other2.png"]
    keys = patients_of(files, r"person(\d+)|IM-(\d+)")
    assert keys[0] == keys[1]
    assert len(set(keys)) == 5, "equal numbers of different groups, and files without any, are different people"
    assert "matches 4 of 6 file names" in caplog.text


def test_only_the_name_of_a_file_is_searched() -> None:
    with pytest.raises(ValueError, match=r"matches none of 1, such as a\.png"):
        patients_of([Path("person7/a.png")], r"person(\d+)")


@pytest.mark.parametrize(("pattern", "message"), [(r"person\d+", "must have a group"), ("person(", "unterminated")])
def test_patterns_that_are_none(pattern: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        patients_of(["person1.png"], pattern)


def test_a_table_tells_patients_by_path_name_or_stem(tmp_path: Path) -> None:
    table = tmp_path / "patients.csv"
    table.write_text("Image Path;Age;Patient ID\ntrain/a/1.png;50;x\ntrain/b/1.png;51;y\n2.png;52;x\n3;53;z\n")
    files = [
        tmp_path / "train" / "a" / "1.png",
        tmp_path / "train/b/1.png",
        tmp_path / "train/a/2.png",
        Path("3.nii.gz"),
    ]
    keys = patients_of(files, table)
    assert keys[0] == keys[2]
    assert len(set(keys)) == 3
    with pytest.raises(ValueError, match=r"lacks 4\.png, 5\.png"):
        patients_of([tmp_path / "4.png", tmp_path / "5.png"], str(table))
    with pytest.raises(ValueError, match=r"one patient for each file; 1\.png has 2"):
        patients_of(["other/1.png"], table)
    with pytest.raises(FileNotFoundError, match=r"no table .*absent\.csv"):
        patients_of(files, tmp_path / "absent.csv")


def test_logs_hold_no_patient(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        patients_of(["DoeJane_1.png", "x.png"], r"^([A-Z]\w+)_")
    assert caplog.text
    assert "Doe" not in caplog.text
