"""What nvcc makes of the GPU kernels: no contraction, no spills, wide accesses; and the install."""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from functools import cache
from pathlib import Path

import pytest
from test_build import BUILD_TOOLS, NVCC, ROOT, copy_source, needs_nvcc, pip_wheel

from mpicdsgd.kernels import native
from mpicdsgd.kernels.gpu import compiled as kernels

NATIVE = ROOT / "mpicdsgd" / "kernels" / "native"
FLAGS = ["-std=c++17", "--fmad=false", str(NATIVE / "kernel.cu")]
WIRES = ["float32", "bfloat16", "float16"]
DEGREES = [*map(str, range(9)), "n", "n_m"]
NAMES = {f"update_{wire}_{degree}" for wire in WIRES for degree in DEGREES} | {"add_partials"}
needs_cmake = pytest.mark.skipif(None in BUILD_TOOLS, reason="needs cmake and ninja")


def tool(name):
    """A CUDA tool: on the PATH, or of a package from PyPI (the `dev` extra)."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    packaged = [Path(folder) / "nvidia" for folder in sys.path if Path(folder, "nvidia").is_dir()]
    found = [shutil.which(name, path=path)]
    found += [str(one) for folder in packaged for one in folder.glob(f"*/bin/{name}")]
    return next((one for one in found if one), None)


def needs(name):
    return pytest.mark.skipif(tool(name) is None, reason=f"no {name}")


def nvcc(*arguments):
    done = subprocess.run(
        [str(NVCC), *arguments, *FLAGS], capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """For an architecture: the cubin's path, and what ptxas said."""
    folder = tmp_path_factory.mktemp("cubins")

    @cache
    def compile_for(arch):
        cubin = folder / f"{arch}.cubin"
        return cubin, nvcc("-cubin", f"-arch={arch}", "-Xptxas", "-v", "-o", str(cubin))

    return compile_for


@needs_nvcc
@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100"])
def test_registers_suffice(compiled, arch):
    """No spills; and so few that as many blocks fit on a multiprocessor as kernel.cu says."""
    said = compiled(arch)[1]
    assert "warning" not in said, said
    resources = re.findall(
        r"entry function '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, "
        r"(\d+) bytes spill loads.*?Used (\d+) registers",
        said,
        re.DOTALL,
    )
    assert {name for name, *_ in resources} == NAMES
    for name, *used, registers in resources:
        assert used == ["0", "0", "0"], name
        assert int(registers) <= 80, name


@needs_nvcc
def test_every_operation_is_rounded_once(tmp_path):
    """Nothing that ptxas might contract (an operation without .rn), and no flushing."""
    ptx = tmp_path / "kernel.ptx"
    nvcc("-ptx", "-arch=compute_90", "-o", str(ptx))
    text = ptx.read_text()
    assert set(re.findall(r"\.entry (\w+)", text)) == NAMES
    operations = set(re.findall(r"\b(?:add|sub|mul|div|rcp|fma|mad)\.[\w.]*f32", text))
    assert operations <= {"add.rn.f32", "sub.rn.f32", "mul.rn.f32", "rcp.rn.f32"}
    assert {"add.rn.f32", "mul.rn.f32"} <= operations
    assert ".ftz" not in text
    # A generic address costs a look at what it is.
    assert not re.findall(r"\b(?:ld|st)\.(?:v4\.)?[fu]\d+", text)
    assert "fma." not in text


def functions(sass):
    """The instructions of every kernel in nvdisasm's output."""
    found = {}
    for name, body in re.findall(r"^\.text\.(\w+):\n(.*?)(?=^\.text\.|\Z)", sass, re.M | re.S):
        found[name] = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([\w.]+)", body)
    return found


