"""Compares logits with transformers: `python -m checkpoints_convert.verify SRC CONVERTED`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from checkpoints_convert.common import prepare_process
from dca_jax.distributed import exit_on_input_error
from dca_jax.errors import InputError
from dca_jax.model import Llama
from dca_jax.weights.folder import load_weights
from dca_jax.weights.gguf_file import is_gguf
from dca_jax.weights.huggingface import read_config


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The difference of two models' next-token distributions.

    Attributes:
        max_difference: the largest absolute difference of two logits.
        kl: mean over tokens of KL(transformers || ours), in nats.
        top1_agreement: share of tokens at which both have the same most likely next token.
    """

    max_difference: float
    kl: float
    top1_agreement: float


def compare(
    source: Path, converted: Path, *, batch: int = 2, length: int = 128, seed: int = 0
) -> Comparison:
    """Runs random tokens through transformers (float32) and through the converted model.

    Both compute in float32 with plain attention, so only a difference of weights matters.

    Args:
        source: the Hugging Face folder or GGUF file.
        converted: the folder made from it.
        batch, length: size of the token array [batch, length]; the length is limited to the
            trained length.
        seed: seed for the tokens.

    Raises:
        InputError: PyTorch is not installed, or a folder is invalid.
    """
    try:
        import torch
        from transformers import AutoModelForCausalLM
        from transformers.utils.logging import disable_progress_bar
    except ImportError:
        raise InputError(
            "verify compares with transformers on PyTorch, which is not installed; install torch"
        ) from None
    config = read_config(converted)
    if read_config(source) != config:
        raise InputError(f"the configs of {source} and of {converted} are of different models")
    params = load_weights(converted, config, dtype=jnp.float32)
    length = min(length, config.trained_length, config.sliding_window or length)
    tokens = np.random.default_rng(seed).integers(0, config.vocab_size, (batch, length))
    model = Llama.from_params(config, params, dca=None, dtype=jnp.float32)
    ours = np.asarray(jax.jit(lambda model, tokens: model(tokens))(model, tokens.astype(np.int32)))
    del model, params
    disable_progress_bar()
    single = is_gguf(source)
    reference = AutoModelForCausalLM.from_pretrained(
        source.parent if single else source,
        gguf_file=source.name if single else None,
        dtype=torch.float32,
        local_files_only=True,
    )
    with torch.no_grad():
        theirs = reference(torch.from_numpy(tokens)).logits.numpy()
    return _comparison(theirs, ours)


def _comparison(theirs: np.ndarray, ours: np.ndarray) -> Comparison:
    log_p, log_q = (_log_softmax(logits.astype(np.float64)) for logits in (theirs, ours))
    return Comparison(
        max_difference=float(np.abs(theirs - ours).max()),
        kl=float((np.exp(log_p) * (log_p - log_q)).sum(-1).mean()),
        top1_agreement=float((theirs.argmax(-1) == ours.argmax(-1)).mean()),
    )


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


app = typer.Typer(add_completion=False, rich_markup_mode="markdown")


@app.command()
@exit_on_input_error()
def main(
    source: Annotated[
        Path, typer.Argument(metavar="SRC", help="The Hugging Face folder or GGUF file.")
    ],
    converted: Annotated[
        Path, typer.Argument(metavar="CONVERTED", help="The Orbax folder made from it.")
    ],
    max_kl: Annotated[
        float, typer.Option(help="Largest mean KL divergence (nats) that passes.")
    ] = 1e-3,
) -> None:
    """Compare a converted checkpoint's logits with those of transformers (needs PyTorch).

    Both models compute in float32 on random tokens. After a conversion with **--dtype keep** they
    differ by rounding only; after one to another dtype, by what that dtype loses.

    Exit code: 0 if they agree, 1 if the KL divergence exceeds **--max-kl**, 2 for bad input.

    Example: `python -m checkpoints_convert.verify ./Llama-2-7b-hf ./llama2-7b`
    """
    prepare_process()
    console = Console()
    with console.status("running both models"):
        result = compare(source, converted)
    table = Table(title=f"{converted} against {source}, float32")
    table.add_column("measure")
    table.add_column("value", justify="right")
    table.add_row("largest logit difference", f"{result.max_difference:.2e}")
    table.add_row("mean KL divergence (nats)", f"{result.kl:.2e}")
    table.add_row("same most likely token", f"{result.top1_agreement:.1%}")
    console.print(table)
    if not result.kl <= max_kl:
        console.print(f"the models differ: KL divergence above {max_kl:g}")
        raise typer.Exit(1)


if __name__ == "__main__":
    app()
