"""Hardening: the search stays in its ball, embeddings move less, runs resume, folders work."""

import dataclasses
import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import programs
import pytest

from afr_jax.core import checkpoint, files, parallel
from afr_jax.data import augmentation, sampling
from afr_jax.evaluation.metrics import robustness
from afr_jax.evaluation.recognition import harden_extractor
from afr_jax.models.extractors import registry
from afr_jax.models.weights import conversion
from afr_jax.recognition import chips, detect, hardening_photos, pipeline, training_photos
from afr_jax.training import hardening, optimizers, trained

_PX, _SIZE = 8, 5


class _Net(nn.Module):
    """Linear where `is_linear`, else with a hidden layer and a BatchNorm."""

    is_linear: bool = True

    @nn.compact
    def __call__(self, images):
        x = images.reshape(images.shape[0], -1)
        if not self.is_linear:
            x = jnp.tanh(nn.BatchNorm(use_running_average=True, name="norm")(nn.Dense(16)(x)))
        return nn.Dense(_SIZE, use_bias=False, name="fc")(x)


def _extractor(*, is_linear=True):
    return registry.Extractor(
        name="toy",
        module=_Net(is_linear),
        input_px=_PX,
        template=chips.template_for(_PX),
        input_scale=2.0,
        input_offset=-1.0,
        embedding_size=_SIZE,
        normalized=not is_linear,
        thresholds=registry.Thresholds(0.5, 0.5, None),
        load=dict,
        source="",
        license="",
    )


_LINEAR, _CURVED = _extractor(), _extractor(is_linear=False)


def _variables(extractor, seed=0):
    images = jnp.zeros((1, _PX, _PX, 3))
    return extractor.module.init(jax.random.key(seed), images)


def _images(count, seed=0):
    return np.random.default_rng(seed).uniform(0, 1, (count, _PX, _PX, 3)).astype(np.float32)


def _pixels(count, *, versions=1, seed=0):
    shape = (count, versions, _PX, _PX, 3)
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def _recipe(extractor, **options):
    optimizer = optimizers.OptimizerOptions("adamw", 5e-3, 40)
    attack = hardening.Attack(8 / 255, 3)
    return hardening.HardeningRecipe(extractor, optimizer, **{"attack": attack, **options})


def _one_device():
    return parallel.make_mesh(devices=jax.devices()[:1])


def _run(recipe, pixels, num_steps, *, state=None, mesh=None, variables=None):
    mesh = mesh or _one_device()
    original = parallel.replicate(variables or _variables(recipe.extractor), mesh)
    return hardening.run_steps(
        jax.random.key(3),
        state or hardening.init_state(original, recipe, mesh=mesh),
        original,
        parallel.replicate(pixels, mesh),
        recipe=recipe,
        mesh=mesh,
        batches=sampling.ShuffledBatches(len(pixels) * max(pixels.shape[1] - 1, 1), 8),
        num_steps=num_steps,
    )


def test_the_search_is_signed_ascent_within_the_ball():
    variables, images = _variables(_LINEAR), _images(3)
    attack = hardening.Attack(0.1, 4, 0.04)
    anchors = np.random.default_rng(1).normal(size=(3, _SIZE)).astype(np.float32)
    directions = np.array([1, -1, 1], np.float32)
    key = jax.random.key(5)
    options = {"extractor": _LINEAR, "attack": attack}
    delta = hardening.worst_case(key, variables, images, anchors, directions=directions, **options)
    # The same in float64, with the gradient by hand.
    matrix = np.asarray(variables["params"]["fc"]["kernel"], np.float64)
    expected = np.array(jax.random.uniform(key, images.shape, jnp.float32, -0.1, 0.1), np.float64)
    for _ in range(4):
        seen = np.clip(images + expected, 0, 1)
        apart = (2 * seen - 1).reshape(3, -1) @ matrix - anchors
        gradient = (2 * 2 * directions[:, None] * apart) @ matrix.T
        assert np.abs(gradient).min() > 1e-5
        step = 0.04 * np.sign(gradient).reshape(images.shape)
        expected = np.clip(expected + step, -0.1, 0.1)
    np.testing.assert_allclose(delta, expected, atol=1e-6)
    assert np.abs(delta).max() <= 0.1 + 1e-7
    # Long chunks, as on accelerators.
    whole = hardening.worst_case(
        key, variables, images, anchors, directions=directions, chunk=4, **options
    )
    np.testing.assert_allclose(whole, delta, atol=1e-6)


