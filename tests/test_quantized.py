"""Weights kept in 8 bits: the same function as of widened ones, in less memory."""

from __future__ import annotations

import dataclasses
import functools
import types
from typing import Any

import eight_bits
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import quick_compile
import small_transformer as small
from small_transformer import TARGETS, close, levels, pair, prompt

from idlora_jax import adapters, fitting, presets, quantized, sampling
from idlora_jax.config import TransformerConfig, transformer_config
from idlora_jax.model import transformer
from idlora_jax.quantized import Quantized
from idlora_jax.types import Tree
from idlora_jax.weights import networks

LIKE = jnp.zeros(0, jnp.float8_e4m3fn)


@functools.cache
def kept() -> Tree:
    """The second of two layers in 8 bits, and the output projection of video."""
    base = small.base("2.3")
    made = eight_bits.in_memory(base, (1,))
    values, scale = eight_bits.narrowed(np.asarray(base["video"]["out"]["kernel"]))
    alone = Quantized(
        wide=jnp.zeros((0, *values.shape)),
        values=jnp.asarray(values.view(np.uint8))[None],
        like=LIKE,
        scale=jnp.asarray(scale)[None],
        input_scale=None,
        row=jnp.asarray(0, jnp.int32),
    )
    out = {**made["video"]["out"], "kernel": alone}
    return {**made, "video": {**made["video"], "out": out}}


def forward(cfg: TransformerConfig, variables: Tree, **options: Any) -> Any:
    """Velocities of fixed streams."""
    text = prompt("2.3" if cfg.text_adaln else "2.0")
    prepared = transformer.prepare(cfg, variables, pair(), (text,))
    args = (cfg, variables, prepared, pair(), levels())
    return transformer.apply(*args, targets=TARGETS, **options)[0]


def compiled(base: Tree, lora: Tree) -> Any:
    """Velocities, and the gradient of their squares by the adapter."""

    def loss(lora: Tree, base: Tree) -> Any:
        out = forward(small.config("2.3"), {"params": base, "lora": lora})
        return sum(jnp.mean(x**2) for x in out), out

    step = jax.jit(jax.value_and_grad(loss, has_aux=True)).lower(lora, base)
    return step.compile(compiler_options=quick_compile.OPTIONS)(lora, base)


def test_a_layer_is_the_row_that_stands_for_it():
    wide = jnp.arange(8.0).reshape(2, 4)
    values = np.arange(1, 9).reshape(2, 4).astype(LIKE.dtype).view(np.uint8)
    row = jnp.asarray(quantized.rows(np.array([True, False, False, True])))
    q = Quantized(wide, jnp.asarray(values), LIKE, jnp.asarray([2.0, 0.5]), None, row)
    want = [[2, 4, 6, 8], [0, 1, 2, 3], [4, 5, 6, 7], [2.5, 3, 3.5, 4]]
    got = [quantized.layer(q, jnp.asarray(n)) for n in range(4)]
    np.testing.assert_array_equal(got, want)
    np.testing.assert_array_equal(quantized.whole(q), want)
    assert (q.shape, q.ndim, q.dtype) == ((4, 4), 2, jnp.float32)
    alone = q._replace(wide=wide[:0], row=row[0])
    np.testing.assert_array_equal(quantized.whole(alone), want[0])
    assert alone.shape == (4,) and quantized.any_in({"a": {"b": alone}})
    bare = q._replace(scale=None, wide=wide.astype(jnp.bfloat16))
    assert quantized.layer(bare, jnp.asarray(3)).dtype == jnp.bfloat16
    np.testing.assert_array_equal(quantized.layer(bare, jnp.asarray(3)), [5, 6, 7, 8])


@pytest.mark.slow
def test_kept_weights_give_the_velocities_and_gradients_of_widened_ones():
    base = kept()
    like = jax.eval_shape(lambda k: adapters.init(k, base, 2), jax.random.key(0))
    lora = small.random_like(like, 3)
    (_, got), slope = compiled(base, lora)
    (_, want), wide = compiled(quantized.plain(base), lora)
    close(got, want, 1e-6)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-6 * abs(b).max()),
        slope,
        wide,
    )


@functools.cache
def shapes() -> tuple[TransformerConfig, Tree, Tree, Tree]:
    """A wider transformer: config, plain and kept base, adapter."""
    cfg = transformer_config({"transformer": small.COMMON | small.WIDE})
    base = jax.eval_shape(lambda k: transformer.init(cfg, k), jax.random.key(0))
    target = ("blocks/audio/ff/*",)
    like = jax.eval_shape(
        lambda k: adapters.init(k, base, 1, target), jax.random.key(0)
    )

    def one(path: Any, s: Any) -> Any:
        if path[0].key != "blocks" or path[-1].key != "kernel":
            return s
        make = jax.ShapeDtypeStruct
        layers, piece = s.shape[0], s.shape[1:]
        return Quantized(
            make((2, *piece), jnp.float32), make((layers - 2, *piece), jnp.uint8), LIKE,
            make((layers - 2,), jnp.float32), None, make((layers,), jnp.int32),
        )  # fmt: skip

    return cfg, base, jax.tree.map_with_path(one, base), like


@functools.cache
def lowered(narrow: bool, remat: Any) -> Any:
    cfg, *_, like = shapes()

    def loss(adapter: Tree, base: Tree) -> Any:
        out = forward(cfg, {"params": base, "lora": adapter}, remat=remat)
        return jnp.mean(out.audio**2)

    return jax.jit(jax.grad(loss)).lower(like, shapes()[2 if narrow else 1])


@pytest.mark.parametrize("remat", ["none", "full"])
def test_the_backward_pass_saves_no_widened_weights(remat: Any):
    compiled = lowered(True, remat).compile(compiler_options=quick_compile.OPTIONS)
    memory, leaves = compiled.memory_analysis(), jax.tree.leaves(shapes()[2]["blocks"])
    stack = sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
    assert memory is not None and memory.temp_size_in_bytes < 0.6 * stack


def test_layers_in_8_bits_add_no_compiled_block():
    count = lambda narrow: lowered(narrow, "full").as_text().count("dot_general")
    assert count(True) == count(False)


def test_training_the_base_itself_needs_widened_weights():
    run = lambda v: forward(small.config("2.3"), v, scanned=("params",))
    with pytest.raises(ValueError, match=r"8 bits.*weights='upcast'"):
        jax.eval_shape(run, {"params": kept()})


@pytest.mark.parametrize("command", ["train", "sample"])
def test_the_commands_pass_the_choice_on(command: str, monkeypatch: Any):
    """What they do with it is said above."""

    def asked(path: Any, names: Any, **options: Any) -> Any:
        raise InterruptedError(options["weights"])

    monkeypatch.setattr(networks, "load", asked)
    monkeypatch.setattr(sampling, "texts", lambda *_: {})
    made = {"train": presets.tiny_train(), "sample": presets.tiny_sample()}[command]
    config = dataclasses.replace(made, weights="keep")
    kind: Any = {"train": fitting.Fit, "sample": sampling.Job}[command]
    job = object.__new__(kind)
    object.__setattr__(job, "config", config)
    object.__setattr__(job, "run", types.SimpleNamespace(config=config))
    nets = object.__new__(networks.Networks)
    object.__setattr__(nets, "upsampler", None)
    object.__setattr__(nets, "transformer", small.config("2.0"))
    object.__setattr__(job, "nets", nets)
    with pytest.raises(InterruptedError, match="keep"):
        if command == "train":
            fitting.fit(job)
        else:
            sampling.generate(job, sampling.Inputs((), None, {}))
