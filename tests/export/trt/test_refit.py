"""Weights of a graph are known for the layers they are, in the forms that tracing leaves; what is unclear is fixed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from lora_files import draw_factors, write_lora
from tiny_export import write_tiny_export
from torch import nn

from tiue_cli.errors import AdapterError, UsageError
from tiue_cli.export.trt.refit import refit_weights
from tiue_cli.files.engines import RefitWeight
from tiue_cli.files.exports import ExportManifest, GraphName, GraphSpec
from tiue_cli.model.components import Components, load_components
from tiue_cli.model.identity import model_sha256
from tiue_cli.model.lora.exported import ExportedWeights, changed_weights, fixed_layers
from tiue_cli.model.lora.files import lora_use


@pytest.fixture(scope="module")
def parts(tiny_student_folder: Path) -> Components:
    return load_components(tiny_student_folder)


@pytest.fixture(scope="module")
def manifest(tiny_student_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> ExportManifest:
    made = write_tiny_export(tmp_path_factory.mktemp("export"), precision="fp32")
    source = {"source": str(tiny_student_folder), "sha256": model_sha256(tiny_student_folder)}
    return made.model_copy(update={"student": made.student.model_copy(update=source), "encoder_timestep": 751})


@pytest.fixture
def student(manifest: ExportManifest) -> ExportedWeights:
    return ExportedWeights(Path("export"), manifest)


def graph_of(manifest: ExportManifest, name: GraphName, *, precision: str = "fp32") -> GraphSpec:
    return manifest.graph(name).model_copy(update={"precision": precision})


def traced(parts: Components, graph: GraphName, *, dtype: str = "float32") -> dict[str, np.ndarray]:
    """The layers of a graph as an export has them, by the layer's name: linear ones turned, wide convolutions cut."""
    module: nn.Module = parts.text_encoder if graph == "text_encoder" else parts.unet
    found: dict[str, np.ndarray] = {}
    for name, layer in module.named_modules():
        in_decoder = name.startswith(("up_blocks.", "conv_out", "time_embedding."))
        if not isinstance(layer, nn.Linear | nn.Conv2d) or (graph == "unet_decoder") != in_decoder:
            continue
        weight = layer.weight.detach().numpy().astype(dtype)
        if graph == "unet_encoder" and name.endswith("time_emb_proj"):
            found[name] = _time_constant(parts, name).astype(dtype)[:, :, None, None]
        elif weight.ndim == 2:
            found[name] = weight.T
        elif graph == "unet_decoder" and name.endswith("conv_shortcut"):
            found[f"{name} hidden"], found[f"{name} skip"] = weight[:, :20], weight[:, 20:]
        else:
            found[name] = weight
    return found


def _time_constant(parts: Components, name: str) -> np.ndarray:
    """W · silu(embedding) + b at timestep 751, written out."""
    unet = parts.unet
    layer = unet.get_submodule(name)
    with torch.no_grad():
        embedding = unet.time_embedding(unet.time_proj(torch.tensor([751])))
        return (torch.nn.functional.silu(embedding) @ layer.weight.T + layer.bias).numpy()


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("graph", ["text_encoder", "unet_encoder", "unet_decoder"])
def test_every_layer_is_found_and_given_back_as_the_graph_has_it(
    graph: GraphName, precision: str, parts: Components, manifest: ExportManifest, student: ExportedWeights
) -> None:
    weights = traced(parts, graph, dtype="float16" if precision == "fp16" else "float32")
    weights |= {"a bias of ones": np.ones((1, 8), np.float32), "another": np.zeros((3, 3), np.float32)}
    spec = graph_of(manifest, graph, precision=precision)
    found, fixed = refit_weights(spec, weights, student)
    assert fixed == ()
    assert {weight.name for weight in found} == weights.keys() - {"a bias of ones", "another"}
    for weight in found:
        assert weight.name.startswith(weight.layer) or graph == "text_encoder"
        array = student.array(spec, weight)
        assert array.dtype == weights[weight.name].dtype
        if weight.form == "time":
            np.testing.assert_allclose(array.ravel(), weights[weight.name].ravel(), rtol=2e-3, atol=1e-6)
        else:
            np.testing.assert_array_equal(array, weights[weight.name])


