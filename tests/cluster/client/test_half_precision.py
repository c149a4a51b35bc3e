"""float32 in half the bytes, in numpy alone: equal to torch bit for bit, for every kind of number there is."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch

from expertmesh.cluster.client.arrays import to_wire
from expertmesh.cluster.client.half_precision import BLOCK, LARGEST, check_payload_dtype, to_bfloat16, to_float16
from expertmesh.experts.errors import InvalidRequest
from expertmesh.experts.wire import WireTensor, bfloat16_to_float32

EDGES = [0.0, -0.0, 1.0, -1.0, np.inf, -np.inf, np.nan, -np.nan, 65504.0, 2.0**-24, 2.0**-25, 2.0**-126, 2.0**-149]


def samples(most: float) -> np.ndarray[Any, Any]:
    """Floats of every exponent, all ties between neighbours in bfloat16, subnormals, NaNs with any bits, infinities."""
    chance = np.random.default_rng(20260901)
    anything = chance.integers(0, 2**32, 300_000, dtype=np.uint32)
    high = np.arange(2**16, dtype=np.uint32) << 16
    ties = np.concatenate([high | low for low in (0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF)]).astype(np.uint32)
    halves = np.arange(2**16, dtype=np.uint16).view(np.float16).astype(np.float32)  # with the ties between them
    between = halves * np.float32(1 + 2**-11)
    found = np.concatenate([anything.view(np.float32), ties.view(np.float32), halves, between, np.float32(EDGES)])
    with np.errstate(invalid="ignore"):
        return found[~(np.isfinite(found) & (np.abs(found) > most))]


def same(ours: np.ndarray[Any, Any], theirs: torch.Tensor) -> None:
    """Equal bit for bit; a NaN need only be one, since torch gives other bits to it in vectors than in scalars."""
    ours, theirs = ours.reshape(-1), theirs.reshape(-1)
    bits = theirs.view(torch.int16).numpy().view(np.uint16)
    nan = torch.isnan(theirs).numpy()
    np.testing.assert_array_equal(ours[~nan], bits[~nan])
    assert torch.isnan(torch.from_numpy(ours.view(np.int16)).view(theirs.dtype))[nan].all()


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_bfloat16_is_what_torch_makes() -> None:
    values = samples(LARGEST["bfloat16"])
    assert values.size > 10 * BLOCK  # over the ends of blocks too
    same(to_bfloat16(values), torch.from_numpy(values).bfloat16())


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_float16_is_what_torch_makes() -> None:
    values = samples(LARGEST["float16"])
    same(to_float16(values).view(np.uint16), torch.from_numpy(values).half())


@pytest.mark.parametrize("half", [None, "float16", "bfloat16"])
@pytest.mark.parametrize("kind", [np.float32, np.float64, np.float16, np.int32, np.uint8, bool])
def test_the_byte_order_of_rows_does_not_matter(kind: type, half: str | None) -> None:
    rows = np.array([[1, 2, 300], [0, 1, 7]]).astype(kind)
    if half is not None and rows.dtype not in (np.float32, np.float16):
        half = None
    swapped = rows.astype(rows.dtype.newbyteorder(">"))
    assert bytes(to_wire(swapped, name="x", half=half)[0].data) == bytes(to_wire(rows, name="x", half=half)[0].data)


def test_bits_of_bfloat16_may_come_in_either_byte_order() -> None:
    bits = to_bfloat16(np.float32([[1.0, -2.5, 300.0]]))
    for given in (bits, bits.astype(">u2")):
        assert bytes(to_wire(given, name="x", raw=True)[0].data) == bits.tobytes()


@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (1,), (5, 7), (BLOCK,), (2, BLOCK - 1), (3, 2, 4)])
def test_shapes_and_strides_are_kept(shape: tuple[int, ...]) -> None:
    values = np.random.default_rng(1).standard_normal(shape).astype(np.float32)
    for given in (values, values.T, np.repeat(values, 2, axis=-1)[..., ::2] if shape else values):
        assert to_bfloat16(given).shape == given.shape
        same(to_bfloat16(given), torch.from_numpy(given.copy()).bfloat16())


def test_what_is_given_is_not_changed_and_there_and_back_is_within_the_bound() -> None:
    values = np.random.default_rng(2).standard_normal((64, 64)).astype(np.float32)
    before = values.copy()
    for back, bound in ((bfloat16_to_float32(to_bfloat16(values)), 2**-8), (to_float16(values), 2**-11)):
        assert (np.abs(back.astype(np.float32) - values) <= bound * np.abs(values) + 2.0**-25).all()
    np.testing.assert_array_equal(values, before)


TOO_LARGE = {"float16": (65520.0, -65520.0, 1e30), "bfloat16": (3.3961776e38, -3.4028235e38)}


@pytest.mark.parametrize(("half", "value"), [(name, value) for name in TOO_LARGE for value in TOO_LARGE[name]])
def test_a_finite_value_never_becomes_infinite_in_silence(half: str, value: float) -> None:
    values = np.array([[1.0, np.inf], [value, np.nan]], np.float32)
    for rows in (values, torch.from_numpy(values)):
        with pytest.raises(InvalidRequest, match=f"x holds values beyond .* the largest {half}"):
            to_wire(rows, name="x", half=half)
    values[1, 0] = LARGEST[half]
    to_wire(values, name="x", half=half)
    to_wire(torch.from_numpy(values), name="x", half=half)


@pytest.mark.parametrize("half", ["float16", "bfloat16"])
@pytest.mark.parametrize("kind", ["numpy", "torch"])
def test_an_array_goes_narrow_and_its_answer_comes_back_wide(kind: str, half: str) -> None:
    x: Any = np.random.default_rng(3).standard_normal((4, 3)).astype(np.float32)
    wanted = torch.from_numpy(x).to(getattr(torch, half))
    x = torch.from_numpy(x) if kind == "torch" else x
    tensor, arrays = to_wire(x, name="x", half=half)
    assert (tensor.dtype, tensor.nbytes) == (half, 24)
    assert bytes(tensor.data) == wanted.view(torch.uint8).numpy().tobytes()
    back = arrays.restore(tensor)
    assert back.dtype == x.dtype
    assert torch.equal(torch.as_tensor(back), wanted.float())
    back[0] = 1
    integers = arrays.restore(WireTensor.from_numpy(np.arange(4)))  # what is no float stays what it is
    assert str(integers.dtype).endswith("int64")
    assert arrays.restore(WireTensor(half, (0, 3), b"")).dtype == x.dtype


@pytest.mark.parametrize("dtype", ["int64", "int8", "uint8", "bool", "float64"])
def test_rows_that_are_no_float32_are_refused(dtype: str) -> None:
    for rows in (np.ones((2, 2), dtype), torch.ones((2, 2), dtype=getattr(torch, dtype))):
        with pytest.raises(InvalidRequest, match=f'float32 rows, but x is {dtype}: .* payload_dtype="float32"'):
            to_wire(rows, name="x", half="bfloat16")


@pytest.mark.parametrize("half", ["float16", "bfloat16"])
def test_rows_of_two_bytes_go_as_they_are(half: str) -> None:
    for rows in (torch.ones(2, 2).half(), torch.ones(2, 2).bfloat16(), np.ones((2, 2), np.float16)):
        tensor, arrays = to_wire(rows, name="x", half=half)
        assert tensor.dtype == str(rows.dtype).removeprefix("torch.")
        assert arrays.restore(tensor).dtype == rows.dtype
    bits, _ = to_wire(np.ones((2, 2), np.uint16), name="x", raw=True, half=half)
    assert bits.dtype == "bfloat16"


def test_names_that_are_none() -> None:
    for name in (None, "float16", "bfloat16", "float32"):
        check_payload_dtype(name)
    for wrong in ("int8", "half", "", 16, np.float16):
        with pytest.raises(InvalidRequest, match="payload_dtype"):
            check_payload_dtype(wrong)


def test_it_needs_no_torch() -> None:
    code = (
        "import sys; sys.modules['torch'] = None; import numpy as np; "
        "from expertmesh.cluster.client.arrays import to_wire; "
        "t, kind = to_wire(np.float32([[1.5]]), name='x', half='bfloat16'); print(t.dtype, kind.restore(t)[0, 0])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert run.stdout.strip() == "bfloat16 1.5"
