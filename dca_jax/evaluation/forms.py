"""Checks the records of each task before tables are made from them.

The file with a run's lines may have been damaged by a disk, a merge or an editor.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from dca_jax.errors import InputError
from dca_jax.evaluation.results import LINES, RUN, Run, damage
from dca_jax.fields import shown

FILLED = re.compile(r"\S")  # a string that is not blank


@dataclass(frozen=True, kw_only=True)
class Form:
    """The types of a task's record fields and of the settings that its tables need.

    A type is a Python type (float: a finite number; int: at least 0), `FILLED`, or a tuple of
    allowed strings. Fields in `optional` may be missing.
    """

    key: Mapping[str, Any]
    value: Mapping[str, Any] | Callable[[Mapping[str, Any]], Mapping[str, Any]]
    settings: Mapping[str, Any] = field(default_factory=dict)
    optional: frozenset[str] = frozenset()

    def check(self, run: Run) -> None:
        """Raises InputError, with file and field, for a record or setting of another type.

        Failed records have no value, but their keys are checked too.
        """
        with damage(f"{run.folder / RUN}"):
            self._check(run.settings, self.settings)
        for record in run.records:
            with damage(f"{run.folder / LINES}: the line with the key {shown(record.key)}"):
                self._check(record.key, self.key)
                if record.value is not None:
                    value = self.value
                    self._check(
                        record.value, value if isinstance(value, Mapping) else value(record.key)
                    )

    def _check(self, found: Mapping[str, Any], types: Mapping[str, Any]) -> None:
        for name, kind in types.items():
            value = found.get(name)
            if value is None and name in self.optional:
                continue
            if not _is_a(kind, value):
                expected = EXPECTED[kind] if kind in EXPECTED else f"one of {', '.join(kind)}"
                raise InputError(f"its {name} is {shown(value)}, expected {expected}")


EXPECTED: dict[Any, str] = {
    str: "a string",
    FILLED: "a string that is not blank",
    int: "an integer from 0 on",
    float: "a finite number",
    bool: "true or false",
}


def _is_a(kind: Any, value: Any) -> bool:
    if kind is FILLED:
        return isinstance(value, str) and FILLED.search(value) is not None
    if not isinstance(kind, type):
        return isinstance(value, str) and value in kind
    if kind is bool or isinstance(value, bool):
        return kind is bool and isinstance(value, bool)
    if kind is float:
        return isinstance(value, int | float) and abs(value) < 1e300
    return isinstance(value, kind) and (kind is not int or 0 <= value < 2**63)