def test_the_search_raises_or_lowers_each_distance_alone():
    variables, images = _variables(_CURVED), _images(4)
    anchors = np.asarray(registry.embed(_CURVED, variables, images[::-1]))
    options = {"extractor": _CURVED, "attack": hardening.Attack(8 / 255, 5)}
    directions = np.array([1, -1, 1, -1], np.float32)
    key = jax.random.key(0)
    delta = hardening.worst_case(key, variables, images, anchors, directions=directions, **options)
    before, after = (
        np.linalg.norm(registry.embed(_CURVED, variables, seen) - anchors, axis=1)
        for seen in (images, np.clip(images + delta, 0, 1))
    )
    assert (directions * (after - before) > 0).all()
    # Another neighbour in the batch changes nothing: starts are drawn by place.
    changed = images.copy()
    changed[1] = 0.5
    other = hardening.worst_case(key, variables, changed, anchors, directions=directions, **options)
    np.testing.assert_array_equal(np.delete(other, 1, axis=0), np.delete(delta, 1, axis=0))


@pytest.mark.parametrize("clean_weight", [0.0, 0.7])
def test_the_loss_is_in_squared_thresholds(clean_weight):
    recipe = _recipe(_LINEAR, clean_weight=clean_weight)
    mesh = _one_device()
    variables, images = _variables(_LINEAR), _images(2)
    rng = np.random.default_rng(2)
    delta = rng.uniform(-0.3, 0.3, images.shape).astype(np.float32)
    anchors = rng.normal(size=(2, _SIZE)).astype(np.float32)
    batch = hardening.HardeningBatch(images, delta, anchors)
    state = hardening.init_state(variables, recipe, mesh=mesh)
    after, metrics = hardening.harden_batch(state, variables, batch, recipe=recipe, mesh=mesh)
    matrix = np.asarray(variables["params"]["fc"]["kernel"], np.float64)
    distances = [
        np.linalg.norm((2.0 * seen - 1).reshape(2, -1) @ matrix - anchors, axis=1) / 0.5
        for seen in (np.clip(images.astype(np.float64) + delta, 0, 1), images)
    ]
    perturbed, clean = (np.mean(part**2) for part in distances)
    np.testing.assert_allclose(metrics.loss, perturbed + clean_weight * clean, rtol=1e-5)
    np.testing.assert_allclose(metrics.shift, np.mean(distances[0]), rtol=1e-5)
    expected = np.mean(distances[1]) if clean_weight else np.nan
    np.testing.assert_allclose(metrics.clean_shift, expected, rtol=1e-5)
    assert int(after.step) == 1


def test_hardening_lowers_the_shift_and_keeps_embeddings():
    recipe, pixels = _recipe(_CURVED), _pixels(64)
    variables = _variables(_CURVED)
    mesh = _one_device()
    state, metrics = _run(recipe, pixels, 40, variables=variables)
    assert metrics.loss[-5:].mean() < 0.6 * metrics.loss[:5].mean()
    hardened = hardening.with_params(variables, state.params)
    assert hardened["batch_stats"] is variables["batch_stats"]
    placed = [parallel.replicate(tree, mesh) for tree in (variables, hardened)]
    before, after = (
        robustness.shift_scores(
            jax.random.key(0),
            tree,
            placed[0],
            pixels[:16, 0],
            extractor=_CURVED,
            attack=recipe.attack,
            mesh=mesh,
        )
        for tree in placed
    )
    assert after["attacked"] < 0.8 * before["attacked"]
    assert before["drift"] == 0 and after["drift"] < before["attacked"]


def test_four_devices_and_a_cut_do_what_one_device_does_in_one_go(no_compilation):
    change = augmentation.Augmentation(pad_px=2, flip_probability=0.5)
    recipe, pixels = _recipe(_CURVED, augmentation=change), _pixels(32)
    straight, metrics = _run(recipe, pixels, 6)
    split, other = _run(recipe, pixels, 6, mesh=parallel.make_mesh())
    # Sums over the batch in another order; AdamW divides by small roots.
    np.testing.assert_allclose(other.loss, metrics.loss, rtol=1e-4)
    for mine, theirs in zip(
        jax.tree.leaves(split.params), jax.tree.leaves(straight.params), strict=True
    ):
        np.testing.assert_allclose(mine, theirs, atol=2e-4)
    part, first = _run(recipe, pixels, 2)
    with no_compilation():
        resumed, second = _run(recipe, pixels, 4, state=part)
    np.testing.assert_array_equal(np.concatenate([first.loss, second.loss]), metrics.loss)
    jax.tree.map(np.testing.assert_array_equal, resumed, straight)
    with pytest.raises(ValueError, match="cannot be split evenly over 3"):
        _run(recipe, pixels, 1, mesh=parallel.make_mesh(devices=jax.devices()[:3]))


