"""The PyTorch reference: ID-LoRA's own packages, from a checkout of its repository.

    IDLORA_REFERENCE=/path/to/ID-LoRA python -m benchmarks step --backends jax,reference

Generation 2.0 is read from `packages/`, 2.3 from `ID-LoRA-2.3/packages/`; both use the
same module names, so one process measures one generation. Reference tokens stand in
front there, and are moved behind the targets in what is compared. What is given to a
network goes to its device, in its dtype. LoRA training is `reference_training`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import os
import pathlib
import sys
import types
from collections.abc import Iterator
from typing import Any

import numpy as np

from benchmarks.backends.jax import SCALES
from benchmarks.cases import Case
from benchmarks.configs import Size
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


def large(size: Size, generation: Generation, device: str, dtype: str) -> Any:
    """The network with any numbers, made where it runs: for its speed alone.

    Args:
        size: of the network.
        generation: of it.
        device: of torch, such as "cuda".
        dtype: of its parameters, such as "bfloat16".

    Raises:
        NotRun: see `load`, and if the device is not there.
    """
    load(generation)
    import torch
    from ltx_core.model.transformer import LTXModelConfigurator  # pyright: ignore

    if device == "cuda" and not torch.cuda.is_available():
        raise NotRun("torch is there, but it sees no CUDA device")
    section = _FIXED | size.section(generation)
    with torch.device("meta"):
        made = LTXModelConfigurator.from_config({"transformer": section})
    made = made.to(getattr(torch, dtype)).to_empty(device=device)
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    return made.eval().requires_grad_(False)


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


def tensor(x: Any) -> Any:
    """A copy of an array."""
    import torch

    return torch.from_numpy(np.array(x))


def _turned(x: Any, count: int, axis: int = 1) -> np.ndarray:
    """Our order (targets, reference) to theirs: the last `count` come first."""
    return np.roll(np.asarray(x), count, axis)


def modality(name: str, streams: AV, prompt: Any, count: int, sigma: float) -> Any:
    """The reference's `Modality` of a stream; `count` reference tokens are in front."""
    import torch
    from ltx_core.model.transformer import Modality  # pyright: ignore

    s, fields = getattr(streams, name), Modality.__dataclass_fields__
    level = torch.tensor([sigma])
    mask = tensor(_turned(s.denoise, count).astype(np.float32))[..., None]
    extra = {"sigma": level} if "sigma" in fields else {}
    return Modality(
        latent=tensor(_turned(s.x, count)),
        timesteps=mask * level,
        positions=tensor(_turned(s.pos, count, 2)),
        context=tensor(getattr(prompt, name)),
        **extra,
    )


def _placed(one: Any, made: Any) -> Any:
    """A `Modality` on a network's device, its numbers in the network's dtype."""
    import torch

    like = next(made.parameters())

    def move(name: str, x: Any) -> Any:
        if not isinstance(x, torch.Tensor):
            return x
        wide = name == "positions" or not x.is_floating_point()
        return x.to(like.device, None if wide else like.dtype)

    fields = {f.name: getattr(one, f.name) for f in dataclasses.fields(one)}
    return dataclasses.replace(one, **{k: move(k, x) for k, x in fields.items()})


def _finished(made: Any) -> None:
    """Wait for the device: its work goes on after a call returns."""
    import torch

    if next(made.parameters()).is_cuda:
        torch.cuda.synchronize()


def _pair(case: Case, made: Any, prompt: int, *, reference: bool = True) -> AV:
    """`AV` of the reference's `Modality`, where the network is."""
    count, text = case.size.reference, case.prompts[prompt]
    streams = case.streams
    if not reference:
        n, a, count = case.size.audio, streams.audio, 0
        cut = a._replace(x=a.x[:, :n], denoise=a.denoise[:, :n], pos=a.pos[:, :, :n])
        streams = AV(streams.video, cut)
    counts = {"video": 0, "audio": count}
    given = (modality(n, streams, text, counts[n], case.sigma) for n in AV._fields)
    return AV(*(_placed(one, made) for one in given))


def _outputs(case: Case) -> Any:
    """From (video, audio) of the reference to arrays in our order."""
    back = -case.size.reference

    def outputs(done: Any) -> Outputs:
        video, audio = (x.float().cpu().numpy() for x in done)
        return {"video": video, "audio": np.roll(audio, back, 1)}

    return outputs


def forward(case: Case, made: Any) -> Work:
    """One pass with the positive prompt."""
    import torch

    pair = _pair(case, made, 0)

    def run() -> Any:
        with torch.inference_mode():
            done = made(video=pair.video, audio=pair.audio, perturbations=None)
        _finished(made)
        return done

    return Work("pass", NAME, run, _outputs(case))


def step(case: Case, made: Any) -> Work:
    """The five passes of scripts/inference_one_stage.py, in its order, and their sum.

    Source: IDLoraOneStagePipeline.__call__: denoising_func.
    """
    import torch
    from ltx_core.components.guiders import CFGGuider, STGGuider  # pyright: ignore
    from ltx_core.model.transformer import X0Model  # pyright: ignore

    x0 = X0Model(made).eval()
    positive, negative = (_pair(case, made, number) for number in (0, 1))
    alone, n = _pair(case, made, 0, reference=False), case.size.reference
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
            video, audio = video + dv, audio + da
        _finished(made)
        return video, audio

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
