"""Trains a face extractor from photos of some people.

    python -m experiments.train_extractor --data=faces --workdir=out/extractor

Expected for 24 people with 4,600 crops: minutes on one GPU; see `--help`.
"""

from afr_jax.core import program
from afr_jax.evaluation.recognition import train_extractor

if __name__ == "__main__":
    program.main(train_extractor.TrainExtractorConfig, train_extractor.run)
