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

__all__ = [
    "Certificate",
    "CertificateError",
    "ContractionWarning",
    "KANReplacement",
    "blocks",
    "certify",
    "check_contraction",
    "kan_convolutions",
    "layers",
    "nets",
    "to_kan",
]
