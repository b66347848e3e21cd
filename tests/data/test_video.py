import numpy as np
import pytest
from PIL import Image

from afr_jax.core import backend
from afr_jax.data import video


def _pictures(count, shape=(16, 24)):
    # Flat colors survive any codec well enough to be told apart.
    return [np.full((*shape, 3), (20 + 40 * n, 128, 128), np.uint8) for n in range(count)]


def _write_gif(path, pictures):
    first, *rest = [Image.fromarray(one) for one in pictures]
    first.save(path, save_all=True, append_images=rest, duration=100)


def _write_mkv(path, pictures):
    import av

    with av.open(str(path), "w") as film:
        stream = film.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for one in pictures:
            film.mux(stream.encode(av.VideoFrame.from_ndarray(one, format="rgb24")))
        film.mux(stream.encode(None))


def test_gif_frames_in_order_and_evenly_spread(tmp_path):
    _write_gif(tmp_path / "film.gif", _pictures(5))
    found = video.read_frames([tmp_path / "film.gif"])
    assert [frame.name for frame in found.frames] == [f"film_000{n}" for n in range(5)]
    reds = [frame.pixels[..., 0].mean() for frame in found.frames]
    np.testing.assert_allclose(reds, [20, 60, 100, 140, 180], atol=6)
    # One path needs no list.
    some = video.read_frames(tmp_path / "film.gif", max_frames=2)
    assert [frame.name for frame in some.frames] == ["film_0000", "film_0002"]
    assert video.spread(7, 3) == [0, 2, 4]


def test_films_by_pyav_and_one_that_breaks_off(tmp_path):
    path = tmp_path / "film.mkv"
    _write_mkv(path, _pictures(6, (48, 64)))
    found = video.read_frames([path])
    assert len(found.frames) == 6 and not found.skipped
    assert found.frames[0].pixels.shape == (48, 64, 3)
    reds = [frame.pixels[..., 0].mean() for frame in found.frames]
    assert np.all(np.diff(reds) > 20)
    (tmp_path / "torn.mkv").write_bytes(path.read_bytes()[:60])
    with pytest.raises(video.VideoError, match=r"torn.mkv"):
        video.read_frames([tmp_path / "torn.mkv"])


def test_folders_mix_photos_and_films_and_name_what_is_bad(tmp_path):
    _write_gif(tmp_path / "b.gif", _pictures(2))
    Image.fromarray(_pictures(1)[0]).save(tmp_path / "a.png")
    Image.fromarray(_pictures(1, (40, 30))[0]).save(tmp_path / "d.png")
    (tmp_path / "c.jpg").write_bytes(b"no photo")
    found = video.read_frames([tmp_path])
    assert [frame.name for frame in found.frames] == ["a", "b_0000", "b_0001", "d"]
    assert [name for name, _ in found.skipped] == ["c.jpg"]


def test_missing_empty_and_unreadable_paths_are_told_apart(tmp_path):
    with pytest.raises(FileNotFoundError):
        video.read_frames([tmp_path / "missing.gif"])
    with pytest.raises(video.VideoError, match="it is empty"):
        video.read_frames([tmp_path])
    (tmp_path / "bad.gif").write_bytes(b"GIF89a and no more")
    with pytest.raises(video.VideoError, match=r"bad.gif"):
        video.read_frames([tmp_path / "bad.gif"])
    with pytest.raises(ValueError, match="max_frames is 0"):
        video.read_frames([tmp_path], max_frames=0)


@pytest.mark.parametrize("suffix", ["gif", "mkv"])
def test_frames_that_are_too_many_or_too_large_are_not_held(tmp_path, monkeypatch, suffix):
    path = tmp_path / f"film.{suffix}"
    if suffix == "gif":
        _write_gif(path, _pictures(6, (48, 64)))
    else:
        _write_mkv(path, _pictures(6, (48, 64)))
    # A quarter of it holds three frames and a half.
    monkeypatch.setattr(backend, "memory_bytes", lambda: 14 * 48 * 64 * 3)
    found = video.read_frames(path)
    assert len(found.frames) == 3
    assert found.skipped == [(path.name, "no memory for its frames from number 3 on")]
    monkeypatch.setattr(backend, "most_pixels", lambda: 48 * 64 - 1)
    with pytest.raises(video.VideoError, match=f"{path.name}.*megapixels"):
        video.read_frames(path)


