"""Transformer, rope and adapter fusion against the recorded reference.

Recorded audio sequences put reference tokens first; ours put them last. The transformer
does not care (positions travel with their tokens), so these cases keep the recorded
order and treat every token as a target, except where a case is about references.
"""

import functools

import goldens
import jax
import jax.numpy as jnp
import numpy as np
from goldens import Golden

from golden_cases import case
from idlora_jax import adapters, checkpoints, config
from idlora_jax.model import rope, transformer
from idlora_jax.types import AV, Bias, Branch, Prompt, Skip, stream
from idlora_jax.weights import lora, rules, tables

PLAIN = (Branch(),)
FLOOR = np.finfo(np.float32).min


def load(golden: Golden):
    """(config, base) of a golden with transformer weights."""
    cfg = config.transformer_config(golden.config, golden.generation)
    keys = {k: v.astype(np.float32) for k, v in golden.weights.items()}
    return cfg, rules.import_(keys, tables.TRANSFORMER)["transformer"]


def tokens(golden: Golden, name: str):
    x = jnp.asarray(golden.inputs[f"{name}.latent"])
    t = golden.inputs[f"{name}.timesteps"].reshape(x.shape[:2])
    denoise = jnp.asarray(t > 0)
    return stream(x, x, denoise, jnp.asarray(golden.inputs[f"{name}.positions"]))


def sigmas(golden: Golden) -> AV:
    sigma = golden.inputs["sigma"]
    for name in AV._fields:
        t = golden.inputs[f"{name}.timesteps"].reshape(*sigma.shape, -1)
        assert np.all((t == 0) | (t == sigma[:, None])), "timesteps are mask * sigma"
    return AV(jnp.asarray(sigma), jnp.asarray(sigma))


def prompt(golden: Golden, masked: bool = True) -> Prompt:
    mask = golden.inputs.get("context_mask") if masked else None
    return Prompt(
        jnp.asarray(golden.inputs["video.context"]),
        jnp.asarray(golden.inputs["audio.context"]),
        None if mask is None else jnp.asarray(mask > 0),
    )


@functools.cache
def compiled(cfg, branches, targets):
    """One trace serves both numerics modes: these differ only in prepared arrays."""

    def run(variables, prepared, streams, sigma, bias):
        args = (cfg, variables, prepared, streams, sigma, branches)
        return transformer.apply(*args, targets=targets, bias=bias)

    return jax.jit(run)


def forward(golden: Golden, numerics: str, branches=PLAIN, **options):
    """Velocities per branch; options may replace streams, prompt, base or adapter."""
    cfg, base = load(golden)
    adapter = options.get("adapter")
    variables = {"params": options.get("base", base)}
    variables |= {"lora": adapter} if adapter else {}
    usual = AV(tokens(golden, "video"), tokens(golden, "audio"))
    streams = options.get("streams", usual)
    text = options.get("prompt", prompt(golden))
    prepared = transformer.prepare(cfg, variables, streams, (text,), numerics=numerics)
    run = compiled(cfg, branches, options.get("targets"))
    bias = options.get("bias", Bias())
    return run(variables, prepared, streams, sigmas(golden), bias)


def named(v: AV, golden: Golden, prefix: str = "", x0: bool = True):
    out = {}
    for name in AV._fields:
        velocity = getattr(v, name)
        if velocity is None:
            continue
        out[f"{prefix}{name}.velocity"] = velocity
        if x0:
            shape = (*velocity.shape[:2], 1)
            t = golden.inputs[f"{name}.timesteps"].reshape(shape)
            out[f"{prefix}{name}.x0"] = golden.inputs[f"{name}.latent"] - velocity * t
    return out


@case(
    "transformer_av_alt", "transformer_av_adaln_nogate", "transformer_av_gate_noadaln"
)
def plain(golden: Golden, numerics: str):
    return named(forward(golden, numerics)[0], golden)


@case("transformer_av_base")
def base(golden: Golden, numerics: str):
    out = named(forward(golden, numerics)[0], golden)
    bare = forward(golden, numerics, prompt=prompt(golden, masked=False))[0]
    out |= named(bare, golden, "no_context_mask.", x0=False)
    streams = AV(tokens(golden, "video"), tokens(golden, "audio"))
    streams = AV(*(s._replace(denoise=jnp.ones_like(s.denoise)) for s in streams))
    scalar = forward(golden, numerics, streams=streams)[0]
    return out | named(scalar, golden, "scalar_timestep.", x0=False)


