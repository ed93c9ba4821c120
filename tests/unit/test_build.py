"""The package installs without a C++ compiler; update.h compiles for a GPU, without contraction."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NVCC = shutil.which("nvcc")
BUILD_TOOLS = [shutil.which(tool) for tool in ("cmake", "ninja")]
needs_nvcc = pytest.mark.skipif(NVCC is None, reason="no nvcc")

IMPORT = """
import sys
sys.meta_path[:] = [f for f in sys.meta_path if "ScikitBuild" not in type(f).__name__]
sys.path.insert(0, sys.argv[1])
from mpicdsgd.kernels import native
assert native.__file__.startswith(sys.argv[1]), native.__file__
print(native.backend)
"""

# Every function of update.h, for one element of a thread.
KERNEL = """
#include "update.h"
using namespace mpicdsgd;
template <int WIRE>
__device__ void update(Segment s, float* x, float* v, float* y, unsigned short* p, float w) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  const float* g = reinterpret_cast<const float*>(s.grad);
  float own = rounded_to_wire<WIRE>(x[i]), near = from_bfloat16<float>(p[i]);
  if (WIRE == FLOAT16) near = from_float16<float>(p[i]);
  float acc = mixed(x[i], w, near, own);
  const float a = scaled_gradient(s, g[i], x[i]);
  v[i] = new_velocity(s, v[i], a);
  acc = with_gradient(s, with_velocity(s, acc, v[i]), a);
  x[i] = not_finite(acc) ? 0.0f : acc;
  y[i] = looked_ahead(s, acc, v[i]);
  p[i] = WIRE == FLOAT16 ? to_float16(acc) : to_bfloat16(acc);
}
extern "C" __global__ void kernel(Segment s, float* x, float* v, float* y, unsigned short* p,
                                  float w, int wire) {
  if (wire == FLOAT16) update<FLOAT16>(s, x, v, y, p, w);
  else if (wire == BFLOAT16) update<BFLOAT16>(s, x, v, y, p, w);
  else update<FLOAT32>(s, x, v, y, p, w);
}
"""


@pytest.fixture
def functions_cu(tmp_path):
    path = tmp_path / "functions.cu"
    path.write_text(KERNEL)
    return path


def nvcc(*arguments):
    done = subprocess.run(
        [str(NVCC), "-arch=sm_90", "-std=c++17", f"-I{ROOT}/mpicdsgd/kernels/native", *arguments],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "warning" not in done.stderr, done.stderr


@needs_nvcc
def test_update_h_compiles_for_the_gpu_without_contraction(functions_cu, tmp_path):
    nvcc("-c", str(functions_cu), "-o", str(tmp_path / "functions.o"))
    ptx = tmp_path / "functions.ptx"
    nvcc("-ptx", "--fmad=false", str(functions_cu), "-o", str(ptx))
    assert "mul.f32" in ptx.read_text() or "mul.rn.f32" in ptx.read_text()
    assert "fma." not in ptx.read_text()


def test_gpu_sources_include_nothing_else():
    """NVRTC has no headers to include."""
    included = {
        name: re.findall(r"#include.*", (ROOT / "mpicdsgd/kernels/native" / name).read_text())
        for name in ("update.h", "kernel.cu")
    }
    assert included == {"update.h": [], "kernel.cu": ['#include "update.h"']}


def copy_source(folder):
    """What a wheel is made of, apart from the checkout and its build folder."""
    source = folder / "source"
    skip = shutil.ignore_patterns("__pycache__", "*.so")
    shutil.copytree(ROOT / "mpicdsgd", source / "mpicdsgd", ignore=skip)
    for name in ("pyproject.toml", "CMakeLists.txt", "LICENSE"):
        shutil.copy(ROOT / name, source)
    (source / "README.md").write_text("# mpicdsgd\n")
    return source


def pip_wheel(source, folder, environment):
    """Makes a wheel in ``folder`` with what is installed here: its path, and what pip printed."""
    if None in BUILD_TOOLS or importlib.util.find_spec("scikit_build_core") is None:
        pytest.skip("needs cmake, ninja and scikit-build-core")
    done = subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--verbose", "--no-deps", "--no-build-isolation",
         "--no-index", "--disable-pip-version-check", "-w", str(folder), str(source)],
        env=dict(environment), capture_output=True, text=True, timeout=900, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = folder.glob("mpicdsgd-*.whl")
    return wheel, done.stdout + done.stderr


def test_wheel_without_a_compiler(tmp_path):
    """Where no compiler is found the wheel is made all the same, and NumPy serves."""
    if None in BUILD_TOOLS:
        pytest.skip("needs cmake and ninja")
    tools = tmp_path / "tools"
    tools.mkdir()
    for tool in BUILD_TOOLS:
        (tools / Path(str(tool)).name).symlink_to(str(tool))

    kept = {name: os.environ[name] for name in ("HOME", "LANG", "TMPDIR") if name in os.environ}
    nowhere = {"PATH": str(tools), "CC": "/nonexistent", "CXX": "/nonexistent"}
    wheel, said = pip_wheel(copy_source(tmp_path), tmp_path, kept | nowhere)
    assert "the compiled kernel is not built" in said
    assert "GPU kernels are compiled at first use" in said
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "target")
        names = set(archive.namelist())
    sources = {f"mpicdsgd/kernels/native/{name}" for name in ("update.h", "kernel.cu")}
    assert {"mpicdsgd/py.typed", *sources} <= names
    assert not any(name.endswith((".cpp", ".so", ".fatbin")) for name in names)
    done = subprocess.run(
        [sys.executable, "-c", IMPORT, str(tmp_path / "target")],
        cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.stdout.split() == ["numpy"], done.stderr
