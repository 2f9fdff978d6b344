"""Inputs of `sample.py` on the tiny model, and how tests call it."""

from __future__ import annotations

import importlib.util
import pathlib
import sys
from typing import Any

import jax
import numpy as np
import pytest

from idlora_jax import adapters, checkpoints, commandline, media
from idlora_jax.checkpoints import AdapterMeta
from idlora_jax.data import synthetic
from idlora_jax.sample_config import Guidance, SampleConfig
from idlora_jax.weights import io

ROOT = pathlib.Path(__file__).parents[1]
CONFIG = ROOT / "configs/tiny_sample.py"


def script() -> Any:
    spec = importlib.util.spec_from_file_location("sample_script", ROOT / "sample.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(monkeypatch: Any, *arguments: str) -> int:
    """The status that `sample.py` ends with."""
    monkeypatch.setattr(sys, "argv", ["sample.py", *arguments])
    with pytest.raises(SystemExit) as end:
        commandline.guarded(script().main)
    return end.value.code  # pyright: ignore


def written(model: tuple[Any, Any], folder: pathlib.Path) -> dict[str, Any]:
    """Paths of a whole set of good inputs."""
    base, text_encoder = model
    opened = io.open_base(base)
    shapes = io.shapes(opened, "transformer")
    lora = adapters.init(jax.random.key(0), shapes, 2)
    lora = jax.tree.map(lambda a: np.full(a.shape, 0.01, np.float32), lora)
    meta = AdapterMeta(generation="2.0", base_hash=opened.base_hash, rank=2, alpha=2.0)
    checkpoints.save_adapter(folder / "lora.safetensors", lora, meta)
    clip = synthetic.clip(0, 0, 0)
    media.write_wav(folder / "ref.wav", clip.wave, clip.rate)
    media.write_png(folder / "face.png", clip.frames[0])
    return {
        "base": base,
        "text_encoder": text_encoder,
        "lora": folder / "lora.safetensors",
        "reference_audio": (folder / "ref.wav",),
        "first_frame": folder / "face.png",
    }


def config(files: dict[str, Any], output: pathlib.Path, **changes: Any) -> SampleConfig:
    """Two steps of 9 frames of 64 x 32."""
    given = files | {"lora": (files["lora"],), "output_dir": output}
    options = {"frames": 9, "height": 64, "width": 32, "steps": 2, "dtype": "float32"}
    options["guidance"] = Guidance(stg_layer=3)
    options |= {"prompt": "a person", "use_text_cache": False, "memory": "off"}
    return SampleConfig(**(given | options | changes))


def arguments(c: SampleConfig) -> list[str]:
    """The command line of such a configuration."""
    given = {
        "base": c.base,
        "text-encoder": c.text_encoder,
        "lora": c.lora[0],
        "reference-audio": c.reference_audio[0],
        "first-frame": c.first_frame,
        "prompt": c.prompt,
        "output-dir": c.output_dir,
        "frames": c.frames,
        "height": c.height,
        "width": c.width,
        "steps": c.steps,
    }
    named = [part for k, v in given.items() for part in (f"--{k}", str(v))]
    return ["--config", str(CONFIG), *named, "--no-use-text-cache", "--memory", "off"]