def biases(golden: Golden) -> Bias:
    def get(name):
        found = golden.inputs.get(name)
        return None if found is None else jnp.asarray(found)

    soft = get("video.attention_mask")
    if soft is not None:
        tiny = np.finfo(np.float32).tiny
        soft = jnp.where(soft > 0, jnp.log(jnp.maximum(soft, tiny)), FLOOR)
    return Bias(
        video_self=soft,
        audio_text=get("audio_context_attn_mask"),
        a2v=get("a2v_cross_attention_mask"),
        v2a=get("v2a_cross_attention_mask"),
    )


@case("transformer_masks")
def masks(golden: Golden, numerics: str):
    bias = biases(golden)
    out = named(forward(golden, numerics, bias=bias)[0], golden)
    only = forward(golden, numerics, bias=Bias(a2v=bias.a2v))[0]
    out |= named(only, golden, "a2v_only.", x0=False)
    return out | named(forward(golden, numerics, bias=bias)[0], golden, "ctx3d.", False)


def mixed(golden: Golden, skipped: AV, plain: AV, rows) -> AV:
    """Sample by sample: `skipped` where `rows`, else `plain`."""
    pick = np.asarray(rows)[:, None, None]
    return AV(*(np.where(pick, a, b) for a, b in zip(skipped, plain, strict=True)))


def skips(depth: int, layers, **what) -> Branch:
    none = Skip()
    return Branch(
        skip=tuple(Skip(**what) if n in layers else none for n in range(depth))
    )


@case("transformer_perturb_av")
def perturb_av(golden: Golden, numerics: str):
    depth = load(golden)[0].layers
    branches = (
        Branch(),
        skips(depth, range(depth), a2v=True, v2a=True),
        skips(depth, [0], a2v=True),
    )
    usual, bimodal, a2v = forward(golden, numerics, branches)
    batch = usual.video.shape[0]
    rows = [n == 1 for n in range(batch)]
    out = named(bimodal, golden, "bimodal.") | named(a2v, golden, "a2v.")
    return out | named(mixed(golden, bimodal, usual, rows), golden, "mixed.")


@case("transformer_perturb_stg")
def perturb_stg(golden: Golden, numerics: str):
    depth = load(golden)[0].layers
    block = [golden.params["block"]]
    branches = (
        Branch(),
        skips(depth, block, video_self=True, audio_self=True),
        skips(depth, block, video_self=True),
    )
    usual, both, video = forward(golden, numerics, branches)
    rows = [n == 0 for n in range(usual.video.shape[0])]
    out = named(both, golden, "stg_av.") | named(video, golden, "stg_v.")
    return out | named(mixed(golden, both, usual, rows), golden, "mixed.")


@case("transformer_single_modality")
def single(golden: Golden, numerics: str):
    branches = (
        Branch(frozen=frozenset({"audio"})),
        Branch(frozen=frozenset({"video"})),
    )
    audio_off, video_off = forward(golden, numerics, branches)
    out = named(audio_off, golden, "audio_off.") | named(
        video_off, golden, "video_off."
    )
    for name in AV._fields:
        streams = AV(*(tokens(golden, n) if n == name else None for n in AV._fields))
        only = forward(golden, numerics, streams=streams)[0]
        out |= named(only, golden, f"{name}_only.")
    return out


