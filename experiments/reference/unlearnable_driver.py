"""Serves error-minimising noise and a victim's epoch in plain PyTorch; see README.md.

Huang et al. 2021 as a PyTorch user writes it for speed: eager, channels last, autocast to bfloat16
and cudnn's own choice of algorithms on a GPU, the data set on the device. The same net, batch,
steps and rounding as ours; a fresh net of random weights.
"""

import time

import numpy as np
import serving
import torch
from torch import nn
from torch.nn import functional


class Block(nn.Module):
    """A residual block of two 3 x 3 convolutions."""

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        """Makes the layers."""
        super().__init__()
        self.conv_0 = nn.Conv2d(channels_in, channels, 3, stride, 1, bias=False)
        self.norm_0 = nn.BatchNorm2d(channels)
        self.conv_1 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.norm_1 = nn.BatchNorm2d(channels)
        self.shortcut = nn.Sequential()
        if stride != 1 or channels_in != channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(channels_in, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)
            )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Features of features."""
        y = functional.relu(self.norm_0(self.conv_0(x)))
        return functional.relu(self.norm_1(self.conv_1(y)) + self.shortcut(x))


class ResNet(nn.Module):
    """A residual network with the CIFAR stem."""

    def __init__(self, num_blocks: list[int], width: int, num_classes: int) -> None:
        """Makes the layers."""
        super().__init__()
        layers = [nn.Conv2d(3, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
        channels = width
        for stage, count in enumerate(num_blocks):
            for block in range(count):
                stride = 2 if stage and not block else 1
                layers.append(Block(channels, width * 2**stage, stride))
                channels = width * 2**stage
        self.features = nn.Sequential(*layers)
        self.logits = nn.Linear(channels, num_classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Logits of images in [0, 1]."""
        return self.logits(self.features(images).mean(dim=(2, 3)))


def main() -> None:
    """Serves `noise` and `epoch`."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.backends.cudnn.benchmark = True

    def autocast():
        return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")

    def load(images: str, labels: str) -> tuple[torch.Tensor, torch.Tensor]:
        pixels = torch.from_numpy(np.load(images)).to(device).permute(0, 3, 1, 2)
        return pixels.contiguous(memory_format=torch.channels_last), torch.from_numpy(
            np.load(labels)
        ).long().to(device)

    def make(num_blocks: list[int], width: int, labels: torch.Tensor):
        net = ResNet(num_blocks, width, int(labels.max()) + 1).to(device)
        net = net.to(memory_format=torch.channels_last)
        return net, torch.optim.SGD(net.parameters(), 0.1, momentum=0.9, weight_decay=5e-4)

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()

    def descend(net, images, labels, noise, epsilon, step, num_steps):
        """Signed steps on the noise of a batch."""
        for _ in range(num_steps):
            shown = (images + noise).clamp(0, 1).detach().requires_grad_(True)
            with autocast():
                loss = functional.cross_entropy(net(shown), labels, reduction="sum")
            (gradient,) = torch.autograd.grad(loss, shown)
            noise = (shown.detach() - images - step * gradient.sign()).clamp(-epsilon, epsilon)
        return noise

    def noise(
        images: str,
        labels: str,
        num_blocks: list[int],
        width: int,
        batch: int,
        num_steps: int,
        rounds: int,
    ) -> dict:
        """Seconds of each pass of signed steps over the whole set, after one batch to warm up."""
        pixels, targets = load(images, labels)
        net, _ = make(num_blocks, width, targets)
        net.eval()
        for weight in net.parameters():
            weight.requires_grad_(False)
        found = torch.zeros_like(pixels, dtype=torch.float32)
        limit = {"epsilon": 8 / 255, "step": 0.8 / 255, "num_steps": num_steps}
        first = pixels[:batch].float() / 255
        descend(net, first, targets[:batch], found[:batch], **limit)
        seconds = []
        for _ in range(rounds):
            wait()
            start = time.perf_counter()
            for at in range(0, len(pixels), batch):
                part = slice(at, at + batch)
                shown = pixels[part].float() / 255
                found[part] = descend(net, shown, targets[part], found[part], **limit)
            wait()
            seconds.append(time.perf_counter() - start)
        return {"seconds": seconds, "device": device.type}

    def epoch(
        images: str, labels: str, num_blocks: list[int], width: int, batch: int, rounds: int
    ) -> dict:
        """Seconds of each epoch of training, after one step to warm up; without augmentation."""
        pixels, targets = load(images, labels)
        net, optimizer = make(num_blocks, width, targets)
        net.train()

        def step(rows):
            optimizer.zero_grad(set_to_none=True)
            with autocast():
                loss = functional.cross_entropy(net(pixels[rows].float() / 255), targets[rows])
            loss.backward()
            nn.utils.clip_grad_norm_(net.parameters(), 5.0)
            optimizer.step()

        step(torch.arange(batch, device=device))
        seconds = []
        for _ in range(rounds):
            wait()
            start = time.perf_counter()
            order = torch.randperm(len(pixels), device=device)
            for at in range(0, len(pixels) // batch * batch, batch):
                step(order[at : at + batch])
            wait()
            seconds.append(time.perf_counter() - start)
        return {"seconds": seconds, "device": device.type}

    serving.serve(serving.versions("torch", "numpy"), {"noise": noise, "epoch": epoch})


if __name__ == "__main__":
    main()
