"""SparseCodes: what an encoder returns and a decoder takes."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor


class SparseCodes:
    """Sparse activations of d_sae latents for any number of tokens, in CSR.

    With exactly k entries for each token, `values` and `indices` are [n_tokens, k] and `offsets` is None. Otherwise
    both are flat, [nnz], and token n owns the entries offsets[n] up to offsets[n + 1]. Nothing here makes a
    [n_tokens, d_sae] tensor but `to_dense`.

    Args:
        values: [n_tokens, k] or [nnz], floating.
        indices: the latent of each entry, int32 (int64 is converted), the shape of `values`.
        d_sae: number of latents.
        offsets: int64 [n_tokens + 1], or None.
        leading_shape: the shape the tokens had before they were flattened; [n_tokens] by default.

    Raises:
        TypeError: a dtype other than those above.
        ValueError: shapes that do not fit, offsets that fall or overrun, an index outside [0, d_sae).
    """

    __slots__ = ("d_sae", "indices", "input_statistics", "leading_shape", "offsets", "values")

    values: Tensor
    indices: Tensor
    offsets: Tensor | None
    d_sae: int
    leading_shape: torch.Size
    # Mean and standard deviation [..., 1] of the input where layer norm was applied to it: decoding undoes it.
    input_statistics: tuple[Tensor, Tensor] | None

    def __init__(
        self,
        values: Tensor,
        indices: Tensor,
        d_sae: int,
        *,
        offsets: Tensor | None = None,
        leading_shape: Sequence[int] | None = None,
    ):
        _validate(values, indices, d_sae, offsets)
        n_tokens = values.shape[0] if offsets is None else offsets.numel() - 1
        shape = torch.Size((n_tokens,) if leading_shape is None else leading_shape)
        if math.prod(shape) != n_tokens:
            raise ValueError(
                f"leading_shape = {tuple(shape)} has {math.prod(shape)} places: expected {n_tokens}, one for each token"
            )
        self.values, self.indices, self.offsets = values, indices.to(torch.int32), offsets
        self.d_sae, self.leading_shape, self.input_statistics = d_sae, shape, None

    @classmethod
    def _trusted(
        cls,
        values: Tensor,
        indices: Tensor,
        offsets: Tensor | None,
        d_sae: int,
        leading_shape: Sequence[int],
        input_statistics: tuple[Tensor, Tensor] | None = None,
    ) -> "SparseCodes":
        """Codes that fastsae itself made: no check, so no synchronisation with a GPU."""
        codes = cls.__new__(cls)
        codes.values, codes.indices, codes.offsets = values, indices, offsets
        codes.d_sae, codes.leading_shape = d_sae, torch.Size(leading_shape)
        codes.input_statistics = input_statistics
        return codes

    @classmethod
    def from_dense(cls, dense: Tensor) -> "SparseCodes":
        """The non-zero entries (NaN included) of dense activations [..., d_sae], in CSR."""
        if not isinstance(dense, Tensor) or not dense.is_floating_point() or dense.dim() == 0:
            kind = f"{dense.dtype} {tuple(dense.shape)}" if isinstance(dense, Tensor) else type(dense).__name__
            raise TypeError(f"dense is {kind}: expected a floating tensor [..., d_sae]")
        flat = dense.reshape(math.prod(dense.shape[:-1]), dense.shape[-1])
        tokens, latents = (flat != 0).nonzero(as_tuple=True)
        counts = torch.bincount(tokens, minlength=flat.shape[0])
        offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        return cls._trusted(flat[tokens, latents], latents.int(), offsets, dense.shape[-1], dense.shape[:-1])

    @property
    def n_tokens(self) -> int:
        return self.values.shape[0] if self.offsets is None else self.offsets.shape[0] - 1

    @property
    def k(self) -> int | None:
        """Entries of each token, where that is one number."""
        return self.values.shape[1] if self.offsets is None else None

    @property
    def nnz(self) -> int:
        """Stored entries; an entry may be zero (a pick that ReLU has cut)."""
        return self.values.numel()

    @property
    def shape(self) -> torch.Size:
        """The shape of `to_dense()`: [..., d_sae]."""
        return torch.Size((*self.leading_shape, self.d_sae))

    @property
    def dtype(self) -> torch.dtype:
        return self.values.dtype

    @property
    def device(self) -> torch.device:
        return self.values.device

    def tokens(self) -> Tensor:
        """The token of each entry, int64, the shape of `values`."""
        if self.offsets is None:
            tokens = torch.arange(self.n_tokens, device=self.device)
            return tokens[:, None].expand(self.indices.shape)
        return torch.arange(self.n_tokens, device=self.device).repeat_interleave(
            self.offsets.diff(), output_size=self.nnz
        )

    def with_values(self, values: Tensor) -> "SparseCodes":
        """The same places with other values (of the same shape)."""
        if values.shape != self.values.shape:
            raise ValueError(f"values has shape {tuple(values.shape)}: expected {tuple(self.values.shape)}")
        return SparseCodes._trusted(
            values, self.indices, self.offsets, self.d_sae, self.leading_shape, self.input_statistics
        )

    def relu(self) -> "SparseCodes":
        """max(value, 0) at every place; what becomes zero stays stored and gets no gradient."""
        return self.with_values(self.values.relu())

    def detach(self) -> "SparseCodes":
        """The same codes outside autograd's graph."""
        return self.with_values(self.values.detach())

    def to(self, *args, **kwargs) -> "SparseCodes":
        """As `Tensor.to`: a device, a dtype (of the values) or both."""
        values = self.values.to(*args, **kwargs)
        offsets = None if self.offsets is None else self.offsets.to(values.device)
        statistics = self.input_statistics and tuple(part.to(*args, **kwargs) for part in self.input_statistics)
        return SparseCodes._trusted(
            values, self.indices.to(values.device), offsets, self.d_sae, self.leading_shape, statistics
        )

    def to_dense(self) -> Tensor:
        """[..., d_sae] with zeros where there is no entry; differentiable in the values. Entries of one place add."""
        dense = self.values.new_zeros(self.n_tokens * self.d_sae)
        places = self.tokens() * self.d_sae + self.indices
        return dense.index_add(0, places.reshape(-1), self.values.reshape(-1)).reshape(self.shape)

    def to_sparse_csr(self) -> Tensor:
        """A torch.sparse_csr tensor [n_tokens, d_sae], each row's columns ascending."""
        tokens, latents = self.tokens().reshape(-1), self.indices.reshape(-1).long()
        order = (tokens * self.d_sae + latents).argsort(stable=True)
        offsets = self.offsets
        if offsets is None:
            offsets = torch.arange(self.n_tokens + 1, device=self.device) * self.values.shape[1]
        return torch.sparse_csr_tensor(
            offsets,
            latents[order],
            self.values.reshape(-1)[order],
            size=(self.n_tokens, self.d_sae),
            check_invariants=False,
        )

    def l0(self) -> Tensor:
        """Non-zero latents of each token: int64, the leading shape. Their mean is the L0 of the literature."""
        counts = torch.zeros(self.n_tokens, dtype=torch.int64, device=self.device)
        active = (self.values != 0).long()
        return counts.index_add(0, self.tokens().reshape(-1), active.reshape(-1)).reshape(self.leading_shape)

    def feature_counts(self) -> Tensor:
        """How many tokens each latent is non-zero in: int64 [d_sae]."""
        counts = torch.zeros(self.d_sae, dtype=torch.int64, device=self.device)
        active = (self.values.detach() != 0).long()
        return counts.index_add(0, self.indices.reshape(-1), active.reshape(-1))

    def rows(self, tokens: int | slice | Tensor) -> "SparseCodes":
        """The codes of some tokens, by position in the flattened order: an int, a slice, or an index or bool tensor."""
        chosen = torch.arange(self.n_tokens, device=self.device)[tokens].reshape(-1)
        if self.offsets is None:
            values, indices, offsets = self.values[chosen], self.indices[chosen], None
        else:
            counts = self.offsets.diff()[chosen]
            offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
            first = (self.offsets[chosen] - offsets[:-1]).repeat_interleave(counts)
            places = first + torch.arange(first.numel(), device=self.device)
            values, indices = self.values[places], self.indices[places]
        statistics = self.input_statistics
        if statistics is not None:
            statistics = tuple(part.reshape(-1, 1)[chosen] for part in statistics)
        return SparseCodes._trusted(values, indices, offsets, self.d_sae, (chosen.numel(),), statistics)

    def __len__(self) -> int:
        return self.n_tokens

    def __repr__(self) -> str:
        entries = f"k={self.k}" if self.offsets is None else f"nnz={self.nnz}"
        return f"SparseCodes(shape={tuple(self.shape)}, {entries}, dtype={self.dtype}, device='{self.device}')"


