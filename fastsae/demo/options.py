"""What a user may choose of the demo."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class DemoOptions:
    """Choices of one run; they check themselves when they are made.

    out: folder of the report and the SAE.
    text: file or folder to learn from; None is the running Python's standard library.
    model, hook: a causal language model of transformers and the module to read; None is the model trained here.
    cache: folder that keeps that model; None is the user's cache folder.
    expansion, d_sae: latents for each dimension of the activations, or their number (it goes first).
    k: latents for each token.
    steps, tokens: length of the SAE's training, one or the other; None and None is 600 steps.
    batch_size: tokens in a step. lr: peak learning rate.
    eval_tokens: held-out tokens to evaluate on, at most.
    lm_steps: training steps of the language model.
    n_latents: how many latents the report shows.
    threads: CPU threads; None leaves PyTorch's number.
    seed: of the SAE's start and of the order of its training tokens.

    Raises ValueError that names the option, its value and what was expected.
    """

    out: Path = Path("fastsae-demo")
    text: Path | None = None
    model: str | None = None
    hook: str | None = None
    cache: Path | None = None
    expansion: int = 8
    d_sae: int | None = None
    k: int = 32
    steps: int | None = None
    tokens: int | None = None
    batch_size: int = 2048
    lr: float = 1e-3
    eval_tokens: int = 100_000
    lm_steps: int = 1400
    n_latents: int = 50
    threads: int | None = None
    seed: int = 0

    def __post_init__(self):
        least = {"batch_size": 16, "eval_tokens": 128}
        whole = ("expansion", "d_sae", "k", "steps", "tokens", "batch_size", "eval_tokens", "lm_steps", "n_latents")
        for name in (*whole, "threads"):
            value = getattr(self, name)
            if value is not None and value < least.get(name, 1):
                raise ValueError(f"--{name.replace('_', '-')} {value}: expected at least {least.get(name, 1)}")
        if self.d_sae is not None:
            self.width(1)
        if not 0 < self.lr < float("inf"):
            raise ValueError(f"--lr {self.lr}: expected a finite number above 0")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"--seed {self.seed}: expected a whole number from 0 up to 2^63 - 1")
        if self.steps is not None and self.tokens is not None:
            raise ValueError(f"--steps {self.steps} and --tokens {self.tokens}: expected one of them")
        if self.tokens is not None and self.tokens < self.batch_size:
            raise ValueError(f"--tokens {self.tokens}: expected at least --batch-size {self.batch_size}, for one step")
        if self.out.exists() and not self.out.is_dir():
            raise ValueError(f"--out {self.out} is a file: expected a folder, or a name for a new one")

    @property
    def n_steps(self) -> int:
        """Training steps of the SAE."""
        if self.tokens is not None:
            return self.tokens // self.batch_size
        return 600 if self.steps is None else self.steps

    def width(self, d_in: int) -> int:
        """Number of latents for activations of width `d_in`. Raises ValueError where k does not fit."""
        d_sae = self.d_sae or self.expansion * d_in
        if self.k > d_sae:
            raise ValueError(f"--k {self.k}: expected at most the number of latents, {d_sae}")
        return d_sae
