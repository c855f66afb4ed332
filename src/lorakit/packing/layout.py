"""How the rows of a micro-batch lie in one packed sequence, and which of them attend together. Knows no attention."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch

from lorakit.data.batches import row_places

_LONG_ROW = 256 * 256  # scores of a head; from here on keeping them outweighs the cost of one fused call a row
_SMALL = 64 * 64  # scores of a head that cost no more than another group would


@dataclass(frozen=True)
class Row:
    """A row: its own tokens are queries, its whole self are keys.

    Attributes:
        own: (n,) where its own tokens lie among the T.
        places: (m,) where all its tokens lie among the keys; the last n are its own.
    """

    own: torch.Tensor
    places: torch.Tensor

    @property
    def scores(self) -> int:
        """Scores of a head that the row takes."""
        return len(self.own) * len(self.places)


@dataclass(frozen=True)
class Group:
    """R short rows that attend together, padded to n queries and m keys; padding reaches no result.

    Attributes:
        queries: (R * H * n,) index into (T * H,) query vectors; padding points anywhere.
        padding: which of them are padding.
        keys: (R * H_kv * m,) index into (T * H_kv,) key vectors; padding points anywhere.
        blocked: (R, 1, n, m) True where a query must not see a key.
        count: R.
        bias: made by `scores`: the same for every layer.
    """

    queries: torch.Tensor
    padding: torch.Tensor
    keys: torch.Tensor
    blocked: torch.Tensor
    count: int
    bias: dict[torch.dtype, torch.Tensor] = field(default_factory=dict)

    def scores(self, q: torch.Tensor, k: torch.Tensor, scale: float) -> torch.Tensor:
        """scale q k^T, minus infinity where blocked.

        Args:
            q: (R * H_kv, H / H_kv * n, D): queries that read one key head lie below each other.
            k: (R * H_kv, m, D).
            scale: of the product.

        Returns:
            (R * H_kv, H / H_kv * n, m).
        """
        if q.dtype not in self.bias:
            n, m = self.blocked.shape[2:]
            heads = q.shape[0] * q.shape[1] // (self.count * n)
            bias = torch.zeros(self.count, heads, n, m, dtype=q.dtype, device=q.device)
            bias.masked_fill_(self.blocked, -math.inf)
            self.bias[q.dtype] = bias.view(q.shape[0], q.shape[1], m)
        return torch.baddbmm(self.bias[q.dtype], q, k.transpose(1, 2), alpha=scale)


@dataclass(frozen=True)
class ShortRows:
    """All short rows of a layout, for one device, sliding window and number of heads.

    Attributes:
        groups: all of them; each short row is in one.
        back: (tokens * H,) where the result of each own token and head lies among the groups' results, laid end to end;
            tokens in the order of `own`.
        own: (tokens,) where the short rows' own tokens lie among the T, rising.
    """

    groups: tuple[Group, ...]
    back: torch.Tensor
    own: torch.Tensor

    def spread(self, x: torch.Tensor, total: int) -> torch.Tensor:
        """Own tokens (tokens, H, D) at their places among all, (T, H, D) for `total` = T; zero where long rows lie."""
        if len(x) == total:
            return x.contiguous()
        return x.new_zeros(total, *x.shape[1:]).index_copy_(0, self.own, x)


class Layout:
    """How the rows of a micro-batch lie in the packed sequence. Handed down to every attention layer.

    Args:
        lengths: tokens of each whole row.
        forks: as `Batch` has them.
        prefix: (2 * layers, p, H_kv, D) keys and values of virtual tokens with which every row begins, as
            `SoftPrompt.by_layer` has them. They lie before the T tokens, among keys alone.
    """

    def __init__(self, lengths: Sequence[int], forks: Sequence[int], prefix: torch.Tensor | None = None) -> None:
        self._prefix = prefix
        virtual = torch.arange(0 if prefix is None else prefix.shape[1])
        self.rows = [
            Row(place[fork:], torch.cat([virtual, place + len(virtual)]) if len(virtual) else place)
            for place, fork in zip(row_places(lengths, forks), forks, strict=True)
        ]
        self.windows: set[int | None] = set()  # that attention layers have asked for
        self.long = [row for row in self.rows if row.scores >= _LONG_ROW]
        self._short = [row for row in self.rows if row.scores < _LONG_ROW]
        self._made: dict[tuple[int | None, torch.device, int | None, int, int], ShortRows] = {}
        self._visible: dict[tuple[int, torch.device, int | None], torch.Tensor | None] = {}
        self._order: dict[torch.device, torch.Tensor] = {}

    @property
    def has_prefix(self) -> bool:
        """Whether keys and values have virtual tokens before them."""
        return self._prefix is not None

    def with_prefix(self, k: torch.Tensor, v: torch.Tensor, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values (T, H_kv, D) of a layer, those of the prefix before them: (p + T, H_kv, D)."""
        assert self._prefix is not None, "there is none to put there"
        return torch.cat([self._prefix[2 * layer], k]), torch.cat([self._prefix[2 * layer + 1], v])

    def short(self, device: torch.device, window: int | None, heads: int, kv_heads: int) -> ShortRows | None:
        """The short rows in groups (None: there are none). Made once for each device, window and number of heads."""
        return self._in_groups(self._short, None, device, window, heads, kv_heads) if self._short else None

    def alone(self, number: int, device: torch.device, window: int | None, heads: int, kv_heads: int) -> ShortRows:
        """A long row as a group of its own, for attention that the fused call does not know. Made once, likewise."""
        return self._in_groups([self.long[number]], number, device, window, heads, kv_heads)

    def _in_groups(
        self,
        rows: Sequence[Row],
        number: int | None,
        device: torch.device,
        window: int | None,
        heads: int,
        kv_heads: int,
    ) -> ShortRows:
        if window is not None and window >= max(len(row.places) for row in rows):
            window = None  # it hides nothing, so the groups of other layers will do
        key = (number, device, window, heads, kv_heads)
        if key not in self._made:
            self._made[key] = make_groups(rows, device, window, heads, kv_heads)
        return self._made[key]

    def order(self, device: torch.device) -> torch.Tensor:
        """(T,) where each token lies among the own tokens of the short rows, rising, and then of each long row."""
        if device not in self._order:
            short = (
                torch.cat([row.own for row in self._short]).sort().values if self._short else torch.tensor([]).long()
            )
            self._order[device] = torch.cat([short, *(row.own for row in self.long)]).argsort().to(device)
        return self._order[device]

    def visible(self, number: int, device: torch.device, window: int | None) -> torch.Tensor | None:
        """Which keys (m) each query (n) of a long row sees, (n, m); None: plain causality of a row all its own."""
        key = (number, device, window)
        if key not in self._visible:
            n, m = len(self.long[number].own), len(self.long[number].places)
            visible = None
            if n < m or (window is not None and window < m):
                distance = torch.arange(m - n, m, device=device)[:, None] - torch.arange(m, device=device)
                visible = (distance >= 0) & (distance < (m if window is None else window))
            self._visible[key] = visible
        return self._visible[key]


