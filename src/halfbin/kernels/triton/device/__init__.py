"""What runs on the device. Importing a module of this folder imports triton."""

from __future__ import annotations
