"""Face verification of one pair of photos, or of a file of pairs.

    python -m experiments.verify --pairs=lfw_pairs.csv --images=lfw --workdir=out/verify

Expected on 3,000 LFW pairs with dlib: accuracy 0.99, in two minutes on two CPU cores.
"""

from afr_jax.core import program
from afr_jax.evaluation.recognition import verify

if __name__ == "__main__":
    program.main(verify.VerifyConfig, verify.run)
