"""Finds faces: `python -m experiments.detect --images=photos --output_dir=found --draw`.

Expected on two CPU cores: 0.2 s for a photo of 640 px, after half a minute of compilation in the
first run.
"""

from afr_jax.core import program
from afr_jax.recognition.tasks import detect_photos

if __name__ == "__main__":
    program.main(detect_photos.DetectConfig, detect_photos.run)
