"""Media files that the tests make, read back."""

import resource
import struct
import wave as wave_file

import av
import numpy as np
import pytest
from PIL import Image

from idlora_jax import media

RATE = 16000


def melody(rate, seconds=0.8):
    """A gliding tone with a pulsing envelope, below 2 kHz: [N]."""
    t = np.arange(round(seconds * rate)) / rate
    tone = np.sin(2 * np.pi * (300 * t + 600 * t**2))
    return (0.5 * tone * (1 + 0.5 * np.sin(2 * np.pi * 5 * t))).astype(np.float32)


def save(path, codec, waves, rate, layout):
    """Encode [channels N] with PyAV; the container follows the file's name."""
    with av.open(str(path), "w") as output:
        stream = output.add_stream(codec, rate=rate, layout=layout)
        samples = np.ascontiguousarray(waves, np.float32)
        frame = av.AudioFrame.from_ndarray(samples, "fltp", layout)
        frame.sample_rate, frame.pts = rate, 0
        output.mux(stream.encode(frame))
        output.mux(stream.encode())
    return path


def save_wav(path, waves, rate=RATE):
    """16-bit PCM by the standard library, any number of channels."""
    with wave_file.open(str(path), "wb") as file:
        file.setnchannels(len(waves))
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes((np.asarray(waves).T * 32767).astype("<i2").tobytes())
    return path


def grey_clip(frames, height=32, width=48):
    """Frame n is a flat grey of 20 + 5 n: [F H W 3]."""
    levels = (20 + 5 * np.arange(frames)).astype(np.uint8)
    return np.broadcast_to(levels[:, None, None, None], (frames, height, width, 3))


def numbers(frames):
    """Which frames of `grey_clip` these are."""
    return np.rint((frames.mean(axis=(1, 2, 3)) - 20) / 5).astype(int).tolist()


def tone_pair(rate, seconds):
    wave = melody(rate, seconds)
    return np.stack([wave, -wave])


# Sound


@pytest.mark.parametrize(
    ("name", "codec", "rate", "layout"),
    [
        ("a.wav", "pcm_s16le", 8000, "mono"),
        ("a.wav", "pcm_s24le", 44100, "stereo"),
        ("a.wav", "pcm_f32le", 16000, "stereo"),
        ("a.wav", "pcm_u8", 22050, "mono"),
        ("a.wav", "pcm_s16le", 48000, "5.1"),
        ("a.flac", "flac", 22050, "mono"),
        ("a.flac", "flac", 44100, "5.1"),
        ("a.mp3", "libmp3lame", 44100, "stereo"),
        ("a.mp3", "libmp3lame", 24000, "mono"),
        ("a.m4a", "aac", 48000, "stereo"),
        ("a.m4a", "aac", 24000, "mono"),
        ("a.mp4", "aac", 48000, "5.1"),
        ("a.mkv", "aac", 16000, "stereo"),
        ("a.ogg", "libopus", 48000, "stereo"),
    ],
)
@pytest.mark.parametrize("numerics", ["exact", "reference"])
def test_any_sound_file_comes_back_at_16_khz_stereo(
    tmp_path, name, codec, rate, layout, numerics
):
    channels = {"mono": 1, "stereo": 2, "5.1": 6}[layout]
    waves = np.tile(melody(rate), (channels, 1))
    path = save(tmp_path / name, codec, waves, rate, layout)
    got = media.read_audio(path, RATE, numerics=numerics)
    want = melody(RATE)
    assert got.shape[0] == 2 and got.dtype == np.float32
    padding = 0.065 if name == "a.mkv" else 0.001
    assert abs(got.shape[1] - want.size) <= padding * RATE
    n = min(got.shape[1], want.size)
    assert min(np.corrcoef(side[:n], want[:n])[0, 1] for side in got) > 0.98
    if channels <= 2:
        np.testing.assert_allclose(
            got.std(), want.std(), rtol=0.06
        )  # lame scales by 0.95


def test_left_stays_left_and_mono_can_be_asked_for(tmp_path):
    left, right = melody(RATE), 0.25 * melody(RATE)[::-1]
    path = save_wav(tmp_path / "a.wav", [left, right])
    np.testing.assert_allclose(media.read_audio(path), [left, right], atol=1e-4)
    mono = media.read_audio(path, channels=1)
    np.testing.assert_allclose(mono, [(left + right) / 2], atol=1e-4)