def _validate(values: Tensor, indices: Tensor, d_sae: int, offsets: Tensor | None) -> None:
    if not isinstance(values, Tensor) or not values.is_floating_point():
        raise TypeError(f"values is {getattr(values, 'dtype', type(values))}: expected a floating tensor")
    if not isinstance(indices, Tensor) or indices.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"indices is {getattr(indices, 'dtype', type(indices))}: expected int32 or int64")
    if isinstance(d_sae, bool) or not isinstance(d_sae, int) or not 1 <= d_sae < 2**31:
        raise ValueError(f"d_sae = {d_sae!r}: expected an int in [1, 2^31)")
    dimensions = 2 if offsets is None else 1
    if values.dim() != dimensions or values.shape != indices.shape:
        expected = "[n_tokens, k] for both" if offsets is None else "[nnz] for both"
        raise ValueError(
            f"values has shape {tuple(values.shape)} and indices {tuple(indices.shape)}: expected {expected}"
        )
    if values.device != indices.device:
        raise ValueError(f"values is on {values.device} and indices on {indices.device}: move one to the other")
    if offsets is not None:
        if not isinstance(offsets, Tensor):
            raise TypeError(f"offsets is a {type(offsets).__name__}: expected an int64 tensor or None")
        if offsets.device != values.device:
            raise ValueError(f"offsets is on {offsets.device} and values on {values.device}: move one to the other")
        if offsets.dtype != torch.int64 or offsets.dim() != 1 or offsets.numel() < 1:
            raise ValueError(f"offsets is {offsets.dtype} {tuple(offsets.shape)}: expected int64 [n_tokens + 1]")
        bad = offsets[0] != 0 or offsets[-1] != values.numel() or (offsets.diff() < 0).any()
        if bad:
            raise ValueError(
                f"offsets run from {int(offsets[0])} to {int(offsets[-1])}: expected from 0 to nnz = {values.numel()}, "
                "never falling"
            )
    if indices.numel():
        low, high = int(indices.min()), int(indices.max())
        if low < 0 or high >= d_sae:
            raise ValueError(f"indices run from {low} to {high}: expected them in [0, {d_sae}) (d_sae = {d_sae})")
