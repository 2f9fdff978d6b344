"""Work that a step leaves out because its result is known or unread, by name.

Every saving is exact: results with and without it differ by rounding alone. Each can be
switched off, to find out which of them a fault lies in: `without=("prefix",)` of
`model.transformer.apply` and of the configurations, `--without prefix dead_tail`.
"""

from __future__ import annotations

from typing import Literal

TextKV = Literal["cached", "shared"]
"""Whether keys and values of prompts are made once for all steps of a guided stage, in
all layers (2.0; 1.2 GB a prompt at full size), or once a step and layer."""

Saving = Literal[
    "text_kv",
    "prefix",
    "skip",
    "dead_tail",
    "two_timesteps",
    "rope_tables",
    "chunked_attention",
]
"""What is saved.

`text_kv`: keys and values of a prompt are made once for all branches that read it.
`prefix`: branches that did the same so far are computed once.
`skip`: what a branch skips is not computed, rather than computed and left out.
`dead_tail`: the last layer, and what follows it, make nothing of a branch that guidance
does not read.
`two_timesteps`: AdaLN runs on the timesteps 0 and sigma, not on that of every token.
`rope_tables`: rope tables are made once for all steps.
`chunked_attention`: where no fused kernel serves, attention makes large scores a few
heads and queries at a time, and divides after the product (`model.chunked`), rather
than jax's own attention all at once.
"""
