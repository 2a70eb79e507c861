"""Check a data set on disk: unusable files, copies, leakage between parts, and balance of its classes."""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations, islice
from pathlib import Path

import h5py
import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from monai_deqkan._checks import check_folder, check_range
from monai_deqkan.data.data_report import DataReport, FilePair, Finding
from monai_deqkan.data.duplicates import fingerprint, near_pairs
from monai_deqkan.data.files import file_sha256, image_stem, images_in, visible, visible_folders
from monai_deqkan.data.parts import part_folders
from monai_deqkan.data.splits import patients_of
from monai_deqkan.transforms.image.array import read_image
from monai_deqkan.transforms.kspace.array import kspace_file_shape

__all__ = ["check_dataset"]

_MAX_PAIRS = 200_000
_IMBALANCE = 3  # times as many images in the largest class as in the smallest
_MANY_VALUES = 64


@dataclass
class _File:
    """One file, and what reading it told."""

    path: Path
    name: str  # in the data set
    part: str
    label: str = ""
    mask: Path | None = None
    problem: str = ""
    size: tuple[int, ...] = ()
    channels: int = 0
    is_constant: bool = False
    fingerprint: Tensor | None = None
    mask_values: tuple[float, ...] = ()


@dataclass
class _Listing:
    """The files of a data set, and what their arrangement told."""

    task: str
    files: list[_File] = field(default_factory=list)
    classes: dict[str, list[str]] = field(default_factory=dict)  # class folders per part
    findings: list[Finding] = field(default_factory=list)


def check_dataset(
    dataset_dir: str | Path,
    *,
    patients: str | Path | None = None,
    min_correlation: float = 0.97,
    mirrored: bool = False,
    progress: bool | None = None,
) -> DataReport:
    """Check a data set for what would spoil a training or make its scores too good.

    Layouts: ``train|val|test/<class>/*`` (classification), ``train|val|test/{images,masks}/*`` (segmentation),
    ``train|val|test/*.h5`` (k-space); without parts the same in the folder itself. Every file is read. Images are
    compared by a difference hash and then by the correlation of 32 x 32 grey versions, of volumes by their middle
    slice; k-space by checksums only.

    Args:
        dataset_dir: the folder of the data set.
        patients: how to tell patients apart, see ``patients_of``; None leaves patients out.
        min_correlation: correlation from which on two images are near-copies, in ``(0, 1]``.
        mirrored: also look for copies with left and right exchanged.
        progress: show a bar; None shows it on a terminal.

    Returns:
        The report; ``has_errors`` tells leakage between parts or unusable files.

    Raises:
        FileNotFoundError: if the folder, or the table of patients, is missing.
        ValueError: if the folder has none of the layouts, or ``patients`` does not fit its files.
    """
    check_range("min_correlation", min_correlation, 0, 1, open_low=True)
    root = check_folder(dataset_dir, "the data set")
    listing = _listed(root)
    files = listing.files
    read = _read_kspace if listing.task == "reconstruction" else _read_image
    for file in tqdm(files, desc="check", unit="file", disable=None if progress is None else not progress):
        read(file)
        file.problem = file.problem.replace(f"{root}{os.sep}", "")
    pairs = _pairs(files, min_correlation, mirrored)
    shared, patient_findings = _patients(files, patients)
    findings = [
        *_file_findings(listing),
        *_pair_findings(pairs),
        *patient_findings,
        *listing.findings,
        *(_class_findings(listing) if listing.task == "classification" else ()),
        *(_mask_findings(files) if listing.task == "segmentation" else ()),
    ]
    levels = ("error", "warning", "note")
    usable = [file for file in files if not file.problem]
    return DataReport(
        dataset=root.resolve().name,
        task=listing.task,
        counts=_counts(listing),
        sizes=Counter(" x ".join(map(str, file.size)) for file in usable),
        channels=Counter(str(file.channels) for file in usable),
        findings=sorted(findings, key=lambda finding: levels.index(finding.level)),
        pairs=pairs,
        problems={file.name: file.problem for file in files if file.problem},
        shared_patients=shared,
    )


