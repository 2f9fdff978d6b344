import dataclasses

import av
import bad_clips
import pytest
from bad_clips import SIZE

from idlora_jax import media
from idlora_jax.data import cuts, encode, rejection, synthetic
from idlora_jax.data.buckets import Bucket
from idlora_jax.data.manifest import Clip

NINE, LONG = Bucket(32, 32, 9), Bucket(32, 32, 25)


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """27 frames at 30 frames per second: 22.5 at 25."""
    path = tmp_path_factory.mktemp("clip") / "a.mp4"
    made = synthetic.clip(0, 0, 0, **{**SIZE, "frames": 27})
    media.write_video(path, made.frames, made.wave, fps=30)
    return Clip("a", path, "words", "anna")


def spans(found):
    return [(c.name, round(c.start_s, 3), str(c.bucket)) for c in found]


def test_frames_are_counted_at_the_wanted_rate(clip):
    (found,) = cuts.cuts(clip, [NINE], 25.0)
    assert (found.seconds, round(found.until_s, 2)) == (0.36, 0.9)
    assert encode.frames(found).shape == (9, 32, 32, 3)
    with pytest.raises(
        rejection.Rejection, match=r"got 23 frames \(0.92 s\) at 25 fps"
    ):
        cuts.cuts(clip, [LONG], 25.0)
    assert spans(cuts.cuts(clip, [LONG, NINE], 30.0)) == [("a", 0.0, "32x32x25")]


def test_segments_follow_each_other_as_long_as_there_is_room(clip):
    assert spans(cuts.cuts(clip, [NINE], 25.0, segments=9)) == [
        ("a", 0.0, "32x32x9"),
        ("a.s2", 0.36, "32x32x9"),
    ]
    assert len(cuts.cuts(clip, [NINE], 25.0, segments=1)) == 1


def test_start_and_end_bound_the_clip(clip):
    part = dataclasses.replace(clip, start_s=0.2, end_s=0.6)
    assert spans(cuts.cuts(part, [NINE], 25.0, 3)) == [("a", 0.2, "32x32x9")]
    for bounds in ({"start_s": 0.6}, {"end_s": 0.3}, {"start_s": 7.0}):
        outside = dataclasses.replace(clip, **bounds)
        with pytest.raises(rejection.Rejection) as error:
            cuts.cuts(outside, [NINE], 25.0)
        assert error.value.kind == "too short"


def test_a_clip_is_as_tall_as_it_is_shown(tmp_path, clip):
    path = tmp_path / "turned.mp4"
    made = synthetic.clip(0, 0, 0, **{**SIZE, "width": 64})
    media.write_video(tmp_path / "a.mp4", made.frames, made.wave)
    with av.open(str(tmp_path / "a.mp4")) as source, av.open(str(path), "w") as target:
        streams = {s: target.add_stream_from_template(s) for s in source.streams}
        streams[source.streams.video[0]].set_display_rotation(90)
        for packet in source.demux():
            if packet.dts is not None:
                packet.stream = streams[packet.stream]
                target.mux(packet)
    wide, tall = Bucket(32, 64, 9), Bucket(64, 32, 9)
    turned = dataclasses.replace(clip, video=path)
    assert cuts.cuts(turned, [wide, tall], 25.0)[0].bucket == tall


def test_a_plan_has_the_cuts_or_the_reason_of_every_clip(tmp_path, clip):
    bad_clips.write(tmp_path)
    names = ("mute.mp4", "broken.mp4", "gone.mp4")
    others = [dataclasses.replace(clip, name=n, video=tmp_path / n) for n in names]
    wordless = dataclasses.replace(clip, name="wordless", caption="")
    seen = []
    found = cuts.plan(
        [clip, *others, wordless],
        [NINE],
        25.0,
        workers=2,
        seen=lambda: seen.append(1),
    )
    kinds = [getattr(what, "kind", "good") for what in found.values()]
    assert kinds == ["good", "no audio", "unreadable", "unreadable", "empty caption"]
    assert len(seen) == 5


@pytest.mark.parametrize("keep", [0.6, 0.9])
def test_a_file_that_ends_early_is_rejected_when_it_is_decoded(tmp_path, clip, keep):
    data = clip.video.read_bytes()
    path = tmp_path / "silent no audio stream.mp4"
    path.write_bytes(data[: int(len(data) * keep)])
    part = dataclasses.replace(clip, video=path, start_s=0.5)
    kinds = []
    try:
        (found,) = cuts.cuts(part, [NINE], 25.0)
        encode.frames(found)
        encode.recording(path, 16000)
    except rejection.Rejection as error:
        kinds.append(error.kind)
    assert kinds in (["unreadable"], ["too short"])
