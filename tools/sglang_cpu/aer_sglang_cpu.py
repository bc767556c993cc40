"""Lets an SGLang server start where no CUDA build is installed; loaded by a .pth file of the server's environment.

It stands in for what the pinned version (constraints/sglang-cpu.txt) only finds beside CUDA:
* the two torchvision operators, whose library is linked against CUDA and cannot load beside a CPU torch;
* pinning of host memory, which is a no-op here;
* triton, where it is not installed: names resolve, kernels do not run.
The package sgl_kernel beside this file does the same for SGLang's own kernels.

Nothing here is used where the environment does not say SGLANG_USE_CPU_ENGINE=1.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import os
import sys
import types
from collections.abc import Sequence
from typing import Any

HOST_POOL = "sglang.srt.mem_cache.pool_host.common"


class _TorchvisionOperators(importlib.abc.MetaPathFinder):
    """Defines nms and qnms before torchvision is imported."""

    def find_spec(self, fullname: str, path: Sequence[str] | None = None, target: Any = None) -> None:
        if fullname == "torchvision":
            sys.meta_path.remove(self)
            import torch

            self._library = torch.library.Library("torchvision", "DEF")
            for name in ("nms", "qnms"):
                self._library.define(name + "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            torch.__aer_torchvision_operators__ = self._library  # type: ignore[attr-defined]  # must outlive this
        return None


class _UnpinnedHostMemory(importlib.abc.MetaPathFinder):
    """Replaces the registration of host memory with CUDA once the module that does it is loaded."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: Any = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != HOST_POOL:
            return None
        sys.meta_path.remove(self)
        spec = importlib.machinery.PathFinder.find_spec(fullname, path)
        assert spec is not None and spec.loader is not None
        run = spec.loader.exec_module

        def exec_module(module: Any) -> None:
            run(module)
            module._cuda_host_register = lambda *_, **__: None
            module._cuda_host_unregister = lambda *_, **__: None

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


class _Placeholder(types.ModuleType):
    """A module of which every name exists; called as a decorator, it returns the function."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__path__: list[str] = []
        self.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=True)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        full_name = f"{self.__name__}.{name}"
        value: Any
        if name[:1].isupper():
            value = type(name, (), {"__init__": lambda self, *_, **__: None})
        else:
            value = sys.modules.setdefault(full_name, _Placeholder(full_name))
        setattr(self, name, value)
        return value

    def __call__(self, *args: Any, **options: Any) -> Any:
        if len(args) == 1 and callable(args[0]) and not options:
            return args[0]
        return lambda function: function


class _AbsentTriton(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Serves placeholders for triton and everything below it."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: Any = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname == "triton" or fullname.startswith("triton."):
            return importlib.machinery.ModuleSpec(fullname, self, is_package=True)
        return None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        module = _Placeholder(spec.name)
        if spec.name == "triton":
            vars(module).update(
                __version__="3.0.0",
                cdiv=lambda a, b: -(a // -b),
                next_power_of_2=lambda n: 1 << (n - 1).bit_length(),
            )
        return module

    def exec_module(self, module: types.ModuleType) -> None:
        return None


def install() -> None:
    """Puts the finders in place."""
    sys.meta_path.insert(0, _TorchvisionOperators())
    sys.meta_path.insert(0, _UnpinnedHostMemory())
    if importlib.machinery.PathFinder.find_spec("triton") is None:
        sys.meta_path.append(_AbsentTriton())


if os.environ.get("SGLANG_USE_CPU_ENGINE") == "1":
    install()
