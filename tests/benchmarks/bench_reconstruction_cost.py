"""What equilibrium reconstruction costs: memory of training, time of a slice, memory of a volume. Run by hand:

    OMP_NUM_THREADS=1 python tests/benchmarks/bench_reconstruction_cost.py training [--form reweighted --shape 48 48]
    OMP_NUM_THREADS=1 python tests/benchmarks/bench_reconstruction_cost.py slice [--weights model.pt]
    OMP_NUM_THREADS=1 python tests/benchmarks/bench_reconstruction_cost.py volume [--form contracting --prior ridge]

The shipped weights are those of ``--form reweighted --prior weakly_convex_ridge``.

``training``: peak of newly allocated memory in one step (forward and backward) at 30 and 50 evaluations both ways, of
the equilibrium and of its unrolled twin. ``slice``: seconds and evaluations of 320 x 320 pixels and 8 coils to a
relative residual of 1e-3, coil maps given. ``volume``: the same of 256 x 256 x 32 voxels and 8 coils in 3-D, and the
peak memory of the whole process. Weights are random unless a file is given; a network that does not denoise yet need
not converge. Data: the Shepp-Logan phantom through smooth coil maps, 1 % noise.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from pathlib import Path
from typing import Any

import torch
from segmentation_cost import peak_mib
from skimage.data import shepp_logan_phantom
from skimage.transform import resize
from torch import Tensor, nn

from monai_deqkan.adjoints import ImplicitAdjoint
from monai_deqkan.networks.blocks import ReweightedCell
from monai_deqkan.networks.nets import DEQReconstructor, UnrolledReconstructor
from monai_deqkan.operators import equispaced_mask, simulate_kspace, smooth_coil_maps
from monai_deqkan.solvers import AndersonSolver, SolveRecorder

PRIORS = {
    "contracting": ("ridge",),
    "cg": ("unet",),
    "prox": ("unet",),
    "grad": ("unet",),
    "reweighted": ("weakly_convex_ridge",),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("training", "slice", "volume"))
    parser.add_argument("--form", choices=tuple(PRIORS), help="cg by default; of `training` all forms")
    parser.add_argument("--prior", choices=("ridge", "dncnn", "unet", "weakly_convex_ridge"), default="unet")
    parser.add_argument("--shape", type=int, nargs="+", help="another number of pixels along each axis")
    parser.add_argument("--coils", type=int, default=8)
    parser.add_argument("--acceleration", type=float, default=4.0)
    parser.add_argument("--max-iter", type=int, default=50, help="most evaluations; random weights need not converge")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--weights", type=Path, help="state of the network with --form and --prior, as saved in training"
    )
    parser.add_argument("--output", type=Path, help="JSON file for the numbers")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    found = training(options) if options.what == "training" else inference(options)
    if options.output is not None:
        options.output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def training(options: argparse.Namespace) -> dict[str, Any]:
    """Print and return the peak memory of training steps of every form."""
    data = scene(options.shape or (96, 96), options.coils, options.acceleration)
    found: dict[str, Any] = {}
    print("| form, prior | MiB at 30 | at 50 | ratio | unrolled, 30 | 50 | ratio |\n|---|---|---|---|---|---|---|")
    for form, priors in PRIORS.items():
        for prior in priors if options.form in (None, form) else ():
            peaks = []
            for build in (equilibrium, unrolled):
                for steps in (30, 50):
                    network = build(form, prior, len(data[0].shape) - 2, steps)
                    step(network, data)  # what is made once, such as the search for norms, is made here
                    peaks.append(peak_mib(lambda network=network: step(network, data)))
            found[f"{form}, {prior}"] = peaks
            cells = [*peaks[:2], peaks[1] / peaks[0], *peaks[2:], peaks[3] / peaks[2]]
            print(
                f"| {form}, {prior} | " + " | ".join(f"{x:.2f}" if x < 10 else f"{x:.0f}" for x in cells) + " |",
                flush=True,
            )
    return found


def equilibrium(form: str, prior: str, spatial_dims: int, steps: int) -> nn.Module:
    torch.manual_seed(0)
    solver = AndersonSolver(rtol=0.0, max_iter=steps, on_failure="ignore")
    return shortened(
        DEQReconstructor(spatial_dims, prior, form=form, solver=solver, adjoint=ImplicitAdjoint(solver=solver))
    )


def unrolled(form: str, prior: str, spatial_dims: int, steps: int) -> nn.Module:
    torch.manual_seed(0)
    return shortened(UnrolledReconstructor(spatial_dims, prior, form=form, num_steps=steps))


def shortened(network: nn.Module) -> nn.Module:
    """Take few conjugate gradients in the reweighted form: the profiler keeps each, no graph does."""
    for module in network.modules():
        if isinstance(module, ReweightedCell):
            module.cg_max_iter = 2
    return network


def step(network: nn.Module, data: tuple[Tensor, Tensor, Tensor]) -> None:
    network.zero_grad()
    network(*data).square().mean().backward()


def inference(options: argparse.Namespace) -> dict[str, Any]:
    """Print and return time, evaluations and memory of reconstructions."""
    is_volume = options.what == "volume"
    shape = options.shape or ((256, 256, 32) if is_volume else (320, 320))
    solver = AndersonSolver(rtol=1e-3, max_iter=options.max_iter, on_failure="ignore")
    form = options.form or "cg"
    network = DEQReconstructor(len(shape), options.prior, form=form, solver=solver).eval()
    if options.weights is not None:
        state = torch.load(options.weights, weights_only=True, map_location="cpu")
        network.load_state_dict(state.get("model", state))
    data = scene(shape, options.coils, options.acceleration)
    before = peak_rss_gib()
    times, evaluations, residuals = [], [], []
    for _ in range(1 if is_volume else options.repeats):
        started = time.process_time()
        with torch.inference_mode(), SolveRecorder() as recorder:
            network(*data)
        times.append(time.process_time() - started)
        evaluations += recorder.evaluations("forward").tolist()
        residuals += recorder.relative_residual("forward").tolist()
    print(
        f"{form}, {options.prior}, {' x '.join(map(str, shape))}, {options.coils} coils, "
        f"{'random weights' if options.weights is None else options.weights.name}: "
        f"{sorted(times)[len(times) // 2]:.1f} s ({min(times):.1f}-{max(times):.1f}) of one core, {max(evaluations)} "
        f"evaluations to a relative residual of {max(residuals):.1e}; peak memory {peak_rss_gib():.2f} GiB, of which "
        f"{before:.2f} were there before"
    )
    return {
        "seconds": times,
        "evaluations": evaluations,
        "relative_residual": residuals,
        "peak_gib": peak_rss_gib(),
        "before_gib": before,
    }


def scene(shape: tuple[int, ...], coils: int, acceleration: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return k-space ``(1, K, *space)``, mask and coil maps of a phantom, which shrinks along a third axis."""
    generator = torch.Generator().manual_seed(0)
    phantom = torch.as_tensor(resize(shepp_logan_phantom(), tuple(shape[:2]), anti_aliasing=True), dtype=torch.float32)
    if len(shape) == 3:
        phantom = phantom[..., None] * torch.linspace(1.0, 0.3, shape[2])
    image = (phantom * torch.exp(0.5j * torch.linspace(-1, 1, shape[-1]))).to(torch.complex64)[None]
    maps = smooth_coil_maps(tuple(shape), coils, generator=generator)
    # Lines are left out along the second axis, as in phase encoding.
    mask = equispaced_mask(shape[1], acceleration, 0.08, generator=generator)
    mask = mask.view(1, 1, 1, -1, *[1] * (len(shape) - 2))
    kspace = simulate_kspace(image, maps)
    noise = torch.view_as_complex(torch.randn(*kspace.shape, 2, generator=generator))
    return (kspace + 0.01 * noise) * mask, mask, maps[None]


def peak_rss_gib() -> float:
    """Return the largest resident memory of this process so far (``ru_maxrss`` in KiB, as on Linux)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


if __name__ == "__main__":
    main()
