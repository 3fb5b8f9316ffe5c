"""The sizes that are measured: those of published SAEs, so that a speed is one somebody will see."""

from dataclasses import dataclass, replace

from fastsae.bench import machine


@dataclass(frozen=True)
class Shape:
    """An SAE's size and a batch: x [n_tokens, d_in], W_enc [d_in, d_sae], k latents for each token."""

    name: str
    d_in: int
    d_sae: int
    k: int
    n_tokens: int
    source: str

    def __post_init__(self):
        for name in ("d_in", "d_sae", "k", "n_tokens"):
            size = getattr(self, name)
            if isinstance(size, bool) or not isinstance(size, int) or size < 1:
                raise ValueError(f"{name} = {size!r}: expected an int of at least 1")
        if self.k > self.d_sae:
            raise ValueError(f"k = {self.k}: expected at most d_sae = {self.d_sae}")

    @property
    def nnz(self) -> int:
        return self.n_tokens * self.k

    @property
    def parameters(self) -> int:
        """Entries of W_enc and W_dec."""
        return 2 * self.d_in * self.d_sae

    def __str__(self) -> str:
        return f"{self.name} (d_in {self.d_in:,}, d_sae {self.d_sae:,}, k {self.k}, {self.n_tokens:,} tokens)"


# Tokens are those of a laptop. Wider SAEs take fewer, so that a dense step stays within seconds there.
SHAPES: dict[str, Shape] = {
    shape.name: shape
    for shape in (
        Shape("gpt2-small", 768, 24_576, 32, 2_048, "width of gpt2-small-res-jb (SAELens), k of OpenAI's GPT-2 SAEs"),
        Shape("gpt2-small-32k", 768, 32_768, 32, 2_048, "OpenAI sparse_autoencoder, GPT-2 small v5_32k"),
        Shape("gpt2-small-128k", 768, 131_072, 32, 1_024, "OpenAI sparse_autoencoder, GPT-2 small v5_128k"),
        Shape("pythia-70m", 512, 32_768, 32, 2_048, "width of EleutherAI/sae-pythia-70m-32k"),
        Shape("pythia-160m-4k", 768, 4_096, 20, 2_048, "SAEBench, Pythia-160M, width 2^12"),
        Shape("pythia-160m", 768, 16_384, 80, 2_048, "SAEBench, Pythia-160M, width 2^14"),
        Shape("gemma-2-2b", 2_304, 16_384, 80, 1_024, "SAEBench, Gemma-2-2B, width 2^14 (Gemma Scope's 16k)"),
        Shape("gemma-2-2b-65k", 2_304, 65_536, 80, 512, "SAEBench, Gemma-2-2B, width 2^16 (Gemma Scope's 65k)"),
        Shape("llama-3-8b", 4_096, 131_072, 50, 256, "Llama Scope, Llama-3.1-8B, 32x (128k)"),
    )
}

DEFAULT = "gpt2-small"

# A server takes so many times more: the batch sizes that trainers use (4,096 and above).
_SERVER_TOKENS = {"laptop": 1, "server": 4}


def get_shape(name: str, *, n_tokens: int | None = None, k: int | None = None) -> Shape:
    """The registered shape, with the tokens that suit this machine unless `n_tokens` gives them.

    Raises ValueError for a name that is not registered or a size out of range.
    """
    if name not in SHAPES:
        raise ValueError(f"shape = {name!r}: expected one of {', '.join(SHAPES)}")
    shape = SHAPES[name]
    tokens = shape.n_tokens * _SERVER_TOKENS[machine.machine_class()] if n_tokens is None else n_tokens
    return replace(shape, n_tokens=tokens, k=shape.k if k is None else k)
