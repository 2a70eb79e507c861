"""What the size of KANUNet's initial weights does to a short training at a given learning rate.

    python tests/benchmarks/bench_kanunet_init.py DATA --sets lung_fields_chest_xray --steps 120

By the recipe of ``bench_segmentation.py``, on a fold cut from ``train``; val is not looked at. One line per run.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from bench_segmentation import SETS, augmentation, fit, load_all, load_and_scale, score, split
from monai.data import CacheDataset
from monai.transforms import Compose
from monai.utils import set_determinism

from monai_deqkan.networks.nets import KANUNet


def main() -> None:
    options = _options()
    torch.set_num_threads(options.threads)
    print("| set | initial scale | learning rate | training loss | Dice |\n|---|---|---|---|---|", flush=True)
    for name in options.sets:
        channels, axes, group = SETS[name]
        train, held_out = split(options.data / name, True, group)
        scale = load_and_scale(channels)
        data = CacheDataset(train, Compose([*scale, *augmentation(axes)]), progress=False)
        images, labels = load_all(held_out, scale)
        for run in options.runs:
            init_scale, rate = map(float, run.split(":"))
            set_determinism(0)
            network = KANUNet(
                2, channels, 2, (8, 16, 32, 48, 64), init_scale=init_scale, stem_stride=2, up="transposed"
            )
            loss, _ = fit(network, data, options.steps, 8, learning_rate=rate)
            dice = score(network, images, labels)["dice"]
            print(f"| {name} | {init_scale:g} | {rate:g} | {loss:.3f} | {dice:.3f} |", flush=True)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder of the sets")
    parser.add_argument("--sets", nargs="+", choices=SETS, default=["lung_fields_chest_xray", "cvc_clinicdb_polyps"])
    parser.add_argument(
        "--runs", nargs="+", default=["1:0.001", "1:0.005", "1:0.02", "0.2:0.001", "0.05:0.001", "0.0125:0.001"]
    )
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


if __name__ == "__main__":
    main()
