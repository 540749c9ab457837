"""What the loader is asked for: every byte of every tensor, at a place that libraries can compute from."""

from __future__ import annotations

import json
import os
import socket
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from model_host import delivery as deliveries
from model_host.delivery import ALIGNMENT, UNIT, Delivery, DeliveryFailed, Extent, extents, plan
from snapshotd.jobs.context import Deadlines


def test_extents_are_where_the_file_has_the_bytes(tmp_path: Path) -> None:
    tensors = {"a": torch.arange(12, dtype=torch.int32), "b": torch.rand(3, 5, dtype=torch.float64)}
    file = tmp_path / "model.safetensors"
    save_file(tensors, file, metadata={"format": "pt"})

    found = extents([file])

    data = file.read_bytes()
    for name, tensor in tensors.items():
        extent = found[name]
        assert data[extent.offset : extent.offset + extent.size] == tensor.numpy().tobytes()


@given(sizes=st.lists(st.integers(1, 5000), min_size=1, max_size=20), files=st.integers(1, 3))
def test_every_tensor_is_copied_whole_to_an_aligned_place_of_its_own(sizes: list[int], files: int) -> None:
    # given tensors one behind the other in several files
    ends = [8] * files
    tensors = {}
    for number, size in enumerate(sizes):
        file = number % files
        tensors[str(number)] = Extent(Path(f"/{file}"), ends[file], size)
        ends[file] += size

    made = plan(tensors)

    # when the pieces are copied, each byte is where its tensor is said to be
    block: dict[int, tuple[str, int]] = {}
    for path, offset, size, place in made.pieces:
        for step in range(size):
            assert place + step not in block
            block[place + step] = (path, offset + step)
    for name, extent in tensors.items():
        place = made.places[name]
        assert place % ALIGNMENT == 0
        assert block[place] == (str(extent.file), extent.offset)
        assert block[place + extent.size - 1] == (str(extent.file), extent.offset + extent.size - 1)
    assert made.size % UNIT == 0
    assert made.size > max(block)


def test_aligned_neighbours_are_one_piece() -> None:
    tensors = {str(n): Extent(Path("/f"), 8 + n * ALIGNMENT, ALIGNMENT) for n in range(100)}

    assert plan(tensors).pieces == (("/f", 8, 100 * ALIGNMENT, 0),)


def answering(path: Path, reply: bytes, descriptors: list[int]) -> list[dict[str, Any]]:
    """A loader for one order; the list gets what it was asked."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(str(path))
    listener.listen()
    orders: list[dict[str, Any]] = []

    def serve() -> None:
        with listener, listener.accept()[0] as connection:
            orders.append(json.loads(connection.makefile().readline()))
            if reply:
                socket.send_fds(connection, [reply], descriptors)

    threading.Thread(target=serve).start()
    return orders


def test_an_order_is_answered_with_a_descriptor(tmp_path: Path) -> None:
    wanted = plan({"a": Extent(Path("/f"), 8, 100)})
    with (tmp_path / "memory").open("w+") as memory:
        orders = answering(tmp_path / "loader.sock", b"{}", [memory.fileno()])

        delivery = Delivery.order(tmp_path / "loader.sock", "GPU-1", wanted)
        descriptor = delivery.receive()

        assert os.path.sameopenfile(descriptor, memory.fileno())
        os.close(descriptor)
    assert orders == [{"gpu": "GPU-1", "size": UNIT, "pieces": [["/f", 8, 100, 0]]}]


@pytest.mark.parametrize(("reply", "said"), [(b"no room", "no room"), (b"", "the loader is gone")])
def test_a_loader_that_cannot_do_it_says_why(tmp_path: Path, reply: bytes, said: str) -> None:
    answering(tmp_path / "loader.sock", reply, [])
    delivery = Delivery.order(tmp_path / "loader.sock", "GPU-1", plan({}))

    with pytest.raises(DeliveryFailed, match=said):
        delivery.receive()


def test_where_no_loader_listens_the_order_fails(tmp_path: Path) -> None:
    with pytest.raises(DeliveryFailed):
        Delivery.order(tmp_path / "loader.sock", "GPU-1", plan({}))


@pytest.mark.parametrize("ended", ["given up", "cancelled"])
def test_a_loader_learns_that_its_order_is_not_wanted_any_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ended: str
) -> None:
    monkeypatch.setattr(deliveries, "RECEIVE_TIMEOUT", 0.01)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(tmp_path / "loader.sock"))
        listener.listen()
        delivery = Delivery.order(tmp_path / "loader.sock", "GPU-1", plan({}))
        with listener.accept()[0] as connection, connection.makefile("rb") as lines:
            assert lines.readline()
            if ended == "cancelled":
                delivery.cancel()
            else:
                with pytest.raises(DeliveryFailed, match="no answer"):
                    delivery.receive()
            assert lines.read() == b""


def test_waiting_for_a_loader_leaves_time_to_copy_instead() -> None:
    waiting = deliveries.ORDER_TIMEOUT + deliveries.RECEIVE_TIMEOUT
    assert waiting < Deadlines().wake / 2
