import jax
import jax.numpy as jnp
import numpy as np
import pytest

from afr_jax.perturb import warps


def _flat_grid(y0, x0, y1, x1, rows=1, columns=1):
    y, x = np.meshgrid(
        np.linspace(y0, y1, rows + 1), np.linspace(x0, x1, columns + 1), indexing="ij"
    )
    return jnp.asarray(np.stack([y, x, np.zeros_like(y)], -1), jnp.float32)


@pytest.fixture(scope="module")
def paste():
    return jax.jit(warps.paste, static_argnames="window")


def test_quad_map_equals_opencv(variant):
    cv2 = pytest.importorskip("cv2")
    corners = np.array([[[5, 4], [9, 33]], [[41, 1], [35, 40]]], np.float32)
    ours = np.asarray(variant(warps.quad_map)(jnp.asarray(corners)))
    source = corners.reshape(4, 2)[:, ::-1].copy()
    theirs = cv2.getPerspectiveTransform(source, np.float32([[0, 0], [1, 0], [0, 1], [1, 1]]))
    np.testing.assert_allclose(ours / ours[2, 2], theirs, atol=1e-5)


def test_a_texture_in_its_own_size_is_copied(paste):
    texture = np.random.default_rng(0).random((6, 7, 3)).astype(np.float32)
    image = np.full((20, 24, 3), 0.5, np.float32)
    # The texture's edges lie half a pixel outside the centres of its outer pixels.
    pasted = np.array(paste(image, texture, _flat_grid(3.5, 8.5, 9.5, 15.5, 2, 2)))
    np.testing.assert_allclose(pasted[4:10, 9:16], texture, atol=1e-4)
    pasted[4:10, 9:16] = 0.5
    np.testing.assert_allclose(pasted, 0.5, atol=1e-6)


def test_shrinking_averages_instead_of_skipping(paste):
    stripes = np.tile([0.0, 1.0], 24)[None, :, None] * np.ones((48, 1, 3))
    image = np.zeros((20, 20, 3), np.float32)
    pasted = np.asarray(paste(image, stripes.astype(np.float32), _flat_grid(3.5, 3.5, 15.5, 15.5)))
    assert np.abs(pasted[6:13, 6:13] - 0.5).max() < 0.05


def test_seams_neither_gap_nor_add_up(paste):
    generator = np.random.default_rng(3)
    grid = np.array(_flat_grid(6, 6, 33, 34, 4, 4))
    grid[1:-1, 1:-1, :2] += generator.uniform(-1.5, 1.5, (3, 3, 2))
    image = np.zeros((40, 40, 3), np.float32)
    pasted = np.asarray(paste(image, np.ones((8, 8, 1), np.float32), jnp.asarray(grid)))
    np.testing.assert_allclose(pasted[8:32, 8:33], 1.0, atol=1e-6)
    assert pasted.max() <= 1 + 1e-6
    # The area of the sheet is kept: nothing is drawn far outside.
    np.testing.assert_allclose(pasted[..., 0].sum(), 27 * 28, rtol=0.01)


def test_nothing_is_drawn_from_behind_or_far_outside(paste):
    image = np.zeros((40, 40, 3), np.float32)
    texture = np.ones((4, 4, 1), np.float32)
    behind = _flat_grid(8, 30, 30, 8)
    assert not np.asarray(paste(image, texture, behind)).any()
    # A strongly slanted cell has its horizon in the picture.
    corners = np.array([[[15, 10], [5, 30]], [[25, 10], [35, 30]]], np.float32)
    drawn = np.asarray(paste(image, texture, jnp.asarray(corners)))[..., 0]
    assert drawn[20, 20] == 1
    assert not drawn[:, :8].any() and not drawn[:, 32:].any()
    assert not drawn[:3].any() and not drawn[38:].any()


def test_a_window_changes_nothing_and_an_origin_shifts(paste):
    texture = np.random.default_rng(1).random((9, 9, 1)).astype(np.float32)
    image = np.full((48, 40, 3), 0.3, np.float32)
    grid = _flat_grid(12.2, 9.1, 25.7, 22.4, 3, 3)
    whole = paste(image, texture, grid)
    np.testing.assert_allclose(paste(image, texture, grid, window=(24, 24)), whole, atol=1e-6)
    moved = warps.paste(image, texture, grid + jnp.array([[[5.0, 7.0, 0.0]]]),
                        origin=jnp.array([5.0, 7.0]))  # fmt: skip
    np.testing.assert_allclose(moved, whole, atol=1e-5)


def test_gradient_reaches_every_texel_and_sums_to_the_area():
    image = jnp.zeros((24, 24, 3))
    grid = _flat_grid(5.5, 5.5, 17.5, 17.5, 2, 2)

    def total(texture):
        return jnp.sum(warps.paste(image, texture, grid)[..., 0])

    gradient = np.asarray(jax.grad(total)(jnp.full((12, 12, 1), 0.5)))
    assert (gradient > 0).all()
    np.testing.assert_allclose(gradient.sum(), 12 * 12, rtol=0.02)


def test_turns_keep_lengths_and_foreshorten(variant):
    grid = _flat_grid(-10, -10, 10, 10, 2, 2)
    turned = variant(warps.turn_grid)(grid, jnp.deg2rad(jnp.array([0.0, 60.0, 0.0])))
    np.testing.assert_allclose(turned[0, -1, 1] - turned[0, 0, 1], 20 * 0.5, atol=1e-4)
    np.testing.assert_allclose(turned[..., 0], grid[..., 0], atol=1e-5)
    rolled = variant(warps.turn_grid)(grid, jnp.deg2rad(jnp.array([0.0, 0.0, 90.0])), scale=2.0)
    np.testing.assert_allclose(rolled[0, 0, :2], [-20, 20], atol=1e-4)
    lengths = np.linalg.norm(np.asarray(turned).reshape(-1, 3), axis=1)
    np.testing.assert_allclose(lengths, np.linalg.norm(grid.reshape(-1, 3), axis=1), atol=1e-4)
