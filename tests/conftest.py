"""Settings of every test process, made before torch is imported.

Two processes share the cores, so each computes on one thread; nothing asks a model hub; and
hypothesis draws the same examples in every run, so that a failure can be repeated.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from hypothesis import settings

settings.register_profile("trimtab", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("trimtab")
