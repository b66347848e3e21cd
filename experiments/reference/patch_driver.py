"""Serves the patch attack's inner loop in plain PyTorch to the benchmark; see README.md.

Eager PyTorch and facenet-pytorch's P-Net, written as its users write it: a loop over photos and
pyramid levels, `grid_sample` for the patches, `interpolate(mode="area")` for the levels.
"""

import time

import numpy as np
import serving
import torch
from facenet_pytorch.models.mtcnn import PNet
from torch.nn import functional

_STEP, _MOMENTUM, _MARGIN, _NOISE = 60 / 255, 0.9, 0.3, 0.02


def main() -> None:
    """Serves `train`."""
    net = PNet().eval()
    for weight in net.parameters():
        weight.requires_grad_(False)

    def train(
        photos: str, coordinates: str, levels: list[list[list[int]]], patch: list[int], epochs: int
    ) -> dict:
        """Seconds of some epochs, after one that does not count, and the last loss.

        Args:
            photos: `.npy` of `[B, H, W, 3]` uint8.
            coordinates: `.npy` of `[B, P, H, W, 2]` float32: for every patch, where in it a photo's
                pixel looks, (x, y) in [-1, 1], beyond that where there is no patch.
            levels: rows and columns of the levels of each photo.
            patch: number of patches, rows, columns.
            epochs: how many are timed.
        """
        scenes = torch.from_numpy(np.load(photos)).permute(0, 3, 1, 2).float() / 255
        grids = torch.from_numpy(np.load(coordinates))
        covers = [(grid.abs().amax(-1) <= 1)[:, None].float() for grid in grids]
        values = torch.full((patch[0], 1, *patch[1:]), 0.5, requires_grad=True)
        moment = torch.zeros_like(values)
        loss, start = None, 0.0
        for epoch in range(epochs + 1):
            if epoch == 1:
                start = time.perf_counter()
            total = 0.0
            for scene, grid, cover, sizes in zip(scenes, grids, covers, levels, strict=True):
                picture = scene[None]
                drawn = functional.grid_sample(values, grid, align_corners=False)
                for number in range(len(values)):
                    mask = cover[number][None]
                    picture = picture * (1 - mask) + drawn[number][None] * mask
                picture = (picture + _NOISE * torch.randn_like(picture)).clamp(0, 1)
                for size in sizes:
                    level = functional.interpolate(picture, size=tuple(size), mode="area")
                    scores = _face_scores(net, (255 * level - 127.5) * 0.0078125)
                    total = total + ((scores - _MARGIN).clamp(min=0) ** 2).sum()
            loss = total / len(scenes)
            (gradient,) = torch.autograd.grad(loss, values)
            with torch.no_grad():
                norm = gradient.abs().sum(dim=(1, 2, 3), keepdim=True).clamp(min=1e-12)
                moment = _MOMENTUM * moment + gradient / norm
                values -= _STEP * moment.sign()
                values.clamp_(0, 1)
        return {"seconds": time.perf_counter() - start, "loss": float(loss.detach())}

    serving.serve(serving.versions("torch", "facenet-pytorch", "numpy"), {"train": train})


def _face_scores(net: PNet, pixels: torch.Tensor) -> torch.Tensor:
    """Face probability of every cell; the net's own `forward` leaves the graph in some versions."""
    features = net.pool1(net.prelu1(net.conv1(pixels)))
    features = net.prelu3(net.conv3(net.prelu2(net.conv2(features))))
    return net.softmax4_1(net.conv4_1(features))[:, 1]


if __name__ == "__main__":
    main()
