"""The embedded default: a small real language model with its calibration and held-out texts. See README.md beside this."""

from __future__ import annotations

from pathlib import Path

FOLDER = Path(__file__).parent


def model_path() -> Path:
    """The Hugging Face directory of the demo model."""
    return FOLDER / "model"


def calibration_text() -> str:
    """Python source that the model was not trained on, to calibrate with."""
    return (FOLDER / "calibration.txt").read_text(encoding="utf-8")


def heldout_text() -> str:
    """Python source that the model was not trained on and that nothing is calibrated with, to measure on."""
    return (FOLDER / "heldout.txt").read_text(encoding="utf-8")
