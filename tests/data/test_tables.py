import pytest

from idlora_jax.data import tables

ROWS = [
    ("a.jsonl", '{"video": "1.mp4"}\n\n{"video": "2.mp4"}\n', (1, 3)),
    ("a.json", '[\n {"video": "1.mp4"},\n\n {"video":\n "2.mp4"}\n]\n', (2, 4)),
    ("a.csv", 'video,text\n1.mp4,"two\nlines, a comma"\n2.mp4,b\n', (2, 4)),
    ("a.CSV", "\ufeffvideo\r\n1.mp4\r\n2.mp4\r\n", (2, 3)),
    ("a.tsv", "video\ttext\n1.mp4\ta,b\n2.mp4\tc\n", (2, 3)),
]


@pytest.mark.parametrize(("name", "text", "lines"), ROWS)
def test_every_form_gives_the_same_rows_with_their_lines(tmp_path, name, text, lines):
    path = tmp_path / name
    path.write_bytes(text.encode())
    found = tables.rows(path)
    assert [row.values["video"] for row in found] == ["1.mp4", "2.mp4"]
    assert [row.where for row in found] == [f"{path}, line {n}" for n in lines]


def test_texts_between_quotes_hold_commas_and_lines(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text(ROWS[2][1])
    assert tables.rows(path)[0].values["text"] == "two\nlines, a comma"


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.csv"])
def test_a_table_may_be_empty(tmp_path, name):
    path = tmp_path / name
    path.write_text("[ ]" if name == "a.json" else "")
    assert tables.rows(path) == []


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.jsonl", b"{}\n{not json", "line 2: not JSON"),
        ("a.jsonl", b'{}\n["1.mp4"]', "line 2: got .*expected an object"),
        ("a.json", b'{"video": "1.mp4"}', r"line 1: not JSON \(expected \[\)"),
        ("a.json", b"", r"line 1: not JSON \(expected \[\)"),
        ("a.json", b"[{},\n7]", "line 2: got 7, expected an object"),
        ("a.json", b"[{},\n]", "line 2: not JSON"),
        ("a.json", b"[{}\n{}]", "line 2: not JSON .expected , or "),
        ("a.json", b"[{}]\n{}", "line 2: not JSON .expected nothing after"),
        ("a.csv", b"video,text\n1,a\n2,b,c\n", "line 3: got more values than the 2"),
        ("a.csv", b'video\n1\n"2"x\n', "line 3: not CSV"),
        ("a.csv", b"video\n\xff\n", "no UTF-8"),
        ("a.txt", b"video", "got a .txt file, expected a folder of clips, or a table"),
    ],
)
def test_what_is_no_table_is_refused_with_its_line(tmp_path, name, text, message):
    path = tmp_path / name
    path.write_bytes(text)
    with pytest.raises(ValueError, match=message):
        tables.rows(path)


def test_a_missing_table_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no such file"):
        tables.rows(tmp_path / "none.csv")
