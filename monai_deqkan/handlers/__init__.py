"""Ignite handlers."""

from monai_deqkan.handlers.best_model import BestModelSaver
from monai_deqkan.handlers.calibration import ClassificationCalibration
from monai_deqkan.handlers.classification_report import ClassificationReport
from monai_deqkan.handlers.convergence_guard import ConvergenceGuard
from monai_deqkan.handlers.early_stop import ResumableEarlyStop
from monai_deqkan.handlers.epoch_seeder import EpochSeeder
from monai_deqkan.handlers.gradient_clipper import GradientClipper
from monai_deqkan.handlers.history_writer import HistoryWriter
from monai_deqkan.handlers.image_table import ImageTable
from monai_deqkan.handlers.kan_grid import KANGridHandler
from monai_deqkan.handlers.kan_pruner import KANPruner
from monai_deqkan.handlers.mask_table import MaskTable
from monai_deqkan.handlers.metrics_writer import MetricsWriter
from monai_deqkan.handlers.overlay_writer import MaskOverlayWriter
from monai_deqkan.handlers.probability_table import ProbabilityTable
from monai_deqkan.handlers.reconstruction_writer import ReconstructionWriter
from monai_deqkan.handlers.saliency import SaliencyWriter
from monai_deqkan.handlers.solve_stats import SolveStatsHandler
from monai_deqkan.handlers.training_ranges import TrainingRangeWriter
from monai_deqkan.handlers.worst_cases import WorstCases

__all__ = [
    "BestModelSaver",
    "ClassificationCalibration",
    "ClassificationReport",
    "ConvergenceGuard",
    "EpochSeeder",
    "GradientClipper",
    "HistoryWriter",
    "ImageTable",
    "KANGridHandler",
    "KANPruner",
    "MaskOverlayWriter",
    "MaskTable",
    "MetricsWriter",
    "ProbabilityTable",
    "ReconstructionWriter",
    "ResumableEarlyStop",
    "SaliencyWriter",
    "SolveStatsHandler",
    "TrainingRangeWriter",
    "WorstCases",
]
