"""A slot's bytes are one string wherever its tensors lie; checksums see any change of them."""

import random

import pytest
import torch

from epmoe.kernels.moving import SUM, Crc, SlotBytes


def drawn(slots=3, apart=True):
    """Tensors of every kind; w1 and w2 are views whose rows lie apart."""
    g = torch.Generator().manual_seed(1)
    both = torch.randn(slots, 12, 7, generator=g).bfloat16()
    wide = torch.randn(slots, 7, 9, generator=g)
    return {
        "alpha": torch.randn(slots, generator=g),
        "scale": torch.randint(0, 256, (slots, 5), generator=g, dtype=torch.uint8),
        "w1": both[:, ::2] if apart else both[:, ::2].contiguous(),
        "w2": wide[..., 4:7] if apart else wide[..., 4:7].contiguous(),
    }


def whole(weights, slot):
    parts = [weights[n][slot].contiguous().view(-1).view(torch.uint8) for n in sorted(weights)]
    return torch.cat(parts)


@pytest.mark.parametrize("apart", [False, True])
def test_any_stretch_is_those_bytes_of_the_string(apart):
    weights, rng = drawn(apart=apart), random.Random(2)
    slots = SlotBytes(weights)
    assert slots.nbytes == 4 + 5 + 84 + 84
    for _ in range(500):
        slot, at = rng.randrange(3), rng.randrange(slots.nbytes)
        length = rng.randrange(1, 60)
        found, next_at = [], at
        for where, piece in slots.pieces(slot, at, length):
            assert where == next_at
            found.append(piece.flatten())
            next_at += piece.numel()
        assert torch.equal(torch.cat(found), whole(weights, slot)[at : at + length])


def test_pieces_are_the_slots_themselves():
    weights = drawn()
    new = whole(drawn(), 2)
    slots = SlotBytes(weights)
    others = [whole(weights, slot).clone() for slot in (1, 2)]
    for at, piece in slots.pieces(0, 0, slots.nbytes):
        piece.copy_(new[at : at + piece.numel()].view(piece.shape))
    assert torch.equal(whole(weights, 0), new)
    assert all(map(torch.equal, others, (whole(weights, slot) for slot in (1, 2))))


def test_a_contiguous_tensor_is_one_piece_and_rows_that_lie_apart_go_together():
    assert len(list(SlotBytes(drawn(apart=False)).pieces(0, 0, 177))) == 4
    assert len(list(SlotBytes(drawn()).pieces(0, 0, 177))) == 4
    pieces = list(SlotBytes(drawn()).pieces(0, 9 + 3, 60))  # w1 has rows of 14 bytes
    assert [tuple(piece.shape) for _, piece in pieces] == [(11,), (3, 14), (7,)]


def test_a_checksum_sees_every_byte_and_not_how_it_was_cut():
    content = torch.arange(200, dtype=torch.uint8)
    one, two, other = Crc(), Crc(), Crc()
    one.add(content, 0)
    two.add(content[:60].view(6, 10), 0)
    two.add(content[60:], 60)
    assert torch.equal(one.value(), two.value())
    assert len(one.value()) == SUM
    content[199] ^= 1
    other.add(content, 0)
    assert not torch.equal(one.value(), other.value())
