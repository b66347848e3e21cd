"""Lists, fetches and checks weight files: `python -m experiments.fetch_weights --names=all`.

Without flags it says what is there and what is known, and fetches nothing.
"""

from afr_jax.core import program
from afr_jax.recognition.tasks import fetch_weights

if __name__ == "__main__":
    program.main(fetch_weights.FetchWeightsConfig, fetch_weights.run)
