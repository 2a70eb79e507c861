from __future__ import annotations

from pathlib import Path

import pytest

from monai_deqkan.data.tables import ImageRow, TableColumns, read_image_table


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "images").mkdir()
    for name in ("a.png", "b.jpg", "c.nii.gz"):
        (tmp_path / "images" / name).write_bytes(b"x")
    return tmp_path


def write(folder: Path, text: str) -> Path:
    table = folder / "table.csv"
    table.write_text(text, encoding="utf-8")
    return table


def test_columns_are_found_by_their_usual_names(folder: Path) -> None:
    text = "\ufeffImage Path,Diagnosis,age,Split,patient-id\n"
    text += "images/a.png,sick,3,Training,p1\nimages\\b.jpg,well,4,valid,\n"
    images = folder / "images"
    assert read_image_table(write(folder, text)) == [
        ImageRow(images / "a.png", "sick", "train", "p1"),
        ImageRow(images / "b.jpg", "well", "val", ""),
    ]


def test_columns_and_folder_can_be_named_and_suffixes_left_out(folder: Path) -> None:
    table = write(folder, "id\tmalignant\tlabel\na\t1\tx\nc\t0\ty\n")
    rows = read_image_table(table, TableColumns(file="id", label="malignant"), folder / "images")
    assert [(row.file.name, row.label) for row in rows] == [("a.png", "1"), ("c.nii.gz", "0")]


def test_absolute_paths(folder: Path) -> None:
    table = write(folder, f"file,label\n{folder / 'images' / 'a.png'},x\n")
    assert read_image_table(table, images_dir=folder / "elsewhere")[0].file == folder / "images" / "a.png"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("file,label\n", "at least one row"),
        ("file,other\nimages/a.png,x\n", r"column for the label, such as label, class, class_name; it has file, other"),
        ("file,label\nimages/a.png,\n", r"column 'label' is empty in 1 row\(s\), the first on line 2"),
        ("file,label\nimages/a.png,x\nimages/a.png,y\n", r"1 come more often, such as .*a\.png"),
        ("file,label\nimages/a.png,x\nimages/../images/a.png,y\n", r"1 come more often, such as .*a\.png"),
        ("file,label\n" + "a" * 200_000 + ",x\n", r"table\.csv must be a CSV file in UTF-8; .*limit.*Save it"),
        ("file,label\nimages/a.png,x|y\n", "one class per image; got 'x|y'"),
        ("file,label,split\nimages/a.png,x,holdout\n", r"a\.png has 'holdout'.*take the column out"),
    ],
)
def test_tables_that_do_not_serve(folder: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("|", r"\|")):
        read_image_table(write(folder, text))


def test_missing_things_are_named(folder: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"2 of 3 images .* x\.png, y\.png\. Name the folder"):
        read_image_table(write(folder, "file,label\nimages/a.png,1\nx.png,1\ny.png,1\n"))
    with pytest.raises(ValueError, match=r"no column 'lable' for the label.*Did you mean 'label'"):
        read_image_table(write(folder, "file,label\nimages/a.png,1\n"), TableColumns(label="lable"))
    with pytest.raises(FileNotFoundError, match="no table"):
        read_image_table(folder / "none.csv")


def test_a_table_of_another_encoding_is_named(folder: Path) -> None:
    table = folder / "table.csv"
    for encoding in ("latin-1", "utf-16"):
        table.write_bytes("file,label\nimages/a.png,gesünder\n".encode(encoding))
        with pytest.raises(ValueError, match=r"table\.csv must be a CSV file in UTF-8"):
            read_image_table(table)