@pytest.mark.parametrize("make", ["named", "unnamed"])
def test_surround_is_mixed_to_the_side_it_belongs_to(tmp_path, make):
    gains = {}
    for place, name in enumerate(["FL", "FR", "FC", "LFE", "BL", "BR"]):
        waves = np.zeros((6, 8000), np.float32)
        waves[place] = melody(RATE, 0.5)
        waves[0] += 0.01 * melody(RATE, 0.5)  # the low-frequency channel alone is lost
        path = tmp_path / f"{name}.wav"
        if make == "named":
            save(path, "pcm_s16le", waves, RATE, "5.1")
        else:
            save_wav(path, waves)
        gains[name] = np.abs(media.read_audio(path)).max(axis=1)
    assert gains["FL"][0] > 0.2 and gains["FL"][1] == 0
    assert gains["BL"][0] > 0.15 and gains["BL"][1] == 0
    assert gains["FR"][1] > 0.2 and gains["BR"][1] > 0.15
    np.testing.assert_allclose(gains["FC"][0], gains["FC"][1], rtol=0.03)
    assert gains["LFE"].max() < 0.01


def test_a_wav_round_trip_is_exact_to_16_bits(tmp_path):
    wave = tone_pair(24000, 0.3)
    media.write_wav(tmp_path / "new" / "a.wav", wave, 24000)
    got = media.read_audio(tmp_path / "new" / "a.wav", 24000)
    np.testing.assert_allclose(got, wave, atol=2 / 32768)


def test_sound_is_read_from_a_video_and_has_its_length(tmp_path):
    wave = tone_pair(24000, 17 / 25)
    media.write_video(tmp_path / "a.mp4", grey_clip(17), wave, 24000)
    got = media.read_audio(tmp_path / "a.mp4", 24000)
    assert got.shape == wave.shape
    assert np.corrcoef(got.ravel(), wave.ravel())[0, 1] > 0.99


SOURCES = {
    "wav": ("a.wav", "pcm_s16le"),
    "flac": ("a.flac", "flac"),
    "mp3": ("a.mp3", "libmp3lame"),
    "m4a": ("a.m4a", "aac"),
    "mkv": ("a.mkv", "aac"),
}


@pytest.mark.parametrize("kind", SOURCES)
def test_a_truncated_sound_file_is_refused(tmp_path, kind):
    name, codec = SOURCES[kind]
    waves = np.tile(melody(24000, 2.0), (2, 1))
    path = save(tmp_path / name, codec, waves, 24000, "stereo")
    media.read_audio(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ValueError, match=r"read_audio: .*truncated"):
        media.read_audio(path)


def test_a_truncated_mp4_with_its_header_in_front_is_refused(tmp_path):
    path = tmp_path / "a.mp4"
    media.write_video(path, grey_clip(50), tone_pair(24000, 2.0), 24000)
    path.write_bytes(path.read_bytes()[:-15000])
    with pytest.raises(ValueError, match=r"read_audio: .*truncated"):
        media.read_audio(path)


def bad_sound(folder, kind):
    """A path that read_audio must refuse."""
    path = folder / "a.wav"
    silence = np.zeros((1, 8000), np.float32)
    if kind == "folder":
        path.mkdir()
    elif kind == "text":
        path.write_text("this is not sound")
    elif kind == "nothing":
        path.write_bytes(b"")
    elif kind == "no samples":
        save_wav(path, silence[:, :0])
    elif kind == "zeros":
        save_wav(path, silence)
    elif kind == "quiet":
        save_wav(path, silence + 3e-4)
    elif kind == "nan":
        silence[0, 100] = np.nan
        save(path, "pcm_f32le", silence + 0.1, RATE, "mono")
    elif kind == "film":
        path = folder / "a.mp4"
        media.write_video(path, grey_clip(5), None)
    return path


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("missing", "got no such file"),
        ("folder", "got a folder"),
        ("text", "got a damaged, truncated or unknown file"),
        ("nothing", "got a damaged, truncated or unknown file"),
        ("no samples", "got empty audio"),
        ("zeros", r"got silent audio \(peak all zeros\)"),
        ("quiet", r"got silent audio \(peak -7\d dBFS\), expected a peak above -60"),
        ("nan", "got NaN"),
        ("film", "got no audio stream"),
    ],
)
def test_unusable_sound_is_one_line_with_path_and_advice(tmp_path, kind, message):
    path = bad_sound(tmp_path, kind)
    with pytest.raises(ValueError, match=message) as error:
        media.read_audio(path)
    text = str(error.value)
    assert str(path) in text and "expected" in text and ";" in text
    assert "\n" not in text


