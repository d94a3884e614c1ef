"""The base of all layers."""

import functools
import inspect
import types
from collections.abc import Callable
from typing import Any

from flax import nnx


class Module(nnx.Module):
    """An NNX module of whose methods `nnx.tabulate` records `__call__` alone.

    `nnx.tabulate` replaces each public method by one that turns all arguments into arrays. Numbers, dtypes
    and states do not survive that, so it must not find the methods that take them.
    """

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        for name, value in list(vars(cls).items()):
            if inspect.isfunction(value) and not name.startswith("_"):
                setattr(cls, name, _Method(value))


class _Method:
    """A method, but not what `inspect.isfunction` takes for one."""

    def __init__(self, function: Callable):
        functools.update_wrapper(self, function)
        self._function = function

    def __get__(self, module: Any, _: type | None = None) -> Callable:
        return self if module is None else types.MethodType(self._function, module)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._function(*args, **kwargs)
