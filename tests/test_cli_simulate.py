import h5py
import numpy as np
from PIL import Image

from monai_deqkan.cli import main


def test_data_simulate_writes_labelled_kspace_and_tells_errors_in_one_line(tmp_path, capsys):
    (tmp_path / "images").mkdir()
    Image.fromarray(np.arange(99, dtype=np.uint8).reshape(11, 9)).save(tmp_path / "images" / "a.png")
    words = ["data", "simulate", str(tmp_path / "images"), str(tmp_path / "out"), "--coils", "3", "--snr", "20"]
    assert main(words) == 0
    assert "Wrote 1 k-space files" in capsys.readouterr().out
    with h5py.File(tmp_path / "out" / "a.h5") as file:
        assert file["kspace"].shape == (1, 3, 11, 9)
        assert bool(file.attrs["simulated"])
    assert main(words) == 2
    assert "already holds files" in capsys.readouterr().err
