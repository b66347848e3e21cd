r"""What victims learn from unlearnable data: methods x granularity x countermeasures x seeds.

    python -m experiments.studies.unlearnable_study --cifar10_dir=cifar-10-batches-bin \
        --workdir=out/study
    python -m experiments.studies.unlearnable_study --scale=full --cifar10_dir=... --bfloat16 \
        --methods=error_min,error_max,random,rem,tap,lsp,cuda --seeds=0,1,2 --workdir=out/matrix \
        --countermeasures=none,grayscale,jpeg10,jpeg50,jpeg75,blur,bit_depth,cutout,mixup,cutmix,randaugment,adversarial

The first is the reduced form of Huang et al. 2021, figure 2, for two CPU cores. Single cells of it
on a busy machine, last epoch: clean 50 %, error_min 22 % by sample and by class (chance 10 %); the
same noise by sample left a victim with crops and flips 35 % (clean: 55 %). The second is the whole
matrix on an accelerator: on an H200 a victim took 83 s, a search for error_min by sample 3.5
minutes, beside other runs.
"""

from afr_jax.core import program
from afr_jax.evaluation.unlearnable import study

if __name__ == "__main__":
    program.main(study.UnlearnableStudyConfig, study.run)
