"""LoRAs on an engine: the weights that they change are worked out from the student, and the plans refitted with them.

use ─▶ the student's layers in main memory ─▶ those that changed, as each graph has them ─▶ refit its plan
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tiue_cli.backends.trt_refit import refit_plan
from tiue_cli.errors import AdapterError, DeviceError, UsageError, full_installation
from tiue_cli.files.engines import EngineManifest, PlanSpec
from tiue_cli.files.exports import ExportManifest
from tiue_cli.files.png import LoraUse, same_effect
from tiue_cli.model.weights import some_of

if TYPE_CHECKING:
    import numpy as np

    from tiue_cli.backends.trt_plan import Plan
    from tiue_cli.model.lora.exported import ExportedWeights, Touched


class EngineLoras:
    """The adapters of one open engine. The student is loaded when the first is asked for, and then kept."""

    def __init__(self, folder: Path, export: ExportManifest, engine: EngineManifest) -> None:
        """``folder`` is that of the export."""
        self._folder = folder
        self._export = export
        self._engine = engine
        self._uses: tuple[LoraUse, ...] = export.student.loras
        self._weights: ExportedWeights | None = None
        self._broken = False
        """Whether a refit failed half way: then the next one gives every weight anew."""

    def use(self, uses: Sequence[LoraUse], plans: Mapping[str, Plan]) -> bool:
        """Refit ``plans``, by their file names, to exactly these adapters; whether anything changed.

        Raises UsageError for an engine that was built for good, AdapterError for what does not fit the model (nothing
        has changed then), DeviceError.
        """
        if same_effect(uses, self._uses) and not self._broken:
            return False
        if not self._engine.takes_loras:
            raise UsageError(
                f"this engine of {self._folder} takes no LoRA: its weights were set when it was built",
                hint=f"build one that does: tiue export {self._folder} --trt --refit",
            )
        weights = self._loaded()
        changed = weights.use(uses)
        try:
            self._check_covered(changed)
        except AdapterError:
            weights.use(self._uses)
            raise
        all_anew, self._broken = self._broken, True
        for spec in self._engine.plans:
            if spec.plan.file in plans:
                self._refit(plans[spec.plan.file], spec, None if all_anew else changed)
        self._uses, self._broken = tuple(uses), False
        return True

    def catch_up(self, plan: Plan, spec: PlanSpec) -> None:
        """Bring a plan that was opened just now to the adapters that are in use. Raises DeviceError."""
        if self._weights is not None and self._weights.touched:
            self._refit(plan, spec, self._weights.touched)

    def _loaded(self) -> ExportedWeights:
        if self._weights is None:
            with full_installation("a LoRA on an engine"):
                from tiue_cli.model.lora.exported import ExportedWeights

            self._weights = ExportedWeights(self._folder, self._export)
        return self._weights

    def _check_covered(self, layers: Touched) -> None:
        """Raise AdapterError where an adapter changes what some plan has for good."""
        from tiue_cli.model.lora.exported import fixed_layers

        for spec in self._engine.plans:
            if fixed := fixed_layers(spec.refit, layers, graph=spec.graph):
                raise AdapterError(
                    f"the LoRA changes layers that are set for good in {spec.plan.file} of this engine:"
                    f" {some_of(fixed)}",
                    hint=f"build an engine with it: tiue export {self._export.student.source} --trt --lora …",
                )

    def _refit(self, plan: Plan, spec: PlanSpec, layers: Touched | None) -> None:
        """Refit what depends on ``layers``; None gives everything anew."""
        from tiue_cli.model.lora.exported import changed_weights

        by_name = {weight.name: weight for weight in spec.refit}
        graph = self._export.graph(spec.graph, size=spec.size)
        weights = self._loaded()

        def value(name: str) -> np.ndarray:
            if name not in by_name:
                raise DeviceError(
                    f"{plan.name} cannot be refitted: TensorRT has joined {name}, which no LoRA changes, with weights"
                    " that one does",
                    hint="build the engine with the LoRA: tiue export STUDENT --trt --lora …",
                )
            return weights.array(graph, by_name[name])

        names = list(by_name) if layers is None else changed_weights(spec.refit, layers, graph=spec.graph)
        if names:
            refit_plan(plan, names, value)
