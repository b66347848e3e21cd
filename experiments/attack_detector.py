"""Printable patches that hide a face from MTCNN, trained and measured.

    python -m experiments.attack_detector --train=monday.mp4 --test=tuesday.mp4 --workdir=out/patch

Expected on two CPU cores: 0.4 to 0.9 s an epoch on 20 frames of 640 x 480, then 1 s a test frame
and variant.
"""

from afr_jax.core import program
from afr_jax.evaluation.patches import study

if __name__ == "__main__":
    program.main(study.AttackConfig, study.run)
