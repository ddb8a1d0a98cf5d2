"""Op: one declaration of an operator, from which everything else follows.

An op is one torch dispatcher entry, `metate::<name>`. A backend is a callable with the op's positional signature;
`reference` always exists and defines the schema, the values, the output shapes and, run in float64, the truth.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
import logging
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from random import Random
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad
from torch.autograd.function import _SingleLevelFunction
from torch.compiler import is_dynamo_compiling
from torch.nn import Parameter

from metate import accuracy, backends, flops, library
from metate.accuracy import computes
from metate.axes import Axes
from metate.backends import State, current, on, traced, use, within
from metate.errors import fail, require_choice, require_dense
from metate.scalars import PLAIN, plain

Case = dict[str, Any]  # axis sizes and flags, as in {"B": 1, "Sq": 63, "causal": True}
Backend = Callable[..., Any]
Args = tuple[Any, ...]

REGISTRY: dict[str, Op] = {}

_public = torch.library.Library("metate", "DEF")
_compiled = torch.library.Library("metate_C", "DEF")  # csrc/torch implements these, per device
_emulated = torch.library.Library("metate_emulated", "DEF")  # the CUDA kernels under the SIMT emulator, in tests
_PLAIN = (Tensor, Parameter)
_PLANS = 4096  # remembered decisions per op, then forgotten all at once
_log = logging.getLogger("metate")


class Captured(BaseException):
    """Carries a call out of a public function to `explain`."""

    def __init__(self, op: Op, args: Args) -> None:
        self.op, self.call = op, args


class _Node(_SingleLevelFunction):
    """An operator in the graph of gradients, for the dispatcher, which takes torch.func's transforms one at a time.

    The `apply` of torch.autograd.Function would begin with all of them anew. What torch.library.register_autograd makes
    refuses them, and torch.compile(torch.func.grad(…)) with them.
    """

    @classmethod
    def apply(cls, *args: Any) -> Any:
        with enable_single_level_autograd_function():
            return super().apply(*args)  # type: ignore[misc]


@dataclass(frozen=True)
class Domain:
    """Inputs of an op. `make(case, dtype, generator)` gives its positional arguments on a CPU."""

    make: Callable[[Case, torch.dtype, torch.Generator], Args]
    cases: Sequence[Case]  # edges, for tests
    sweep: Sequence[Case]  # real shapes, for benches
    draw: Callable[[Random], Case]  # one random case, for fuzzing
    dynamic: tuple[str, ...]  # sizes that change from call to call and must not recompile anything
    batch: str  # the axis whose entries must not notice each other


@dataclass(eq=False)
class Op:
    """One operator. Positional tensors (or None) come first in `reference`, then scalars."""

    name: str
    reference: Backend
    axes: Mapping[str, str]  # tensor argument -> its named axes, see metate.axes
    dtypes: Mapping[str, Sequence[str | torch.dtype]]  # what each tensor may be; "q": the dtype of argument q
    outputs: Mapping[str, str | torch.dtype]  # output -> its dtype, or the argument whose dtype it takes
    shapes: Callable[..., tuple[Sequence[int], ...]]  # args -> shape of every output, or of what is written of it
    domain: Domain
    flops: Callable[[Case], float]
    sizes: Callable[[Case], Case] = field(kw_only=True, default=dict)  # named axes and arguments -> those of `flops`
    autocast: tuple[str, ...]  # arguments cast to the autocast dtype, or to that of `storage` where it has floats
    vmap: Callable[..., Any]  # (info, in_dims, *args) -> (outputs, out_dims); `loop_vmap` where batches cannot fold
    sharding: Callable[..., Sequence[Any]]  # args -> [({output: dim}, {argument: dim}), …] that need no communication
    validate: Callable[..., None] = lambda *args: None  # scalars and relations, from shapes alone
    contents: tuple[str, Callable[..., None]] = ("", lambda *args: None)  # arguments whose values are checked, and how
    contents_in_kernel: bool = False  # direct calls check them too, and come to Python where they are wrong
    refuses: Mapping[str, Callable[..., str | None]] = field(default_factory=dict)  # backend -> why not
    storage: str = ""  # an argument too large to be cast at every call
    gradient: str | None = None  # why there is none, where there is none
    writes: bool = False  # the outputs are arguments that kernels write in place; `reference` returns their new values
    public: str = ""  # the function that users call, where it has another name: errors name it
    given: Mapping[str, str] = field(default_factory=dict)  # argument -> how users name it, where they do otherwise
    words: Mapping[str, str] = field(default_factory=dict)  # axis -> how users name it, for errors and docs
    made_of: Callable[[Any], Backend] | None = None  # module -> the operator by others of its family there, for Triton

    def __post_init__(self) -> None:
        self.public = self.public or self.name
        self._node: type[_Node] = _Node  # `differentiable` makes the operator's own
        schema = _schema(self.reference, tuple(self.outputs) if self.writes else ())
        for namespace in (_compiled, _emulated):
            namespace.define(self.name + schema)
        _public.define(self.name + schema.replace(") -> ", ", *, str? backend=None) -> ", 1))  # for graphs
        # To be hidden from dynamo, which would trace the kernel while a compiled graph runs, before the first graph is
        # made: importing dynamo takes longer than all the rest. A partial has no frame of its own to be traced.
        self._kernel: Any = functools.partial(self._run)
        _public.impl(self.name, self._kernel, "CompositeExplicitAutograd")  # for every device: there is the reference
        for key in ("AutocastCPU", "AutocastCUDA"):
            _public.impl(self.name, self._under_autocast, key)
        self.torch_op = getattr(torch.ops.metate, self.name).default
        flops.declare(self.torch_op.overloadpacket, lambda *args, **_: self.cost(args))
        qualified = f"metate::{self.name}"
        torch.library.register_fake(qualified, self._fake, lib=_public)
        torch.library.register_vmap(qualified, self._under_vmap, lib=_public)
        _public.impl(self.name, self._under_autograd, "Autograd")
        if self.gradient is not None:
            self.differentiable(self._no_gradient, lambda ctx, inputs, output: None)
        self.parameters = tuple(inspect.signature(self.reference).parameters)
        self.arity = len(self.axes)
        self._axes = Axes(self.public, self.axes, self.given, self.words)
        self._kinds = {name: str(kind) for name, kind in self.reference.__annotations__.items()}
        self._written = [i for i, name in enumerate(self.parameters) if self.writes and name in self.outputs]
        self._contents = [self.parameters.index(name) for name in self.contents[0].split()]
        self._implementations: dict[str, dict[str, Backend]] = {}
        self._plans: dict[Any, Backend] = {}
        self.shapes_only: Backend = self._fake  # for tensors without contents
        self._direct: tuple[library.Direct, ...] = ()  # the short ways to compiled backends
        REGISTRY[self.name] = self

    def __call__(self, *args: Any) -> Any:
        return self.call(args)

    def call(self, args: Args, first_only: bool = False, backend: str | None = None) -> Any:
        """The results, or the first alone: direct calls make no tensors of the others. On `backend`, if one is given.

        The whole cost of a call without gradients is here and in the kernel: microseconds count.
        """
        if backend is not None:
            require_choice(self.public, "backend", backend, backends.BACKENDS)
            with use(backend):
                return self.call(args, first_only)
        if is_dynamo_compiling():
            results = self.torch_op(*args, backend=traced.backend)
            return results[0] if first_only else results
        state = current.get()
        if state is None:
            for direct in self._direct:
                result = direct.call(args, first_only)
                if result is not NotImplemented:
                    if self.writes:
                        self._count_write(args)
                    return result
        elif state.capture:
            self._without_tangents(args)
            raise Captured(self, args)
        results = self._long_way(args)
        return results[0] if first_only else results

    def _long_way(self, args: Args) -> Any:
        if not PLAIN.issuperset(map(type, args[self.arity :])):
            args = (*args[: self.arity], *map(plain, args[self.arity :]))
        self._without_tangents(args)
        if library.dispatcher_is_wanted():
            return self._dispatch(args)
        learns = False
        for tensor in args[: self.arity]:
            if tensor is not None:
                if type(tensor) not in _PLAIN:
                    return self._dispatch(args)
                learns |= tensor.requires_grad
        return self._with_gradient(args) if learns and torch.is_grad_enabled() else self._run(*args)

    def _dispatch(self, args: Args) -> Any:
        for name, arg in zip(self.axes, args, strict=False):
            if arg is not None:
                require_dense(self.public, self.given.get(name, name), arg)
        return self.torch_op(*args, backend=backends.used())

    def differentiable(self, backward: Callable[..., Any], setup: Callable[..., None]) -> None:
        """Gradients by `backward(ctx, *grads)`, saved by `setup(ctx, inputs, output)`, on the forward's backend."""

        def forward(*args: Any) -> Any:
            if not library.dispatcher_is_wanted():
                return self.call(args)
            # torch runs this without gradients, which is meant for one level of torch.func's, and not for those below
            with torch.enable_grad(), torch._C._AutoDispatchBelowAutograd():
                return self.torch_op(*args, backend=backends.used())

        def setup_context(ctx: Any, inputs: Args, output: Any) -> None:
            ctx.metate = current.get()
            setup(ctx, inputs, output)

        def run(ctx: Any, *grads: Any) -> Any:
            with within(ctx.metate):
                return backward(ctx, *grads)

        rules = dict(forward=forward, setup_context=setup_context, backward=run)
        self._node = type(f"metate.{self.name}", (_Node,), {name: staticmethod(rule) for name, rule in rules.items()})

    def _under_autograd(self, *args: Any, backend: str | None = None) -> Any:
        if not (torch.is_grad_enabled() and torch._C._any_requires_grad(*args)):
            with torch._C._AutoDispatchBelowAutograd():
                return self.torch_op(*args, backend=backend)
        with on(backend):
            return self._with_gradient(args)

    def _with_gradient(self, args: Args) -> Any:
        if self.writes:
            self._no_gradient(None)
        return self._node.apply(*args)

    def _under_vmap(self, info: Any, in_dims: Args, *args: Any, backend: str | None = None) -> tuple[Any, Any]:
        with on(backend):
            return self.vmap(self, info, in_dims, args)  # type: ignore[no-any-return]

    def _no_gradient(self, ctx: Any, *grads: Any) -> Any:
        raise NotImplementedError(f"metate.{self.public}: no gradient: {self.gradient}")

    def _without_tangents(self, args: Args) -> None:
        """Refuses forward mode, whose tangents torch would drop at a custom operator: results with a tangent of 0."""
        if forward_ad._current_level < 0:
            return
        for name, arg in zip(self.axes, args, strict=False):
            if isinstance(arg, Tensor) and forward_ad.unpack_dual(arg).tangent is not None:
                raise NotImplementedError(
                    f"metate.{self.public}: {name} has a tangent, but there are no derivatives in forward mode (jvp, "
                    "jacfwd); use reverse mode (grad, vjp)"
                )

    # Choosing a backend.

    def implementations(self, device: str) -> dict[str, Backend]:
        """Backends for tensors of a device type, best first. Found by name, never listed by hand.

        On a CPU, `triton` (its interpreter) and `cuda` (the emulator) stand behind the reference: they run when asked.
        """
        if device not in self._implementations:
            found: dict[str, Backend] = {}
            if _has_kernel(f"metate_C::{self.name}", device):
                found[device] = _entry(torch.ops.metate_C, self.name)
                self._direct = library.direct(self.name, found[device]) if device == "cpu" else self._direct
            kernel = self._triton() if device == "cuda" or _triton_interpreted() else None
            triton = {"triton": kernel} if kernel else {}
            found |= triton if device == "cuda" else {}
            found["reference"] = self.fallback
            if device == "cpu":
                if _has_kernel(f"metate_emulated::{self.name}", "cpu"):
                    found["cuda"] = _entry(torch.ops.metate_emulated, self.name)
                found |= triton
            self._implementations[device] = found
        return self._implementations[device]

    def _triton(self) -> Backend | None:
        kernels = _triton_kernels(self.family)
        return self.made_of(kernels) if kernels and self.made_of else getattr(kernels, self.name, None)

    @property
    def family(self) -> str:
        return self.reference.__module__.split(".")[2]  # metate.ops.<family>[.…]

    def refusal(self, backend: str, args: Args) -> str | None:
        """Why `backend` cannot run this call, or None."""
        if backend == "cuda" and args[0].is_cuda and (reason := library.refused_gpu(args[0].device.index)):
            return reason
        if backend in self.refuses and (reason := self.refuses[backend](*args)):
            return reason
        kernels = _triton_kernels(self.family) if backend == "triton" else None
        rule = getattr(kernels, "REFUSES", {}).get(self.name)
        return rule(*args) if rule else None

    def plan(self, args: Args) -> tuple[str, Backend]:
        """Name and callable of the backend for this call. Raises what is wrong with the call, or every refusal."""
        self.check(args)
        forced = backends.forced()
        device = args[0].device.type
        if device == "meta":
            return "reference", self.shapes_only
        available = self.implementations(device)
        reasons: dict[str, str] = {}
        for name, backend in available.items():
            if forced is not None and name != forced:
                continue
            reason = self.refusal(name, args)
            if reason is None:
                if name == "reference" and forced is None:
                    self._warn_of_reference(device, reasons)
                return name, backend
            reasons[name] = reason
        if forced is not None and forced not in available:
            reasons[forced] = library.unavailable(forced, device)
        raise NotImplementedError(f"metate.{self.public}: no backend runs this call ({_join(reasons)})")

    def _warn_of_reference(self, device: str, refusals: Mapping[str, str]) -> None:
        """Where it stands in for a kernel; on a CPU it is what computes what the kernel refuses, as float64."""
        if device not in self.implementations(device):
            refusals = {device: library.missing(device) or "no kernel of this operator", **refusals}
        elif device == "cpu":
            return
        _warn(f"metate.{self.public} runs on its slow reference: {_join(refusals)}; see `metate info`")

    def _run(self, *args: Any, backend: str | None = None) -> Any:
        """The kernel behind the dispatcher entry; on `backend`, where a compiled graph was traced with one."""
        if backend is not None:
            with on(backend):
                return self._run(*args)
        state, arity = current.get(), self.arity
        key: list[Any] = [state, args[arity:], *map(type, args[arity:])]  # True equals 1, but is none
        try:
            for tensor in args[:arity]:
                key += (None,) if tensor is None else (tensor.shape, tensor.dtype, tensor.device, tensor.layout)
        except RuntimeError:  # a nested tensor has no shape
            self.check(args)
            raise
        result = self._backend(state, tuple(key), args)(*args)
        if self.writes:
            self._count_write(args)
        return result

    def _count_write(self, args: Args) -> None:
        torch.autograd.graph.increment_version([x for x in self.written(args) if not x.is_inference()])

    def _backend(self, state: State | None, key: Args, args: Args) -> Backend:
        """The backend of a call, remembered by all that the choice depends on; raises what is wrong with the call."""
        try:
            backend = self._plans.get(key)
        except TypeError:  # an unhashable scalar
            self.check(args)
            raise
        values = any(args[i] is not None for i in self._contents)
        if backend is None:
            backend = self.plan(args)[1]
            if len(self._plans) >= _PLANS:
                self.forget_plans()
            self._plans[key] = backend
            if state is None and (self.contents_in_kernel or not values):
                for direct in self._direct:
                    if direct.entry is backend:
                        direct.admit(args)
        if values and backend is not self.shapes_only:
            self.contents[1](*args)
        return backend

    def forget_plans(self) -> None:
        """The next call of each kind is checked, and its backend chosen, anew."""
        self._plans.clear()
        for direct in self._direct:
            direct.forget()

    def _fake(self, *args: Any, backend: str | None = None) -> Any:
        """Shapes without values, for compilers. The reference on fake tensors says the same 30 times slower."""
        self._hide_kernel()
        self.check(args)
        if self.writes:
            return None
        out = tuple(
            args[0].new_empty(shape, dtype=dtype)
            for shape, dtype in zip(self.shapes(*args), self._out_dtypes(args), strict=True)
        )
        return out if len(out) > 1 else out[0]

    def _hide_kernel(self) -> None:
        if self._kernel.func == self._run:
            self._kernel.__setstate__((torch.compiler.disable(self._run), (), {}, {}))

    def _under_autocast(self, *args: Any, backend: str | None = None) -> Any:
        cast = self.cast(args, torch.get_autocast_dtype(args[0].device.type))
        with below_autocast():
            return self.torch_op(*cast, backend=backend)

    def cast(self, args: Args, dtype: torch.dtype) -> Args:
        """The arguments of a call under autocast to `dtype`: beside a storage of floats to its dtype instead."""
        named = dict(zip(self.parameters, args, strict=False))
        if self.storage and computes(named[self.storage]):
            dtype = named[self.storage].dtype
        return tuple(x.to(dtype) if name in self.autocast and _castable(x) else x for name, x in named.items())

    def check(self, args: Args) -> None:
        """TypeError or ValueError naming the argument that is wrong: kind, dtype, device, shape, then scalars."""
        named = dict(zip(self.axes, args, strict=False))
        first = next(iter(named))
        for name, tensor in named.items():
            if tensor is None and "None" in self._kinds[name]:
                continue
            given = self.given.get(name, name)
            require_dense(self.public, given, tensor)
            self._check_dtype(name, tensor, named)
            if tensor.device != named[first].device:
                raise fail(
                    self.public, given, f"on {tensor.device}", f"{named[first].device} like {first}; move it with .to()"
                )
        scalars = dict(zip(self.parameters[self.arity :], args[self.arity :], strict=True))
        for name, value in scalars.items():
            self._check_scalar(name, value)
        self._axes.check(named, scalars)
        self.validate(*args)

    def _check_scalar(self, name: str, value: Any) -> None:
        expected, kinds = _SCALARS[self._kinds[name]]
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            raise fail(self.public, name, repr(value), expected, error=TypeError)
        if isinstance(value, int) and not -(2**63) <= value < 2**63:
            raise fail(self.public, name, value, "a 64-bit integer")

    def _check_dtype(self, name: str, tensor: Tensor, named: Mapping[str, Any]) -> None:
        allowed: list[torch.dtype] = []
        for rule in self.dtypes[name]:
            if isinstance(rule, str) and not isinstance(named[rule], Tensor):
                return  # its own turn comes, and ends the call
            allowed.append(named[rule].dtype if isinstance(rule, str) else rule)
        if tensor.dtype not in allowed:
            expected = " or ".join(map(str, dict.fromkeys(allowed)))
            given = self.given.get(name, name)
            raise fail(self.public, given, tensor.dtype, f"{expected}; convert it with .to()", error=TypeError)

    # The reference at a chosen precision: as truth, as fallback, as error budget.

    def compute(self, dtype: torch.dtype, args: Args) -> tuple[Any, ...]:
        """The reference with every floating tensor in `dtype`; of the outputs, those that there are."""
        out = self.reference(*(a.to(dtype) if computes(a) else a for a in args))
        return tuple(o for o in out if o is not None) if isinstance(out, tuple) else (out,)

    def fallback(self, *args: Any) -> Any:
        """The reference as a backend: float32 arithmetic (float64 if given), declared output dtypes, contiguous."""
        wide = torch.float64 if args[0].dtype == torch.float64 else torch.float32
        out = self.compute(wide, args)
        if self.writes:
            for argument, value in zip(self.written(args), out, strict=True):
                argument.copy_(value)
            return None
        out = tuple(o.to(d).contiguous() for o, d in zip(out, self._out_dtypes(args), strict=True))
        return out if len(out) > 1 else out[0]

    def shape_of(self, name: str) -> str:
        """The shape that an argument must have, in words."""
        return self._axes.text(name)

    def written(self, args: Args) -> list[Tensor]:
        """The arguments that a call writes."""
        return [args[i] for i in self._written if args[i] is not None]

    def trial(self, args: Args) -> Any:
        """The results of a call that leaves its arguments as they are: it writes into copies laid out alike."""
        if not self.writes:
            return self(*args)
        args = tuple(
            _copy(a) if name in self.outputs and isinstance(a, Tensor) else a
            for name, a in zip(self.parameters, args, strict=True)
        )
        self(*args)
        return tuple(self.written(args))

    def _out_dtypes(self, args: Args) -> list[torch.dtype]:
        """Float32 results beside float64 arguments are float64; integers are what they are."""
        named = dict(zip(self.parameters, args, strict=False))
        wide = torch.float64 if args[0].dtype == torch.float64 else torch.float32
        kinds = [named[d] if isinstance(d, str) else _widened(d, wide) for d in self.outputs.values()]
        return [kind.dtype if isinstance(kind, Tensor) else kind for kind in kinds if kind is not None]

    def assert_close(self, got: Any, args: Args) -> None:
        """`got` is as near the float64 truth as twice the error of plain torch at the dtype of the first argument.

        Where low precision happens to be exact (a difference that cancels), float32, in which every kernel accumulates,
        sets the budget. Few numbers may all happen to be rounded well: then the error of plain torch is the largest on
        this problem and on problems whose inputs differ from it by a few roundings.
        """
        accuracy.assert_close(self, got, args)

    def example(self, case: Case, dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> Args:
        """Positional arguments of a case."""
        generator = torch.Generator().manual_seed(seed)
        return tuple(a.to(device) if isinstance(a, Tensor) else a for a in self.domain.make(case, dtype, generator))

    def cost(self, args: Args) -> int:
        """The declared flops of a call; what a mask of data hides is counted."""
        named = dict(zip(self.parameters, args, strict=False))
        given = list(named.items())
        return round(
            self.flops(self.sizes(named | self._axes.check(dict(given[: self.arity]), dict(given[self.arity :]))))
        )

    def bytes(self, args: Args) -> int:
        """Every input read once, every output written once: the roofline's lower bound."""
        named = dict(zip(self.parameters, args, strict=True))
        read = sum(
            a.numel() * a.element_size()
            for name, a in named.items()
            if isinstance(a, Tensor) and not (self.writes and name in self.outputs)
        )
        written = zip(self.shapes(*args), self._out_dtypes(args), strict=True)
        return read + sum(math.prod(shape) * dtype.itemsize for shape, dtype in written)


_SCALARS: dict[str, tuple[str, tuple[type, ...]]] = {
    "int": ("an integer", (int, torch.SymInt)),
    "float": ("a number", (float, int, torch.SymFloat, torch.SymInt)),
    "bool": ("True or False", (bool, torch.SymBool)),
}
_AUTOCAST = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU) | torch._C.DispatchKeySet(
    torch._C.DispatchKey.AutocastCUDA
)


