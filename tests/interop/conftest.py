"""Imports the other libraries before the tests do, without a network."""

import interop.installed  # noqa: F401
