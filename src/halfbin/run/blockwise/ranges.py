"""What quantizes the inputs of a site's layer, from the range that they had on the calibration data."""

from __future__ import annotations

from halfbin.calibration import ActivationHistogram
from halfbin.errors import DataError
from halfbin.models.inputs import Group
from halfbin.planning import SitePlan
from halfbin.tensor import InputQuantizer


def input_quantizer(planned: SitePlan, group: Group[ActivationHistogram] | None) -> InputQuantizer | None:
    """What quantizes the inputs of a site; None where nothing does.

    Args:
      planned: the site.
      group: what was seen of its inputs, where they are static; None: no sample reached it.

    Raises:
      DataError: its inputs need a scale, and no sample reached it.
    """
    inputs = planned.inputs
    if inputs is None or not inputs.needs_scale:
        return None if inputs is None else inputs.quantizer()
    if group is None:
        raise DataError(
            f"{planned.site.name}: its inputs are {inputs}, with a scale from calibration, and no calibration sample reached "
            "it; give it a rule of its own, with dynamic inputs or none"
        )
    return inputs.calibrated(*group.observer.range(inputs.scheme.grid, planned.input_estimator))
