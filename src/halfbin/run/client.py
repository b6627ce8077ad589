"""A written directory must load in the program it was written for; how it is read is changed where that makes it load."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from halfbin.errors import ModelError
from halfbin.models import check_as_client, targets
from halfbin.planning import Plan
from halfbin.planning.plan import without_remainders
from halfbin.run.execute import write_hollow_result, write_json


def foresee_client(plan: Plan) -> None:
    """Refuse a plan whose result transformers would not load, before anything is read or written.

    Raises:
      ModelError: as `settle_client`.
    """
    with tempfile.TemporaryDirectory(prefix="halfbin-") as folder:
        try:
            write_hollow_result(plan, Path(folder))
        except OSError:  # no room for holes of this size there; the written files are checked all the same
            return
        try:
            settle_client(plan, Path(folder))
        except ModelError as error:
            raise ModelError(str(error).replace(folder, "the result")) from error


def loadable(plan: Plan) -> Plan:
    """The plan, or the nearest one whose result transformers loads.

    Raises:
      ModelError: as `settle_client`, of the plan itself.
    """
    try:
        foresee_client(plan)
    except ModelError as error:
        simpler = without_remainders(plan)
        if simpler is None:
            raise
        try:
            foresee_client(simpler)
        except ModelError:
            raise error from None
        return simpler
    return plan


def settle_client(plan: Plan, directory: Path) -> str | None:
    """Check that transformers loads `directory`, at no cost in memory; nothing to check for halfbin's own layout.

    Some models' code asks its linears for a float `weight`, which they do not have while their codes are packed. Then
    transformers is told to dequantize while it loads, if that helps.

    Returns:
      What had to be changed, in words.

    Raises:
      ModelError: it does not load either way; the message says what to do.
    """
    if plan.layout.name == "halfbin":
        return None
    try:
        check_as_client(plan.skeleton, directory)
        return None
    except ModelError as error:
        if any(s.inputs for s in plan.sites if s.quantized) or not _dequantize_while_loading(directory):
            raise _hopeless(error, plan) from error
    try:
        check_as_client(plan.skeleton, directory)
    except ModelError as error:
        raise _hopeless(error, plan) from error
    return (
        "this model's code wants float weights while it is loaded, so config.json tells transformers to dequantize them then: "
        "the file stays small, the model in its memory does not"
    )


def _dequantize_while_loading(directory: Path) -> bool:
    """Write transformers' own setting for that into config.json, if it is of use: it reads all weights by the first group."""
    path = directory / "config.json"
    config: dict[str, Any] = json.loads(path.read_bytes())
    how = config.get("quantization_config", {})
    if how.get("dequantize") or len(how.get("config_groups", ())) != 1:
        return False
    how["dequantize"] = True
    write_json(path, config)
    return True


def _hopeless(error: ModelError, plan: Plan) -> ModelError:
    joined = _joined_floats(plan)
    if joined:
        return ModelError(
            f"{error}; {joined[0]} stays in floating point, and transformers joins or splits it while it loads, which it "
            "cannot do in a compressed-tensors checkpoint: write --format halfbin, which hb.load reads"
        )
    return ModelError(
        f"{error}; write --format halfbin, which hb.load reads, or use one scheme for the whole model, such as --recipe int8: "
        "where a model's code wants float weights, transformers dequantizes while it loads, and then knows one scheme only"
    )


def _joined_floats(plan: Plan) -> list[str]:
    """Tensors that transformers takes for codes as soon as anything is quantized, since it converts them by their name."""
    kept = [s.site.tensor for s in plan.sites if not s.quantized and s.site.tensor.endswith(".weight")]
    return [name for name, target in targets(plan.skeleton, kept).items() if not target.unchanged]
