"""Extractors whose weights are torch state dicts, against the originals' arithmetic in NumPy.

The arrays have the names, and the files the form, that the originals give them.
"""

import functools
import pathlib

import jax
import make_extractor_references as references
import numpy as np
import pytest
import safetensors.numpy
import torch_oracle as oracle
import torch_writer as torch

from afr_jax.models.extractors import iresnet, mobilefacenet, registry, vit
from afr_jax.models.weights import conversion

_BLOCKS, _WIDTHS = (1, 2, 1, 1), (16, 16, 32, 48)
_SMALL = iresnet.IResNet(_BLOCKS, _WIDTHS)
_TRANSFORMER = vit.FaceTransformer(32, 2, num_heads=4)
_MOBILE = registry.get("frbench_mobilefacenet").module
_FULL = (64, 128, 256, 512)

# Module, reader, oracle.
_NETWORKS = {
    "insightface": (_SMALL, iresnet.read_weights, oracle.iresnet),
    "frbench_ir": (
        _SMALL,
        iresnet.read_weights,
        functools.partial(oracle.iresnet, frbench=True),
    ),
    "adaface": (_SMALL.clone(unit="adaface"), iresnet.read_weights, oracle.adaface),
    "frbench_irse": (
        _SMALL.clone(unit="squeeze"),
        iresnet.read_weights,
        functools.partial(oracle.adaface, squeeze=True),
    ),
    "frbench_mobilefacenet": (_MOBILE, mobilefacenet.read_weights, None),
    "vit": (_TRANSFORMER, vit.read_weights, None),
}


def _original(name: str, chips: np.ndarray) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """The state dict of an original, and its embeddings of chips `[N, 112, 112, 3]`."""
    net, images = oracle.Net(), chips.transpose(0, 3, 1, 2).astype(np.float64)
    module, _, run = _NETWORKS[name]
    if name == "vit":
        found = oracle.vit(net, images, module.width, module.depth, module.num_heads)
    elif name == "frbench_mobilefacenet":
        found = oracle.frbench_mobilefacenet(net, images)
    else:
        found = run(net, images, module.blocks, module.widths)
    return net.state, found


@functools.cache
def _made(name: str) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]:
    chips = 2 * references.published_chips() - 1
    return *_original(name, chips), chips


def _unit(embeddings):
    return embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)


def _read(name: str, path: pathlib.Path):
    module, read_fn, _ = _NETWORKS[name]
    return module, read_fn(path, module=module)


@pytest.mark.parametrize("name", _NETWORKS)
def test_embeddings_equal_those_of_the_original(tmp_path, name):
    state, theirs, chips = _made(name)
    path = torch.write_state_dict(tmp_path / "net.pth", state)
    module, variables = _read(name, path)
    ours = np.asarray(jax.jit(module.apply)(variables, chips))
    assert ours.dtype == np.float32 and ours.shape == (2, 512)
    np.testing.assert_allclose(_unit(ours), _unit(theirs), atol=1e-5)
    # The oracle sees differences.
    assert np.abs(_unit(theirs)[0] - _unit(theirs)[1]).max() > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, run",
    [
        ("adaface_ir50", lambda net, x: oracle.adaface(net, x, iresnet.BLOCKS_50, _FULL)),
        ("adaface_ir101", lambda net, x: oracle.adaface(net, x, iresnet.BLOCKS_100, _FULL)),
        (
            "frbench_irse50",
            lambda net, x: oracle.adaface(net, x, iresnet.BLOCKS_50, _FULL, squeeze=True),
        ),
        ("lvface_t", lambda net, x: oracle.vit(net, x, 256, 12, 8)),
        ("lvface_b", lambda net, x: oracle.vit(net, x, 512, 24, 8)),
        ("arcface_r50", lambda net, x: oracle.iresnet(net, x, iresnet.BLOCKS_50, _FULL)),
    ],
)
def test_whole_networks_equal_the_original(tmp_path, name, run):
    """Through the registry, from RGB in [0, 1] to unit length."""
    extractor, chips = registry.get(name), references.published_chips()
    net = oracle.Net()
    inputs = 2 * (chips[..., ::-1] if extractor.is_bgr else chips) - 1
    theirs = _unit(run(net, inputs.transpose(0, 3, 1, 2).astype(np.float64)))
    path = torch.write_state_dict(tmp_path / "net.pt", net.state)
    variables = registry.load_variables(extractor, path)
    ours = jax.jit(registry.embed, static_argnums=0)(extractor, variables, chips)
    np.testing.assert_allclose(ours, theirs, atol=1e-4)


