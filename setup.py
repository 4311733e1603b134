"""Builds the compiled ops. Everything else about the package stands in pyproject.toml.

One shared library from every ``ops/<name>/native.cpp``. It is optional: without a C++17 compiler the package installs
and runs on PyTorch's kernels.
"""

from pathlib import Path

from setuptools import Extension, setup

ops = Path("src/formwright/ops")
sources = ["src/formwright/ops/native/common.cpp", *(str(path) for path in sorted(ops.glob("*/native.cpp")))]
headers = [str(path) for path in sorted(ops.glob("*/*.hpp"))]

setup(
    ext_modules=[
        Extension(
            "formwright._native",
            sources,
            depends=headers,
            language="c++",
            optional=True,
            extra_compile_args=["-O3", "-std=c++17", "-fvisibility=hidden", "-fno-math-errno"],
        )
    ]
)
