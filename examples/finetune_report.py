"""The tests of `finetune_demo.py` and their results: files, plots, a table."""

import json
from collections.abc import Sequence
from itertools import batched
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from dca_jax.evaluation.passkey import PasskeyGrid, passkey_prompt
from dca_jax.evaluation.plots import COLORS, DPI, MARKERS, plot_passkey
from dca_jax.inference.llm import LLM
from dca_jax.inference.score import Reader
from dca_jax.model import Llama

ANSWER = 16  # maximum tokens of a key, and of the text before it

LABELS = {
    "training-free": "training-free",
    "short": "finetuned at the trained length",
    "detached": "finetuned, detached gradient",
    "exact": "finetuned, exact gradient",
}


class Passkeys(NamedTuple):
    """Prompts and answers as token ids, by length: all trials of the first depth, and so on."""

    depths: tuple[float, ...]
    trials: int
    prompts: dict[int, list[tuple[list[int], list[int]]]]


def draw_passkeys(llm: LLM, lengths: Sequence[int], *, depths: int, trials: int) -> Passkeys:
    """Passkeys of each length at depths from 0 to 1; the same for every model."""
    places, prompts = np.linspace(0, 1, depths).tolist(), {}
    for length in lengths:
        prompts[length] = []
        for where, trial in np.ndindex(depths, trials):
            rng = np.random.default_rng([length, where, trial])
            drawn = passkey_prompt(lambda s: len(llm.tokenize(s)), length, places[where], rng)
            ids, whole = llm.tokenize(drawn.text), llm.tokenize(f"{drawn.text} {drawn.key}")
            prompts[length].append((ids, whole[len(ids) :]))
    return Passkeys(tuple(places), trials, prompts)


def evaluate(
    llm: LLM, params: dict[str, Any], text: np.ndarray, passkeys: Passkeys, *, batch: int
) -> dict[str, Any]:
    """The results of `params` on `text` and on the passkeys, as JSON; float32.

    The mean loss of all of `text`, in windows of the trained length, twice that, ... up to the
    longest passkey's, and by position in the longest windows. A key is found if each of its tokens
    is the most likely one, so that greedy decoding writes it.
    """
    model = Llama.from_params(llm.model.config, params, dca=llm.model.dca, dtype=llm.model.dtype)
    window, longest = model.config.trained_length, max(passkeys.prompts)
    reader = Reader(model, batch, longest + ANSWER)
    loss, nll = {}, np.zeros((0, 0))
    while window <= longest:
        rows = batched(text.reshape(-1, window), batch)
        nll = np.concatenate([reader.nll(np.stack(some)) for some in rows])
        loss[window], window = float(nll.mean(dtype=np.float64)), 2 * window
    edges = zip([0, *loss], loss, strict=False)
    position = {stop: float(nll[:, a:stop].mean(dtype=np.float64)) for a, stop in edges}
    found, nats = [], []
    for prompts in passkeys.prompts.values():
        read = batched(([*ids, *key] for ids, key in prompts), batch)
        scores = [score for some in read for score in reader.read(some)]
        pairs = [(s, len(key)) for s, (_, key) in zip(scores, prompts, strict=True)]
        right = np.array([s.is_best[-n:].all() for s, n in pairs])
        found.append(right.reshape(-1, passkeys.trials).sum(axis=1))
        nats.append(float(np.mean([s.nll[-n:].sum() for s, n in pairs])))
    grid = PasskeyGrid(
        lengths=tuple(passkeys.prompts),
        depths=passkeys.depths,
        trials=passkeys.trials,
        found=np.stack(found),
    )
    return {
        "loss": loss,
        "loss_by_position": position,
        "passkey": grid.to_dict(),
        "nats_of_a_key": nats,
    }


# --- results -----------------------------------------------------------------------------------


def save(out: Path, results: dict[str, Any]) -> None:
    """Writes results.json, finetuning.png and passkey.png; each appears when it is complete."""
    aside = out / ".results.json.partial"
    aside.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    aside.replace(out / "results.json")
    plot(results, out / "finetuning.png")
    grids = {LABELS[name]: grid(some) for name, some in by_name(results).items()}
    plot_passkey(grids, out / "passkey.png", trained_length=results["trained_length"])


