"""Readers on content that is drawn at random: nothing but the errors that they document."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from afr_jax.core import files
from afr_jax.data import pairs, photos
from afr_jax.methods.patches import markers
from drill import corpus, readers

# Draws that are the same in each run, and take a few seconds.
_FEW = settings(max_examples=60, deadline=None, derandomize=True, database=None)
_SIDE = 24

# A change of a file: where (a share of its length), how many bytes go, and what comes in.
_edits = st.lists(
    st.tuples(st.floats(0, 1), st.integers(0, 40), st.binary(max_size=40)), min_size=1, max_size=4
)
_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.just(10**400) | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=30,
)


def _edited(data, edits):
    for place, num_lost, added in edits:
        start = int(place * len(data))
        data = data[:start] + added + data[start + num_lost :]
    return data


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("readers")


@pytest.mark.parametrize(
    "name",
    [
        *("torch", "torch, old format", "Keras", "npz", "safetensors", "ONNX", "TFLite", "photo"),
        *("film", "pairs", "corners", "noise", "cloak record", "card"),
    ],
)
def test_edited_files_are_read_or_refused_in_one_line(place, name):
    reader = readers.READERS[name]
    path = place / name
    reader.write(path)
    data, whole = path.read_bytes(), list(reader.read(path))

    @_FEW
    @given(_edits)
    def check(edits):
        path.write_bytes(_edited(data, edits))
        outcome, text = readers.read(readers.Case(name, "edited", [], path, whole))
        assert outcome != "crash", text
        assert outcome != readers.OTHER or not reader.is_checked

    check()


@pytest.mark.parametrize("extension", ["jpg", "png", "webp", "tif", "bmp", "gif", "heic"])
def test_edited_photos_are_decoded_or_refused(extension):
    image = Image.linear_gradient("L").resize((_SIDE, _SIDE)).convert("RGB")
    data = corpus.encoded(image, extension)
    assert photos.decode_photo(data).pixels.shape == (_SIDE, _SIDE, 3)

    @_FEW
    @given(_edits)
    def check(edits):
        try:
            photo = photos.decode_photo(_edited(data, edits))
        except photos.PhotoError as error:
            assert len(str(error).splitlines()) == 1
        else:
            assert photo.pixels.ndim == 3 and photo.pixels.size

    check()


@_FEW
@given(st.lists(st.tuples(st.text(min_size=1), st.text(min_size=1), st.booleans())))
def test_any_names_of_pairs_are_read_as_they_were_written(place, rows):
    path = place / "any.csv"
    rows = [(a, b, int(same)) for a, b, same in rows if _is_text(a + b)]
    files.write_csv(path, ["image_a", "image_b", "same"], rows)
    names, same = pairs.read_pairs(path)
    assert names == [(a, b) for a, b, _ in rows]
    assert same.tolist() == [bool(same) for *_, same in rows]


def _is_text(text):
    """Whether it can be the name of a file: no null, no half of a pair of surrogates."""
    return "\0" not in text and text.isprintable()


@_FEW
@given(_json)
def test_any_json_is_corners_or_refused(place, value):
    path = place / "any.json"
    path.write_text(json.dumps(value))
    try:
        grids = markers.read_grids(path)
    except ValueError as error:
        assert str(path) in str(error)
    else:
        shapes = [grid.shape for of_photo in grids.values() for grid in of_photo.values()]
        assert all(len(shape) == 3 and shape[2] == 2 for shape in shapes)


@_FEW
@given(st.dictionaries(st.text(), _json), _json)
def test_a_sealed_file_is_what_was_written_or_refused(fields, other):
    fields.pop("checksum", None)
    # JSON has no infinities: they are sealed as null.
    sealed = json.loads(json.dumps(files.seal(fields)))
    plain = {name: value for name, value in sealed.items() if name != "checksum"}
    assert files.unseal(sealed) == plain
    for name, value in plain.items():
        changed = files.to_jsonable(other)
        if changed != value and repr(changed) != repr(value):
            with pytest.raises(ValueError, match="checksum"):
                files.unseal({**sealed, name: changed})
    with pytest.raises(ValueError, match="damaged"):
        files.unseal(files.to_jsonable(other))
