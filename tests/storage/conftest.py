"""Tensors of every kind, and how to compare and write them."""

import pytest
import torch

from cl_merge.storage import open_weights, write_weights
from cl_merge.storage.safetensors_format import CODES

SHAPES = [(), (0,), (1,), (5,), (3, 0, 2), (2, 3), (2, 1, 3, 2)]


def random_tensor(dtype, shape, seed=0):
    """Random bytes, as any bytes are values; booleans are 0 or 1."""
    generator = torch.Generator().manual_seed(seed)
    count = torch.Size(shape).numel() * dtype.itemsize
    top = 2 if dtype == torch.bool else 256
    raw = torch.randint(0, top, (count,), generator=generator, dtype=torch.uint8)
    return raw.view(dtype).reshape(shape)


@pytest.fixture
def tensors():
    """One of each dtype and shape; the names are not in order."""
    kinds = [(dtype, shape) for dtype in CODES for shape in SHAPES]
    return {
        f"{seed * 37 % 101}.{dtype}.{len(shape)}": random_tensor(dtype, shape, seed)
        for seed, (dtype, shape) in enumerate(kinds)
    }


@pytest.fixture
def same():
    return assert_same


def assert_same(weights, tensors):
    """What is read is what was written, bit for bit, whole and in pieces."""
    assert sorted(weights.names) == sorted(tensors)
    for name, tensor in tensors.items():
        assert weights.dtype(name) == tensor.dtype
        assert weights.shape(name) == tensor.shape
        flat = tensor.reshape(-1)
        third = tensor.numel() // 3
        for start, stop in [(0, None), (0, third), (third, 2 * third), (third, None)]:
            read = weights.read(name, start, stop)
            assert read.dtype == tensor.dtype
            assert read.dim() == 1
            assert read.data_ptr() % read.element_size() == 0
            expected = flat[start:stop].contiguous()
            assert torch.equal(read.view(torch.uint8), expected.view(torch.uint8)), name


@pytest.fixture
def write():
    return write_all


def write_all(path, tensors, metadata=None, **options):
    """Write tensors in two pieces each, the second one first."""
    entries = {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()}
    with write_weights(path, entries, metadata or {}, **options) as writer:
        for name, tensor in tensors.items():
            flat, half = tensor.reshape(-1), tensor.numel() // 2
            writer.write(name, half, flat[half:])
            writer.write(name, 0, flat[:half])
    return path


@pytest.fixture
def opened():
    """Open checkpoints that are closed after the test."""
    everything = []

    def open_one(path):
        everything.append(open_weights(path))
        return everything[-1]

    yield open_one
    for weights in everything:
        weights.close()
