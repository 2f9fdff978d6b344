"""8-bit checkpoints: read as such or widened, converted and exported bit by bit."""

import importlib.util
import json
import pathlib

import eight_bits
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

from idlora_jax import adapters, quantized
from idlora_jax.quantized import Quantized
from idlora_jax.weights import convert, fp8, io, networks, rules, tensorfile

QUERY = f"{eight_bits.BLOCKS}2.attn1.to_q"
KERNEL = "blocks/video/self_attn/q/kernel"
LAYERS = (1, 2)
SCRIPT = pathlib.Path(__file__).parents[2] / "convert" / "base.py"


@pytest.fixture(scope="module")
def plain(checkpoint):
    """The transformer's tensors in full width, and the file's metadata."""
    tensors, said = eight_bits.read(checkpoint)
    return {k: v for k, v in tensors.items() if io.owner(k) == "transformer"}, said


@pytest.fixture(scope="module")
def tensors(plain):
    """Two of four layers in 8 bits, and one Linear that is in no stack."""
    chosen = eight_bits.in_layers(*LAYERS)
    alone = "model.diffusion_model.proj_out.weight"
    return eight_bits.scaled(plain[0], lambda key: chosen(key) or key == alone)


@pytest.fixture(scope="module")
def scaled(tensors, plain, tmp_path_factory):
    path = tmp_path_factory.mktemp("fp8") / "scaled.safetensors"
    return eight_bits.write(path, tensors, plain[1])


@pytest.fixture(scope="module")
def widened(tensors, plain, tmp_path_factory):
    """The same weights in a plain float32 file."""
    path = tmp_path_factory.mktemp("fp8") / "wide.safetensors"
    return eight_bits.write(path, eight_bits.dequantized(tensors), plain[1])


@pytest.fixture(scope="module")
def folder(scaled, tmp_path_factory):
    made = tmp_path_factory.mktemp("converted") / "fp8"
    assert convert.convert_base(scaled, made, say=lambda line: None)
    return made


def load(path, dtype=None, choice: fp8.Choice = "upcast"):
    return io.load_network(io.open_base(path), "transformer", dtype, weights=choice)


def same(got, want):
    got, want = rules.flatten(got), rules.flatten(want)
    assert got.keys() == want.keys()
    for path, array in got.items():
        assert array.dtype == want[path].dtype, path
        assert np.asarray(array).tobytes() == np.asarray(want[path]).tobytes(), path


def flat(tree):
    """By path, a quantised parameter's parts apart."""
    out = {}
    for path, leaf in rules.flatten(tree).items():
        if isinstance(leaf, Quantized):
            out |= {
                f"{path}.{k}": v for k, v in leaf._asdict().items() if v is not None
            }
        else:
            out[path] = leaf
    return out


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_upcast_weights_are_values_times_scales_exactly(scaled, widened, dtype):
    same(load(scaled, dtype), load(widened, dtype))


def test_upcast_weights_are_bfloat16_like_their_neighbours_by_default(scaled):
    arrays = rules.flatten(load(scaled))
    assert arrays[KERNEL].dtype == arrays["video/out/kernel"].dtype == jnp.bfloat16


def test_kept_weights_are_the_file_s_bytes(scaled, tensors):
    tree = rules.flatten(load(scaled, jnp.float32, "keep"))
    q = tree[KERNEL]
    assert isinstance(q, Quantized) and q.shape == (4, 64, 64)
    assert (q.dtype, q.like.dtype) == (jnp.float32, jnp.float8_e4m3fn)
    for n, layer in enumerate(LAYERS):
        key = f"{eight_bits.BLOCKS}{layer}.attn1.to_q."
        assert np.asarray(q.values[n]).tobytes() == tensors[f"{key}weight"].T.tobytes()
        assert q.scale[n] == tensors[f"{key}weight_scale"]
        assert q.input_scale[n] == tensors[f"{key}input_scale"]
    assert q.wide.shape == (2, 64, 64) and q.row.tolist() == [-1, 0, 1, -2]
    assert tree["video/out/kernel"].shape == (64, 128)


def test_kept_weights_widen_to_the_upcast_ones_exactly(scaled):
    same(quantized.plain(load(scaled, None, "keep")), load(scaled))


def test_which_layers_are_in_8_bits_is_read_from_the_file(plain, tmp_path):
    for n, layers in enumerate([(0,), (0, 3), (0, 1, 2, 3)]):
        made = eight_bits.scaled(plain[0], eight_bits.in_layers(*layers))
        path = eight_bits.write(tmp_path / f"{n}.safetensors", made, plain[1])
        q = rules.flatten(load(path, choice="keep"))[KERNEL]
        assert np.flatnonzero(q.row >= 0).tolist() == [*layers]
        same(quantized.plain({"x": q}), {"x": rules.flatten(load(path))[KERNEL]})


