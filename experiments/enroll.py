"""Enrolls a gallery: `python -m experiments.enroll --gallery=people --database=out/people`.

Expected on two CPU cores with dlib: 0.06 s a photo, after half a minute of compilation in the first
run.
"""

from afr_jax.core import program
from afr_jax.recognition.tasks import enroll_gallery

if __name__ == "__main__":
    program.main(enroll_gallery.EnrollConfig, enroll_gallery.run)
