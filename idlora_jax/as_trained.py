"""What an adapter records of its training, and sampling as it was trained.

Where references lay is applied whenever a file records it: an adapter that learned
another gap would be asked for something it never saw. What attention hid, and positions
in bfloat16, are applied when asked for: published adapters were trained with both and
are sampled without. Files of other programs record nothing, and get what is usual.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from idlora_jax import strategies
from idlora_jax.checkpoints import AdapterMeta
from idlora_jax.experiment import Strategy
from idlora_jax.plans import Plan
from idlora_jax.references import Placing
from idlora_jax.strategies import MODES
from idlora_jax.types import Branch
from idlora_jax.weights.lora_files import DOWNSCALE

AsTrained = Literal["off", "as_trained"]
_FALSE, _TRUE = "false", "true"


@dataclass(frozen=True)
class Trained:
    """How an adapter was trained with references.

    Attributes:
        branch: what attention hid; None: there were no audio references.
        placing: where references lay, and how positions were rounded.
    """

    branch: Branch | None
    placing: Placing


def recorded(spec: Strategy, downscale: int | None = None) -> dict[str, str]:
    """What `AdapterMeta.extra` says of a training mode; `of` reads it.

    Args:
        spec: the training mode.
        downscale: how many times smaller video references were, where there were any.
    """
    out = {"strategy": str(spec.name)}
    if not spec.negative_positions:
        out["negative_positions"] = _FALSE
    if spec.negative_video:
        out["negative_video"] = _TRUE
    if spec.reference_p_drop:
        out["reference_p_drop"] = f"{spec.reference_p_drop:g}"
    if downscale is not None:
        out[DOWNSCALE] = str(downscale)
    return out


def of(meta: AdapterMeta) -> Trained | None:
    """What a file records of training with references; None: nothing."""
    name: Any = meta.extra.get("strategy")
    if name not in MODES or not MODES[name].in_context:
        return None
    spec = Strategy(
        name=name,
        gap_s=meta.reference_gap_s,
        video_sees_ref=meta.video_sees_ref,
        ref_sees_text=meta.ref_sees_text,
        negative_positions=meta.extra.get("negative_positions") != _FALSE,
        negative_video=meta.extra.get("negative_video") == _TRUE,
    )
    rounding = "train_bf16" if meta.numerics == "reference" else None
    branch = strategies.branch(spec) if MODES[name].reference else None
    return Trained(branch, strategies.placing(spec, rounding))


def _agreed(
    found: Mapping[str, Trained], setting: str, what: str, of: Callable[[Trained], Any]
) -> Any:
    """What all adapters that say it were trained with."""
    values = {of(one): name for name, one in found.items() if of(one) is not None}
    if not values:
        raise ValueError(
            f"{setting}: got 'as_trained', but no adapter in use records how it was "
            "trained with references; use 'off'"
        )
    if len(values) > 1:
        shown = "".join(f"\n  {name}: {value}" for value, name in values.items())
        raise ValueError(
            f"lora: adapters that were trained with different {what} cannot be used "
            f"together:{shown}\nuse one of them"
        )
    return next(iter(values))


def applied(
    plan: Plan,
    metas: Mapping[str, AdapterMeta],
    *,
    masks: AsTrained = "off",
    rounding: AsTrained = "off",
) -> Plan:
    """The plan with references where its adapters were trained to find them.

    Only the first stage has references.

    Args:
        plan: from `plans`.
        metas: what the adapter files say, by name.
        masks: whether attention hides what it hid in training.
        rounding: whether positions are rounded as in training.

    Raises:
        ValueError: if adapters were trained differently, or none says what is asked.
    """
    every = {name: of(meta) for name, meta in metas.items()}
    found = {name: one for name, one in every.items() if one is not None}
    first, *rest = plan.stages
    if found:
        bare = lambda one: replace(one.placing, rounding=None)
        placing = _agreed(found, "lora", "places of references", bare)
        first = replace(first, placing=placing)
    if rounding == "as_trained":
        whole = lambda one: one.placing
        placing = _agreed(found, "position_rounding", "numerics", whole)
        first = replace(first, placing=placing)
    if masks == "as_trained":
        branch = _agreed(found, "masks", "masks", lambda one: one.branch)
        first = replace(first, positive=branch)
    return Plan((first, *rest))
