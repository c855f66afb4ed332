"""One adapter from several: sums, votes, and what is left of them at a lower rank. Values in, a value out; no model.

Adapters may differ in rank, scale and layers: a layer that one of them lacks has no update there. What is exact stays
in factors; methods that look at single elements of an update work on the dense update, layer by layer, and say how much
of it the rank of the result could not hold.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import NamedTuple

import torch

from lorakit.adapter import union
from lorakit.adapter.compress import Truncated, refactored, refuse_ranks_within_groups, truncated, with_factors
from lorakit.adapter.updates import seeded
from lorakit.adapter.value import Adapter, Factors
from lorakit.core import consensus, lowrank
from lorakit.errors import AdapterError, nearest

_WIDEST_EPSILON = 0.2


@dataclass(frozen=True, kw_only=True)
class Options:
    """What methods can be told; each takes only some.

    Attributes:
        rank: of the result, the same for every layer. svd: the largest rank among the adapters, layer by layer, unless
        `energy` is given; the others: the sum of ranks.
        energy: svd: share of the squared singular values of all layers together that stays.
        density: share of each update's elements that stays, in (0, 1]; 0.5.
        epsilon: della: by how much the probability of staying differs between the largest and the smallest element of
        a row; the widest that fits, up to 0.2.
        inside: knots: the method used in the common basis; ties.
        seed: determines the draws, together with each layer's path and the adapter's place.
    """

    rank: int | None = None
    energy: float | None = None
    density: float | None = None
    epsilon: float | None = None
    inside: str | None = None
    seed: int = 0


class Term(NamedTuple):
    """What one adapter brings to one layer: w s B A."""

    number: int  # of the adapter
    factors: Factors
    weight: float
    s: float


def combine(
    adapters: Sequence[Adapter | str | Path],
    weights: Sequence[float] | None = None,
    method: str = "cat",
    *,
    rank: int | None = None,
    energy: float | None = None,
    density: float | None = None,
    epsilon: float | None = None,
    inside: str | None = None,
    seed: int = 0,
    check_base: bool = True,
) -> Adapter:
    """One adapter from several. `combine_with_report` also gives the error of the truncation, which stands in
    `metadata["combined"]` too.

    Args:
        adapters: values, or where they are saved.
        weights: one each, of any sign: -1 takes an adapter's update away; None: 1 each.
        method: of `METHODS`.

            cat: sum of w_i s_i B_i A_i, exact, by putting the factors side by side; the ranks add up.
            linear: the same sum, exact, at the rank it really has (adapters with one A in common keep their rank).
            svd: the best approximation of the sum at a rank.
            magnitude_prune, ties, dare_linear, dare_ties, della, della_linear: each dense update thinned out, then
            summed or put to a vote (`core.consensus`), then the best approximation of that at a rank.
            knots: the same in the basis that all updates have in common (arXiv 2410.19735); needs no truncation.

            Biases of B (`lora_bias`) are summed with the updates, exactly, by cat, linear and svd; the others refuse.
        rank: see `Options`, as for the five after it.
        energy: share of energy that stays.
        density: share of elements that stays.
        epsilon: spread of probabilities.
        inside: method in the common basis.
        seed: of the draws.
        check_base: refuse adapters that were made on different bases.

    Raises:
        AdapterError: an unknown method, an option the method does not take, adapters that do not belong together, or
        whole tensors (biases, `modules_to_save`) that cannot be added up without the base. All problems at once.
        AdapterFileError: as in `Adapter.load`.
    """
    options = Options(rank=rank, energy=energy, density=density, epsilon=epsilon, inside=inside, seed=seed)
    return combine_with_report(adapters, weights, method, options, check_base=check_base).adapter


def combine_with_report(
    adapters: Sequence[Adapter | str | Path],
    weights: Sequence[float] | None = None,
    method: str = "cat",
    options: Options | None = None,
    *,
    check_base: bool = True,
) -> Truncated:
    """`combine`, with the error of the truncation per layer and in all (zero where the method is exact).

    Errors as in `combine`.
    """
    options = options or Options()
    values = [a if isinstance(a, Adapter) else Adapter.load(a) for a in adapters]
    shares = [1.0] * len(values) if weights is None else [float(weight) for weight in weights]
    _check_request(values, shares, method, options)
    union.refuse_strangers(values, check_base=check_base)
    used = [(value, weight) for value, weight in zip(values, shares, strict=True) if weight]
    shell = union.shell([value for value, _ in used], [weight for _, weight in used])
    result = _METHODS[method].run(shell, _terms(used), options)
    about = {"method": method, "weights": shares}
    about |= {f.name: given for f in fields(options) if (given := getattr(options, f.name)) not in (None, 0)}
    return result.noted("combined", about)


def _terms(used: Sequence[tuple[Adapter, float]]) -> dict[str, list[Term]]:
    """Module path -> what each adapter that has this layer brings to it, in the order of the adapters."""
    terms: dict[str, list[Term]] = {}
    for number, (adapter, weight) in enumerate(used):
        for path, f in adapter.factors.items():
            terms.setdefault(path, []).append(Term(number, f, weight, adapter.scale(path)))
    return terms


# ---------------------------------------------------------------- from factors


def _side_by_side(parts: Sequence[Term]) -> tuple[torch.Tensor, torch.Tensor]:
    """A = [w_1 s_1 A_1; w_2 s_2 A_2; ...], B = [B_1, B_2, ...], within each group; fp64, so that factors two adapters
    have in common stay so when scaled.
    """
    stacks = [(*part.factors.blocks(), part.weight * part.s) for part in parts]
    A = torch.cat([A.detach().double() * scale for A, _, scale in stacks], dim=1)
    return A, torch.cat([B.detach().double() for _, B, _ in stacks], dim=2)


def _bias(shell: Adapter, parts: Sequence[Term]) -> torch.Tensor | None:
    """The sum of w s times B's bias, fp64; zero where one adapter has such biases and none that has this layer does."""
    if not shell.config.lora_bias:
        return None
    B = parts[0].factors.B
    total = B.new_zeros(len(B), dtype=torch.float64)
    for factors, scale in ((part.factors, part.weight * part.s) for part in parts):
        total = total if factors.bias is None else total + factors.bias.detach().double() * scale
    return total


