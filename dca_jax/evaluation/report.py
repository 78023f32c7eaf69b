"""Makes summaries, tables and plots from the lines of a run, and an HTML page from many runs.

Everything is made from the files of `dca_jax.evaluation.results`, so it can be made again, also for
unfinished runs.
"""

import base64
import platform
import resource
import sys
from collections.abc import Callable, Mapping, Sequence
from html import escape
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import jax

from dca_jax.errors import InputError
from dca_jax.evaluation import (
    few_shot,
    infinite_bench,
    l_eval,
    longbench_v2,
    needle,
    passkey,
    speed,
    windows,
)
from dca_jax.evaluation.forms import Form
from dca_jax.evaluation.results import (
    RUN,
    Record,
    Run,
    damage,
    read_run,
    write_json,
    write_text,
)
from dca_jax.evaluation.ruler import results as ruler_results
from dca_jax.evaluation.ruler import task as ruler
from dca_jax.evaluation.tables import Outcome
from dca_jax.fields import shown
from dca_jax.text_files import parse_json, read_text_file


class Task(NamedTuple):
    """The form of a task's records, and the function that computes its outcome.

    `outcome` is called with the settings, the records that did not fail, and the paper's model.
    """

    form: Form
    outcome: Callable[[Mapping[str, Any], Sequence[Record], str | None], Outcome]


TASKS = {
    "perplexity": Task(windows.FORM, windows.outcome),
    "passkey": Task(passkey.FORM, passkey.outcome),
    "needle": Task(needle.FORM, needle.outcome),
    "ruler": Task(ruler.FORM, ruler_results.outcome),
    "infinite-bench": Task(infinite_bench.FORM, infinite_bench.outcome),
    "longbench-v2": Task(longbench_v2.FORM, longbench_v2.outcome),
    "few-shot": Task(few_shot.FORM, few_shot.outcome),
    "l-eval": Task(l_eval.FORM, l_eval.outcome),
    "speed": Task(speed.FORM, speed.outcome),
}
PACKAGES = ("dca_jax", "jax", "jaxlib", "flax", "numpy", "transformers", "tokenizers")
SUMMARY, MARKDOWN, PAGE = "summary.json", "table.md", "report.html"


def check_records(run: Run) -> None:
    """Raises InputError if a run's records do not fit its task, because files are damaged."""
    if run.task not in TASKS:
        raise InputError(f"task {shown(run.task)} is not known; expected one of {', '.join(TASKS)}")
    TASKS[run.task].form.check(run)


def outcome(run: Run) -> Outcome:
    """The outcome of a run, from the samples that did not fail.

    Raises:
        InputError: an unknown task, or records in another form.
    """
    check_records(run)
    good = [record for record in run.records if record.error is None]
    return TASKS[run.task].outcome(run.settings, good, run.paper)


def machine() -> dict[str, Any]:
    """Facts about this process: packages, device and peak memory.

    `device_peak_bytes` is the device's own count for this process, None if there is none (on a
    CPU); `host_peak_bytes` is the largest resident set.
    """
    device = jax.devices()[0]
    stats = device.memory_stats() or {}
    unit = 1 if sys.platform == "darwin" else 1024  # unit of ru_maxrss
    return {
        "versions": {name: _version(name) for name in PACKAGES}
        | {"python": platform.python_version()},
        "device": device.device_kind,
        "devices": jax.device_count(),
        "platform": jax.default_backend(),
        "device_peak_bytes": stats.get("peak_bytes_in_use"),
        "host_peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit,
    }


def write_report(folder: Path, facts: Mapping[str, Any] | None = None) -> Outcome:
    """Writes summary, tables and plots of one run into its folder.

    Args:
        facts: additional facts about the run for the summary, such as `machine()`.

    Raises:
        InputError: no run, a damaged one, or a folder that cannot be written.
    """
    run = read_run(folder)
    found = outcome(run)
    failed = sum(record.error is not None for record in run.records)
    summary = {
        "task": run.task,
        "settings": run.settings,
        "scores": found.scores,
        "samples": len(run.records) - failed,
        "failed": failed,
        "seconds": round(sum(record.seconds for record in run.records), 2),
        **(facts or {}),
    }
    write_json(summary, folder / SUMMARY)
    write_text("\n".join(table.markdown() for table in found.tables), folder / MARKDOWN)
    for name, draw in found.pictures.items():
        draw(folder / name)
    return found


def write_page(folder: Path) -> Path:
    """Writes one self-contained HTML page for every run in a folder and its subfolders.

    Raises:
        InputError: there is no run.
    """
    runs = sorted(path.parent for path in folder.rglob(RUN))
    if not runs:
        raise InputError(f"{folder} has no results: there is no {RUN} in it or its subfolders")
    title = folder.resolve().name
    names = [title if run == folder else str(run.relative_to(folder)) for run in runs]
    sections = "\n".join(map(_section, runs, names))
    path = folder / PAGE
    write_text(HTML.format(title=escape(title), sections=sections), path)
    return path


HTML = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>{title}</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto }}
table {{ border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums }}
th, td {{ padding: .25rem .75rem; border-bottom: 1px solid #ccc; text-align: right }}
th:first-child, td:first-child {{ text-align: left }}
img {{ max-width: 100% }}
pre {{ background: #f4f4f4; padding: .75rem; overflow-x: auto; white-space: pre-wrap }}
</style>
<h1>{title}</h1>
{sections}
</html>
"""


def _section(folder: Path, name: str) -> str:
    run = read_run(folder)
    found = outcome(run)
    parts = [
        f"<h2>{escape(run.task)}: {escape(name)}</h2>",
        f"<p>{escape(_about(folder, run))}</p>",
    ]
    parts += [table.html() for table in found.tables]
    for picture in found.pictures:
        if (folder / picture).is_file():
            data = base64.b64encode((folder / picture).read_bytes()).decode()
            parts.append(f'<p><img alt="{escape(picture)}" src="data:image/png;base64,{data}"></p>')
    failed = [record for record in run.records if record.error is not None]
    if failed:
        lines = "\n".join(f"{record.key}: {record.error}" for record in failed)
        parts.append(
            f"<h3>Failed: {len(failed)} of {len(run.records)}</h3><pre>{escape(lines)}</pre>"
        )
    about = folder / (SUMMARY if (folder / SUMMARY).is_file() else RUN)
    text = escape(read_text_file(about))
    parts.append(f"<details><summary>{about.name}</summary><pre>{text}</pre></details>")
    return "\n".join(parts)


def _about(folder: Path, run: Run) -> str:
    """A line with model, number of samples, time and device."""
    failed = sum(record.error is not None for record in run.records)
    seconds = sum(record.seconds for record in run.records)
    said = [
        f"{run.settings.get('model', 'a model')} in {run.settings.get('dtype', 'its own dtype')}",
        f"{len(run.records) - failed:,} samples in {seconds:,.0f} s",
        *([f"{failed:,} more failed"] if failed else []),
    ]
    path = folder / SUMMARY
    if not path.is_file():
        said.append("not finished")
    else:
        with damage(f"{path}"):
            summary = parse_json(read_text_file(path), "it")
        if isinstance(summary, dict) and summary.get("device"):
            said.append(f"on {shown(summary['device'], quote=False)}")
    return ", ".join(said) + "."


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
