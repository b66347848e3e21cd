"""The single door to Orbax: numbered checkpoints of a pytree in a folder, the newest few kept.

A checkpoint holds arrays, typed keys, numpy arrays and Python numbers. The types of the tree
(NamedTuples, optax states) and the placement of its arrays come from an example at `restore`, so
that a run resumes on another number of devices.
"""

import os
import pathlib
import types
from typing import Self, cast

import jax
import orbax.checkpoint as ocp

from afr_jax.core.parallel import PyTree, Tree


class Checkpoints:
    """The checkpoints of one run; a context manager, or call `close` at the end.

    With several processes all of them call every method, with the same arguments.
    """

    def __init__(self, folder: str | os.PathLike[str], *, num_kept: int = 2) -> None:
        """Opens the folder, or creates it.

        Args:
          folder: for the checkpoints alone, say `workdir / "checkpoints"`.
          num_kept: how many of the newest checkpoints stay; at least 1.
        """
        if num_kept < 1:
            raise ValueError(f"num_kept is {num_kept}, but must be at least 1")
        self._folder = pathlib.Path(folder).expanduser().absolute()
        self._manager = ocp.CheckpointManager(
            self._folder,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=ocp.checkpoint_managers.LatestN(num_kept), create=True
            ),
        )

    def latest_step(self) -> int | None:
        """Returns the step of the newest complete checkpoint, or None."""
        self.wait()
        return self._manager.latest_step()

    def save(self, step: int, tree: PyTree) -> None:
        """Saves in the background; the tree may be donated or changed as soon as this returns.

        Saving the newest step once more has no effect, so a resumed run that has nothing left to do
        may end as every run ends.

        Args:
          step: larger than that of the newest checkpoint, or equal to it.
          tree: a pytree of arrays and numbers.
        """
        latest = self.latest_step()
        if latest is not None and step <= latest:
            if step == latest:
                return
            raise ValueError(f"step {step} comes before the newest checkpoint, step {latest}")
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
        if step is None:
            return None
        tree = self._manager.restore(
            step, args=ocp.args.StandardRestore(jax.tree.map(_placed, example))
        )
        return step, cast(Tree, tree)

    def wait(self) -> None:
        """Returns when everything saved so far is complete on disk."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Completes what is being saved and frees the background threads."""
        self.wait()
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


def _placed(leaf: PyTree) -> PyTree:
    # Without a sharding Orbax would read the one in the file, whose devices may be gone.
    if isinstance(leaf, jax.ShapeDtypeStruct) and leaf.sharding is None:
        sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
    return leaf