def below_autocast() -> contextlib.AbstractContextManager[None]:
    """Context in which operators run in the dtypes of their inputs."""
    return torch._C._ExcludeDispatchKeyGuard(_AUTOCAST)


def _copy(x: Tensor) -> Tensor:
    """The same values in the same layout in memory of their own."""
    whole = x.new_empty(0).set_(x.untyped_storage())
    return whole.clone().as_strided(x.shape, x.stride(), x.storage_offset())


def _schema(reference: Backend, writes: tuple[str, ...]) -> str:
    """What torch must know of an operator that returns what `reference` does, or writes arguments instead."""
    prototype = inspect.signature(reference)
    if not writes:
        return torch.library.infer_schema(reference, mutates_args=())

    def writer() -> None: ...

    writer.__signature__ = prototype.replace(return_annotation=None)  # type: ignore[attr-defined]
    return torch.library.infer_schema(writer, mutates_args=writes)


def _widened(dtype: torch.dtype, wide: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, wide) if dtype.is_floating_point else dtype


def _castable(arg: Any) -> bool:
    return computes(arg) and arg.dtype != torch.float64


def _has_kernel(name: str, device: str) -> bool:
    return device in ("cpu", "cuda") and bool(torch._C._dispatch_has_kernel_for_dispatch_key(name, device.upper()))


