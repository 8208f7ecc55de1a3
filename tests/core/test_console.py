import io
import os

from minigpt.core.console import _replaced


def test_unbuffered_output_is_written_at_once():
    reader, writer = os.pipe()
    with io.FileIO(writer, "w") as raw, open(reader, "rb", buffering=0) as end:
        unbuffered = io.TextIOWrapper(raw, "utf-8", write_through=True)
        print("größe", end="", file=_replaced(unbuffered, writer), flush=False)
        assert end.read(100) == "größe".encode()
        buffered = io.TextIOWrapper(io.BufferedWriter(raw), "utf-8")
        print("line", file=_replaced(buffered, writer), flush=True)
        assert end.read(100) == b"line\n"
