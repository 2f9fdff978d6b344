"""What stands before and after the layers, once per modality.

Before: tokens to width D, text to width D (2.0), timesteps to AdaLN values.
After: layer norm, modulation by the embedded timestep, width D to C.

Source: ltx_core/model/transformer/model.py: LTXModel; adaln.py: AdaLayerNormSingle.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from idlora_jax.config import ModalityConfig, TransformerConfig
from idlora_jax.model.block import pick
from idlora_jax.model.layers import Dense

_SINUSOIDS = 128


def timestep_frequencies() -> np.ndarray:
    """10000^(-j/128) for j < 128 as the recorded reference rounds them, float32.

    Timesteps reach 1000, so one unit in the last place of a frequency moves a phase by
    up to 6e-5. The weights were trained with float32 exponents, so both numerics modes
    use these. An expf may round either way: the recordings have the value at j = 12 one
    unit above the nearest (found from their embeddings; torch on another processor
    differs at other j instead). It moves one of 128 phases by at most 3e-5.

    Source: ltx_core/model/transformer/timestep_embedding.py: get_timestep_embedding.
    """
    j = np.arange(_SINUSOIDS, dtype=np.float32)
    exponent = np.float32(-np.log(10000.0)) * j / np.float32(_SINUSOIDS)
    table = np.exp(exponent.astype(np.float64)).astype(np.float32)
    table[12] = np.nextafter(table[12], np.float32(1))
    return table


class AdaLN(nn.Module):
    """Timesteps -> (`count` AdaLN rows [... count D], embedded timestep [... D])."""

    width: int
    count: int

    @nn.compact
    def __call__(
        self, t: Float[Array, "B M"], freqs: Float[Array, " J"], dtype: jnp.dtype
    ) -> tuple[Float[Array, "B M k D"], Float[Array, "B M D"]]:
        """Embed scaled timesteps (sigma times 1000); sinusoids in float32."""
        angle = t.astype(jnp.float32)[..., None] * freqs[None, None]
        h = jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], axis=-1).astype(dtype)
        embedded = Dense(self.width, name="up")(h)
        embedded = Dense(self.width, name="down")(jax.nn.silu(embedded))
        rows = Dense(self.count * self.width, name="out")(jax.nn.silu(embedded))
        return rows.reshape(*t.shape, self.count, self.width), embedded


class TextProjection(nn.Module):
    """Two Dense layers with tanh GELU between: [B S E] -> [B S D]."""

    width: int

    @nn.compact
    def __call__(self, text: Float[Array, "B S E"]) -> Float[Array, "B S D"]:
        """Project the text features."""
        h = jax.nn.gelu(Dense(self.width, name="up")(text), approximate=True)
        return Dense(self.width, name="down")(h)


class Ends(nn.Module):
    """The modules of one modality outside the layers.

    Attributes:
        cfg: the transformer.
        own: this modality.
    """

    cfg: TransformerConfig
    own: ModalityConfig

    def setup(self) -> None:
        """Create the projections, the AdaLN modules and the final table."""
        cfg, width = self.cfg, self.own.width
        self.patchify = Dense(width)
        if cfg.caption_projection:
            self.caption = TextProjection(width)
        self.ada = AdaLN(width, 9 if cfg.text_adaln else 6)
        if cfg.text_adaln:
            self.prompt_ada = AdaLN(width, 2)
        self.cross_ada = AdaLN(width, 4)
        self.cross_gate = AdaLN(width, 1)
        init = nn.initializers.normal(width**-0.5)
        self.table = self.param("table", init, (2, width))
        self.out = Dense(self.own.out_channels)

    def text(self, text: Float[Array, "B S E"]) -> Float[Array, "B S D"]:
        """Text features as the layers read them."""
        return self.caption(text) if self.cfg.caption_projection else text

    def tokens(self, x: Float[Array, "B T C"]) -> Float[Array, "B T D"]:
        """Latent tokens to states."""
        return self.patchify(x)

    def modulations(
        self,
        sigma: Float[Array, " B"],
        other_sigma: Float[Array, " B"] | None,
        freqs: Float[Array, " J"],
        dtype: jnp.dtype,
        denoise: Bool[Array, "B T"] | None = None,
    ) -> tuple[Array, Array, Array | None, Array | None, Array | None]:
        """AdaLN rows (ada, embedded, prompt_ada, cross_ada, cross_gate).

        Rows are made at the two timesteps (0, sigma), or given `denoise` at that of
        each token; the prompt's at sigma; those of the cross attention likewise in 2.0
        and at the other's sigma in 2.3.
        """
        cfg = self.cfg
        if denoise is None:
            own = jnp.stack([jnp.zeros_like(sigma), sigma], axis=1)
        else:
            own = jnp.where(denoise, sigma[:, None], jnp.zeros_like(sigma)[:, None])
        own = own * cfg.timestep_scale
        ada, embedded = self.ada(own, freqs, dtype)
        prompt_ada = None
        if cfg.text_adaln:
            at = sigma[:, None] * cfg.timestep_scale
            prompt_ada, _ = self.prompt_ada(at, freqs, dtype)
        if other_sigma is None:
            return ada, embedded, prompt_ada, None, None
        cross = own
        if cfg.cross_sigma == "other":
            cross = other_sigma[:, None] * cfg.timestep_scale
        cross_ada, _ = self.cross_ada(cross, freqs, dtype)
        factor = cfg.cross_gate_scale / cfg.timestep_scale
        cross_gate, _ = self.cross_gate(cross * factor, freqs, dtype)
        return ada, embedded, prompt_ada, cross_ada, cross_gate

    def velocity(
        self, x: Float[Array, "B T D"], embedded: Array, denoise: Array | None
    ) -> Float[Array, "B T C"]:
        """States to velocities."""
        values = jnp.stack([embedded, embedded], axis=2)
        shift, scale = pick(self.table, values, denoise)
        h = x.astype(jnp.float32)
        h = h - jnp.mean(h, axis=-1, keepdims=True)
        var = jnp.mean(h * h, axis=-1, keepdims=True)
        h = (h * jax.lax.rsqrt(var + self.cfg.norm_eps)).astype(x.dtype)
        return self.out(h * (1 + scale) + shift)

    def __call__(self, x: Array, text: Array, freqs: Array) -> Array:
        """Touch every parameter once (used by `init` only)."""
        sigma = jnp.zeros(x.shape[:1])
        _, embedded, *_ = self.modulations(sigma, sigma, freqs, x.dtype)
        self.text(text)
        return self.velocity(self.tokens(x), embedded, jnp.ones(x.shape[:2], bool))
