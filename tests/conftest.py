"""Settings of the whole suite."""

from __future__ import annotations

import os

import torch
from hypothesis import settings

# Small matrices: threads only get in each other's way (434 s with two, 22 s with one).
torch.set_num_threads(1)

settings.register_profile("ci", max_examples=100, deadline=None, derandomize=True, database=None)
settings.register_profile("thorough", max_examples=10_000, deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))
