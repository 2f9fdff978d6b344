"""Reading ahead: the same batches in the same order, from wherever one goes on."""

from __future__ import annotations

import dataclasses
import threading
import time
from typing import Any

import jax
import jax.numpy as jnp
import latent_folder
import numpy as np
import pytest

from idlora_jax.data import collection, latents, reading
from idlora_jax.data.order import Order
from idlora_jax.types import AV, Prompt

COUNT = 10


def connect(features: AV, mask: Any) -> Prompt:
    return Prompt(*(jnp.asarray(f, jnp.float32) for f in features))


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> collection.Collection:
    root = tmp_path_factory.mktemp("clips")
    latent_folder.write(root / "64x64x17", 4)
    latent_folder.write(root / "64x32x17", 4, size=(3, 2, 1))
    return collection.index(root)


def data_of(clips: collection.Collection, batch: int = 2, **options: Any) -> Any:
    order = Order(clips.counts, batch, seed=3)
    options = {"connect": connect, "count": COUNT} | options
    return reading.batches(clips, order=order, **options)


def same(a: Any, b: Any) -> None:
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize("ahead", [0, 1, 3])
def test_what_is_read_ahead_is_what_is_read_when_needed(clips, ahead):
    data = data_of(clips)
    with reading.opened(data, ahead=ahead) as reader:
        for number in range(COUNT):
            same(reader(number), data[number])


def test_batches_have_the_sizes_of_their_bucket_and_names_of_their_clips(clips):
    data = data_of(clips)
    widths = {"64x64x17": 2, "64x32x17": 1}
    for number in range(COUNT):
        names = data.names(number)
        (size,) = {name.split("/")[0] for name in names}
        assert data[number].video.shape == (2, 3, 2, widths[size], 128)


def test_the_position_is_that_of_batches_handed_out_not_of_those_that_wait(clips):
    data = data_of(clips)
    read: list[int] = []
    source = reading.Batches(
        clips, data.order, COUNT, np.arange(2),
        lambda at: read.append(1) or data.sample(at),
    )  # fmt: skip
    with reading.opened(source, ahead=3) as reader:
        for number in range(4):
            reader(number)
        deadline = time.monotonic() + 10
        while len(read) < 2 * 7 and time.monotonic() < deadline:
            time.sleep(0.01)
        position = reader.position()
    assert len(read) == 2 * 7  # three batches wait
    assert position == {"next_index": 4}
    for ahead in (0, 2):  # read ahead or not, by whatever else read before
        opened = reading.opened(data, ahead=ahead, seen=4, position=position)
        with opened as reader:
            for number in range(4, COUNT):
                same(reader(number), data[number])


def test_a_run_without_a_saved_position_goes_on_by_its_number_of_batches(clips):
    data = data_of(clips)
    with reading.opened(data, seen=5) as reader:
        same(reader(5), data[5])
        assert reader.position() == {"next_index": 6}


def test_a_position_of_another_place_is_refused(clips):
    data = data_of(clips)
    for position, message in (
        ({"next_index": 3}, "reader stands at batch 3, the training state at 4"),
        ({"next": 4}, "position {'next': 4} of the reader is of another version"),
    ):
        with pytest.raises(ValueError, match=message):
            with reading.opened(data, seen=4, position=position):
                pass
    with reading.opened(data) as reader:
        with pytest.raises(ValueError, match="at batch 0, the training state at 1"):
            reader(1)


@pytest.mark.parametrize("seen", [COUNT, COUNT + 3])
def test_a_finished_run_reads_nothing(clips, seen):
    data = data_of(clips)
    read: list[int] = []
    source = dataclasses.replace(data, sample=lambda at: read.append(1))
    with reading.opened(source, seen=seen, position={"next_index": seen}) as reader:
        assert reader.position() is not None
    assert read == []


@pytest.mark.parametrize("hosts", [2, 4])
def test_hosts_read_their_rows_and_know_all_names(clips, hosts):
    whole = data_of(clips, 4)
    parts = [data_of(clips, 4, rows=own) for own in np.split(np.arange(4), hosts)]
    for number in range(4):
        read = [part[number] for part in parts]
        joined = jax.tree.map(lambda *rows: np.concatenate(rows), *read)
        same(joined, whole[number])
        assert {tuple(part.names(number)) for part in parts} == {
            tuple(whole.names(number))
        }


def test_connectors_run_once_per_clip_while_it_is_kept(clips):
    calls: list[int] = []

    def counting(features: AV, mask: Any) -> Prompt:
        calls.append(1)
        time.sleep(0.002)
        return connect(features, mask)

    with reading.opened(data_of(clips, 4, connect=counting), ahead=4) as reader:
        for number in range(COUNT):
            reader(number)
    assert len(calls) == len(clips.clips)
    calls.clear()
    few = data_of(clips, 4, connect=counting, cached=1)
    for number in range(4):
        few[number]
    assert len(calls) > len(clips.clips)


def test_threads_make_a_kept_value_once_and_failures_are_not_kept():
    made: list[int] = []
    begin = threading.Barrier(4)

    def of(key: int) -> int:
        made.append(key)
        if key < 0:
            raise ValueError("bad")
        return key * key

    get = reading.kept(of, 2)
    found: list[int] = []

    def ask() -> None:
        begin.wait()
        found.append(get(3))

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [9] * 4 and made == [3]
    assert [get(4), get(5), get(3)] == [16, 25, 9]
    assert made == [3, 4, 5, 3]  # two are kept
    for _ in range(2):
        with pytest.raises(ValueError, match="bad"):
            get(-1)
    assert made[-2:] == [-1, -1]


def test_a_clip_that_cannot_be_read_is_told_when_its_batch_is_due(tmp_path):
    root = latent_folder.write(tmp_path, 4)
    clips = collection.index(root)
    data = data_of(clips)
    bad = data.names(2)[0]
    path = root / latents.AUDIO / f"{bad}.safetensors"
    path.write_bytes(path.read_bytes()[:200])
    first = next(n for n in range(COUNT) if bad in data.names(n))
    with reading.opened(data, ahead=3) as reader:
        for number in range(first):
            reader(number)
        for _ in range(2):  # still so when asked again
            with pytest.raises(ValueError, match=r"audio_latents.* is damaged"):
                reader(first)


def test_reading_ahead_hides_what_reading_costs(clips):
    slow = 0.05

    def sleeping(features: AV, mask: Any) -> Prompt:
        time.sleep(slow / 4)
        return connect(features, mask)

    def seconds(ahead: int) -> float:
        data = data_of(clips, 4, connect=sleeping, cached=0)
        with reading.opened(data, ahead=ahead) as reader:
            reader(0)
            begun = time.perf_counter()
            for number in range(1, 9):
                time.sleep(slow)  # a step
                reader(number)
            return time.perf_counter() - begun

    assert seconds(3) < 0.85 * seconds(0)


def test_reading_needs_neither_tensorflow_nor_torch():
    import subprocess
    import sys

    script = (
        "import sys, grain; from idlora_jax.data import reading\n"
        "print(sorted({m.split('.')[0] for m in sys.modules} "
        "& {'tensorflow', 'torch'}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout == "[]\n"
