"""Builds csrc. The C++ part is optional: without a compiler or without torch the package installs and says what is missing.

Environment:
    MMGEN_KERNELS_BUILD   auto (default) | 0: skip the C++ part | 1: a failure to build it is fatal
    MMGEN_KERNELS_PROBE   0 (default) | 1: also build the extension that tests and benchmarks use
    MAX_JOBS              compilers run at once (default 2)
"""

import json
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from glob import glob
from importlib.machinery import PathFinder
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

BUILD = os.environ.get("MMGEN_KERNELS_BUILD", "auto")
PROBE = os.environ.get("MMGEN_KERNELS_PROBE", "0") == "1"
if BUILD not in ("auto", "0", "1"):
    sys.exit(f"MMGEN_KERNELS_BUILD must be auto, 0 or 1, got {BUILD!r}")

# The oldest torch whose stable ABI we use, and the oldest Python: one wheel serves every newer one.
STABLE_ABI = [("TORCH_TARGET_VERSION", "0x020b000000000000"), ("Py_LIMITED_API", "0x030b0000")]
# -ffp-contract=off: the exactness contract counts roundings; every FMA is written out.
FLAGS = ["-std=c++20", "-O3", "-g0", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-fvisibility=hidden", "-Wall"]
# One translation unit per instruction set, so that no header's inline function leaks AVX-512 into the generic path.
INSTRUCTION_SET_FLAGS = {
    "_avx2.cpp": ["-mavx2", "-mfma", "-mf16c"],
    "_avx512.cpp": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mf16c", "-mprefer-vector-width=512", "-Wno-maybe-uninitialized"],
}


def torch_directory() -> Path | None:
    """Where torch is, without importing it; looked for also behind pip's build isolation, which hides it from sys.path only."""
    for path in (None, [sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]):
        spec = PathFinder.find_spec("torch", path)
        if spec and spec.origin:
            return Path(spec.origin).parent
    return None


def sources() -> list[str]:
    found = sorted(set(glob("csrc/*.cpp") + glob("csrc/*/*.cpp")) - {"csrc/probe.cpp", *glob("csrc/simd/fma_peak_*.cpp")})
    return for_this_cpu(found)


def for_this_cpu(files: list[str]) -> list[str]:
    x86 = platform.machine() in ("x86_64", "AMD64")
    return [f for f in files if x86 or not f.endswith(tuple(INSTRUCTION_SET_FLAGS))]


def extensions() -> list[Extension]:
    torch = torch_directory()
    if BUILD == "0":
        return []
    if torch is None:
        message = "torch was not found at build time; install torch first, then: pip install --no-build-isolation ."
        if BUILD == "1":
            sys.exit(f"MMGEN_KERNELS_BUILD=1, but {message}")
        sys.stderr.write(f"mmgen-kernels: building WITHOUT the C++ part: {message}\n")
        return []
    common = dict(
        include_dirs=["csrc", f"{torch}/include", f"{torch}/include/torch/csrc/api/include"],
        library_dirs=[f"{torch}/lib"],
        libraries=["torch_cpu"],
        extra_compile_args=FLAGS,
        extra_link_args=["-Wl,-s"] if sys.platform == "linux" else [],
        optional=BUILD != "1",
    )
    found = [Extension("mmgen_kernels._C", sources(), define_macros=STABLE_ABI, py_limited_api=True, **common)]
    if PROBE:  # pybind11 does not compile under the limited API, hence an extension of its own
        import pybind11

        common["include_dirs"] = [*common["include_dirs"], pybind11.get_include()]
        kernels = [s for s in sources() if s != "csrc/registration.cpp"] + for_this_cpu(sorted(glob("csrc/simd/fma_peak_*.cpp")))
        found.append(Extension("mmgen_kernels._probe", ["csrc/probe.cpp", *kernels], define_macros=STABLE_ABI[:1], **common))
    return found


class Build(build_ext):
    """build_ext with flags per file, files compiled in parallel, and the build's facts written beside the extension."""

    def build_extension(self, ext: Extension) -> None:
        objects = Path(self.build_temp) / ext.name
        objects.mkdir(parents=True, exist_ok=True)
        include = [f"-I{d}" for d in [*ext.include_dirs, sysconfig.get_path("include")]]
        macros = [f"-D{k}={v}" for k, v in ext.define_macros]
        compiler = [*os.environ.get("CXX", "c++").split()]

        def compile_one(source: str) -> str:
            target = str(objects / (source.replace("/", "_") + ".o"))
            extra = next((flags for suffix, flags in INSTRUCTION_SET_FLAGS.items() if source.endswith(suffix)), [])
            command = [*compiler, "-c", "-fPIC", *FLAGS, *extra, *macros, *include, source, "-o", target]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")
            sys.stderr.write(done.stderr)
            return target

        try:
            with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS", "2"))) as pool:
                built = list(pool.map(compile_one, ext.sources))
            output = Path(self.get_ext_fullpath(ext.name))
            output.parent.mkdir(parents=True, exist_ok=True)
            libraries = [f"-L{d}" for d in ext.library_dirs] + [f"-l{lib}" for lib in ext.libraries]
            link = [*compiler, "-shared", *built, *libraries, *ext.extra_link_args, "-o", str(output)]
            subprocess.run(link, check=True, capture_output=True, text=True)
        except (OSError, RuntimeError, subprocess.CalledProcessError) as error:
            cause = getattr(error, "stderr", None) or str(error)
            self.write_facts({"built": False, "cause": cause.strip()[-2000:]})
            if not ext.optional:
                raise
            sys.stderr.write(f"mmgen-kernels: building WITHOUT {ext.name}: {cause}\n")
            return
        if ext.name.endswith("._C"):
            version = {}
            exec((torch_directory() / "version.py").read_text(), version)
            compiler_version = subprocess.run([*compiler, "--version"], capture_output=True, text=True).stdout.splitlines()[0]
            self.write_facts({"built": True, "torch": str(version["__version__"]), "compiler": compiler_version})

    def write_facts(self, facts: dict) -> None:
        """`mmgen-kernels info` reads these: what the C++ part was built with, or why it was not."""
        path = Path(self.get_ext_fullpath("mmgen_kernels._C")).parent / "_build.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(facts, indent=1) + "\n")

    def copy_extensions_to_source(self) -> None:
        """Editable installs: the facts go where the extension goes."""
        super().copy_extensions_to_source()
        built = Path(self.build_lib) / "mmgen_kernels" / "_build.json"
        if built.exists():
            shutil.copy(built, Path(self.get_finalized_command("build_py").get_package_dir("mmgen_kernels")) / "_build.json")


EXTENSIONS = extensions()
setup(
    ext_modules=EXTENSIONS,
    cmdclass={"build_ext": Build},
    package_data={"mmgen_kernels": ["_build.json", "py.typed"]},
    options={"bdist_wheel": {"py_limited_api": "cp311"}} if EXTENSIONS and not PROBE else {},
)
