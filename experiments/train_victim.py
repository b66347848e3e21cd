r"""Trains a victim on clean, protected or partly protected images and measures what it learns.

    python -m experiments.train_victim --data=out/unlearnable/images --test_data=clean_test
    python -m experiments.train_victim --data=cifar10 --cifar10_dir=cifar-10-batches-bin \
        --noise=out/cifar10_error_min/noise.npz --countermeasure=grayscale --workdir=out/victim

Expected for CIFAR-10 with ResNet-18 and 60 epochs, as published (Huang et al. 2021; Liu et al.
2023): clean data 94-95 %, sample-wise error_min about 20 %, after grayscale 93 %, after jpeg10
81 %. Measured here, one seed: clean data 94.3 %, sample-wise error_min 20.8 %; the countermeasures
not yet. A CPU is too slow for that; --toy takes seconds.
"""

from afr_jax.core import program
from afr_jax.evaluation.unlearnable import victim

if __name__ == "__main__":
    program.main(victim.TrainVictimConfig, victim.run)
