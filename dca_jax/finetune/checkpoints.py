"""The checkpoints of a run: written beside the training, kept while they are the last, whole.

    OUTPUT/checkpoints/STEP/state/   params, mean, square, step: a tree of plain arrays (Orbax)
    OUTPUT/checkpoints/STEP/rows/    the place in the stream of rows (JSON)

Orbax writes a checkpoint under another name and renames it when it is whole, so what a killed
process leaves behind is either a checkpoint or is cleared away by the next run.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from dca_jax.disk import writing
from dca_jax.errors import InputError
from dca_jax.finetune.train import State, all_finite

ADVICE = (
    "Lower the learning rate or the clip, or compute in float32, and look at the data of this step"
)


class Checkpoints:
    """Saves and restores a run's state; use it with `with`.

    Args:
        folder: made if it is not there.
        keep: how many of the latest stay.

    Raises:
        InputError: the folder cannot be made.
    """

    def __init__(self, folder: Path, *, keep: int) -> None:
        # Orbax logs each of its phases, and warns of things that are as they should be.
        logging.getLogger("absl").setLevel(logging.ERROR)
        self.folder = folder.absolute()
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep, cleanup_tmp_directories=True, create=True
        )
        with writing(self.folder):
            self._manager = ocp.CheckpointManager(
                self.folder, options=options, item_names=("state", "rows")
            )

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: object) -> None:
        self._manager.close()

    @property
    def latest(self) -> int | None:
        """The step of the latest whole checkpoint; all its numbers are finite."""
        return self._manager.latest_step()

    def save(self, state: State, rows: dict[str, Any]) -> None:
        """Begins to save; the state is copied from the devices first, and written meanwhile.

        Raises:
            InputError: the state is not finite; this or the last one could not be written, as when
                the disk is full.
        """
        self.check(state)
        step = int(state.step)
        with self._failures(step):
            self._manager.wait_until_finished()
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(state._asdict()), rows=ocp.args.JsonSave(rows)
                ),
            )

    def check(self, state: State) -> None:
        """Raises InputError for a state that is not finite: it is none to go on from."""
        if not bool(all_finite(state)):
            raise InputError(
                f"step {int(state.step)}: the loss is finite, but the update has made parameters "
                f"that are not; {self.kept()}. {ADVICE}"
            )

    def kept(self) -> str:
        """What there is to go on from, for a message; waits until it is on the disk."""
        self.wait()
        if self.latest is None:
            return "no checkpoint had been saved"
        return f"the checkpoint of step {self.latest} is whole"

    def wait(self) -> None:
        """Until what is being saved is on the disk; raises as `save` does."""
        with self._failures(None):
            self._manager.wait_until_finished()

    def restore(self, like: State) -> tuple[State, dict[str, Any]]:
        """The latest state, laid out as `like` says (any mesh), and the place in the rows.

        Raises:
            InputError: it is damaged, of another model, or holds NaN or infinity.
        """
        step = self.latest
        try:
            found = self._manager.restore(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardRestore(like._asdict()), rows=ocp.args.JsonRestore()
                ),
            )
        except Exception as error:  # whatever Orbax and TensorStore raise
            reason = str(error).partition("\n")[0][:300]
            raise InputError(
                f"checkpoint {self.folder / str(step)} cannot be read ({reason}); remove this "
                "folder to go on from the one before it"
            ) from error
        state = State(**found["state"])
        if not bool(all_finite(state)):
            raise InputError(
                f"checkpoint {self.folder / str(step)} holds NaN or infinity; remove this folder "
                "to go on from the one before it"
            )
        return state, dict(found["rows"])

    @contextmanager
    def _failures(self, step: int | None) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError, RuntimeError, jax.errors.JaxRuntimeError) as error:
            lines = [line for line in str(error).splitlines() if line.strip()]
            kept = [n for n in self._manager.all_steps(read=True) if n != step]
            last = f"the last good one is {max(kept)}" if kept else "there is none before it"
            raise InputError(
                f"a checkpoint could not be written to {self.folder} "
                f"({type(error).__name__}: {lines[0][:300] if lines else 'no reason given'}): "
                f"{last}. Make room on the disk, and run the same command again to go on from it"
            ) from error
