"""What fastsae promises, as ratios over the encoder's GEMM alone (`x @ W_enc`, float32, allocating its output).

They hold for float32 activations at the gpt2-small shape (d_in 768, d_sae 24,576, k 32, 2,048 tokens) on a processor
with AVX-512. Other shapes, dtypes and machines are measured, not promised.
"""

from fastsae.bench.shapes import SHAPES, Shape

TIME = {"encode": 1.10, "decode": 0.06, "sampled_dot": 0.06, "accumulate_rows": 0.06, "step": 1.60}
# Peak memory of a step beyond parameters, gradients, optimizer state and x, over one [n_tokens, d_sae] tensor.
STEP_MEMORY = 0.05
IMPLEMENTATION = "fastsae"


def apply(shape: Shape, dtype: str) -> bool:
    """Whether the promises are about this shape and dtype."""
    promised = SHAPES["gpt2-small"]
    sizes = [(s.d_in, s.d_sae, s.k, s.n_tokens) for s in (shape, promised)]
    return sizes[0] == sizes[1] and dtype == "float32"
