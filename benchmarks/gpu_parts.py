"""python -m benchmarks.gpu_parts PART GENERATION ROUNDS [--tiny]: one part of `gpu`."""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks import cases, codecs, programs, random_weights
from benchmarks.backends import jax as ours
from benchmarks.backends import jax_training, reference
from benchmarks.configs import Size
from benchmarks.rows import Row, as_json
from benchmarks.session import Options, Session, peak_bytes
from benchmarks.suites.gpu import MARK
from benchmarks.works import Facts, NotRun, Work, timed
from idlora_jax.model import video_tiles, video_vae
from idlora_jax.model.tiling import Tiles

STEPS, REFINING = 30, 3
ATTENTION = ((4096, 4096, 128), (4096, 247, 64), (16384, 16384, 128))
"""Queries, keys, head width: video itself, video on sound, the second stage's video."""
PRODUCT = (4096, 4096, 16384)


class Part:
    """What parts share: sizes, dtype, and a session whose rows are printed at once."""

    def __init__(self, generation: Any, rounds: int, tiny: bool) -> None:
        config = "tiny" if tiny else "full"
        options = Options("gpu", config, generation, rounds=rounds, tiny=tiny)
        self.session, self.options, self.tiny = Session(options), options, tiny
        self.size = options.size
        # XLA widens bfloat16 stacks on a CPU; there the same code runs in float32.
        self.dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16

    def case(self, size: Size | None = None) -> cases.Case:
        """The clip, prompts in the dtype."""
        name = jnp.dtype(self.dtype).name
        return cases.make(size or self.size, self.options.generation, name)

    def base(self, **how: Any) -> Any:
        """Random weights; see `random_weights.base`."""
        cfg = self.size.transformer(self.options.generation)
        return random_weights.base(cfg, self.dtype, **how)

    @property
    def larger(self) -> Size:
        """The second stage: both sides doubled, no reference."""
        frames, height, width = self.size.grid
        grid = (frames, 2 * height, 2 * width)
        return dataclasses.replace(self.size, grid=grid, reference=0)

    def alone(self, works: list[Work], **extra: Any) -> list[Row]:
        """Measured rows, printed for the parent."""
        rows = self.session.alone(works)
        for row in rows:
            row.extra = {**row.extra, **extra}
            print(MARK + as_json(row), flush=True)
        return rows


def sampling(part: Part, case: cases.Case, base: Any, steps: int, **how: Any) -> Work:
    """All steps of a stage; compiling counts as its first call."""
    run = ours.sampler(case, base, steps, **how)
    _, took = timed(run)
    outputs = lambda done: {"video": done.video.x, "audio": done.audio.x}
    facts = Facts(compile_s=took.wall, compile_cpu_s=took.cpu)
    return Work(f"{steps} steps", ours.NAME, run, outputs, facts)


