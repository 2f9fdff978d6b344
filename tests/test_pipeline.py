"""From requests to latents: what is compiled, drawn, dropped and refused."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import new_arrays
import numpy as np
import pytest
import small_transformer as small
from small_transformer import GRID, REFERENCE, SOUND, TARGETS, close, draw, prompt

from idlora_jax import adapters, codecs, denoise, geometry, pipeline, plans, solvers
from idlora_jax.model import transformer
from idlora_jax.pipeline import Request
from idlora_jax.plans import Plan, Stage
from idlora_jax.types import AV, Layout, each
from idlora_jax.weights.networks import Networks

LAYOUT = Layout(GRID, SOUND)
CFG = small.config("2.0")
STEPS = 2
FULL = {"steps": STEPS, "stg_layer": 1, "adapters": {"id": 1.0}}
TEXT_ONLY = FULL | {"identity": 0, "stg": 0, "bimodal": 1}
NOTHING = TEXT_ONLY | {"video_cfg": 1, "audio_cfg": 1, "adapters": {}}


def only(**options: Any) -> Stage:
    (stage,) = plans.one_stage(**options).stages
    return stage


def lora(seed: int = 3) -> Any:
    base = small.base("2.0")
    shapes = jax.eval_shape(lambda k: adapters.init(k, base, 2), jax.random.key(0))
    return small.random_like(shapes, seed)


def ask(seed: int = 0, reference: bool = True, first_frame: bool = True) -> Request:
    bins, channels = geometry.AUDIO_BINS, geometry.AUDIO_CHANNELS
    return Request(
        (prompt("2.0", seed), prompt("2.0", seed + 10)),
        draw(seed + 20, 1, REFERENCE, bins, channels) if reference else None,
        draw(seed + 21, 1, 1, 2, 1, 128) if first_frame else None,
    )


@pytest.fixture(scope="module", autouse=True)
def traces():
    """One entry per trace of the transformer."""
    seen: list[int] = []
    original = transformer.apply

    def counted(*args: Any, **kwargs: Any) -> Any:
        seen.append(1)
        return original(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transformer, "apply", counted)
        yield seen


def sample(
    stage: Stage, request: Request | None = None, seed: int = 0, **options: Any
) -> AV:
    base = small.base("2.0")
    variables = pipeline.with_adapters(base, {"id": lora()}, stage)
    return pipeline.sample(
        stage,
        CFG,
        variables,
        ask() if request is None else request,
        jax.random.key(seed),
        **({"layout": LAYOUT} | options),
    )


@pytest.fixture(scope="module")
def usual() -> AV:
    return sample(only(**FULL))


def same(a: AV, b: AV) -> bool:
    return all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


def test_latents_have_the_size_of_the_clip_without_its_reference(usual: AV):
    assert usual.video.shape == (1, 2, 2, 1, 128)
    assert usual.audio.shape == (1, 5, 16, 8)
    assert all(np.isfinite(x).all() for x in usual)


def test_the_first_frame_comes_out_as_it_went_in(usual: AV):
    np.testing.assert_array_equal(usual.video[:, :1], ask().first_frame)


def test_one_seed_gives_one_sample_bit_for_bit(usual: AV):
    stage = only(**FULL)
    assert same(sample(stage), usual)
    assert not same(sample(stage, seed=1), usual)


def test_a_stage_is_traced_once_whatever_the_values(traces: list[int], usual: AV):
    before = len(traces)
    changed = FULL | {"audio_cfg": 5, "identity": 2, "stg": 0.5, "bimodal": 2}
    results = [
        sample(only(**changed)),
        sample(only(**FULL | {"adapters": {"id": 0.5}})),
        sample(only(**FULL), ask(seed=5)),
        sample(only(**FULL), seed=2),
        sample(dataclasses.replace(only(**FULL), sigmas=plans.Sigmas("beta", STEPS))),
    ]
    assert len(traces) == before
    assert not any(same(r, usual) for r in results)


def test_weight_zero_terms_equal_absent_terms(traces: list[int], usual: AV):
    before = len(traces)
    stage = only(**FULL)
    neutral = [(t.neutral,) * 2 for t in stage.terms[1:]]
    off = dataclasses.replace(stage, scales=(stage.scales[0], *neutral))
    got = sample(off)
    assert len(traces) == before
    close(got, sample(only(**TEXT_ONLY)))


def test_given_noise_replaces_the_key(usual: AV):
    key = jax.random.split(jax.random.key(0))[0]
    noise = pipeline.draw_noise(key, pipeline.start(ask(), LAYOUT))
    given = ask()._replace(noise=noise)
    assert same(sample(only(**FULL), given, seed=9), usual)


def test_noise_of_reference_rows_is_not_used(usual: AV):
    key = jax.random.split(jax.random.key(0))[0]
    noise = pipeline.draw_noise(key, pipeline.start(ask(), LAYOUT))
    noise = noise._replace(audio=noise.audio.at[:, SOUND.frames :].set(jnp.nan))
    assert same(sample(only(**FULL), ask()._replace(noise=noise)), usual)


def test_a_watcher_sees_every_step_and_changes_nothing(usual: AV):
    seen: list[pipeline.Seen] = []
    got = sample(only(**FULL), watch=seen.append)
    assert [(s.stage, s.step, s.steps) for s in seen] == [
        ("one_stage", 1, STEPS),
        ("one_stage", 2, STEPS),
    ]
    assert seen[-1].sigma == 0 and same(seen[-1].latents, got)
    # The last Euler step goes all the way to its prediction.
    close(seen[-1].x0, got)
    close(got, usual)


@jax.jit
def guided_step(denoiser: denoise.Denoise, noisy: AV, weights: Any) -> AV:
    return denoiser(noisy, jnp.float32(0.7), weights, ())[0]


def guided(mode: denoise.Mode, **changes: Any) -> AV:
    """One guided prediction of the full stage."""
    stage = dataclasses.replace(only(**FULL | changes), branches=mode)
    variables = pipeline.with_adapters(small.base("2.0"), {"id": lora()}, stage)
    clean = pipeline.start(ask(), LAYOUT)
    noisy = pipeline.add_noise(
        clean, pipeline.draw_noise(jax.random.key(1), clean), 0.7
    )
    d = pipeline.denoiser(stage, CFG, variables, clean, ask().prompts, LAYOUT)
    weights = jnp.asarray(stage.weights(np.array([0.7, 0.0]))[0])
    return guided_step(d, noisy, weights)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["pair", "batch"])
def test_a_guided_step_in_pairs_or_one_batch_equals_the_sweep(mode: denoise.Mode):
    close(guided(mode), guided("sweep"))


def predictions(stage: Stage, request: Request) -> tuple[AV, ...]:
    variables = {"params": small.base("2.0")}
    clean = pipeline.start(request, LAYOUT)
    noise = pipeline.draw_noise(jax.random.key(1), pipeline.start(ask(), LAYOUT))
    noise = each(lambda n, s: n[:, : s.x.shape[1]], noise, clean)
    d = pipeline.denoiser(stage, CFG, variables, clean, request.prompts, LAYOUT)
    noisy = pipeline.add_noise(clean, noise, 0.7)
    return jax.jit(denoise.predictions)(d, noisy, jnp.float32(0.7))


def test_the_identity_branch_equals_never_having_a_reference():
    stage = only(**NOTHING | {"identity": 3})
    seeing, dropped = predictions(stage, ask())
    (never,) = predictions(plans.without_reference(stage), ask(reference=False))

    def target(x: AV) -> AV:
        return each(lambda x, n: x[:, :n], x, TARGETS)

    close(target(dropped), never)
    assert not np.allclose(target(seeing).audio, never.audio, atol=1e-4)


def test_identity_guidance_moves_audio_alone():
    usual, more = guided("sweep"), guided("sweep", identity=9)
    np.testing.assert_array_equal(more.video, usual.video)
    assert not np.allclose(more.audio, usual.audio)


@pytest.mark.parametrize("missing", ["video", "audio"])
def test_one_modality_is_sampled_alone(missing: str):
    layout = dataclasses.replace(LAYOUT, **{missing: None})
    texts = tuple(p._replace(**{missing: None}) for p in ask().prompts)
    got = sample(only(**NOTHING), Request(texts), layout=layout)
    assert getattr(got, missing) is None
    assert sum(x is not None and np.isfinite(x).all() for x in got) == 1


def test_computing_in_bfloat16_stays_near_and_keeps_a_float32_state():
    full, half = (sample(only(**NOTHING), dtype=d) for d in ("float32", "bfloat16"))
    assert half.video.dtype == half.audio.dtype == jnp.float32
    close(half, full, 0.05)
    assert not same(half, full)


def test_streams_hold_targets_then_the_reference_at_negative_seconds():
    video, audio = pipeline.start(ask(), LAYOUT)
    np.testing.assert_array_equal(video.denoise[0], [False] * 2 + [True] * 2)
    np.testing.assert_array_equal(audio.denoise[0], [True] * 5 + [False] * 3)
    np.testing.assert_array_equal(audio.is_ref, ~audio.denoise)
    assert (audio.pos[0, 0, 5:] < 0).all() and (audio.pos[0, 0, :5] >= 0).all()
    want = geometry.patchify_audio(ask().reference)
    np.testing.assert_array_equal(audio.clean[:, 5:], want)


def test_the_batch_is_that_of_the_prompts():
    text = (prompt("2.0", batch=3),)
    video, audio = pipeline.start(Request(text), LAYOUT)
    assert (len(video.x), len(audio.x)) == (3, 3)


def test_noise_covers_every_token_and_differs_between_modalities():
    clean = pipeline.start(ask(), LAYOUT)
    noise = pipeline.draw_noise(jax.random.key(0), clean)
    assert noise.audio.shape == clean.audio.x.shape
    assert not np.allclose(noise.video[:, :4], noise.audio[:, :4])


def test_adapters_add_up_at_their_strengths():
    base = small.base("2.0")
    stage = only(**NOTHING | {"adapters": {"a": 0.5, "b": 2.0}})
    found = pipeline.with_adapters(base, {"a": lora(1), "b": lora(2)}, stage)
    want = adapters.merge(
        base, adapters.scale(lora(1), 0.5), adapters.scale(lora(2), 2.0)
    )
    got = adapters.merge(base, found["lora"])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), got, want)


def test_without_adapters_the_base_is_used_alone():
    assert set(pipeline.with_adapters({}, {}, only(**NOTHING))) == {"params"}


def test_an_adapter_that_is_not_there_or_does_not_fit_is_refused():
    stage = only(**FULL)
    with pytest.raises(ValueError, match=r"uses the adapters \['id'\], got \['ed'\]"):
        pipeline.with_adapters(small.base("2.0"), {"ed": lora()}, stage)
    with pytest.raises(ValueError, match="does not fit the base in 18 places"):
        other = jax.tree.map(lambda a: jnp.concatenate([a, a], 0), lora())
        pipeline.with_adapters(small.base("2.0"), {"id": other}, stage)


def test_text_guidance_demands_a_negative_prompt():
    request = ask()._replace(prompts=ask().prompts[:1])
    with pytest.raises(ValueError, match=r"needs 2 prompts .* set text guidance to 1"):
        sample(only(**FULL), request)


def test_a_layer_outside_of_the_model_is_refused():
    with pytest.raises(ValueError, match=r"layer 29 is outside of a model of 2 layers"):
        sample(only(**FULL | {"stg_layer": 29}))


def test_a_first_frame_of_another_size_is_refused():
    request = ask()._replace(first_frame=draw(0, 1, 1, 1, 2, 128))
    with pytest.raises(ValueError, match="encode it at the clip's size"):
        pipeline.start(request, LAYOUT)


def test_a_reference_for_a_silent_clip_is_refused():
    with pytest.raises(ValueError, match="the layout has no audio"):
        pipeline.start(ask(), Layout(GRID, None))
    with pytest.raises(ValueError, match="the layout has no video"):
        pipeline.start(ask(), Layout(None, SOUND))


def test_a_clip_checks_its_size():
    assert pipeline.clip(121, 512, 512).audio.frames == 121
    with pytest.raises(ValueError, match=r"8k\+1, got 120 \(use 121\)"):
        pipeline.clip(120, 512, 512)


def test_run_decodes_what_the_stage_sampled(monkeypatch: Any, usual: AV):
    given: dict[str, Any] = {}

    def decode(nets: Any, params: Any, latents: AV, **options: Any) -> tuple[str, str]:
        given.update(nets=nets, params=params, latents=latents, **options)
        return "video", "wave"

    monkeypatch.setattr(codecs, "decode", decode)
    nets = small.networks("2.0")
    plan = Plan((only(**FULL),))
    base = {"transformer": small.base("2.0")}
    args = (plan, nets, base, {"id": lora()}, ask(), jax.random.key(0))
    media = pipeline.run(*args, layout=LAYOUT)
    assert (media.video, media.wave, given["nets"]) == ("video", "wave", nets)
    assert (given["before"], given["tiles"]) == (0, "usual")
    assert same(media.latents, usual)


def test_a_stage_gets_latents_exactly_if_it_refines(usual: AV):
    first, second = plans.two_stage(**FULL).stages
    with pytest.raises(ValueError, match=r"refines and got no latents.*enlarge"):
        sample(second)
    with pytest.raises(ValueError, match=r"starts from noise.*leave out before"):
        sample(first, before=usual)


def test_enlarging_needs_an_upsampler(usual: AV):
    with pytest.raises(ValueError, match=r"no latent upsampler.*upsampler_path"):
        pipeline.enlarge(None, {}, usual)


def two(seeds: tuple[int, int] = (0, 5)) -> Request:
    """Two requests as one."""
    return jax.tree.map(lambda *x: jnp.concatenate(x), *map(ask, seeds))


@pytest.mark.slow
@pytest.mark.parametrize("solver", ["euler", "res2s"])
def test_with_a_key_per_sample_company_changes_nothing(solver: str):
    stage = dataclasses.replace(only(**TEXT_ONLY), solver=solver)
    variables = pipeline.with_adapters(small.base("2.0"), {"id": lora()}, stage)
    keys = jax.vmap(jax.random.key)(jnp.array([3, 4]))

    def run(request: Request, key: Any) -> AV:
        args = (stage, CFG, variables, request, key)
        return pipeline.sample(*args, layout=LAYOUT)

    both = run(two(), keys)
    for n, seed in enumerate((0, 5)):
        alone = run(ask(seed), keys[n : n + 1])
        close(each(lambda x, n=n: x[n : n + 1], both), alone)
        close(alone, run(ask(seed), keys[n]))
    with pytest.raises(ValueError, match="2 for 1 samples; give one for each"):
        run(ask(), keys)


def test_a_solver_and_levels_of_ones_own_need_no_name(traces: list[int], usual: AV):
    before, stage = len(traces), only(**FULL)
    levels = plans.Levels((*map(float, stage.sigmas.table(LAYOUT)),))
    own = dataclasses.replace(solvers.euler())
    assert same(sample(dataclasses.replace(stage, solver=own, sigmas=levels)), usual)
    assert len(traces) == before


@pytest.mark.slow
def test_scales_may_be_mapped_over(usual: AV):
    def run(scale: Any) -> AV:
        return sample(only(**FULL | {"identity": scale}))

    found = jax.vmap(run)(jnp.array([3.0, 1.0]))
    close(each(lambda x: x[0], found), usual)
    close(each(lambda x: x[1], found), run(1.0))


@pytest.mark.slow
def test_gradients_reach_the_reference_and_remat_changes_nothing():
    request = ask()

    def loss(reference: Any, remat: bool) -> Any:
        asked = request._replace(reference=reference)
        return jnp.sum(sample(only(**TEXT_ONLY), asked, remat=remat).audio ** 2)

    plain, again = (jax.grad(loss)(request.reference, on) for on in (False, True))
    assert np.isfinite(plain).all() and np.abs(plain).max() > 0
    np.testing.assert_allclose(again, plain, rtol=1e-4, atol=1e-5)


def test_adapters_of_one_stage_are_not_on_the_device_in_another(monkeypatch):
    base = small.base("2.0")

    def host(rank: int) -> Any:
        init = lambda key: adapters.init(key, base, rank)
        made = jax.eval_shape(init, jax.random.key(0))
        return jax.tree.map(lambda x: np.full(x.shape, 0.01, np.float32), made)

    new = new_arrays.since_now()

    def there(rank: int) -> bool:
        return any(rank in x.shape for x in new() if x.ndim == 3)

    own, seen = {"id": host(7), "ed": host(11)}, []
    options = TEXT_ONLY | {"adapters": {"id": 1.0}, "refining": {"ed": 0.8}}
    plan = plans.two_stage(**options)
    second = pipeline.layouts(plan, LAYOUT)[1]
    monkeypatch.setattr(pipeline, "enlarge", lambda *_: _latents(second))
    nets = object.__new__(Networks)  # of which one network is all there is
    for name, value in {"transformer": CFG, "upsampler": None}.items():
        object.__setattr__(nets, name, value)
    args = (plan, nets, {"transformer": base}, own, ask(first_frame=False))
    watch = lambda s: seen.append((s.stage, there(7), there(11)))
    for _ in pipeline.stages(*args, jax.random.key(0), layout=LAYOUT, watch=watch):
        seen.append(("between", there(7), there(11)))
    assert dict.fromkeys(seen) == {
        ("first", True, False): None,
        ("between", False, False): None,
        ("refine", False, True): None,
    }


def _latents(layout: Layout) -> AV:
    assert layout.video is not None and layout.audio is not None
    cells = geometry.latent_shape(layout.video)
    sound = layout.audio.frames, geometry.AUDIO_BINS, geometry.AUDIO_CHANNELS
    return AV(jnp.zeros((1, *cells, 128)), jnp.zeros((1, *sound)))
