"""What `fastsae bench` measures and how: correctness first, then interleaved timings and peak memory.

shapes.py           real SAE sizes, by name
problem.py          one SAE of such a size and activations like those of a language model
implementations.py  the same step by fastsae, and what it is timed beside
baselines.py        dense PyTorch, and torch.topk with F.embedding_bag
gate.py             every implementation against float64: no speed without it
cases.py            what is timed, with its counted work
timing.py           interleaved rounds, medians of samples and of ratios
memory.py           peak memory of each implementation, in a process of its own
targets.py          what fastsae promises
runner.py           all of it for one shape
machine.py          hardware, versions, commit
result.py           the file a run writes
report.py, plot.py  tables and plots, from results alone
"""

from fastsae.bench.result import load_result, save_result
from fastsae.bench.runner import run
from fastsae.bench.shapes import SHAPES, Shape, get_shape

__all__ = ["SHAPES", "Shape", "get_shape", "load_result", "run", "save_result"]
