"""The checkpoints of a run: written asynchronously and atomically; the latest ones are kept.

    OUTPUT/checkpoints/STEP/state/   params, mean, square, step: a tree of plain arrays (Orbax)
    OUTPUT/checkpoints/STEP/rows/    the place in the stream of rows (JSON)

Orbax writes a checkpoint under another name and renames it when it is complete, so a killed process
leaves either a complete checkpoint or files that the next run removes.
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

ADVICE = "Lower the learning rate or the clip, or compute in float32, and check this step's data"


class Checkpoints:
    """Saves and restores a run's state; use it with `with`.

    Args:
        folder: folder of the checkpoints, created if missing.
        keep: number of latest checkpoints to keep.

    Raises:
        InputError: the folder cannot be created.
    """

    def __init__(self, folder: Path, *, keep: int) -> None:
        # Orbax logs each of its phases, and warns about intended behavior.
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
        """The step of the latest complete checkpoint; all its numbers are finite."""
        return self._manager.latest_step()

    def save(self, state: State, rows: dict[str, Any]) -> None:
        """Starts to save: copies the state from the devices, and writes it in the background.

        Raises:
            InputError: the state is not finite, or this or the previous checkpoint could not be
                written, for example because the disk is full.
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
        """Raises InputError for a non-finite state, from which training cannot continue."""
        if not bool(all_finite(state)):
            raise InputError(
                f"step {int(state.step)}: the loss is finite, but the updated parameters are not; "
                f"{self.kept()}. {ADVICE}"
            )

    def kept(self) -> str:
        """The latest checkpoint to resume from, as text; waits until it is on the disk."""
        self.wait()
        if self.latest is None:
            return "no checkpoint had been saved"
        return f"the checkpoint of step {self.latest} is complete"

    def wait(self) -> None:
        """Waits until the checkpoint being saved is on the disk; raises as `save` does."""
        with self._failures(None):
            self._manager.wait_until_finished()

    def restore(self, like: State) -> tuple[State, dict[str, Any]]:
        """The latest state, laid out like `like` (any mesh), and the place in the rows.

        Raises:
            InputError: the checkpoint is damaged, of another model, or contains NaN or infinity.
        """
        step = self.latest
        try:
            found = self._manager.restore(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardRestore(like._asdict()), rows=ocp.args.JsonRestore()
                ),
            )
        except Exception as error:  # any error of Orbax or TensorStore
            reason = str(error).partition("\n")[0][:300]
            raise InputError(
                f"checkpoint {self.folder / str(step)} cannot be read ({reason}); remove this "
                "folder to resume from the one before it"
            ) from error
        state = State(**found["state"])
        if not bool(all_finite(state)):
            raise InputError(
                f"checkpoint {self.folder / str(step)} holds NaN or infinity; remove this folder "
                "to resume from the one before it"
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
                f"{last}. Free some disk space, and repeat the same command to resume from it"
            ) from error
