"""Make FID's Inception-v3 an ONNX graph for `--extractor`, from a weights file, and check it against torch.

    pip install torch-fidelity torchvision
    python benchmarks/inception_to_onnx.py weights-inception-2015-12-05-6726825d.pth inception.onnx

The weights are the TensorFlow network's of 2015, converted by torch-fidelity (its releases page has the file). The file
is opened without running code from it. By default the graph takes 299x299, to which `tiue bench` resizes as clean-fid
does (bicubic, anti-aliased, unrounded); `--legacy-resize 256` makes a graph that takes 256x256 and resizes inside as
the TensorFlow graph did (bilinear, not anti-aliased), the way of older papers. Figures of the two differ: say which.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

LAYERS = """
    Conv2d_1a_3x3 Conv2d_2a_3x3 Conv2d_2b_3x3 MaxPool_1 Conv2d_3b_1x1 Conv2d_4a_3x3 MaxPool_2
    Mixed_5b Mixed_5c Mixed_5d Mixed_6a Mixed_6b Mixed_6c Mixed_6d Mixed_6e Mixed_7a Mixed_7b Mixed_7c AvgPool
"""


class Features(nn.Module):
    """Pooled features (N, 2048) of pixel values 0..255, (N, 3, 299, 299) float32 or (N, 3, side, side) uint8."""

    def __init__(self, network: nn.Module, *, resizes: bool) -> None:
        super().__init__()
        self.resizes = resizes
        self.layers = nn.Sequential(*(getattr(network, name) for name in LAYERS.split()))

    def forward(self, images: Tensor) -> Tensor:
        if self.resizes:
            from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x

            images = interpolate_bilinear_2d_like_tensorflow1x(images.float(), size=(299, 299), align_corners=False)
        return self.layers((images - 128) / 128).flatten(1)


def load(weights: Path) -> nn.Module:
    """torch-fidelity's network with the file's weights."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    # weights_only refuses a pickle that would run code; the library's own loading does not.
    is_pickle = weights.suffix != ".safetensors"
    state = torch.load(weights, weights_only=True) if is_pickle else load_file(weights)
    with tempfile.NamedTemporaryFile(suffix=".pth") as file:
        torch.save(state, file.name)
        return FeatureExtractorInceptionV3("inception", ["2048"], feature_extractor_weights_path=file.name).eval()


def export(module: Features, path: Path, *, side: int) -> float:
    """Write the graph; returns the largest difference from torch, relative to the largest feature."""
    random = np.random.Generator(np.random.Philox(key=0))
    images = torch.from_numpy(random.integers(0, 256, (2, 3, side, side), np.uint8))
    images = images if module.resizes else images.float()
    torch.onnx.export(
        module, (images,), path, input_names=["images"], output_names=["features"],
        dynamic_shapes=({0: torch.export.Dim("n")},), dynamo=True, external_data=False, verbose=False,
    )  # fmt: skip
    model = onnx.load(path)
    inside = "inside the graph to 299x299, bilinear as TensorFlow 1, not anti-aliased"
    notes = {"pixels": "0..255", **({"resize": inside} if module.resizes else {})}
    for key, value in notes.items():
        entry = model.metadata_props.add()
        entry.key, entry.value = key, value
    onnx.save(model, path)
    with torch.inference_mode():
        expected = module(images[:1]).numpy()
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    found = session.run(None, {"images": images[:1].numpy()})[0]
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("weights", type=Path)
    options.add_argument("out", type=Path)
    options.add_argument("--legacy-resize", type=int, metavar="SIDE", help="take SIDE x SIDE and resize inside")
    args = options.parse_args()
    legacy = args.legacy_resize is not None
    difference = export(Features(load(args.weights), resizes=legacy), args.out, side=args.legacy_resize or 299)
    print(f"{args.out}: largest difference from torch {difference:.1e} of the largest feature")
    if not difference < 1e-4:
        args.out.unlink()
        sys.exit("the graph does not compute what torch computes, and was removed")


if __name__ == "__main__":
    main()
