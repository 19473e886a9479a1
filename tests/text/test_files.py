"""Text files of every kind are read, and one that is no text is named with the place in it."""

import gzip
import json
import lzma

import pyarrow
import pytest
from pyarrow import parquet

from config import InputError
from utils.runtime.records import NoTextField
from utils.text.files import (
    detect_encoding,
    file_text_field,
    find_files,
    read_blocks,
    read_record_texts,
    split_name,
)

ROWS = [{"text": "one é"}, {"text": "two\nlines"}, {"text": None}, {"other": "x"}]
TEXTS = ["one é", "two\nlines"]


def compress_zst(content: bytes) -> bytes:
    buffer = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(buffer, "zstd") as file:
        file.write(content)
    return buffer.getvalue().to_pybytes()


def make_table(rows: list[dict]) -> bytes:
    buffer = pyarrow.BufferOutputStream()
    parquet.write_table(pyarrow.Table.from_pylist(rows), buffer)
    return buffer.getvalue().to_pybytes()


COMPRESS = {"": bytes, ".gz": gzip.compress, ".XZ": lzma.compress, ".zst": compress_zst}
CONTENTS = {
    ".jsonl": "\n".join(map(json.dumps, ROWS)).encode(),
    ".JSON": json.dumps(ROWS, indent=1).encode(),
    ".json": "\n".join(map(json.dumps, ROWS)).encode(),  # often named so
    ".parquet": make_table([row if "text" in row else {"text": None} for row in ROWS]),
}


@pytest.fixture
def write(tmp_path):
    def write(name, content):
        path = tmp_path / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return write


@pytest.mark.parametrize("suffix", COMPRESS)
def test_every_kind_is_read_whatever_compresses_it(write, suffix):
    for kind in (".txt", ".MD"):
        path = write(f"a{kind}{suffix}", COMPRESS[suffix]("\ufeffone é\r\ntwo".encode()))
        assert "".join(read_blocks(path)) == "one é\ntwo"
        assert split_name(path.name) == ("a", kind.lower())
    for kind, content in CONTENTS.items():
        path, null_rows = write(f"b{kind}{suffix}", COMPRESS[suffix](content)), {}
        assert list(read_record_texts(path, "", null_rows)) == TEXTS
        assert null_rows == {str(path): 2}, "rows without a text are counted"


def test_names_say_what_is_read():
    assert split_name("notes.v2.JsonL.Gz") == ("notes.v2", ".jsonl")
    for name in ("a.pdf", "a.gz", "txt", "a.txt.bz2", "a.csv"):
        assert split_name(name) == (name, "")


@pytest.mark.parametrize("codec", ["utf-16", "utf-16-le", "utf-16-be"])
@pytest.mark.parametrize("text", ["dog big the\nred cat", "кот пёс дом в на и река\nлюди"])
def test_utf_16_is_recognised_without_a_mark_too(write, codec, text):
    path = write("a.txt", (text * 40).encode(codec))
    assert "".join(read_blocks(path)) == text * 40


@pytest.mark.parametrize(
    "content", [b"text " * 99 + b"\0", b"\0\1\2\3" * 99, "text".encode("utf-32"), bytes(64)]
)
def test_nul_bytes_that_are_not_utf_16_are_refused(write, content):
    with pytest.raises(InputError, match=r"a\.txt is not text: it has NUL bytes \(the first at"):
        detect_encoding(write("a.txt", content))


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.txt.gz"])
@pytest.mark.parametrize("padding", [0, 200_000])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_bytes_that_are_not_utf_8_are_named_by_file_line_and_place(write, name, padding, mark):
    before = mark + "é\nb\n".encode() + b"x" * padding
    content = before + b"caf\xe9 au lait"
    path = write(name, gzip.compress(content) if name.endswith(".gz") else content)
    place = rf"{name} is not UTF-8: line 3, byte offset {len(before) + 3} \(0xe9, "
    with pytest.raises(InputError, match=place):
        list(read_blocks(path))


def test_a_text_that_ends_within_a_character_is_refused(write):
    with pytest.raises(InputError, match=r"line 2, byte offset 3 \(0xe2, unexpected end"):
        list(read_blocks(write("a.txt", b"a\nb\xe2\x82")))


@pytest.mark.parametrize(
    "name, content, reason",
    [
        ("a.jsonl", '{"text": "x"}\n{"text": \n', r"a\.jsonl, line 2 is not JSON"),
        ("a.json", '[{"text": "x"},\n oops]', r"a\.json, line 2 is not JSON"),
        ("a.json", '{"text": "x"}\noops', r"a\.json, line 2 is not JSON"),
        ("a.jsonl", '{"text": "x"}\n{"text": 3}\n', r"a\.jsonl, row 2: 3 is no text"),
        ("a.parquet", b"PAR1 no table", r"a\.parquet is damaged"),
        ("a.txt.xz", lzma.compress(b"text" * 99)[:-9], r"a\.txt\.xz is damaged"),
        ("a.txt.zst", compress_zst(b"text" * 99)[:-4], r"a\.txt\.zst is damaged"),
        ("a.txt.zst", b"text", r"a\.txt\.zst is damaged"),
        ("a.jsonl", '{"a": "x", "b": "y"}', r"several fields of text \(a, b\).*--data\.text-field"),
        ("a.jsonl", '{"a": 1, "b": ["y"]}', r"no field of text \(a, b\)"),
        ("a.parquet", make_table([{"a": 1}]), r"no field of text \(a\)"),
    ],
)
def test_a_bad_record_is_one_line(write, name, content, reason):
    with pytest.raises(InputError, match=reason) as raised:
        list(read_record_texts(write(name, content), "", {}))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("kind", [".jsonl", ".parquet"])
def test_the_field_of_the_text_is_named_or_found(write, kind):
    def field(wanted, *rows):
        content = make_table(rows) if kind == ".parquet" else "\n".join(map(json.dumps, rows))
        return file_text_field(write(f"a{kind}", content), wanted)

    assert field("", {"id": 1, "text": "x", "title": "y"}) == "text"
    assert field("", {"id": 1, "story": None}, {"id": 2, "story": "x"}) == "story"
    assert field("title", {"text": "x", "title": "y"}) == "title"
    with pytest.raises(NoTextField, match=r"data.text_field = titel: .*\(text, title\)"):
        field("titel", {"text": "x", "title": "y"})


def test_a_list_of_texts_is_read_and_half_characters_are_replaced(write):
    path = write("a.json", r'["one", "tw\ud83d", null]')
    assert list(read_record_texts(path, "", {})) == ["one", "tw?"]


def test_files_are_found_in_subfolders_and_hidden_ones_are_not(tmp_path):
    for name in ("b.txt", "sub/deep/a.md", ".hidden", "._b.txt", ".git/x.txt", "__MACOSX/y.txt"):
        path = tmp_path / "text" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("text")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/c.txt").write_text("text")
    for name in ("link", "again"):
        (tmp_path / "text" / name).symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere/loop").symlink_to(tmp_path / "text")
    found = find_files(tmp_path / "text")
    assert list(map(str, found)) == ["again/c.txt", "b.txt", "sub/deep/a.md"]
