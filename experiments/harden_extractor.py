"""Hardens a face extractor: fine-tunes it so that small perturbations move its embeddings little.

python -m experiments.harden_extractor --data=faces --extractor=dlib --workdir=out/hardened
"""

from afr_jax.core import program
from afr_jax.evaluation.recognition import harden_extractor

if __name__ == "__main__":
    program.main(harden_extractor.HardenExtractorConfig, harden_extractor.run)
