"""Models: opened without weights, their sites, their loading."""

from __future__ import annotations

from halfbin.models.sites import Site, find_sites
from halfbin.models.skeleton import Skeleton, load_model, open_skeleton, read_config, require_complete

__all__ = ["Site", "Skeleton", "find_sites", "load_model", "open_skeleton", "read_config", "require_complete"]
