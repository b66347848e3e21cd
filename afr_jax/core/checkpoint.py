"""The single door to Orbax: numbered checkpoints of a pytree in a folder, the newest few kept.

A checkpoint holds arrays, typed keys, numpy arrays and Python numbers. The types of the tree
(NamedTuples, optax states) and the placement of its arrays come from an example at `restore`, so
that a run resumes on another number of devices.

Beside the files of a checkpoint lie their checksums. One that is damaged is put aside when the
folder is opened, and the one before it is the newest.
"""

import errno
import hashlib
import os
import pathlib
import shutil
import types
from typing import Self, cast

import jax
import orbax.checkpoint as ocp

from afr_jax.core import distributed, files, interrupts, progress
from afr_jax.core.parallel import PyTree, Tree
from afr_jax.core.runtime import object_store

# What a checkpoint takes besides its arrays.
_METADATA_BYTES = 1 << 20
_CHECKSUMS = "checksums.json"
# Orbax writes the time into it at last.
_TIMED = "_CHECKPOINT_METADATA"
# A checkpoint is written to `<step>` and this, and then takes its name.
_UNFINISHED = ".orbax-checkpoint-tmp"


class Checkpoints:
    """The checkpoints of one run; a context manager, or call `close` at the end.

    With several processes all of them call every method, with the same arguments. One that works
    `distributed.alone` among others keeps nothing: Orbax refuses arrays of one process alone.
    """

    def __init__(self, folder: str | os.PathLike[str], *, num_kept: int = 2) -> None:
        """Opens the folder, or creates it, and puts damaged checkpoints aside, with a warning each.

        Args:
          folder: for the checkpoints alone, say `workdir / "checkpoints"`.
          num_kept: how many of the newest checkpoints stay; at least 1.
        """
        if num_kept < 1:
            raise ValueError(f"num_kept is {num_kept}, but must be at least 1")
        self._folder = pathlib.Path(folder).expanduser().absolute()
        if distributed.is_primary():
            _put_damaged_aside(self._folder)
        distributed.barrier("damaged checkpoints are put aside")
        self._manager = None
        if distributed.process_count() < jax.process_count():
            return
        self._manager = ocp.CheckpointManager(
            self._folder,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=ocp.checkpoint_managers.LatestN(num_kept),
                create=True,
                async_options=ocp.AsyncOptions(post_finalization_callback=self._write_checksums),
            ),
        )

    def latest_step(self) -> int | None:
        """Returns the step of the newest complete checkpoint, or None."""
        self.wait()
        return None if self._manager is None else self._manager.latest_step()

    def save(self, step: int, tree: PyTree) -> None:
        """Saves in the background; the tree may be donated or changed as soon as this returns.

        Saving the newest step once more has no effect, so a resumed run that has nothing left to do
        may end as every run ends.

        Args:
          step: larger than that of the newest checkpoint, or equal to it.
          tree: a pytree of arrays and numbers.

        Raises:
          OSError: the disk has no room for it.
        """
        latest = self.latest_step()
        if self._manager is None:
            return
        object_store.push_soon()
        if latest is not None and step <= latest:
            if step == latest:
                return
            raise ValueError(f"step {step} comes before the newest checkpoint, step {latest}")
        self._check_room(tree)
        # An interrupted save leaves threads that wait for one another until their time is up.
        with files.naming(self._folder), interrupts.deferred():
            self._manager.save(step, args=ocp.args.StandardSave(tree))

    def restore(self, example: Tree) -> tuple[int, Tree] | None:
        """Restores the newest checkpoint.

        Args:
          example: a tree of the saved structure, types, shapes and dtypes; with arrays, or abstract
            (`jax.eval_shape`, `jax.ShapeDtypeStruct`). Arrays arrive placed like those of the
            example; where it names no placement, on the default device.

        Returns:
          (step, tree), or None if there is no checkpoint.

        Raises:
          ValueError: if the checkpoint does not fit the example.
        """
        step = self.latest_step()
        if self._manager is None or step is None:
            return None
        tree = self._manager.restore(
            step, args=ocp.args.StandardRestore(jax.tree.map(_placed, example))
        )
        return step, cast(Tree, tree)

    def _write_checksums(self) -> None:
        """Called when all of a checkpoint is written, before it takes its name."""
        if distributed.is_primary():
            for path in self._folder.glob(f"*{_UNFINISHED}*"):
                files.write_sealed(path / _CHECKSUMS, {"files": _checksums(path)})

    def wait(self) -> None:
        """Returns when everything saved so far is complete on disk.

        Raises:
          OSError: it could not be written.
        """
        # Orbax prints an interruption as an error of its own.
        if self._manager is not None:
            with files.naming(self._folder), interrupts.deferred():
                self._manager.wait_until_finished()

    def _check_room(self, tree: PyTree) -> None:
        """Raises OSError where a disk is too full: Orbax's threads would fail at great length."""
        needed = sum(getattr(leaf, "nbytes", 0) for leaf in jax.tree.leaves(tree))
        if shutil.disk_usage(self._folder).free < needed + _METADATA_BYTES:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self._folder))

    def close(self) -> None:
        """Completes what is being saved and frees the background threads."""
        self.wait()
        if self._manager is not None:
            self._manager.close()

    def __enter__(self) -> Self:
        """Returns itself."""
        return self

    def __exit__(
        self,
        error_type: type[BaseException] | None,
        error: BaseException | None,
        traceback: types.TracebackType | None,
    ) -> None:
        """Closes."""
        self.close()


def _put_damaged_aside(folder: pathlib.Path) -> None:
    """Renames the newest checkpoints until one is whole."""
    steps = [int(path.name) for path in folder.glob("[0-9]*") if path.name.isdecimal()]
    for step in sorted(steps, reverse=True):
        path = folder / str(step)
        if _is_whole(path):
            break
        aside = folder / f"damaged-{step}"
        shutil.rmtree(aside, ignore_errors=True)
        path.rename(aside)
        progress.warn(path, f"the checkpoint is damaged, and now {aside.name}; one before is taken")


def _is_whole(path: pathlib.Path) -> bool:
    """Whether the files of a checkpoint are those that were written."""
    try:
        known = files.read_sealed(path / _CHECKSUMS)["files"]
        return {name: _checksum(path / name) for name in known} == known
    except FileNotFoundError as error:
        # Earlier versions wrote none.
        return pathlib.Path(error.filename).name == _CHECKSUMS
    except ValueError:
        return False


def _checksums(path: pathlib.Path) -> dict[str, str]:
    """SHA-256 of all files below a folder, by their paths there."""
    return {
        each.relative_to(path).as_posix(): _checksum(each)
        for each in sorted(path.rglob("*"))
        if each.is_file() and each.name not in (_CHECKSUMS, _TIMED)
    }


def _checksum(path: pathlib.Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _placed(leaf: PyTree) -> PyTree:
    # Without a sharding Orbax would read the one in the file, whose devices may be gone.
    if isinstance(leaf, jax.ShapeDtypeStruct) and leaf.sharding is None:
        sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
    return leaf
