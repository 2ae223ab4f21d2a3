"""Turn a folder of reference images into a file of statistics for `tiue bench --reference`.

    python benchmarks/reference_statistics.py val2014 coco256.npz --extractor inception.onnx --resize 256

The file holds the features themselves, their mean and covariance, and by which extractor and resizing they were made;
`tiue bench` refuses it with another. Reading 40,000 images takes minutes, reading the file a second.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from tiue_cli.bench.quality.extractors import open_extractor
from tiue_cli.bench.quality.features import Resizing
from tiue_cli.bench.quality.references import folder_reference, write_statistics
from tiue_cli.errors import TiueError


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("folder", type=Path)
    options.add_argument("out", type=Path)
    options.add_argument("--extractor", type=Path, required=True, help="an .onnx file or a folder with a CLIP model")
    options.add_argument("--resize", type=int, help="side in pixels")
    options.add_argument("--filter", choices=("lanczos", "bicubic", "bilinear", "box"), default="lanczos")
    args = options.parse_args()
    extractor, resizing = open_extractor(args.extractor, papercut=False), Resizing(args.resize, args.filter)
    reference = folder_reference(
        args.folder,
        extractor=extractor,
        resizing=resizing,
        size=None,
        progress=lambda done, total: print(f"\r{done} of {total}", end="", file=sys.stderr),
    )
    print(
        f"\n{write_statistics(args.out, reference, extractor=extractor, resizing=resizing)}: {reference.images} images"
    )
    for note in reference.notes:
        print(note)


if __name__ == "__main__":
    try:
        main()
    except TiueError as error:
        sys.exit(f"{error.message}\n{error.hint or ''}")
