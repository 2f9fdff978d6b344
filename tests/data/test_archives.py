"""Archives as streams: what is read, what is refused, where memory stops."""

from __future__ import annotations

import io
import pathlib
import tarfile

import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from published_folder import tar

from idlora_jax.data import archives


@pytest.fixture
def folder(tmp_path: pathlib.Path) -> pathlib.Path:
    for n in range(3):
        path = tmp_path / "in" / "a" / f"{n}.pt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes([n]) * (700 * n))
    return tmp_path / "in"


NAMES = ["a/0.pt", "a/1.pt", "a/2.pt"]


def contents(path: pathlib.Path) -> dict[str, bytes]:
    return {m.path: m.read() for m in archives.members(path)}


@pytest.mark.parametrize("suffix", [".tar", ".tar.zst"])
def test_members_are_read_one_by_one(folder, tmp_path, suffix):
    path = tar(tmp_path / f"x{suffix}", folder, ["a", *NAMES])
    expected = {name: (folder / name).read_bytes() for name in NAMES}
    assert contents(path) == expected
    told: list[int] = []
    assert [m.nbytes for m in archives.members(path, told.append)] == [0, 700, 1400]
    assert sum(told) == path.stat().st_size


def test_long_names_of_both_kinds_are_understood(folder, tmp_path):
    long = "a/" + "n" * 150 + "/é.pt"
    for form in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        out = io.BytesIO()
        with tarfile.open(fileobj=out, mode="w", format=form) as archive:
            info = tarfile.TarInfo(long)
            info.size, info.mtime = 3, 1.5  # pax notes the fraction
            archive.addfile(info, io.BytesIO(b"abc"))
            archive.addfile(tarfile.TarInfo("b.pt"))
        path = tmp_path / "x.tar"
        path.write_bytes(out.getvalue())
        assert contents(path) == {long: b"abc", "b.pt": b""}


def test_frames_of_zstd_one_after_the_other_are_one_stream(folder, tmp_path):
    data = tar(tmp_path / "x.tar", folder, NAMES).read_bytes()
    path = tmp_path / "x.tar.zst"
    compress = zstandard.ZstdCompressor().compress
    path.write_bytes(compress(data[:1000]) + compress(data[1000:]))
    assert list(contents(path)) == NAMES


@pytest.mark.parametrize(
    "name", ["/etc/passwd", "../a.pt", "a/../../b.pt", "a\\b.pt", "C:/a.pt"]
)
def test_paths_that_lead_elsewhere_are_refused(folder, tmp_path, name):
    def rename(info: tarfile.TarInfo) -> None:
        info.name = name

    path = tar(tmp_path / "x.tar", folder, NAMES[:1], rename)
    with pytest.raises(ValueError, match=r"x\.tar: got a member whose path leads"):
        contents(path)


@pytest.mark.parametrize(
    "kind",
    [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE,
     tarfile.FIFOTYPE, tarfile.GNUTYPE_SPARSE, tarfile.GNUTYPE_LONGLINK],
)  # fmt: skip
def test_links_devices_and_sparse_files_are_refused(folder, tmp_path, kind):
    def turn(info: tarfile.TarInfo) -> None:
        info.type, info.linkname = kind, "/etc/passwd"

    path = tar(tmp_path / "x.tar", folder, NAMES[:1], turn)
    with pytest.raises(ValueError, match="a link, device or sparse file"):
        contents(path)


def raw(tmp_path: pathlib.Path, *infos: tuple[tarfile.TarInfo, bytes]) -> pathlib.Path:
    path = tmp_path / "x.tar"
    blocks = [info.tobuf() + data + b"\0" * (-len(data) % 512) for info, data in infos]
    path.write_bytes(b"".join(blocks) + b"\0" * 1024)
    return path


def note(kind: bytes, size: int) -> tarfile.TarInfo:
    info = tarfile.TarInfo("note")
    info.type, info.size = kind, size
    return info


def test_large_members_and_notes_are_refused_before_they_are_read(tmp_path):
    huge = note(tarfile.REGTYPE, archives.LARGEST + 1)
    with pytest.raises(ValueError, match="a member of 1,073,741,825 bytes"):
        contents(raw(tmp_path, (huge, b"")))
    for kind in (tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.XGLTYPE):
        with pytest.raises(ValueError, match="a note of 1,000,000 bytes"):
            contents(raw(tmp_path, (note(kind, 1_000_000), b"")))


@pytest.mark.parametrize(
    "text", [b"30 GNU.sparse.realsize=123456\n", b"16 size=1234567\n", b"x path=a\n"]
)
def test_notes_that_change_more_than_the_name_are_refused(tmp_path, text):
    with pytest.raises(ValueError, match=r"x\.tar: got "):
        contents(raw(tmp_path, (note(tarfile.XHDTYPE, len(text)), text)))


@pytest.mark.parametrize("suffix", [".tar", ".tar.zst"])
def test_truncated_archives_are_refused(folder, tmp_path, suffix):
    path = tar(tmp_path / f"x{suffix}", folder, NAMES)
    data = path.read_bytes()
    end = len(data) if suffix == ".tar.zst" else 5632  # the last of the members
    for length in range(0, end, end // 9):
        path.write_bytes(data[:length])
        with pytest.raises(ValueError, match=r"truncated|damaged"):
            contents(path)


def test_other_files_are_refused(tmp_path):
    for name, data in {"x.tar": b"no archive" * 99, "x.tar.zst": b"no" * 999}.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ValueError, match=f"{name}: got "):
            contents(tmp_path / name)
    with pytest.raises(ValueError, match="no such file"):
        contents(tmp_path / "none.tar")


@settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    changes=st.lists(st.tuples(st.integers(0, 5000), st.integers(0, 255)), max_size=4),
    suffix=st.sampled_from([".tar", ".tar.zst"]),
)
def test_any_bytes_changed_anywhere_give_members_or_one_error(
    folder, tmp_path, changes, suffix
):
    path = tar(tmp_path / f"x{suffix}", folder, NAMES)
    data = bytearray(path.read_bytes())
    for place, value in changes:
        data[place % len(data)] = value
    path.write_bytes(data)
    try:
        contents(path)
    except ValueError as error:
        assert str(error).startswith("archive: ")
