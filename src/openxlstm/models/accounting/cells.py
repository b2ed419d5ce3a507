"""FLOPs of sequence mixers: the mLSTM in each of its forms, and causal attention.

Per head and sequence of T tokens in chunks of L, with key width k and value width v. Matrix products and
pointwise operations are kept apart, because only the former run on matrix units. Source of the formulas:
arXiv 2510.02228; transcendental functions, maxima and absolute values count 1.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

MLSTMForm = Literal["first", "tfla", "parallel", "recurrent"]
AttentionForm = Literal["distill", "chinchilla"]


class Flops(NamedTuple):
    """FLOPs of a part of a model."""

    products: float
    """In matrix products."""
    pointwise: float = 0.0
    """In everything else."""

    @property
    def total(self) -> float:
        """Both together."""
        return self.products + self.pointwise

    def plus(self, other: Flops) -> Flops:
        """The sum of two parts."""
        return Flops(self.products + other.products, self.pointwise + other.pointwise)

    def times(self, factor: float) -> Flops:
        """The part ``factor`` times."""
        return Flops(factor * self.products, factor * self.pointwise)


def mlstm_cell_flops(
    time: int,
    heads: int,
    qk_dim: int,
    v_dim: int,
    chunk_size: int,
    form: MLSTMForm = "first",
    causal_factor: float = 0.75,
) -> Flops:
    """Forward FLOPs of an mLSTM over one sequence.

    Args:
        time: tokens T.
        heads: number of heads.
        qk_dim, v_dim: widths k and v of one head.
        chunk_size: chunk length L of the two chunkwise forms; T / L need not be whole.
        form: ``"first"``, the chunkwise count of the published training runs; ``"tfla"``, the later, finer
            one of the same study; ``"parallel"`` (quadratic) or ``"recurrent"`` (one step at a time).
        causal_factor: share of a chunk's square that is computed, in the "tfla" form for chunks above 64 and
            in the "parallel" form. 0.5 is an exact triangle, 1 the whole square.

    Raises:
        ValueError: an unknown form.
    """
    length, k, v, share = chunk_size, qk_dim, v_dim, causal_factor
    if form == "first":
        products = 4 * length * k * v + 2 * length**2 * (k + v)
        pointwise = length * (length + 1) / 2 + 2 * length + 5 + 5 * length
        pointwise += 2 * k * v + 3 * length * k + 2 * k + 4 * length * k
        pointwise += length * (length + 1) / 2 + 10 * length**2 + 2 * length + 7 * length + 2 * length * v
        return Flops(products, pointwise).times(heads * (time / length))
    if form == "tfla":
        share = share if length > 64 else 1.0
        products = 4 * length * k * v + share * 2 * length**2 * (k + v)
        pointwise = _tfla_recurrent(length, k, v) - 2 * length * k * v
        pointwise += length * (length + 1) / 2 + 2 * length + share * (8 * length**2 + 2 * length)  # intra
        pointwise += 3 * length * k  # inter
        pointwise += 2 * length * v + 4 * length  # combine
        return Flops(products, pointwise).times(heads * (time / length))
    if form == "parallel":
        products = share * 2 * time**2 * (k + v)
        pointwise = time * (time + 1) / 2 + 2 * time + 6 * time**2
        pointwise += share * (2 * time**2 + 4 * time**2 + 2 * time)
        return Flops(products, pointwise).times(heads)
    if form == "recurrent":
        return Flops(2 * k * v, 4 * k * v + 7 * k + v + 12).times(heads * time)
    raise ValueError(f"unknown form {form!r} of the mLSTM: use 'first', 'tfla', 'parallel' or 'recurrent'")


def mlstm_backward_flops(
    time: int, heads: int, qk_dim: int, v_dim: int, chunk_size: int, causal_factor: float = 0.75
) -> Flops:
    """Backward FLOPs of the chunkwise mLSTM, counted (the runs of the study charge twice the forward pass).

    States are computed again, as kernels do. Arguments as for :func:`mlstm_cell_flops`.
    """
    length, k, v = chunk_size, qk_dim, v_dim
    share = causal_factor if length > 64 else 1.0
    total = _tfla_recurrent(length, k, v)
    total += length * (length + 1) / 2 + 3 * (length + 1) + 2 * length  # gradient of the states
    total += 2 * k * v + 2 * length * k * v + length * k
    total += length * (length + 1) + 4 * length  # within the chunk
    total += share * (2 * length**2 * k + 6 * length**2 + 4 * length**2 * (k + v) + 3 * length**2)
    total += 8 * length * k * v + 4 * length * k + 5 * length  # between chunks
    products = 12 * length * k * v + share * (6 * length**2 * k + 4 * length**2 * v)
    gates = time * (time + 1) / 2 + 8 * time * heads * k
    count = Flops(products, total - products).times(heads * (time / length))
    return count.plus(Flops(0.0, gates))


def _tfla_recurrent(length: int, k: int, v: int) -> float:
    """One chunk's step from state to state: gates, decay, K^T V, normaliser."""
    gates = 2 * length + length * (length + 1) / 2 + 4 * length + 5
    return gates + 2 * k * v + 2 * length * k * v + 3 * length * k + 2 * k


def least_mlstm_flops(
    time: int, heads: int, qk_dim: int, v_dim: int, chunk_size: int = 64, backward: bool = True
) -> float:
    """Matrix products that no chunkwise implementation can leave out: exact triangles, states once.

    The yardstick of the kernel benchmarks; ``backward`` includes the backward pass.
    """
    causal = (chunk_size + 1) / (2 * chunk_size)
    total = 4 * qk_dim * v_dim + 2 * causal * chunk_size * (qk_dim + v_dim)
    if backward:
        total += 8 * qk_dim * v_dim + 2 * causal * chunk_size * (3 * qk_dim + 2 * v_dim)
    return time * heads * total


def attention_flops(time: int, heads: int, head_dim: int, form: AttentionForm = "distill") -> Flops:
    """Forward FLOPs of causal attention over one sequence.

    Args:
        time: tokens T.
        heads: query heads.
        head_dim: width of a head.
        form: ``"distill"``, causal, half of the square (Busbridge et al. 2025; the study's figures);
            ``"chinchilla"``, the whole square (Hoffmann et al. 2022).

    Raises:
        ValueError: an unknown form.
    """
    if form == "distill":
        return Flops(2 * time**2 * heads * head_dim, 2.5 * time**2 * heads)
    if form == "chinchilla":
        return Flops(4 * time**2 * heads * head_dim, 3 * time**2 * heads)
    raise ValueError(f"unknown form {form!r} of attention: use 'distill' or 'chinchilla'")