def by_name(results: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """The seeds of each kind of tested model, in the order of `LABELS`."""
    kinds = {name: [m for m in results["models"] if m["name"] == name] for name in LABELS}
    return {name: models for name, models in kinds.items() if models}


def grid(models: list[dict[str, Any]]) -> PasskeyGrid:
    """The passkeys of all seeds together."""
    first = models[0]["passkey"]
    return PasskeyGrid(
        lengths=tuple(first["lengths"]),
        depths=tuple(first["depths"]),
        trials=len(models) * first["trials"],
        found=np.sum([model["passkey"]["found"] for model in models], axis=0),
    )


def losses(models: list[dict[str, Any]]) -> np.ndarray:
    """Nats per token: [seeds, window lengths]."""
    return np.array([list(model["loss"].values()) for model in models])


def plot(results: dict[str, Any], path: Path) -> None:
    """Plots loss by window and passkeys by length; curves are means over seeds, dots the seeds.

    Passkeys are plotted by the probability of the key, since the share found saturates.
    """
    figure = Figure(figsize=(11, 4.5), dpi=DPI, layout="constrained")
    left, right = figure.subplots(1, 2)
    kinds, first = by_name(results), results["models"][0]
    windows, asked = [int(length) for length in first["loss"]], first["passkey"]["lengths"]
    for (name, models), color, marker in zip(kinds.items(), COLORS, MARKERS, strict=False):
        style = {"color": color, "marker": marker, "linewidth": 2, "label": LABELS[name]}
        left.plot(windows, losses(models).mean(axis=0), **style)
        left.plot(windows, losses(models).T, ".", color=color)
        nats = np.array([model["nats_of_a_key"] for model in models])
        right.plot(asked, nats.mean(axis=0), **style)
        right.plot(asked, nats.T, ".", color=color)
    trained = results["trained_length"]
    row = trained * results["plan"]["times"]
    for axes, ticks in ((left, windows), (right, asked)):
        axes.set_xscale("log", base=2)
        axes.set_xticks(ticks, [f"{length:,}" for length in ticks])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.axvline(row, color="gray", linestyle="--", linewidth=1)
        axes.grid(visible=True, axis="y", alpha=0.25)
    title = f"Held-out text (dashed: rows of the finetuning, {row:,} tokens)"
    left.set(xlabel="window (tokens)", ylabel="loss (nats a token)", title=title)
    title = "Passkeys: what is missing from certainty of the key"
    right.set(xlabel="prompt (tokens)", ylabel="-ln p(key) (nats)", title=title, yscale="log")
    left.legend()
    aside = path.with_name(f".{path.name}.partial")
    figure.savefig(aside, format="png")
    aside.replace(path)


def table(results: dict[str, Any]) -> str:
    """The means over seeds in Markdown, and the cost of the detached gradient for each seed."""
    kinds = by_name(results)
    first = kinds["training-free"][0]
    windows, lengths = list(first["loss"]), first["passkey"]["lengths"]
    head = ["model", "seeds", *(f"loss, {int(n):,}" for n in windows)]
    head += [f"passkeys, {n:,}" for n in lengths]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for name, models in kinds.items():
        cells = [LABELS[name], str(len(models))]
        cells += [f"{loss:.4f}" for loss in losses(models).mean(axis=0)]
        cells += [f"{share:.1%}" for share in grid(models).accuracy.mean(axis=1)]
        lines.append(f"| {' | '.join(cells)} |")
    if len(kinds.get("exact", [])) == len(kinds.get("detached", [])) > 0:
        for seed, more in enumerate(losses(kinds["detached"]) - losses(kinds["exact"])):
            cells = [f"detached - exact, seed {seed}", "", *(f"{nats:+.4f}" for nats in more)]
            lines.append(f"| {' | '.join(cells)} |" + " |" * len(lengths))
    lines.append("")
    for name, models in kinds.items():
        nats = np.mean([model["nats_of_a_key"] for model in models], axis=0)
        told = ", ".join(f"{value:.4f} at {n:,}" for value, n in zip(nats, lengths, strict=True))
        lines.append(f"{LABELS[name]}: nats of a key {told}")
    for seed, error in enumerate(results["gradient_error"]):
        told = ", ".join(f"{name} {value:.1%}" for name, value in error.items())
        lines.append(f"first gradient, |detached - exact| / |exact|, seed {seed}: {told}")
    return "\n".join(lines)
