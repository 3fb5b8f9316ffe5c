"""The primitives, one in each file: public function, schema, fake kernel and autograd."""

from fastsae.ops.accumulate_rows import accumulate_rows
from fastsae.ops.decode import decode
from fastsae.ops.encode import encode_topk
from fastsae.ops.encode_batch_topk import encode_batch_topk
from fastsae.ops.encode_groupmax import encode_groupmax
from fastsae.ops.encode_threshold import encode_threshold
from fastsae.ops.fused_update import Slot, fused_update
from fastsae.ops.gradient_norm import gradient_norm
from fastsae.ops.nested_errors import nested_errors
from fastsae.ops.sampled_dot import sampled_dot
from fastsae.ops.squared_error import squared_error
from fastsae.ops.transpose import LatentMajor, transpose
from fastsae.ops.unit_rows import normalize_rows_, project_rows_

__all__ = [
    "LatentMajor",
    "Slot",
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
    "transpose",
]
