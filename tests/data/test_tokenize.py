"""Tokenising with a tiny tokenizer.json built here."""

import json

import numpy as np
import pytest
import tokenizers
from tokenizers import models, pre_tokenizers, processors

from idlora_jax.data import tokenize

VOCAB = ["<pad>", "<eos>", "<bos>", "<unk>", "a", "dog", "sings", "loudly"]
IDS = {word: n for n, word in enumerate(VOCAB)}


def write(folder, *, config=None, template="<bos> $A"):
    model = models.WordLevel(IDS, unk_token="<unk>")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(VOCAB[:3])
    if template:
        special = [(word, IDS[word]) for word in ("<bos>", "<eos>")]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=template, special_tokens=special
        )
    tokenizer.enable_padding(length=3)  # what a file may carry must not leak through
    tokenizer.enable_truncation(2)
    tokenizer.save(str(folder / "tokenizer.json"))
    if config is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def test_prompts_are_padded_on_the_left_behind_their_first_token(tmp_path):
    loaded = tokenize.load(write(tmp_path, config={"pad_token": "<pad>"}))
    ids, mask = tokenize.encode(loaded, ["a dog sings", "a", ""], length=5)
    assert ids.dtype == np.int32 and mask.dtype == bool
    assert ids.tolist() == [[0, 2, 4, 5, 6], [0, 0, 0, 2, 4], [0, 0, 0, 0, 2]]
    assert mask.sum(1).tolist() == [4, 2, 1]
    assert np.all(np.diff(mask.astype(int), axis=1) >= 0)


@pytest.mark.parametrize(
    ("limit", "expected"),
    [(None, 1024), (128, 128), (int(1e30), 1024), (1e30, 1024)],
)
def test_prompts_are_as_long_as_the_folder_says_and_at_most_1024(
    tmp_path, limit, expected
):
    config = {} if limit is None else {"model_max_length": limit}
    loaded = tokenize.load(write(tmp_path, config=config))
    assert loaded.length == expected
    assert tokenize.encode(loaded, ["a dog"])[0].shape == (1, expected)


def test_white_space_around_a_prompt_is_dropped(tmp_path):
    loaded = tokenize.load(write(tmp_path))
    plain, _ = tokenize.encode(loaded, ["a dog"], length=8)
    spaced, _ = tokenize.encode(loaded, ["\n  a dog \t"], length=8)
    np.testing.assert_array_equal(plain, spaced)


def test_a_long_prompt_loses_its_end_and_keeps_the_frame(tmp_path):
    loaded = tokenize.load(write(tmp_path, template="<bos> $A <eos>"))
    ids, mask = tokenize.encode(loaded, ["a dog sings loudly a dog"], length=4)
    assert ids.tolist() == [[2, 4, 5, 1]] and mask.all()


def test_a_file_without_post_processor_adds_nothing(tmp_path):
    loaded = tokenize.load(write(tmp_path, template=None))
    ids, mask = tokenize.encode(loaded, ["dog", ""], length=2)
    assert ids.tolist() == [[0, 5], [0, 0]]
    assert mask.tolist() == [[False, True], [False, False]]


@pytest.mark.parametrize(
    ("config", "pad"),
    [
        ({"pad_token": "<unk>", "eos_token": "<eos>"}, 3),
        ({"pad_token": {"content": "<unk>"}}, 3),
        ({"pad_token": None, "eos_token": "<eos>"}, 1),
        ({}, 0),
        (None, 0),
    ],
)
def test_the_padding_token_falls_back_to_the_end_token_then_zero(tmp_path, config, pad):
    assert tokenize.load(write(tmp_path, config=config)).pad == pad


def test_the_padding_token_may_stand_in_the_special_tokens_map(tmp_path):
    write(tmp_path, config={"eos_token": "<eos>"})
    (tmp_path / "special_tokens_map.json").write_text('{"pad_token": "<unk>"}')
    assert tokenize.load(tmp_path).pad == 3


def test_a_folder_without_tokenizer_json_is_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match=r"tokenizer\.json not found.*gemma-3-12b-it"):
        tokenize.load(tmp_path)


