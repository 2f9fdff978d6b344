"""The PyTorch reference: ID-LoRA's own packages, from a checkout of its repository.

    IDLORA_REFERENCE=/path/to/ID-LoRA python -m benchmarks step --backends jax,reference

Generation 2.0 is read from `packages/`, 2.3 from `ID-LoRA-2.3/packages/`; both use the
same module names, so one process measures one generation. Reference tokens stand in
front there, and are moved behind the targets in what is compared.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import pathlib
import sys
import types
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from benchmarks.backends.jax import SCALES
from benchmarks.backends.jax_training import gradient_outputs
from benchmarks.cases import Case, TrainCase
from benchmarks.configs import SIGMA, Size
from benchmarks.works import NotRun, Outputs, Work
from idlora_jax.config import Generation
from idlora_jax.types import AV

NAME = "reference"
VARIABLE = "IDLORA_REFERENCE"
PREFIX = "model.diffusion_model."
_FIXED = {
    "dropout": 0.0,
    "attention_bias": True,
    "num_vector_embeds": None,
    "activation_fn": "gelu-approximate",
    "num_embeds_ada_norm": 1000,
    "use_linear_projection": False,
    "only_cross_attention": False,
    "cross_attention_norm": True,
    "double_self_attention": False,
    "upcast_attention": False,
    "standardization_norm": "rms_norm",
    "norm_elementwise_affine": False,
    "qk_norm": "rms_norm",
    "positional_embedding_type": "rope",
    "use_audio_video_cross_attention": True,
    "share_ff": False,
    "av_cross_ada_norm": True,
    "use_middle_indices_grid": True,
}
"""What the reference's configurator insists on reading."""
_ATTENTIONS = "audio_attn1 audio_attn2 audio_to_video_attn video_to_audio_attn".split()
_PARTS = ("to_q", "to_k", "to_v", "to_out.0")
MODULES = (
    *(f"{attention}.{part}" for attention in _ATTENTIONS for part in _PARTS),
    "audio_ff.net.0.proj",
    "audio_ff.net.2",
)
"""The 18 modules of a layer that ID-LoRA trains."""


def locate(generation: Generation) -> pathlib.Path:
    """The folder that holds `ltx_core`.

    Raises:
        NotRun: if the variable is not set, or the folder is not there.
    """
    root = os.environ.get(VARIABLE)
    if not root:
        raise NotRun(f"{VARIABLE} is not set; give a checkout of ID-LoRA")
    parts = ("ID-LoRA-2.3",) if generation == "2.3" else ()
    found = pathlib.Path(root, *parts, "packages", "ltx-core", "src")
    if not (found / "ltx_core").is_dir():
        raise NotRun(f"{VARIABLE}: no ltx_core in {found}")
    return found


def load(generation: Generation) -> None:
    """Make the generation's `ltx_core` importable.

    Raises:
        NotRun: if it is absent, torch is not installed, or the other generation's
            was loaded.
    """
    folder = str(locate(generation))
    try:
        import torch  # noqa: F401
    except ImportError as error:
        raise NotRun(f"torch is not installed ({error})") from error
    if folder not in sys.path:
        sys.path.insert(0, folder)
    try:
        with _standing_in_for_triton():
            import ltx_core  # pyright: ignore
            import ltx_core.model.transformer  # pyright: ignore
    except ImportError as error:
        raise NotRun(f"ltx_core cannot be imported: {error}") from error
    at = str(pathlib.Path(*map(str, ltx_core.__path__)).parent)
    if at != folder:
        raise NotRun(f"ltx_core was loaded from {at} already; use a process each")


@contextlib.contextmanager
def _standing_in_for_triton() -> Iterator[None]:
    """Let the reference be imported where triton is not: on CPUs there is none.

    One kernel of its fp8 loader is decorated by it at import; nothing here reads fp8.
    """
    if "ltx_core" in sys.modules or importlib.util.find_spec("triton"):
        yield
        return
    language = types.ModuleType("triton.language")
    language.constexpr = object  # pyright: ignore
    package = types.ModuleType("triton")
    package.jit = lambda kernel: kernel  # pyright: ignore
    package.language = language  # pyright: ignore
    sys.modules |= {"triton": package, "triton.language": language}
    try:
        yield
    finally:
        del sys.modules["triton"], sys.modules["triton.language"]


def model(size: Size, generation: Generation) -> Any:
    """The network with torch's default values at seed 0, tables of deviation 0.1.

    Raises:
        NotRun: see `load`.
    """
    load(generation)
    import torch
    from ltx_core.model.transformer import LTXModelConfigurator  # pyright: ignore

    torch.manual_seed(0)
    section = _FIXED | size.section(generation)
    made = LTXModelConfigurator.from_config({"transformer": section})
    return _filled(made).float().eval().requires_grad_(False)


