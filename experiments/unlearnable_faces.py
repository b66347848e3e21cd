r"""The face study: what a recognizer learns of people whose photos carry class-wise noise.

    python -m experiments.unlearnable_faces --data=faces --pairs=lfw_pairs.csv --images=lfw \
        --setting=all --seeds=0,1,2 --workdir=out/faces

Inception-ResNet-v1 wants an accelerator (not measured). On two CPU cores add
--architecture=small_resnet --width=32 --image_px=48 --max_photos=150 --epochs=25 --stop_error=0
--max_rounds=15: about 10 minutes of one core for a seed. Published (Inception-ResNet-v1 on WebFace,
50 of 10,575 people protected): accuracy of protected people 16 % against 86 % of clean ones; AUC
0.5321 with all people protected against 0.9975.
"""

from afr_jax.core import program
from afr_jax.evaluation.unlearnable import faces_study

if __name__ == "__main__":
    program.main(faces_study.UnlearnableFacesConfig, faces_study.run)
