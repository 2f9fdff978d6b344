"""TFDS data sets of latents: written, opened without TensorFlow, trained on."""

from __future__ import annotations

import json
import pathlib
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import published_folder
import pytest
import tensorflow_datasets as tfds

from idlora_jax.data import (
    collection,
    latents,
    reading,
    report,
    sources,
    tfds_latents,
    tfds_plan,
    tfds_writer,
)
from idlora_jax.data.order import Order
from idlora_jax.data.stored import AUDIO, REFERENCE, TEXT, VIDEO, Stored
from idlora_jax.data.tfds_plan import Options
from idlora_jax.types import AV, Prompt


def connect(features: AV, mask: Any) -> Prompt:
    return Prompt(*(jnp.asarray(f, jnp.float32) for f in features))


def convert(source: pathlib.Path, target: pathlib.Path, **options: Any) -> pathlib.Path:
    opened = sources.open_source(source)
    return tfds_writer.convert(opened, Options(target, **options)).folder


@pytest.fixture
def folder(tmp_path: pathlib.Path) -> pathlib.Path:
    return published_folder.write(tmp_path / "in", 5)


def test_tfds_opens_it_by_name_without_tensorflow(folder, tmp_path):
    convert(folder, tmp_path / "tfds", name="idlora_celebvhq")
    script = (
        "import sys, tensorflow_datasets as tfds\n"
        "d = tfds.data_source('idlora_celebvhq', data_dir=sys.argv[1], split='train')\n"
        "print(len(d), d[2]['name'].decode(), d[2]['speaker'].decode(), d[2]['fps'])\n"
        "print(d[2]['video'].shape, d[2]['video'].dtype, d[2]['features'].shape)\n"
        "roots = {m.partition('.')[0] for m in sys.modules}\n"
        "print('tensorflow' in roots, 'idlora_jax' in roots)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "tfds")],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.splitlines() == [
        "5 speaker0/clip4 speaker0 25.0",
        "(3, 2, 2, 128) uint16 (4, 20)",
        "False False",
    ]


@pytest.mark.parametrize("shared", [True, False])
def test_training_reads_it_as_it_reads_the_folder(tmp_path, shared):
    source = published_folder.write(tmp_path / "in", 5, shared=shared)
    published_folder.write_clip(
        source, "longer", published_folder.files(9, reference=8, shared=shared)
    )
    index = collection.index(source)
    converted = collection.index(convert(source, tmp_path / "tfds"))
    assert converted.clips == index.clips
    assert [b.ragged for b in converted.buckets] == [(False, True)]
    assert converted.reference == 8
    order = Order(index.counts, 2)
    ours, theirs = (
        reading.batches(c, connect, order, count=6) for c in (index, converted)
    )
    with reading.opened(theirs, ahead=3) as reader:
        for step in range(6):
            batches = ours[step], reader(step)
            jax.tree.map(np.testing.assert_array_equal, *batches)
            assert batches[1].video.dtype == jnp.bfloat16


def test_bfloat16_comes_back_bit_by_bit(folder, tmp_path):
    contents = published_folder.files(0)
    bits = np.arange(128 * 12, dtype=np.uint16).reshape(128, 3, 2, 2) + 0x7000
    contents[VIDEO]["latents"] = bits.view("bfloat16")
    published_folder.write_clip(tmp_path / "one", "a", contents)
    opened = tfds_latents.open_dataset(convert(tmp_path / "one", tmp_path / "tfds"))
    clip = opened[0]
    assert clip.video.dtype == "bfloat16" and clip.video.shape == (3, 2, 2, 128)
    np.testing.assert_array_equal(clip.video.view(np.uint16), np.moveaxis(bits, 0, -1))
    assert clip.audio.dtype == np.float32
    assert clip.features.video is clip.features.audio
    assert clip.mask.tolist() == [False, True, True, True]


def test_clips_are_counted_and_taken_by_index(folder, tmp_path):
    opened = tfds_latents.open_dataset(convert(folder, tmp_path / "tfds"))
    assert len(list(opened)) == len(opened) == 5
    np.testing.assert_array_equal(opened[-1].video, opened[4].video)
    with pytest.raises(IndexError):
        opened[5]


def test_archives_give_the_same_data_set_as_their_folder(folder, tmp_path):
    packed = published_folder.archives(tmp_path / "packed", folder)
    plain, streamed = (
        tfds_latents.open_dataset(convert(source, tmp_path / f"tfds{n}"))
        for n, source in enumerate((folder, packed))
    )
    by_name = {clip.name: plain[n] for n, clip in enumerate(plain.clips)}
    assert len(streamed) == 5
    for n, clip in enumerate(streamed.clips):
        jax.tree.map(np.testing.assert_array_equal, streamed[n], by_name[clip.name])


def test_a_mode_without_references_leaves_them_out(folder, tmp_path):
    root = convert(folder, tmp_path / "tfds")
    index = latents.index(root, (VIDEO, TEXT, AUDIO))
    assert index.reference == 0
    batch = latents.whole(index, connect)
    assert batch.reference is None and batch.audio.shape == (5, 9, 16, 8)


def test_a_data_set_is_refused_where_video_references_are_needed(folder, tmp_path):
    root = convert(folder, tmp_path / "tfds")
    with pytest.raises(ValueError, match="holds no video references"):
        latents.index(root, (VIDEO, TEXT, latents.VIDEO_REFERENCE))