# Pictures


def corners():
    """[4 6 3]: red at the top left, green at the top right, blue at the bottom left."""
    image = np.zeros((4, 6, 3), np.uint8)
    image[:2, :3], image[:2, 3:], image[2:, :3] = (255, 0, 0), (0, 255, 0), (0, 0, 255)
    return image


def test_png_round_trip_is_exact(tmp_path):
    media.write_png(tmp_path / "a.png", corners())
    np.testing.assert_array_equal(media.read_image(tmp_path / "a.png"), corners())


@pytest.mark.parametrize(
    ("orientation", "turn"),
    [
        (1, lambda x: x),
        (2, lambda x: x[:, ::-1]),
        (3, lambda x: x[::-1, ::-1]),
        (5, lambda x: x.swapaxes(0, 1)),
        (6, lambda x: np.rot90(x, -1)),
        (8, np.rot90),
    ],
)
def test_exif_rotation_is_applied(tmp_path, orientation, turn):
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(corners()).save(tmp_path / "a.png", exif=exif)
    got = media.read_image(tmp_path / "a.png")
    np.testing.assert_array_equal(got, turn(corners()))


def test_alpha_is_dropped(tmp_path):
    alpha = np.full((4, 6, 1), 7, np.uint8)
    rgba = Image.fromarray(np.concatenate([corners(), alpha], axis=-1))
    rgba.save(tmp_path / "a.png")
    np.testing.assert_array_equal(media.read_image(tmp_path / "a.png"), corners())
    palette = rgba.convert("RGB").quantize(4)
    palette.info["transparency"] = bytes([0, 128, 255, 255])
    palette.save(tmp_path / "b.png", transparency=palette.info["transparency"])
    np.testing.assert_array_equal(media.read_image(tmp_path / "b.png"), corners())


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16"])
def test_every_picture_mode_becomes_rgb(tmp_path, mode):
    image = Image.fromarray(np.full((4, 6, 3), 255, np.uint8))
    if mode == "I;16":
        image = Image.fromarray(np.full((4, 6), 65535, np.uint16))
    path = tmp_path / ("a.tif" if mode == "CMYK" else "a.png")
    (image if mode == "I;16" else image.convert(mode)).save(path)
    got = media.read_image(path)
    np.testing.assert_array_equal(got, np.full((4, 6, 3), 255, np.uint8))


def test_sixteen_bits_keep_their_greys(tmp_path):
    ramp = np.linspace(0, 65535, 24).astype(np.uint16).reshape(4, 6)
    Image.fromarray(ramp).save(tmp_path / "a.png")
    got = media.read_image(tmp_path / "a.png")
    np.testing.assert_allclose(got[..., 0], ramp / 257, atol=0.5)


def test_the_first_frame_of_a_video_or_gif_is_a_picture(tmp_path):
    media.write_video(tmp_path / "a.mp4", grey_clip(9), None)
    got = media.read_image(tmp_path / "a.mp4")
    assert got.shape == (32, 48, 3) and abs(got.mean() - 20) < 2
    frames = [Image.fromarray(f) for f in grey_clip(3)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert abs(media.read_image(tmp_path / "a.gif").mean() - 20) < 2


def test_a_phone_video_is_turned_upright(tmp_path):
    path = tmp_path / "a.mp4"
    big = corners().repeat(16, axis=0).repeat(16, axis=1)
    media.write_video(path, np.stack([big] * 3), None)
    data = path.read_bytes()
    unit, quarter = 0x10000, (0, 0x10000, 0, -0x10000, 0, 0, 0, 0, 0x40000000)
    plain = struct.pack(">9i", unit, 0, 0, 0, unit, 0, 0, 0, 0x40000000)
    start = data.index(plain, data.index(b"tkhd"))
    turned = data[:start] + struct.pack(">9i", *quarter) + data[start + 36 :]
    path.write_bytes(turned)
    got = media.read_image(path)
    want = np.rot90(big, -1)  # this matrix asks for a quarter turn clockwise
    assert got.shape == want.shape
    assert np.abs(got.astype(int) - want)[4:-4, 4:-4].mean() < 12
    assert media.read_video(path).shape == (3, *want.shape)


@pytest.mark.parametrize("name", ["a.png", "a.jpg"])
def test_a_truncated_picture_is_refused(tmp_path, name):
    path = tmp_path / name
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    Image.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ValueError, match=r"read_image: .*truncated"):
        media.read_image(path)


