"""The maths of every primitive in plain PyTorch: short, slow, obviously right.

Half-precision inputs are computed in float32 and rounded once at the end; float32 and float64 stay
as they are. Codes come as `values` and `indices`, either [n_tokens, k] with `offsets` None, or flat
[nnz] with `offsets` [n_tokens + 1].
"""

from fastsae.reference.accumulate_rows import accumulate_rows
from fastsae.reference.decode import decode
from fastsae.reference.encode import encode_topk
from fastsae.reference.encode_batch_topk import encode_batch_topk
from fastsae.reference.encode_groupmax import encode_groupmax
from fastsae.reference.encode_threshold import encode_threshold
from fastsae.reference.fused_update import fused_update
from fastsae.reference.gradient_norm import gradient_norm
from fastsae.reference.nested_errors import nested_errors
from fastsae.reference.sampled_dot import sampled_dot
from fastsae.reference.squared_error import squared_error
from fastsae.reference.stochastic_rounding import stochastic_rounding
from fastsae.reference.transpose import transpose
from fastsae.reference.unit_rows import normalize_rows_, project_rows_

__all__ = [
    "accumulate_rows",
    "decode",
    "encode_batch_topk",
    "encode_groupmax",
    "encode_threshold",
    "encode_topk",
    "fused_update",
    "gradient_norm",
    "nested_errors",
    "normalize_rows_",
    "project_rows_",
    "sampled_dot",
    "squared_error",
    "stochastic_rounding",
    "transpose",
]
