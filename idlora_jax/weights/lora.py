"""LoRA files in the ComfyUI key format, in and out.

    diffusion_model.<module>.lora_A.weight   [R I]
    diffusion_model.<module>.lora_B.weight   [O R]

There is no alpha: the change is B A. The rules are derived from the base's, so every
adaptable kernel has exactly one pair of keys.

Source: ltx_trainer/trainer.py: _save_checkpoint; ltx_core/loader/sd_ops.py.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
import numpy as np

from idlora_jax import adapters
from idlora_jax.types import Adapter, Tree
from idlora_jax.weights import rules
from idlora_jax.weights.rules import KeyMismatchError, Rule
from idlora_jax.weights.tables import TRANSFORMER


def _derived(rule: Rule) -> tuple[Rule, Rule]:
    torch = rule.torch.removeprefix("model.").removesuffix(".weight")
    flax = rule.flax.removeprefix("transformer/")
    return (
        Rule(f"{torch}.lora_A.weight", f"{flax}/a", "linear"),
        Rule(f"{torch}.lora_B.weight", f"{flax}/b", "linear"),
    )


LORA: tuple[Rule, ...] = tuple(
    derived
    for rule in TRANSFORMER
    if rule.layout == "linear"
    for derived in _derived(rule)
)


def _require_pairs(tensors: Mapping[str, np.ndarray]) -> None:
    stems = {"A": set(), "B": set()}
    for key in tensors:
        for side in stems:
            suffix = f".lora_{side}.weight"
            if key.endswith(suffix):
                stems[side].add(key.removesuffix(suffix))
    lonely = sorted(stems["A"] ^ stems["B"])
    if lonely:
        raise KeyMismatchError(
            f"{len(lonely)} modules have only one of lora_A and lora_B: {lonely[:6]}"
        )


def import_(tensors: Mapping[str, np.ndarray], base: Tree) -> Adapter:
    """Tensors of an adapter file -> adapter, checked against the base.

    Layers that the file leaves out get a zero change.

    Args:
        tensors: the file's tensors by key.
        base: transformer parameters, or their shapes.

    Raises:
        KeyMismatchError: naming keys that are no adapter keys of this transformer.
        ValueError: if shapes do not fit the base.
    """
    if not tensors:
        raise ValueError("adapter file holds no tensors; expected *.lora_A.weight keys")
    depth = jax.tree.leaves(base["blocks"])[0].shape[0]
    try:
        adapter = rules.import_(tensors, LORA, depth=depth)
    except KeyMismatchError as error:
        raise KeyMismatchError(
            f"adapter does not fit this transformer: {error}\nexpected keys "
            "'diffusion_model.<module>.lora_A.weight' and '.lora_B.weight'"
        ) from None
    _require_pairs(tensors)
    adapters.check(adapter, base)
    return adapter


def export(adapter: Adapter, dtype: np.dtype | None = None) -> dict[str, np.ndarray]:
    """Adapter -> tensors by key, in `dtype` (default: as they are).

    Fold alpha / rank into b first (`adapters.scale`): readers ignore alpha.
    """
    tensors = rules.export(adapter, LORA)
    return (
        tensors if dtype is None else {k: v.astype(dtype) for k, v in tensors.items()}
    )
