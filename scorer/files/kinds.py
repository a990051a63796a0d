"""The kinds of files that scorer reads and writes: their suffixes, and the bytes that they start with."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from scorer.types import ScorerError

JSON_SUFFIXES = (".json", ".jsonl", ".ndjson")
DELIMITERS = {".csv": ",", ".tsv": "\t"}
ARROW_SUFFIXES = (".arrow", ".feather", ".ipc")
COMPRESSIONS = ("", ".gz", ".zst")

READ = (
    *(name + packed for packed in COMPRESSIONS for name in (*JSON_SUFFIXES, *DELIMITERS)),
    ".parquet",
    *ARROW_SUFFIXES,
)

KNOWN = (
    "JSON (.json, .jsonl, .ndjson) and CSV (.csv, .tsv), which may be compressed (.gz, .zst), Parquet (.parquet) and "
    "Arrow (.arrow, .feather, .ipc)"
)
UNPACK, SHEET = "unpack it and name the files in it", "save its sheet as CSV"
PICKLE = "a pickle may run code when it is opened; save its content as Parquet or JSON Lines"
ICONV = "convert it to UTF-8 (iconv -f {} -t UTF-8)"
DATABASE = "write the rows of a query to Parquet or CSV"
HINTS = {  # for suffixes that are not read
    **dict.fromkeys((".xlsx", ".xls", ".ods"), SHEET),
    **dict.fromkeys((".zip", ".tar", ".tgz", ".tar.gz", ".tar.zst", ".7z", ".rar"), UNPACK),
    **dict.fromkeys((".bz2", ".xz", ".lz4", ".br"), "decompress it, or compress it with gzip or zstd instead"),
    **dict.fromkeys((".pkl", ".pickle", ".pt", ".pth", ".joblib"), PICKLE),
    **dict.fromkeys((".db", ".sqlite", ".sqlite3", ".duckdb"), DATABASE),
    ".txt": "text has no columns; if each line is a JSON object, name it .jsonl",
}

SIGNATURES = {  # the first bytes of a file -> what it is, and what to do
    b"\x1f\x8b": ("gzip", "add .gz to its name"),
    b"\x28\xb5\x2f\xfd": ("Zstandard", "add .zst to its name"),
    b"PAR1": ("Parquet", "name it .parquet"),
    b"ARROW1": ("Arrow", "name it .arrow"),
    b"FEA1": ("the first version of Feather", "write it again with pyarrow or Polars, as Parquet"),
    b"PK\x03\x04": ("a ZIP archive or an Excel workbook", f"{UNPACK}, or {SHEET}"),
    b"BZh9": ("bzip2", HINTS[".bz2"]),
    b"\xfd7zXZ\x00": ("xz", HINTS[".xz"]),
    b"SQLite format 3\x00": ("an SQLite database", DATABASE),
    b"version https://git-lfs": ("a pointer of Git LFS, not the data", "run git lfs pull"),
    b"<!DOCTYPE html": ("a web page, not the data", "download the file itself"),
    **dict.fromkeys((b"\xff\xfe\x00\x00", b"\x00\x00\xfe\xff"), ("UTF-32", ICONV.format("UTF-32"))),
    **dict.fromkeys((b"\xff\xfe", b"\xfe\xff"), ("UTF-16", ICONV.format("UTF-16"))),
}
SIGNATURE_BYTES = max(map(len, SIGNATURES))
EXPECTED = {".gz": "gzip", ".zst": "Zstandard", ".parquet": "Parquet", **dict.fromkeys(ARROW_SUFFIXES, "Arrow")}


def known_suffix(path: Path) -> str:
    """The suffix that says what kind of file an input is, such as ".jsonl.gz". Raises ScorerError if it is not read."""
    if (suffix := suffix_in(path.name, READ)) is None:
        hint = HINTS.get(suffix_in(path.name, HINTS) or "", "convert it to one of these, with Polars for example")
        raise ScorerError(f"{path}: unknown kind of file: {hint}; scorer reads {KNOWN}")
    return suffix


def plain(suffix: str) -> str:
    """A suffix without its compression."""
    return suffix.removesuffix(".gz").removesuffix(".zst")


def is_array(suffix: str) -> bool:
    """Whether a file of this suffix is to hold one JSON array, compressed or not."""
    return plain(suffix) == ".json"


def check_signature(path: Path, suffix: str, start: bytes) -> None:
    """Raise ScorerError where the first bytes of a file are those of another kind than its suffix says."""
    expected = next((kind for end, kind in EXPECTED.items() if suffix.endswith(end)), None)
    for signature, (kind, advice) in SIGNATURES.items():
        if start.startswith(signature) and kind != expected:
            raise ScorerError(f"{path}: its content is {kind}, whatever its name says; {advice}")


def suffix_in(name: str, suffixes: Iterable[str]) -> str | None:
    """Which of `suffixes`, of which none ends in another, a name ends in."""
    return next((suffix for suffix in suffixes if name.lower().endswith(suffix)), None)
