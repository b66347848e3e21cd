"""Which faces would be cloaked or named, which be lost, and which be cloaked that are none.

    python -m experiments.studies.face_coverage --images=photos,film.mkv --boxes=boxes.csv

Expected on two CPU cores: a second a photo.
"""

from afr_jax.core import program
from afr_jax.evaluation.recognition import face_coverage

if __name__ == "__main__":
    program.main(face_coverage.FaceCoverageConfig, face_coverage.run)