def _entry(namespace: Any, name: str) -> Backend:
    """The dispatcher's own callable of a compiled operator: torch's wrapper around it costs a microsecond."""
    entry: Backend = getattr(namespace, name).default._op
    return entry


def _triton_interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def _triton_kernels(family: str) -> ModuleType | None:
    """metate.kernels.<family>, where triton and that file exist."""
    try:
        return importlib.import_module(f"metate.kernels.{family}")
    except ModuleNotFoundError as missing:
        if missing.name and missing.name.split(".")[0] in ("metate", "triton"):
            return None
        raise


@functools.cache
def _warn(text: str) -> None:
    """Once for each text."""
    _log.warning(text)


def _join(reasons: Mapping[str, str]) -> str:
    return "; ".join(f"{name}: {reason}" for name, reason in reasons.items())


def loop_vmap(op: Op, info: Any, in_dims: Args, args: Args) -> tuple[Any, Any]:
    """The batching rule of last resort: one call after another, stacked."""
    rows = [
        op(*(a if d is None else a.select(d, i) for a, d in zip(args, in_dims, strict=True)))
        for i in range(info.batch_size)
    ]
    if isinstance(rows[0], tuple):
        return tuple(torch.stack(column) for column in zip(*rows, strict=True)), (0,) * len(rows[0])
    return torch.stack(rows), 0
