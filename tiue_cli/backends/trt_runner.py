"""TensorRT plans, run one after the other on one CUDA stream: NumPy and Polygraphy's CUDA wrapper, no torch.

    PlanChain.run(inputs):  copy in ─▶ plan ─▶ plan ─▶ … ─▶ copy out

A tensor has one buffer, whichever plans name it: what one plan writes is where the next one reads, and nothing is
copied between them. From the second run of a shape on, all plans are one launch of a CUDA graph.

For TensorRT 10.8 to 11. ``benchmarks/trt86_check.py`` runs it with TensorRT 8.6 by putting the newer names over the
older ones, under the Python 3.9 that this version has: that, and nothing else, keeps this file, ``trt_plan``,
``trt_messages``, ``cuda`` and ``errors`` to what Python 3.9 reads.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from tiue_cli.backends.cuda import (
    Graph,
    PinnedArrays,
    allocate,
    copy_to_device,
    copy_to_host,
    device_errors,
    free_block,
)
from tiue_cli.backends.trt_messages import collect_messages
from tiue_cli.backends.trt_plan import (
    BUILD_FOR_RANGES,
    Plan,
    accepts,
    largest_shapes,
    memory_size,
    new_context,
    range_text,
    times,
)
from tiue_cli.errors import DeviceError, ProfileError


class PlanMemory:
    """What plans under one profile run in: a buffer a tensor at its largest, working memory, pinned host memory.

    Chains of one stream may share it, as they never run at the same time.
    """

    def __init__(self) -> None:
        self.buffers: dict[str, Any] = {}
        self.working: Any = None
        self.pinned = PinnedArrays()

    def allocate(self, working: int, sizes: Mapping[str, int]) -> None:
        """Take ``working`` bytes and a buffer of ``sizes[name]`` bytes a tensor. Raises Polygraphy's exception."""
        self.working = allocate(working)
        # Sorted by size: large blocks first fragment less.
        for name in sorted(sizes, key=lambda name: -sizes[name]):
            self.buffers[name] = allocate(sizes[name])

    def free(self) -> None:
        """Give everything back."""
        for block in (*self.buffers.values(), self.working):
            if block is not None:
                free_block(block)
        self.pinned.free()
        self.buffers, self.working = {}, None


