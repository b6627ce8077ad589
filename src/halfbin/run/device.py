"""Where a run computes: checked before the work, as torch has its own words for what it cannot do."""

from __future__ import annotations

import torch

from halfbin.errors import HalfbinError

KINDS = ("cpu", "cuda")


def require_device(name: str) -> None:
    """Refuse a device that this machine or this torch does not have.

    Raises:
      HalfbinError: names the device, and what there is instead.
    """
    try:
        kind = torch.device(name).type
    except RuntimeError as error:
        raise HalfbinError(f"--device {name!r} is no device; expected cpu, cuda or cuda:N") from error
    if kind not in KINDS:
        raise HalfbinError(f"--device {name!r} is not supported; expected cpu, cuda or cuda:N")
    try:
        torch.empty(0, device=name)
    except (AssertionError, RuntimeError) as error:  # torch without CUDA asserts, CUDA without a device raises
        reason = str(error).partition("\n")[0]
        raise HalfbinError(f"--device {name!r} cannot be used: {reason}; use --device cpu") from error
