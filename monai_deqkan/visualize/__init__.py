"""Pictures and the report."""

from monai_deqkan.visualize.classification import plot_confusion_matrix, plot_image_grid, plot_roc
from monai_deqkan.visualize.convergence import plot_residuals
from monai_deqkan.visualize.kan_curves import plot_kan_curves, plot_kan_layer
from monai_deqkan.visualize.kan_table import write_edge_table
from monai_deqkan.visualize.learning import plot_bars, plot_learning_curves
from monai_deqkan.visualize.reconstruction import plot_reconstruction
from monai_deqkan.visualize.report import Report
from monai_deqkan.visualize.segmentation import plot_segmentation

__all__ = [
    "Report",
    "plot_bars",
    "plot_confusion_matrix",
    "plot_image_grid",
    "plot_kan_curves",
    "plot_kan_layer",
    "plot_learning_curves",
    "plot_reconstruction",
    "plot_residuals",
    "plot_roc",
    "plot_segmentation",
    "write_edge_table",
]
