"""Layers, blocks and whole networks, and what turns networks into KAN networks."""

from monai_deqkan.networks import blocks, layers, nets
from monai_deqkan.networks.certificate import (
    Certificate,
    CertificateError,
    ContractionWarning,
    certify,
    check_contraction,
)
from monai_deqkan.networks.convert import KANReplacement, kan_convolutions, to_kan
from monai_deqkan.networks.equilibrium_probe import EquilibriumError, EquilibriumProbe
from monai_deqkan.networks.export import export_error, prepare_for_export
from monai_deqkan.networks.margin import MarginBound, margin_bound

__all__ = [
    "Certificate",
    "CertificateError",
    "ContractionWarning",
    "EquilibriumError",
    "EquilibriumProbe",
    "KANReplacement",
    "MarginBound",
    "blocks",
    "certify",
    "check_contraction",
    "export_error",
    "kan_convolutions",
    "layers",
    "margin_bound",
    "nets",
    "prepare_for_export",
    "to_kan",
]