def _filled(made: Any) -> Any:
    """With what the configurator leaves without numbers, and the tables, drawn."""
    import torch

    for module in made.modules():
        if any(p.is_meta for p in module.parameters(recurse=False)):
            module.to_empty(device="cpu", recurse=False)
            module.reset_parameters()
    for name, parameter in made.named_parameters():
        if "scale_shift_table" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return made


def original(made: Any) -> dict[str, np.ndarray]:
    """Its weights by the keys of an original checkpoint."""
    state = made.state_dict()
    return {PREFIX + key: value.numpy() for key, value in state.items()}


def _tensor(x: Any) -> Any:
    import torch

    return torch.from_numpy(np.array(x))


def _turned(x: Any, count: int, axis: int = 1) -> np.ndarray:
    """Our order (targets, reference) to theirs: the last `count` come first."""
    return np.roll(np.asarray(x), count, axis)


def _modality(name: str, streams: AV, prompt: Any, count: int, sigma: float) -> Any:
    """Of one stream; `count` reference tokens are put in front."""
    import torch
    from ltx_core.model.transformer import Modality  # pyright: ignore

    s, fields = getattr(streams, name), Modality.__dataclass_fields__
    level = torch.tensor([sigma])
    mask = _tensor(_turned(s.denoise, count).astype(np.float32))[..., None]
    extra = {"sigma": level} if "sigma" in fields else {}
    return Modality(
        latent=_tensor(_turned(s.x, count)),
        timesteps=mask * level,
        positions=_tensor(_turned(s.pos, count, 2)),
        context=_tensor(getattr(prompt, name)),
        **extra,
    )


def _pair(case: Case, prompt: int, *, reference: bool = True) -> AV:
    """`AV` of the reference's `Modality`."""
    count, text = case.size.reference, case.prompts[prompt]
    streams = case.streams
    if not reference:
        n, a, count = case.size.audio, streams.audio, 0
        cut = a._replace(x=a.x[:, :n], denoise=a.denoise[:, :n], pos=a.pos[:, :, :n])
        streams = AV(streams.video, cut)
    counts = {"video": 0, "audio": count}
    return AV(*(_modality(n, streams, text, counts[n], case.sigma) for n in AV._fields))


def _outputs(case: Case) -> Any:
    """From (video, audio) of the reference to arrays in our order."""
    back = -case.size.reference

    def outputs(done: Any) -> Outputs:
        video, audio = (x.numpy() for x in done)
        return {"video": video, "audio": np.roll(audio, back, 1)}

    return outputs


def forward(case: Case, made: Any) -> Work:
    """One pass with the positive prompt."""
    import torch

    pair = _pair(case, 0)

    def run() -> Any:
        with torch.inference_mode():
            return made(video=pair.video, audio=pair.audio, perturbations=None)

    return Work("pass", NAME, run, _outputs(case))


def step(case: Case, made: Any) -> Work:
    """The five passes of scripts/inference_one_stage.py, in its order, and their sum.

    Source: IDLoraOneStagePipeline.__call__: denoising_func.
    """
    import torch
    from ltx_core.components.guiders import CFGGuider, STGGuider  # pyright: ignore
    from ltx_core.model.transformer import X0Model  # pyright: ignore

    x0 = X0Model(made).eval()
    positive, negative = _pair(case, 0), _pair(case, 1)
    alone, n = _pair(case, 0, reference=False), case.size.reference
    skips = _perturbations(case.size.stg)
    text = [CFGGuider(scale) for scale in SCALES["text"]]
    stg, bimodal = STGGuider(SCALES["stg"][0]), CFGGuider(SCALES["bimodal"][0])

    def call(pair: AV, perturbations: Any = None) -> Any:
        return x0(video=pair.video, audio=pair.audio, perturbations=perturbations)

    def run() -> Any:
        with torch.inference_mode():
            video, audio = call(positive)
            nv, na = call(negative)
            dv, da = text[0].delta(video, nv), text[1].delta(audio, na)
            _, own = call(alone)
            change = torch.zeros_like(da)
            change[:, n:] = SCALES["identity"][1] * (audio[:, n:] - own)
            da = da + change
            for guider, skip in ((stg, skips[0]), (bimodal, skips[1])):
                pv, pa = call(positive, skip)
                dv, da = dv + guider.delta(video, pv), da + guider.delta(audio, pa)
            return video + dv, audio + da

    return Work("five passes", NAME, run, _outputs(case))


