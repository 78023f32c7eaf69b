"""Sphinx configuration. Build with `make docs`: strict, and without a network."""

import os
import re
import sys
import typing
from pathlib import Path

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml

os.environ["JAX_PLATFORMS"] = "cpu"  # imports only: leave a GPU alone
# No documented module needs these to be imported, and `make check` is installing them meanwhile.
for name in ("torch", "accelerate", "peft", "libtpu"):
    sys.modules[name] = None  # as if it were absent

DOCS = Path(__file__).resolve().parent
REPOSITORY = DOCS.parent
sys.path[:0] = [str(REPOSITORY), str(DOCS)]
# jaxtyping then shows Float[Array, "B T N H"] as written, not as jax's internal array type.
typing.GENERATING_DOCUMENTATION = True

import reference_pages  # noqa: E402

import dca_jax  # noqa: E402  (after the two settings that it reads)

project = "dca_jax"
author = "The dca_jax authors"
copyright = "The dca_jax authors"
release = version = dca_jax.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
]
myst_enable_extensions = ["amsmath", "colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3
myst_update_mathjax = False
exclude_patterns = ["_build", "_generated"]
default_role = "code"  # docstrings put code in single backticks
nitpicky = True
# Other projects' inventories lie on the network; a reference into this one must resolve.
nitpick_ignore_regex = [(r"py:.*", r"(?!dca_jax|checkpoints_convert).*")]

# Several classes have an attribute `key`; which one a docstring means is its own.
suppress_warnings = ["ref.python"]

napoleon_use_ivar = True
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_typehints_format = "short"
autodoc_default_options = {"members": True}
python_display_short_literal_types = True
python_use_unqualified_type_names = True

html_theme = "furo"
html_title = f"dca_jax {release}"
html_copy_source = False
html_math_renderer = "mathml"
html_static_path = ["_static"]
html_css_files = ["math.css", "doors.css"]


def draw_relative_positions(app: object) -> None:
    """Draws Figure 2 of the paper for `mathematics.md`, from the package's own matrix."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    from dca_jax.dca import DCAConfig
    from dca_jax.planning.explain import plot_relative_positions

    out = DOCS / "_generated"
    out.mkdir(exist_ok=True)
    axes = plot_relative_positions(12, DCAConfig(chunk_len=6, max_query_position=9))
    axes.figure.savefig(out / "relative_positions.png", dpi=160)
    plt.close("all")


def write_reference(app: object) -> None:
    """Writes the tables of `reference/` from the code."""
    reference_pages.write(DOCS / "_generated")


def read_docstring(
    app: object, what: str, name: str, obj: object, options: object, lines: list[str]
) -> None:
    """Takes a docstring as one reads it in the source, where it is no strict reStructuredText.

    An indented block after a colon is a drawing, a formula or code, not a quotation; and code in
    backticks may take a plural: `Array`s.
    """
    for n in range(len(lines) - 2):
        before, blank, after = lines[n : n + 3]
        indent = len(before) - len(before.lstrip())
        is_block = not blank.strip() and after.startswith(" " * (indent + 1))
        if is_block and before.endswith(":") and not before.lstrip().startswith((":", "..")):
            lines[n] = before.rstrip(":") + "::"
    lines[:] = [re.sub(r"(`[^`]+`)(\w?)", separate_suffix, line) for line in lines]


def separate_suffix(code_and_suffix: re.Match[str]) -> str:
    code, suffix = code_and_suffix.groups()
    return f"{code}\\ {suffix}" if suffix else code


def write_mathml(translator: typing.Any, node: nodes.math | nodes.math_block) -> None:
    """Formulas as MathML, which browsers draw by themselves: no script and no network."""
    mathml = tex2mathml(node.astext(), as_block=isinstance(node, nodes.math_block))
    translator.body.append(mathml)
    raise nodes.SkipNode


def share_navigation(app: typing.Any) -> None:
    """Makes the sidebar's tree once for all pages that have no place in it, at each depth.

    Those are the modules' sources, four pages of five; to make it anew for each took a third of a
    build. It differs by the relative links alone.
    """
    trees: dict[typing.Any, str] = {}

    def share(app: typing.Any, page: str, template: str, context: typing.Any, tree: object) -> None:
        if page in app.env.all_docs:
            return
        make = context["toctree"]

        def toctree(**options: object) -> str:
            key = (page.count("/"), *sorted(options.items()))
            if key not in trees:
                trees[key] = make(**options)
            return trees[key]

        context["toctree"] = toctree

    app.connect("html-page-context", share, priority=400)  # before the theme, which has 500


def setup(app: typing.Any) -> None:
    app.add_html_math_renderer("mathml", (write_mathml, None), (write_mathml, None))
    app.connect("builder-inited", draw_relative_positions)
    app.connect("builder-inited", write_reference)
    app.connect("autodoc-process-docstring", read_docstring, priority=900)
    share_navigation(app)
