"""Shows which tokens of a dialogue are trained on."""

from collections.abc import Iterator
from itertools import groupby
from typing import Any
from unicodedata import category

from rich.console import Console
from rich.text import Text

from dca_jax.finetune.rendered import Rendered
from dca_jax.inference.tokenizer import decode

TRAINED, MASKED = "bold green", "dim"
INCOMPLETE = "\ufffd"  # decoders' output for incomplete characters
OPEN, CLOSE = "⟦", "⟧"  # mark trained tokens if there is no colour


def preview(rendered: Rendered, tokenizer: Any, console: Console) -> None:
    """Prints the text of tokens, including special ones, and marks those that are trained on.

    They are green and the others dim; without colours (a file, a pipe, NO_COLOR) they are enclosed
    in ⟦ and ⟧. Control characters are escaped, so that a dialogue cannot control the terminal.

    Args:
        rendered: a dialogue, or a row of a batch (`data.row`).
        tokenizer: the one it was rendered with.
        console: of `rich`, to print to.
    """
    coloured = console.color_system is not None and not console.no_color
    opening, closing = ("", "") if coloured else (OPEN, CLOSE)
    text = Text()
    for piece, trained in _pieces(rendered, tokenizer):
        if trained:
            text.append(f"{opening}{piece}{closing}", style=TRAINED)
        else:
            text.append(piece, style=MASKED)
    counts = f"{int(rendered.trained.sum()):,} of {len(rendered.tokens):,} tokens are trained on"
    legend = Text(f"{counts}: ").append(f"{opening}these{closing}", style=TRAINED)
    legend.append(", not ").append("these", style=MASKED)
    console.print(text, soft_wrap=True)
    console.print(legend, soft_wrap=True)


def _pieces(rendered: Rendered, tokenizer: Any) -> Iterator[tuple[str, bool]]:
    """The text of each run of tokens that are all trained on, or all not.

    The text of a token depends on those before it, so all tokens up to the end of a run are
    decoded. If a run ends inside a character, that character belongs to the next run.
    """
    tokens = rendered.tokens.tolist()
    done, read = 0, 0
    for trained, run in groupby(rendered.trained.tolist()):
        done += sum(1 for _ in run)
        text = decode(tokenizer, tokens[:done], skip_special_tokens=False)
        if done < len(tokens):
            text = text.rstrip(INCOMPLETE)
        yield _visible(text[read:]), trained
        read = len(text)


def _visible(text: str) -> str:
    """The text with control characters escaped, except line breaks and tabs."""
    return "".join(
        char
        if char in "\n\t" or char.isprintable() or category(char) == "Zs"
        else ascii(char)[1:-1]
        for char in text
    )
