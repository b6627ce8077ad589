"""Products on GPUs, in Triton. What runs on the device is in `device`, which alone imports triton, when it is first needed."""

from __future__ import annotations
