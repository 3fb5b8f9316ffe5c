"""The k best of each row so far: what the encoder keeps between chunks of latents.

A candidate is a pair of 64 bits: the float32 pre-activation (times its latent's scale, if there is one) in the high
half, the latent in the low half. It ranks by its key: the value's bits made order-preserving (NaN above +inf, -0 as
+0), then the complement of the latent, so that one signed compare is the whole order and no two candidates tie: the
result does not depend on the order in which candidates arrived. A row's candidates lie in `pairs` [rows, capacity],
the k best first and sorted once a chunk has been merged; `counts` says how many there are and `thresholds` the k-th
best value. A later latent needs more than that value to get in, since a tie goes to the lower index.

Two kernels keep that state. `select_kernel` reads a chunk's scores [rows, width] in blocks, and sorts a block only if
something in it is above the row's threshold: once the threshold is tight that is a load and a compare a score.
`merge_kernel` takes in candidates that the product appended by itself (gemm.survivors_kernel). Both reduce by
bitonic networks held in registers; those of Triton's own `tl.sort` differ between releases and crawl in its
interpreter, which runs their xor reduction element by element.
"""

import triton
import triton.language as tl

# Below the key of every candidate: that of -inf is -0x7f800001 << 32 or more.
_NOTHING = tl.constexpr(-(1 << 63))
_LOW = tl.constexpr(0x7FFFFFFF)


@triton.jit
def pairs_of(scores, latents):
    """Candidates of float32 scores and their latents."""
    return (scores.to(tl.int32, bitcast=True).to(tl.int64) << 32) | latents.to(tl.int64)


@triton.jit
def _keys_of(pairs):
    scores = (pairs >> 32).to(tl.int32).to(tl.float32, bitcast=True)
    bits = tl.where(scores == 0.0, 0, (pairs >> 32).to(tl.int32))
    ordered = tl.where(scores == scores, bits ^ ((bits >> 31) & _LOW), _LOW)
    return (ordered.to(tl.int64) << 32) | (_LOW - (pairs & _LOW))


@triton.jit
def _pairs_of_keys(keys):
    # The map of the value's bits is its own inverse; NaN comes back as 0x7fffffff, which is one.
    ordered = (keys >> 32).to(tl.int32)
    bits = ordered ^ ((ordered >> 31) & _LOW)
    return (bits.to(tl.int64) << 32) | (_LOW - (keys & _LOW))


@triton.constexpr_function
def _log2(n):
    return n.bit_length() - 1


@triton.jit
def _is_upper(rank: tl.constexpr, axis: tl.constexpr):
    """0 and 1 along one axis of a hypercube of 2s."""
    return tl.reshape(tl.arange(0, 2), [1] * axis + [2] + [1] * (rank - axis - 1))


@triton.jit
def _exchanged(cube, rank: tl.constexpr, axis: tl.constexpr, alternating: tl.constexpr):
    """Pairs along `axis` put larger first, or the other way where the place along axis `alternating` is 1."""
    other = tl.sum(cube, axis=axis, keep_dims=True) - cube
    second = _is_upper(rank, axis)
    if alternating >= 0:
        second = second ^ _is_upper(rank, alternating)
    return tl.where((cube > other) != (second == 0), other, cube)


@triton.jit
def _merged(cube, rank: tl.constexpr, stage: tl.constexpr, alternate: tl.constexpr):
    """Sorts bitonic runs of 2^stage: descending, or every other run ascending."""
    for step in tl.static_range(stage):
        cube = _exchanged(cube, rank, rank - stage + step, rank - stage - 1 if alternate else -1)
    return cube


@triton.jit
def _halved(cube, rank: tl.constexpr, log_k: tl.constexpr, alternate: tl.constexpr):
    """Of two sorted runs of 2^log_k, one each way, the larger of each pair are the largest, and a bitonic run."""
    return _merged(tl.max(cube, axis=rank - 1 - log_k), rank - 1, log_k, alternate)


@triton.jit
def best_of(keys, K: tl.constexpr):
    """The K largest of each row of `keys` [rows, width], sorted; powers of two. Ends as soon as K are left."""
    if K == 1:
        best = tl.max(keys, axis=1, keep_dims=True)
    else:
        log_rows: tl.constexpr = _log2(keys.shape[0])
        log_k: tl.constexpr = _log2(K)
        log_width: tl.constexpr = _log2(keys.shape[1])
        cube = tl.reshape(keys, [2] * (log_rows + log_width))
        for stage in tl.static_range(1, log_k + 1):
            cube = _merged(cube, log_rows + log_width, stage, stage < log_width)
        for halving in tl.static_range(log_width - log_k):
            cube = _halved(cube, log_rows + log_width - halving, log_k, log_width - halving - 1 > log_k)
        best = tl.reshape(cube, [keys.shape[0], K])
    return best


