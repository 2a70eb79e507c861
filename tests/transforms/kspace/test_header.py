import h5py
import numpy as np
import pytest

from monai_deqkan.transforms import KspaceHeader, read_kspace_header, recon_shape

SPACE = "<matrixSize><x>{0}</x><y>{1}</y><z>{2}</z></matrixSize>"
FOV = "<fieldOfView_mm><x>{0}</x><y>{1}</y><z>{2}</z></fieldOfView_mm>"
FULL = (
    '<?xml version="1.0"?><ismrmrdHeader xmlns="http://www.ismrm.org/ISMRMRD"><encoding><encodedSpace>'
    f"{SPACE.format(640, 322, 1)}{FOV.format(440, 221.375, 7.5)}</encodedSpace><reconSpace>"
    f"{SPACE.format(320, 320, 1)}{FOV.format(220, 220, 5)}</reconSpace><encodingLimits><kspace_encoding_step_1>"
    "<minimum>0</minimum><maximum>287</maximum><center>144</center></kspace_encoding_step_1></encodingLimits>"
    "<parallelImaging><accelerationFactor><kspace_encoding_step_1>2</kspace_encoding_step_1>"
    "<kspace_encoding_step_2>1</kspace_encoding_step_2></accelerationFactor></parallelImaging></encoding>"
    "</ismrmrdHeader>"
)
BARE = (
    '<ismrmrdHeader xmlns="http://www.ismrm.org/ISMRMRD"><encoding>'
    f"<encodedSpace>{SPACE.format(8, 6, 1)}</encodedSpace><reconSpace>{SPACE.format(4, 6, 1)}</reconSpace>"
    "</encoding></ismrmrdHeader>"
)


def write(path, header=None, **datasets):
    with h5py.File(path, "w") as file:
        if header is not None:
            file["ismrmrd_header"] = header
        for name, value in datasets.items():
            file[name] = value
    return path


@pytest.mark.parametrize("kind", [str, str.encode, lambda text: np.bytes_(text.encode())])
def test_sizes_of_a_header(tmp_path, kind):
    header = read_kspace_header(write(tmp_path / "a.h5", kind(FULL)))
    assert header == KspaceHeader(
        (640, 322, 1), (320, 320, 1), (440.0, 221.375, 7.5), (220.0, 220.0, 5.0), (2.0, 1.0), 144, 287
    )
    assert header.pixel_size(640, 322) == pytest.approx((440 / 640, 221.375 / 322, 7.5))


def test_what_a_header_does_not_tell_is_none(tmp_path):
    header = read_kspace_header(write(tmp_path / "a.h5", BARE))
    assert header == KspaceHeader((8, 6, 1), (4, 6, 1))
    assert header.pixel_size(8, 6) is None
    assert read_kspace_header(write(tmp_path / "b.h5")) is None


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ("<patientName>Secret", "must be XML"),
        (BARE.replace("<x>8</x>", ""), "encodedSpace/matrixSize"),
        (BARE.replace("<x>4</x>", "<x>0</x>"), "reconSpace/matrixSize"),
        (BARE.replace("<x>8</x>", "<x>many</x>"), "must be a number"),
        (BARE.replace("<x>8</x>", "<x>inf</x>"), "must be a number"),
    ],
)
def test_broken_headers_are_one_clear_error_without_their_text(tmp_path, header, message):
    with pytest.raises(ValueError, match=message) as caught:
        read_kspace_header(write(tmp_path / "a.h5", header))
    assert "Secret" not in str(caught.value)


def test_size_of_the_scanner_s_image(tmp_path):
    assert recon_shape(write(tmp_path / "a.h5", FULL)) == (320, 320)
    assert recon_shape(write(tmp_path / "b.h5", reconstruction_esc=np.zeros((2, 5, 7)))) == (5, 7)
    with pytest.raises(ValueError, match="neither"):
        recon_shape(write(tmp_path / "c.h5"))
