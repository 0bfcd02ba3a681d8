"""What `setup.cfg` cannot say: where packages lie, and the compiled loops, which are optional."""

import sys

from setuptools import Extension, find_packages, setup

# `callbacks/` and `benchmarks/` lie at the top of the repository, but are only ever imported as
# `cl_merge.callbacks` and `cl_merge.benchmarks`.
TOP_LEVEL = ("callbacks", "benchmarks")
packages = {
    *find_packages(include=["cl_merge", "cl_merge.*"]),
    *(f"cl_merge.{name}" for top in TOP_LEVEL for name in find_packages(include=[top, f"{top}.*"])),
}

# No contraction: a fused multiply-add rounds once where torch rounds twice. Processors with wider
# vectors are served by function versions inside the file, chosen when it is loaded.
OPTIONS = ["-O3", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]
LOOPS = Extension(
    "cl_merge.kernels._loops",
    ["cl_merge/kernels/loops.c"],
    extra_compile_args=["/O2", "/fp:precise"] if sys.platform == "win32" else OPTIONS,
    # Without a compiler the installation succeeds all the same, and torch does the work.
    optional=True,
)

setup(
    packages=sorted(packages),
    package_dir={
        "cl_merge": "cl_merge",
        **{f"cl_merge.{top}": top for top in TOP_LEVEL},
    },
    ext_modules=[LOOPS],
)
