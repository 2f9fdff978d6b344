"""diffusers' `LTX2VideoTransformer3DModel`: one pass, with the same weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from benchmarks.cases import Case
from benchmarks.works import NotRun, Outputs, Work
from idlora_jax.config import TransformerConfig
from idlora_jax.weights import diffusers_config, diffusers_keys

NAME = "diffusers"


def model(cfg: TransformerConfig, original: Mapping[str, np.ndarray] | None) -> Any:
    """The network, with the given weights or with its own at seed 0.

    Args:
        cfg: of the transformer.
        original: weights by the keys of an original checkpoint.

    Raises:
        NotRun: if it is not installed, or too old to have the network.
    """
    try:
        import torch
        from diffusers.models.transformers.transformer_ltx2 import (
            LTX2VideoTransformer3DModel,
        )
    except ImportError as error:
        raise NotRun(f"no LTX-2 in the installed diffusers ({error})") from error
    torch.manual_seed(0)
    section: dict[str, Any] = diffusers_config.transformer_to_diffusers(cfg)
    section.pop("text_encoder_norm_type", None)
    made: Any = LTX2VideoTransformer3DModel(**section)
    if original is None:
        for name, parameter in made.named_parameters():
            if "scale_shift_table" in name:
                torch.nn.init.normal_(parameter, std=0.1)
    else:
        renamed = {_theirs(k): torch.from_numpy(v.copy()) for k, v in original.items()}
        made.load_state_dict(renamed)
    return made.float().eval().requires_grad_(False)


def _theirs(key: str) -> str:
    name = diffusers_keys.to_diffusers(diffusers_keys.TRANSFORMER, key)
    if name is None:
        raise KeyError(f"diffusers has no name for {key}")
    return name


def original(made: Any) -> dict[str, np.ndarray]:
    """Its weights by the keys of an original checkpoint."""
    names = diffusers_keys.TRANSFORMER
    found = {
        diffusers_keys.to_original(names, key): value.numpy()
        for key, value in made.state_dict().items()
    }
    assert None not in found, "diffusers has parameters that the original has not"
    return found  # pyright: ignore


def forward(case: Case, made: Any) -> Work:
    """One pass with the positive prompt; timesteps are multiplied by 1000 there."""
    import torch

    prompt, scale = case.prompts[0], case.cfg.timestep_scale
    tensor = lambda x: torch.from_numpy(np.array(x))
    v, a = case.streams
    level = lambda s: tensor(s.denoise).float() * (case.sigma * scale)
    sigma = torch.tensor([case.sigma * scale])
    given = {
        "hidden_states": tensor(v.x),
        "audio_hidden_states": tensor(a.x),
        "encoder_hidden_states": tensor(prompt.video),
        "audio_encoder_hidden_states": tensor(prompt.audio),
        "timestep": level(v),
        "audio_timestep": level(a),
        "sigma": sigma,
        "audio_sigma": sigma,
        "video_coords": tensor(v.pos),
        "audio_coords": tensor(a.pos),
        "use_cross_timestep": case.cfg.cross_sigma == "other",
        "return_dict": False,
    }

    def run() -> Any:
        with torch.inference_mode():
            return made(**given)

    def outputs(done: Any) -> Outputs:
        return {"video": done[0].numpy(), "audio": done[1].numpy()}

    return Work("pass", NAME, run, outputs)
