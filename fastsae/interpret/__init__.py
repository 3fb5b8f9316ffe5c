"""What latents mean: where they fire, what they do to the logits, and a page that shows both."""

from fastsae.interpret.firings import Firings, record_firings
from fastsae.interpret.histogram import Bar, density_histogram
from fastsae.interpret.logit_effects import logit_effects
from fastsae.interpret.pages import LatentPage, Snippet, TokenEffect, latent_pages
from fastsae.interpret.report import render_report
from fastsae.interpret.telling import most_telling

__all__ = [
    "Bar",
    "Firings",
    "LatentPage",
    "Snippet",
    "TokenEffect",
    "density_histogram",
    "latent_pages",
    "logit_effects",
    "most_telling",
    "record_firings",
    "render_report",
]
