"""A vision transformer for faces in Flax, and the reader of its weights in torch and ONNX files.

You, Wang and others: "LVFace: Progressive Cluster Optimization for Large Vision Models in Face
Recognition", ICCV 2025, with the layout of InsightFace's `arcface_torch` (`vit.py`; An, Deng and
others: "Killing Two Birds with One Stone: Efficient and Robust Training of Face Recognition CNNs by
Partial FC", CVPR 2022): patches of 9 x 9, no class token, and all tokens into one matrix at the
end. Chips are RGB scaled by (x - 127.5) / 127.5 from 0..255.
"""

import os
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from afr_jax.models import norm
from afr_jax.models.weights import conversion, formats, onnx_files, torch_files

INPUT_SIZE = 112
EMBEDDING_SIZE = 512
_PATCH = 9
# Of torch's LayerNorm, and of the head's BatchNorms.
_EPSILON, _HEAD_EPSILON = 1e-5, 2e-5
_MOMENTUM = 0.9
_MLP_RATIO = 4
# Names of a state dict, not those that an export makes up.
_PLACE = re.compile(r"(patch_embed|pos_embed|blocks|norm|feature|mask_token)[\w.]*")


class FaceTransformer(nn.Module):
    """Chips `[B, 112, 112, 3]`, RGB in [-1, 1], to embeddings `[B, 512]`, float32.

    The embeddings are not of unit length. The last four rows and columns of a chip are not looked
    at: 12 x 12 patches are 108 pixels wide.

    Attributes:
        width: of a token.
        depth: number of blocks.
        num_heads: of the attention.
        embedding_size: D.
        dtype: of the computation; parameters and embeddings stay float32.
    """

    width: int = 512
    depth: int = 24
    num_heads: int = 8
    embedding_size: int = EMBEDDING_SIZE
    dtype: jax.typing.DTypeLike | None = None

    @nn.compact
    def __call__(self, chips: jax.Array, *, train: bool = False) -> jax.Array:
        """Embeddings; `train` normalizes the head by the batch and updates `batch_stats`."""
        size = (_PATCH, _PATCH)
        x = nn.Conv(
            self.width, size, size, padding="VALID", dtype=self.dtype, name="patch_embed_proj"
        )(chips)
        x = x.reshape(x.shape[0], -1, self.width)
        place = self.param("pos_embed", nn.initializers.normal(0.02), x.shape[1:])
        x = x + place[None].astype(x.dtype)
        for number in range(self.depth):
            x = _Block(self.num_heads, self.dtype, name=f"blocks_{number}")(x)
        x = nn.LayerNorm(epsilon=_EPSILON, dtype=self.dtype, name="norm")(x)
        x = x.reshape(x.shape[0], -1).astype(jnp.float32)
        for number, features in ((0, self.width), (2, self.embedding_size)):
            x = nn.Dense(features, use_bias=False, name=f"feature_{number}")(x)
            x = norm.BatchNorm(
                not train,
                epsilon=_HEAD_EPSILON,
                momentum=_MOMENTUM,
                name=f"feature_{number + 1}",
            )(x)
        return x


class _Block(nn.Module):
    """Attention, then two matrices with ReLU6 between; each behind a LayerNorm, each residual."""

    num_heads: int
    dtype: jax.typing.DTypeLike | None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        width = x.shape[-1]
        y = nn.LayerNorm(epsilon=_EPSILON, dtype=self.dtype, name="norm1")(x)
        qkv = nn.Dense(3 * width, use_bias=False, dtype=self.dtype, name="attn_qkv")(y)
        query, key, value = jnp.moveaxis(
            qkv.reshape(*x.shape[:2], 3, self.num_heads, width // self.num_heads), 2, 0
        )
        weights = jnp.einsum("bqhd,bkhd->bhqk", query, key) * (width // self.num_heads) ** -0.5
        # The softmax stays in full precision, as in the original.
        weights = nn.softmax(weights.astype(jnp.float32)).astype(value.dtype)
        y = jnp.einsum("bhqk,bkhd->bqhd", weights, value).reshape(x.shape)
        x = x + nn.Dense(width, dtype=self.dtype, name="attn_proj")(y)
        y = nn.LayerNorm(epsilon=_EPSILON, dtype=self.dtype, name="norm2")(x)
        y = nn.relu6(nn.Dense(_MLP_RATIO * width, dtype=self.dtype, name="mlp_fc1")(y))
        return x + nn.Dense(width, dtype=self.dtype, name="mlp_fc2")(y)


def read_weights(
    path: str | os.PathLike[str], *, module: FaceTransformer | None = None
) -> conversion.Variables:
    """Reads the variables of a `FaceTransformer`.

    Args:
        path: a torch state dict (`.pt`, `.pth`, `.safetensors`) with InsightFace's names, or what
            torch exported from one to ONNX.
        module: the network that the file is for; default: LVFace-B.

    Returns:
        `{"params": ..., "batch_stats": ...}`, float32.

    Raises:
        ValueError: the file is damaged or does not hold this network.
    """
    module = module or FaceTransformer()
    kind = formats.kind_of(path)
    if kind == "onnx":
        arrays = _exported(path, module.depth)
    elif kind in ("torch", "safetensors"):
        arrays = torch_files.without_prefix(formats.read_arrays(path)[1], "model.")
    else:
        raise ValueError(
            f"{path} is no torch state dict and no ONNX file, the only forms of this that are read"
        )

    def entry(leaf: tuple[str, ...], shape: tuple[int, ...]) -> conversion.Entry:
        *scopes, name = leaf[1:]
        if name == "pos_embed":
            return conversion.Entry(name, (1, *shape), lambda array: array[0])
        scope = ".".join(scopes).replace("_", ".").replace("patch.embed", "patch_embed")
        return conversion.torch_entry(scope, name, shape)

    # Of training alone.
    unused = "mask_token"
    return conversion.fill(
        path,
        conversion.shapes(module, INPUT_SIZE),
        arrays,
        entry,
        ignore_fn=lambda name: name == unused or conversion.is_torch_counter(name),
    )


def _exported(path: str | os.PathLike[str], depth: int) -> dict[str, np.ndarray]:
    """The arrays of what torch exported to ONNX, under the names of the state dict.

    An export keeps all names but those of matrices, which it turns over. Such a matrix is named
    here after the bias that is added behind it; those without one are, in the order of the graph,
    queries, keys and values of each block, and the two of the head.
    """
    graph = onnx_files.read_graph(path)
    # What a node makes -> the bias that another one adds to it.
    biases = {
        value: name
        for node in graph.nodes
        if node.operator == "Add"
        for name in node.inputs
        for value in node.inputs
        if name in graph.arrays and name.endswith(".bias") and value != name
    }
    nameless = [f"blocks.{number}.attn.qkv" for number in range(depth)]
    nameless += ["feature.0", "feature.2"]
    found = {name: array for name, array in graph.arrays.items() if _PLACE.fullmatch(name)}
    products = [node for node in graph.nodes if node.operator in ("MatMul", "Gemm")]
    num_nameless = 0
    for node in products:
        matrix = graph.arrays.get(node.inputs[1]) if len(node.inputs) > 1 else None
        if matrix is None or matrix.ndim != 2 or not node.outputs:
            continue
        bias = node.inputs[2] if len(node.inputs) > 2 else biases.get(node.outputs[0])
        if bias is None:
            scope = nameless[num_nameless] if num_nameless < len(nameless) else node.inputs[1]
            num_nameless += 1
        else:
            scope = bias.removesuffix(".bias")
        found[f"{scope}.weight"] = matrix if node.settings.get("transB") else matrix.T
    return found
