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

from dca_jax.errors import InputError
from dca_jax.finetune.train import State


class Checkpoints:
    """Saves and restores a run's state; use it with `with`.

    Args:
        folder: made if it is not there.
        keep: how many of the latest stay.
    """

    def __init__(self, folder: Path, *, keep: int) -> None:
        # Orbax logs each of its phases, and warns of things that are as they should be.
        logging.getLogger("absl").setLevel(logging.ERROR)
        self.folder = folder.absolute()
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep, cleanup_tmp_directories=True, create=True
        )
        self._manager = ocp.CheckpointManager(
            self.folder, options=options, item_names=("state", "rows")
        )

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: object) -> None:
        self._manager.close()

    @property
    def latest(self) -> int | None:
        """The step of the latest whole checkpoint."""
        return self._manager.latest_step()

    def save(self, state: State, rows: dict[str, Any]) -> None:
        """Begins to save; the state is copied from the devices first, and written meanwhile.

        Raises:
            InputError: this or the last one could not be written, as when the disk is full.
        """
        step = int(state.step)
        with self._failures(step):
            self._manager.wait_until_finished()
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(state._asdict()), rows=ocp.args.JsonSave(rows)
                ),
            )

    def wait(self) -> None:
        """Until what is being saved is on the disk; raises as `save` does."""
        with self._failures(None):
            self._manager.wait_until_finished()

    def restore(self, like: State) -> tuple[State, dict[str, Any]]:
        """The latest state, laid out as `like` says (any mesh), and the place in the rows.

        Raises:
            InputError: it is damaged, or of another model.
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
        return State(**found["state"]), dict(found["rows"])

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
