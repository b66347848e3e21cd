r"""Makes a folder of images unlearnable: noise by sample id or class, and the images with it.

    python -m experiments.make_unlearnable --data=photos --output_dir=out/unlearnable
    python -m experiments.make_unlearnable --data=cifar10 --cifar10_dir=cifar-10-batches-bin \
        --method=error_min --granularity=sample --output_dir=out/cifar10_error_min

Expected: a tree of 10,000 images of CIFAR-10 through --method=lsp in 33 seconds on two busy CPU
cores. error_min for the 50,000 images of CIFAR-10 with ResNet-18: 9 rounds, 3.5 minutes on an H200
that two other runs shared.
"""

from afr_jax.core import program
from afr_jax.evaluation.unlearnable import protect

if __name__ == "__main__":
    program.main(protect.MakeUnlearnableConfig, protect.run)
