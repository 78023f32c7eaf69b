"""What a package index shows of dca_jax: the README, and links that lead somewhere from there.

Links of README.md are relative, and lead nowhere outside a checkout. A package is built with the
address of the repository in the environment,

    DCA_JAX_REPOSITORY=https://HOST/OWNER/NAME python -m build

and then has links to the files of its version's tag, and the project's own links. Without it, links
are left as their text, and pictures are left out.
"""

import os
import re
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface

REPOSITORY = "DCA_JAX_REPOSITORY"
PAPER = "https://arxiv.org/abs/2402.17463"
CODE = re.compile(r"(^```.*?^```$)", re.DOTALL | re.MULTILINE)
PICTURE = re.compile(r"^!\[([^]]*)\]\((?!https?:)([^)]+)\)\n", re.MULTILINE)
LINK = re.compile(r"(?<!!)\[([^]]+)\]\((?!https?:|#)([^)]+)\)")


class CustomMetadataHook(MetadataHookInterface):
    """Gives the metadata `readme` and `urls`."""

    def update(self, metadata: dict[str, Any]) -> None:
        """Adds both, by the environment."""
        root = Path(self.root)
        source = (root / "dca_jax" / "__init__.py").read_text(encoding="utf-8")
        (version,) = re.findall(r'^__version__ = "(.+)"$', source, re.MULTILINE)
        address = os.environ.get(REPOSITORY, "").rstrip("/")
        text = (root / "README.md").read_text(encoding="utf-8")
        text = with_links(text, address, f"v{version}")
        metadata["readme"] = {"content-type": "text/markdown", "text": text}
        metadata["urls"] = urls(address, f"v{version}")


def urls(address: str, tag: str) -> dict[str, str]:
    """The project's links; those into the repository only where its address is known."""
    if not address:
        return {"Paper": PAPER}
    return {
        "Source": address,
        "Documentation": f"{address}/blob/{tag}/docs/index.md",
        "Changelog": f"{address}/blob/{tag}/CHANGELOG.md",
        "Issues": f"{address}/issues",
        "Paper": PAPER,
    }


def with_links(text: str, address: str, tag: str) -> str:
    """The README with its relative links made absolute; without them where there is no address."""
    picture, link = "", r"\1"
    if address:
        picture = rf"![\1]({address}/raw/{tag}/\2)\n"
        link = rf"[\1]({address}/blob/{tag}/\2)"
    parts = CODE.split(text)  # code is every second part
    parts[::2] = [LINK.sub(link, PICTURE.sub(picture, part)) for part in parts[::2]]
    return "".join(parts)
