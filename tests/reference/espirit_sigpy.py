"""Write espirit_sigpy.npz: maps by sigpy 0.1.27's EspiritCalib (BSD-3-Clause) of a simulated 4-coil measurement.

Run by hand, where sigpy is installed: ``python tests/reference/espirit_sigpy.py``. It needs numpy and sigpy only.
"""

from pathlib import Path

import numpy as np


def main() -> None:
    """Simulate, calibrate, store."""
    from sigpy.mri.app import EspiritCalib  # noqa: PLC0415 - not needed to run the tests

    rng = np.random.default_rng(0)
    y, x = np.meshgrid((np.arange(36) - 18) / 18, (np.arange(33) - 16) / 16, indexing="ij")
    image = (y**2 + x**2 < 0.8) * (1 + 0.4 * np.cos(9 * x + 4 * y)) * np.exp(1j * (x + y**2))
    angles = np.pi / 4 + np.pi / 2 * np.arange(4)
    maps = [np.exp(-((y - np.sin(a)) ** 2 + (x - np.cos(a)) ** 2) / 2 + 1j * (a + x * np.sin(a))) for a in angles]
    coils = np.fft.fftn(np.fft.ifftshift(np.stack(maps) * image, axes=(1, 2)), axes=(1, 2), norm="ortho")
    kspace = np.fft.fftshift(coils, axes=(1, 2)) + 0.01 * (rng.normal(size=(4, 36, 33, 2)) @ [1, 1j])
    kspace = kspace.astype(np.complex64)
    settings = {"calib_width": 24, "thresh": 0.02, "kernel_width": 6, "crop": 0, "max_iter": 2000, "show_pbar": False}
    estimate, eigenvalue = EspiritCalib(kspace, output_eigenvalue=True, **settings).run()
    np.savez_compressed(
        Path(__file__).with_suffix(".npz"), kspace=kspace, maps=estimate.astype(np.complex64), eigenvalue=eigenvalue
    )


if __name__ == "__main__":
    main()