@triton.jit
def _joined(rising, falling, K: tl.constexpr):
    """The K largest of two sorted lists of K, one each way: the larger of each pair; rising."""
    best = tl.maximum(rising, falling)
    if K > 1:
        log_rows: tl.constexpr = _log2(rising.shape[0])
        log_k: tl.constexpr = _log2(K)
        # Complements fall where the keys rise.
        cube = _merged(tl.reshape(~best, [2] * (log_rows + log_k)), log_rows + log_k, log_k, False)
        best = ~tl.reshape(cube, [rising.shape[0], K])
    return best


@triton.jit
def _value_of(keys):
    """The value of each key; +inf for NaN, so that `score <= value` fails for a NaN score alone."""
    ordered = (keys >> 32).to(tl.int32)
    value = (ordered ^ ((ordered >> 31) & _LOW)).to(tl.float32, bitcast=True)
    return tl.where(value == value, value, float("inf"))


@triton.jit(do_not_specialize=["n_rows", "f_begin", "f_count", "k"])
def select_kernel(
    scores, scale, pairs, counts, thresholds, n_rows, f_begin, f_count, width, k, capacity,
    FIRST: tl.constexpr, REDO: tl.constexpr, SCALE: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """Merges scores [n_rows, f_count] (row stride `width`) of latents f_begin, ... into the state.

    FIRST starts from nothing. REDO serves the rows whose candidates overflowed, and no others. With SCALE a latent's
    scores count times its scale, and that is what the state holds.
    """
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    wanted = rows < n_rows
    if REDO:
        wanted = wanted & (tl.load(counts + rows, mask=wanted, other=0) > capacity)
        if tl.max(wanted.to(tl.int32), axis=0) == 0:
            return
    # Held rising, the best last, as `_joined` wants them.
    places = K - 1 - tl.arange(0, K)[None, :]
    state = pairs + rows[:, None] * capacity + places
    kept = wanted[:, None] & (places < k)
    best = tl.full([ROWS, K], _NOTHING, tl.int64)
    threshold = tl.full([ROWS], _NOTHING, tl.int64)
    if not FIRST:
        best = tl.where(kept, _keys_of(tl.load(state, mask=kept, other=0)), _NOTHING)
        threshold = tl.sum(tl.where(places == k - 1, best, 0), axis=1)
    for start in range(0, f_count, BLOCK):
        columns = start + tl.arange(0, BLOCK)[None, :]
        inside = wanted[:, None] & (columns < f_count)
        found = tl.load(scores + rows[:, None] * width + columns, mask=inside, other=0.0)
        if SCALE:
            found *= tl.load(scale + f_begin + columns, mask=columns < f_count, other=1.0)
        keys = _keys_of(pairs_of(found, f_begin + columns))
        above = inside & (keys > threshold[:, None])
        if tl.max(tl.max(above.to(tl.int32), axis=1), axis=0) != 0:
            entering = best_of(tl.where(above, keys, _NOTHING), K)
            best = _joined(best, entering, K)
            threshold = tl.sum(tl.where(places == k - 1, best, 0), axis=1)
    tl.store(state, _pairs_of_keys(best), mask=kept)
    tl.store(thresholds + rows, _value_of(threshold), mask=wanted)
    if not REDO:
        tl.store(counts + rows, tl.zeros([ROWS], tl.int32) + k, mask=wanted)


@triton.jit(do_not_specialize=["n_rows", "k"])
def merge_kernel(
    pairs, counts, thresholds, n_rows, k, capacity,
    ROWS: tl.constexpr, CAPACITY: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """Brings the k best of a row's candidates to the front, where some were appended behind them.

    A row with more candidates than places keeps its count, which marks it to be redone, and takes in no more.
    """
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    count = tl.load(counts + rows, mask=rows < n_rows, other=0)
    tl.store(thresholds + rows, tl.full([ROWS], float("inf"), tl.float32), mask=count > capacity)
    grown = (count > k) & (count <= capacity)
    if tl.max(grown.to(tl.int32), axis=0) == 0:
        return
    places = tl.arange(0, CAPACITY)[None, :]
    filled = grown[:, None] & (places < count[:, None])
    keys = _keys_of(tl.load(pairs + rows[:, None] * capacity + places, mask=filled, other=0))
    best = best_of(tl.where(filled, keys, _NOTHING), K)
    front = tl.arange(0, K)[None, :]
    tl.store(pairs + rows[:, None] * capacity + front, _pairs_of_keys(best), mask=grown[:, None] & (front < k))
    last = tl.sum(tl.where(front == k - 1, best, 0), axis=1)
    tl.store(thresholds + rows, _value_of(last), mask=grown)
    tl.store(counts + rows, tl.zeros([ROWS], tl.int32) + k, mask=grown)
