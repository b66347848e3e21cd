"""Cloaks photos and reports what that is worth.

    python -m experiments.cloak --images=photos --output_dir=cloaked

Expected on the sample portrait: a dlib distance of 0.75, of 1.34 for SFace, SSIMULACRA2 81.
"""

from afr_jax.core import program
from afr_jax.evaluation.cloaking import cloak_files

if __name__ == "__main__":
    program.main(cloak_files.CloakConfig, cloak_files.run)
