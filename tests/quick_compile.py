"""How tests compile: most of what they cost is compiling, and their arrays are tiny.

Nothing here changes a result beyond rounding; a flag that a version of XLA does not
know would end the process.
"""

from __future__ import annotations

import importlib.metadata
from typing import Any

JAXLIB = tuple(map(int, importlib.metadata.version("jaxlib").split(".")[:2]))
OPTIONS: Any = {"xla_backend_optimization_level": 0}
"""Of one program (`lowered.compile`): LLVM's optimiser takes longer than it saves."""
EMITTERS = (
    "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
    if JAXLIB < (0, 11)
    else "--xla_cpu_emitter_verification_level=0"
)
"""Loops without MLIR's many passes, which take half of the time of compiling."""
FLAGS = f"--xla_backend_optimization_level=0 {EMITTERS}"
"""Of a process (`XLA_FLAGS`)."""
