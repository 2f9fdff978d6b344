"""Which generation a LoRA file is for, where its metadata does not say it."""

from __future__ import annotations

import re
from collections.abc import Mapping

from idlora_jax.weights.header import Spec

_MODULATION = re.compile(
    r"(?:^|\.|unet_|audio_)(?:adaln_single|time_embed)[._]linear\.lora[._](?P<side>B|up)\b"
)
_OTHER_SIDE = {"B": "A", "up": "down"}
_NEWER = (
    "to_gate_logits",
    "prompt_adaln",
    "video_aggregate_embed",
    "video_text_proj_in",
)
_OLDER = (
    "caption_projection",
    "text_embedding_projection.aggregate_embed",
    "connectors.text_proj_in",
)
_ROWS = {6: "2.0", 9: "2.3"}


def lora_generation(tensors: Mapping[str, Spec]) -> str:
    """Which generation a LoRA is for, from its names and widths.

    Attention gates and prompt modulation exist in 2.3 only, caption projections in 2.0
    only; the timestep modulation has 6 rows a channel in 2.0 and 9 in 2.3. A LoRA of
    none of these (an ID-LoRA is one) fits both by its shapes.

    Args:
        tensors: of the file, by key in any of the usual formats.

    Returns:
        "2.0", "2.3", or "" where nothing tells it.
    """
    if any(mark in name for name in tensors for mark in _NEWER):
        return "2.3"
    if any(mark in name for name in tensors for mark in _OLDER):
        return "2.0"
    for name, (shape, _) in tensors.items():
        match = _MODULATION.search(name)
        if match:
            start, end = match.span("side")
            down = name[:start] + _OTHER_SIDE[match["side"]] + name[end:]
            wide = tensors[down].shape[1:] if down in tensors else ()
            if shape and wide and wide[0]:
                return _ROWS.get(shape[0] // wide[0], "")
    return ""