def test_bfloat16_is_near_and_keeps_float32_parameters():
    variables, images = _variables(_CURVED), _images(6)
    exact = np.asarray(registry.embed(_CURVED, variables, images))
    near = np.asarray(hardening.embed(variables, images, extractor=_CURVED, bfloat16=True))
    assert near.dtype == np.float32 and not np.array_equal(near, exact)
    # Eight bits in each of two layers, embeddings of unit length.
    np.testing.assert_allclose(near, exact, atol=0.03)
    state, metrics = _run(_recipe(_CURVED, bfloat16=True), _pixels(16), 2)
    assert np.isfinite(metrics.loss).all()
    assert {leaf.dtype for leaf in jax.tree.leaves(state.params)} == {jnp.float32.dtype}


def test_embeddings_of_chips_do_not_depend_on_the_devices(one_device, spread):
    """Eleven chips in batches of three."""
    chips, variables = _pixels(11)[:, 0], _variables(_CURVED)

    def measured(mesh, backend):
        return robustness.embed_chips(
            variables, chips, extractor=_CURVED, mesh=mesh, batch_size=3, backend=backend
        )

    expected = measured(one_device, "jit")
    assert expected.shape == (11, _SIZE)
    np.testing.assert_allclose(measured(*spread), expected, atol=1e-6)


def test_attacked_embeddings_do_not_depend_on_the_devices(one_device, spread):
    """Eleven chips in batches of three."""
    chips, variables = _pixels(11)[:, 0], _variables(_CURVED)
    clean = robustness.embed_chips(variables, chips, extractor=_CURVED, mesh=one_device)

    def attacked(mesh, backend):
        return robustness.attacked_embeddings(
            jax.random.key(0),
            variables,
            chips,
            clean,
            np.ones(11),
            extractor=_CURVED,
            attack=hardening.Attack(8 / 255, 3),
            mesh=mesh,
            batch_size=3,
            backend=backend,
        )

    expected = attacked(one_device, "jit")
    assert np.linalg.norm(expected - clean, axis=1).min() > 1e-2
    # A sign of a gradient next to zero may turn.
    np.testing.assert_allclose(attacked(*spread), expected, atol=1e-3)


