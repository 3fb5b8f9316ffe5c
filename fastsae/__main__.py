"""`python -m fastsae`: the same command line as `fastsae`."""

from fastsae.cli import main

main()