def _listed(root: Path) -> _Listing:
    parts = part_folders(root) or {"": root}
    folders = parts.values()
    if any((folder / "images").is_dir() and (folder / "masks").is_dir() for folder in folders):
        listing = _Listing("segmentation")
        for part, folder in parts.items():
            _list_masked(listing, root, part, folder)
    elif any(True for folder in folders for _ in folder.glob("*.h5")):
        files = [(part, file) for part, folder in parts.items() for file in visible(folder.glob("*.h5"), folder)]
        listing = _Listing("reconstruction", [_File(file, _name(file, root), part) for part, file in files])
    else:
        listing = _Listing("classification")
        for part, folder in parts.items():
            _list_classes(listing, root, part, folder)
    if not listing.files:
        raise ValueError(
            f"No data set was found in {root}. Expected are train|val|test/<class>/*, train|val|test/images and masks, "
            "or train|val|test/*.h5; `monai-deqkan data convert` makes the first from common layouts."
        )
    if not part_folders(root):
        advice = "Split by patient; `monai-deqkan data convert` does so."
        listing.findings.append(Finding("note", "no_parts", "There are no folders train, val and test.", advice))
    elif "train" not in parts:
        listing.findings.append(
            Finding("warning", "no_train", "There is no folder train: it can only be evaluated on.")
        )
    elif "val" not in parts:
        advice = "Tell `patients` in training, so that no patient is on both sides."
        listing.findings.append(
            Finding("note", "no_val", "There is no folder val: training holds out a fifth of train.", advice)
        )
    return listing


def _name(file: Path, root: Path) -> str:
    return file.relative_to(root).as_posix()


def _list_classes(listing: _Listing, root: Path, part: str, folder: Path) -> None:
    listing.classes[part] = [path.name for path in visible_folders(folder)]
    ignored = [path for path in visible(folder.iterdir(), folder) if path.is_file() and path.parent != root]
    for class_folder in visible_folders(folder):
        found = images_in(class_folder)
        listing.files += [_File(file, _name(file, root), part, class_folder.name) for file in found]
        ignored += sorted(set(visible(class_folder.iterdir(), class_folder)) - set(found))
    if ignored:
        names = tuple(_name(path, root) for path in ignored)
        text = f"{len(ignored)} entries in {part or 'the folder'} are no images of a class and are ignored."
        advice = "Images belong directly into a class folder, under a known suffix."
        listing.findings.append(Finding("note", "ignored_files", text, advice, len(names), names[:10]))


def _list_masked(listing: _Listing, root: Path, part: str, folder: Path) -> None:
    images, masks = (
        {image_stem(file): file for file in images_in(folder / kind)} if (folder / kind).is_dir() else {}
        for kind in ("images", "masks")
    )
    listing.files += [
        _File(file, _name(file, root), part, mask=masks[stem]) for stem, file in sorted(images.items()) if stem in masks
    ]
    alone = [images.get(stem) or masks[stem] for stem in sorted(images.keys() ^ masks.keys())]
    if alone:
        names = tuple(_name(file, root) for file in alone)
        text = f"{len(alone)} images or masks in {part or 'the folder'} have no partner of the same name."
        advice = "Training refuses them: add the partner, or take them out."
        listing.findings.append(Finding("warning", "unpaired", text, advice, len(names), names[:10]))


def _read_image(file: _File) -> None:
    try:
        image = read_image(file.path).as_tensor()
        file.size, file.channels = tuple(image.shape[1:]), len(image)
        file.is_constant = bool(image.min() == image.max())
        file.fingerprint = None if file.is_constant else fingerprint(image)
        if file.mask is None:
            return
        mask = read_image(file.mask, is_mask=True).as_tensor()
        file.mask_values = tuple(np.unique(mask.numpy()).tolist())
        if mask.shape[1:] != image.shape[1:]:
            file.problem = f"the mask has size {tuple(mask.shape[1:])}, the image {file.size}"
    except (ValueError, OSError) as error:
        file.problem = " ".join(str(error).split())


def _read_kspace(file: _File) -> None:
    try:
        slices, file.channels, *space = kspace_file_shape(file.path)
        file.size = (slices, *space)
        with h5py.File(file.path, "r") as content:
            for index in {0, slices - 1}:
                values = content["kspace"][index]
                file.is_constant |= not np.any(values)
                if not np.all(np.isfinite(values)):
                    file.problem = f"slice {index} holds NaN or infinite values"
    except (ValueError, OSError) as error:
        file.problem = " ".join(str(error).split())


