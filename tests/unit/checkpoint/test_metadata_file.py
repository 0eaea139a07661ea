"""`.metadata` of a checkpoint: what torch writes is read, what an attacker writes is refused and never run."""

from __future__ import annotations

import dataclasses
import io
import os
import pickle
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter, save
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata

from megatron_hgpt.checkpoint.metadata_file import METADATA, Place, read_contents, read_metadata_file
from megatron_hgpt.checkpoint.reading import read_chunks, read_object, read_whole
from megatron_hgpt.checkpoint.state import Chunk
from megatron_hgpt.errors import CheckpointError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint of torch's own writer with a tensor of each kind, and an object."""
    tensors = {
        "a.weight": torch.arange(24.0).view(2, 3, 4),
        "b": torch.ones(5, dtype=torch.bfloat16),
        "rng/0.0.0/cpu": torch.arange(7, dtype=torch.uint8),
        "scalar": torch.tensor(3.0),
    }
    save({**tensors, "object": {"x": [1, "two"]}}, storage_writer=FileSystemWriter(tmp_path / "c"), no_dist=True)
    return tmp_path / "c"


def read(folder: Path) -> Any:
    return read_contents(folder, read_metadata_file(folder))


def test_what_torch_wrote_is_read(folder: Path) -> None:
    contents = read(folder)
    assert set(contents.tensors) == {"a.weight", "b", "rng/0.0.0/cpu", "scalar"}
    assert {key.split(".")[0] for key in contents.objects} == {"object"}
    assert read_whole(folder, contents, "a.weight").equal(torch.arange(24.0).view(2, 3, 4))
    assert read_whole(folder, contents, "b").dtype == torch.bfloat16
    assert float(read_whole(folder, contents, "scalar")) == 3
    (key,) = (key for key in contents.objects if key.endswith("x.0") or key == "object.x")
    assert read_object(folder, contents, key) in (1, [1, "two"])


def test_a_rectangle_is_read_into_its_place(folder: Path) -> None:
    target = torch.zeros(1, 2, 3)
    piece = Chunk(key="a.weight", global_shape=(2, 3, 4), offset=(1, 1, 1), tensor=target)
    read_chunks(folder, read(folder), [piece])
    assert target.equal(torch.arange(24.0).view(2, 3, 4)[1:, 1:, 1:])


class Trap:
    """Unpickled, it makes a folder."""

    def __init__(self, function: Any, *args: Any) -> None:
        self.call = function, args

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call


def traps(path: Path) -> dict[str, bytes]:
    """Pickles that call something, by what they do."""
    make = f"import os; os.mkdir({str(path)!r})"
    metadata = b"ctorch.distributed.checkpoint.metadata\nMetadata\n"
    return {
        "a function of the system": pickle.dumps(Trap(os.mkdir, str(path))),
        "a builtin": pickle.dumps(Trap(exec, make)),
        "an old protocol": pickle.dumps(Trap(os.mkdir, str(path)), protocol=0),
        "a command": pickle.dumps(Trap(subprocess.call, ["mkdir", str(path)])),
        "a way through an allowed module": pickle.dumps(Trap(torch.hub.load, str(path), "x")),
        "a dotted name": b"ctorch\nhub.os.mkdir\n(V" + str(path).encode() + b"\ntR.",
        "a method set on an allowed class": metadata + b"(N}V__setstate__\ncposix\nmkdir\nstb.",
        "state given to an allowed class": metadata + b"}V__reduce__\nI1\nsb.",
    }


