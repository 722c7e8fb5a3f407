"""Arrays arrive unchanged and aligned, in one buffer for a GPU, and never share memory."""

import numpy as np
import pytest
import torch

from flex_nano_vllm.device import packed_bytes, unpacked, upload

CPU = torch.device("cpu")
NUMBERS = np.arange(24).reshape(2, 3, 4)
DTYPES = {
    np.int64: torch.int64,
    np.int32: torch.int32,
    np.bool_: torch.bool,
    np.float64: torch.float64,
    np.float32: torch.float32,
    np.uint8: torch.uint8,
}
ARRAYS = {
    "all dtypes": [NUMBERS[0, :, :3].astype(dtype) for dtype in DTYPES],
    "dtypes in the other order": [np.array([1, 0, 2]).astype(dtype) for dtype in reversed(DTYPES)],
    "full and just above 16 bytes": [np.arange(length, dtype=np.uint8) for length in (15, 16, 17, 32)],
    "empty ones": [np.array([7]), *(np.empty(shape, dtype=np.int32) for shape in ((0,), (0, 3), (3, 0)))],
    "empty between others": [np.array([True]), np.empty((0, 2)), np.array([7])],
    "without dimensions": [np.array(5), np.array(True), np.array(0.5)],
    "not contiguous": [NUMBERS.T, NUMBERS[:, ::2], NUMBERS[..., 1], np.broadcast_to(np.array([1, 2]), (3, 2))],
    "reversed": [NUMBERS[::-1], np.arange(5, dtype=np.int32)[::-1]],
}
# A tensor cannot be made of a numpy array with negative strides.
ON_CPU = {name: arrays for name, arrays in ARRAYS.items() if name != "reversed"}


def assert_equal(tensors: list[torch.Tensor], arrays: list[np.ndarray]) -> None:
    assert len(tensors) == len(arrays)
    for tensor, array in zip(tensors, arrays):
        assert (tensor.dtype, tensor.shape) == (DTYPES[array.dtype.type], array.shape)
        np.testing.assert_array_equal(tensor.numpy(), array)


def memory(tensors: list[torch.Tensor]) -> list[int]:
    """Return the addresses of the memory of all tensors that have any."""
    return [tensor.untyped_storage().data_ptr() for tensor in tensors if tensor.numel()]


@pytest.mark.parametrize("arrays", ARRAYS.values(), ids=ARRAYS)
def test_unpacked_arrays_equal_the_packed_ones(arrays):
    packed = packed_bytes(arrays)
    assert (packed.dtype, packed.ndim) == (torch.uint8, 1)
    tensors = unpacked(packed, arrays)
    assert_equal(tensors, arrays)
    assert all(tensor.is_contiguous() for tensor in tensors)


@pytest.mark.parametrize("arrays", ARRAYS.values(), ids=ARRAYS)
def test_every_array_begins_at_a_multiple_of_16_bytes(arrays):
    content = packed_bytes(arrays).numpy().tobytes()
    for array in arrays:
        expected = array.tobytes()
        padded_len = -(-len(expected) // 16) * 16
        assert content[:padded_len] == expected + bytes(padded_len - len(expected))
        content = content[padded_len:]
    assert content == b""


@pytest.mark.parametrize("arrays", ARRAYS.values(), ids=ARRAYS)
def test_unpacked_arrays_share_no_memory(arrays):
    packed = packed_bytes(arrays)
    tensors = unpacked(packed, arrays)
    addresses = memory([packed, *tensors])
    assert len(set(addresses)) == len(addresses)
    packed.fill_(99)
    assert_equal(tensors, arrays)


@pytest.mark.parametrize("arrays", ON_CPU.values(), ids=ON_CPU)
def test_an_upload_copies_each_array(arrays):
    arrays = [array.copy() for array in arrays]
    tensors = upload(arrays, CPU)
    assert_equal(tensors, arrays)
    assert len(set(memory(tensors))) == len(memory(tensors))
    before = [array.copy() for array in arrays]
    for array in arrays:
        array[...] = np.logical_not(array)  # no value stays the same
    assert_equal(tensors, before)


def test_the_same_array_twice_gives_two_tensors():
    array = np.arange(3)
    for first, second in (upload([array, array], CPU), unpacked(packed_bytes([array, array]), [array, array])):
        first[0] = 7
        assert second.tolist() == [0, 1, 2] and array.tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("given", "wanted"),
    [(np.int64, np.float64), (np.bool_, np.float64), (np.int64, np.int32), (np.float64, np.float32), (np.uint8,) * 2],
)
def test_a_conversion_gives_the_wanted_dtype_and_a_copy(given, wanted):
    array = np.array([0, 1, 1]).astype(given)
    (tensor,) = upload([array], CPU, wanted)
    assert tensor.dtype == DTYPES[wanted] and tensor.tolist() == [0, 1, 1]
    array[0] = 1
    assert tensor.tolist() == [0, 1, 1]


@pytest.mark.parametrize(
    ("given", "wanted"), [(np.float64, np.int64), (np.float64, np.uint8), (np.int64, np.uint8), (np.int64, np.bool_)]
)
def test_a_conversion_that_could_change_values_is_refused(given, wanted):
    with pytest.raises(TypeError, match="Cannot cast"):
        upload([np.zeros(2), np.zeros(2, dtype=given)], CPU, wanted)
