"""pre[n, f] = <x_n - b_dec, w_f> + b_enc[f] in tiles of [BLOCK_M tokens, BLOCK_N latents], accumulated in float32.

b_dec. float32 inputs are centred as their tiles are loaded, as the reference does. A half-precision x - b_dec would
have to be rounded again to enter a tensor core, a relative error of 2^-9 (bfloat16) of each activation; instead b_dec
is folded into the bias, pre = <x_n, w_f> + (b_enc[f] - <b_dec, w_f>), products exact, sums in float32. Where b_dec is
large the two sums cancel and leave the rounding of float32, 2^-24 of |x||w|; x itself is only known to 2^-9 of |x|
(2^-12 for float16), so the folded form stays below what plain PyTorch loses until |x - b_dec| is thousands of times
smaller than |x|, where the stored x says little either. It costs one pass over W_enc a call (`bias_kernel`).

Access. A tile walks d_in in steps of BLOCK_K through Triton's pipeline of asynchronous copies; programs go through
the grid in groups of _GROUP_M row blocks, so that those running together share their tiles of x and W_enc in L2. Rows
and latents past the end repeat the last one (nothing reads them), so only a d_in off BLOCK_K needs masks.

What becomes of a tile: `scores_kernel` writes it; `survivors_kernel` compares it in registers with each row's
threshold and appends the few that pass behind the row's best, by one integer atomic each for the place. The order in
which they arrive differs from run to run; the set does not, and its order is decided by keys (selection.py). Of a
chunk as long as all latents before it, about k a row pass, so the bytes written are k · 8 a row, not 4 a score.

Tiles: 128 x 256 with 8 warps keep 128 sums a thread and do 85 operations a byte of shared memory read, what a Hopper
tensor core needs; 3 stages of 48 KiB fit the 163 KiB of an A100. Appending wants registers of its own, so it goes by
slices of a tile: 16 columns of a wide tile or of one of exact float32, 32 of the others, fit without spilling. A tile
that is written is 128 wide (256 spill on sm_80, and a seed of 2,048 latents has few tiles), and so is any on sm_100,
where no slice of the wide tile fits. tf32 factors are twice as wide: 128 x 128 in steps of 32. Exact float32 runs on
the ordinary units: 64 x 64, 32 sums a thread and the factors of 16 steps. Registers are those the compiler reports; no
GPU has run this yet.
"""

import triton
import triton.language as tl

from fastsae.backends.triton.selection import pairs_of

_GROUP_M = tl.constexpr(8)


