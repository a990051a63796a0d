"""The tests, whose models are so tiny that a second thread of torch costs and gives nothing.

On cores that others use too, two OpenMP threads wait for each other at the end of each small operation: the reference
engine took 17 times the CPU time. This is set before torch is imported, and processes that tests start inherit it. What
depends on the number of threads sets it.
"""

from __future__ import annotations

import gc
import os

from scorer.__main__ import GC_THRESHOLD

gc.set_threshold(GC_THRESHOLD)  # as the command does
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # else vLLM takes a thread for each core