def _pairs(files: Sequence[_File], min_correlation: float, mirrored: bool) -> list[FilePair]:
    """Return the pairs of copies: of readable files, those of equal bytes first, then images that look the same."""
    readable = [file for file in files if not file.problem]
    by_size: dict[int, list[_File]] = defaultdict(list)
    for file in readable:
        by_size[file.path.stat().st_size].append(file)
    by_sum: dict[str, list[_File]] = defaultdict(list)
    for same_size in by_size.values():
        for file in same_size if len(same_size) > 1 else ():
            by_sum[file_sha256(file.path)].append(file)
    same_bytes = (pair for same in by_sum.values() for pair in combinations(same, 2))
    exact = {(a.name, b.name): (a, b) for a, b in islice(same_bytes, _MAX_PAIRS)}
    pairs = [_pair("exact", 1.0, a, b) for a, b in exact.values()]
    seen = [file for file in readable if file.fingerprint is not None]
    if len(seen) < 2:
        return pairs
    fingerprints = torch.stack([file.fingerprint for file in seen if file.fingerprint is not None])
    for found in near_pairs(fingerprints, min_correlation=min_correlation, mirrored=mirrored, max_pairs=_MAX_PAIRS):
        a, b = seen[found.first], seen[found.second]
        if (a.name, b.name) not in exact:
            pairs.append(_pair("mirrored" if found.mirrored else "near", round(found.correlation, 4), a, b))
    return pairs


def _pair(kind: str, correlation: float, a: _File, b: _File) -> FilePair:
    return FilePair(kind, correlation, a.name, b.name, a.part, b.part, a.label, b.label)


def _file_findings(listing: _Listing) -> list[Finding]:
    unusable = [file for file in listing.files if file.problem]
    constant = [file for file in listing.files if file.is_constant]
    findings = []
    if unusable:
        examples = tuple(f"{file.name}: {file.problem}" for file in unusable[:10])
        advice = "Get them anew, or take them out."
        findings.append(
            Finding("error", "unusable", f"{len(unusable)} files cannot be used.", advice, len(unusable), examples)
        )
    if constant:
        names = tuple(file.name for file in constant[:10])
        text, advice = f"{len(constant)} files hold the same value everywhere.", "Take them out."
        findings.append(Finding("warning", "constant", text, advice, len(constant), names))
    channels = Counter(file.channels for file in listing.files if not file.problem)
    if len(channels) > 1 and listing.task != "reconstruction":
        text = f"Images have different numbers of channels: {', '.join(f'{n} ({k})' for n, k in channels.items())}."
        advice = (
            "They are turned into `in_channels`; see that no class has a kind of its own, which a network would learn."
        )
        findings.append(Finding("warning", "channels", text, advice, len(channels)))
    return findings


def _pair_findings(pairs: Sequence[FilePair]) -> list[Finding]:
    exact = [pair for pair in pairs if pair.kind == "exact"]
    other = [pair for pair in pairs if pair.kind != "exact"]
    findings = []
    look = "Look at them (two people can look as alike as 0.97 to 0.98 in radiographs). "
    for what, topic, found, first in (
        ("exact copies", "exact_copies", exact, ""),
        ("near-copies", "near_copies", other, look),
    ):
        across = [pair for pair in found if pair.is_leak]
        contradicting = [pair for pair in found if pair.first_class != pair.second_class]
        within = [pair for pair in found if not pair.is_leak and pair.first_class == pair.second_class]
        for level, place, chosen, text, advice in (
            ("error", "across_parts", across, "lie in different parts: scores will be too good.",
             f"{first}Keep one file of each pair, or put both into one part."),
            ("warning", "across_classes", contradicting, "have different classes: one of the labels is wrong.",
             "Look at them; mend the label, or take both out."),
            ("note", "within_part", within, "lie in the same part and class.",
             "Harmless for the split; they weigh more in training."),
        ):  # fmt: skip
            if chosen:
                examples = tuple(f"{pair.first} = {pair.second} ({pair.correlation:.3f})" for pair in chosen[:10])
                count = f"{'At least ' if len(pairs) >= _MAX_PAIRS else ''}{len(chosen)}"
                findings.append(
                    Finding(level, f"{topic}_{place}", f"{count} pairs of {what} {text}", advice, len(chosen), examples)
                )
    return findings


