"""Published files without their data: a real header, and as many zeros as it says.

`write` takes names, dtypes and shapes from tests/manifests, the embedded configuration
from tests/manifests/configs, and extends the file to its full size (up to 46 GB) as one
hole, so that it costs no disk space. Every tensor reads as zeros.
"""

import gzip
import json
import math
import os
import pathlib

MANIFESTS = pathlib.Path(__file__).parent / "manifests"
NAMES = sorted(path.name.removesuffix(".json.gz") for path in MANIFESTS.glob("*.gz"))

ITEMSIZE = {"F32": 4, "BF16": 2, "F8_E4M3": 1}

CONFIGS = {
    "ltx-2-19b-dev": "ltx-2-19b",
    "ltx-2-19b-dev-fp8": "ltx-2-19b",
    "ltx-2.3-22b-dev": "ltx-2.3-22b",
    "ltx-2-spatial-upscaler-x2-1.0": "ltx-2-spatial-upscaler-x2-1.0",
    "ltx-2.3-spatial-upscaler-x2-1.1": "ltx-2.3-spatial-upscaler-x2-1.1",
}
"""The configuration that the published file embeds; the others embed none."""


def manifest(name):
    """Tensors of a published file: {name: {"dtype", "shape"}}."""
    return json.loads(gzip.decompress((MANIFESTS / f"{name}.json.gz").read_bytes()))


def config(name):
    """An embedded configuration, by its own name ("ltx-2-19b", "ltx-2.3-22b", ...)."""
    return json.loads((MANIFESTS / "configs" / f"{name}.json").read_text("utf-8"))


def text_metadata(name, tensors, config_name=None):
    """The metadata that the published file has, as far as it matters to a reader."""
    out = {}
    if name.startswith("gemma"):
        out["format"] = "pt"
    scales = [key for key in tensors if key.endswith(".weight_scale")]
    if scales:
        names = [key.removesuffix(".weight_scale") for key in scales]
        layers = {name: {"format": "float8_e4m3fn"} for name in names}
        quantised = {"format_version": "1.0", "layers": layers}
        out["_quantization_metadata"] = json.dumps(quantised)
    if config_name is None:
        config_name = CONFIGS.get(name)
    if config_name:
        out["config"] = json.dumps(config(config_name))
    if name == "ltx-2.3-22b-dev":
        out["model_version"] = "2.3.0"
    return out


def header(tensors, metadata):
    """The JSON header and the number of bytes of data.

    Widest dtype first, then by name, as the safetensors package orders them.
    """
    out, end = {"__metadata__": metadata}, 0
    for key in sorted(tensors, key=lambda k: (-ITEMSIZE[tensors[k]["dtype"]], k)):
        start, entry = end, tensors[key]
        end += math.prod(entry["shape"]) * ITEMSIZE[entry["dtype"]]
        out[key] = {
            "dtype": entry["dtype"],
            "shape": entry["shape"],
            "data_offsets": [start, end],
        }
    text = json.dumps(out, separators=(",", ":")).encode()
    return text + b" " * (-len(text) % 8), end


def write(path, manifest_name, config_name=None, metadata=None, *, only=None):
    """Write a published file's header and a hole of its full size.

    Args:
        path: the .safetensors file.
        manifest_name: one of `NAMES`.
        config_name: the configuration to embed (default: the published one's; "" for
            none).
        metadata: further text, which wins over the published.
        only: takes a tensor's name; False leaves it out (for shards and swapped parts).

    Returns:
        The path.
    """
    tensors = manifest(manifest_name)
    tensors = {k: v for k, v in tensors.items() if only is None or only(k)}
    text = text_metadata(manifest_name, tensors, config_name) | (metadata or {})
    head, size = header(tensors, text)
    with open(path, "wb") as file:
        file.write(len(head).to_bytes(8, "little") + head)
    os.truncate(path, 8 + len(head) + size)
    return pathlib.Path(path)
