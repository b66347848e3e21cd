"""The networks of the page's worker, loaded once, and a cloak's steps with them."""

from collections.abc import Mapping, Sequence

from afr_jax.app import app_program
from afr_jax.core import files, options
from afr_jax.evaluation.cloaking import cloak_files
from afr_jax.methods.cloaking import fawkes, workflow


class Models:
    """The detectors and extractors.

    Attributes:
        config: of the page.
        recognizer: with all extractors, each under its own name.
    """

    def __init__(self, config: app_program.AppConfig) -> None:
        """Loads everything.

        Raises:
            options.UsageError: no such extractors, or their weights are not there.
        """
        self.config = config
        self._flow = cloak_files.load_flow(
            cloak_files.CloakConfig(
                surrogates=config.surrogates, check=config.check, weights=config.weights
            )
        )
        self.recognizer = self._flow.recognizer

    def describe(self) -> list[dict[str, files.Json]]:
        """Name of each extractor, and whether cloaks are made against it unless it is said."""
        return [
            {"name": name, "surrogate": name in self._flow.surrogates}
            for name in self.recognizer.extractors
        ]

    def flow(self, choices: Mapping[str, files.Json]) -> workflow.Workflow:
        """The steps of a cloak.

        Args:
            choices: `mode`, `format` and `surrogates`; what is missing is as in the program.

        Raises:
            options.UsageError: a choice there is not.
        """
        surrogates = tuple(choices.get("surrogates") or self._flow.surrogates)
        self._check_surrogates(surrogates)
        with options.usage(""):
            method = fawkes.FawkesConfig(
                num_steps=self.config.num_steps, mode=choices.get("mode", "mid")
            )
        return workflow.Workflow(
            self.recognizer,
            # In the order of the program's flag.
            tuple(name for name in self.recognizer.extractors if name in surrogates),
            method,
            self._flow.second,
            file_format=choices.get("format", "png"),
        )

    def _check_surrogates(self, names: Sequence[str]) -> None:
        for name in names:
            if name not in self.recognizer.extractors:
                raise options.UsageError(f"there is no extractor {name!r} here")
