"""Calibration data: files of text or tokens become samples that a model reads."""

from __future__ import annotations

from halfbin.samples.cutting import Samples, pack, separate
from halfbin.samples.documents import Document, Messages, read_documents, read_tokens
from halfbin.samples.loading import load_samples

__all__ = ["Document", "Messages", "Samples", "load_samples", "pack", "read_documents", "read_tokens", "separate"]
