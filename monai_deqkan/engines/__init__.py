"""Parts of MONAI's trainers and evaluators, and what the bundles' configurations call."""

from monai_deqkan.engines.bundle import (
    check_output_folder,
    find_bundle_root,
    free_folder,
    latest_checkpoint,
    load_task,
    load_weights,
    start_training,
    training_folder,
)
from monai_deqkan.engines.class_balance import balanced_sampler, class_weights, sample_weights
from monai_deqkan.engines.cosine_decay import CosineDecay
from monai_deqkan.engines.prepare_batch import PrepareBatchKspace
from monai_deqkan.engines.warmup import GradualWarmup

__all__ = [
    "CosineDecay",
    "GradualWarmup",
    "PrepareBatchKspace",
    "balanced_sampler",
    "check_output_folder",
    "class_weights",
    "find_bundle_root",
    "free_folder",
    "latest_checkpoint",
    "load_task",
    "load_weights",
    "sample_weights",
    "start_training",
    "training_folder",
]