def test_what_is_missing_or_not_to_be_told_apart_stays_fixed(
    parts: Components, manifest: ExportManifest, student: ExportedWeights
) -> None:
    weights = traced(parts, "unet_decoder")
    shortcut = next(name for name in weights if name.endswith(" skip"))
    del weights[shortcut]
    twin = next(name for name in weights if name.endswith("attn1.to_q"))
    other = twin.replace("to_q", "to_k")
    with torch.no_grad():
        for layer in (twin, other):
            student._modules["unet"].get_submodule(layer).weight.zero_()
    weights[twin] = weights[other] = np.zeros_like(weights[twin])
    found, fixed = refit_weights(graph_of(manifest, "unet_decoder"), weights, student)
    assert set(fixed) == {twin, other, shortcut.removesuffix(" skip")}
    assert not {weight.layer for weight in found} & set(fixed)


def test_a_time_projection_that_is_not_found_fixes_all_that_the_time_embedding_changes(
    parts: Components, manifest: ExportManifest, student: ExportedWeights
) -> None:
    weights = traced(parts, "unet_encoder")
    gone = next(name for name in weights if name.endswith("time_emb_proj"))
    del weights[gone]
    found, fixed = refit_weights(graph_of(manifest, "unet_encoder"), weights, student)
    assert gone in fixed and not any(weight.form == "time" for weight in found)
    embedding = frozenset({("unet", "time_embedding.linear_1")})
    assert fixed_layers(found, embedding, graph="unet_encoder") == ["time_embedding.linear_1"]


def test_an_adapter_changes_its_own_weights_and_taken_off_none(
    tmp_path: Path, parts: Components, manifest: ExportManifest, student: ExportedWeights
) -> None:
    spec = graph_of(manifest, "unet_encoder")
    weights = traced(parts, "unet_encoder")
    found, _ = refit_weights(spec, weights, student)
    before = {weight.name: student.array(spec, weight) for weight in found}

    def changes(*ends: str) -> set[str]:
        factors = draw_factors(parts.unet, ends=ends)
        use = lora_use(str(write_lora(tmp_path / f"{len(ends)}.safetensors", factors)))
        touched = student.use([use])
        names = set(changed_weights(found, touched, graph="unet_encoder"))
        differing = {weight.name for weight in found if _differs(student, spec, weight, before[weight.name])}
        assert names == differing, "what is refitted is what changed"
        return names

    assert all(name.endswith("to_q") for name in changes("to_q"))
    # Back to one layer: those of the adapter before are named as well, for they must be put back.
    touched = student.use([])
    assert touched and student.use([]) == frozenset()
    times = {weight.name for weight in found if weight.form == "time"}
    assert changes("linear_1", "conv_in") == times | {"conv_in"}
    student.use([])
    for weight in found:
        assert not _differs(student, spec, weight, before[weight.name])


def _differs(student: ExportedWeights, spec: GraphSpec, weight: RefitWeight, before: np.ndarray) -> bool:
    return not np.array_equal(student.array(spec, weight), before)


def test_the_student_must_be_the_one_that_was_exported_and_bare(manifest: ExportManifest, tmp_path: Path) -> None:
    def with_source(**fields: object) -> ExportManifest:
        return manifest.model_copy(update={"student": manifest.student.model_copy(update=fields)})

    with pytest.raises(AdapterError, match="another model than the one recorded"):
        ExportedWeights(tmp_path, with_source(sha256="0" * 64))
    with pytest.raises(AdapterError, match="runs/gone cannot be used"):
        ExportedWeights(tmp_path, with_source(source="runs/gone"))
    use = {"source": "ink.safetensors", "weight": 1.0, "sha256": "0" * 64}
    fused = ExportManifest.model_validate(
        manifest.model_dump() | {"student": manifest.student.model_dump() | {"loras": [use]}}
    )
    with pytest.raises(UsageError, match="has LoRAs in its weights already"):
        ExportedWeights(tmp_path, fused)
