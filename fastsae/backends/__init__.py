"""Who computes an operator: plain PyTorch, the C++ library, and which of them for a given call."""
