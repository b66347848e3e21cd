"""What each part of the patch attack is worth, one training run a row.

    python -m experiments.studies.patch_ablation --train=monday.mp4 --test=tuesday.mp4

Expected on two CPU cores: 3 minutes a row.
"""

from afr_jax.core import program
from afr_jax.evaluation.patches import ablation

if __name__ == "__main__":
    program.main(ablation.AblationConfig, ablation.run)