def _patients(files: Sequence[_File], patients: str | Path | None) -> tuple[list[tuple[int, str]], list[Finding]]:
    """Return the files of patients that occur in several parts, and the findings: counts, never who it is."""
    if patients is None:
        text = "Patients were not checked: nobody told how to know them."
        return [], [
            Finding("note", "no_patients", text, "Give `patients` (`--patients`): a pattern of file names, or a table.")
        ]
    groups: dict[str, list[_File]] = defaultdict(list)
    for key, file in zip(patients_of([file.path for file in files], patients), files, strict=True):
        groups[key].append(file)
    shared = [group for group in groups.values() if len({file.part for file in group}) > 1]
    several = sum(len({file.label for file in group}) > 1 for group in groups.values())
    findings = [Finding("note", "patients", f"There are {len(groups)} patients.", count=len(groups))]
    if shared:
        text = f"{len(shared)} patients have {sum(map(len, shared))} files in several parts: scores will be too good."
        advice = "Move all files of a patient into one part; shared_patients.csv lists them."
        findings.append(Finding("error", "patients_across_parts", text, advice, len(shared)))
    if several:
        text = f"{several} patients have images of several classes."
        findings.append(Finding("note", "patients_of_several_classes", text, "Right where findings change.", several))
    return [(number, file.name) for number, group in enumerate(shared, start=1) for file in group], findings


def _counts(listing: _Listing) -> dict[str, dict[str, int]]:
    parts: Iterable[str] = listing.classes or dict.fromkeys(file.part for file in listing.files)
    counts: dict[str, dict[str, int]] = {part: dict.fromkeys(listing.classes.get(part, ()), 0) for part in parts}
    for file in listing.files:
        counts[file.part][file.label] = counts[file.part].get(file.label, 0) + 1
    return counts


def _class_findings(listing: _Listing) -> list[Finding]:
    counts = _counts(listing)
    findings = []
    empty = [f"{part}/{name}" for part, found in counts.items() for name, count in found.items() if count == 0]
    if empty:
        text = f"{len(empty)} class folders hold no image: {', '.join(empty)}."
        findings.append(Finding("warning", "empty_classes", text, "Training refuses them.", len(empty)))
    first = next(iter(counts))
    for part, found in counts.items():
        if set(found) != set(counts[first]):
            text = f"The classes of {part} and {first} differ: {sorted(set(found) ^ set(counts[first]))}."
            findings.append(Finding("warning", "different_classes", text, "Every part must have the same classes.", 1))
    train: Mapping[str, int] = {name: count for name, count in counts[first].items() if count}
    if len(train) > 1 and max(train.values()) >= _IMBALANCE * min(train.values()):
        largest, smallest = max(train, key=train.__getitem__), min(train, key=train.__getitem__)
        text = f"{first or 'The set'} has {train[largest] / train[smallest]:.1f} times as many {largest} as {smallest}."
        advice = "Weigh the classes in the loss, and judge by AUC and balanced accuracy."
        findings.append(Finding("warning", "imbalance", text, advice))
    return findings


def _mask_findings(files: Sequence[_File]) -> list[Finding]:
    values: dict[str, set[float]] = defaultdict(set)
    for file in files:
        values[file.part].update(file.mask_values)
    every = sorted(set().union(*values.values()))
    shown = ", ".join(f"{value:g}" for value in every[:10]) + (", ..." if len(every) > 10 else "")
    findings = [Finding("note", "mask_values", f"Masks hold {len(every)} values: {shown}.", count=len(every))]
    lossy = [file.name for file in files if file.mask is not None and _is_lossy(file)]
    if lossy or len(every) > _MANY_VALUES:
        few = f"{len(lossy)} masks" if lossy else "Masks"
        text = f"{few} do not seem to hold one integer per class, as JPEG, photographs and probabilities do not."
        advice = "Threshold them, and save masks as PNG or NIfTI."
        findings.append(Finding("warning", "mask_format", text, advice, len(lossy), tuple(lossy[:10])))
    first = next(iter(values), "")
    unknown = sorted(set().union(*values.values()) - values[first]) if values else []
    if unknown and not lossy:
        text = f"Some values of masks never occur in {first}: {', '.join(f'{value:g}' for value in unknown[:10])}."
        findings.append(Finding("warning", "unknown_mask_values", text, "Evaluation would refuse them.", len(unknown)))
    empty = sum(file.mask_values == (min(every),) for file in files) if every else 0
    if empty:
        text = f"{empty} masks are all background."
        findings.append(Finding("note", "empty_masks", text, "Right where nothing is to be found.", empty))
    return findings


def _is_lossy(file: _File) -> bool:
    is_jpeg = file.mask is not None and file.mask.suffix.lower() in (".jpg", ".jpeg")
    return (is_jpeg and len(file.mask_values) > 2) or any(value != round(value) for value in file.mask_values)