def profile(part: Part) -> None:
    """Products and attention by themselves, by what can compute them."""
    small = 64 if part.tiny else 1
    draw = lambda *shape: jax.random.normal(jax.random.key(0), shape, part.dtype)
    m, k, n = (side // small for side in PRODUCT)
    a, b = draw(m, k), draw(k, n)
    works = [_work(f"product {m} {k} {n}", lambda a, b: a @ b, a, b)]
    part.alone(works)
    kinds: tuple[Any, ...] = (
        ("xla",) if jax.default_backend() == "cpu" else ("cudnn", "xla")
    )
    for queries, keys, width in ATTENTION:
        queries, keys = queries // small, max(8, keys // small)
        q = draw(1, queries, part.size.heads, width)
        k = draw(1, keys, part.size.heads, width)
        works = [
            _work(
                f"attention {kind} {queries} {keys} {width}",
                functools.partial(_attention, kind),
                q,
                k,
            )
            for kind in kinds
        ]
        part.alone(works)


def _attention(kind: Any, q: Any, k: Any) -> Any:
    return jax.nn.dot_product_attention(q, k, k, implementation=kind)


def _work(name: str, f: Callable[..., Any], *args: Any) -> Work:
    program = programs.build(f, args)
    run = lambda: jax.block_until_ready(program.call(*args))
    return Work(name, ours.NAME, run, lambda out: {"out": out}, program.facts)


def step(part: Part) -> None:
    """The pass, the guided step by layout of branches, and all steps of a stage."""
    case, base = part.case(), part.base()
    part.alone([ours.forward(case, base)], goal="G1")
    kinds: tuple[ours.Variant, ...] = ("sweep", "batch")
    for kind in kinds:
        work = ours.step(case, base, kind)
        part.alone([dataclasses.replace(work, variant=f"step {kind}")], goal="G2")
    part.alone([sampling(part, case, base, STEPS)], goal="G3")


def second_stage(part: Part) -> None:
    """Three steps without guidance at twice the sides."""
    work = sampling(part, part.case(part.larger), part.base(), REFINING, plain=True)
    part.alone([dataclasses.replace(work, variant="stage 2, 3 steps")], goal="G4")


def train(
    part: Part, batch: int, remats: tuple[jax_training.Remat, ...], **how: Any
) -> None:
    """Training steps."""
    base = part.base(**how)
    case = cases.training(part.size, part.options.generation, batch)
    for remat in remats:
        work = jax_training.train(case, base, remat, part.dtype)
        work = dataclasses.replace(work, variant=f"train batch {batch}, {remat}")
        rows = part.alone([work], goal="G5", batch=batch)
        per_s = 1 / (rows[0].wall_med or 1)
        print(f"  {per_s:.3f} steps a second", flush=True)


def warm(part: Part) -> None:
    """Compiling again what other parts have compiled: from the folder they wrote."""
    case = part.case()
    base = random_weights.shapes(case.cfg, part.dtype)
    batch = cases.training(part.size, part.options.generation)
    calls = {
        "step sweep": lambda: ours.step_call(case, base),
        "train 1 selective": lambda: jax_training.train_call(
            batch, base, "selective", part.dtype
        ),
    }
    for name, call in calls.items():
        facts = programs.build(*call()).facts
        work = Work(f"compile again, {name}", ours.NAME, lambda: None, dict, facts)
        row = part.session.row(work, first_call_s=facts.compile_s)
        row.extra = {"goal": "G6"}
        print(MARK + as_json(row), flush=True)


def decode(part: Part) -> None:
    """Video latents to pixels in tiles, at the size of the second stage."""
    name, generation = part.options.config, part.options.generation
    cfg = codecs.configuration("video_vae", name, generation)
    params = codecs.random_params("video_vae", cfg, part.dtype)
    shape = (1, *part.larger.grid, 128)
    latent = jax.random.normal(jax.random.key(0), shape, part.dtype)
    tiles = Tiles()

    def run() -> Any:
        chunks = video_tiles.decode_chunks(cfg, params, latent, tiles)
        return [jax.device_get(video_vae.to_uint8(chunk)) for chunk in chunks]

    _, took = timed(run)
    facts = Facts(compile_s=took.wall, compile_cpu_s=took.cpu)
    outputs = lambda done: {str(n): x for n, x in enumerate(done)}
    part.alone([Work("video decode, tiles", ours.NAME, run, outputs, facts)], goal="G3")


def small_two_stages(part: Part) -> None:
    """One step of each stage on a smaller card."""
    case, base = part.case(), part.base()
    work = dataclasses.replace(ours.step(case, base), variant="step in 46 GiB")
    part.alone([work], goal="G8")
    work = sampling(part, part.case(part.larger), base, 1, plain=True)
    work = dataclasses.replace(work, variant="stage 2 step in 46 GiB")
    part.alone([work], goal="G8", peak_gib=round(peak_bytes() / 2**30, 2))


def one_of(part: Part, name: str, **how: Any) -> None:
    """One guided step with other weights."""
    work = ours.step(part.case(), part.base(**how))
    part.alone([dataclasses.replace(work, variant=name)], goal="G7")


def lighter(part: Part) -> None:
    """The guided step with weights in int8 and with weights on the host, beside it with
    plain ones on the device: ratios are to these."""
    case, works = part.case(), []
    kinds: dict[str, dict[str, Any]] = {
        "step": {},
        "step int8": {"int8": True},
        "step streamed": {"weights_in": "host"},
    }
    for name, how in kinds.items():
        work = ours.step(case, part.base(**how))
        works.append(dataclasses.replace(work, variant=name))
    part.alone(works, goal="G9, G7")


def beside_reference(part: Part) -> None:
    """The pass and the guided step beside those of the PyTorch reference, in turns.

    Its numbers are others: that they are equal is seen at smaller sizes.
    """
    device = "cpu" if jax.default_backend() == "cpu" else "cuda"
    name = jnp.dtype(part.dtype).name
    made = reference.large(part.size, part.options.generation, device, name)
    case, base = part.case(), part.base()
    pairs = (
        ("pass", reference.forward(case, made), ours.forward(case, base)),
        ("step", reference.step(case, made), ours.step(case, base)),
    )
    for what, *works in pairs:
        named = [dataclasses.replace(w, variant=f"{what}, {w.backend}") for w in works]
        part.alone(named, goal="G10")


PARTS: dict[str, Callable[[Part], None]] = {
    "profile": profile,
    "step": step,
    "stage 2": second_stage,
    "train 1": lambda part: train(part, 1, ("selective", "full")),
    "train 4": lambda part: train(part, 4, ("selective",)),
    "warm": warm,
    "decode": decode,
    "two stages in 46 GiB": small_two_stages,
    "train 4 in 78 GiB": lambda part: train(part, 4, ("full",)),
    "int8 in 22 GiB": lambda part: one_of(part, "step int8 in 22 GiB", int8=True),
    "streamed in 12 GiB": lambda part: one_of(
        part, "step streamed in 12 GiB", weights_in="host"
    ),
    "train 1 int8 in 31 GiB": lambda part: train(part, 1, ("full",), int8=True),
    "lighter": lighter,
    "beside the reference": beside_reference,
}


def main(name: str, generation: str, rounds: str, *flags: str) -> None:
    """Run one part; rows are printed behind `MARK`."""
    part = Part(generation, int(rounds), "--tiny" in flags)
    try:
        PARTS[name](part)
    except NotRun as error:
        row = part.session.row(variant=name, backend=ours.NAME, status="not run")
        row.note = str(error)
        print(MARK + as_json(row), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