def test_adaface_takes_blue_first():
    assert registry.get("adaface_ir50").is_bgr and registry.get("adaface_ir101").is_bgr
    others = ("arcface_r50", "frbench_irse50", "frbench_mobilefacenet", "lvface_b")
    assert not any(registry.get(name).is_bgr for name in others)


@pytest.mark.parametrize(
    "write",
    [
        lambda path, state: torch.write_state_dict(
            path,
            {f"model.{name}": array for name, array in state.items()}
            | {"head.kernel": np.ones((512, 9), np.float32), "head.t": np.zeros(1, np.float32)},
            checkpoint=True,
        ),
        lambda path, state: safetensors.numpy.save_file(state, path),
        lambda path, state: torch.write_state_dict(
            path,
            state
            | {
                "output_layer.4.weight": np.ones(512, np.float32),
                "output_layer.4.bias": np.zeros(512, np.float32),
            },
        ),
    ],
)
def test_other_forms_of_a_state_dict_are_the_same_network(tmp_path, write):
    """A Lightning checkpoint, safetensors, and a last BatchNorm that has scale and bias."""
    state, _, _ = _made("adaface")
    plain = torch.write_state_dict(tmp_path / "net.pth", state)
    expected = registry.fingerprint(_read("adaface", plain)[1])
    path = tmp_path / "net.ckpt"
    write(path, state)
    assert registry.fingerprint(_read("adaface", path)[1]) == expected


def test_the_registry_reads_safetensors_of_both_kinds(tmp_path):
    extractor = registry.get("frbench_mobilefacenet")
    foreign, own = tmp_path / "foreign.safetensors", tmp_path / "own.safetensors"
    safetensors.numpy.save_file(_made("frbench_mobilefacenet")[0], foreign)
    variables = registry.load_variables(extractor, foreign)
    conversion.write_safetensors(own, variables)
    again = registry.load_variables(extractor, own)
    assert registry.fingerprint(again) == registry.fingerprint(variables)


@pytest.mark.parametrize("name", _NETWORKS)
def test_the_file_of_another_network_is_refused(tmp_path, name):
    for other in _NETWORKS:
        if other == name:
            continue
        path = torch.write_state_dict(tmp_path / "net.pth", _made(other)[0])
        # InsightFace's network is FRBench's under other names.
        if {name, other} == {"insightface", "frbench_ir"}:
            _read(name, path)
            continue
        with pytest.raises(ValueError, match=r"net\.pth does not hold this network's arrays"):
            _read(name, path)


def test_training_updates_the_statistics_of_the_head():
    module = vit.FaceTransformer(16, 1, num_heads=2, embedding_size=8)
    chips = references.published_chips()
    variables = jax.jit(module.init)(jax.random.key(0), chips)
    train_fn = functools.partial(module.apply, train=True, mutable=["batch_stats"])
    embeddings, updates = jax.jit(train_fn)(variables, chips)
    assert embeddings.shape == (2, 8)
    np.testing.assert_allclose(np.mean(embeddings, axis=0), 0, atol=1e-5)
    assert float(np.abs(updates["batch_stats"]["feature_1"]["mean"]).max()) > 0


def test_foamlius_mobilefacenet_equals_the_original(tmp_path):
    extractor, chips = registry.get("foamliu_mobilefacenet"), references.published_chips()
    net = oracle.Net()
    theirs = _unit(oracle.foamliu_mobilefacenet(net, chips.transpose(0, 3, 1, 2)))
    path = torch.write_state_dict(tmp_path / "mobilefacenet.pt", net.state)
    variables = registry.load_variables(extractor, path)
    ours = jax.jit(registry.embed, static_argnums=0)(extractor, variables, chips)
    np.testing.assert_allclose(ours, theirs, atol=1e-5)
    assert np.abs(theirs[0] - theirs[1]).max() > 1e-3
    # The eyes are two thirds as far apart as in InsightFace's chips.
    ours, theirs = (np.array(each.template) for each in (extractor, registry.get("sface")))
    np.testing.assert_allclose(ours - 56, (theirs - 56) / 1.5, atol=1e-9)