def test_a_missing_picture_or_a_sound_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no such file"):
        media.read_image(tmp_path / "none.png")
    save_wav(tmp_path / "a.wav", melody(RATE)[None])
    with pytest.raises(ValueError, match="no video stream"):
        media.read_image(tmp_path / "a.wav")


# Video


def test_a_video_round_trip_keeps_pictures_and_colours(tmp_path):
    y, x = np.mgrid[0:64, 0:96] / 96
    pictures = np.stack([x, y, 0.5 + 0.4 * np.sin(6 * x + 3 * y)], axis=-1)
    frames = np.stack([np.roll(pictures, 3 * i, axis=1) for i in range(9)])
    frames = (frames * 235 + 10).astype(np.uint8)
    media.write_video(tmp_path / "a.mp4", frames, tone_pair(48000, 0.36), 48000)
    got = media.read_video(tmp_path / "a.mp4")
    assert got.shape == frames.shape and got.dtype == np.uint8
    error = np.mean((got.astype(float) - frames) ** 2)
    assert 10 * np.log10(255**2 / error) > 30


def test_colours_keep_their_values(tmp_path):
    colours = np.random.default_rng(0).integers(40, 216, (2, 4, 3), np.uint8)
    frame = colours.repeat(16, axis=0).repeat(16, axis=1)
    media.write_video(tmp_path / "a.mp4", np.stack([frame] * 4), None, crf=5)
    got = media.read_video(tmp_path / "a.mp4")[2].astype(int)
    middles = got.reshape(2, 16, 4, 16, 3)[:, 5:11, :, 5:11].mean(axis=(1, 3))
    np.testing.assert_allclose(middles, colours, atol=2.5)


def delay(got, want):
    """Samples by which the first channel of `got` lags behind that of `want`."""
    size = 2 * want.shape[1]
    cross = np.fft.rfft(got[0], size) * np.fft.rfft(want[0], size).conj()
    peak = int(np.fft.irfft(cross / (abs(cross) + 1e-9), size).argmax())
    return peak if peak < size // 2 else peak - size


def levels(frames):
    """A different grey for each of many frames: [F]."""
    return 20 + 7 * np.arange(frames) % 200


def decoded(path):
    """(times of the frames, start of the sound, its samples), as a player sees them."""
    with av.open(str(path)) as container:
        times = [frame.time for frame in container.decode(video=0)]
    with av.open(str(path)) as container:
        parts = list(container.decode(audio=0))
    return np.array(times), parts[0].time, sum(part.samples for part in parts)


FPS = (8, 24, 25.0, 29.97, 30, 30000 / 1001, 60)
LENGTHS = (1, 9, 25, 121)


@pytest.mark.parametrize("fps", FPS)
@pytest.mark.parametrize("frames", LENGTHS)
def test_sound_and_pictures_start_and_end_together(tmp_path, frames, fps):
    path, place = tmp_path / "a.mp4", FPS.index(fps) + LENGTHS.index(frames)
    rate = (16000, 24000, 48000)[place % 3]
    samples = round(frames / fps * rate)
    wave = np.random.default_rng(0).normal(0, 0.15, (2, samples)).astype(np.float32)
    grey = levels(frames).astype(np.uint8)[:, None, None, None]
    clip = np.broadcast_to(grey, (frames, 32, 32, 3))
    media.write_video(path, clip, wave, rate, fps=fps)
    got, pictures = media.read_audio(path, rate), media.read_video(path, fps)
    assert got.shape == wave.shape and abs(delay(got, wave)) <= 1
    assert len(pictures) == frames
    means = pictures.mean(axis=(1, 2, 3))
    np.testing.assert_allclose(means, levels(frames), atol=2)
    times, start, heard = decoded(path)
    np.testing.assert_allclose(times, np.arange(frames) / fps, atol=1e-3)
    assert start == 0 and samples <= heard < samples + 1024


