"""What a recipe's rule may say about how its method or transform works; each key goes with those that read it.

act_order = false              # gptq: columns in the weight's order, not those with the largest inputs first
damping = 0.05                 # gptq, correction: added to the second moment's diagonal, as a share of its mean
group_scales = "recomputed"    # gptq: a group's scales are chosen when its first column is reached, not before all of them
alpha = 0.6                    # smoothquant: the share of the inputs' range that moves to the weights; searched otherwise
steps = 500                    # autoround: of signed gradient descent
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from halfbin.errors import RecipeError, did_you_mean
from halfbin.methods.autoround import STEPS
from halfbin.methods.cholesky import DAMPING, MOST_DAMPING

OPTION_KEYS = ("act_order", "damping", "group_scales", "alpha", "steps")
GROUP_SCALES = ("fixed", "recomputed")
MOST_STEPS = 100_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """How methods and transforms work where a rule does not say otherwise.

    act_order:    GPTQ rounds the columns with the largest second moment first.
    damping:      what is added to a second moment's diagonal, as a share of its mean.
    group_scales: when GPTQ chooses the scales of groups: "fixed" before the first column is rounded, "recomputed" when a
                  group's first column is.
    alpha:        SmoothQuant's exponent, from 0 to 1; None: searched.
    steps:        of AutoRound.
    """

    act_order: bool = True
    damping: float = DAMPING
    group_scales: str = "fixed"
    alpha: float | None = None
    steps: int = STEPS

    def order_group(self, group_size: int | None) -> int | None:
        """How many neighbouring columns GPTQ must keep together: whole groups, if their scales are chosen on the way."""
        return group_size if self.group_scales == "recomputed" else None


DEFAULTS = Options()


def parse_options(
    raw: Mapping[str, Any], where: str, *, method: str, transforms: tuple[str, ...], estimator: str, correction: float
) -> Options:
    """The options in a rule's table.

    Raises:
      RecipeError: a value that means nothing, or an option that nothing in the rule reads.
    """
    gptq = "gptq" in method
    readers = {
        "act_order": (gptq, 'method = "gptq"'),
        "damping": (gptq or correction > 0, 'method = "gptq", or correction'),
        "group_scales": (gptq, 'method = "gptq"'),
        "alpha": ("smoothquant" in transforms, 'transforms = ["smoothquant"]'),
        "steps": ("autoround" in method, 'method = "autoround"'),
    }
    for key, (read, reader) in readers.items():
        if key in raw and not read:
            raise RecipeError(f"{where}: {key} = {raw[key]!r} goes with {reader}: add that, or leave it out")
    act_order = raw.get("act_order", DEFAULTS.act_order)
    if not isinstance(act_order, bool):
        raise RecipeError(f"{where}: act_order = {act_order!r} must be true or false")
    group_scales = raw.get("group_scales", DEFAULTS.group_scales)
    if group_scales not in GROUP_SCALES:
        hint = did_you_mean(str(group_scales), GROUP_SCALES)
        raise RecipeError(f"{where}: group_scales = {group_scales!r} is not understood{hint}")
    if group_scales == "recomputed" and estimator == "clip":
        raise RecipeError(
            f"{where}: estimator = 'clip' searches all scales before the first column is rounded, and group_scales = "
            "'recomputed' would choose them again: leave one of them out"
        )
    damping = _number(raw, "damping", where, least=0.0, most=MOST_DAMPING, default=DEFAULTS.damping)
    assert damping is not None
    steps = raw.get("steps", DEFAULTS.steps)
    if isinstance(steps, bool) or not isinstance(steps, int) or not 1 <= steps <= MOST_STEPS:
        raise RecipeError(f"{where}: steps = {steps!r} must be a whole number from 1 to {MOST_STEPS}")
    return Options(
        act_order=act_order,
        damping=damping,
        group_scales=group_scales,
        alpha=_number(raw, "alpha", where, least=0.0, most=1.0, default=None),
        steps=steps,
    )


def _number(
    raw: Mapping[str, Any], key: str, where: str, *, least: float, most: float, default: float | None
) -> float | None:
    value = raw.get(key, default)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= most:
        raise RecipeError(f"{where}: {key} = {value!r} must be a number from {least:g} to {most:g}")
    return float(value)
