"""Bad data files of text: encodings, JSON Lines, foreign formats, JSON arrays."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import pickle
import tarfile
import zipfile
from collections.abc import Callable

from support.bad_file_kit import GOOD, MIB, ROW, TWO, Bad, jsonl, named, second, with_value

ENCODINGS = {
    "utf-16 with a mark": jsonl(TWO.decode().encode("utf-16"), "QC-DATA-003", "UTF-16"),
    "utf-16-be with a mark": jsonl(b"\xfe\xff" + TWO.decode().encode("utf-16-be"), "QC-DATA-003",
        "UTF-16"),
    "utf-16-le without": jsonl(TWO.decode().encode("utf-16-le"), "QC-DATA-003", "UTF-16"),
    "utf-16-be without": jsonl(TWO.decode().encode("utf-16-be"), "QC-DATA-003", "UTF-16"),
    "utf-32 with a mark": jsonl(TWO.decode().encode("utf-32"), "QC-DATA-003", "UTF-16"),
    "utf-32-be with a mark": jsonl(b"\0\0\xfe\xff" + TWO.decode().encode("utf-32-be"),
        "QC-DATA-003", "UTF-32"),
    "utf-32-le without": jsonl(TWO.decode().encode("utf-32-le"), "QC-DATA-003", "UTF-32"),
    "latin-1": second(GOOD.decode().encode("latin-1"),
        "not UTF-8: found invalid continuation byte 0xe9", "QC-DATA-003"),
    "cp1252 quotes": second(b'{"a": "\x93x\x94"}', "0x93 at byte 8", "QC-DATA-003"),
    "shift-jis": second('{"a": "日本"}'.encode("shift-jis"), "not UTF-8", "QC-DATA-003"),
    "overlong": second(b'{"a": "\xc0\xaf"}', "0xc0", "QC-DATA-003"),
    "encoded surrogate": second(b'{"a": "\xed\xa0\x80"}', "0xed", "QC-DATA-003"),
    "cut character": jsonl(GOOD + b'\n{"a": "\xe6\x97', "QC-DATA-003", "unexpected end", "line 2"),
    "0xff": second(b'{"a": "\xff"}', "0xff", "QC-DATA-003"),
    "mark in the middle": second(b"\xef\xbb\xbf" + GOOD, "not JSON"),
    "two marks": jsonl(b"\xef\xbb\xbf\xef\xbb\xbf" + GOOD, "QC-DATA-004", "not JSON"),
    "zeros": jsonl(b"\0" * 4096, "QC-DATA-003", "binary (NUL bytes)"),
    "a NUL byte": second(b'{"a": "\0"}', "Invalid control character"),
    "NUL between rows": second(b"\0", "not JSON"),
    "UTF-7": second(b"+AHs-", "not JSON"),
}  # fmt: skip

JSON = {
    "single quotes": second(b"{'messages': []}", "double quotes"),
    "trailing comma": second(b'{"messages": [],}', "not JSON"),
    "trailing comma in a list": second(b'{"messages": [1,]}', "not JSON"),
    "comment": second(b'{"messages": [] /* x */}', "not JSON"),
    "no closing brace": second(b'{"messages": []', "at byte 16"),
    "no opening brace": second(b'"messages": []}', "Extra data"),
    "two objects": second(GOOD + b" " + GOOD, "Extra data"),
    "object and a comma": second(GOOD + b",", "Extra data"),
    "NaN": second(with_value("NaN"), "found NaN"),
    "Infinity": second(with_value("Infinity"), "found Infinity"),
    "-Infinity": second(with_value("[-Infinity]"), "found -Infinity"),
    "overflow": second(with_value("1e999"), "overflows a float: found 1e999"),
    "5000 digits": second(with_value("9" * 5000), "thousands of digits"),
    "duplicate key": second(b'{"messages": [], "messages": []}', "found 'messages'"),
    "duplicate key below": second(b'{"messages": [{"role": "user", "role": "user"}]}',
        "found 'role'"),
    "duplicate key, escaped": second(b'{"a": 1, "\\u0061": 2}', "found 'a'"),
    "70 lists": second(with_value("[" * 70 + "]" * 70), "too deep"),
    "70 objects": second(with_value('{"a":' * 70 + "1" + "}" * 70), "too deep"),
    "100000 lists": second(with_value("[" * 100_000), "too deep"),
    "100000 objects": second(b'{"a":' * 100_000, "too deep"),
    "unquoted key": second(b"{messages: []}", "double quotes"),
    "Python literals": second(b'{"a": None}', "not JSON"),
    "True": second(b'{"a": True}', "not JSON"),
    "undefined": second(b'{"a": undefined}', "not JSON"),
    "hexadecimal": second(b'{"a": 0x10}', "not JSON"),
    "leading zero": second(b'{"a": 01}', "not JSON"),
    "plus": second(b'{"a": +1}', "not JSON"),
    "no digits": second(b'{"a": .5}', "not JSON"),
    "bad escape": second(rb'{"a": "\x41"}', "escape"),
    "half an escape": second(rb'{"a": "\u12"}', "escape"),
    "tab in a string": second(b'{"a": "\t"}', "control character"),
    "open string": second(b'{"a": "x}', "Unterminated string"),
    "a word": second(b"nonsense", "not JSON"),
    "a string": second(b'"text"', "not an object", "QC-DATA-005"),
    "a number": second(b"7", "not an object", "QC-DATA-005"),
    "null": second(b"null", "not an object", "QC-DATA-005"),
    "true": second(b"true", "not an object", "QC-DATA-005"),
    "a list": second(b"[" + GOOD + b"]", "not an object", "QC-DATA-005"),
    "cut last line": jsonl(TWO + GOOD[:30], "QC-DATA-004", "not JSON", "line 3"),
    "object over two lines": jsonl(GOOD + b"\n" + GOOD[:-1] + b"\n", "QC-DATA-004", "not JSON",
        "line 2"),
    "17 MiB": second(b'{"a": "' + b"x" * (17 * MIB) + b'"}', "too long"),
    "markdown": jsonl(b"# Rows\n", "QC-DATA-004", "not JSON"),
    "a header comment": jsonl(b"// rows\n" + GOOD, "QC-DATA-004", "not JSON"),
    "YAML": jsonl(b"- role: user\n", "QC-DATA-004", "not JSON"),
    "record separators": second(b"\x1e" + GOOD, "not JSON"),
}  # fmt: skip


def wrapped(indent: int | None = None) -> bytes:
    return json.dumps({"version": 1, "data": [ROW, ROW]}, indent=indent).encode()


FILES = {
    "empty": jsonl(b"", "QC-DATA-002", "no rows", ""),
    "empty, .json": named("rows.json", b"", "QC-DATA-002", "no rows", ""),
    "blank lines": jsonl(b"\n \r\n\t\n", "QC-DATA-002", "no rows", ""),
    "only a mark": jsonl(b"\xef\xbb\xbf", "QC-DATA-002", "no rows", ""),
    "pretty-printed": named("rows.json", json.dumps(ROW, indent=2).encode(), "QC-DATA-003",
        "one JSON document"),
    "an open brace": jsonl(b"{", "QC-DATA-003", "one JSON document"),
    "rows under a key": named("rows.json", wrapped(), "QC-DATA-003", "the rows in a list",
        "line 1, data"),
    "rows under a key, pretty": named("rows.json", wrapped(2), "QC-DATA-003", "the rows in a list",
        "line 1, data"),
    "rows under a key, .jsonl": jsonl(wrapped(), "QC-DATA-003", "the rows in a list",
        "line 1, data"),
    "rows under a key, gzip": named("rows.json.gz", gzip.compress(wrapped()), "QC-DATA-003",
        "the rows in a list", "line 1, data"),
    "CSV named .jsonl": jsonl(b"prompt,response\na,b\n", "QC-DATA-003", "looks like CSV"),
    "TSV named .txt": named("rows.txt", b"prompt\tresponse\na\tb\n", "QC-DATA-003",
        "looks like TSV"),
    "semicolons named .jsonl": jsonl(b"prompt;response\na;b\n", "QC-DATA-003", "looks like CSV"),
    "HTML": jsonl(b"<!DOCTYPE html><html></html>", "QC-DATA-003", "an HTML page"),
    "Git LFS pointer":
        jsonl(b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 1\n",
        "QC-DATA-003", "Git LFS pointer"),
    "PDF": jsonl(b"%PDF-1.7\n", "QC-DATA-003", "PDF"),
    "bzip2": named("rows.jsonl.bz2", bz2.compress(TWO), "QC-DATA-003", "bzip2"),
    "xz": named("rows.jsonl.xz", lzma.compress(TWO), "QC-DATA-003", "xz"),
    "7z": named("rows.7z", b"7z\xbc\xaf\x27\x1c\0\4", "QC-DATA-003", "7z"),
    "lz4": named("rows.jsonl.lz4", b"\x04\x22\x4d\x18\x64\x40", "QC-DATA-003", "lz4"),
    "pickle 4": named("rows.pkl", pickle.dumps([ROW], 4), "QC-DATA-003", "pickle"),
    "pickle 2 named .jsonl": jsonl(pickle.dumps([ROW], 2), "QC-DATA-003", "pickle"),
    "ORC": named("rows.orc", b"ORC\x11\0\0", "QC-DATA-003", "ORC"),
    "Avro": named("rows.avro", b"Obj\x01\x04\x14", "QC-DATA-003", "Avro"),
    "SQLite": named("rows.db", b"SQLite format 3\0" + b"\0" * 84, "QC-DATA-003", "SQLite"),
    "HDF5": named("rows.h5", b"\x89HDF\r\n\x1a\n", "QC-DATA-003", "HDF5"),
    "Feather 1": named("rows.feather", b"FEA1\0\0\0\0", "QC-DATA-003", "Feather version 1"),
    "encrypted Parquet": named("rows.parquet", b"PARE" + b"\0" * 64 + b"PARE", "QC-DATA-003",
        "encrypted"),
    "noise named .arrow": named("rows.arrow", b"\x01\x02\x03\x04noise", "QC-DATA-003", "not Arrow"),
    "text named .parquet": named("rows.parquet", b"hello\n", "QC-DATA-003", "not Parquet"),
}  # fmt: skip


def _zip() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("rows.jsonl", TWO)
    return file.getvalue()


def _tar() -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        member = tarfile.TarInfo("rows.jsonl")
        member.size = len(TWO)
        archive.addfile(member, io.BytesIO(TWO))
    return file.getvalue()


FILES |= {
    "zip": named("rows.zip", _zip, "QC-DATA-003", "zip"),
    "Excel": named("rows.xlsx", _zip, "QC-DATA-003", "Excel"),
    "zip named .jsonl": jsonl(_zip, "QC-DATA-003", "zip"),
    "tar": named("rows.tar", _tar, "QC-DATA-003", "tar"),
    "tar.gz": named("rows.tar.gz", lambda: gzip.compress(_tar()), "QC-DATA-003", "tar"),
}

_G = GOOD


def array(
    data: bytes | Callable[[], bytes], code: str, words: str, field: str = "element 1"
) -> Bad:
    return named("rows.json", data, code, words, field)


ARRAYS = {
    "cut in an element": array(b"[" + _G + b", " + _G[:20], "QC-DATA-031", "ends inside of",
        "element 2"),
    "cut in a string": array(b"[" + _G + b', {"a": "x', "QC-DATA-031", "ends inside of",
        "element 2"),
    "cut in an escape": array(b"[" + _G + b', {"a": "x\\', "QC-DATA-031", "ends inside of",
        "element 2"),
    "cut after a comma": array(b"[" + _G + b", ", "QC-DATA-031", "ends inside of", "element 2"),
    "cut after an element": array(b"[" + _G, "QC-DATA-031", "ends inside of"),
    "cut after [": array(b"[", "QC-DATA-031", "ends inside of"),
    "cut, with a mark": array(b"\xef\xbb\xbf[\n", "QC-DATA-031", "ends inside of"),
    "trailing text": array(b"[" + _G + b"] x", "QC-DATA-031", "text follows", "element 2"),
    "a second array": array(b"[" + _G + b"]\n[" + _G + b"]\n", "QC-DATA-031", "text follows",
        "element 2"),
    "a bracket too many": array(b"[" + _G + b"]]", "QC-DATA-031", "text follows", "element 2"),
    "trailing comma": array(b"[" + _G + b",]", "QC-DATA-004", "not JSON", "element 2"),
    "two commas": array(b"[" + _G + b",," + _G + b"]", "QC-DATA-004", "not JSON", "element 2"),
    "leading comma": array(b"[," + _G + b"]", "QC-DATA-004", "not JSON"),
    "no comma": array(b"[" + _G + b"\n" + _G + b"]", "QC-DATA-004", "Extra data"),
    "a number": array(b"[" + _G + b", 7]", "QC-DATA-005", "not an object", "element 2"),
    "a string": array(b'["a, ] b", ' + _G + b"]", "QC-DATA-005", "not an object"),
    "null": array(b"[" + _G + b",null]", "QC-DATA-005", "not an object", "element 2"),
    "a list": array(b"[" + _G + b",[" + _G + b"]]", "QC-DATA-005", "not an object", "element 2"),
    "an element that is not JSON": array(b"[" + _G + b",{'a': 1}," + _G + b"]", "QC-DATA-004",
        "not JSON", "element 2"),
    "a wrong bracket": array(b'[{"a": [1}], ' + _G + b"]", "QC-DATA-004", "not JSON"),
    "duplicate key": array(b'[{"a": 1, "a": 2}, ' + _G + b"]", "QC-DATA-004", "duplicate key"),
    "NaN": array(b"[" + _G + b', {"a": NaN}]', "QC-DATA-004", "found NaN", "element 2"),
    "not UTF-8": array(b"[" + _G + b', {"a": "\xff"}]', "QC-DATA-003", "not UTF-8", "element 2"),
    "too deep": array(b"[" + _G + b"," + with_value("[" * 70 + "]" * 70) + b"]", "QC-DATA-004",
        "too deep", "element 2"),
    "100000 open": array(b"[" * 100_000, "QC-DATA-031", "ends inside of"),
    "17 MiB": array(b"[" + _G + b', {"a": "' + b"x" * (17 * MIB) + b'"}, ' + _G + b"]",
        "QC-DATA-004", "too long", "element 2"),
    "the only element has 17 MiB": array(b'[{"a": "' + b"x" * (17 * MIB) + b'"}]', "QC-DATA-004",
        "too long"),
    "empty": array(b"[]", "QC-DATA-002", "no rows", ""),
    "empty, with blanks": array(b"\n[ \n ]\n", "QC-DATA-002", "no rows", ""),
    "lines of arrays": array(b"[1]\n[2]\n", "QC-DATA-031", "text follows", "element 2"),
}  # fmt: skip