def test_a_data_set_without_sound_is_refused_where_sound_is_needed(tmp_path):
    contents = published_folder.files(0)
    contents = {VIDEO: contents[VIDEO], TEXT: contents[TEXT]}
    published_folder.write_clip(tmp_path / "in", "a", contents)
    root = convert(tmp_path / "in", tmp_path / "tfds")
    assert latents.index(root, (VIDEO, TEXT)).clips[0].audio == 0
    with pytest.raises(ValueError, match=f"lacks sound or references.*{REFERENCE}"):
        latents.index(root)


def test_shards_are_cut_by_size_and_joined_in_order(folder, tmp_path):
    root = convert(folder, tmp_path / "tfds", shard=40_000)
    names = sorted(path.name for path in root.glob("*array_record*"))
    assert len(names) == 3
    assert names[2] == "idlora_folder-train.array_record-00002-of-00003"
    opened = tfds_latents.open_dataset(root)
    names = [opened.records[n]["name"].decode() for n in range(len(opened))]
    assert names == sorted(names) == [clip.name for clip in opened.clips]


@pytest.mark.parametrize(
    ("dtype", "kind"), [("bfloat16", "bfloat16"), ("float32", "float32")]
)
def test_latents_and_features_are_cast_when_asked(folder, tmp_path, dtype, kind):
    opened = tfds_latents.open_dataset(convert(folder, tmp_path / "t", dtype=dtype))
    clip: Stored = opened[0]
    found = {str(x.dtype) for x in (clip.video, clip.audio, clip.features.video)}
    assert found == {kind}
    expected = published_folder.files(0)[AUDIO]["latents"].astype(kind)
    np.testing.assert_array_equal(clip.audio, np.moveaxis(expected, 0, -1))


def test_the_builder_prepares_the_same_records(folder, tmp_path):
    root = convert(folder, tmp_path / "ours", name="idlora_talkvid")
    opened = tfds_latents.open_dataset(root)
    source = sources.open_source(folder)
    facts = [report.look(item) for item in source.scan(lambda done: None)]
    made = tfds_plan.plan(source, report.report(facts), Options(tmp_path))
    records = [
        tfds_latents.encode(opened[n], name=c.name, fps=c.fps)
        for n, c in enumerate(opened.clips)
    ]
    builder = tfds_latents.builder(
        "idlora_talkvid",
        made.form,
        tfds_latents.metadata(made.form, opened.clips),
        data_dir=tmp_path / "theirs",
        records=lambda: records,
    )
    builder.download_and_prepare()
    assert isinstance(builder, tfds_latents.IdloraTalkvid)
    again = tfds_latents.open_dataset(tmp_path / "theirs")
    assert again.clips == opened.clips
    for n in range(5):
        jax.tree.map(np.testing.assert_array_equal, again[n], opened[n])
    files = [
        json.loads((o.root / "features.json").read_text()) for o in (again, opened)
    ]
    assert files[0] == files[1]


@pytest.mark.parametrize("name", ["", "Big", "1st", "a-b", "../a", "a b"])
def test_names_that_tfds_does_not_know_are_refused(name, tmp_path):
    with pytest.raises(ValueError, match="got the name"):
        tfds_latents.builder(name, {}, {}, data_dir=tmp_path)


def test_the_builders_are_not_registered():
    for name in tfds_latents.NAMES:
        with pytest.raises(tfds.core.DatasetNotFoundError):
            tfds.builder_cls(name)


def test_other_folders_are_no_data_set(folder, tmp_path):
    with pytest.raises(ValueError, match="no TFDS data set"):
        tfds_latents.open_dataset(folder)
    root = convert(folder, tmp_path / "tfds")
    facts = json.loads((root / "metadata.json").read_text())
    facts["clips"].pop()
    (root / "metadata.json").write_text(json.dumps(facts))
    with pytest.raises(ValueError, match="5 records, expected 4"):
        tfds_latents.open_dataset(root)
    (root / "metadata.json").write_text("{}")
    with pytest.raises(ValueError, match="no data set of latents"):
        tfds_latents.open_dataset(root)
    convert(folder, tmp_path / "tfds", name="other")
    with pytest.raises(ValueError, match="several data sets"):
        tfds_latents.open_dataset(tmp_path / "tfds")


def test_damaged_records_name_their_clip(folder, tmp_path):
    root = convert(folder, tmp_path / "tfds")
    index = latents.index(root)
    (path,) = root.glob("*.array_record*")
    whole = bytearray(path.read_bytes())
    at = len(whole) // 3
    flipped = bytes(b ^ 255 for b in whole[at : at + 400])
    for content in (whole[:at] + flipped + whole[at + 400 :], whole[: len(whole) // 2]):
        path.write_bytes(bytes(content))
        index = latents.index(root)
        told = []
        for clip in index.clips:
            try:
                latents.read(index, clip, connect)
            except ValueError as error:
                told.append(str(error))
                assert f"the record of {clip.name} cannot be read" in told[-1]
        assert told


def test_values_of_a_record_that_are_not_finite_are_refused(folder, tmp_path):
    made = tfds_latents.open_dataset(convert(folder, tmp_path / "tfds"))
    form = {
        name: tfds_latents.Tensor((None,) * x.ndim, str(x.dtype))
        for name, x in tfds_latents._tensors(made[0]).items()
    }
    bad = made[0]._replace(audio=np.full_like(made[0].audio, np.inf))
    record = tfds_latents.encode(bad, name=made.clips[0].name, fps=25.0)
    about = tfds_latents.metadata(form, made.clips[:1])
    where = {"data_dir": tmp_path / "bad", "records": lambda: [record]}
    tfds_latents.builder("idlora_talkvid", form, about, **where).download_and_prepare()
    index = latents.index(tmp_path / "bad")
    with pytest.raises(ValueError, match=r"speaker0/clip0 in .* not finite"):
        latents.read(index, index.clips[0], connect)