def test_one_linear_alone_may_be_in_8_bits(plain, tmp_path):
    chosen = lambda key: key == f"{QUERY}.weight"
    made = eight_bits.scaled(plain[0], chosen)
    tree = load(
        eight_bits.write(tmp_path / "x.safetensors", made, plain[1]), None, "keep"
    )
    packed = [p for p, q in rules.flatten(tree).items() if isinstance(q, Quantized)]
    assert packed == [KERNEL]


def test_weights_without_scales_stand_for_themselves(plain, tmp_path):
    def chosen(key):
        return "transformer_blocks.1." in key or key.endswith("proj_out.bias")

    made = eight_bits.cast(plain[0], chosen)
    path = eight_bits.write(tmp_path / "x.safetensors", made, plain[1])
    tree = load(path, jnp.float32, "keep")
    assert rules.flatten(tree)[KERNEL].scale is None
    bias = rules.flatten(tree)["blocks/audio/ff/up/bias"]
    assert isinstance(bias, Quantized)
    wide = eight_bits.write(
        tmp_path / "y.safetensors", eight_bits.dequantized(made), plain[1]
    )
    same(load(path, jnp.float32), load(wide, jnp.float32))
    same(quantized.plain(tree), load(wide, jnp.float32))


def test_the_folder_holds_8_bits_under_our_paths(folder):
    specs = tensorfile.header(folder / "transformer.safetensors").tensors
    assert specs[f"{KERNEL}_fp8"] == ((2, 64, 64), fp8.FLOAT8[0])
    assert specs[KERNEL].shape == (2, 64, 64)
    assert (
        specs[f"{KERNEL}_scale"].shape == specs[f"{KERNEL}_input_scale"].shape == (2,)
    )
    assert specs[f"{KERNEL}_row"].shape == (4,)
    assert specs["video/out/kernel_fp8"].shape == (1, 64, 128)
    assert "video/out/kernel" not in specs


@pytest.mark.parametrize("choice", ["keep", "upcast"])
def test_the_folder_gives_what_the_file_gives(scaled, folder, choice):
    same(flat(load(folder, None, choice)), flat(load(scaled, None, choice)))


def test_exporting_gives_back_the_file_bit_for_bit(scaled, folder, tmp_path):
    path = tmp_path / "back.safetensors"
    convert.export_base(folder, path, say=lambda line: None)
    assert path.read_bytes() == scaled.read_bytes()


def test_exporting_weights_without_scales_gives_back_the_file(plain, tmp_path):
    chosen = lambda key: "transformer_blocks.1." in key or "patchify" in key
    made = eight_bits.cast(plain[0], chosen)
    path = eight_bits.write(tmp_path / "x.safetensors", made, plain[1])
    convert.convert_base(path, tmp_path / "x", say=lambda line: None)
    convert.export_base(tmp_path / "x", tmp_path / "y", say=lambda line: None)
    assert (tmp_path / "y").read_bytes() == path.read_bytes()


def test_kept_parameters_are_saved_as_they_were_read(scaled, plain, tmp_path):
    base = io.open_base(scaled)
    params = {n: io.load_network(base, n, weights="keep") for n in io.names_in(base)}
    path = tmp_path / "x.safetensors"
    io.save_original(path, params, base.config, base.metadata)
    assert path.read_bytes() == scaled.read_bytes()


def test_converting_may_widen_and_then_forgets_the_scales(scaled, widened, tmp_path):
    folder = tmp_path / "x"
    options = {"weights": "upcast", "say": lambda line: None}
    assert convert.convert_base(scaled, folder, jnp.float32, **options)
    same(load(folder), load(widened, jnp.float32))
    assert "_quantization_metadata" not in io.open_base(folder).metadata
    assert not convert.convert_base(scaled, folder, jnp.float32, **options)
    with pytest.raises(ValueError, match="up-cast"):
        convert.convert_base(scaled, folder, jnp.float32)


def test_the_script_widens_when_asked_to(scaled, folder, tmp_path, capsys):
    spec = importlib.util.spec_from_file_location("script_base", SCRIPT)
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    assert script.main(["--weights", "upcast", str(scaled), str(tmp_path / "x")]) == 0
    specs = tensorfile.header(tmp_path / "x" / "transformer.safetensors").tensors
    assert specs[KERNEL] == ((4, 64, 64), np.dtype(jnp.bfloat16))
    with pytest.raises(SystemExit):
        script.main(["--export", "--weights", "keep", str(folder), str(tmp_path / "y")])
    assert "--weights" in capsys.readouterr().err


