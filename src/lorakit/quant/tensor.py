"""A matrix that is stored in few bits and looks like a plain one: shape, dtype to compute in, device.

It stands where a frozen weight stands (`nn.Linear.weight`, `nn.Embedding.weight`), so that everything that reads a
layer's weight works as it is. Products unpack it some rows at a time and never hold it whole; a lookup unpacks the rows
looked up. Any other operation works on the dense matrix: slower, and as right. Nothing writes into it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Self, cast

import torch
from torch import nn
from torch.utils._pytree import tree_map

from lorakit.errors import AdapterError, ModelError
from lorakit.quant.formats import Format, Parts

AT_ONCE = 1 << 22
"""Numbers of a matrix that are dense at one time: 16 MB in fp32."""
_TILE = 1 << 18  # numbers unpacked at once: what an operation leaves is still in the processor's cache for the next one

_aten = torch.ops.aten


class QuantizedTensor(torch.Tensor):
    """A (rows, columns) matrix in a format, or the transpose of one.

    Attributes:
        format: how it is stored.
        parts: what is stored; each has the stored rows first.
        columns: of the stored matrix.
        transposed: whether this is its transpose.
    """

    format: Format
    parts: Parts
    columns: int
    transposed: bool

    @staticmethod
    def of(
        format: Format, parts: Parts, columns: int, dtype: torch.dtype, *, transposed: bool = False
    ) -> QuantizedTensor:
        """A stored matrix.

        Args:
            format: how it is stored.
            parts: what is stored.
            columns: of the matrix.
            dtype: to compute in.
            transposed: whether to make its transpose.
        """
        rows = len(parts[0])
        make: Any = torch.Tensor._make_wrapper_subclass
        self = make(
            QuantizedTensor,
            (columns, rows) if transposed else (rows, columns),
            strides=(1, columns) if transposed else (columns, 1),
            dtype=dtype,
            device=parts[0].device,
        )
        self.format, self.parts, self.columns, self.transposed = format, parts, columns, transposed
        return cast("QuantizedTensor", self)

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @property
    def stored_bytes(self) -> int:
        """What it takes in memory."""
        return sum(part.numel() * part.element_size() for part in self.parts)

    def dense(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The whole matrix as a plain tensor, unpacked in fp32 and rounded to `dtype` (default: its own)."""
        matrix = torch.empty(len(self.parts[0]), self.columns, dtype=dtype or self.dtype, device=self.device)
        self._unpack(matrix)
        return matrix.t() if self.transposed else matrix

    def _unpack(self, matrix: torch.Tensor) -> None:
        """Write the stored numbers into a plain (stored rows, columns) matrix."""
        rows = len(matrix)
        step = min(rows, max(1, _TILE // self.columns))
        narrow = matrix.dtype != torch.float32
        wide = matrix.new_empty(step, self.columns, dtype=torch.float32) if narrow else matrix
        for start in range(0, rows, max(1, step)):
            tile = slice(start, start + step)
            parts = tuple(part[tile] for part in self.parts)
            numbers = wide[: len(parts[0])] if narrow else wide[tile]
            self.format.unpack(parts, numbers)
            if narrow:
                matrix[tile] = numbers

    def stored_rows(self, which: slice | torch.Tensor) -> QuantizedTensor:
        """Some rows of the stored matrix, not transposed: a view for a slice, a copy for indices."""
        if isinstance(which, slice):
            parts = tuple(part[which] for part in self.parts)
        else:
            parts = tuple(part.index_select(0, which) for part in self.parts)
        return QuantizedTensor.of(self.format, parts, self.columns, self.dtype)

    def chunks(self) -> Iterator[tuple[slice, torch.Tensor]]:
        """(which stored rows, those rows dense), as many as are dense at one time, all in the same memory: what is
        yielded holds until the next.
        """
        rows = len(self.parts[0])
        step = max(1, AT_ONCE // self.columns)
        memory = torch.empty(min(step, rows), self.columns, dtype=self.dtype, device=self.device)
        for start in range(0, rows, step):
            which = slice(start, start + step)
            chunk = self.stored_rows(which)
            matrix = memory[: len(chunk)]
            chunk._unpack(matrix)
            yield which, matrix

    @property
    def fits_at_once(self) -> bool:
        """Whether `chunks` is one."""
        return self.numel() <= max(AT_ONCE, self.columns)

    def rewritten(self, matrix: torch.Tensor, draws: torch.Generator | None = None) -> QuantizedTensor:
        """Another matrix of this one's shape, stored as this one is; `draws` as in `Format.quantise`.

        Raises:
            AdapterError: in a format that is only read.
        """
        rows = quantised(matrix.t() if self.transposed else matrix, self.format, self.dtype, draws=draws)
        return rows.like(lambda part: part, transposed=self.transposed)

    def like(self, each: Callable[[torch.Tensor], torch.Tensor], **changes: Any) -> QuantizedTensor:
        """The same with every part changed, and with another `dtype` or `transposed`."""
        settings = {"dtype": self.dtype, "transposed": self.transposed, **changes}
        return QuantizedTensor.of(self.format, tuple(map(each, self.parts)), self.columns, **settings)

    # ------------------------------------------------------------ what torch asks of a subclass

    def __tensor_flatten__(self) -> tuple[list[str], tuple[Any, ...]]:
        names = [f"part_{number}" for number in range(len(self.parts))]
        return names, (self.format, self.columns, self.dtype, self.transposed)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("part_"):
            return self.parts[int(name.removeprefix("part_"))]
        raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")

    @staticmethod
    def __tensor_unflatten__(
        inner: Mapping[str, torch.Tensor], context: tuple[Any, ...], outer_size: Any, outer_stride: Any
    ) -> QuantizedTensor:
        format, columns, dtype, transposed = context
        parts = tuple(inner[f"part_{number}"] for number in range(len(inner)))
        return QuantizedTensor.of(format, parts, columns, dtype, transposed=transposed)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch's own has no class
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        own = _OPERATIONS.get(func)
        if own is not None:
            result = own(func, *args, **kwargs)
            if result is not NotImplemented:
                return result
        else:
            written = [x for x in _written(func, args, kwargs) if isinstance(x, QuantizedTensor)]
            if written:
                raise AdapterError(f"{func}: a weight stored as {written[0].format.name} is never written; {WAYS_OUT}")
            result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        return func(*tree_map(_densified, args), **tree_map(_densified, kwargs))

    def __deepcopy__(self, memo: dict[int, Any]) -> QuantizedTensor:
        copied = self.like(torch.clone)
        if isinstance(self, nn.Parameter):
            copied = cast("QuantizedTensor", nn.Parameter(copied, requires_grad=False))
        memo[id(self)] = copied
        return copied

    def requires_grad_(self, requires_grad: bool = True) -> Self:
        """As for any tensor, but that it cannot be trained.

        Raises:
            AdapterError: it is to be trained.
        """
        if requires_grad:
            raise AdapterError(
                f"a weight stored as {self.format.name} cannot be trained itself: train a low-rank update of it, or "
                "load the base without quantising (quantize 'none')"
            )
        super().requires_grad_(False)
        return self

    def storage(self) -> Any:
        """Refuse: what saves tensors asks for it.

        Raises:
            AdapterError: always.
        """
        raise AdapterError(
            f"a weight stored as {self.format.name} is no plain tensor and is not saved as one; the adapter can be "
            "saved (adapters.save), or a dense model written (lorakit merge)"
        )

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"QuantizedTensor({self.format.name}, {tuple(self.shape)}, dtype={self.dtype}, device={self.device})"


WAYS_OUT = (
    "keep the adapter unmerged, merge into a dense model (lorakit merge, or a base loaded with quantize 'none'), "
    "which is exactly what was trained; or rewrite a GGUF file in its own formats (lorakit merge --requantize), with "
    "what is lost in them"
)
"""What can be done where a quantised weight would have to change."""


def quantised(
    matrix: torch.Tensor,
    format: Format,
    dtype: torch.dtype,
    where: str = "weight",
    draws: torch.Generator | None = None,
) -> QuantizedTensor:
    """Store a matrix, some rows at a time.

    Args:
        matrix: (rows, columns), any floating dtype.
        format: how.
        dtype: to compute in.
        where: named in errors.
        draws: as in `Format.quantise`.

    Raises:
        ModelError: a number is not finite.
    """
    pieces = []
    for rows in torch.split(matrix, max(1, AT_ONCE // 8 // matrix.shape[1])):  # quantising takes several times as much
        if not torch.isfinite(rows).all():
            raise ModelError(f"{where}: holds NaN or infinity, which {format.name} cannot store")
        pieces.append(format.quantise(rows, draws))
    parts = tuple(torch.cat(part) for part in zip(*pieces, strict=True))
    return QuantizedTensor.of(format, parts, matrix.shape[1], dtype)


def as_dense(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor in its dtype as a plain one; itself where it is one."""
    return tensor.dense() if isinstance(tensor, QuantizedTensor) else tensor


def format_of(tensor: torch.Tensor) -> str | None:
    """The name of the format a tensor is stored in; None for a plain one."""
    return tensor.format.name if isinstance(tensor, QuantizedTensor) else None


def stored_tensors(name: str, tensor: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """What of a tensor is in memory, as plain tensors with names: itself, or its parts."""
    if isinstance(tensor, QuantizedTensor):
        for number, part in enumerate(tensor.parts):
            yield f"{name}|{tensor.format.name}.{number}", part
    else:
        yield name, tensor


def _densified(value: Any) -> Any:
    return as_dense(value) if isinstance(value, torch.Tensor) else value


@functools.cache
def _write_places(func: Any) -> tuple[tuple[int, str], ...]:
    arguments = enumerate(func._schema.arguments)
    return tuple((i, a.name) for i, a in arguments if a.alias_info is not None and a.alias_info.is_write)


def _written(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Any]:
    """The arguments that an operation writes into."""
    return [args[i] if i < len(args) else kwargs.get(name) for i, name in _write_places(func)]


# ---------------------------------------------------------------- operations; NotImplemented: on the dense matrix


def _shared(func: Any, x: QuantizedTensor, *args: Any, **kwargs: Any) -> Any:
    return x.like(lambda part: part)


def _cloned(func: Any, x: QuantizedTensor, **kwargs: Any) -> Any:
    return x.like(torch.clone)


def _converted(func: Any, x: QuantizedTensor, *, dtype: Any = None, device: Any = None, **kwargs: Any) -> Any:
    if dtype is not None and not dtype.is_floating_point:
        return NotImplemented
    blocking = {"non_blocking": kwargs.get("non_blocking", False)}
    return x.like(lambda part: part.to(device or x.device, copy=True, **blocking), dtype=dtype or x.dtype)


def _turned(func: Any, x: QuantizedTensor, *dims: Any) -> Any:
    """t, transpose and permute of two dimensions."""
    order = dims[0] if len(dims) == 1 else dims or (1, 0)
    if func is _aten.permute.default and [d % 2 for d in order] == [0, 1]:
        return _shared(func, x)
    if order[0] % 2 == order[1] % 2:
        return _shared(func, x)
    return x.like(lambda part: part, transposed=not x.transposed)


def _viewed(func: Any, x: QuantizedTensor, shape: Any) -> Any:
    return _shared(func, x) if tuple(shape) == tuple(x.shape) else NotImplemented


def _row_dim(x: QuantizedTensor) -> int:
    """The dimension along which the stored rows run."""
    return 1 if x.transposed else 0


def _of_rows(x: QuantizedTensor, which: slice) -> QuantizedTensor:
    rows = x.stored_rows(which)
    return rows.like(lambda part: part, transposed=x.transposed)


def _sliced(func: Any, x: QuantizedTensor, dim: int = 0, start: Any = None, end: Any = None, step: int = 1) -> Any:
    return _of_rows(x, slice(start, end, step)) if dim % 2 == _row_dim(x) else NotImplemented


def _split(func: Any, x: QuantizedTensor, sizes: Any, dim: int = 0) -> Any:
    if dim % 2 != _row_dim(x):
        return NotImplemented
    rows = len(x.parts[0])
    sizes = [sizes] * -(-rows // sizes) if isinstance(sizes, int) else sizes
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    return [_of_rows(x, slice(end - size, end)) for size, end in zip(sizes, ends, strict=True)]


def _selected(func: Any, x: QuantizedTensor, dim: int, index: Any) -> Any:
    if dim % 2 != _row_dim(x):
        return NotImplemented
    if isinstance(index, torch.Tensor):  # index_select
        found = x.stored_rows(index.reshape(-1)).dense()
        return found.t() if x.transposed else found
    index %= len(x.parts[0])
    return x.stored_rows(slice(index, index + 1)).dense()[0]


def _indexed(func: Any, x: QuantizedTensor, indices: Any) -> Any:
    first = indices[0]
    if x.transposed or first is None or first.dtype is torch.bool:
        return NotImplemented
    found = _looked_up(func, x, first % len(x.parts[0]))  # (*first.shape, columns)
    if len(indices) == 1:
        return found
    others = torch.zeros_like(first) + indices[1]  # of the shape of both
    return found.expand(*others.shape, x.columns).gather(-1, (others % x.columns).unsqueeze(-1)).squeeze(-1)


def _looked_up(func: Any, x: QuantizedTensor, indices: torch.Tensor, *options: Any, **more: Any) -> Any:
    if x.transposed:
        return NotImplemented
    return x.stored_rows(indices.reshape(-1)).dense().view(*indices.shape, x.columns)


def _product(x: torch.Tensor, w: QuantizedTensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """x w for a plain (n, k) x; into `out`, if it is given."""
    if w.fits_at_once:
        return torch.mm(x, w.dense(), out=out)
    if w.transposed:  # each chunk of rows gives some of the outputs
        y = x.new_empty(len(x), w.shape[1]) if out is None else out
        for rows, matrix in w.chunks():
            y[:, rows] = x @ matrix.t()
        return y
    # each chunk gives a term of all outputs: added up in fp32, as one product would
    total = x.new_zeros(len(x), w.columns, dtype=torch.promote_types(x.dtype, torch.float32))
    for rows, matrix in w.chunks():
        if total.dtype == x.dtype:
            total.addmm_(x[:, rows], matrix)
        else:
            total += x[:, rows] @ matrix
    return total.to(x.dtype) if out is None else out.copy_(total)


def _mm(func: Any, a: torch.Tensor, b: torch.Tensor, *, out: torch.Tensor | None = None) -> Any:
    if isinstance(a, QuantizedTensor):  # a b = (b' a')'
        return NotImplemented if out is not None else _product(as_dense(b).t(), cast("QuantizedTensor", a.t())).t()
    return _product(a, cast("QuantizedTensor", b), out)


def _addmm(
    func: Any,
    y: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    *,
    beta: Any = 1,
    alpha: Any = 1,
    out: torch.Tensor | None = None,
) -> Any:
    """y is plain, or is written to and so refused."""
    if isinstance(y, QuantizedTensor) or isinstance(a, QuantizedTensor):
        return NotImplemented
    w = cast("QuantizedTensor", b)
    if w.fits_at_once:
        into = {} if out is None else {"out": out}
        return func(y, a, w.dense(), beta=beta, alpha=alpha, **into)
    if func is _aten.addmm_.default:
        return y.mul_(beta).add_(_product(a, w), alpha=alpha)
    return torch.add(y * beta, _product(a, w, out), alpha=alpha, out=out)


_OPERATIONS: dict[Any, Callable[..., Any]] = {
    _aten.detach.default: _shared,
    _aten.alias.default: _shared,
    _aten.clone.default: _cloned,
    _aten._to_copy.default: _converted,
    _aten.t.default: _turned,
    _aten.transpose.int: _turned,
    _aten.permute.default: _turned,
    _aten.view.default: _viewed,
    _aten._unsafe_view.default: _viewed,
    _aten.slice.Tensor: _sliced,
    _aten.split.Tensor: _split,
    _aten.split_with_sizes.default: _split,
    _aten.select.int: _selected,
    _aten.index_select.default: _selected,
    _aten.index.Tensor: _indexed,
    _aten.embedding.default: _looked_up,
    _aten.mm.default: _mm,
    _aten.mm.out: _mm,
    _aten.addmm.default: _addmm,
    _aten.addmm.out: _addmm,
    _aten.addmm_.default: _addmm,
}
