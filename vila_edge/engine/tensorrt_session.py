"""TensorRT engines ready to run: deserialised, their bindings checked, and execution contexts on memory of ours."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from types import ModuleType
from typing import Any

from vila_edge.bindings import Binding, GraphBindings
from vila_edge.engine.cuda.device import Device, Stream
from vila_edge.engine.tensorrt_options import runtime_of, version_tuple
from vila_edge.errors import BackendError

_DTYPES = {"FLOAT": "float32", "HALF": "float16", "INT32": "int32", "INT64": "int64"}  # TensorRT's name -> ours
_BUILD_AGAIN = "build it again on this machine: vila-edge build BUNDLE --force"


class TensorrtRuntime:
    """TensorRT on one device, and what it said last of errors."""

    def __init__(self, trt: ModuleType, device: Device) -> None:
        self.trt, self.device = trt, device
        self.errors: deque[str] = deque(maxlen=3)
        self._logger = _logger(trt, self.errors)
        try:
            with device.current():
                self._runtime = trt.Runtime(self._logger)
        except (RuntimeError, TypeError) as error:  # TypeError: pybind found a null pointer
            self.errors.append(str(error))
            raise BackendError(self.explain(f"{self.version} does not start on {device.name}")) from None

    @property
    def version(self) -> str:
        """`tensorrt 10.16`."""
        return f"{runtime_of(self.trt)} {'.'.join(map(str, version_tuple(self.trt)[:2]))}"

    def load(self, plan: bytes, component: str, expected: GraphBindings, limits: Mapping[str, int]) -> LoadedEngine:
        """An engine from its serialised form. `limits`: of a varying dimension, what each profile must reach at most.

        Raises BackendError if it does not load, or has other bindings or limits than expected.
        """
        with self.device.current():
            self.errors.clear()
            engine = self._runtime.deserialize_cuda_engine(plan)
            free, total = self.device.memory()
        if engine is None:
            raise BackendError(
                self.explain(
                    f"{self.version} cannot load the engine of {component} ({len(plan):,} bytes; "
                    f"the GPU has {free:,} of {total:,} free)"
                ),
                f"end other programs that use the GPU, or {_BUILD_AGAIN}",
            )
        loaded = LoadedEngine(self, engine, component)
        loaded.check(expected, limits)
        return loaded

    def explain(self, message: str) -> str:
        """A message with TensorRT's own behind it."""
        reasons = "; ".join(self.errors)
        self.errors.clear()
        return f"{message}: {reasons}" if reasons else message

    def close(self) -> None:
        with self.device.current():
            self._runtime = None


class LoadedEngine:
    """One engine on the device."""

    def __init__(self, runtime: TensorrtRuntime, engine: Any, component: str) -> None:
        self.runtime, self.engine, self.component = runtime, engine, component
        self._contexts = _Contexts(runtime.trt, engine)

    @property
    def scratch_bytes(self) -> int:
        """Memory that a context needs while it runs. Contexts that do not run at once can share it."""
        return int(self.engine.device_memory_size_v2)

    def session(self, profile: int, stream: Stream, scratch: int, always_alike: bool = False) -> Session:
        """A context for a profile, with `scratch` as its memory while it runs. Raises BackendError.

        `always_alike`: its shapes are few, so that waiting for kernels that fit them is worth it.
        """
        with self.runtime.device.current():
            context = self._contexts.make(always_alike)
            if context is None or not (profile == 0 or context.set_optimization_profile_async(profile, stream.handle)):
                raise BackendError(self.runtime.explain(f"no context for profile {profile} of {self.component}"))
            if self.scratch_bytes:
                context.set_device_memory(scratch, self.scratch_bytes)
        return Session(self, context, stream)

    def check(self, expected: GraphBindings, limits: Mapping[str, int]) -> None:
        """Raises BackendError that names the first tensor that is not as expected."""
        engine = self.engine
        found = {engine.get_tensor_name(index) for index in range(engine.num_io_tensors)}
        tensors = [("INPUT", binding) for binding in expected.inputs]
        tensors += [("OUTPUT", binding) for binding in expected.outputs]
        names = {binding.name for _, binding in tensors}
        for what, difference in (("has no", names - found), ("has an unknown", found - names)):
            if difference:
                raise self._wrong(f"{what} tensor {min(difference)!r}")
        for mode, binding in tensors:
            self._check_tensor(mode, binding)
        for mode, binding in tensors:
            for axis, dimension in enumerate(binding.shape):
                if mode == "INPUT" and dimension in limits:
                    self._check_limit(binding.name, axis, limits[str(dimension)])

    def _check_tensor(self, mode: str, binding: Binding) -> None:
        engine, name = self.engine, binding.name
        dtype, shape = engine.get_tensor_dtype(name).name, tuple(engine.get_tensor_shape(name))
        wanted_shape = tuple(-1 if isinstance(dimension, str) else dimension for dimension in binding.shape)
        if mode == "OUTPUT" and len(shape) == len(wanted_shape):  # TensorRT may not know before it runs
            shape = tuple(w if size == -1 else size for size, w in zip(shape, wanted_shape, strict=True))
        for what, found, wanted in (
            ("is of mode", engine.get_tensor_mode(name).name, mode),
            ("has type", _DTYPES.get(dtype, dtype), binding.dtype),
            ("has shape", shape, wanted_shape),
            ("lies in memory of", engine.get_tensor_location(name).name, "DEVICE"),
        ):
            if found != wanted:
                raise self._wrong(f"tensor {name!r} {what} {found}, expected {wanted}")

    def _check_limit(self, name: str, axis: int, wanted: int) -> None:
        """The first profile takes the largest shapes."""
        _, _, largest = self.engine.get_tensor_profile_shape(name, 0)
        if tuple(largest)[axis] < wanted:
            raise self._wrong(f"tensor {name!r} is at most {tuple(largest)}, expected {wanted} in axis {axis}")

    def _wrong(self, what: str) -> BackendError:
        return BackendError(f"the engine of {self.component} {what}", _BUILD_AGAIN)

    def close(self) -> None:
        with self.runtime.device.current():
            self._contexts.close()
            self.engine = None


