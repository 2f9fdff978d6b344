"""LoRA files that were meddled with: used as they should be, or one clean error."""

import json
import pathlib
import tempfile
import warnings

import numpy as np
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from idlora_jax import checkpoints, config
from idlora_jax.weights import io, lora_files

BASE = io.shapes_of("transformer", config.tiny())
NAME = "transformer_blocks.1.audio_attn1.to_q"
PREFIXES = ["diffusion_model.", "transformer.", "base_model.model.", "lora_unet_", "x."]
ENDS = ["lora_A.weight", "lora_B.weight", "lora_down.weight", "lora.up.weight", "alpha"]
SHAPES = [(3, 32), (32, 3), (2, 32), (32, 2), (), (1,), (0, 32), (3, 32, 1)]
DTYPES = [np.float32, np.float16, np.int8, np.float64]

junk = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=2)
        | st.dictionaries(st.text(max_size=5), inner, max_size=2)
    ),
    max_leaves=4,
)
fields = st.dictionaries(
    st.sampled_from(["extra", "alpha", "rank", "targets", "generation", "strength"])
    | st.text(max_size=5),
    junk,
    max_size=4,
)
peft = st.dictionaries(
    st.sampled_from(
        ["r", "lora_alpha", "alpha_pattern", "rank_pattern", "use_rslora", "bias"]
    ),
    junk | st.dictionaries(st.text(max_size=4), junk, max_size=2),
    max_size=4,
)
keys = st.builds(
    lambda prefix, end, flat: (
        f"{prefix}{NAME.replace('.', '_') if flat else NAME}.{end}"
    ),
    st.sampled_from(PREFIXES),
    st.sampled_from(ENDS),
    st.booleans(),
)
tensors = st.dictionaries(
    keys,
    st.tuples(
        st.sampled_from(SHAPES),
        st.sampled_from(DTYPES),
        st.sampled_from([1.0, 0.0, np.nan, np.inf]),
    ),
    max_size=2,
)
GOOD = {
    f"{prefix}{NAME}.lora_{side}.weight": np.ones(shape, np.float32)
    for prefix in PREFIXES[:3]
    for side, shape in {"A": (3, 32), "B": (32, 3)}.items()
}


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.sampled_from(PREFIXES), tensors, fields, peft, st.booleans())
def test_a_file_is_loaded_whole_or_refused_in_one_message(
    prefix, parts, said, beside, partial
):
    arrays = {key: x for key, x in GOOD.items() if key.startswith(prefix)}
    for key, (shape, dtype, value) in parts.items():
        with np.errstate(invalid="ignore"):
            arrays[key] = np.full(shape, value).astype(dtype)
    about = {lora_files.OURS: json.dumps(said), lora_files.THEIRS: json.dumps(beside)}
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        path = pathlib.Path(folder, "adapter_model.safetensors")
        save_file(arrays, path, about)
        pathlib.Path(folder, lora_files.CONFIG).write_text(json.dumps(beside))
        try:
            found, meta = checkpoints.load_adapter(path, BASE, allow_partial=partial)
        except ValueError as error:
            assert str(path) in str(error) or folder in str(error)
            return
        event("loaded")
        pair = found["blocks"]["audio"]["self_attn"]["q"]["kernel"]
        assert np.isfinite(pair["a"]).all() and np.isfinite(pair["b"]).all()
        left = set(json.loads(meta.extra.get("left_out", "[]")))
        assert not left or partial
        kept = [key for key in arrays if key not in left]
        assert len([k for k in kept if not k.endswith("alpha")]) == 2
