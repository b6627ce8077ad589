"""Models: opened without weights, their sites, their loading."""

from __future__ import annotations

from halfbin.models.loading import check_as_client, load_as_client, load_weights, require_fit
from halfbin.models.sites import Site, find_sites
from halfbin.models.skeleton import Skeleton, open_skeleton, read_config, targets
from halfbin.models.stored_inputs import quantize_stored_inputs
from halfbin.models.structure import Structure
from halfbin.models.untying import untied

__all__ = [
    "Site",
    "Skeleton",
    "Structure",
    "check_as_client",
    "find_sites",
    "load_as_client",
    "load_weights",
    "open_skeleton",
    "quantize_stored_inputs",
    "read_config",
    "require_fit",
    "targets",
    "untied",
]
