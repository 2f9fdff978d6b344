"""Data sets of latents as TFDS builders, and reading them back. No TensorFlow.

    <data_dir>/<name>/1.0.0/<name>-train.array_record-00000-of-00042
                            dataset_info.json, features.json, metadata.json

`tfds.data_source(name, data_dir=..., split="train")` opens it, and so does
`open_dataset`, which gives `Stored` clips. A record:

    name, speaker          text; speaker is empty where it is not known
    fps                    float32
    video                  [F H W C]
    audio, reference       [T M C], where the data set has them
    features               [S D], where both modalities have the same (generation 2.0)
    features_video, _audio [S D], [S Da] otherwise (2.3)
    mask                   [S] bool

TFDS cannot serialise bfloat16, so it is stored as its bits, in uint16; metadata.json
lists which tensors are. It also lists every clip with its sizes, so that an index needs
no record.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import tensorflow_datasets as tfds

from idlora_jax.data import published
from idlora_jax.data.stored import Clip, Stored
from idlora_jax.types import AV

VERSION = "1.0.0"
SPLIT = "train"
NAMES = ("idlora_celebvhq", "idlora_talkvid", "idlora_folder")
_BF16 = np.dtype(ml_dtypes.bfloat16)
_ABOUT = "Latents of talking people for ID-LoRA on LTX-2: {}. See {}."
_ORIGIN = {
    "idlora_celebvhq": (
        "pairs of clips of CelebV-HQ, 512x512",
        "https://huggingface.co/datasets/noakraicer/ID-LoRA-CelebVHQ",
    ),
    "idlora_talkvid": (
        "pairs of clips of TalkVid, latents at 512x512",
        "https://huggingface.co/datasets/noakraicer/ID-LoRA-TalkVid",
    ),
}


class Tensor(NamedTuple):
    """A tensor of every record: which axes vary (None), and its dtype."""

    shape: tuple[int | None, ...]
    dtype: str


Form = Mapping[str, Tensor]
"""The tensors of a data set's records, by name."""


def _tensors(clip: Stored) -> dict[str, np.ndarray]:
    """The tensors of a record, as they are."""
    both = clip.features.video is clip.features.audio
    features = {"features": clip.features.video}
    if not both:
        features = {
            "features_video": clip.features.video,
            "features_audio": clip.features.audio,
        }
    found = {"video": clip.video, "audio": clip.audio, "reference": clip.reference}
    found |= features | {"mask": clip.mask}
    return {name: x for name, x in found.items() if x is not None}


def features(form: Form) -> tfds.features.FeaturesDict:
    """The features of a data set; tensors are stored as their bytes."""

    def feature(tensor: Tensor) -> tfds.features.Tensor:
        dtype = np.uint16 if tensor.dtype == _BF16.name else np.dtype(tensor.dtype).type
        return tfds.features.Tensor(shape=tensor.shape, dtype=dtype, encoding="bytes")

    return tfds.features.FeaturesDict(
        {
            "name": tfds.features.Text(),
            "speaker": tfds.features.Text(),
            "fps": tfds.features.Scalar(dtype=np.float32),
            **{name: feature(tensor) for name, tensor in form.items()},
        }
    )


def serialiser(form: Form) -> Callable[[Mapping[str, Any]], bytes]:
    """What turns a record into bytes, the same ones for the same record.

    TFDS leaves the order of a record's tensors to chance, so that no two runs write the
    same file.
    """
    known: Any = features(form)
    serializer = tfds.core.ExampleSerializer(known.get_serialized_info())

    def serialise(record: Mapping[str, Any]) -> bytes:
        example: Any = serializer.get_tf_example(known.encode_example(record))
        return example.SerializeToString(deterministic=True)

    return serialise


def cast(clip: Stored, dtype: Any) -> Stored:
    """Latents and features in another dtype; None: as they are."""
    if dtype is None:
        return clip
    to: Callable[..., Any] = lambda x: None if x is None else x.astype(dtype)
    video = to(clip.features.video)
    both = clip.features.video is clip.features.audio
    text = AV(video, video if both else to(clip.features.audio))
    return Stored(to(clip.video), to(clip.audio), to(clip.reference), text, clip.mask)


def encode(clip: Stored, *, name: str, fps: float, speaker: str = "") -> dict[str, Any]:
    """A clip as a record; bfloat16 as its bits."""
    tensors = {
        key: np.ascontiguousarray(x).view(np.uint16 if x.dtype == _BF16 else x.dtype)
        for key, x in _tensors(clip).items()
    }
    return {"name": name, "speaker": speaker, "fps": fps, **tensors}


def decode(record: Mapping[str, Any], bits: Iterable[str]) -> Stored:
    """A record as a clip.

    Args:
        record: as `tfds.data_source` gives it.
        bits: names of the tensors that are bfloat16 stored as uint16.
    """
    bits = set(bits)

    def tensor(name: str) -> Any:
        found = record.get(name)
        return found.view(_BF16) if found is not None and name in bits else found

    both = tensor("features")
    text = AV(both, both)
    if both is None:
        text = AV(tensor("features_video"), tensor("features_audio"))
    return Stored(
        tensor("video"), tensor("audio"), tensor("reference"), text, tensor("mask")
    )


