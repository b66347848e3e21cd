"""The training program from the outside: it learns, resumes to the same bytes, streams."""

import json
import sys

import jax
import numpy as np
import programs
import pytest
from PIL import Image

from afr_jax.models.extractors import registry
from afr_jax.recognition import training_photos
from afr_jax.training import trained

# Runs the program on each command line in one process. {"stop_after": n} before one lets it be
# interrupted behind its n-th checkpoint. Prints the result and exit code, or the error.
_DRIVER = """
import json, sys
from absl import flags
from absl.testing import flagsaver
from afr_jax.core import checkpoint, files, program
from experiments import train_extractor

save = checkpoint.Checkpoints.save
program.define_flags()
flags.FLAGS(["train_extractor"])
for job in json.loads(sys.argv[1]):
    saved = []

    def save_or_stop(self, step, tree):
        save(self, step, tree)
        saved.append(step)
        if len(saved) == job["stop_after"]:
            raise KeyboardInterrupt

    checkpoint.Checkpoints.save = save_or_stop
    with flagsaver.flagsaver():
        flags.FLAGS(["train_extractor", *job["flags"]])
        try:
            print(json.dumps(files.to_jsonable(train_extractor.train_program())))
        except (program.UsageError, KeyboardInterrupt) as error:
            print(json.dumps(f"{type(error).__name__}: {error}"))
"""


