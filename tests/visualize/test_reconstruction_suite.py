import numpy as np
import pytest

from monai_deqkan.visualize import plot_reconstruction_curves, reconstruction_suite_report


def entry(method, net, psnr, mask="random"):
    return {
        "scenario": f"{mask}_{net:g}x",
        "mask": mask,
        "acceleration": net,
        "snr_db": None,
        "net_acceleration": net,
        "method": method,
        "weight": 0.01 if method == "tv" else None,
        "psnr": psnr,
        "ssim": 0.8,
        "nmse": 10 ** (-psnr / 10),
        "vif": 0.4,
        "volume_psnr": psnr + 1,
        "volume_ssim": 0.81,
        "share_converged": 0.5 if method == "tv" else None,
        "num_slices": 3,
        "num_volumes": 2,
    }


RESULTS = [entry("tv", 8.0, 25.0), entry("tv", 4.0, 31.25), entry("zero_filled", 4.0, 22.0)]


def test_curves_hold_the_numbers_in_order_of_acceleration():
    figure = plot_reconstruction_curves(RESULTS, title="random masks")
    lines = {line.get_label(): line.get_xydata() for line in figure.axes[0].get_lines()}
    np.testing.assert_allclose(lines["tv"], [[4, 31.25], [8, 25]])
    np.testing.assert_allclose(lines["zero_filled"], [[4, 22]])
    assert [panel.get_ylabel() for panel in figure.axes] == ["PSNR (dB)", "SSIM", "NMSE", "VIF"]
    assert figure.axes[2].get_yscale() == "log"
    with pytest.raises(ValueError, match="at least one"):
        plot_reconstruction_curves([])


def test_report_says_what_was_measured():
    result = {
        "statement": "Reference: the root sum of squares.",
        "settings": {"seed": 3},
        "results": [*RESULTS, entry("tv", 4.0, 20.125, mask="equispaced")],
        "profile": [{"part": "coil maps", "seconds": 0.25, "peak_memory_mib": None}],
    }
    image = np.eye(8)
    examples = {"random_4x": {"reference": image, "images": {"tv": image}, "scores": {"tv": "31.2 dB"}}}
    page = reconstruction_suite_report(result, examples).to_html()
    for text in ("31.25", "20.12", "50%", "coil maps", "0.25", "n/a", "not for clinical use", "root sum of squares"):
        assert text in page
    assert page.count("<img") == 3
    assert page.index("random masks") < page.index("equispaced masks")