def test_a_dtype_does_not_touch_what_is_kept(scaled, tmp_path):
    convert.convert_base(scaled, tmp_path / "x", jnp.float32, say=lambda line: None)
    got = flat(load(tmp_path / "x", jnp.float32, "keep"))
    same(got, flat(load(scaled, jnp.float32, "keep")))
    assert got[f"{KERNEL}.like"].dtype == jnp.float8_e4m3fn


def test_only_the_transformer_is_kept(checkpoint, tmp_path):
    tensors, said = eight_bits.read(checkpoint)
    first = "vae.decoder.conv_in.conv.weight"
    made = eight_bits.cast(tensors, lambda key: key == first)
    path = eight_bits.write(tmp_path / "x.safetensors", made, said)
    params = networks.load(path, ("video_vae",), dtype=None, weights="keep")[1]
    got = rules.flatten(params["video_vae"])["decoder/conv_in/kernel"]
    assert got.dtype == jnp.bfloat16
    want = made[first].astype(np.float32).transpose(2, 3, 4, 1, 0)
    np.testing.assert_array_equal(got.astype(jnp.float32), want)


def broken(tensors, plain, path, **changes):
    """The file with other tensors; None drops one."""
    made = {k: v for k, v in (tensors | changes).items() if v is not None}
    return io.open_base(eight_bits.write(path, made, plain[1]))


@pytest.mark.parametrize("value", [np.nan, np.inf, -1.0])
def test_a_scale_that_is_no_number_is_refused(tensors, plain, tmp_path, value):
    change = {f"{QUERY}.weight_scale": np.asarray(value, np.float32)}
    base = broken(tensors, plain, tmp_path / "x.safetensors", **change)
    with pytest.raises(ValueError, match=rf"{QUERY}.weight_scale: got a scale of"):
        io.load_network(base, "transformer")
    with pytest.raises(ValueError, match="download it again"):
        convert.convert_base(base.path, tmp_path / "y", say=lambda line: None)
    assert [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]


def test_missing_odd_and_unexpected_scales_are_listed(tensors, plain, tmp_path):
    other = f"{eight_bits.BLOCKS}0.attn1.to_q.weight_scale"
    changes = {
        f"{QUERY}.input_scale": None,
        f"{QUERY}.weight_scale": np.ones(64, np.float32),
        other: np.ones((), np.float32),
    }
    base = broken(tensors, plain, tmp_path / "x.safetensors", **changes)
    with pytest.raises(ValueError, match="1 missing, 1 of a wrong shape, 1 unex") as e:
        io.load_network(base, "transformer")
    assert f"missing: {QUERY}.input_scale []" in str(e.value)
    assert f"{QUERY}.weight_scale: got [64], expected []" in str(e.value)
    assert f"unexpected: {other}" in str(e.value)


def test_scales_that_all_got_lost_are_missed(tensors, plain, tmp_path):
    kept = {k: v for k, v in tensors.items() if not k.endswith("_scale")}
    said = plain[1] | {"_quantization_metadata": '{"layers": {"a": {"format": '
                       '"float8_e4m3fn"}}}'}  # fmt: skip
    base = io.open_base(eight_bits.write(tmp_path / "x.safetensors", kept, said))
    with pytest.raises(ValueError, match=r"missing: .*weight_scale"):
        io.load_network(base, "transformer")


@pytest.mark.parametrize("text", ["{", "[]", '{"layers": {"a": {"format": "nvfp4"}}}'])
def test_other_formats_are_refused(plain, tmp_path, text):
    said = plain[1] | {"_quantization_metadata": text}
    base = io.open_base(eight_bits.write(tmp_path / "x.safetensors", plain[0], said))
    with pytest.raises(ValueError, match="expected layers in float8_e4m3fn"):
        io.load_network(base, "transformer")


def test_scales_of_another_width_and_mixed_formats_are_refused(
    tensors, plain, tmp_path
):
    half = {f"{QUERY}.weight_scale": np.ones((), np.float16)}
    base = broken(tensors, plain, tmp_path / "x.safetensors", **half)
    with pytest.raises(ValueError, match="a scale in float16, expected float32"):
        io.load_network(base, "transformer")
    odd = {f"{QUERY}.weight": tensors[f"{QUERY}.weight"].view(ml_dtypes.float8_e5m2)}
    base = broken(tensors, plain, tmp_path / "y.safetensors", **odd)
    with pytest.raises(ValueError, match=r"float8_e4m3fn.*float8_e5m2"):
        io.load_network(base, "transformer")


