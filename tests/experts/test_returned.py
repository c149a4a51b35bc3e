"""What experts return: a copy that nobody else holds, or an error that says what came and what may."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from expertmesh.experts.construct.returned import own_rows
from expertmesh.experts.errors import ExpertFailed
from expertmesh.experts.tensors import byte_view
from expertmesh.experts.wire import ITEM_SIZES, MAX_DIMS

CPU = torch.device("cpu")
ROWS = torch.arange(12.0).reshape(3, 4)
OTHER_ORDER = ">" if sys.byteorder == "little" else "<"


class Wrapped(Tensor):
    """A tensor that only wraps another and has no memory of its own, as those of torch's own extensions."""

    @staticmethod
    def __new__(cls, inner: Tensor) -> Any:
        return Tensor._make_wrapper_subclass(cls, inner.shape)  # type: ignore[attr-defined]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise NotImplementedError


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "sparse": (lambda: ROWS.to_sparse(), "a sparse_coo tensor, which cannot be sent: return a dense"),
    "compressed": (lambda: ROWS.to_sparse_csr(), "a sparse_csr tensor"),
    "mkldnn": (lambda: ROWS.to_mkldnn(), "a mkldnn tensor"),
    "meta": (lambda: ROWS.to("meta"), "a meta tensor, without data"),
    "nested": (lambda: torch.nested.nested_tensor(list(ROWS)), "a nested tensor"),
    "jagged": (lambda: torch.nested.nested_tensor(list(ROWS), layout=torch.jagged), "a NestedTensor"),
    "wrapper": (lambda: Wrapped(ROWS), "a Wrapped"),
    "nine dimensions": (lambda: ROWS.reshape(3, *[1] * 7, 4), "9 dimensions, but at most 8"),
    "complex": (lambda: ROWS.to(torch.complex64), "complex64, which cannot be sent: return one of float64"),
    "quantised": (lambda: torch.quantize_per_tensor(ROWS, 0.1, 0, torch.qint8), "qint8, which cannot be sent"),
    "objects": (lambda: np.array([[None]] * 3), "object, which cannot be sent"),
    "texts": (lambda: np.array(["a", "b", "c"]), "str"),
    "dates": (lambda: np.zeros(3, "datetime64[s]"), "datetime64"),
    "records": (lambda: np.zeros(3, [("a", "f4")]), "void"),
    "masked": (lambda: np.ma.masked_array(ROWS.numpy(), ROWS.numpy() > 3), "a masked array"),
    "a number": (lambda: np.float32(1), r"shape \[\] for 3 rows"),
    "a row too few": (lambda: ROWS[1:], r"shape \[2, 4\] for 3 rows"),
    "a list": (lambda: [1, 2, 3], "must return a tensor or an array; this one returned list"),
    "nothing": (lambda: None, "this one returned NoneType"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_sent_is_refused_where_the_expert_ran(kind: str) -> None:
    make, message = REFUSED[kind]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = make()
    with pytest.raises(ExpertFailed, match=message):
        own_rows(result, 3, CPU)


ALLOWED: dict[str, Callable[[], Any]] = {
    "strided": lambda: ROWS.t().contiguous().t(),
    "expanded": lambda: ROWS[:1].expand(3, 4),
    "a parameter": lambda: nn.Parameter(ROWS.clone()),
    "a lazy negation": lambda: torch.complex(-ROWS, -ROWS).conj().imag,
    "eight dimensions": lambda: ROWS.reshape(3, *[1] * (MAX_DIMS - 2), 4),
    "reversed array": lambda: ROWS.numpy()[::-1, ::-1],
    "read-only array": lambda: np.broadcast_to(ROWS.numpy()[0], (3, 4)),
}


@pytest.mark.parametrize("kind", ALLOWED)
def test_whatever_its_layout_the_rows_are_told_right(kind: str) -> None:
    result = ALLOWED[kind]()
    answer = own_rows(result, 3, CPU)
    wanted = np.asarray(result.detach().resolve_neg() if isinstance(result, Tensor) else result)
    assert np.array_equal(answer.numpy(), wanted)
    assert bytes(byte_view(answer)) == np.ascontiguousarray(wanted).tobytes()
    assert not answer.requires_grad


@pytest.mark.parametrize("dtype", [name for name in ITEM_SIZES if name != "bfloat16"])
def test_the_byte_order_of_an_array_is_normalised(dtype: str) -> None:
    foreign = np.arange(6).reshape(3, 2).astype(np.dtype(dtype).newbyteorder(OTHER_ORDER))
    answer = own_rows(foreign, 3, CPU)
    assert answer.dtype == getattr(torch, dtype)
    assert np.array_equal(answer.numpy(), foreign)


@pytest.mark.parametrize("buffer", [torch.zeros(3, 4), np.zeros((3, 4), np.float32)], ids=["tensor", "array"])
def test_an_answer_is_no_longer_the_experts_to_write_to(buffer: Any) -> None:
    answer = own_rows(buffer, 3, CPU)
    buffer[:] = 1
    assert not answer.any()
    answer.fill_(2)
    assert (buffer == 1).all()


def test_a_check_on_the_device_meta_needs_no_data() -> None:
    assert own_rows(ROWS.to("meta"), 3, torch.device("meta")).is_meta