@pytest.mark.parametrize(
    ("frames", "fps", "rate"),
    [(1, 25.0, 24000), (9, 29.97, 16000), (25, 24.0, 44100), (121, 30, 48000)],
)
@pytest.mark.parametrize("share", [0.4, 1.7])
def test_a_sound_of_another_length_is_cut_or_padded(tmp_path, frames, fps, rate, share):
    seconds = frames / fps
    clip = np.zeros((frames, 32, 32, 3), np.uint8)
    wave = tone_pair(rate, seconds * share)
    media.write_video(tmp_path / "a.mp4", clip, wave, rate, fps=fps)
    found = media.probe(tmp_path / "a.mp4")
    assert (found.video_codec, found.audio_codec) == ("h264", "aac")
    assert (found.height, found.width, found.rate, found.channels) == (32, 32, rate, 2)
    assert abs(found.fps - fps) < 1e-3
    assert abs(found.video_s - seconds) < 2 / rate
    assert abs(found.audio_s - seconds) < 2 / rate
    got = media.read_audio(tmp_path / "a.mp4", rate)
    assert got.shape[1] == round(seconds * rate)
    if share < 1:
        assert np.abs(got[:, wave.shape[1] + 2048 :]).max(initial=0) < 0.01


@pytest.mark.parametrize(
    ("rate", "least", "most"),
    [(48000, 185, 200), (24000, 185, 200), (16000, 135, 200), (8000, 40, 100)],
)
def test_sound_gets_192_kbit_a_second_where_its_rate_allows(
    tmp_path, rate, least, most
):
    wave = np.random.default_rng(0).normal(0, 0.2, (2, 4 * rate)).astype(np.float32)
    clip = np.zeros((100, 32, 32, 3), np.uint8)
    media.write_video(tmp_path / "a.mp4", clip, wave, rate)
    with av.open(str(tmp_path / "a.mp4")) as container:
        size = sum(packet.size for packet in container.demux(audio=0))
    assert least < size * 8 / 4 / 1000 < most


def test_a_higher_crf_makes_a_smaller_file_that_is_farther_off(tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (9, 8, 8, 3), np.uint8)
    noise = noise.repeat(8, axis=1).repeat(8, axis=2)
    sizes, errors = [], []
    for crf in (5, 17, 35, 51):
        path = tmp_path / f"{crf}.mp4"
        media.write_video(path, noise, None, crf=crf)
        sizes.append(path.stat().st_size)
        errors.append(np.abs(media.read_video(path).astype(float) - noise).mean())
    assert len(set(sizes)) == 4 and sizes == sorted(sizes, reverse=True)
    assert len(set(errors)) == 4 and errors == sorted(errors)


def colours(source):
    """Primaries, transfer, matrix and range of the first decoded frame."""
    with av.open(str(source)) as container:
        frame = next(container.decode(video=0))
        context = container.streams.video[0].codec_context
        assert context.pix_fmt == "yuv420p"
        found = [frame.color_primaries, frame.color_trc, frame.colorspace]
        of_codec = [context.color_primaries, context.color_trc, context.colorspace]
        assert [int(x) for x in found] == [int(x) for x in of_codec]
        return [*map(int, found), int(frame.color_range)]


def test_colour_tags_are_in_the_container_and_in_the_stream(tmp_path):
    path, bare = tmp_path / "a.mp4", tmp_path / "a.h264"
    media.write_video(path, grey_clip(3), None)
    bt709, limited = 1, 1  # ITU-T H.273; FFmpeg's AVCOL_RANGE_MPEG
    assert colours(path) == [bt709, bt709, bt709, limited]
    data = path.read_bytes()
    place = data.index(b"colr") + 4
    assert data[place : place + 11] == b"nclx" + struct.pack(">3HB", 1, 1, 1, 0)
    with av.open(str(path)) as source, av.open(str(bare), "w") as output:
        stream = output.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                output.mux(packet)
    assert colours(bare) == [bt709, bt709, bt709, limited]


def test_the_same_clip_gives_the_same_bytes(tmp_path):
    for name in ("a.mp4", "b.mp4"):
        media.write_video(tmp_path / name, grey_clip(9), tone_pair(24000, 0.36))
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()


def test_metadata_is_readable_and_unknown_tags_are_refused(tmp_path):
    tags = {"title": "a clip", "comment": '{"synthetic": true, "text": "„ü“"}'}
    media.write_video(tmp_path / "a.mp4", grey_clip(3), None, metadata=tags)
    assert tags.items() <= dict(media.probe(tmp_path / "a.mp4").metadata).items()
    with pytest.raises(ValueError, match=r"\['sead'\].*comment"):
        media.write_video(
            tmp_path / "b.mp4", grey_clip(3), None, metadata={"sead": "1"}
        )
    assert not (tmp_path / "b.mp4").exists()