def _similar(rows: Sequence[Row]) -> Iterator[list[Row]]:
    """Rows of similar size together, so that padding costs less than another group would."""
    group: list[Row] = []
    work = longest_own = 0
    for row in sorted(rows, key=lambda row: len(row.places)):
        longest_own = max(longest_own, len(row.own))
        padded = (len(group) + 1) * longest_own * len(row.places)
        if group and padded > 1.5 * (work + row.scores) + _SMALL:
            yield group
            group, work, longest_own = [], 0, len(row.own)
        group.append(row)
        work += row.scores
    yield group


def make_groups(rows: Sequence[Row], device: torch.device, window: int | None, heads: int, kv_heads: int) -> ShortRows:
    """Rows as groups that attend together.

    Args:
        rows: at least one.
        device: where the indices will be.
        window: keys a query sees, itself among them; None: all before it.
        heads: H, of the queries.
        kv_heads: H_kv, of keys and values.
    """
    groups, backs, owns = [], [], []
    results = 0  # of the groups so far
    for members in _similar(rows):
        count, n, m = len(members), max(len(r.own) for r in members), max(len(r.places) for r in members)
        queries, keys = torch.zeros(count, n, dtype=torch.long), torch.zeros(count, m, dtype=torch.long)
        depth = torch.full((count, n), -1)  # of each query in its row; padding: -1
        for i, row in enumerate(members):
            queries[i, : len(row.own)], keys[i, : len(row.places)] = row.own, row.places
            depth[i, : len(row.own)] = torch.arange(len(row.places) - len(row.own), len(row.places))
        distance = depth[:, :, None] - torch.arange(m)  # (R, n, m) query - key; causality hides the padded keys too
        blocked = distance < 0
        if window is not None:
            blocked |= distance >= window
        blocked[:, :, 0] &= depth >= 0  # padding sees one key, so that its softmax is no NaN
        real = (depth >= 0)[:, None, :].expand(-1, heads, -1)  # (R, H, n)
        by_head = queries[:, None, :] * heads + torch.arange(heads)[:, None]  # (R, H, n)
        key_by_head = keys[:, None, :] * kv_heads + torch.arange(kv_heads)[:, None]  # (R, H_kv, m)
        padding = (~real).flatten().nonzero().flatten()
        groups.append(
            Group(
                by_head.flatten().to(device),
                padding.to(device),
                key_by_head.flatten().to(device),
                blocked[:, None].to(device),
                count,
            )
        )
        owns.append(by_head[real])
        backs.append(results + real.flatten().nonzero().flatten())
        results += by_head.numel()
    own = torch.cat(owns)  # (tokens * H,) of query vectors, in the groups' order
    order = own.argsort()
    return ShortRows(
        groups=tuple(groups),
        back=torch.cat(backs)[order].to(device),
        own=(own[order][::heads] // heads).to(device),
    )
