"""Every annotation of a package is checked at every call: shapes, dtypes and plain types.

As jaxtyping's import hook does it, but quicker: that one makes two checkers for each function, for
one inside another whenever the outer one is called, and checks arguments twice. Here functions with
shapes have jaxtyping's memory of axes around beartype's one check; others have that check alone.
"""

import ast
import functools
import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from typing import Any, ForwardRef, Literal, get_args, get_origin

from beartype import BeartypeConf, beartype
from jaxtyping import AbstractArray, TypeCheckError, config, jaxtyped

# An int may stand for a float, as it does to Pyright.
CONF = BeartypeConf(is_pep484_tower=True, violation_type=TypeCheckError)


def checked(function: Callable[..., Any]) -> Callable[..., Any]:
    """This function, with its arguments and what it returns checked."""
    parts = [part for x in inspect.get_annotations(function).values() for part in parts_of(x)]
    quoted = any(isinstance(part, str | ForwardRef) for part in parts)
    if quoted or inspect.isgeneratorfunction(function):
        # It knows of names that are there for Pyright only, and looks at nothing that is yielded.
        return jaxtyped(function, typechecker=beartype(conf=CONF))
    found = None

    @functools.wraps(function)
    def either(*args: Any, **kwargs: Any) -> Any:
        nonlocal found
        if config.jaxtyping_disable:
            return function(*args, **kwargs)
        if found is None:  # when it is first called: most of what a process imports never is
            found = beartype(function, conf=CONF)
            if any(inspect.isclass(part) and issubclass(part, AbstractArray) for part in parts):
                found = jaxtyped(found, typechecker=None)
        return found(*args, **kwargs)

    return either


def parts_of(annotation: Any) -> Iterator[Any]:
    """It, and all that stands in its brackets."""
    yield annotation
    if get_origin(annotation) is not Literal:
        for inner in get_args(annotation):
            yield from parts_of(inner)


def checked_class(kind: type) -> type:
    """A dataclass' `__init__` is written by the dataclass; other classes have their methods."""
    return jaxtyped(kind, typechecker=beartype(conf=CONF))


class Decorating(ast.NodeTransformer):
    """Puts `checked` next to each function, so `jax.custom_vjp` and the like come after it."""

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.FunctionDef:
        self.generic_visit(node)
        node.decorator_list.append(name_of("checked", node))
        return node

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.ClassDef:
        self.generic_visit(node)
        node.decorator_list.insert(0, name_of("checked_class", node))
        return node


def name_of(decorator: str, node: ast.AST) -> ast.expr:
    return ast.copy_location(ast.Name(f"__{decorator}__", ast.Load()), node)


class CheckedLoader(SourceFileLoader):
    """Decorates what it loads; what it compiles is not kept, as the plain module's is."""

    def get_code(self, fullname: str) -> Any:
        path = self.get_filename(fullname)
        tree = Decorating().visit(ast.parse(self.get_data(path), path))
        return compile(ast.fix_missing_locations(tree), path, "exec", dont_inherit=True)

    def exec_module(self, module: Any) -> None:
        module.__checked__, module.__checked_class__ = checked, checked_class
        super().exec_module(module)


class CheckedFinder(MetaPathFinder):
    def __init__(self, packages: Sequence[str]):
        self.packages = packages

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if fullname.partition(".")[0] not in self.packages:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and isinstance(spec.loader, SourceFileLoader):
            spec.loader = CheckedLoader(spec.loader.name, spec.loader.path)
        return spec


def install(*packages: str) -> None:
    """To be called before anything of these packages is imported."""
    sys.meta_path.insert(0, CheckedFinder(packages))
