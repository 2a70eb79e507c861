"""Parts of MONAI's trainers and evaluators, and what the bundles' configurations call."""

from monai_deqkan.engines.attacks import attack_gradient_error, fgsm_attack, pgd_attack
from monai_deqkan.engines.bundle import (
    check_output_folder,
    find_bundle_root,
    free_folder,
    latest_checkpoint,
    load_task,
    load_weights,
    network_class,
    say_where,
    start_training,
    training_folder,
)
from monai_deqkan.engines.class_balance import balanced_sampler, class_weights, sample_weights
from monai_deqkan.engines.corruptions import CORRUPTIONS, Corruption, corrupt
from monai_deqkan.engines.cosine_decay import CosineDecay
from monai_deqkan.engines.first_layer_filters import (
    FirstLayerFilters,
    KernelLabel,
    classify_kernels,
    first_layer_filters,
)
from monai_deqkan.engines.prepare_batch import PrepareBatchKspace
from monai_deqkan.engines.prepare_denoising import PrepareBatchDenoising, denoising_metrics, unit_image
from monai_deqkan.engines.reconstruction_cases import SuiteSettings
from monai_deqkan.engines.reconstruction_methods import (
    RIVALS,
    Reconstruction,
    ReconstructionMethod,
    TunedWeights,
    load_reconstructor,
    trained_maps_method,
)
from monai_deqkan.engines.reconstruction_suite import evaluate_reconstructions
from monai_deqkan.engines.reconstruction_tuning import tune_reconstruction
from monai_deqkan.engines.reconstruction_uncertainty import (
    ReconstructionSpread,
    SpreadInferer,
    calibrate_spread,
    ensemble_spread,
    load_ensemble,
    load_spread_factor,
    resampled_spread,
)
from monai_deqkan.engines.robustness import (
    RobustnessCell,
    RobustnessScore,
    attack_scores,
    robustness_score,
    write_robustness_report,
)
from monai_deqkan.engines.segmentation import choose_loss, has_kan_layers, mask_class_weights
from monai_deqkan.engines.segmentation_interpretation import (
    SegmenterInterpretation,
    interpret_segmenter,
    write_segmenter_interpretation,
)
from monai_deqkan.engines.segmentation_probe import ChannelSensitivity, PruningCost, SegmentationProbe
from monai_deqkan.engines.warmup import GradualWarmup

__all__ = [
    "CORRUPTIONS",
    "RIVALS",
    "ChannelSensitivity",
    "Corruption",
    "CosineDecay",
    "FirstLayerFilters",
    "GradualWarmup",
    "KernelLabel",
    "PrepareBatchDenoising",
    "PrepareBatchKspace",
    "PruningCost",
    "Reconstruction",
    "ReconstructionMethod",
    "ReconstructionSpread",
    "RobustnessCell",
    "RobustnessScore",
    "SegmentationProbe",
    "SegmenterInterpretation",
    "SpreadInferer",
    "SuiteSettings",
    "TunedWeights",
    "attack_gradient_error",
    "attack_scores",
    "balanced_sampler",
    "calibrate_spread",
    "check_output_folder",
    "choose_loss",
    "class_weights",
    "classify_kernels",
    "corrupt",
    "denoising_metrics",
    "ensemble_spread",
    "evaluate_reconstructions",
    "fgsm_attack",
    "find_bundle_root",
    "first_layer_filters",
    "free_folder",
    "has_kan_layers",
    "interpret_segmenter",
    "latest_checkpoint",
    "load_ensemble",
    "load_reconstructor",
    "load_spread_factor",
    "load_task",
    "load_weights",
    "mask_class_weights",
    "network_class",
    "pgd_attack",
    "resampled_spread",
    "robustness_score",
    "sample_weights",
    "say_where",
    "start_training",
    "trained_maps_method",
    "training_folder",
    "tune_reconstruction",
    "unit_image",
    "write_robustness_report",
    "write_segmenter_interpretation",
]
