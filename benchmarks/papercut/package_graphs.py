"""Give the packaged student its graphs, over the weights that lie in the package: the last step after a new model.

    python benchmarks/papercut/package_graphs.py

Writes `manifest.json`, `tokenizer.json` and four `.onnx` files of kilobytes into `tiue_cli/papercut/model/`. The same
student gives the same graphs, and a test fails while they are those of another one.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import onnx

from tiue_cli.export.config import ExportConfig
from tiue_cli.export.onnx.export import export_student
from tiue_cli.export.onnx.shared_weights import share_weights, stored_tensors
from tiue_cli.export.onnx.trace import file_spec
from tiue_cli.files.exports import EXPORT_MANIFEST, TOKENIZER, ExportManifest, FileSpec, GraphSpec
from tiue_cli.files.external_data import external_files
from tiue_cli.files.manifests import write_json
from tiue_cli.model.hub import EMBEDDED
from tiue_cli.model.parts import PACKAGED, STUDENT, part_folder
from tiue_cli.model.weights import WEIGHT_STEMS, weight_files


def package_graphs(export: Path, manifest: ExportManifest, *, package: Path = PACKAGED) -> ExportManifest:
    """Write the graphs of ``export`` into ``package``, their weights in its safetensors; returns their manifest."""
    locations = {
        f"{part}{number}": file.relative_to(package).as_posix()
        for part in WEIGHT_STEMS
        for number, file in enumerate(weight_files(part_folder(package / STUDENT, part), name=part).files)
    }
    tensors = stored_tensors(package, locations)
    graphs = []
    for graph in manifest.graphs:
        model = onnx.load(export / graph.onnx.file)
        share_weights(model, tensors)
        path = package / graph.onnx.file
        path.write_bytes(model.SerializeToString(deterministic=True))
        graphs.append(_spec(graph, path, package))
    (package / TOKENIZER).write_bytes((export / TOKENIZER).read_bytes())
    made = manifest.model_copy(update={"graphs": tuple(graphs)})
    write_json(package / EXPORT_MANIFEST, made)
    return made


def _spec(graph: GraphSpec, path: Path, package: Path) -> GraphSpec:
    data = []
    for name in sorted(external_files(path.read_bytes())):
        spec = file_spec(package / name)
        data.append(FileSpec(file=name, sha256=spec.sha256, size_bytes=spec.size_bytes))
    return graph.model_copy(update={"onnx": file_spec(path), "data": tuple(data)})


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = export_student(ExportConfig(student=EMBEDDED, out=Path(folder) / EMBEDDED))
        made = package_graphs(result.folder, result.manifest)
    for graph in made.graphs:
        print(
            f"{graph.onnx.file}  {graph.onnx.size_bytes / 1e3:.0f} kB, weights in {[spec.file for spec in graph.data]}"
        )
    assert made.parity is not None
    print(f"images: {made.parity.image_psnr_db:.1f} dB against torch")


if __name__ == "__main__":
    main()
