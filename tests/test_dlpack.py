"""Arrays and tensors of every kind are read, or refused in words; no number is made up."""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from handmade import model_of
from host_device import HostDevice
from torch._subclasses.fake_tensor import FakeTensorMode

import smoothl1_deploy.backends._gpu as gpu
from smoothl1_deploy import LossSpec, attach, export, load, loss_over
from smoothl1_deploy._device import is_on_device
from smoothl1_deploy._dlpack import as_array
from smoothl1_deploy._floats import NUMPY_DTYPE
from smoothl1_deploy._spec import DTYPES
from smoothl1_deploy.backends._runner import as_number
from smoothl1_deploy.backends._torch import TorchCudaBackend
from smoothl1_deploy.errors import InvalidInputError, SpecError
from smoothl1_deploy.serving import Client

INTEGERS = ("int8", "int16", "int32", "int64", "uint8", "bool")
TORCH = {name: getattr(torch, name) for name in (*DTYPES, *INTEGERS)}
NUMPY = {**NUMPY_DTYPE, **{name: np.dtype(name) for name in INTEGERS}}


def test_plain_arrays_and_tensors_are_taken_without_a_copy() -> None:
    for name, shape in itertools.product(NUMPY, ((), (0,), (3,), (2, 3))):
        array, tensor = np.ones(shape, NUMPY[name]), torch.ones(shape, dtype=TORCH[name])
        for given, address in ((array, array.ctypes.data), (tensor, tensor.data_ptr())):
            taken = as_array(given, "input")
            assert (taken.shape, taken.dtype) == (shape, NUMPY[name])
            assert (taken.astype(np.float64) == 1).all()
            assert taken.ctypes.data == address or not taken.size


