"""The pieces of docs/api.md as cells that run in turn, on the tiny model.

    python docs/api.py              after `make demo`
    python docs/api.py FOLDER       where `python -m idlora_jax.tiny FOLDER` has written

Each piece ends in a statement that holds for every model, and checks it.
"""

# %% The tiny model
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from idlora_jax import (
    adapters,
    checkpoints,
    codecs,
    continuation,
    denoise,
    guidance,
    mel,
    pipeline,
    plans,
    prompts,
    solvers,
)
from idlora_jax.data import synthetic, tokenize
from idlora_jax.types import Layout, Skip, each
from idlora_jax.weights import networks

folder = next((p for p in map(Path, sys.argv[1:]) if p.is_dir()), Path("outputs/demo"))

# %% What the asserts below use, and a message instead of a traceback
found = [*folder.rglob("ltx-2-tiny.safetensors")]
if not found:
    sys.exit(f"api: no tiny model in {folder}; run `make demo`, or name its folder")


def close(a, b, atol=1e-4):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=atol), a, b)


# %% Networks and their parameters
base = next(folder.rglob("ltx-2-tiny.safetensors"))
names = "text_encoder text_connector transformer video_vae audio_vae vocoder".split()
nets, params = networks.load(base, names, text_encoder_path=base.parent / "gemma")

# %% A request
tokenizer = tokenize.load(base.parent / "gemma")
texts = "[VISUAL]: a face [SPEECH]: hello [SOUNDS]: a room", "blurry, muffled", "sad"
positive, negative, sad = (prompts.encode(nets, params, tokenizer, [t]) for t in texts)


def recording(speaker):
    clip = synthetic.clip(0, speaker, 0, height=64, width=64)
    sound = mel.resample(clip.wave, clip.rate, nets.audio_vae.sample_rate)
    return clip.frames[0], codecs.encode_reference(
        nets.audio_vae, params["audio_vae"], sound
    )


layout = pipeline.clip(frames=9, height=64, width=32)  # 8k+1 frames, sides in 32s
picture, voice = recording(0)  # or media.read_image, media.read_audio
face = codecs.encode_first_frame(
    nets.video_vae, params["video_vae"], picture, layout.video
)
request = pipeline.Request((positive, negative), reference=voice, first_frame=face)


# %% An adapter
def drawn(seed, rank):
    made = adapters.init(jax.random.key(seed), params["transformer"], rank)
    normal = np.random.default_rng(seed).normal
    return jax.tree.map(lambda x: jnp.float32(normal(0, 0.1, x.shape)), made)


trained = next(folder.rglob("lora_weights_step_*.safetensors"), None)
anna = drawn(1, rank=8)
if trained is not None:
    anna, about = checkpoints.load_adapter(trained, params["transformer"])

# %% A plan is data
plan = plans.one_stage(
    steps=2, identity=3.0, stg=0, bimodal=1, adapters={"anna": 1.0}, branches="batch"
)
for stage in plan.stages:
    print(stage.name, stage.solver, stage.sigmas.table(layout), stage.adapters)
    for term, scale in zip(stage.terms, stage.scales, strict=True):
        print(f"  {term.name}: (video, audio) {scale}, off at {term.neutral}")
    print(stage.weights(stage.sigmas.table(layout)))  # [steps terms 2]

key = jax.random.key(0)
media = pipeline.run(plan, nets, params, {"anna": anna}, request, key, layout=layout)
print(media.video.shape, media.wave.shape, media.latents.video.shape)

# %%
assert media.video.shape == (1, 9, 64, 32, 3)
close(media.latents.video[:, :1], face)


# %% One stage by itself
def sample(stage, request=request, key=key, adapter=anna, **options):
    variables = pipeline.with_adapters(params["transformer"], {"anna": adapter}, stage)
    options = {"layout": layout} | options
    return pipeline.sample(stage, nets.transformer, variables, request, key, **options)


usual = sample(plan.stages[0])

# %%
close(usual, media.latents, 0)

# %% A stage with terms of one's choice
shape = guidance.Apg(eta=0.5, norm_threshold=20.0)
stage = plans.Stage(
    "mine",
    sigmas=plans.Levels((1.0, 0.8, 0.4, 0.0)),
    terms=(guidance.text_cfg(shape), guidance.identity()),
    scales=(
        (3.0, lambda sigma: 1 + 6 * sigma),  # any function of the noise level
        (0.0, guidance.Window(3.0, low=0.3, high=0.9)),  # off outside
    ),
    rescale=(0.5, 0.0),
    adapters=(("anna", 1.0),),
    branches="batch",
)
print(stage.weights(stage.sigmas.table(layout)))
mine = sample(stage)
without = sample(replace(stage, scales=((1.0, 1.0), (0.0, 0.0))))  # not compiled again

