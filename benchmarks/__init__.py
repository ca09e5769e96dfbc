"""Measure the project. Import this package before torch: OpenMP reads its settings when torch is loaded."""

from main import set_library_defaults

set_library_defaults()
