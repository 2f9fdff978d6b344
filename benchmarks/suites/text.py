"""The tiny text encoder and the connectors, from token numbers to a prompt."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import codecs, programs
from benchmarks.backends.jax import NAME
from benchmarks.rows import Row
from benchmarks.session import Session
from benchmarks.works import Work
from idlora_jax.model import text_connector, text_encoder
from idlora_jax.types import AV, Tree

TOKENS = 128


def run(session: Session) -> list[Row]:
    """Rows of the encoder, and of what follows it."""
    encoder = codecs.text_encoder()
    generation = session.options.generation
    connector = codecs.configuration("text_connector", "tiny", generation)
    shapes = jax.eval_shape(
        lambda key: text_encoder.init(encoder, key), jax.random.key(0)
    )
    tower = codecs.drawn(shapes, jnp.float32)
    own = codecs.random_params("text_connector", connector)
    ids = jnp.asarray(np.random.default_rng(0).integers(4, 700, (1, TOKENS)))
    mask = jnp.asarray(np.arange(TOKENS)[None] >= TOKENS // 3)  # padded on the left

    def states(params: Tree, ids: jax.Array, mask: jax.Array) -> jax.Array:
        return text_encoder.hidden_states(encoder, params, ids, mask)

    def prompt(params: Tree, states: jax.Array, mask: jax.Array) -> AV:
        found = text_connector.features(connector, params, states, mask)
        made = text_connector.connect(connector, params, found, mask)
        return AV(made.video, made.audio)

    first = programs.build(states, (tower, ids, mask))
    seen = first.call(tower, ids, mask)
    second = programs.build(prompt, (own, seen, mask))
    works = [
        Work(
            "text encoder",
            NAME,
            lambda: jax.block_until_ready(first.call(tower, ids, mask)),
            lambda out: {"states": np.asarray(out)},
            first.facts,
        ),
        Work(
            "connectors",
            NAME,
            lambda: jax.block_until_ready(second.call(own, seen, mask)),
            lambda out: {"video": np.asarray(out.video)},
            second.facts,
        ),
    ]
    return [row for work in works for row in session.alone([work])]
