"""Detect the format of a file from its name and first bytes, and decompress it."""

from __future__ import annotations

import bz2
import gzip
import importlib
import lzma
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

from minigpt.core.settings import UserError

CHUNK = 1 << 17  # bytes read at a time; reading 1 MiB at a time takes twice as long
# A compressed file may decompress to `_UNPACKED` bytes or to `_UNPACKED_TIMES` times its size,
# whichever is more. English text compresses to a fifth of its size, a story that repeats itself to
# a hundredth, and a file that is made to fill a disk to a thousandth.
_UNPACKED, _UNPACKED_TIMES = 64 << 20, 200

KINDS = {
    ".txt": "text", ".md": "text", ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "json",
    ".csv": "csv", ".tsv": "tsv", ".parquet": "parquet",
}  # fmt: skip
READABLE = f"{', '.join(KINDS)}, each also with .gz, .xz, .bz2 or .zst"

_UNPACK, _TEXT = "unpack it and give the unpacked files", "save its text as .txt"
_DATA = "write its stories as .txt or .jsonl"
# Formats that cannot be read, or that cannot be read unless the file is renamed. Each entry has a
# description, the extensions, the first bytes, and what the user can do. The extension takes
# precedence over the first bytes, because a Word document is also a zip archive.
_FOREIGN: tuple[tuple[str, str, tuple[bytes, ...], str], ...] = (
    ("a Word document", ".docx .doc .odt", (b"\xd0\xcf\x11\xe0",), _TEXT),
    ("a rich text document", ".rtf", (b"{\\rtf",), _TEXT),
    ("a spreadsheet", ".xlsx .xls .ods", (), "save it as .csv"),
    ("an e-book", ".epub .mobi .azw3", (), _TEXT),
    ("a web page", ".html .htm", (), _TEXT),
    ("a PDF document", ".pdf", (b"%PDF-",), _TEXT),
    ("a file with NumPy arrays", ".npy .npz", (b"\x93NUMPY",), _DATA),
    ("a file with model weights", ".pt .pth .ckpt .bin .safetensors .gguf .onnx", (),
     "leave it out"),
    ("a pickle", ".pkl .pickle", tuple(b"\x80" + bytes([n]) for n in range(2, 6)), _DATA),
    ("an Arrow file", ".arrow .feather", (b"ARROW1\0",), "save it as .parquet"),
    ("an image", ".png .jpg .jpeg .gif .webp .bmp .tif .tiff",
     (b"\x89PNG", b"\xff\xd8\xff", b"GIF87a", b"GIF89a"), "leave it out"),
    ("a zip archive", ".zip", (b"PK\x03\x04", b"PK\x05\x06"), _UNPACK),
    ("a tar archive", ".tar .tgz .tbz .tbz2 .txz .tzst", (), _UNPACK),
    ("a file compressed by compress", ".z", (b"\x1f\x9d",), _UNPACK),
    ("an HDF5 file", ".h5 .hdf5", (b"\x89HDF",), _DATA),
    ("a 7z archive", ".7z", (b"7z\xbc\xaf\x27\x1c",), _UNPACK),
    ("a RAR archive", ".rar", (b"Rar!\x1a\x07",), _UNPACK),
    ("a Parquet file", "", (b"PAR1\x15",), "rename the file to end in .parquet"),
    ("compressed with gzip", "", (b"\x1f\x8b",), "decompress the file, or add .gz to its name"),
    ("compressed with xz", "", (b"\xfd7zXZ\0",), "decompress the file, or add .xz to its name"),
    ("compressed with bzip2", "", tuple(b"BZh%d1AY&SY" % n for n in range(1, 10)),
     "decompress the file, or add .bz2 to its name"),
    ("compressed with zstd", "", (b"\x28\xb5\x2f\xfd",),
     "decompress the file, or add .zst to its name"),
)  # fmt: skip


_PACKED = {
    ".gz": "compressed with gzip", ".xz": "compressed with xz", ".bz2": "compressed with bzip2",
    ".zst": "compressed with zstd",
}  # fmt: skip