def _perturbations(layer: int) -> list[Any]:
    """Of the STG and of the bimodal pass."""
    from ltx_core.guidance import (  # pyright: ignore
        BatchedPerturbationConfig,
        Perturbation,
        PerturbationConfig,
        PerturbationType,
    )

    def of(layers: list[int] | None, *kinds: Any) -> Any:
        each = [Perturbation(type=kind, blocks=layers) for kind in kinds]
        return BatchedPerturbationConfig([PerturbationConfig(each)])

    kind = PerturbationType
    stg = of([layer], kind.SKIP_VIDEO_SELF_ATTN, kind.SKIP_AUDIO_SELF_ATTN)
    return [stg, of(None, kind.SKIP_A2V_CROSS_ATTN, kind.SKIP_V2A_CROSS_ATTN)]


def with_lora(made: Any, rank: int, tensors: Mapping[str, np.ndarray]) -> Any:
    """The network with PEFT's adapter as the reference's trainer makes it.

    Raises:
        NotRun: if peft is not installed.
    """
    try:
        import peft
    except ImportError as error:
        raise NotRun(f"peft is not installed ({error})") from error
    how = peft.LoraConfig(
        r=rank, lora_alpha=rank, target_modules=list(MODULES), lora_dropout=0.0
    )
    wrapped: Any = peft.get_peft_model(made, how)
    named = {
        name.replace("base_model.model.", "diffusion_model.", 1).replace(
            ".default.", "."
        ): p
        for name, p in wrapped.named_parameters()
        if p.requires_grad
    }
    assert sorted(named) == sorted(tensors), "an adapter of other modules"
    for name, parameter in named.items():
        parameter.data.copy_(_tensor(tensors[name]))
    return wrapped, named


def train(
    case: TrainCase,
    made: Any,
    streams: AV,
    velocity: AV,
    tensors: Mapping[str, np.ndarray],
    *,
    checkpoint: bool = True,
) -> Work:
    """One step of LoRA training: forward, backward, clipping, AdamW.

    Args:
        case: the batch.
        made: from `model`; PEFT changes it.
        streams: the noisy streams of that batch, as ours are.
        velocity: what they should give.
        tensors: the adapter by its keys in a file.
        checkpoint: whether blocks are run again in the backward pass.

    Source: ltx_trainer: trainer.py, training_strategies/audio_ref_only_ic.py.
    """
    import dataclasses

    import torch

    wrapped, named = with_lora(made, case.size.rank, tensors)
    wrapped.get_base_model().set_gradient_checkpointing(checkpoint)
    wrapped.train()
    n, counts = case.size.reference, {"video": 0, "audio": case.size.reference}
    prompt = case.batch.prompt
    video, audio = (
        dataclasses.replace(m, timesteps=m.timesteps[..., 0])
        for m in (_modality(k, streams, prompt, counts[k], SIGMA) for k in AV._fields)
    )
    video, audio = _masked(video, audio, n)
    wanted = [_tensor(v) for v in velocity]
    counted = _tensor(streams.video.denoise)[..., None].float()
    optimizer = torch.optim.AdamW(named.values(), lr=2e-4, weight_decay=0.01)

    def run() -> Any:
        optimizer.zero_grad(set_to_none=True)
        v, a = wrapped(video=video, audio=audio, perturbations=None)
        loss = (v - wanted[0]).pow(2).mul(counted).div(counted.mean()).mean()
        loss = loss + (a[:, n:] - wanted[1]).pow(2).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(named.values(), 1.0)
        optimizer.step()
        return loss.detach()

    def outputs(loss: Any) -> Outputs:
        moments = {k: optimizer.state[p]["exp_avg"].numpy() for k, p in named.items()}
        return gradient_outputs(loss.numpy(), moments)

    return Work("checkpoint" if checkpoint else "no checkpoint", NAME, run, outputs)


def _masked(video: Any, audio: Any, n: int) -> tuple[Any, Any]:
    """Video sees no reference tokens, and these see no text."""
    import dataclasses

    import torch

    floor = torch.finfo(torch.float32).min
    batch, tokens = audio.latent.shape[:2]
    hidden = torch.zeros(batch, video.latent.shape[1], tokens)
    hidden[:, :, :n] = floor
    valid = torch.ones(audio.context.shape[:2], dtype=torch.int64)
    video = dataclasses.replace(
        video, a2v_cross_attention_mask=hidden, context_mask=valid
    )
    blind = torch.zeros(batch, tokens, audio.context.shape[1])
    blind[:, :n] = floor
    newer = "sigma" in type(audio).__dataclass_fields__
    masks = {"context_mask": blind}
    if newer:
        masks = {"context_mask": valid, "audio_context_attn_mask": blind}
    return video, dataclasses.replace(audio, **masks)