def _drive(*jobs):
    """Results of the command lines; a job is a list of flags, with an int at its end to stop."""
    listed = [
        {
            "flags": [str(flag) for flag in job if not isinstance(flag, int)],
            "stop_after": job[-1] if isinstance(job[-1], int) else 0,
        }
        for job in jobs
    ]
    return programs.answers([sys.executable, "-c", _DRIVER, json.dumps(listed)])


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """The generated faces as files, with one that cannot be read."""
    root = tmp_path_factory.mktemp("faces")
    listing, images = training_photos.generated_faces(24, 0)
    for sample, image in zip(listing.samples, images, strict=True):
        path = root / sample.sample_id
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(image).save(path)
    (root / "person_0" / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    return root


@pytest.fixture(scope="module")
def runs(tree, tmp_path_factory):
    """The runs that need compiled networks, in one process."""
    out = tmp_path_factory.mktemp("out")
    real = [f"--data={tree}", "--architecture=resnet6", "--width=8", "--input_px=16"]
    # The same shapes and steps as the toy runs, which share their compiled programs.
    real += ["--embedding_size=32", "--batch_size=16", "--epochs=6", "--head=softmax"]
    toy = ["--toy", "--head=softmax"]
    jobs = {
        "straight": [*toy, f"--workdir={out / 'straight'}"],
        "cut": [*toy, f"--workdir={out / 'cut'}", 2],
        "resumed": [*toy, f"--workdir={out / 'cut'}"],
        "files": [*real, f"--workdir={out / 'files'}"],
        "streamed": [*real, f"--workdir={out / 'streamed'}", "--device_data_mib=0"],
    }
    return out, dict(zip(jobs, _drive(*jobs.values()), strict=True))


def test_the_toy_run_learns_and_writes_what_it_says(runs):
    out, results = runs
    result, code = results["straight"]
    assert code == 0 and result["steps"] == 36 and result["identities"] == 4
    assert result["held_out_accuracy"] > 0.9
    assert result["verification"]["auc"] > 0.7
    folder = out / "straight"
    assert json.loads((folder / "result.json").read_text()) == result
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["step"] == 36 and lines[-1]["loss"] < 0.5 * lines[0]["loss"]
    assert (folder / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_a_cut_run_ends_with_the_same_bytes(runs):
    out, results = runs
    assert results["cut"] == "KeyboardInterrupt: "
    result, code = results["resumed"]
    straight = results["straight"][0]
    assert code == 0
    assert {**result, "extractor": None} == {**straight, "extractor": None}
    for name in ("extractor.safetensors", "metrics.jsonl"):
        assert (out / "cut" / name).read_bytes() == (out / "straight" / name).read_bytes()


def test_files_with_a_broken_one_and_streaming(runs):
    out, results = runs
    for name in ("files", "streamed"):
        result, code = results[name]
        assert code == 3
        (problem,) = result["not_handled"]
        assert problem["name"] == "person_0/broken.png" and "damaged" in problem["reason"]
        assert sum(result["photos"].values()) == 120
    first, second = (
        [json.loads(line) for line in (out / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("files", "streamed")
    )
    # The same photos in the same steps; the images take another way to the device.
    np.testing.assert_allclose(
        [line["loss"] for line in first], [line["loss"] for line in second], rtol=1e-3
    )


@pytest.mark.slow
@pytest.mark.parametrize("head", ["triplet", "arcface", "cosface"])
def test_the_other_heads(head, tmp_path):
    ((result, code),) = _drive(["--toy", f"--head={head}", f"--workdir={tmp_path}"])
    assert code == 0 and result["held_out_accuracy"] > 0.5


def test_the_trained_extractor_can_be_used(runs):
    out, _ = runs
    card = trained.read_card(out / "straight")
    assert card.architecture == "resnet6" and card.identities == tuple(
        f"person_{i}" for i in range(4)
    )
    with pytest.raises(ValueError, match="aligned"):
        trained.read_extractor(out / "straight")
    folder = out / "aligned"
    folder.mkdir()
    (folder / trained.WEIGHTS_NAME).write_bytes(
        (out / "straight" / trained.WEIGHTS_NAME).read_bytes()
    )
    fields = json.loads((out / "straight" / trained.CARD_NAME).read_text())
    fields["template"] = [[1.0, 2.0]] * 5
    (folder / trained.CARD_NAME).write_text(json.dumps(fields))
    extractor = trained.read_extractor(folder)
    _, images = training_photos.generated_faces(16, 0)
    chips = images.astype(np.float32) / 255
    embed = jax.jit(registry.embed, static_argnums=0)
    vectors = np.asarray(embed(extractor, extractor.load(), chips))
    assert vectors.shape == (120, 32)
    # Two pictures of one person are nearer than two of different people, on the whole.
    person = np.arange(120) // 30
    distance = np.linalg.norm(vectors[:, None] - vectors[None], axis=-1)
    same = person[:, None] == person[None]
    assert np.median(distance[same]) < np.median(distance[~same])
    assert extractor.threshold == pytest.approx(card.threshold)
    (folder / trained.CARD_NAME).write_text("{}")
    with pytest.raises(ValueError, match="no card"):
        trained.read_extractor(folder)
    with pytest.raises(FileNotFoundError):
        trained.read_card(out / "nowhere" / "extractor.json")


def test_wrong_usage(tmp_path, tree):
    def work(name):
        return f"--workdir={tmp_path / name}"

    table = tmp_path / "pairs.csv"
    table.write_text("image_a,image_b,same\na.png,b.png,1\n")
    cases = [
        ([work("a")], "--data is needed"),
        ([f"--data={tmp_path / 'missing'}", work("b")], "does not exist"),
        ([f"--data={tree}", work("c"), "--min_photos=1000"], "min_photos"),
        ([f"--data={tree}", work("d"), "--input_px=8", "--batch_size=500"], "batch_size"),
        (["--toy", work("e"), "--architecture=mobilefacenet", "--input_px=64"], "112 px"),
        (["--toy", work("f"), "--head=triplet", "--batch_size=40"], "triplets"),
        (["--toy", work("g"), "--head=arcface", "--margin=3"], "1.5"),
        (
            [f"--data={tree}", work("h"), "--input_px=8", f"--pairs={table}", f"--images={tree}"],
            "pairs",
        ),
    ]
    for message, (_, part) in zip(_drive(*(case[0] for case in cases)), cases, strict=True):
        assert message.startswith("UsageError") and part in message, message