@dataclass(frozen=True)
class Format:
    """Format and compression of a file with stories."""

    kind: str  # "text", "jsonl", "json", "csv", "tsv" or "parquet"
    packing: str  # ".gz", ".xz", ".bz2", ".zst" or ""


def detect_format(path: Path) -> Format:
    """Return the format and the compression that the name of a file indicates.

    A file in an unsupported format is rejected by its extension or by its first bytes.

    Args:
        path: path of the file.

    Returns:
        The format and the compression of the file.

    Raises:
        UserError: the format is not supported, the file cannot be read, or a package that is needed
            to read the file is not installed.
    """
    name = path.name.lower()
    packing = next((ending for ending in _OPENERS if name.endswith(ending)), "")
    suffix = PurePath(name.removesuffix(packing)).suffix
    kind = KINDS.get(suffix, "text" if packing else "")
    for what, endings, _, remedy in _FOREIGN:
        if suffix and suffix in endings.split():
            raise UserError(f"{path} is {what}; {remedy}")
    if not kind:
        problem = f"{path}: the extension {suffix!r} is not supported"
        raise UserError(f"{problem}; if the file is text, rename it to one of {READABLE}")
    if kind == "parquet":
        optional("pyarrow.parquet", "Parquet")
    content = "a Parquet file" if kind == "parquet" else None
    heads = [(unpack(path, ""), _PACKED.get(packing, content))]
    heads += [(unpack(path, packing), content)] if packing else []
    for chunks, expected in heads:
        if (found := _foreign(next(chunks, b""))) and found[0] != expected:
            raise UserError(f"the content of {path} is {found[0]}; {found[1]}")
    return Format(kind, packing)


def _foreign(head: bytes) -> tuple[str, str] | None:
    """Return the format that the first bytes of a file belong to, and what the user can do.

    The result is None if they do not belong to a format in `_FOREIGN`.
    """
    for what, _, beginnings, remedy in _FOREIGN:
        if head.startswith(beginnings) or (what == "a tar archive" and head[257:262] == b"ustar"):
            return what, remedy
    return None


def optional(module: str, use: str) -> Any:
    """Import and return a module of an optional dependency.

    Args:
        module: name of the module, such as "pyarrow.parquet".
        use: name of the feature that needs the module, such as "Parquet", for the error message.

    Returns:
        The module.

    Raises:
        UserError: the package of the module is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError:
        package = module.partition(".")[0]
        raise UserError(f"{use} needs the package {package}: run pip install {package}") from None


def unpack(path: Path, packing: str) -> Iterator[bytes]:
    """Yield the decompressed bytes of a file in chunks of at most 128 KiB.

    Args:
        path: path of the file.
        packing: compression of the file: ".gz", ".xz", ".bz2", ".zst", or "" for none.

    Yields:
        The next chunk; it is not empty.

    Raises:
        UserError: the file cannot be read, is damaged, or decompresses to more than 64 MiB and more
            than 200 times its size.
    """
    lines = 0
    try:
        most = max(_UNPACKED, _UNPACKED_TIMES * path.stat().st_size)
        with _OPENERS.get(packing, open)(path, "rb") as file:
            while chunk := file.read1(CHUNK):  # unlike `read`, returns all bytes before an error
                most -= len(chunk)
                if most < 0 and packing:
                    large = f"decompresses to more than {_UNPACKED_TIMES} times its size"
                    raise UserError(f"{path} {large}; if you trust the file, decompress it first")
                lines += chunk.count(b"\n")
                yield chunk
    except (EOFError, lzma.LZMAError, zlib.error, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise UserError(f"cannot read {path}: {error.strerror or error}") from None
        problem = f"{path} is damaged or truncated after line {lines} ({error})"
        raise UserError(f"{problem}; copy or download it again") from None


def _open_zst(path: Path, mode: str) -> Any:
    return optional("pyarrow", ".zst").input_stream(str(path), compression="zstd")


_OPENERS: dict[str, Callable[..., Any]] = {
    ".xz": lzma.open, ".gz": gzip.open, ".bz2": bz2.open, ".zst": _open_zst
}  # fmt: skip
