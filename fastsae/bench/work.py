"""Counted work: floating-point operations and bytes that the maths of a phase cannot do without."""

from dataclasses import dataclass

from fastsae.bench.shapes import Shape

# Adam reads parameter, gradient and two moments and writes three of them, all of the parameter's width; projecting
# reads W_dec and its gradient and writes that; normalising reads and writes W_dec.
_ADAM_ACCESSES = 7
_PROJECT_ACCESSES = 3
_NORMALIZE_ACCESSES = 2
_INDEX = 4


@dataclass(frozen=True)
class Work:
    """What a rate is counted against: GFLOP/s where a phase computes, GB/s where it moves memory."""

    flops: int = 0
    bytes: int = 0


def gemm(shape: Shape) -> Work:
    """x @ W_enc."""
    return Work(flops=2 * shape.n_tokens * shape.d_in * shape.d_sae)


def gemms(shape: Shape, count: int) -> Work:
    return Work(flops=count * gemm(shape).flops)


def gathers(shape: Shape, count: int) -> int:
    """FLOPs of `count` products of the codes with rows of d_in."""
    return count * 2 * shape.nnz * shape.d_in


def decode(shape: Shape, itemsize: int) -> Work:
    """A row of W_dec for each entry, a row of y for each token."""
    rows = shape.nnz + shape.n_tokens
    return Work(bytes=rows * shape.d_in * itemsize + shape.nnz * (itemsize + _INDEX))


def squared_error(shape: Shape, itemsize: int) -> Work:
    """What decode moves, and the target's rows."""
    return Work(bytes=decode(shape, itemsize).bytes + shape.n_tokens * shape.d_in * itemsize)


# One row of g a token is read instead of one of y written, a value an entry written instead of read.
sampled_dot = decode


def accumulate_rows(shape: Shape, itemsize: int) -> Work:
    """A row of g for each entry and a row of the gradient for each latent, after a transposition of the codes."""
    rows = shape.nnz + shape.d_sae
    return Work(bytes=rows * shape.d_in * itemsize + transpose(shape).bytes + shape.nnz * (itemsize + _INDEX + 8))


def transpose(shape: Shape) -> Work:
    """Indices in; tokens (int32), entries (int64) and latent offsets (int64) out."""
    return Work(bytes=shape.nnz * (_INDEX + 4 + 8) + 8 * (shape.d_sae + 1))


def project_rows(shape: Shape, itemsize: int) -> Work:
    return Work(bytes=_PROJECT_ACCESSES * shape.d_in * shape.d_sae * itemsize)


def normalize_rows(shape: Shape, itemsize: int) -> Work:
    return Work(bytes=_NORMALIZE_ACCESSES * shape.d_in * shape.d_sae * itemsize)


def update(shape: Shape, itemsize: int) -> Work:
    adam = _ADAM_ACCESSES * shape.parameters * itemsize
    return Work(bytes=adam + project_rows(shape, itemsize).bytes + normalize_rows(shape, itemsize).bytes)


def sparse_backward(shape: Shape, itemsize: int) -> Work:
    """The gradients of the values, of W_dec and of W_enc, and one transposition for both."""
    weights = 2 * (accumulate_rows(shape, itemsize).bytes - transpose(shape).bytes)
    return Work(bytes=sampled_dot(shape, itemsize).bytes + weights + transpose(shape).bytes)


def sparse_phases(shape: Shape, itemsize: int) -> dict[str, Work]:
    """One GEMM and four gathers: the decoder's forward, its gradient to the values, and both weights' gradients."""
    one = gemm(shape).flops
    return {
        "encode": gemm(shape),
        "decode": decode(shape, itemsize),
        "forward": Work(flops=one + gathers(shape, 1)),
        "backward": sparse_backward(shape, itemsize),
        "update": update(shape, itemsize),
        "step": Work(flops=one + gathers(shape, 4)),
    }


def dense_phases(shape: Shape, itemsize: int) -> dict[str, Work]:
    """Six GEMMs: encode, decode, and the gradients of codes, W_dec, W_enc and x - b_dec."""
    return {
        "encode": gemm(shape),
        "decode": gemm(shape),
        "forward": gemms(shape, 2),
        "backward": gemms(shape, 4),
        "update": update(shape, itemsize),
        "step": gemms(shape, 6),
    }
