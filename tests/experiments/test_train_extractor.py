"""The training program from the outside: it learns, resumes to the same bytes, streams."""

import json

import jax
import numpy as np
import programs
import pytest
from PIL import Image

from afr_jax.core import checkpoint, program
from afr_jax.evaluation.recognition import train_extractor
from afr_jax.models.extractors import registry
from afr_jax.recognition import training_photos
from afr_jax.training import trained


def _drive(*flags, stop_after=0):
    """Result and completeness of a command line, or the message; None where it was interrupted.

    With `stop_after` that happens behind the checkpoint of this number.
    """
    save, saved = checkpoint.Checkpoints.save, []

    def save_or_stop(self, step, tree):
        save(self, step, tree)
        saved.append(step)
        if len(saved) == stop_after:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(checkpoint.Checkpoints, "save", save_or_stop)
        try:
            return programs.call(train_extractor.TrainExtractorConfig, train_extractor.run, *flags)
        except KeyboardInterrupt:
            return None


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
    """The runs that need compiled networks."""
    out = tmp_path_factory.mktemp("out")
    real = [f"--data={tree}", "--architecture=resnet6", "--width=8", "--input_px=16"]
    # The same shapes and steps as the toy runs, which share their compiled programs.
    real += ["--embedding_size=32", "--batch_size=16", "--epochs=6", "--head=softmax"]
    toy = ["--toy", "--head=softmax"]
    cut = [*toy, f"--workdir={out / 'cut'}"]
    return out, {
        "straight": _drive(*toy, f"--workdir={out / 'straight'}"),
        "cut": _drive(*cut, stop_after=2),
        "resumed": _drive(*cut),
        "files": _drive(*real, f"--workdir={out / 'files'}"),
        "streamed": _drive(*real, f"--workdir={out / 'streamed'}", "--device_data_mib=0"),
    }


def test_the_toy_run_learns_and_writes_what_it_says(runs):
    out, results = runs
    result, complete = results["straight"]
    assert complete and result["steps"] == 36 and result["identities"] == 4
    assert result["held_out_accuracy"] > 0.9
    assert result["verification"]["auc"] > 0.7
    folder = out / "straight"
    assert json.loads((folder / "result.json").read_text()) == result
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["step"] == 36 and lines[-1]["loss"] < 0.5 * lines[0]["loss"]
    assert (folder / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_a_cut_run_ends_with_the_same_bytes(runs):
    out, results = runs
    assert results["cut"] is None
    result, complete = results["resumed"]
    straight = results["straight"][0]
    assert complete
    assert {**result, "extractor": None} == {**straight, "extractor": None}
    for name in ("extractor.safetensors", "metrics.jsonl"):
        assert (out / "cut" / name).read_bytes() == (out / "straight" / name).read_bytes()


def test_files_with_a_broken_one_and_streaming(runs):
    out, results = runs
    for name in ("files", "streamed"):
        result, complete = results[name]
        assert not complete
        (problem,) = result["not_handled"]
        assert problem["image"] == "person_0/broken.png" and "damaged" in problem["reason"]
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
    result, complete = _drive("--toy", f"--head={head}", f"--workdir={tmp_path}")
    assert complete and result["held_out_accuracy"] > 0.5


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
    del fields["checksum"]
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
    for flags, part in cases:
        message = _drive(*flags)
        assert isinstance(message, str) and part in message, message


def test_former_spellings():
    flags = ["--optimiser=adamw", "--bf16", "--batch_size=64"]
    config = program.parse(train_extractor.TrainExtractorConfig, flags)
    assert config.update.optimizer == "adamw" and config.update.over(9).learning_rate == 1e-3
    assert config.batch.bfloat16 and config.batch.batch_size == 64