@case("rope")
def rope_tables(golden: Golden, numerics: str):
    p, out = golden.params, {}
    kinds = {"f64": True, "f32": False}

    def extent(name):
        key = f"{name}_max_pos" if name == "connector" else f"max_pos_{name}"
        return tuple(map(float, p[key]))

    def width(name):
        return p["dim_video" if name == "video" else "dim_audio"]

    def made(pos, name, f64, max_pos):
        return rope.tables(
            jnp.asarray(pos),
            max_pos,
            width=width(name),
            heads=p["heads"],
            theta=p["theta"],
            float64=f64,
            numerics=numerics,
        )

    def record(prefix, table, q=None):
        merged = (*table.cos.shape[:2], -1)
        for part in ("cos", "sin"):
            one = getattr(table, part)
            out[f"{prefix[0]}.split.{prefix[1]}.{part}"] = jnp.swapaxes(one, 1, 2)
            pairs = jnp.repeat(one.reshape(merged), 2, axis=-1)
            out[f"{prefix[0]}.interleaved.{prefix[1]}.{part}"] = pairs
        for kind in ("split", "interleaved"):
            if q is not None:
                turned = rope.rotate(jnp.asarray(q), table, kind)
                out[f"{prefix[0]}.{kind}.{prefix[1]}.q_rot"] = turned

    for label, f64 in kinds.items():
        for name in ("video", "audio", "connector"):
            pos, q = golden.inputs[f"{name}.positions"], golden.inputs[f"{name}.q"]
            record((name, label), made(pos, name, f64, extent(name)), q)
            if name != "connector":
                bf16 = golden.inputs[f"{name}.positions_bf16"]
                record((f"bf16pos.{name}", label), made(bf16, name, f64, extent(name)))
                count = width(name) // (2 * len(extent(name)))
                grid = rope.frequencies(
                    p["theta"], count, float64=f64, numerics=numerics
                )
                out[f"freq_grid.{label}.{name}"] = grid
    cross = (max(extent("video")[0], extent("audio")[0]),)
    pos = golden.inputs["video.positions"][:, :1]
    record(("cross_pe", "f64"), made(pos, "audio", True, cross))
    return out


@case("lora_fuse")
def fuse(golden: Golden, numerics: str):
    _, base = load(golden)
    strengths = [golden.params["strength1"], golden.params["strength2"]]
    files = [golden.sub("lora1"), golden.sub("lora2")]
    loaded = [lora.import_(f, base) for f in files]
    out = named(forward(golden, numerics)[0], golden, "base.", x0=False)
    scaled = [adapters.scale(a, s) for a, s in zip(loaded, strengths, strict=True)]
    run = forward(golden, numerics, adapter=scaled[0])[0]
    out |= named(run, golden, "peft1.", x0=False)
    for label, chosen in {"fused1": scaled[:1], "fused12": scaled}.items():
        merged = adapters.merge(base, *chosen)
        run = forward(golden, numerics, base=merged)[0]
        out |= named(run, golden, f"{label}.", x0=False)
        exported = rules.export({"transformer": merged}, tables.TRANSFORMER)
        wanted = [k for k in golden.outputs if k.startswith(f"{label}.model.")]
        out |= {k: exported[k.removeprefix(f"{label}.")] for k in wanted}
    return out | bf16_fusion(golden, base, loaded, strengths)


def bf16_fusion(golden: Golden, base, loaded, strengths):
    """The reference's bfloat16 fusion: B rounded after scaling, deltas in bfloat16."""
    half = jax.tree.map(lambda a: jnp.asarray(a, jnp.bfloat16), (base, loaded))
    scaled = [adapters.scale(a, s) for a, s in zip(half[1], strengths, strict=True)]
    out = {}
    for label, chosen in {"fused1": scaled[:1], "fused12": scaled}.items():
        merged = adapters.merge(half[0], *chosen)
        exported = rules.export({"transformer": merged}, tables.TRANSFORMER)
        prefix = f"bf16.{label}."
        wanted = [k for k in golden.outputs if k.startswith(f"{prefix}model.")]
        out |= {k: exported[k.removeprefix(prefix)] for k in wanted}
    return out


@case("lora_adapter")
def adapter_file(golden: Golden, numerics: str):
    """The saved file loads completely and equals an input of the fusion case."""
    (twin,) = map(goldens.load, goldens.of_case("lora_fuse", golden.generation))
    _, base = load(twin)
    path = goldens.FOLDER / f"{golden.name}.safetensors"
    got, _ = checkpoints.load_adapter(path, base)

    def equals(name: str) -> bool:
        want = lora.import_(twin.sub(name), base)
        if jax.tree.structure(want) != jax.tree.structure(got):
            return False
        pairs = jax.tree.map(lambda a, b: np.array_equal(np.float32(a), b), got, want)
        return all(jax.tree.leaves(pairs))

    matching = [name for name in ("lora1", "lora2") if equals(name)]
    assert len(matching) == 1, f"{golden.name} equals {matching} of {twin.name}"
    return {}
