from collections import Counter
from pathlib import Path

from idlora_jax.data import pairing
from idlora_jax.data.buckets import Bucket
from idlora_jax.data.cuts import Cut
from idlora_jax.data.manifest import Clip

BUCKET = Bucket(32, 32, 25)


def cut(name, start_s=0.0, until_s=1.0, *, file=None, speaker="anna"):
    clip = Clip(name, Path(f"{file or name}.mp4"), "words", speaker, start_s=0.0)
    return Cut(name, clip, BUCKET, 25.0, start_s, until_s, name)


def chosen(group, seed=None, usable=None):
    usable = {c.name for c in group} if usable is None else usable
    return {c.name: pairing.choose(c, group, usable, seed) for c in group}


def names(pairs):
    return {name: other and other.name for name, other in pairs.items()}


def test_without_a_seed_it_is_the_next_clip_of_the_speaker_and_wraps_around():
    cuts = [cut(str(n), speaker=speaker) for n, speaker in enumerate("ababa")]
    pairs = {}
    for group in pairing.by_speaker(cuts).values():
        pairs |= names(chosen(group))
    assert pairs == {"0": "2", "2": "4", "4": "0", "1": "3", "3": "1"}


def test_a_clip_without_usable_sound_is_no_reference():
    group = [cut(str(n)) for n in range(3)]
    assert names(chosen(group, usable={"0", "2"})) == {"0": "2", "1": "2", "2": "0"}
    assert chosen(group, usable={"0"})["0"] is None


def test_a_seed_pairs_at_random_the_same_each_time_and_never_with_itself():
    group = [cut(str(n)) for n in range(40)]
    first, again, other = (names(chosen(group, seed)) for seed in (1, 1, 2))
    assert first == again != other
    assert all(name != ref for name, ref in first.items())
    assert len(Counter(first.values())) > 15
    fewer = names(chosen(group[:-1], 1))
    assert all(fewer[n] == ref for n, ref in first.items() if ref != "39" and n != "39")


def test_another_file_comes_before_another_part_of_the_same():
    group = [cut("a"), cut("a2", 1.0, file="a"), cut("a3", 2.0, file="a"), cut("b")]
    for seed in (None, 3):
        pairs = names(chosen(group, seed))
        assert {pairs[n] for n in ("a", "a2", "a3")} == {"b"} and pairs["b"] != "b"
    assert names(chosen(group[:3])) == {"a": "a2", "a2": "a3", "a3": "a"}


def test_parts_that_overlap_are_never_paired():
    group = [cut("a"), cut("a2", 0.5, file="a"), cut("a3", 1.5, file="a")]
    assert names(chosen(group)) == {"a": "a3", "a2": "a3", "a3": "a"}
    assert pairing.others(group[0], group[:2]) == []


def test_a_spare_part_lies_behind_the_cut_or_else_before_it():
    assert pairing.spare_s(cut("a", 0.0, 2.0)) == 1.0
    assert pairing.spare_s(cut("a", 1.5, 2.5)) == 0.5
    assert pairing.spare_s(cut("a", 0.5, 2.0)) is None
    assert pairing.spare_s(cut("a", 0.0, float("inf"))) is None
