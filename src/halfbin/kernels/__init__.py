"""Fast loops on plain tensors, each held bit for bit against the plain code that it stands in for."""

from __future__ import annotations