# %%
close(
    stage.weights(stage.sigmas.table(layout)),
    [[[2, 6], [0, 0]], [[2, 4.8], [0, 3]], [[2, 2.4], [0, 3]]],
)
wide = replace(stage, scales=((3.0, 5.0), (0.0, guidance.Window(2.0))))
close(sample(wide), sample(replace(stage, scales=((3.0, 5.0), (0.0, 2.0)))), 0)
assert np.abs(mine.audio - without.audio).max() > 1e-3


# %% New guidance terms
def bounded(positive, direction):
    return jnp.clip(direction, -jnp.abs(positive), jnp.abs(positive))


last = nets.transformer.layers - 1
blind = guidance.Term("blind", skip=Skip(v2a=True), layers=(last,), neutral=1.0)
style = guidance.Term("style", prompt=2, neutral=1.0, project=bounded)
stage = plans.Stage(
    "new",
    sigmas=plans.Sigmas(steps=1),  # one step: the sample is the guided prediction
    terms=(blind, style),
    scales=((1.0, 1.0), (1.0, 1.0)),
    branches="batch",
)
three = request._replace(prompts=(positive, negative, sad))
nothing = sample(stage, three)
seeing = sample(replace(stage, scales=((4.0, 4.0), (1.0, 1.0))), three)
happier = sample(replace(stage, scales=((1.0, 1.0), (2.0, 2.0))), three)

# %%
close(seeing.video, nothing.video, 1e-5)  # the last layer's sound reaches no picture
assert np.abs(seeing.audio - nothing.audio).max() > 1e-3
assert all(
    np.all(np.abs(moved - x) <= np.abs(x) + 1e-4)
    for moved, x in zip(happier, nothing, strict=True)
)


# %% A new solver
class Row(NamedTuple):
    ratio: Any
    slope: Any


def table(sigmas):
    s = np.asarray(sigmas, np.float64)
    h = -np.log(np.maximum(s[1:], 1e-9) / s[:-1])
    slope = np.append(0.0, (h[1:] + np.expm1(-h[1:])) / h[:-1]) * (s[1:] > 0)
    return solvers.Table(s[:-1], np.arange(len(h)), Row(s[1:] / s[:-1], slope))


def init(x):
    return each(jnp.zeros_like, x)  # the x0 before the first: its slope is 0


def step(x, x0, last, row, noise):
    line = each(lambda x, x0: x0 + row.ratio * (x - x0), x, x0)
    return each(lambda x, x0, d: x + row.slope * (x0 - d), line, x0, last), x0


multistep = solvers.Solver(table, init, step)
stage = replace(plan.stages[0], solver=multistep)
second_order = sample(stage)


# %% Its order of convergence, on data whose denoiser is known
def gaussian(streams, sigma, weights, memory):  # data from N(0, 0.5^2)
    gain = (1 - sigma) * 0.25 / ((1 - sigma) ** 2 * 0.25 + sigma**2)
    return each(lambda s: gain * s.x, streams), memory


clean = pipeline.start(pipeline.Request((positive,)), layout)
noise = pipeline.draw_noise(key, clean)
noisy = pipeline.add_noise(clean, noise, 1.0)


def error(solver, steps):
    done = denoise.sample(gaussian, solver, np.linspace(1, 0.5, steps + 1), noisy)
    return jnp.abs(done.video.x - np.hypot(0.25, 0.5) * noise.video).max()


def order(solver, steps=(8, 16, 32)):
    errors = [error(solver, n) for n in steps]
    return -np.polyfit(np.log(steps), np.log(errors), 1)[0]


print(f"Euler {order(solvers.euler()):.2f}, multistep {order(multistep):.2f}")

# %%
assert abs(order(solvers.euler()) - 1) < 0.1
assert abs(order(multistep) - 2) < 0.2
close(second_order.video[:, :1], face)


# %% Scales mapped over
@jax.jit
def scan(variables, scales):
    def one(scale):
        (stage,) = plans.one_stage(
            steps=2, identity=scale, stg=0, bimodal=1, branches="batch"
        ).stages
        return pipeline.sample(
            stage, nets.transformer, variables, request, key, layout=layout
        )

    return jax.vmap(one)(scales)


variables = pipeline.with_adapters(
    params["transformer"], {"anna": anna}, plan.stages[0]
)
strengths = scan(variables, jnp.array([1.0, 3.0, 6.0]))  # AV of [3 1 ...]

# %%
close(each(lambda x: x[1], strengths), usual)

# %% An adapter for each sample
people = [anna, drawn(2, adapters.rank(anna))]
stack = jax.tree.map(lambda *leaves: jnp.stack(leaves), *people)