def test_big_endian_arrays_and_scalars_of_numpy() -> None:
    for dtype in ("float16", "float32", "float64", "int32"):
        array = np.arange(5).astype(np.dtype(dtype).newbyteorder(">"))
        taken = as_array(array, "input")
        assert taken.dtype == np.dtype(dtype) and taken.dtype.isnative
        assert taken.tolist() == [0, 1, 2, 3, 4]
    for dtype in NUMPY_DTYPE.values():
        taken = as_array(dtype.type(1.5), "input")
        assert isinstance(taken, np.ndarray)
        assert (taken.shape, taken.dtype, float(taken)) == ((), dtype, 1.5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_layouts_of_numpy(dtype: str) -> None:
    base = np.arange(12).reshape(3, 4).astype(NUMPY_DTYPE[dtype])
    read_only = base.copy()
    read_only.flags.writeable = False
    unaligned = np.frombuffer(b"\0" + base.tobytes(), base.dtype, offset=1).reshape(3, 4)
    broadcast = np.broadcast_to(base[:1], base.shape)
    views = (base.T, base[:, ::2], base[::-1, ::-1], np.asfortranarray(base))
    for array in (*views, broadcast, read_only, unaligned):
        taken = as_array(array, "input")
        assert taken.flags.c_contiguous
        assert taken.tolist() == array.tolist()
        assert taken.dtype == NUMPY_DTYPE[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
def test_layouts_of_torch(dtype: str) -> None:
    base = torch.arange(12).reshape(3, 4).to(TORCH[dtype])
    grad = base.clone().requires_grad_()
    views = [base.T, base[:, ::2], base[:1].expand(3, 4), base.flip(0), grad, grad.T, grad * 1]
    for tensor in (*views, torch.nn.Parameter(base)):
        taken = as_array(tensor, "input")
        assert taken.flags.c_contiguous
        assert taken.dtype == NUMPY_DTYPE[dtype]
        assert taken.tolist() == tensor.tolist()


def test_a_lazily_negated_tensor_keeps_its_sign() -> None:
    """`z.conj().imag` shares the memory of `z`; DLPack hands it out without the minus."""
    tensor = torch.complex(torch.ones(3), torch.arange(3.0)).conj().imag
    assert tensor.is_neg()
    assert as_array(tensor, "input").tolist() == [0.0, -1.0, -2.0]


class _OnlyDlpack:
    def __init__(self, array: np.ndarray) -> None:
        self.array = array

    def __dlpack__(self, **kwargs: object) -> object:
        return self.array.__dlpack__(**kwargs)  # type: ignore[arg-type]

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.array.__dlpack_device__()


def test_anything_with_dlpack_is_taken() -> None:
    assert as_array(_OnlyDlpack(np.arange(3.0)), "input").tolist() == [0, 1, 2]


def test_what_is_no_array_is_refused() -> None:
    for value in ([1.0], (1.0,), 1.0, None, "1", {}, b"1", memoryview(b"1")):
        with pytest.raises(InvalidInputError) as caught:
            as_array(value, "target")
        text = f"target is a {type(value).__name__}; give a numpy array or a tensor with __dlpack__"
        assert str(caught.value) == text
    with pytest.raises(InvalidInputError) as caught:
        as_array(np.ma.masked_array([1.0, 2.0], [True, False]), "input")
    assert str(caught.value) == (
        "input is a masked array, and a loss knows no mask; fill it or select what counts: "
        "input.filled(...) or input.compressed()"
    )


class _Broken(_OnlyDlpack):
    def __init__(self, error: Exception) -> None:
        super().__init__(np.ones(3))
        self.error = error

    def __dlpack__(self, **kwargs: object) -> object:
        raise self.error


def test_what_can_not_be_exported_is_refused() -> None:
    for error in (BufferError, NotImplementedError, TypeError, OSError, KeyError):
        with pytest.raises(InvalidInputError) as caught:
            as_array(_Broken(error("it is on the moon")), "input")
        assert str(caught.value) == (
            f"input can't be read through DLPack ({error('it is on the moon')}); move it to the "
            "CPU, or give a numpy array"
        )


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_tensors_without_plain_memory_are_refused() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        tensor = torch.eye(3, dtype=dtype)
        masked = torch.masked.masked_tensor(tensor.float(), tensor > 0)
        for other in (tensor.to_sparse(), tensor.to_sparse_csr(), masked):
            with pytest.raises(InvalidInputError, match="^input can't be read through DLPack"):
                as_array(other, "input")


# Without data


#: Whether numpy gives capsules of DLPack 1.0.
VERSIONED = np.lib.NumpyVersion(np.__version__) >= "2.1.0"


class _NoData(_OnlyDlpack):
    """Gives capsules, of either version, whose pointer is NULL."""

    def __init__(self, versioned: bool, shape: tuple[int, ...] = (3, 4)) -> None:
        super().__init__(np.ones(shape, np.float32))
        self._versioned = versioned

    def __dlpack__(self, **asked: object) -> object:
        if self._versioned:
            capsule, name, at = self.array.__dlpack__(max_version=(1, 0)), b"dltensor_versioned", 32
        else:
            capsule, name, at = self.array.__dlpack__(), b"dltensor", 0
        pointer = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)(
            ("PyCapsule_GetPointer", ctypes.pythonapi)
        )
        ctypes.c_void_p.from_address(pointer(capsule, name) + at).value = None
        return capsule


def _fake(dtype: torch.dtype = torch.float32, start: int = 0) -> torch.Tensor:
    with FakeTensorMode():
        return torch.ones(5, 4, dtype=dtype)[start:]


def _freed(start: int, left: int = 0) -> torch.Tensor:
    """As FSDP frees a parameter."""
    tensor = torch.ones(5, 4)[start:]
    tensor.untyped_storage().resize_(left)
    return tensor


WITHOUT: dict[str, Callable[[], Any]] = {
    "fake": _fake,
    "fake half": lambda: _fake(torch.bfloat16),
    "fake slice": lambda: _fake(start=2),  # its pointer is no NULL, and reading it ends the process
    "meta": lambda: torch.ones(3, 4, device="meta"),
    "freed": lambda: _freed(0),
    "freed slice": lambda: _freed(2),
    "cut off": lambda: _freed(2, left=60),
    "capsule": lambda: _NoData(versioned=False),
    **({"versioned capsule": lambda: _NoData(versioned=True)} if VERSIONED else {}),
}


def _on_a_device() -> Any:
    return TorchCudaBackend(HostDevice()).load(export(LossSpec(), shape=("N", 4)))


MODEL = model_of("g (float[N, 4] x) => (float[N, 4] y) { y = Relu(x) }")
ZERO = np.zeros((3, 4), np.float32)
#: Whatever takes an array of the caller's.
DOORS: dict[str, Callable[[Any], object]] = {
    "run": lambda x: load(export(LossSpec(), shape=("N", 4)), "onnx-reference").run(x, ZERO),
    "weight": lambda x: load(export(LossSpec(weight="count")), "onnx-reference").run(
        ZERO, ZERO, weight=x
    ),
    "run on a device": lambda x: _on_a_device().run(x, torch.zeros(3, 4)),
    "capture": lambda x: _on_a_device().capture(x, torch.zeros(3, 4)),
    "loss_over": lambda x: loss_over([(x, ZERO)], LossSpec(), backend="onnx-reference"),
    "attach target": lambda x: attach(MODEL, "y", x),
    "attach weight": lambda x: attach(MODEL, "y", "t", LossSpec(weight="count"), weight=x),
    "client": lambda x: Client.infer(None, {"input": x}),  # refused before anything is sent
}


@pytest.mark.parametrize("door", DOORS)
def test_no_door_reads_memory_that_is_not_there(door: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And an error in the caller's `__dlpack__` is a sentence at every one."""
    monkeypatch.setattr(gpu, "is_on_device", lambda x: not isinstance(x, (np.ndarray, type(None))))
    for kind, make in WITHOUT.items():
        value = make()
        with pytest.raises(InvalidInputError) as caught:
            DOORS[door](value)
        without = f" is a {type(value).__name__} without data; give one that holds"
        assert without in str(caught.value), kind
    with pytest.raises(InvalidInputError, match="can't be read through DLPack .*no space left"):
        DOORS[door](_Broken(OSError(28, "no space left on device")))


def test_an_error_in_the_caller_s_dlpack_device_is_a_sentence() -> None:
    class Lost(_OnlyDlpack):
        def __dlpack_device__(self) -> tuple[int, int]:
            raise OSError("where was it")

    assert not is_on_device(Lost(ZERO))
    assert _on_a_device().run(Lost(ZERO), ZERO)["loss"] == 0  # numpy doesn't ask for the device
    with pytest.raises(InvalidInputError, match="^input can't be read through DLPack .where was"):
        HostDevice().adopt(Lost(ZERO), "input")


def test_no_element_needs_no_data() -> None:
    for shape in ((0, 4), (3, 0)):
        for empty in (_NoData(VERSIONED, shape), torch.ones(shape)):
            assert as_array(empty, "input").shape == shape


def test_a_beta_without_a_number_is_a_sentence() -> None:
    fake = _fake()[0, 0]
    with pytest.raises(InvalidInputError, match="^beta must be one number, got FakeTensor"):
        as_number(fake)
    module = torch.nn.SmoothL1Loss(beta=fake)
    with pytest.raises(SpecError, match="^beta is a FakeTensor without a number"):
        LossSpec.from_module(module)