def test_a_padding_token_outside_the_vocabulary_is_refused(tmp_path):
    write(tmp_path, config={"pad_token": "<none>"})
    with pytest.raises(ValueError, match="<none>"):
        tokenize.load(tmp_path)


def test_a_single_text_and_a_length_without_room_are_refused(tmp_path):
    loaded = tokenize.load(write(tmp_path))
    with pytest.raises(ValueError, match="list of texts"):
        tokenize.encode(loaded, "a dog")
    with pytest.raises(ValueError, match="length must exceed 1"):
        tokenize.encode(loaded, ["a dog"], length=1)


@pytest.mark.parity
@pytest.mark.parametrize("length", [4, 9])
def test_ids_equal_those_of_transformers(tmp_path, length):
    import transformers

    tokens = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>"}
    config = tokens | {"tokenizer_class": "PreTrainedTokenizerFast"}
    write(tmp_path, config=config)
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)
    theirs.padding_side = "left"
    texts = ["a dog sings loudly a dog", "dog"]
    want = theirs(
        texts,
        padding="max_length",
        max_length=length,
        truncation=True,
        return_tensors="np",
    )
    ids, mask = tokenize.encode(tokenize.load(tmp_path), texts, length)
    np.testing.assert_array_equal(ids, want["input_ids"])
    np.testing.assert_array_equal(mask, want["attention_mask"])


PROMPTS = [
    '[VISUAL]: A woman in a red coat speaks.\n[SPEECH]: "Hello, you!"\n[SOUNDS]: rain',
    "[VISUAL]:a  b\t[SPEECH]:[SOUNDS]:",
    "naïve café — “Grüße”, 你好世界, こんにちは, привет, مرحبا",
    "👩‍🚀🇩🇪 e\u0301 \u00a0\u200b ﬁ ½ ∑",
    "line one\r\nline two\n\n\n  line three\n",
    "<bos> <pad> <eos> <unk> inside a prompt",
    "▁ already, and a \\ backslash\x00",
    "",
    "word " * 250,
]


def gemma_like():
    """Pieces as Gemma's: no byte-level alphabet, a sign for spaces, bytes as a last
    resort."""
    from tokenizers import decoders, normalizers, trainers

    made = tokenizers.Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True))
    made.normalizer = normalizers.Replace(" ", "▁")
    made.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback()]
    )
    fallback = [f"<0x{n:02X}>" for n in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=[*VOCAB[:4], *fallback], show_progress=False
    )
    made.train_from_iterator(PROMPTS[:2], trainer)
    state = json.loads(made.to_str())
    kept = {"<pad>", "<eos>", "<bos>", "<unk>"}
    state["added_tokens"] = [t for t in state["added_tokens"] if t["content"] in kept]
    state["model"]["unk_token"] = "<unk>"
    made = tokenizers.Tokenizer.from_str(json.dumps(state))
    made.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", made.token_to_id("<bos>"))]
    )
    return made


def byte_level():
    from idlora_jax import tiny

    return tiny.tokenizer(PROMPTS)


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore")  # of transformers, on import
@pytest.mark.parametrize("length", [24, 200])
@pytest.mark.parametrize(
    ("make", "kind"),
    [(byte_level, "PreTrainedTokenizerFast"), (gemma_like, "GemmaTokenizer")],
)
def test_every_token_of_a_prompt_is_that_of_transformers(tmp_path, make, kind, length):
    import transformers

    make().save(str(tmp_path / "tokenizer.json"))
    config = {f"{name}_token": f"<{name}>" for name in ("pad", "bos", "eos", "unk")}
    config["tokenizer_class"] = kind
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path, padding_side="left")
    want = theirs(
        [prompt.strip() for prompt in PROMPTS],
        padding="max_length",
        max_length=length,
        truncation=True,
        return_tensors="np",
    )
    ids, mask = tokenize.encode(tokenize.load(tmp_path), PROMPTS, length)
    np.testing.assert_array_equal(ids, want["input_ids"])
    np.testing.assert_array_equal(mask, want["attention_mask"])
    assert mask.all(1).any() and mask.sum(1).min() == 1
    texts = {theirs.decode(row[kept]) for row, kept in zip(ids, mask, strict=True)}
    assert len(texts) == len(PROMPTS)
