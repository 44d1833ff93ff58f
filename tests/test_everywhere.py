"""The numeric tests on other processors, as far as XLA can compile for them here, and in other environments.

Tolerances are a third as wide as elsewhere: a number that comes so near to its own would fail on some machine one day.
With other versions of JAX and Python, run this file by an interpreter that has them.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = ("reference", "equations", "diffusion", "dpm_solver", "networks", "training")
XLA = "EDP_TEST_XLA_FLAGS"  # replaces the flags that conftest.py sets
ENVIRONMENTS = {
    "all instructions of this processor": {XLA: ""},
    "SSE 4.2": {XLA: "--xla_cpu_max_isa=SSE4_2"},
    "AVX2": {XLA: "--xla_cpu_max_isa=AVX2"},
    "vectors of 128 bits": {XLA: "--xla_cpu_prefer_vector_width=128"},
    "vectors of 256 bits": {XLA: "--xla_cpu_prefer_vector_width=256"},
    "vectors of 512 bits": {XLA: "--xla_cpu_prefer_vector_width=512"},
    "one core": {},
    "the variables of somebody's JAX": {
        "JAX_ENABLE_X64": "1",
        "JAX_DEFAULT_PRNG_IMPL": "rbg",
        "JAX_DEFAULT_MATMUL_PRECISION": "bfloat16",
        "XLA_FLAGS": "--xla_cpu_enable_fast_math=true --xla_force_host_platform_device_count=2",
    },
}
ON_CORES = "import os, pytest, sys; os.sched_setaffinity(0, eval(sys.argv[1])); sys.exit(pytest.main(sys.argv[2:]))"


@pytest.mark.slow
@pytest.mark.parametrize("name", ENVIRONMENTS)
def test_numbers_are_far_from_their_tolerances(name):
    cores = sorted(os.sched_getaffinity(0))[: 1 if name == "one core" else None]
    files = [str(Path(__file__).with_name(f"test_{file}.py")) for file in TESTS]
    command = [sys.executable, "-c", ON_CORES, str(set(cores)), "-m", "not slow", "-q", "-p", "no:xdist", *files]
    env = os.environ | {"EDP_TEST_TIGHTER": "3"} | ENVIRONMENTS[name]
    done = subprocess.run(command, env=env, cwd=Path(__file__).parents[1], capture_output=True, text=True)
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout[-5000:] + done.stderr
