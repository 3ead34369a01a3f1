"""Tiles cover what they are for, pieces cover a cache, and a larger memory is used only where there is one."""

import pytest
import torch

from moemla import kernels

pytestmark = pytest.mark.skipif(kernels._no_triton() is not None, reason="needs Triton")


@pytest.mark.parametrize("batch", [1, 3, 16, 70, 300])
@pytest.mark.parametrize("n_slots", [1, 31, 128, 1000, 40_000])
@pytest.mark.parametrize("block", [16, 64, 128])
def test_pieces_cover_the_cache_and_none_waits_for_another(batch, n_slots, block):
    from moemla.kernels import tiling

    piece, number = tiling.pieces(batch, n_slots, block)
    assert piece % block == 0
    assert (number - 1) * piece < n_slots <= number * piece
    assert number == 1 or piece >= 128
    assert batch * number <= max(batch, tiling.PROGRAMS if block >= 128 else 2 * tiling.PROGRAMS)


def test_a_block_is_a_power_of_two_that_covers_its_width():
    from moemla.kernels import tiling

    assert [tiling.block(width, 64) for width in (1, 16, 17, 33, 64, 1000)] == [16, 16, 32, 64, 64, 64]
    assert tiling.rows(n_slots=62 * 40, n_experts=62, width=256) == 64
    assert tiling.rows(n_slots=62 * 4000, n_experts=62, width=256) == 128
    assert tiling.rows(n_slots=62 * 4000, n_experts=62, width=32) == 64


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("heads, rank", [(1, 8), (16, 512), (128, 512), (40, 300), (16, 1024), (8, 4096)])
def test_a_tile_of_latents_fits_or_there_is_none(dtype, heads, rank, monkeypatch):
    """What a smaller GPU can hold a larger one can, no program holds more sums than registers, and no size is refused
    where its queries and sixteen slots have room."""
    from moemla.kernels import tiling

    x, found = torch.empty(1, dtype=dtype), []
    for room in (20_000, tiling.ROOM, 232_448):
        monkeypatch.setattr(tiling, "room", lambda tensor, room=room: room)
        tile = tiling.joint_decode(x, heads, rank, 64)
        found.append(tile is not None)
        row = (tiling.block(rank, 1 << 20) + 64) * x.element_size()
        assert found[-1] == ((16 + 16) * row + 16 * 16 * x.element_size() <= room)
        if tile:
            assert tile["BLOCK_H"] * tiling.block(rank, 1 << 20) <= 16_384 or tile["BLOCK_H"] == 16
            assert (tile["BLOCK_S"] + tile["BLOCK_H"]) * row <= room
        wide = tiling.latent_decode(x, heads, 32, rank)
        assert wide is None or wide["BLOCK_S"] * tiling.block(rank, 1 << 20) * x.element_size() <= room
    assert found == sorted(found)


def test_a_cpu_has_the_room_of_the_smallest_gpu(monkeypatch):
    from moemla.kernels import tiling

    x = torch.empty(4, dtype=torch.bfloat16)
    assert tiling.room(x) == tiling.ROOM
    small = tiling.latent_decode(x, 8, 32, 256), tiling.product(x, 128, 1024, 1024)
    monkeypatch.setattr(tiling, "room", lambda tensor: tiling.LARGE)
    large = tiling.latent_decode(x, 8, 32, 256), tiling.product(x, 128, 1024, 1024)
    assert [tile["BLOCK_S"] for tile in (small[0], large[0])] == [64, 128]
    assert [tile["BLOCK_I"] for tile in (small[1], large[1])] == [32, 64]