@needs_nvcc
@needs("nvdisasm")
@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100"])
def test_accesses_are_wide_and_many_at_a_time(compiled, arch):
    cubin, _ = compiled(arch)
    sass = subprocess.run(
        [str(tool("nvdisasm")), "-c", str(cubin)], capture_output=True, text=True, check=True
    ).stdout
    found = functions(sass)
    assert set(found) == NAMES
    for name in NAMES - {"add_partials"}:
        code = found[name]
        _, wire, degree, *_ = name.split("_")
        loads = sum(op.startswith("LDG.E.128") for op in code)
        assert loads >= 4 + (int(degree) if wire == "float32" and degree != "n" else 0), name
        assert sum(op.startswith("STG.E.128") for op in code) >= 3, name
        if wire == "float32" and degree != "n":
            # z, v, g, q and the neighbours, before the first of them is used: all their latencies
            # are one. (Where registers are short, not all.)
            first = next(i for i, op in enumerate(code) if op.startswith("LDG.E.128"))
            arithmetic = next(i for i in range(first, len(code)) if code[i] in ("FADD", "FMUL"))
            at_once = sum(op.startswith("LDG.E.128") for op in code[first:arithmetic])
            assert at_once >= min(4 + int(degree), 8), (name, at_once)


@pytest.mark.slow
@needs_nvcc
@needs("cuobjdump")
@needs_cmake
@pytest.mark.timeout(960)
def test_wheel_holds_the_kernels(tmp_path, monkeypatch):
    """For all GPUs, under a name that says which sources they are from; and the sources too."""
    source = copy_source(tmp_path)
    # nvcc takes minutes: what it made when this checkout was installed is made already. So does
    # the CPU's kernel, which is another matter.
    for made in (ROOT / "build").glob("*/*/kernel.*.fatbin"):
        there = source / made.relative_to(ROOT)
        there.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(made, there)
    without = {"CMAKE_ARGS": "-DCMAKE_DISABLE_FIND_PACKAGE_nanobind=ON"}
    wheel = pip_wheel(source, tmp_path, {**os.environ, **without})[0]
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "target")
    built = tmp_path / "target" / "mpicdsgd" / "kernels" / "native"
    assert (built / "kernel.cu").is_file()
    assert (built / "update.h").is_file()
    monkeypatch.setattr(native, "__path__", [str(NATIVE), str(built)])
    fatbin = kernels.built()
    assert fatbin is not None
    assert fatbin.parent == built
    listed = subprocess.run(
        [str(tool("cuobjdump")), "--list-elf", "--list-ptx", str(fatbin)],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    archs = ["75", "80", "86", "89", "90", "100", "120"]
    assert re.findall(r"sm_(\d+)\.cubin", listed) == archs
    assert re.findall(r"sm_(\d+)\.ptx", listed) == archs[-1:]


FAKES = {
    "broken": ("release 13.0", "echo snapped >&2; exit 1", "CMake Warning", "snapped"),
    "old": ("release 12.4", "exit 1", "12.8 or newer", ""),
    "no nvcc": ("hello", "exit 1", "12.8 or newer", ""),
    "good": ("release 13.1", 'for o; do last=$o; done; echo fatbin > "$last"', "compiling", ""),
    "not wanted": ("release 13.1", "exit 1", "MPICDSGD_CUDA=OFF", ""),
}


@needs_cmake
@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")
@pytest.mark.parametrize("kind", FAKES)
def test_install_goes_on_without_the_kernels(tmp_path, kind):
    version, compile_it, *said = FAKES[kind]
    fake = tmp_path / "nvcc"
    fake.write_text(f'#!/bin/sh\n[ "$1" = --version ] && echo {version} && exit\n{compile_it}\n')
    fake.chmod(0o755)
    cmake, build = str(BUILD_TOOLS[0]), tmp_path / "build"
    switch = f"-DMPICDSGD_CUDA={'OFF' if kind == 'not wanted' else 'ON'}"
    configure = [cmake, "-G", "Ninja", "-S", str(copy_source(tmp_path)), "-B", str(build), switch]
    # Without nanobind, so that only this part is there to install.
    no_python = "-DCMAKE_DISABLE_FIND_PACKAGE_nanobind=ON"
    output = ""
    install = [cmake, "--install", str(build), "--prefix", str(tmp_path / "to")]
    for command in ([*configure, f"-DMPICDSGD_NVCC={fake}", no_python], install):
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        output += done.stdout + done.stderr
        assert done.returncode == 0, output
    for text in said:
        assert text in output
    installed = [path.name for path in (tmp_path / "to").rglob("*.fatbin")]
    assert installed == ([f"kernel.{kernels._checksum()}.fatbin"] if kind == "good" else [])