class Latents(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """The builder of a data set of latents.

    Not registered: a data set is opened from its own files, wherever this library is
    not installed too. convert/dataset.py writes the same records, in shards that can be
    taken up again.
    """

    VERSION = tfds.core.Version(VERSION)
    # Nothing is downloaded; TFDS would look for checksums beside this module.
    url_infos: Any = MappingProxyType({})

    def __init__(
        self,
        form: Form,
        metadata: Mapping[str, Any],
        records: Callable[[], Iterable[dict[str, Any]]] = tuple,
        **options: Any,
    ) -> None:
        """Define a data set.

        Args:
            form: the tensors of its records.
            metadata: see `metadata`.
            records: gives the records for `download_and_prepare`.
            options: of `tfds.core.DatasetBuilder`.
        """
        self._form, self._metadata, self._records = form, metadata, records
        super().__init__(file_format="array_record", **options)

    def _info(self) -> tfds.core.DatasetInfo:
        unknown = ("converted from a folder", "docs/converting.md")
        return tfds.core.DatasetInfo(
            builder=self,
            description=_ABOUT.format(*_ORIGIN.get(self.name, unknown)),
            features=features(self._form),
            metadata=tfds.core.MetadataDict(self._metadata),
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        return {SPLIT: self._generate_examples()}

    def _generate_examples(self) -> Iterable[tuple[int, dict[str, Any]]]:
        return enumerate(self._records())


class IdloraCelebvhq(Latents, skip_registration=True):
    """The pairs published as ID-LoRA-CelebVHQ."""

    name = "idlora_celebvhq"


class IdloraTalkvid(Latents, skip_registration=True):
    """The pairs published as ID-LoRA-TalkVid."""

    name = "idlora_talkvid"


class IdloraFolder(Latents, skip_registration=True):
    """Clips from any folder of the published layout."""

    name = "idlora_folder"


def check_name(wanted: str) -> None:
    """Refuse what TFDS does not allow as the name of a data set.

    Raises:
        ValueError: if it is such a name.
    """
    if not re.fullmatch("[a-z][a-z0-9_]*", wanted):
        raise ValueError(
            f"tfds: got the name {wanted!r}, expected small letters, digits and "
            "underscores, a letter first"
        )


def _called(wanted: str) -> type[Latents]:
    """`IdloraFolder` under another name."""
    check_name(wanted)

    class Called(IdloraFolder, skip_registration=True):
        name = wanted

    return Called


def builder(
    name: str,
    form: Form,
    metadata: Mapping[str, Any],
    *,
    data_dir: Path,
    records: Callable[[], Iterable[dict[str, Any]]] = tuple,
) -> Latents:
    """The builder of a name: one of `NAMES`, or any folder's.

    Args:
        name: of the data set.
        form: the tensors of its records.
        metadata: see `metadata`.
        data_dir: where data sets lie.
        records: gives the records for `download_and_prepare`.

    Raises:
        ValueError: if TFDS does not allow the name.
    """
    known = {kind.name: kind for kind in (IdloraCelebvhq, IdloraTalkvid, IdloraFolder)}
    kind = known.get(name) or _called(name)
    return kind(form, metadata, records, data_dir=str(data_dir))


def metadata(form: Form, clips: Sequence[Clip]) -> dict[str, Any]:
    """What stands in metadata.json: which tensors are bits, and every clip's sizes."""
    rows = [[c.name, list(c.video), c.fps, c.audio, c.reference] for c in clips]
    bits = [name for name, tensor in form.items() if tensor.dtype == _BF16.name]
    return {"bfloat16": bits, "clips": rows}


@dataclass(frozen=True)
class Opened:
    """A data set: `len`, and clips by index, bfloat16 restored.

    Attributes:
        root: the folder with `dataset_info.json`.
        clips: names and sizes, in the order of the records.
        records: what TFDS gives.
        bits: names of the tensors stored as bits of bfloat16.
    """

    root: Path
    clips: tuple[Clip, ...]
    records: Any  # a sequence, of which none is read to check its type
    bits: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.clips)

    def __getitem__(self, index: int) -> Stored:
        # Iteration ends with an IndexError, which ArrayRecord does not raise.
        row = range(len(self))[index]
        try:
            return decode(self.records[row], self.bits)
        except (RuntimeError, ValueError, TypeError) as error:  # of ArrayRecord, TFDS
            raise ValueError(
                f"data: {self.root} is damaged, the record of {self.clips[row].name} "
                f"cannot be read ({error}); convert it again with convert/dataset.py"
            ) from None


def open_dataset(path: str | Path) -> Opened:
    """Open a data set that convert/dataset.py wrote.

    Args:
        path: the folder of the version (.../1.0.0), or one above that holds only it.

    Raises:
        ValueError: if there is none, or it is not of this form.
    """
    root = published.dataset_root(Path(path))
    if root is None:
        raise ValueError(f"data: no TFDS data set in {path}; see docs/converting.md")
    try:
        facts = json.loads((root / "metadata.json").read_text(encoding="utf-8"))
        rows = [(n, tuple(v), f, a, r) for n, v, f, a, r in facts["clips"]]
        clips, bits = tuple(Clip(*row) for row in rows), tuple(facts["bfloat16"])
        opened: Any = tfds.builder_from_directory(str(root))
        source = opened.as_data_source(split=SPLIT)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"data: {root} is no data set of latents ({error}); convert it again with "
            "convert/dataset.py"
        ) from None
    if len(source) != len(clips):
        raise ValueError(
            f"data: {root} holds {len(source)} records, expected {len(clips)}; convert "
            "it again"
        )
    return Opened(root, clips, source, bits)
