"""Reading what `torch.save` wrote without running code that the file names.

A pickle names functions and classes by their module and calls them. Here a name is looked up in one table, `_harmless`,
whose entries make tensors, arrays and plain containers; nothing is ever imported for a file. Any other name becomes an
inert class, whose objects can be created and filled, but hold nothing and call nothing. An attack needs functions of
Python's own library, which no checkpoint does: a file that names one is refused.
"""

import argparse
import functools
import pickle
import sys
import types
import zipfile
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections import Counter, OrderedDict
from collections.abc import Callable
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import IO, Any

import numpy as np
import torch
from torch import _utils as rebuild

from mae.errors import UserError

# Modules of Python's library whose objects settings and counters hold; they are not read, but do no harm.
DATA_MODULES = {
    "abc", "collections", "copyreg", "dataclasses", "datetime", "decimal", "enum", "fractions", "functools", "pathlib",
    "random", "re", "types", "typing", "uuid",
}  # fmt: skip
DATA_NAMES = {"builtins.getattr", "builtins.object", "builtins.type"}
FAILURES = (
    pickle.UnpicklingError, RuntimeError, EOFError, OSError, LookupError, ValueError, AttributeError, TypeError,
    AssertionError, MemoryError, OverflowError,
)  # fmt: skip  # what a damaged file leads to


IN_PYTHON: Any = vars(pickle)["_Unpickler"]  # not the one in C: methods of its instructions can be replaced


class Inert:
    """An object of a class that is not in the table; it drops whatever is put into it."""

    def __new__(cls, *args: object, **options: object) -> "Inert":
        return object.__new__(cls)

    def __init__(self, *args: object, **options: object):
        pass

    def _drop(self, *args: object, **options: object) -> None:
        pass

    __setstate__ = __setitem__ = append = extend = add = update = _drop

    def __call__(self, *args: object, **options: object) -> "Inert":
        return self


def load_torch_file(path: Path) -> tuple[object, list[str]]:
    """What a file of `torch.save` holds, and the classes whose objects were left out.

    Raises UserError where it is damaged, no such file, or names functions of Python's own library.
    """
    mapped = zipfile.is_zipfile(path)
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped), []
    except pickle.UnpicklingError:
        pass  # it holds more than tensors, numbers and text
    except FAILURES as error:
        raise _damaged(path, error) from error
    reader = _reader()
    try:
        # torch opens TorchScript and tar files by other means; the call above refused them
        content = torch.load(path, map_location="cpu", weights_only=False, pickle_module=reader, mmap=mapped)
    except _Refused as error:
        raise UserError(
            f"init={path} is refused: it carries code ({error}), which is never run. Only tensors, "
            "numbers, text and plain containers are read: save the weights on their own."
        ) from error
    except FAILURES as error:
        raise _damaged(path, error) from error
    return content, sorted(reader.unread)


def _damaged(path: Path, error: Exception) -> UserError:
    if isinstance(error, pickle.UnpicklingError):
        return UserError(f"init={path} is truncated or was not written by torch.save.")
    return UserError(f"init={path} is truncated or not a checkpoint ({type(error).__name__}).")


class _Refused(Exception):
    """A function that the file wants to be called, by its full name."""


def _reader() -> types.SimpleNamespace:
    """A stand-in for the module `pickle` in `torch.load`; `unread` collects the names of classes not in the table."""
    unread: set[str] = set()

    class Unpickler(IN_PYTHON):
        dispatch = dict(IN_PYTHON.dispatch)

        def find_class(self, module: str, name: str) -> object:
            module, name = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))  # of Python 2
            path = f"{NUMPY_1.get(module, module)}.{name}"
            if path in _harmless():
                return _harmless()[path]
            root = path.partition(".")[0]
            if root in sys.stdlib_module_names and root not in DATA_MODULES and path not in DATA_NAMES:
                raise _Refused(path)
            unread.add(path)
            return type(name, (Inert,), {"__module__": module})

        def load_build(self) -> None:
            """Sets the state of an object; never of a class or a function, which others use too."""
            if not isinstance(self.stack[-2], _STATEFUL):
                raise pickle.UnpicklingError(f"the state of a {type(self.stack[-2]).__name__}")
            super().load_build()

        def load_binpersid(self) -> None:
            """A storage, by torch; the old format's marks of whole modules are a class and its source code."""
            entry = self.stack.pop()
            old = isinstance(entry, tuple) and entry[:1] in (("module",), (b"module",))
            self.append(entry[1] if old else self.persistent_load(entry))

        dispatch[pickle.BUILD[0]] = load_build
        dispatch[pickle.BINPERSID[0]] = load_binpersid

    def read(file: IO[bytes], **options: str) -> object:
        return Unpickler(file, **options).load()

    return types.SimpleNamespace(__name__="mae", Unpickler=Unpickler, load=read, unread=unread)