def _cat(shell: Adapter, terms: Mapping[str, list[Term]], options: Options) -> Truncated:
    stacks = {path: _side_by_side(parts) for path, parts in terms.items()}
    factors = {
        path: refactored(_widest(terms[path]), *stack, _bias(shell, terms[path])) for path, stack in stacks.items()
    }
    norms = {path: lowrank.frobenius_norm(*stack) for path, stack in stacks.items()}
    return Truncated(adapter=with_factors(shell, factors), errors=dict.fromkeys(factors, 0.0), norms=norms)


def _linear(shell: Adapter, terms: Mapping[str, list[Term]], options: Options) -> Truncated:
    whole = _cat(shell, terms, options)
    factors = dict(whole.adapter.factors)
    for path, parts in terms.items():
        value = lowrank.svd(*_side_by_side(parts))
        # below it is the rounding of factors; of the terms', which may cancel in the sum
        largest = max(lowrank.frobenius_norm(*p.factors.blocks(), p.weight * p.s) for p in parts)
        carries = largest * 2 * torch.finfo(factors[path].A.dtype).eps
        rank = max(1, int((carries < value.S).sum(-1).max()))
        if rank < factors[path].r // factors[path].rank_shares:
            factors[path] = refactored(factors[path], *lowrank.balanced(value, rank), factors[path].bias)
    return replace(whole, adapter=with_factors(shell, factors))


def _svd(shell: Adapter, terms: Mapping[str, list[Term]], options: Options) -> Truncated:
    whole = _cat(shell, terms, options).adapter
    if options.energy is not None:
        return truncated(whole, energy=options.energy)
    largest = {path: max(part.factors.r for part in parts) for path, parts in terms.items()}
    return truncated(whole, ranks=largest if options.rank is None else dict.fromkeys(terms, options.rank))


# ---------------------------------------------------------------- from elements