def test_given_perturbations_are_changed_like_their_chips():
    clean = _pixels(4) // 2
    cloaked = np.concatenate([clean, clean + 1, clean + 2], axis=1)
    recipe = _recipe(_CURVED, augmentation=augmentation.Augmentation(flip_probability=0.5))
    rows = np.arange(8, dtype=np.int32)
    variables = _variables(_CURVED)
    batch = hardening.draw_batch(jax.random.key(1), variables, cloaked, rows, recipe=recipe)
    levels = np.asarray(batch.delta * 255)
    expected = np.broadcast_to((1 + rows % 2)[:, None, None, None], levels.shape)
    np.testing.assert_allclose(levels, expected, atol=1e-4)
    flipped = clean[:, 0][:, :, ::-1]
    for row, image in zip(rows, np.asarray(batch.images * 255), strict=True):
        is_either = [np.allclose(image, way[row // 2], atol=1e-3) for way in (clean[:, 0], flipped)]
        assert any(is_either)
    np.testing.assert_allclose(
        batch.anchors, registry.embed(_CURVED, variables, batch.images), atol=1e-6
    )
    # There is nothing to search, and the extractor learns to see through.
    shown = np.concatenate([clean, 255 - clean], axis=1)
    _, metrics = _run(_recipe(_CURVED), np.tile(shown, (4, 1, 1, 1, 1)), 40)
    assert metrics.shift[-5:].mean() < 0.7 * metrics.shift[:5].mean()


def test_wrong_options():
    with pytest.raises(ValueError, match="limit is 0"):
        hardening.Attack(0.0)
    with pytest.raises(ValueError, match="num_steps 0"):
        hardening.Attack(0.1, 0)
    with pytest.raises(ValueError, match="step_size is -1"):
        hardening.Attack(0.1, 1, -1)
    assert hardening.Attack(0.1, 5).step == pytest.approx(0.05)
    with pytest.raises(ValueError, match="clean_weight is -1"):
        _recipe(_LINEAR, clean_weight=-1)
    unknown = dataclasses.replace(_LINEAR, thresholds=registry.Thresholds(None, None, None))
    with pytest.raises(ValueError, match="threshold of toy"):
        _recipe(unknown)


def test_pairs_under_attack():
    # The embedding is the first channel of one pixel, times 2, less 1.
    matrix = np.zeros((_PX * _PX * 3, _SIZE), np.float32)
    matrix[0, 0] = 1
    variables = {"params": {"fc": {"kernel": matrix}}}
    images = np.full((40, _PX, _PX, 3), 100, np.uint8)
    images[1::4] += 2  # One person: a distance of 4 / 255.
    images[3::4] += 20  # Two people: 40 / 255.
    rows = np.arange(40).reshape(20, 2)
    same = np.tile([True, False], 10)
    pairs = training_photos.Pairs(images, rows, same)
    mesh = parallel.make_mesh()  # Ten pairs on four devices.
    for level, dodged, impersonated in ((1, 0, 0), (14, 1, 1)):
        scores = robustness.pair_scores(
            jax.random.key(0),
            variables,
            pairs,
            extractor=_LINEAR,
            attack=hardening.Attack(level / 255, 6),
            mesh=mesh,
            num_attacked=10,
        )
        assert scores["accuracy"] == 1 and scores["auc"] == 1
        assert scores["threshold"] == pytest.approx(22 / 255, abs=1e-5)
        assert scores["attacked_pairs"] == 10 and scores["attacked_clean_accuracy"] == 1
        assert (scores["dodged"], scores["impersonated"]) == (dodged, impersonated)
        assert scores["attacked_accuracy"] == 1 - (dodged + impersonated) / 2


@pytest.mark.parametrize("dtype", [None, "float16"])
def test_a_hardened_folder_is_an_extractor(tmp_path, dtype):
    entry = registry.get("mobilefacenet")
    generator = np.random.default_rng(0)
    shapes = conversion.shapes(entry.module, entry.input_px)
    variables = jax.tree.map(
        lambda leaf: generator.normal(size=leaf.shape).astype(np.float16).astype(np.float32), shapes
    )
    card = dataclasses.replace(trained.base_card("mobilefacenet"), threshold=1.1)
    trained.write_extractor(tmp_path, card, variables, dtype=dtype)
    found = pipeline.find_extractor(str(tmp_path))
    assert found.name == f"hardened:{tmp_path.name}"
    # Where others lie for the original does not hold for it.
    assert found.threshold == found.reach == 1.1
    same = ("module", "template", "input_scale", "input_offset", "stretch", "normalized", "metric")
    assert all(getattr(found, name) == getattr(entry, name) for name in same)
    jax.tree.map(np.testing.assert_array_equal, registry.load_variables(found, None), variables)
    size = (tmp_path / trained.WEIGHTS_NAME).stat().st_size
    count = sum(leaf.size for leaf in jax.tree.leaves(variables))
    assert size < (2.2 if dtype else 4.2) * count
    text = (tmp_path / trained.CARD_NAME).read_text()
    assert json.loads(text)["input_scale"] == entry.input_scale
    other = files.unseal(json.loads(text)) | {"base": "immobilefacenet"}
    files.write_sealed(tmp_path / trained.CARD_NAME, other)
    with pytest.raises(ValueError, match="immobilefacenet"):
        pipeline.find_extractor(str(tmp_path))


def test_weights_of_another_card_are_refused(tmp_path):
    """A run that was killed between the two writes leaves the card of earlier weights."""
    card = trained.Card("resnet6", 16, 8, width=4, template=((0.0, 0.0),) * 5, threshold=1.0)
    module = trained.make_network("resnet6", input_px=16, embedding_size=8, width=4)
    shapes = conversion.shapes(module, 16)
    old, new = (
        jax.tree.map(lambda leaf, value=value: np.full(leaf.shape, value, np.float32), shapes)
        for value in (1, 2)
    )
    path = trained.write_extractor(tmp_path, card, old)
    text = path.read_text()
    trained.write_extractor(tmp_path, card, new)
    jax.tree.map(np.testing.assert_array_equal, trained.read_extractor(tmp_path).load(), new)
    path.write_text(text)
    assert trained.read_card(tmp_path) == card
    with pytest.raises(ValueError, match="not those of the card"):
        trained.read_extractor(tmp_path).load()
    # Earlier versions did not write whose card it is.
    fields = files.unseal(json.loads(text))
    del fields["weights_sha256"]
    files.write_sealed(path, fields)
    jax.tree.map(np.testing.assert_array_equal, trained.read_extractor(tmp_path).load(), new)


def test_cloaks_are_cut_like_their_photos(tmp_path, monkeypatch):
    for name in ("a/1.png", "a/2.png", "a/3.png", "b/1.png", "b/2.png"):
        programs.save_photo(tmp_path / "clean" / name, (40, 80, 120))
    cloaks = tmp_path / "cloaks"
    programs.save_photo(cloaks / "a/1_cloaked.png", (50, 80, 120))
    programs.save_photo(cloaks / "a/2.png", (60, 80, 120))
    programs.save_photo(cloaks / "b/1_cloaked.png", (50, 80, 120), size=(24, 25))
    found = detect.Faces(
        np.array([[1, 2, 20, 18]], np.float32),
        np.ones(1, np.float32),
        np.array([[[8, 8], [8, 16], [12, 12], [16, 9], [16, 15]]], np.float32),
    )
    monkeypatch.setattr(detect, "detect_faces", lambda *_, **__: found)
    listing = hardening_photos.list_photos([str(tmp_path / "clean")])
    left, made = hardening_photos.read_chips({}, _LINEAR, listing, cloaks=[str(cloaks)])
    assert left.sample_ids == ["0/a/1.png", "0/a/2.png"]
    assert made.shape == (2, 2, _PX, _PX, 3)
    np.testing.assert_array_equal(made[:, :, 4, 4, 0], [[40, 50], [40, 60]])
    np.testing.assert_array_equal(made[:, 0, :, :, 1:], made[:, 1, :, :, 1:])
    reasons = {problem.name: problem.reason for problem in left.problems}
    assert "no cloaked version" in reasons["0/a/3.png"]
    assert "another size" in reasons["0/b/1.png"] and "0/b/2.png" in reasons
    # Two photos that differ in their suffix: the cloak may be of either.
    programs.save_photo(tmp_path / "clean" / "a/1.jpg", (40, 80, 120))
    again = hardening_photos.list_photos([str(tmp_path / "clean")])
    left, _ = hardening_photos.read_chips({}, _LINEAR, again, cloaks=[str(cloaks)])
    assert left.sample_ids == ["0/a/2.png"]
    assert (
        len(hardening_photos.list_photos([str(tmp_path / "clean")] * 2, max_photos=1).samples) == 4
    )


def _call(*flags):
    return programs.call(harden_extractor.HardenExtractorConfig, harden_extractor.run, *flags)


def test_the_program_resumes(tmp_path, monkeypatch):
    toy = ["--toy", "--num_steps=9", "--checkpoint_steps=3", "--log_steps=2"]
    result, complete = _call(*toy, f"--workdir={tmp_path / 'straight'}")
    assert complete and result["steps"] == 9
    assert result["before"]["shift"]["drift"] == 0
    assert result["after"]["verification"]["attacked_pairs"] == 40
    save, saved = checkpoint.Checkpoints.save, []

    def save_or_stop(self, step, tree):
        save(self, step, tree)
        saved.append(step)
        if len(saved) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint.Checkpoints, "save", save_or_stop)
    with pytest.raises(KeyboardInterrupt):
        _call(*toy, f"--workdir={tmp_path / 'cut'}")
    resumed, _ = _call(*toy, f"--workdir={tmp_path / 'cut'}")
    same = {"hardened": None, "command": None, "date": None}
    assert {**result, **same} == {**resumed, **same}
    for name in ("extractor.safetensors", "metrics.jsonl"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "straight" / name).read_bytes()
    found = pipeline.find_extractor(str(tmp_path / "straight"))
    assert found.threshold == result["after"]["verification"]["threshold"]
    assert jax.tree.structure(found.load()) == jax.tree.structure(
        pipeline.find_extractor(str(tmp_path / "straight" / "original")).load()
    )


@pytest.mark.parametrize(
    "flags, part",
    [
        ([], "--data is needed"),
        (["--data=DATA", "--extractor=nobody"], "no extractor 'nobody'"),
        (["--data=DATA", "--perturbation=folder"], "go together"),
        (["--toy", "--epsilon=0"], "limit is 0"),
        (["--toy", "--batch_size=1000"], "--batch_size=1000"),
    ],
)
def test_wrong_usage_of_the_program(tmp_path, flags, part):
    programs.save_photo(tmp_path / "data" / "a" / "1.png", (9, 9, 9))
    flags = [flag.replace("DATA", str(tmp_path / "data")) for flag in flags]
    answer = _call(*flags, f"--workdir={tmp_path / 'work'}")
    assert isinstance(answer, str) and part in answer, answer
