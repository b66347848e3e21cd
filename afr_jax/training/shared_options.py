"""Options that programs which train share: how parameters move, size and precision of a step."""

import dataclasses
from typing import Literal

from afr_jax.core import options
from afr_jax.training import optimizers

# Learning rates that suit a network of ours where nothing is said.
_RATES = {"sgd": 0.02, "adamw": 1e-3}


@dataclasses.dataclass(frozen=True)
class UpdateOptions:
    """The optimizer of a run; its learning rate falls to zero along a cosine."""

    optimizer: Literal["sgd", "adamw"] = options.option(
        "sgd", "how parameters move", aliases=("optimiser",)
    )
    learning_rate: float = options.option(
        0.0, "the largest; 0: 0.02 for sgd, 0.001 for adamw", at_least=0
    )
    weight_decay: float = options.option(5e-4, "of kernels", at_least=0)
    clip_norm: float = options.option(
        5.0, "largest L2 norm of the whole gradient; 0: no limit", at_least=0
    )

    def __post_init__(self) -> None:
        """Checks ranges and choices."""
        options.check(self)

    def over(self, num_steps: int, *, warmup_steps: int = 0) -> optimizers.OptimizerOptions:
        """The optimizer of a run of so many steps, the first of them with a rising rate."""
        return optimizers.OptimizerOptions(
            name=self.optimizer,
            learning_rate=self.learning_rate or _RATES[self.optimizer],
            num_steps=num_steps,
            warmup_steps=min(warmup_steps, num_steps - 1),
            weight_decay=self.weight_decay,
            clip_norm=self.clip_norm,
        )


@dataclasses.dataclass(frozen=True)
class BatchOptions:
    """How many images a step takes, and in which precision."""

    batch_size: int = options.option(128, "images of a step, over all devices", at_least=1)
    bfloat16: bool = options.option(
        False, "compute in bfloat16; parameters stay float32", aliases=("bf16",)
    )

    def __post_init__(self) -> None:
        """Checks ranges."""
        options.check(self)

    def check_devices(self, num_devices: int) -> None:
        """Makes sure that a batch can be split over the devices.

        Raises:
            options.UsageError: it cannot.
        """
        if self.batch_size % num_devices:
            raise options.UsageError(
                f"--batch_size={self.batch_size} is no multiple of {num_devices} devices"
            )

    def check_images(self, num_images: int) -> None:
        """Makes sure that there are enough training images for a batch.

        Raises:
            options.UsageError: there are not.
        """
        if num_images < self.batch_size:
            raise options.UsageError(
                f"--batch_size={self.batch_size} is more than the {num_images} training photos"
            )