def test_a_choice_that_is_none_is_refused():
    with pytest.raises(ValueError, match=r"got 'yes', expected one of .*'int8'"):
        fp8.require_choice("yes")


def test_a_damaged_table_of_rows_is_refused(folder, tmp_path):
    said = {p.name: p.read_text() for p in folder.glob("*.json")}
    found = tensorfile.tensors_of(folder / "transformer.safetensors")
    tensors = {name: found.tensor(name) for name in found.specs}
    tensors[f"{KERNEL}_row"] = np.array([0, 1, -1, -1], np.int32)
    entries = [tensorfile.entry(*pair) for pair in tensors.items()]
    tensorfile.write(tmp_path / "transformer.safetensors", entries)
    manifest = json.loads(said["manifest.json"])
    files = manifest["networks"]
    manifest["networks"] = {"transformer": files["transformer"]}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    (tmp_path / "config.json").write_text(said["config.json"])
    with pytest.raises(ValueError, match=rf"{KERNEL}: got the layers' rows.*again"):
        load(tmp_path)


def test_adapters_fit_a_kept_base_as_they_fit_an_upcast_one(scaled):
    wide, kept = load(scaled, jnp.float32), load(scaled, jnp.float32, "keep")
    new = adapters.init(jax.random.key(0), kept, 2)
    same(new, adapters.init(jax.random.key(0), wide, 2))
    adapters.check(new, kept)
    drawn = jax.tree.map(jnp.ones_like, new)
    merged = adapters.merge(kept, drawn)
    same(quantized.plain(merged), adapters.merge(wide, drawn))
    left = [p for p, q in rules.flatten(merged).items() if isinstance(q, Quantized)]
    assert KERNEL in left and "blocks/audio/ff/up/kernel" not in left


def test_kept_layers_are_placed_where_the_parameter_belongs(scaled):
    mesh = jax.make_mesh((1,), ("x",))
    wide = NamedSharding(mesh, PartitionSpec(None, "x"))
    seen = []

    def placement(path, shape):
        seen.append((path, len(shape)))
        kernel = path.endswith(("/kernel", "/values", "/wide")) and len(shape) == 3
        return wide if kernel else NamedSharding(mesh, PartitionSpec())

    base = io.open_base(scaled)
    placed = io.load_network(base, "transformer", placement=placement, weights="keep")
    same(flat(placed), flat(load(scaled, None, "keep")))
    q = rules.flatten(placed)[KERNEL]
    assert q.values.sharding == q.wide.sharding == wide
    parts = {(f"{KERNEL}/values", 3), (f"{KERNEL}/scale", 1), (f"{KERNEL}/row", 1)}
    assert parts <= {*seen}


def test_keeping_holds_a_byte_per_parameter(scaled):
    count = lambda tree: sum(leaf.nbytes for leaf in jax.tree.leaves(tree))
    kept, wide = (
        rules.flatten(load(scaled, jnp.bfloat16, choice))[KERNEL]
        for choice in ("keep", "upcast")
    )
    assert wide.nbytes == 4 * 64 * 64 * 2
    assert count(kept) == 2 * 64 * 64 * (1 + 2) + 2 * 4 + 2 * 4 + 4 * 4


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.lists(st.booleans(), min_size=1, max_size=12))
def test_rows_lead_to_every_layer_once(flags):
    row = quantized.rows(np.array(flags))
    assert [bool(r >= 0) for r in row] == flags
    assert sorted(r for r in row if r >= 0) == [*range(sum(flags))]
    assert sorted(-1 - r for r in row if r < 0) == [*range(len(flags) - sum(flags))]


@pytest.mark.parametrize("kind", fp8.FLOAT8)
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_widening_by_table_is_multiplying_and_casting(kind, dtype):
    values = np.arange(256, dtype=np.uint8).reshape(16, 16).view(kind).T
    scale = np.float32(0.1234567)
    want = (values.astype(np.float32) * scale).astype(dtype)
    got = fp8.widened(values, scale, np.dtype(dtype))
    bits = f"u{want.itemsize}"
    np.testing.assert_array_equal(got.view(bits), want.view(bits))
    assert got.dtype == dtype and got.flags.f_contiguous
    alone = fp8.widened(values, None, np.dtype(dtype))
    np.testing.assert_array_equal(alone.view(bits), values.astype(dtype).view(bits))