@pytest.mark.parametrize("trap", traps(Path("x")))
def test_nothing_that_the_file_names_is_run(trap: str, folder: Path, tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    (folder / METADATA).write_bytes(traps(ran)[trap])
    with pytest.raises(CheckpointError, match=r"\.metadata is refused"):
        read(folder)
    assert not ran.exists()


def test_the_traps_work_on_torch_s_own_reader(folder: Path, tmp_path: Path) -> None:
    """What the guard is for: without it the tests above would make the folder."""
    (folder / METADATA).write_bytes(traps(tmp_path / "ran")["a function of the system"])
    with pytest.raises(AttributeError):
        FileSystemReader(folder).read_metadata()
    assert (tmp_path / "ran").is_dir()


def test_a_trap_inside_real_metadata_is_refused(folder: Path, tmp_path: Path) -> None:
    metadata = FileSystemReader(folder).read_metadata()
    metadata.planner_data = {"x": Trap(os.mkdir, str(tmp_path / "ran"))}
    (folder / METADATA).write_bytes(pickle.dumps(metadata))
    with pytest.raises(CheckpointError, match=r"it names posix\.mkdir, which no checkpoint needs and which may run"):
        read(folder)
    assert not (tmp_path / "ran").exists()


def test_a_memo_of_four_billion_takes_no_memory(folder: Path) -> None:
    (folder / METADATA).write_bytes(b"Nr\xff\xff\xff\xff.")
    tracemalloc.start()
    with pytest.raises(CheckpointError, match="refused"):
        read(folder)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2**20


def change(folder: Path, function: Any) -> None:
    metadata = FileSystemReader(folder).read_metadata()
    function(metadata)
    (folder / METADATA).write_bytes(pickle.dumps(metadata))


def places(metadata: Any, **fields: Any) -> None:
    """Other values for the place of the first tensor."""
    for name, value in fields.items():
        setattr(next(iter(metadata.storage_data.values())), name, value)


LIES: dict[str, tuple[Any, str]] = {
    "a path out of the folder": (lambda m: places(m, relative_path="../x.distcp"), "'../x.distcp' is no file of the"),
    "an absolute path": (lambda m: places(m, relative_path="/etc/passwd"), "'/etc/passwd' is no file of the folder"),
    "a missing file": (lambda m: places(m, relative_path="no.distcp"), "No such file"),
    "beyond the end": (lambda m: places(m, offset=10**9), "ends before"),
    "a negative length": (lambda m: places(m, length=-1), "no offset and length"),
    "a length that is no number": (lambda m: places(m, length="5"), "no offset and length"),
    "a transformation": (lambda m: places(m, transform_descriptors=["zstd"]), "is transformed, which is not read"),
    "a tensor of 2**60 numbers": (
        lambda m: setattr(m.state_dict_metadata["b"], "size", torch.Size([2**60])), "is no size of a tensor",
    ),
    "a chunk outside": (
        lambda m: setattr(m.state_dict_metadata["b"].chunks[0], "offsets", torch.Size([3])), "leaves its tensor",
    ),
    "no tensors": (lambda m: setattr(m, "state_dict_metadata", 7), "refused"),
    "no places": (lambda m: setattr(m, "storage_data", None), "refused"),
}  # fmt: skip


@pytest.mark.parametrize("lie", LIES)
def test_what_cannot_be_is_refused(lie: str, folder: Path) -> None:
    function, message = LIES[lie]
    change(folder, function)
    with pytest.raises(CheckpointError, match=message):
        read(folder)


def tuples() -> Any:
    """As text 2**24 times its size in a pickle."""
    value: Any = ()
    for _ in range(24):
        value = (value, value)
    return value


BOMBS: dict[str, Any] = {
    "an offset": lambda m: places(m, offset=tuples()),
    "a transformation": lambda m: places(m, transform_descriptors=tuples()),
    "a file": lambda m: places(m, relative_path=tuples()),
    "a size": lambda m: setattr(m.state_dict_metadata["b"], "size", tuples()),
    "a list of chunks that many tensors share": lambda m: m.state_dict_metadata.update(
        dict.fromkeys(map(str, range(20000)), dataclasses.replace(m.state_dict_metadata["b"], chunks=[None] * 20000))
    ),
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_what_grows_when_it_is_worded_or_followed_is_refused_at_once(bomb: str, folder: Path) -> None:
    change(folder, BOMBS[bomb])
    content = read_metadata_file(folder)
    started_s = time.monotonic()
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError, match=r"\.metadata is refused"):
            read_contents(folder, content)
        assert tracemalloc.get_traced_memory()[1] < 2**24
    finally:
        tracemalloc.stop()
    assert time.monotonic() - started_s < 5


def test_keys_that_take_for_ever_to_hash_are_refused(folder: Path) -> None:
    key = pickle.dumps(tuples(), protocol=2)[2:-1]
    for content in (b"}" + key + b"K\x01s.", b"}(" + key + b"K\x01u.", b"(" + key + b"K\x01d."):
        with pytest.raises(CheckpointError, match="a tuple stands where a name belongs"):
            read_contents(folder, b"\x80\x02" + content)
    for content in (b"\x8f(" + key + b"\x90.", b"(" + key + b"\x91."):
        with pytest.raises(CheckpointError, match="it holds a set"):
            read_contents(folder, b"\x80\x04" + content)


@pytest.mark.parametrize("content", [b"", b".", b"\x80\x04", b"not a pickle", b"\x80\x04K\x01.", b"(" * 10000])
def test_bytes_that_are_no_map_are_refused(content: bytes, folder: Path) -> None:
    (folder / METADATA).write_bytes(content)
    with pytest.raises(CheckpointError, match=r"\.metadata is refused"):
        read(folder)


def test_every_cut_and_every_other_byte_is_refused_or_read(folder: Path) -> None:
    content = (folder / METADATA).read_bytes()
    for i in range(0, len(content), 7):
        for changed in (content[:i], content[:i] + bytes([content[i] ^ 0x55]) + content[i + 1 :]):
            try:
                read_contents(folder, changed)
            except CheckpointError as error:
                assert "\n" not in str(error)


def test_a_huge_file_is_not_read(folder: Path) -> None:
    with (folder / METADATA).open("r+b") as stream:
        stream.truncate(2**33)  # a hole: it takes no room
    with pytest.raises(CheckpointError, match="refused: 8589934592 bytes"):
        read(folder)


def test_a_missing_file_is_one_line(folder: Path) -> None:
    (folder / METADATA).unlink()
    with pytest.raises(CheckpointError, match=r"cannot read .*\.metadata: No such file"):
        read(folder)


def test_a_planted_object_among_the_tensors_is_refused(folder: Path, tmp_path: Path) -> None:
    """Of the room of a tensor: `torch.load` with weights_only refuses what is not data."""
    torch.save(Trap(os.mkdir, str(tmp_path / "ran")), folder / "trap.distcp")
    contents = read(folder)
    size = (folder / "trap.distcp").stat().st_size
    contents.places["a.weight", (0, 0, 0)] = Place(file="trap.distcp", offset=0, num_bytes=size)
    with pytest.raises(CheckpointError, match=r"trap\.distcp is damaged"):
        read_whole(folder, contents, "a.weight")
    assert not (tmp_path / "ran").exists()


def test_another_tensor_in_its_place_and_holes_are_refused(folder: Path) -> None:
    contents = read(folder)
    contents.places["a.weight", (0, 0, 0)] = contents.places["scalar", ()]
    with pytest.raises(CheckpointError, match="damaged: it holds another tensor"):
        read_whole(folder, contents, "a.weight")
    contents.tensors["b"].chunks.clear()
    with pytest.raises(CheckpointError, match="holds only a part of b"):
        read_whole(folder, contents, "b")
    piece = Chunk(key="a.weight", global_shape=(4, 3, 4), offset=(0, 0, 0), tensor=torch.zeros(4, 3, 4))
    with pytest.raises(CheckpointError, match=r"a\.weight is \(2, 3, 4\) there and \(4, 3, 4\) in the model"):
        read_chunks(folder, contents, [piece])
    absent = Chunk(key="c", global_shape=(1,), offset=(0,), tensor=torch.zeros(1))
    with pytest.raises(CheckpointError, match="lacks 1 tensors of the model"):
        read_chunks(folder, contents, [absent])


def test_parts_that_overlap_do_not_make_a_whole(folder: Path) -> None:
    """[0:3] and [1:3] of 5 are five numbers, and leave two out."""
    contents = read(folder)
    contents.tensors["b"].chunks[:] = [
        ChunkStorageMetadata(torch.Size([0]), torch.Size([3])), ChunkStorageMetadata(torch.Size([1]), torch.Size([2]))
    ]  # fmt: skip
    with pytest.raises(CheckpointError, match="holds a part of b twice"):
        read_whole(folder, contents, "b")


@pytest.mark.parametrize("value", [torch.ones(5).to_sparse(), torch.ones(5, device="meta")], ids=["sparse", "meta"])
def test_a_tensor_without_its_numbers_is_refused(value: torch.Tensor, folder: Path) -> None:
    contents = read(folder)
    torch.save(value.to(torch.bfloat16), folder / "other.distcp")
    size = (folder / "other.distcp").stat().st_size
    contents.places["b", (0,)] = Place(file="other.distcp", offset=0, num_bytes=size)
    with pytest.raises(CheckpointError, match="it holds another tensor than b"):
        read_whole(folder, contents, "b")


def test_a_packed_tensor_is_refused_before_it_is_unpacked(folder: Path) -> None:
    import zipfile

    stream, packed = io.BytesIO(), io.BytesIO()
    torch.save(torch.zeros(2**22), stream)  # 16 MiB of zeros take some kB
    with zipfile.ZipFile(stream) as source, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as target:
        for entry in source.infolist():
            target.writestr(entry.filename, source.read(entry))
    contents = read(folder)
    (folder / "bomb.distcp").write_bytes(packed.getvalue())
    size = len(packed.getvalue())
    contents.places["a.weight", (0, 0, 0)] = Place(file="bomb.distcp", offset=0, num_bytes=size)
    with pytest.raises(CheckpointError, match="an entry is compressed"):
        read_whole(folder, contents, "a.weight")


def test_reading_imports_nothing_that_the_file_names(folder: Path) -> None:
    """`antigravity` opens a browser when it is imported."""
    (folder / METADATA).write_bytes(b"cantigravity\nx\n.")
    with pytest.raises(CheckpointError, match="it names antigravity"):
        read(folder)
    assert "antigravity" not in sys.modules
