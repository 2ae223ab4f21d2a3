"""New weights for a plan that is open: TensorRT's refitter, in fractions of a second where a build takes minutes."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np

from tiue_cli.backends.cuda import device_errors
from tiue_cli.backends.trt_messages import cannot_start, collect_messages, import_tensorrt
from tiue_cli.backends.trt_plan import Plan
from tiue_cli.errors import DeviceError

_AGAIN = "build the engine again: tiue export FOLDER --trt --refit --overwrite"


def refit_plan(plan: Plan, names: Iterable[str], value: Callable[[str], np.ndarray]) -> None:
    """Give ``plan`` the weights ``names``, and with them what TensorRT has joined them with; ``value`` answers any.

    Nothing may run on the plan meanwhile; its contexts stay good, graphs that were captured before do not. Raises
    DeviceError, after which the plan may hold some of the new weights and some of the old.
    """
    trt = import_tensorrt()
    messages = collect_messages()
    messages.clear()
    with device_errors(f"refitting {plan.name}"):
        from polygraphy.backend.trt import get_trt_logger

        try:
            refitter = trt.Refitter(plan.engine, get_trt_logger())
        except TypeError as error:
            raise cannot_start(error, f"refit {plan.name}") from error
        given: dict[str, np.ndarray] = {}  # TensorRT reads them until the end
        waiting = list(names)
        while waiting:
            for name in waiting:
                given[name] = np.ascontiguousarray(value(name))
                if not refitter.set_named_weights(name, given[name]):
                    raise _failure(plan, f"it does not take the weight {name}")
            waiting = [name for name in refitter.get_missing_weights() if name not in given]
        if not refitter.refit_cuda_engine():
            raise _failure(plan, "it refuses the new weights")


def _failure(plan: Plan, what: str) -> DeviceError:
    reason = collect_messages().worst() or "TensorRT gives no reason"
    return DeviceError(f"{plan.name} cannot be refitted: {what}: {reason}", hint=_AGAIN)
