"""Cloaks photos and reports what that is worth.

    python -m experiments.cloak --images=photos --output_dir=cloaked

Expected on two CPU cores: four seconds a face; dlib distance 0.9 on the sample portrait.
"""

from afr_jax.core import program
from afr_jax.evaluation.cloaking import cloak_files

if __name__ == "__main__":
    program.main(cloak_files.CloakConfig, cloak_files.run)