@jax.jit
def everyone(transformer, stack):
    def one(adapter):
        used = pipeline.with_adapters(transformer, {"anna": adapter}, plan.stages[0])
        return pipeline.sample(
            plan.stages[0], nets.transformer, used, request, key, layout=layout
        )

    return jax.vmap(one)(stack)


both = everyone(params["transformer"], stack)  # AV of [2 1 ...]

# %%
for number, person in enumerate(people):
    close(each(lambda x, n=number: x[n], both), sample(plan.stages[0], adapter=person))

# %% The gradient with respect to the reference
plain = plans.Stage("plain", sigmas=plans.Sigmas(steps=16))
unseen = Layout(video=None, audio=layout.audio)
words = positive._replace(video=None)


def power(reference, variables, remat):
    asked = pipeline.Request((words,), reference)
    args = (plain, nets.transformer, variables, asked, key)
    return jnp.mean(pipeline.sample(*args, layout=unseen, remat=remat).audio ** 2)


variables = {"params": params["transformer"]}
gradient = jax.jit(jax.value_and_grad(power), static_argnames="remat")
results, needs = {}, {}
for remat in (False, True):
    compiled = gradient.lower(voice, variables, remat=remat).compile()
    needs[remat] = compiled.memory_analysis().temp_size_in_bytes
    results[remat] = compiled(voice, variables)
print({f"remat={on}": f"{size / 1e6:.2f} MB" for on, size in needs.items()})

# %%
close(results[False], results[True])
assert needs[True] < 0.7 * needs[False]
(value, slopes), length = results[True], 1e-2
direction = slopes / jnp.linalg.norm(slopes)
ahead, behind = (
    compiled(voice + sign * length * direction, variables)[0] for sign in (1, -1)
)
np.testing.assert_allclose(
    (ahead - behind) / (2 * length), jnp.linalg.norm(slopes), rtol=0.05
)

# %% Several references; going on where another clip ended; a key for each sample
_, other = recording(1)
longer = pipeline.clip(frames=17, height=64, width=32)
tail = continuation.tail(usual, overlap=9, fps=25)
onward = pipeline.Request(
    (positive, negative),
    reference=(voice, other),  # the first lies nearest to the clip
    first_frame=tail.video,
    first_audio=tail.audio,
)
takes = jax.tree.map(lambda x: jnp.concatenate([x, x]), onward)
keys = jnp.stack([jax.random.key(7), jax.random.key(8)])
following = sample(plan.stages[0], takes, keys, layout=longer)

# %%
for number in range(2):
    part = each(lambda x, t, n=number: x[n : n + 1, : t.shape[1]], following, tail)
    close(part, tail, 0)
assert np.abs(following.audio[0] - following.audio[1]).max() > 1e-2
noise = pipeline.draw_noise(keys, pipeline.start(takes, longer))
alone = pipeline.draw_noise(keys[1:], pipeline.start(onward, longer))
close(each(lambda x: x[1:], noise), alone, 0)

# %% Where everything stands in time
early = pipeline.clip(frames=9, height=64, width=32, pre_roll=0.2)
sound = pipeline.start(request._replace(reference=(voice, other)), early).audio
begins, given = np.asarray(sound.pos[0, 0, :, 0]), np.asarray(sound.is_ref[0])
print("generated:", begins[~given].round(2), "s\ngiven:", begins[given].round(2), "s")

# %%
close(begins[~given].min(), -0.2)
assert begins[given].max() < -0.2 and early.audio.before == 5

# %% Watching
seen = []
watched = sample(plan.stages[0], watch=seen.append)
print([(now.stage, now.step, round(now.sigma, 3)) for now in seen])

# %% The same by hand
variables = pipeline.with_adapters(
    params["transformer"], {"anna": anna}, plan.stages[0]
)
stage, numbers = plan.stages[0], plan.stages[0].sigmas.table(layout)
clean = pipeline.start(request, layout)
noise = pipeline.draw_noise(jax.random.split(key)[0], clean)
denoiser = pipeline.denoiser(
    stage, nets.transformer, variables, clean, request.prompts, layout
)
steps = denoise.iterate(
    denoiser,
    solvers.euler(),
    numbers,
    pipeline.add_noise(clean, noise, numbers[0]),
    weights=stage.weights(numbers),
)
for now, record in steps:
    print(float(jnp.std(now.audio.x)), float(jnp.std(record.x0.audio)))
by_hand = pipeline.finish(now, layout)

# %%
close(watched, usual)
close(by_hand, usual)
assert len(seen) == 2 and seen[-1].sigma == 0
print("every assertion holds")