_STATEFUL = (Inert, argparse.Namespace, OrderedDict, torch.Tensor, np.ndarray, np.dtype)
NUMPY_1 = {"numpy.core.multiarray": "numpy._core.multiarray", "numpy.core.numeric": "numpy._core.numeric"}


@functools.cache
def _harmless() -> dict[str, object]:
    """Full name to what is called for it."""
    table: dict[str, object] = {
        "argparse.Namespace": argparse.Namespace,
        "collections.OrderedDict": OrderedDict,
        "collections.Counter": Counter,
        "collections.defaultdict": _without_factory,
        "_codecs.encode": _latin,  # bytes under protocol 2
        "torch.Size": torch.Size,
        "torch.device": torch.device,
        "torch.nn.parameter.Parameter": torch.nn.Parameter,
        "torch._utils._rebuild_tensor": rebuild._rebuild_tensor,
        "torch._utils._rebuild_tensor_v2": rebuild._rebuild_tensor_v2,
        "torch._utils._rebuild_tensor_v3": rebuild._rebuild_tensor_v3,
        "torch._utils._rebuild_parameter": _data_alone,
        "torch._utils._rebuild_parameter_with_state": _data_alone,
        "torch._tensor._rebuild_from_type_v2": _plain_tensor,
    }
    table |= {f"builtins.{kind.__name__}": kind for kind in (set, frozenset, complex, bytearray, slice, range)}
    table |= {f"builtins.{kind.__name__}": kind for kind in (bool, int, float, str, bytes, list, tuple, dict)}
    paths = {"Path": PurePosixPath, "PosixPath": PurePosixPath, "WindowsPath": PureWindowsPath}
    paths |= {kind.__name__: kind for kind in (PurePosixPath, PureWindowsPath)} | {"PurePath": PurePosixPath}
    table |= {f"pathlib.{name}": kind for name, kind in paths.items()}
    table |= {f"pathlib._local.{name}": kind for name, kind in paths.items()}  # Python 3.13
    table |= {str(kind): kind for kind in vars(torch).values() if isinstance(kind, torch.dtype)}
    return table | _numpy()


def _numpy() -> dict[str, object]:
    """numpy's scalars, arrays, and types."""
    kinds = [kind for kind in vars(np).values() if isinstance(kind, type) and issubclass(kind, np.generic)]
    table: dict[str, object] = {"numpy.bool": np.bool_, **{f"numpy.{kind.__name__}": kind for kind in kinds}}
    table |= {f"numpy.dtypes.{name}": getattr(np.dtypes, name) for name in np.dtypes.__all__}
    scalar, array, buffer = np.float64().__reduce__()[0], np.empty(0).__reduce__()[0], np.empty(0).__reduce_ex__(5)[0]
    assert not isinstance(buffer, str)
    return table | {
        "numpy.dtype": np.dtype,
        "numpy.ndarray": np.ndarray,
        "numpy._core.multiarray.scalar": scalar,
        "numpy._core.multiarray._reconstruct": array,
        "numpy._core.numeric._frombuffer": buffer,
    }


def _without_factory(*args: object) -> dict[object, object]:
    return {}


def _latin(text: str, encoding: str = "latin1") -> bytes:
    if encoding not in ("latin1", "latin-1"):
        raise pickle.UnpicklingError(f"bytes in {encoding}")
    return text.encode("latin1")


def _data_alone(data: torch.Tensor, *rest: object) -> torch.Tensor:
    return data


def _plain_tensor(function: Callable[..., object], kind: object, args: tuple[object, ...], state: object) -> object:
    """A tensor that had attributes, or was of a class of its own, without them."""
    return function(*args) if function in _REBUILD else None


_REBUILD = (rebuild._rebuild_tensor, rebuild._rebuild_tensor_v2, rebuild._rebuild_tensor_v3, _data_alone)
