"""Textures on curved surfaces: grids of cells, each with its own projective map onto the photo.

A grid `[R + 1, C + 1, 3]` gives the corners of R x C cells of a texture as (y, x, depth) in photo
pixels (0 = center of the first row or column, depth towards the camera); depth only matters for
turning the grid (`turn_grid`). The texture's first row lies between the first two rows of corners.

`paste` is differentiable in the texture. It takes every photo pixel from one cell alone, so seams
neither gap nor add up, averages the texels that fall into a pixel, and lets the pixels at the outer
edge show through. Cells that face away are not drawn.
"""

import chex
import jax
import jax.numpy as jnp

from afr_jax.core.parallel import AnyArray

_TINY = 1e-6


def turn_grid(
    grid: AnyArray,
    angles: jax.Array,
    *,
    scale: jax.Array | float = 1.0,
    shift: jax.Array | float = 0.0,
) -> jax.Array:
    """Turns, scales and shifts a grid about its center (weak perspective: depth is dropped later).

    Args:
        grid: `[..., 3]` points (y, x, depth).
        angles: `[3]` pitch, yaw and roll in radians: about the x, y and viewing axis.
        scale: factor about the center.
        shift: `[2]` (y, x) pixels, or 0.

    Returns:
        Points of the same shape.
    """
    points = jnp.reshape(grid, (-1, 3))
    center = jnp.mean(points, axis=0)
    (sin_p, sin_y, sin_r), (cos_p, cos_y, cos_r) = jnp.sin(angles), jnp.cos(angles)
    zero, one = jnp.zeros_like(sin_p), jnp.ones_like(sin_p)
    pitch = jnp.array([[cos_p, zero, -sin_p], [zero, one, zero], [sin_p, zero, cos_p]])
    yaw = jnp.array([[one, zero, zero], [zero, cos_y, sin_y], [zero, -sin_y, cos_y]])
    roll = jnp.array([[cos_r, sin_r, zero], [-sin_r, cos_r, zero], [zero, zero, one]])
    flat = (points - center[None]) @ (roll @ yaw @ pitch).T
    shift = jnp.concatenate([jnp.broadcast_to(jnp.asarray(shift, grid.dtype), (2,)), zero[None]])
    return (scale * flat + (center + shift)[None]).reshape(grid.shape)


def quad_map(corners: jax.Array) -> jax.Array:
    """Projective map from the photo to the unit square, of one cell.

    The closed form of P. Heckbert, "Fundamentals of Texture Mapping and Image Warping", 1989,
    section 2.2.3, for the map of the square onto the quadrangle, inverted by its adjugate.

    Args:
        corners: `[2, 2, 2]`, the photo's (y, x) of the square's corners (v, u).

    Returns:
        `[3, 3]`: (x, y, 1) to a multiple of (u, v, 1), the last positive inside the cell.
    """
    y, x = corners[..., 0], corners[..., 1]
    sum_x = x[0, 0] - x[0, 1] + x[1, 1] - x[1, 0]
    sum_y = y[0, 0] - y[0, 1] + y[1, 1] - y[1, 0]
    dx1, dx2 = x[0, 1] - x[1, 1], x[1, 0] - x[1, 1]
    dy1, dy2 = y[0, 1] - y[1, 1], y[1, 0] - y[1, 1]
    area = dx1 * dy2 - dx2 * dy1
    area = jnp.where(jnp.abs(area) > _TINY, area, _TINY)
    g = (sum_x * dy2 - dx2 * sum_y) / area
    h = (dx1 * sum_y - sum_x * dy1) / area
    a, b, c = x[0, 1] - x[0, 0] + g * x[0, 1], x[1, 0] - x[0, 0] + h * x[1, 0], x[0, 0]
    d, e, f = y[0, 1] - y[0, 0] + g * y[0, 1], y[1, 0] - y[0, 0] + h * y[1, 0], y[0, 0]
    adjugate = jnp.array(
        [
            [e - f * h, c * h - b, b * f - c * e],
            [f * g - d, a - c * g, c * d - a * f],
            [d * h - e * g, b * g - a * h, a * e - b * d],
        ]
    )
    center = jnp.mean(corners.reshape(4, 2), axis=0)
    sign = jnp.sign(adjugate[2] @ jnp.array([center[1], center[0], 1.0]))
    return adjugate * jnp.where(sign == 0, 1.0, sign)


def paste(
    image: jax.Array,
    texture: jax.Array,
    grid: jax.Array,
    *,
    window: tuple[int, int] | None = None,
    origin: AnyArray | None = None,
) -> jax.Array:
    """Draws a texture onto an image.

    Args:
        image: `[H, W, C]` float.
        texture: `[h, w, C]` or `[h, w, 1]` float.
        grid: `[R + 1, C + 1, 2 or 3]` corners of its cells.
        window: rows and columns of the part that is drawn on, about the grid's middle; by default
            the whole image. The grid outside it is cut off.
        origin: `[2]` (y, x) of the image's first pixel in the grid's coordinates; default 0.

    Returns:
        `[H, W, C]`.
    """
    chex.assert_rank([image, texture, grid], 3)
    shape = image.shape[:2]
    rows, columns = shape if window is None else map(min, window, shape)
    corners = grid[..., :2] if origin is None else grid[..., :2] - origin.reshape(1, 1, 2)
    corners = jax.lax.stop_gradient(corners)
    flat = corners.reshape(-1, 2)
    middle = (jnp.min(flat, axis=0) + jnp.max(flat, axis=0)) / 2
    size = jnp.array((rows, columns))
    room = jnp.array(shape) - size
    low = jnp.clip(jnp.round(middle - (size - 1) / 2).astype(jnp.int32), 0, room)
    start = (low[0], low[1], 0)
    piece = jax.lax.dynamic_slice(image, start, (rows, columns, image.shape[2]))
    pixels = jnp.stack(jnp.meshgrid(jnp.arange(rows), jnp.arange(columns), indexing="ij"), axis=-1)
    places = (pixels.reshape(-1, 2) + low[None]).astype(jnp.float32)
    colors, opacity = _look_up(texture, corners, places)
    opacity = opacity.reshape(rows, columns, 1)
    piece = piece * (1 - opacity) + colors.reshape(rows, columns, -1) * opacity
    return jax.lax.dynamic_update_slice(image, piece.astype(image.dtype), start)