@pytest.mark.parametrize(
    ("fps", "want"),
    [
        (25.0, [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]),
        (12.5, [0, 2, 4, 6, 8]),
        (50.0, [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7, 8, 8, 9, 9]),
        (10.0, [0, 2, 5, 7]),
    ],
)
def test_frames_are_taken_at_the_nearest_time(tmp_path, fps, want):
    media.write_video(tmp_path / "a.mp4", grey_clip(10), None, crf=5)
    assert numbers(media.read_video(tmp_path / "a.mp4", fps)) == want


def test_a_stretch_of_a_video_can_be_read(tmp_path):
    path = tmp_path / "a.mp4"
    media.write_video(path, grey_clip(20), None, crf=5)
    assert numbers(media.read_video(path, frames=3)) == [0, 1, 2]
    assert numbers(media.read_video(path, frames=3, start_s=0.4)) == [10, 11, 12]
    assert numbers(media.read_video(path, start_s=0.6)) == [15, 16, 17, 18, 19]
    assert len(media.read_video(path, frames=20)) == 20
    with pytest.raises(ValueError, match=r"got 20 frames .*expected at least 21"):
        media.read_video(path, frames=21)
    with pytest.raises(ValueError, match=r"got 0 frames .*from 2 s"):
        media.read_video(path, start_s=2.0)
    with pytest.raises(ValueError, match="expected fps > 0"):
        media.read_video(path, fps=0)


def test_video_reading_refuses_what_is_no_video(tmp_path):
    save_wav(tmp_path / "a.wav", melody(RATE)[None])
    with pytest.raises(ValueError, match="no video stream"):
        media.read_video(tmp_path / "a.wav")
    with pytest.raises(ValueError, match="no such file"):
        media.read_video(tmp_path / "none.mp4")
    with pytest.raises(ValueError, match="no such file"):
        media.probe(tmp_path / "none.mp4")


@pytest.mark.parametrize(
    ("shape", "rate", "level", "message"),
    [
        ((3, 31, 32, 3), 24000, 0.1, "even height and width"),
        ((0, 32, 32, 3), 24000, 0.1, "at least one frame"),
        ((3, 32, 32, 3), 23456, 0.1, "got sound at 23456 Hz"),
        ((3, 32, 32, 3), 24000, np.nan, "got NaN"),
    ],
)
def test_what_cannot_be_encoded_is_refused(tmp_path, shape, rate, level, message):
    wave = np.full((2, 1000), level, np.float32)
    with pytest.raises(ValueError, match=message):
        media.write_video(tmp_path / "a.mp4", np.zeros(shape, np.uint8), wave, rate)
    assert not list(tmp_path.iterdir())


# Nothing half-written


@pytest.fixture
def full_disk():
    """Writes beyond 2 kB of a file fail, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2048, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


NOISE = np.random.default_rng(0).integers(0, 255, (9, 64, 64, 3), np.uint8)
WRITERS = {
    "a.mp4": lambda path: media.write_video(path, NOISE, tone_pair(24000, 0.36)),
    "a.wav": lambda path: media.write_wav(path, tone_pair(24000, 0.36), 24000),
    "a.png": lambda path: media.write_png(path, NOISE[0]),
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_full_disk_is_reported_and_the_old_file_stays(tmp_path, full_disk, name):
    path = tmp_path / name
    with pytest.raises(OSError, match=r"could not write .*free some disk space"):
        WRITERS[name](path)
    assert not list(tmp_path.iterdir())
    path.write_bytes(b"old")
    with pytest.raises(OSError, match=str(path)):
        WRITERS[name](path)
    assert path.read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("name", WRITERS)
def test_a_folder_that_is_a_file_is_reported(tmp_path, name):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="could not write"):
        WRITERS[name](tmp_path / "file" / name)


def test_an_encoder_that_fails_leaves_no_file(tmp_path, monkeypatch):
    def fail(*_):
        raise RuntimeError("encoder")

    monkeypatch.setattr(media, "_encode_wave", fail)
    with pytest.raises(RuntimeError, match="encoder"):
        WRITERS["a.mp4"](tmp_path / "a.mp4")
    assert not list(tmp_path.iterdir())
