"""Old names of modules and functions, served for one release with a DeprecationWarning that gives the new name.

    import nextlat_dist.inference.batch                  # nextlat_dist.inference.engine.engine, with a warning
    python -m nextlat_dist.bench.path_star               # runs nextlat_dist.experiments.path_star, with a warning

`MODULES` maps an old module that is gone to its successor. `NAMES` lists, by old module, single names that went to
another module than that: there the old module may still exist, and only these names are forwarded. Importing
`nextlat_dist` or `data_tools` calls `install`; to end the forwarding, delete this file and those calls.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.util
import sys
import warnings
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from types import CodeType, ModuleType
from typing import Any, cast

from nextlat_dist.moved_names import MODULES, NAMES


def install() -> None:
    """Put the finder before all others, once: an old package's folder could hold a new module of an old name."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


class _Finder(importlib.abc.MetaPathFinder):
    """Serves modules of `MODULES`; gives living modules of `NAMES` their old names."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname in MODULES:
            is_package = any(old.startswith(f"{fullname}.") for old in MODULES)
            return ModuleSpec(fullname, _OldModuleLoader(), is_package=is_package)
        if fullname not in NAMES:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and isinstance(spec.loader, SourceFileLoader):
            spec.loader = _LivingModuleLoader(spec.loader.name, spec.loader.path)
        return spec


class _OldModule(ModuleType):
    """Looks every name up in the successor; calling it calls what the package's root exports under that name."""

    def __getattr__(self, name: str) -> Any:
        if name in NAMES.get(self.__name__, {}):
            return _moved_name(self.__name__, name)
        successor = MODULES[self.__name__]
        if name == "__all__":
            return [*_public(importlib.import_module(successor)), *NAMES.get(self.__name__, ())]
        if name.startswith("__"):
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        return getattr(importlib.import_module(successor), name)

    def __dir__(self) -> list[str]:
        return list(self.__all__)

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        """`nextlat_dist.export` was a package and is a function: with the old package imported it is both."""
        package, _, name = self.__name__.partition(".")
        exports = sys.modules[package].__getattr__
        return cast(Callable[..., Any], exports(name))(*arguments, **options)


class _OldModuleLoader(importlib.abc.InspectLoader):
    """An empty module that forwards. `python -m` asks for code: it gets the successor's."""

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        _warn(spec.name, MODULES[spec.name], stacklevel=3)
        return _OldModule(spec.name, f"Moved to {MODULES[spec.name]}.")

    def exec_module(self, module: ModuleType) -> None:
        pass

    def is_package(self, fullname: str) -> bool:
        return any(old.startswith(f"{fullname}.") for old in MODULES)

    def get_source(self, fullname: str) -> None:
        return None

    def get_code(self, fullname: str) -> CodeType:
        successor = MODULES[fullname]
        spec = importlib.util.find_spec(successor)
        assert spec is not None
        assert isinstance(spec.loader, importlib.abc.InspectLoader)
        # As if the program itself did it: warnings about other people's code are hidden by default.
        warnings.warn_explicit(_text(fullname, successor), DeprecationWarning, fullname, 1, "__main__")
        code = spec.loader.get_code(successor)
        assert code is not None
        return code


class _LivingModuleLoader(SourceFileLoader):
    """The module as it is, and its old names by a module `__getattr__`."""

    def exec_module(self, module: ModuleType) -> None:
        def forward(name: str) -> Any:
            if name in NAMES[module.__name__]:
                return _moved_name(module.__name__, name)
            if own is not None:
                return own(name)
            raise AttributeError(f"module {module.__name__!r} has no attribute {name!r}")

        super().exec_module(module)
        own = module.__dict__.get("__getattr__")
        module.__dict__["__getattr__"] = forward


def _moved_name(old_module: str, name: str) -> Any:
    """The object that was `name` in `old_module`. The table says `module`, or `module:new name`."""
    module, _, new_name = NAMES[old_module][name].partition(":")
    new_name = new_name or name
    _warn(f"{old_module}.{name}", f"{module}.{new_name}", stacklevel=4)
    found: Any = importlib.import_module(module)
    for part in new_name.split("."):
        found = getattr(found, part)
    return found


def _public(module: ModuleType) -> list[str]:
    return list(getattr(module, "__all__", [name for name in vars(module) if not name.startswith("_")]))


def _text(old: str, new: str) -> str:
    return f"{old} is now {new}; the old name goes with the next release"


def _warn(old: str, new: str, stacklevel: int) -> None:
    warnings.warn(_text(old, new), DeprecationWarning, stacklevel=stacklevel)