def _look_up(
    texture: jax.Array, corners: jax.Array, places: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Colors `[N, C]` of the texture at photo places `[N, 2]` (y, x), and opacities `[N]`."""
    rows, columns = corners.shape[0] - 1, corners.shape[1] - 1
    quads = jnp.stack(
        [
            jnp.stack([corners[:-1, :-1], corners[:-1, 1:]], axis=2),
            jnp.stack([corners[1:, :-1], corners[1:, 1:]], axis=2),
        ],
        axis=2,
    ).reshape(-1, 2, 2, 2)
    maps = jax.vmap(quad_map)(quads)
    ones = jnp.ones_like(places[:, :1])
    points = jnp.concatenate([places[:, 1:], places[:, :1], ones], axis=1)
    found = jnp.einsum("kij,nj->ikn", maps, points)
    weight = jnp.where(found[2] > _TINY, found[2], 1.0)
    beyond = jnp.maximum(jnp.abs(found[0] / weight - 0.5), jnp.abs(found[1] / weight - 0.5))
    # A cell reaches one pixel over its edges, no further: towards its horizon all is near.
    low, high = jnp.min(quads, axis=(1, 2)) - 1.0, jnp.max(quads, axis=(1, 2)) + 1.0
    is_near = jnp.all((places[None] > low[:, None]) & (places[None] < high[:, None]), axis=-1)
    is_near &= (found[2] > _TINY) & (beyond <= 0.5 + _px_in_cells(quads)[:, None])
    beyond = jnp.where(is_near & _is_front(maps, quads)[:, None], beyond, jnp.inf)
    cell = jnp.argmin(beyond, axis=0)
    is_drawn = jnp.isfinite(jnp.min(beyond, axis=0))
    own = maps[cell]
    across, down, weight = jnp.moveaxis(jnp.einsum("nij,nj->ni", own, points), 1, 0)
    weight = jnp.where(is_drawn, weight, 1.0)
    across, down = across / weight, down / weight
    # Cells that one photo pixel spans, from the map's derivative.
    slopes = own[:, :2, :2] - jnp.stack([across, down], 1)[:, :, None] * own[:, 2:, :2]
    spans = jnp.sum(jnp.abs(slopes), axis=-1) / weight[:, None]
    across, down = across + cell % columns, down + cell // columns
    height, width, _ = texture.shape
    by_row = _weights(down * height / rows, spans[:, 1] * height / rows, height)
    by_column = _weights(across * width / columns, spans[:, 0] * width / columns, width)
    colors = jnp.einsum("nh,hwc->nwc", by_row, texture)
    colors = jnp.sum(colors * by_column[:, :, None], axis=1)
    opacity = _coverage(down, spans[:, 1], rows) * _coverage(across, spans[:, 0], columns)
    return colors, jnp.where(is_drawn, opacity, 0.0)


def _is_front(maps: jax.Array, quads: jax.Array) -> jax.Array:
    """Which cells `[K]` are convex and seen from the front."""
    flat = quads.reshape(-1, 4, 2)[..., ::-1]
    flat = jnp.concatenate([flat, jnp.ones_like(flat[..., :1])], axis=-1)
    is_convex = jnp.min(jnp.einsum("kj,knj->kn", maps[:, 2], flat), axis=1) > _TINY
    # Twice the signed area by the diagonals: negative where a cell is seen from behind.
    down, up = quads[:, 1, 1] - quads[:, 0, 0], quads[:, 0, 1] - quads[:, 1, 0]
    return is_convex & (down[:, 0] * up[:, 1] - down[:, 1] * up[:, 0] > _TINY)


def _px_in_cells(quads: jax.Array) -> jax.Array:
    """Length `[K]` of a photo pixel in units of the cell's shorter middle line, at most a cell."""
    lines = jnp.stack(
        [
            jnp.mean(quads[:, 1] - quads[:, 0], axis=1),
            jnp.mean(quads[:, :, 1] - quads[:, :, 0], axis=1),
        ]
    )
    shorter = jnp.min(jnp.sqrt(jnp.sum(lines**2, axis=-1) + _TINY), axis=0)
    return 1.0 / jnp.maximum(shorter, 1.0)


def _weights(position: jax.Array, span: jax.Array, count: int) -> jax.Array:
    """Weights `[N, count]` of texels: a tent as wide as a photo pixel, or bilinear if that is less.

    position: `[N]` in texels, 0 = the texture's edge.
    """
    center = jnp.clip(position - 0.5, 0.0, count - 1.0)
    apart = jnp.abs(center[:, None] - jnp.arange(count, dtype=jnp.float32)[None])
    weights = jnp.maximum(1 - apart / jnp.maximum(span, 1.0)[:, None], 0.0)
    return weights / jnp.sum(weights, axis=1, keepdims=True)


def _coverage(position: jax.Array, span: jax.Array, count: int) -> jax.Array:
    """Share `[N]` of a photo pixel that lies between 0 and `count` cells, along one axis."""
    span = jnp.maximum(span, _TINY)
    inner = jnp.minimum(position, count - position) / span
    return jnp.clip(0.5 + inner, 0.0, 1.0)
