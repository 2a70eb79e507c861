"""Pictures and the report."""

from monai_deqkan.visualize.classification import (
    plot_confusion_matrix,
    plot_image_grid,
    plot_precision_recall,
    plot_roc,
)
from monai_deqkan.visualize.convergence import plot_residuals
from monai_deqkan.visualize.embedding import embed_features, plot_embedding
from monai_deqkan.visualize.kan_curves import plot_kan_curves, plot_kan_layer
from monai_deqkan.visualize.kan_table import write_edge_table
from monai_deqkan.visualize.learning import plot_bars, plot_learning_curves
from monai_deqkan.visualize.mask_outlines import draw_outlines
from monai_deqkan.visualize.reconstruction import plot_reconstruction
from monai_deqkan.visualize.reconstruction_suite import plot_reconstruction_curves, reconstruction_suite_report
from monai_deqkan.visualize.reliability import plot_reliability
from monai_deqkan.visualize.report import Report
from monai_deqkan.visualize.robustness import plot_robustness
from monai_deqkan.visualize.saliency import overlay_saliency
from monai_deqkan.visualize.segmentation import plot_segmentation
from monai_deqkan.visualize.segmentation_interpretation import segmentation_interpretation_report
from monai_deqkan.visualize.spread import plot_spread_calibration, plot_spread_map

__all__ = [
    "Report",
    "draw_outlines",
    "embed_features",
    "overlay_saliency",
    "plot_bars",
    "plot_confusion_matrix",
    "plot_embedding",
    "plot_image_grid",
    "plot_kan_curves",
    "plot_kan_layer",
    "plot_learning_curves",
    "plot_precision_recall",
    "plot_reconstruction",
    "plot_reconstruction_curves",
    "plot_reliability",
    "plot_residuals",
    "plot_robustness",
    "plot_roc",
    "plot_segmentation",
    "plot_spread_calibration",
    "plot_spread_map",
    "reconstruction_suite_report",
    "segmentation_interpretation_report",
    "write_edge_table",
]