class PlanChain:
    """Plans that follow each other, each under one of its profiles; used with ``with``.

    ``plain_runs``, ``captures`` and ``graph_runs`` count what happened. ``graph_problem`` says why runs stay plain
    where a CUDA graph could not be made.
    """

    def __init__(
        self,
        plans: Sequence[tuple[Plan, int]],
        stream: Any,
        *,
        graphs: bool = True,
        memory: PlanMemory | None = None,
    ) -> None:
        """``plans`` with the number of the profile to use in each; ``stream`` is one of ``open_stream``.

        ``memory`` is that of another chain of the same plans, profiles and stream, which must outlive this one; None
        makes its own. Chains that share it keep a shape and its graph each.
        """
        self.plain_runs = self.captures = self.graph_runs = 0
        self.graph_problem: str | None = None if graphs else "CUDA graphs are switched off"
        self._plans = list(plans)
        self._stream = stream
        self._contexts: list[Any] = []
        self._owns_memory = memory is None
        self.memory = PlanMemory() if memory is None else memory
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._graph: Graph | None = None
        self._ran_plain = False
        self._dtypes = _common_dtypes([plan for plan, _ in plans])
        self.inputs = _outer_inputs([plan for plan, _ in plans])
        """Names of the inputs that no plan of the chain makes: what ``run`` must be given."""

    def __enter__(self) -> PlanChain:
        try:
            with device_errors("preparing the engine"):
                self._prepare()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Give everything back but the stream, and memory that another chain lent."""
        self._forget_graph()
        self._contexts.clear()
        if self._owns_memory:
            self.memory.free()
        self._shapes = {}

    def run(self, inputs: Mapping[str, np.ndarray], outputs: Sequence[str]) -> dict[str, np.ndarray]:
        """Run all plans; returns the named tensors (of any plan) as arrays of their own.

        ``inputs`` are cast to the plans' types. Raises ProfileError for shapes outside the profile, DeviceError.
        """
        arrays = {name: np.ascontiguousarray(inputs[name], dtype=self._dtypes[name]) for name in self.inputs}
        with device_errors("running the engine"):
            shapes = {name: tuple(array.shape) for name, array in arrays.items()}
            if any(self._shapes.get(name) != shape for name, shape in shapes.items()):
                self._set_shapes(shapes)
            for name, array in arrays.items():
                self._copy_in(name, array)
            self._launch()
            pinned = {name: self._copy_out(name) for name in outputs}
            self._stream.synchronize()
        return {name: array.copy() for name, array in pinned.items()}

    def weights_changed(self) -> None:
        """Forget the CUDA graph: a plan was refitted. The next run of the shape is plain, the one after captured."""
        self._forget_graph()

    # --- once ---

    def _prepare(self) -> None:
        """Contexts, one buffer a tensor at its largest shape, and one block of working memory for all plans."""
        sizes: dict[str, int] = {}
        memory = 1
        for plan, profile in self._plans:
            context = new_context(plan, profile, self._stream)
            self._contexts.append(context)
            memory = max(memory, memory_size(plan, profile))
            for name, shape in largest_shapes(plan, context, profile).items():
                sizes[name] = max(sizes.get(name, 1), _nbytes(shape, self._dtypes[name]))
        self._stream.synchronize()
        if self._owns_memory:
            self.memory.allocate(memory, sizes)
        for (plan, _), context in _pairs(self._plans, self._contexts):
            context.set_device_memory(self.memory.working.ptr, self.memory.working.allocated_nbytes)
            for tensor in plan.tensors:
                if not context.set_tensor_address(tensor.name, self.memory.buffers[tensor.name].ptr):
                    raise DeviceError(f"{plan.name}: no address for tensor {tensor.name}", hint=BUILD_FOR_RANGES)

    # --- once a shape ---

    def _set_shapes(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Tell every plan its shapes, from the inputs on; what was captured for other shapes is void."""
        self._forget_graph()
        self._shapes = {}
        known = dict(shapes)
        for (plan, profile), context in _pairs(self._plans, self._contexts):
            for name in plan.names(inputs=True):
                if not accepts(plan, profile, name, known[name]) or not context.set_input_shape(name, known[name]):
                    raise ProfileError(
                        f"{plan.name}: {name} of shape {times(known[name])} is outside the engine's range"
                        f" {range_text(plan, profile, name)}",
                        hint=BUILD_FOR_RANGES,
                    )
            missing = context.infer_shapes()
            if missing:
                raise DeviceError(f"{plan.name}: no shape for {', '.join(missing)}", hint=BUILD_FOR_RANGES)
            for name in plan.names(inputs=False):
                known[name] = tuple(int(side) for side in context.get_tensor_shape(name))
                if _nbytes(known[name], self._dtypes[name]) > self.memory.buffers[name].allocated_nbytes:
                    raise ProfileError(
                        f"{plan.name}: {name} of shape {times(known[name])} has no room", hint=BUILD_FOR_RANGES
                    )
        self._shapes = known

    # --- once a run ---

    def _launch(self) -> None:
        if self._graph is None and self._ran_plain and self.graph_problem is None:
            self._capture()
        if self._graph is not None:
            self._graph.launch(self._stream.ptr)
            self.graph_runs += 1
            return
        self._enqueue()
        # TensorRT sets itself up in the first run of a shape, and that must not be part of a graph.
        self._ran_plain = True
        self.plain_runs += 1

    def _enqueue(self) -> None:
        for (plan, _), context in _pairs(self._plans, self._contexts):
            if not context.execute_async_v3(self._stream.ptr):
                reason = collect_messages().worst() or "TensorRT gives no reason"
                raise DeviceError(f"{plan.name} failed: {reason}", hint="see what is missing: tiue doctor")

    def _capture(self) -> None:
        try:
            self._graph = Graph.capture(self._stream.ptr, self._enqueue)
            self.captures += 1
        except DeviceError as error:
            self.graph_problem = error.message

    def _forget_graph(self) -> None:
        if self._graph is not None:
            self._graph.free()
        self._graph = None
        self._ran_plain = False

    def _copy_in(self, name: str, array: np.ndarray) -> None:
        # The last run was waited for, so nothing reads the pinned memory any more.
        pinned = self.memory.pinned.array(name, array.shape, array.dtype)
        pinned[...] = array
        copy_to_device(self.memory.buffers[name], pinned, self._stream)

    def _copy_out(self, name: str) -> np.ndarray:
        array = self.memory.pinned.array(f"{name}, out", self._shapes[name], self._dtypes[name])
        copy_to_host(array, self.memory.buffers[name], self._stream)
        return array


def _pairs(plans: Sequence[tuple[Plan, int]], contexts: Sequence[Any]) -> Iterator[tuple[tuple[Plan, int], Any]]:
    assert len(plans) == len(contexts), "the chain is used inside its with block"
    return zip(plans, contexts)  # noqa: B905 (strict= is not Python 3.9)


def _common_dtypes(plans: Sequence[Plan]) -> dict[str, Any]:
    """The type of each tensor; plans that share one must agree. Raises DeviceError."""
    dtypes: dict[str, Any] = {}
    for plan in plans:
        for tensor in plan.tensors:
            if dtypes.setdefault(tensor.name, tensor.dtype) != tensor.dtype:
                raise DeviceError(
                    f"{plan.name}: {tensor.name} is {tensor.dtype}, and {dtypes[tensor.name]} in the plan before",
                    hint="build the engine again, whole: tiue export FOLDER --trt",
                )
    return dtypes


def _outer_inputs(plans: Sequence[Plan]) -> tuple[str, ...]:
    made: set[str] = set()
    outer: list[str] = []
    for plan in plans:
        outer += [name for name in plan.names(inputs=True) if name not in made and name not in outer]
        made.update(plan.names(inputs=False))
    return tuple(outer)


def _nbytes(shape: Sequence[int], dtype: Any) -> int:
    return int(np.prod(shape, dtype=np.int64)) * int(np.dtype(dtype).itemsize)
