r"""What victims learn from unlearnable data: methods x granularity x countermeasures x seeds.

    python -m experiments.studies.unlearnable_study --cifar10_dir=cifar-10-batches-bin --seed=1 \
        --methods=error_min,error_max,random,rem,tap,lsp,cuda,aue,aap,uc --seeds=1,2,3 \
        --poison_rates=1,0.8,0.6,0.4,0.2 --architectures=small_resnet,vgg11,densenet121 \
        --workdir=out/matrix \
        --countermeasures=none,jpeg10,grayscale,adversarial,purifier,cutout,mixup,cutmix,jpeg50,jpeg75,blur,bit_depth,ueraser,randaugment
    python -m experiments.studies.unlearnable_study --scale=full --cifar10_dir=... --bfloat16 ...

The first is the whole matrix in its reduced form, for one CPU core and some hours (--max_minutes
cuts it into sittings): a victim takes about 4 s of an idle core, a search 10 to 30 s. The second is
the published setting on an accelerator: on an H200 a victim took 83 s, a search for error_min by
sample 3.5 minutes, beside other runs.
"""

from afr_jax.core import program
from afr_jax.evaluation.unlearnable import study

if __name__ == "__main__":
    program.main(study.UnlearnableStudyConfig, study.run)