class Session:
    """One execution context with its shapes and addresses, which it keeps from call to call."""

    def __init__(self, engine: LoadedEngine, context: Any, stream: Stream) -> None:
        self._engine, self._context, self._stream = engine, context, stream
        self._bound: dict[str, tuple[int, tuple[int, ...] | None]] = {}

    def bind(self, name: str, address: int, shape: tuple[int, ...] | None = None) -> None:
        """Where a tensor lies, and, of an input that varies, how large it is. Raises BackendError."""
        before = self._bound.get(name, (None, None))
        if shape is not None and shape != before[1] and not self._context.set_input_shape(name, shape):
            raise self._failed(f"does not take {name!r} of shape {shape}")
        if address != before[0] and not self._context.set_tensor_address(name, address):
            raise self._failed(f"does not take {name!r} at address {address:#x}")
        self._bound[name] = (address, shape)

    def run(self) -> None:
        """Put one run on the stream. Raises BackendError with TensorRT's reason."""
        if not self._context.execute_async_v3(self._stream.handle):
            raise self._failed("does not run")

    def can_be_captured(self) -> bool:
        """Whether TensorRT would run in a capture as it is bound now. TensorRT-RTX says so, the other is tried."""
        ask = getattr(self._context, "is_stream_capturable", None)
        return ask is None or bool(ask(self._stream.handle))

    def _failed(self, what: str) -> BackendError:
        return BackendError(self._engine.runtime.explain(f"the engine of {self._engine.component} {what}"))

    def close(self) -> None:
        with self._engine.runtime.device.current():
            self._context = None


def _logger(trt: ModuleType, errors: deque[str]) -> Any:
    severe = (trt.ILogger.Severity.INTERNAL_ERROR, trt.ILogger.Severity.ERROR)

    def log(logger: Any, severity: Any, message: str) -> None:
        if severity in severe:
            errors.append(message.strip())

    # Its base is known only now; and TensorRT wants the base's __init__, which `type` leaves as it is.
    return type("Messages", (trt.ILogger,), {"log": log})()


class _Contexts:
    """How execution contexts are made: on scratch memory of ours."""

    def __init__(self, trt: ModuleType, engine: Any) -> None:
        self._trt, self._engine = trt, engine
        self._configs: dict[bool, Any] = {}
        if runtime_of(trt) == "tensorrt_rtx":
            self._configs = self._rtx_configs()

    def make(self, always_alike: bool) -> Any:
        ours = self._trt.ExecutionContextAllocationStrategy.USER_MANAGED
        return self._engine.create_execution_context(self._configs.get(always_alike, ours))

    def _rtx_configs(self) -> dict[bool, Any]:
        """TensorRT-RTX compiles kernels when it runs, for any shape first and for the one at hand in the background.

        Contexts share what is compiled. Decode waits for the better kernels, because a captured graph keeps what it
        has; prefill must not, whose shapes are new with every prompt.
        """
        strategies = self._trt.DynamicShapesKernelSpecializationStrategy
        configs, compiled = {}, None
        for always_alike, strategy in ((False, strategies.LAZY), (True, strategies.EAGER)):
            config = configs[always_alike] = self._engine.create_runtime_config()
            compiled = compiled or config.create_runtime_cache()
            config.set_runtime_cache(compiled)
            config.set_execution_context_allocation_strategy(self._trt.ExecutionContextAllocationStrategy.USER_MANAGED)
            config.dynamic_shapes_kernel_specialization_strategy = strategy
        return configs

    def close(self) -> None:
        self._configs, self._engine = {}, None