def test_a_gif_that_declares_many_pixels_is_refused_by_its_header(tmp_path):
    path = tmp_path / "film.gif"
    _write_gif(path, _pictures(2))
    data = bytearray(path.read_bytes())
    data[6:10] = b"\xff\xff\xff\xff"  # 65,535 x 65,535
    path.write_bytes(data)
    with pytest.raises(video.VideoError, match=r"film\.gif"):
        video.read_frames(path)


def _shades(count):
    return [np.full((48, 64, 3), (10 + 2 * number, 128, 128), np.uint8) for number in range(count)]


def _numbers(frames):
    return [int(frame.name.rpartition("_")[2]) for frame in frames]


@pytest.mark.parametrize("num_frames, count", [(3, 5), (10, 5), (11, 5), (90, 4), (97, 7)])
def test_some_frames_of_a_film_are_evenly_spread(tmp_path, num_frames, count):
    _write_mkv(tmp_path / "film.mp4", _shades(num_frames))
    found = video.sample_film(tmp_path / "film.mp4", count)
    numbers = _numbers(found)
    assert len(found) == min(count, num_frames) and numbers[0] == 0
    steps = np.diff(numbers)
    assert steps.min() >= 1 and steps.max() <= 2 * steps.min()
    assert numbers[-1] + steps.max() * 2 >= num_frames
    reds = [frame.pixels[..., 0].mean() for frame in found]
    np.testing.assert_allclose(reds, 10 + 2 * np.array(numbers), atol=6)


def test_sampled_frames_are_reduced_and_gifs_go_too(tmp_path):
    _write_mkv(tmp_path / "film.mkv", _pictures(3, (48, 64)))
    (first, *_) = video.sample_film(tmp_path / "film.mkv", 3, max_px=32)
    assert first.pixels.shape == (24, 32, 3) and first.pixels.dtype == np.uint8
    _write_gif(tmp_path / "film.gif", _pictures(5))
    assert _numbers(video.sample_film(tmp_path / "film.gif", 5)) == [0, 1, 2, 3, 4]


def test_films_that_are_lists_of_others_or_too_large_are_refused(tmp_path, monkeypatch):
    _write_mkv(tmp_path / "real.mp4", _pictures(2, (48, 64)))
    lists = {
        "hls.mp4": "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nreal.mp4\n#EXT-X-ENDLIST\n",
        "concat.mp4": "ffconcat version 1.0\nfile real.mp4\n",
    }
    for name, text in lists.items():
        (tmp_path / name).write_text(text)
        for read in (lambda path: video.sample_film(path, 2), video.read_frames):
            with pytest.raises(video.VideoError):
                read(tmp_path / name)
    monkeypatch.setattr(backend, "most_pixels", lambda: 100)
    _write_gif(tmp_path / "film.gif", _pictures(2))
    for name in ("real.mp4", "film.gif"):
        with pytest.raises(video.VideoError, match="megapixels"):
            video.sample_film(tmp_path / name, 2)


def test_frames_of_one_name_are_told_apart(tmp_path):
    for folder in ("monday", "tuesday"):
        (tmp_path / folder).mkdir()
        Image.fromarray(_pictures(1)[0]).save(tmp_path / folder / "a.png")
        Image.fromarray(_pictures(1)[0]).save(tmp_path / folder / "a.jpg")
    found = video.read_frames([tmp_path / "monday", tmp_path / "tuesday"])
    assert [frame.name for frame in found.frames] == ["a", "a_2", "a_3", "a_4"]