@triton.jit
def _tile_of_program(n_rows, f_count, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """(row block, latent block) of this program: _GROUP_M row blocks by all latent blocks, then the next group."""
    row_blocks, latent_blocks = tl.cdiv(n_rows, BLOCK_M), tl.cdiv(f_count, BLOCK_N)
    program, group_size = tl.program_id(0), _GROUP_M * latent_blocks
    first = program // group_size * _GROUP_M
    rows_of_group = tl.minimum(row_blocks - first, _GROUP_M)
    return first + program % group_size % rows_of_group, program % group_size // rows_of_group


@triton.jit
def _tile(
    x, w, b_dec, bias, rows, latents, n_rows, f_end, d_in, x_stride, w_stride,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr, CENTRE: tl.constexpr, BIAS: tl.constexpr, RELU: tl.constexpr,
    PRECISION: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    steps = tl.arange(0, BLOCK_K)
    x_tile = x + tl.minimum(rows, n_rows - 1).to(tl.int64)[:, None] * x_stride + steps[None, :]
    w_tile = w + tl.minimum(latents, f_end - 1).to(tl.int64)[None, :] * w_stride + steps[:, None]
    scores = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, d_in, BLOCK_K):
        if EVEN_K:
            left = tl.load(x_tile)
            right = tl.load(w_tile)
            if CENTRE:
                left -= tl.load(b_dec + start + steps)[None, :]
        else:
            inside = start + steps < d_in
            left = tl.load(x_tile, mask=inside[None, :], other=0.0)
            right = tl.load(w_tile, mask=inside[:, None], other=0.0)
            if CENTRE:
                left -= tl.load(b_dec + start + steps, mask=inside, other=0.0)[None, :]
        if WIDEN:
            left, right = left.to(tl.float32), right.to(tl.float32)
        scores = tl.dot(left, right, scores, input_precision=PRECISION)
        x_tile += BLOCK_K
        w_tile += BLOCK_K
    if BIAS:
        scores += tl.load(bias + tl.minimum(latents, f_end - 1)).to(tl.float32)[None, :]
    if RELU:
        scores = tl.where(scores <= 0.0, 0.0, scores)
    return scores


@triton.jit(do_not_specialize=["n_rows", "f_begin", "f_count"])
def scores_kernel(
    x, w, b_dec, bias, scores, counts, width, capacity, n_rows, f_begin, f_count, d_in, x_stride, w_stride,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr, CENTRE: tl.constexpr, BIAS: tl.constexpr, RELU: tl.constexpr,
    PRECISION: tl.constexpr, WIDEN: tl.constexpr, REDO: tl.constexpr,
):  # fmt: skip
    """scores [n_rows, width] of latents f_begin, ...; with REDO only row blocks that hold an overflowed row."""
    row_block, latent_block = _tile_of_program(n_rows, f_count, BLOCK_M, BLOCK_N)
    rows = row_block * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = latent_block * BLOCK_N + tl.arange(0, BLOCK_N)
    if REDO:
        count = tl.load(counts + rows, mask=rows < n_rows, other=0)
        if tl.max(count, axis=0) <= capacity:
            return
    found = _tile(
        x, w, b_dec, bias, rows, f_begin + columns, n_rows, f_begin + f_count, d_in, x_stride, w_stride,
        BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K, CENTRE, BIAS, RELU, PRECISION, WIDEN,
    )  # fmt: skip
    inside = (rows < n_rows)[:, None] & (columns < f_count)[None, :]
    tl.store(scores + rows.to(tl.int64)[:, None] * width + columns[None, :], found, mask=inside)


@triton.jit
def _append_slices(found, latents, threshold, inside, pairs, counts, f_end, capacity, SLICE: tl.constexpr):
    """`_append` of SLICE columns after SLICE columns."""
    rows: tl.constexpr = found.shape[0]
    columns: tl.constexpr = found.shape[1]
    if columns <= SLICE:
        _append(found, latents, threshold, inside, pairs, counts, f_end, capacity)
    else:
        left, right = tl.split(tl.permute(tl.reshape(found, [rows, 2, columns // 2]), [0, 2, 1]))
        low, high = tl.split(tl.permute(tl.reshape(latents, [2, columns // 2]), [1, 0]))
        _append_slices(left, low, threshold, inside, pairs, counts, f_end, capacity, SLICE)
        _append_slices(right, high, threshold, inside, pairs, counts, f_end, capacity, SLICE)


@triton.jit
def _append(found, latents, threshold, inside, pairs, counts, f_end, capacity):
    rows = tl.arange(0, found.shape[0])
    # Not "above": a NaN passes too. Where the k-th best is NaN itself the threshold is +inf, so that nothing else does;
    # a row of them overflows and is redone.
    passes = ((found <= threshold[:, None]) == 0) & (latents < f_end)[None, :]
    number = passes.to(tl.int32)
    total = tl.sum(number, axis=1)
    base = tl.atomic_add(counts + rows, total, mask=inside & (total > 0), sem="relaxed")
    # Rows past the end have no place.
    base = tl.where(inside, base, capacity)
    place = base[:, None] + tl.cumsum(number, axis=1) - 1
    spot = pairs + (rows[:, None] * capacity + place)
    tl.store(spot, pairs_of(found, latents[None, :]), mask=passes & (place < capacity))


@triton.jit(do_not_specialize=["n_rows", "f_begin", "f_count"])
def survivors_kernel(
    x, w, b_dec, bias, pairs, counts, thresholds, capacity, n_rows, f_begin, f_count, d_in, x_stride, w_stride,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr, CENTRE: tl.constexpr, BIAS: tl.constexpr, RELU: tl.constexpr,
    PRECISION: tl.constexpr, WIDEN: tl.constexpr, SLICE: tl.constexpr,
):  # fmt: skip
    """Appends the latents f_begin, ... of a score above its row's threshold to pairs [n_rows, capacity].

    `counts` grows by all of them; what finds no place is not written, and a count past the capacity tells of it.
    """
    row_block, latent_block = _tile_of_program(n_rows, f_count, BLOCK_M, BLOCK_N)
    rows = row_block * BLOCK_M + tl.arange(0, BLOCK_M)
    latents = f_begin + latent_block * BLOCK_N + tl.arange(0, BLOCK_N)
    found = _tile(
        x, w, b_dec, bias, rows, latents, n_rows, f_begin + f_count, d_in, x_stride, w_stride,
        BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K, CENTRE, BIAS, RELU, PRECISION, WIDEN,
    )  # fmt: skip
    inside = rows < n_rows
    threshold = tl.load(thresholds + rows, mask=inside, other=0.0)
    first = row_block.to(tl.int64) * BLOCK_M
    _append_slices(
        found, latents, threshold, inside, pairs + first * capacity, counts + first, f_begin + f_count, capacity, SLICE
    )


@triton.jit(do_not_specialize=["d_sae"])
def bias_kernel(
    w, b_dec, b_enc, out, d_sae, d_in, w_stride,
    BLOCK_F: tl.constexpr, BLOCK_K: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """out[f] = b_enc[f] - <b_dec, w_f>, float32: W_enc is read once, BLOCK_F latents a program."""
    latents = tl.program_id(0) * BLOCK_F + tl.arange(0, BLOCK_F)
    inside = latents < d_sae
    steps = tl.arange(0, BLOCK_K)
    w_tile = w + tl.minimum(latents, d_sae - 1).to(tl.int64)[:, None] * w_stride + steps[None, :]
    sums = tl.zeros([BLOCK_F, BLOCK_K], tl.float32)
    for start in range(0, d_in, BLOCK_K):
        left = tl.load(w_tile, mask=(start + steps < d_in)[None, :], other=0.0).to(tl.float32)
        right = tl.load(b_dec + start + steps, mask=start + steps < d_in, other=0.0).to(tl.float32)
        sums += left * right[None, :]
        w_tile += BLOCK_K
    folded = -tl.sum(sums, axis=1)
    if BIAS:
        folded += tl.load(b_enc + latents, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + latents, folded, mask=inside)
