"""Import one transformers model class without what serving never runs.

A plain import of a model class reads all 500 model packages to list their names, and pulls in torch's
compiler, its distributed half and sympy: 2.0 s against 0.2 s this way (2 cores), and 110 MB of modules
that every snapshot would carry. The means, in force during the import only:

- ``transformers`` and ``transformers.models`` exist without their bodies having run; the first use of a
  name that is not a submodule runs the body then.
- Modules that are imported only so that classes can be named, or to mark functions for the compiler, are
  stood in for.
- torch says that it has no distributed half, and transformers that some optional libraries are absent.

Whatever goes wrong, the class is imported the plain way.
"""

from __future__ import annotations

import importlib
import logging
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from importlib.machinery import ModuleSpec, PathFinder
from importlib.metadata import version
from importlib.util import module_from_spec
from types import ModuleType
from typing import Any, Final

log = logging.getLogger(__name__)


def _unmarked(function: Any = None, *_: Any, **__: Any) -> Any:
    """Stands in for the compiler's decorators, which mark a function and give it back."""
    return _unmarked if function is None else function


def _transform_get_item_to_index() -> Any:
    """The real one, imported when a model needs it: masks with a custom pattern do."""
    return importlib.import_module(f"{COMPILER}._trace_wrapped_higher_order_op").TransformGetItemToIndex()


COMPILER: Final = "torch._dynamo"
# Served by us, not by transformers: batching across calls. Classes are named in it, never made.
REPLACED: Final = (
    "transformers.generation.continuous_batching",
    "transformers.generation.continuous_batching.cache",
)
# Used only when a model is compiled. The real modules are back in place after the import.
SHADOWED: Final[dict[str, dict[str, Any]]] = {
    COMPILER: {"disable": _unmarked, "allow_in_graph": _unmarked, "assume_constant_result": _unmarked},
    f"{COMPILER}._trace_wrapped_higher_order_op": {"TransformGetItemToIndex": _transform_get_item_to_index},
    "torch.nn.attention.flex_attention": {
        "_DEFAULT_SPARSE_BLOCK_SIZE": 128, "create_block_mask": None, "flex_attention": None,
    },
}  # fmt: skip


# Optional libraries that transformers imports wherever they are installed, and text models never use.
ABSENT: Final = (
    "is_accelerate_available", "is_scipy_available", "is_sklearn_available", "is_torchvision_available",
    "is_vision_available",
)  # fmt: skip


def import_class(module: str, name: str) -> type[Any]:
    """Import class ``name`` of ``module``, a module below ``transformers.models``.

    Raises:
        ImportError, AttributeError: there is no such class.
    """
    if "transformers" in sys.modules:
        return _get(module, name)
    try:
        with _lean():
            return _get(module, name)
    except Exception as error:
        log.warning("importing %s took the plain way: %r", module, error)
        for loaded in [known for known in sys.modules if known.partition(".")[0] == "transformers"]:
            del sys.modules[loaded]
        return _get(module, name)


def _get(module: str, name: str) -> type[Any]:
    found: type[Any] = getattr(importlib.import_module(module), name)
    return found


@contextmanager
def _lean() -> Iterator[None]:
    import torch

    package = _postponed("transformers")
    package.__dict__["__version__"] = version("transformers")
    package.__dict__["models"] = _postponed("transformers.models")
    sys.modules.update((name, _StandIn(name, {})) for name in REPLACED)
    with ExitStack() as stack:
        stack.enter_context(_replaced(torch.distributed.__dict__, {"is_available": lambda: False}))
        stand_ins = {name: _StandIn(name, contents) for name, contents in SHADOWED.items()}
        stack.enter_context(_replaced(sys.modules, stand_ins))
        answers: dict[str, Any] = dict.fromkeys(ABSENT, lambda *_: False)
        answers["direct_transformers_import"] = lambda *_: package  # else the whole body, a second time
        for module in ("transformers.utils", "transformers.utils.import_utils"):
            stack.enter_context(_replaced(importlib.import_module(module).__dict__, answers))
        yield


@contextmanager
def _replaced(target: dict[str, Any], entries: Mapping[str, Any]) -> Iterator[None]:
    known = {name: target[name] for name in entries if name in target}
    target.update(entries)
    try:
        yield
    finally:
        for name in entries:
            del target[name]
        target.update(known)


def _postponed(name: str) -> ModuleType:
    """A package whose body runs when a name is asked for that is not a submodule."""
    parent = name.rpartition(".")[0]
    spec = PathFinder.find_spec(name, sys.modules[parent].__path__ if parent else None)
    if spec is None or spec.loader is None:
        raise ImportError(f"{name} is not installed")
    package = module_from_spec(spec)
    package.__getattr__ = _resolver(package, spec)  # type: ignore[method-assign]
    sys.modules[name] = package
    return package


def _resolver(package: ModuleType, spec: ModuleSpec) -> Callable[[str], Any]:
    began = False

    def resolve(attribute: str) -> Any:
        if attribute.startswith("__"):
            raise AttributeError(attribute)
        if PathFinder.find_spec(f"{spec.name}.{attribute}", package.__path__):
            return importlib.import_module(f"{spec.name}.{attribute}")
        nonlocal began
        if not began:
            began = True
            assert spec.loader is not None
            spec.loader.exec_module(package)  # puts another module in its place
        if sys.modules[spec.name] is package:
            raise AttributeError(attribute)
        return getattr(sys.modules[spec.name], attribute)

    return resolve


class _StandIn(ModuleType):
    """A module with the contents given; beyond them every class name is an empty class."""

    def __init__(self, name: str, contents: dict[str, Any]) -> None:
        super().__init__(name)
        self.__path__: list[str] = []  # what makes a module a package
        self.__dict__.update(contents)

    def __getattr__(self, name: str) -> Any:
        if not name[0].isupper():
            raise AttributeError(f"the stand-in for {self.__name__} has no {name}")
        empty = type(name, (), {"__module__": self.__name__})
        setattr(self, name, empty)
        return empty
