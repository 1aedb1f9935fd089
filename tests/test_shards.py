"""Reading pieces of safetensors files: the values of the published library, no byte more."""

import json

import pytest
import torch
from safetensors.torch import save_file

from epmoe.shards import INDEX, SINGLE, Folder


def folder_with(tmp_path, **tensors):
    save_file(tensors, tmp_path / SINGLE)
    return Folder(tmp_path)


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, torch.bfloat16, torch.uint8, torch.float8_e4m3fn]
)
def test_what_the_library_wrote_is_what_is_read(tmp_path, dtype):
    want = torch.randint(0, 100, (6, 5)).to(dtype)
    folder = folder_with(tmp_path, other=torch.ones(3), mine=want)
    stored = folder.find("mine")
    assert (stored.dtype, stored.shape) == (dtype, (6, 5))
    out = torch.empty(4, 5, dtype=dtype)
    folder.read(stored, out, skip=10)
    assert torch.equal(out.view(torch.uint8), want[2:].contiguous().view(torch.uint8))


def test_it_reads_the_header_once_and_then_only_what_is_asked_for(tmp_path):
    folder = folder_with(tmp_path, mine=torch.arange(1000, dtype=torch.float32))
    header = folder.bytes_read
    assert header == (tmp_path / SINGLE).stat().st_size - 4000
    out = torch.empty(3)
    folder.read(folder.find("mine"), out, skip=500)
    assert out.tolist() == [500, 501, 502]
    assert folder.bytes_read == header + 12


@pytest.mark.parametrize("rows", [0, 1, 2, 7])
def test_pieces_come_in_order_and_in_even_numbers(tmp_path, monkeypatch, rows):
    monkeypatch.setattr("epmoe.shards.PIECE", 50)
    want = torch.arange(100, dtype=torch.float32).view(20, 5)
    folder = folder_with(tmp_path, mine=want)
    got = [piece.clone() for piece in folder.pieces(folder.find("mine"), 15, rows, 5)]
    assert [len(piece) for piece in got] == {0: [], 1: [1], 2: [2], 7: [2, 2, 2, 1]}[rows]
    assert torch.equal(torch.cat([torch.empty(0, 5), *got]), want[3 : 3 + rows])


def test_what_does_not_fit_is_refused_before_a_byte_is_read(tmp_path):
    folder = folder_with(tmp_path, mine=torch.zeros(10))
    stored = folder.find("mine")
    with pytest.raises(ValueError, match="it has 10"):
        folder.read(stored, torch.empty(4), skip=7)
    with pytest.raises(ValueError, match="contiguous torch.float32"):
        folder.read(stored, torch.empty(4, dtype=torch.float16))


def test_a_missing_name_file_or_folder_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=SINGLE):
        Folder(tmp_path)
    save_file({"a": torch.zeros(1)}, tmp_path / "one.safetensors")
    where = {"a": "one.safetensors", "b": "one.safetensors", "c": "two.safetensors"}
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": where}))
    folder = Folder(tmp_path)
    assert folder.find("a").shape == (1,)
    with pytest.raises(ValueError, match="no tensor 'z'"):
        folder.find("z")
    with pytest.raises(ValueError, match=r"one.safetensors has no tensor 'b'"):
        folder.find("b")
    with pytest.raises(FileNotFoundError, match=r"two.safetensors.*'c'"):
        folder.find("c")


def test_a_broken_file_is_named(tmp_path):
    path = tmp_path / SINGLE
    folder_with(tmp_path, mine=torch.zeros(100))
    whole = path.read_bytes()
    for broken in (
        whole[:-1],  # cut short
        (1 << 40).to_bytes(8, "little") + whole[8:],  # a header longer than the file
        whole[:8] + b"x" + whole[9:],  # no JSON
        whole.replace(b"[100]", b"[101]"),  # a shape that does not fit its place
    ):
        path.write_bytes(broken)
        with pytest.raises(ValueError, match=str(path)):
            Folder(tmp_path)
    (tmp_path / INDEX).write_text("[]")
    with pytest.raises(ValueError, match=INDEX):
        Folder(tmp_path)
