"""Training on a data set that does not fit on the devices: batches come from the host."""

import functools
from collections.abc import Callable, Iterator

import jax

from afr_jax.core import parallel
from afr_jax.data import loaders
from afr_jax.perturb import stepping
from afr_jax.training import trainer


@functools.partial(jax.jit, static_argnames=("recipe", "mesh"), donate_argnames="state")
def train_batch(
    key: jax.Array,
    state: trainer.TrainState,
    images: jax.Array,
    labels: jax.Array,
    *,
    recipe: trainer.Recipe,
    mesh: parallel.Mesh,
) -> tuple[trainer.TrainState, trainer.Metrics]:
    """`trainer.train_step`, compiled, on a batch from the host; the state is donated.

    The images and labels are placed by `parallel.shard_batch`.
    """
    state, metrics = trainer.train_step(key, state, images, labels, recipe=recipe)
    return jax.lax.with_sharding_constraint(state, parallel.replicated(mesh)), metrics


def run_streamed(
    key: jax.Array,
    state: trainer.TrainState,
    host_batches: Iterator[loaders.HostBatch],
    *,
    recipe: trainer.Recipe,
    mesh: parallel.Mesh,
    num_steps: int,
    report_fn: Callable[[int], None] | None = None,
) -> tuple[trainer.TrainState, trainer.Metrics]:
    """`trainer.run_steps` for a data set that does not fit on the device.

    Args:
        key: of the whole run.
        state: donated.
        host_batches: from `loaders.batch_iterator`, standing at the state's step.
        recipe: the run.
        mesh: of the run.
        num_steps: to take, at least 1.
        report_fn: called after each step with 1.

    Returns:
        As `trainer.run_steps`; the same values by rounding.

    Raises:
        FloatingPointError: a loss was not finite.
        ValueError: the batches stand at another step.
    """
    first = int(state.step)

    def advance(
        state: trainer.TrainState, steps: range
    ) -> tuple[trainer.TrainState, trainer.Metrics]:
        batch = next(host_batches)
        if batch.step != steps.start:
            raise ValueError(f"the state is at step {steps.start}, the batches at {batch.step}")
        placed = parallel.shard_batch((batch.images, batch.labels), mesh)
        return train_batch(key, state, *placed, recipe=recipe, mesh=mesh)

    state, metrics = stepping.drive(
        advance, state, steps=range(first, first + num_steps), length=1, report_fn=report_fn
    )
    trainer.check_losses(metrics.loss, first_step=first)
    return state, metrics