def _by_elements(shell: Adapter, terms: Mapping[str, list[Term]], options: Options, recipe: str) -> Truncated:
    """Fuse the dense updates of each layer by a recipe, and keep what a rank can hold."""
    ranks = _ranks(terms, options)
    factors, errors, norms = {}, {}, {}
    for path, parts in terms.items():
        pairs = [(*part.factors.blocks(), part.s) for part in parts]
        dense = [_wide(B) @ _wide(A) * s for A, B, s in pairs]
        target = _fused(recipe, dense, parts, path, options)
        rank = ranks[path] // parts[0].factors.rank_shares
        value = lowrank.dense_svd(target, rank, seeded(options.seed, f"{path}|svd"))
        f = refactored(_widest(parts), *lowrank.balanced(value, value.S.shape[-1]), None)
        A, B = f.blocks()
        factors[path] = f
        errors[path] = float(torch.linalg.vector_norm(target - B @ A, dtype=torch.float64))
        norms[path] = float(torch.linalg.vector_norm(target, dtype=torch.float64))
    return Truncated(adapter=with_factors(shell, factors), errors=errors, norms=norms)


def _knots(shell: Adapter, terms: Mapping[str, list[Term]], options: Options) -> Truncated:
    """KnOTS (arXiv 2410.19735): [D_1, D_2, ...] = U S [V_1, V_2, ...]; the S V_i are fused, and U times that is the
    update. Its rank is that of U, at most the sum of ranks, so nothing is lost.
    """
    ranks = _ranks(terms, options)
    factors, errors, norms = {}, {}, {}
    for path, parts in terms.items():
        Q_B, aligned = _aligned(parts)
        recipe = "ties" if options.inside is None else options.inside
        target = _fused(recipe, aligned, parts, path, options)  # (groups, k, columns)
        value = lowrank.svd(target, Q_B)
        rank = min(ranks[path] // parts[0].factors.rank_shares, value.S.shape[-1])
        factors[path] = refactored(_widest(parts), *lowrank.balanced(value, rank), None)
        errors[path] = math.sqrt(lowrank.energy(value.S[..., rank:]))
        norms[path] = math.sqrt(lowrank.energy(value.S))
    return Truncated(adapter=with_factors(shell, factors), errors=errors, norms=norms)


def _aligned(parts: Sequence[Term]) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The common basis U (groups, out / groups, k) of the updates, and each update in it, S V_i (groups, k, columns),
    from the factors: the s_i B_i A_i are never made. fp64.
    """
    pairs = [(*part.factors.blocks(), part.s) for part in parts]
    Q_B, R_B = torch.linalg.qr(torch.cat([B.double() for _, B, _ in pairs], dim=2))
    bases, cores, start = [], [], 0
    for A, _, s in pairs:
        Q_A, R_A = torch.linalg.qr(A.double().mT)
        cores.append(R_B[:, :, start : start + A.shape[1]] @ R_A.mT * s)
        bases.append(Q_A)
        start += A.shape[1]
    U, S, V = torch.linalg.svd(torch.cat(cores, dim=2), full_matrices=False)
    scaled = (S.unsqueeze(-1) * V).split([core.shape[2] for core in cores], dim=2)
    return Q_B @ U, [own @ Q_A.mT for own, Q_A in zip(scaled, bases, strict=True)]


def _fused(
    recipe: str, updates: list[torch.Tensor], parts: Sequence[Term], path: str, options: Options
) -> torch.Tensor:
    density = 0.5 if options.density is None else options.density
    widest = min(_WIDEST_EPSILON, 2 * density, 2 * (1 - density))
    return consensus.fused(
        consensus.RECIPES[recipe],
        updates,
        [part.weight for part in parts],
        density=density,
        epsilon=widest if options.epsilon is None else options.epsilon,
        generators=[seeded(options.seed, f"{path}|{part.number}") for part in parts],
    )


def _ranks(terms: Mapping[str, list[Term]], options: Options) -> dict[str, int]:
    if options.rank is None:
        return {path: sum(part.factors.r for part in parts) for path, parts in terms.items()}
    ranks = dict.fromkeys(terms, options.rank)
    refuse_ranks_within_groups({path: parts[0].factors for path, parts in terms.items()}, ranks)
    return ranks


def _widest(parts: Sequence[Term]) -> Factors:
    """The factors whose dtype is the widest, as a pattern for the result's."""
    return max((part.factors for part in parts), key=lambda f: f.A.dtype.itemsize)


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach() if tensor.dtype == torch.float64 else tensor.detach().float()


# ---------------------------------------------------------------- the methods


class _Method(NamedTuple):
    run: Callable[[Adapter, Mapping[str, list[Term]], Options], Truncated]
    takes: frozenset[str]


def _elementwise(recipe: str, *more: str) -> _Method:
    def run(shell: Adapter, terms: Mapping[str, list[Term]], options: Options) -> Truncated:
        return _by_elements(shell, terms, options, recipe)

    return _Method(run, frozenset({"density", "rank", *more}))


_METHODS: dict[str, _Method] = {
    "cat": _Method(_cat, frozenset()),
    "linear": _Method(_linear, frozenset()),
    "svd": _Method(_svd, frozenset({"rank", "energy"})),
    "magnitude_prune": _elementwise("magnitude_prune"),
    "ties": _elementwise("ties"),
    "dare_linear": _elementwise("dare_linear"),
    "dare_ties": _elementwise("dare_ties"),
    "della": _elementwise("della", "epsilon"),
    "della_linear": _elementwise("della_linear", "epsilon"),
    "knots": _Method(_knots, frozenset({"density", "rank", "epsilon", "inside"})),
}
METHODS = tuple(_METHODS)
_ON_ELEMENTS = frozenset(name for name, method in _METHODS.items() if "density" in method.takes)


def _check_request(adapters: Sequence[Adapter], weights: Sequence[float], method: str, options: Options) -> None:
    """Refuse, in one error, what cannot be meant.

    Raises:
        AdapterError: with every problem found.
    """
    if method not in _METHODS:
        guess = nearest(method, _METHODS)
        hint = f"did you mean {' or '.join(guess)}?" if guess else f"there are {', '.join(METHODS)}"
        raise AdapterError(f"combine: unknown method {method!r}; {hint}")
    problems = []
    if len(weights) != len(adapters):
        problems.append(f"{len(adapters)} adapters and {len(weights)} weights; give one each")
    if not adapters or not any(weights):
        problems.append("nothing to combine: give at least one adapter with a weight that is not 0")
    problems += [f"weight {weight} is not a finite number" for weight in weights if not math.isfinite(weight)]
    takes = _METHODS[method].takes
    problems += [
        f"{f.name}: {method} does not take it; it takes {', '.join(sorted(takes)) or 'no options'}"
        for f in fields(options)
        if f.name not in takes | {"seed"} and getattr(options, f.name) is not None
    ]
    if method in _ON_ELEMENTS:
        problems += [
            f"{method}: adapter {number} gives its layers biases (lora_bias), which are no elements of a matrix to be "
            f"thinned out or voted on; {', '.join(name for name in METHODS if name not in _ON_ELEMENTS)} add them up"
            for number, adapter in enumerate(adapters, 1)
            if adapter.config.lora_bias
        ]
    problems += _out_of_range(options)
    union.raise_all("combine", problems)


def _out_of_range(options: Options) -> list[str]:
    problems = []
    if options.rank is not None and options.rank < 1:
        problems.append(f"rank: must be at least 1 (got {options.rank})")
    if options.rank is not None and options.energy is not None:
        problems.append("rank and energy: give one of them")
    for name, share in (("energy", options.energy), ("density", options.density)):
        if share is not None and not 0 < share <= 1:
            problems.append(f"{name}: a share in (0, 1] (got {share})")
    density = 0.5 if options.density is None else options.density
    if options.epsilon is not None and not 0 <= options.epsilon / 2 <= min(density, 1 - density):
        problems.append(f"epsilon: density ± epsilon / 2 must lie in [0, 1] (got {density} ± {options.epsilon / 2})")
    if options.inside is not None and options.inside not in consensus.RECIPES:
        problems.append(f"inside: one of {', '.join(consensus.RECIPES)} (got {options.inside!r})")
    elif options.density is not None and options.inside == "linear":
        problems.append("density: inside='linear' leaves every element")
    elif options.epsilon is not None and options.inside is not None and not options.inside.startswith("della"):
        problems.append(f"epsilon: only della takes it, not inside={options.inside!r}")
    return problems
