"""Builds csrc. The C++ part is optional: without a compiler or without torch the package installs and says what is missing.

Environment:
    MMGEN_KERNELS_BUILD     auto (default) | 0: skip the C++ part | 1: a failure to build it is fatal
    MMGEN_KERNELS_CUDA      auto (default): build the CUDA part if nvcc is there and of this torch's CUDA version | 0: skip it |
                            1: a failure to build it is fatal; cross-builds on a torch without CUDA
    MMGEN_KERNELS_PROBE     0 (default) | 1: also build, in place, the extension that tests and benchmarks use; no wheel holds it
    MMGEN_KERNELS_SANITIZE  0 (default) | 1: with AddressSanitizer and UndefinedBehaviorSanitizer, as `make sanitize` has it
    MAX_JOBS                compilers run at once (default: one per CPU)
    CXX                     the C++ compiler (default c++)
"""

import json
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from glob import glob
from importlib.machinery import PathFinder
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

PACKAGE = "mmgen_kernels"
BUILD = os.environ.get("MMGEN_KERNELS_BUILD", "auto")
CUDA = os.environ.get("MMGEN_KERNELS_CUDA", "auto")
PROBE = os.environ.get("MMGEN_KERNELS_PROBE", "0") == "1"
SANITIZE = os.environ.get("MMGEN_KERNELS_SANITIZE", "0") == "1"
if BUILD not in ("auto", "0", "1"):
    sys.exit(f"MMGEN_KERNELS_BUILD must be auto, 0 or 1, got {BUILD!r}")
if CUDA not in ("auto", "0", "1"):
    sys.exit(f"MMGEN_KERNELS_CUDA must be auto, 0 or 1, got {CUDA!r}")

COMPILER = os.environ.get("CXX", "c++").split()
# The oldest torch whose stable ABI we use: one extension serves every newer one.
MACROS = ["-DTORCH_TARGET_VERSION=0x020b000000000000"]
# -ffp-contract=off: the exactness contract counts roundings; every FMA is written out. -Wno-psabi: vectors wider than a register
# are passed within one translation unit only.
FLAGS = ["-std=c++20", "-O3", "-g0", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-fvisibility=hidden", "-Wall",
         "-Wno-psabi"]
SANITIZERS = "-fsanitize=address,undefined"
if SANITIZE:
    FLAGS += ["-O1", "-g1", "-fno-omit-frame-pointer", SANITIZERS]
# One translation unit per instruction set, so that no header's inline function leaks AVX-512 into the generic path.
AVX512_FLAGS = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mf16c", "-mprefer-vector-width=512",
                "-Wno-maybe-uninitialized", "-Wno-uninitialized"]
INSTRUCTION_SET_FLAGS = {
    "_avx2.cpp": ["-mavx2", "-mfma", "-mf16c"],
    "_avx512.cpp": AVX512_FLAGS,
    "_avx512_bf16.cpp": [*AVX512_FLAGS, "-mavx512bf16"],
    "_avx512_vnni.cpp": [*AVX512_FLAGS, "-mavx512vnni"],
    "_amx.cpp": [*AVX512_FLAGS, "-mavx512bf16", "-mamx-tile", "-mamx-bf16"],
}
# -fmad=false: as -ffp-contract above. Code for sm_80 serves every 8.x chip; the PTX is for chips that nobody knew yet.
NVCC_FLAGS = ["-std=c++20", "-O3", "-fmad=false", "-DUSE_CUDA", "-shared", "-cudart", "static", "-Xptxas", "-v",
              "--expt-relaxed-constexpr", "--threads", "2",
              "-Xcompiler", "-fPIC,-fvisibility=hidden,-ffp-contract=off",
              "-gencode=arch=compute_80,code=sm_80", "-gencode=arch=compute_90a,code=sm_90a",
              "-gencode=arch=compute_80,code=compute_80"]
OBJECTS = Path("build/objects")  # kept between builds and shared by the extensions


def torch_directory() -> Path | None:
    """Where torch is, without importing it; looked for also behind pip's build isolation, which hides it from sys.path only."""
    for path in (None, [sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]):
        spec = PathFinder.find_spec("torch", path)
        if spec and spec.origin:
            return Path(spec.origin).parent
    return None


def torch_facts(torch: Path) -> dict:
    facts: dict = {}
    exec((torch / "version.py").read_text(), facts)
    return facts


def torch_version(torch: Path) -> str:
    return str(torch_facts(torch)["__version__"])


def reason_against_cuda(torch: Path) -> str | None:
    """Why the CUDA part is not to be built, or None."""
    if CUDA == "0":
        return "MMGEN_KERNELS_CUDA=0 at build time"
    if CUDA == "1":
        return None
    wanted = torch_facts(torch).get("cuda")
    if wanted is None:
        return "the torch at build time has no CUDA"
    if shutil.which("nvcc") is None:
        return "nvcc was not found at build time"
    found = re.search(r"release (\d+)", subprocess.run(["nvcc", "--version"], capture_output=True, text=True).stdout)
    if found is None or found[1] != wanted.split(".")[0]:
        return f"nvcc at build time was of CUDA {found[1] if found else 'unknown'}, torch of CUDA {wanted}"
    return None


def sources() -> list[str]:
    found = sorted(set(glob("csrc/*.cpp") + glob("csrc/*/*.cpp")) - {"csrc/probe.cpp", *glob("csrc/simd/fma_peak_*.cpp")})
    return for_this_cpu(found)


def for_this_cpu(files: list[str]) -> list[str]:
    x86 = platform.machine() in ("x86_64", "AMD64")
    return [f for f in files if x86 or not f.endswith(tuple(INSTRUCTION_SET_FLAGS))]


def extensions() -> tuple[list[Extension], str | None]:
    """What is to be built, and if that is nothing, why."""
    if BUILD == "0":
        return [], "MMGEN_KERNELS_BUILD=0 at build time"
    torch = torch_directory()
    if torch is None:
        cause = "torch was not found at build time; install torch first, then: pip install --no-build-isolation ."
        if BUILD == "1":
            sys.exit(f"MMGEN_KERNELS_BUILD=1, but {cause}")
        sys.stderr.write(f"mmgen-kernels: building WITHOUT the C++ part: {cause}\n")
        return [], cause
    common = dict(
        include_dirs=["csrc", f"{torch}/include", f"{torch}/include/torch/csrc/api/include"],
        library_dirs=[f"{torch}/lib"],
        libraries=["torch_cpu"],
        extra_link_args=[SANITIZERS] if SANITIZE else ["-Wl,-s"] if sys.platform == "linux" else [],
        optional=BUILD != "1",
    )
    found = [Extension(f"{PACKAGE}._C", sources(), py_limited_api=True, **common)]
    if reason_against_cuda(torch) is None:
        kernels = sorted(glob("csrc/*.cu") + glob("csrc/*/*.cu"))
        found.append(Extension(f"{PACKAGE}._C_cuda", kernels, py_limited_api=True, **(common | {"optional": CUDA != "1"})))
    if PROBE:  # a Python module by pybind11, which has no stable ABI, hence an extension of its own
        kernels = [s for s in sources() if s != "csrc/registration.cpp"] + for_this_cpu(sorted(glob("csrc/simd/fma_peak_*.cpp")))
        found.append(Extension(f"{PACKAGE}._probe", ["csrc/probe.cpp", *kernels], **common))
    return found, None


class Build(build_ext):
    """build_ext with flags per file, changed files only and in parallel, and the build's facts beside the extension."""

    def finalize_options(self) -> None:
        super().finalize_options()
        if not (self.inplace or self.editable_mode):
            self.extensions = [e for e in self.extensions if not e.name.endswith("._probe")]

    def build_extension(self, ext: Extension) -> None:
        output = Path(self.get_ext_fullpath(ext.name))
        output.parent.mkdir(parents=True, exist_ok=True)
        output.unlink(missing_ok=True)  # what does not build must not leave its predecessor behind
        is_main = ext.name == f"{PACKAGE}._C"
        if ext.name == f"{PACKAGE}._C_cuda":
            return self.build_cuda(ext, output)
        try:
            with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)) as pool:
                objects = list(pool.map(lambda source: self.compile(source, ext.include_dirs), ext.sources))
            libraries = [f"-L{d}" for d in ext.library_dirs] + [f"-l{lib}" for lib in ext.libraries]
            run([*COMPILER, "-shared", *objects, *libraries, *ext.extra_link_args, "-o", str(output)])
        except (OSError, RuntimeError, ImportError) as error:
            if is_main:
                write_facts(output.parent, {"built": False, "cause": short(error)})
            if not ext.optional:
                sys.exit(f"mmgen-kernels: {ext.name} does not build: {error}")
            sys.stderr.write(f"mmgen-kernels: building WITHOUT {ext.name}: {error}\n")
            return
        if is_main:
            compiler = subprocess.run([*COMPILER, "--version"], capture_output=True, text=True).stdout.splitlines()[0]
            torch = torch_directory()
            write_facts(output.parent, {"built": True, "torch": torch_version(torch), "compiler": compiler,
                                        "cuda": reason_against_cuda(torch) or "built"})

    def build_cuda(self, ext: Extension, output: Path) -> None:
        try:
            libraries = [f"-L{d}" for d in ext.library_dirs] + ["-ltorch_cpu", "-Xlinker", "--no-as-needed"]
            if torch_facts(torch_directory()).get("cuda") is None:
                # A torch without CUDA has no libtorch_cuda to link with; its name is all the linker needs.
                stub = Path(self.build_temp) / "stub" / "libtorch_cuda.so"
                stub.parent.mkdir(parents=True, exist_ok=True)
                run([*COMPILER, "-shared", "-fPIC", f"-Wl,-soname,{stub.name}", "-xc++", os.devnull, "-o", str(stub)])
                libraries.append(f"-L{stub.parent}")
            includes = [flag for d in ext.include_dirs for flag in (("-I", d) if d == "csrc" else ("-isystem", d))]
            command = ["nvcc", *NVCC_FLAGS, *MACROS, *includes, *ext.sources, *libraries, "-ltorch_cuda", "-o", str(output)]
            sys.stderr.write(run(command))
        except (OSError, RuntimeError) as error:
            write_facts(output.parent, {"cuda": short(error)})
            if not ext.optional:
                sys.exit(f"mmgen-kernels: {ext.name} does not build: {error}")
            sys.stderr.write(f"mmgen-kernels: building WITHOUT {ext.name}: {error}\n")

    def compile(self, source: str, include_dirs: list[str]) -> str:
        """The object of a source file; one newer than all that it was made from, by the same command, is kept."""
        target = OBJECTS / (source.replace("/", "_") + ".o")
        extra = next((flags for suffix, flags in INSTRUCTION_SET_FLAGS.items() if source.endswith(suffix)), [])
        if source == "csrc/probe.cpp":
            import pybind11

            extra = [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_path('include')}"]
        command = [*COMPILER, "-c", "-fPIC", *FLAGS, *extra, *MACROS, *[f"-I{d}" for d in include_dirs], source]
        made_by = f"{' '.join(command)}\n{torch_version(torch_directory())}\n"
        record = target.with_suffix(".txt")
        dependencies = target.with_suffix(".d")
        same_command = target.exists() and dependencies.exists() and record.exists() and record.read_text() == made_by
        if same_command and target.stat().st_mtime > newest(dependencies):
            return str(target)
        target.parent.mkdir(parents=True, exist_ok=True)
        record.unlink(missing_ok=True)
        partial = target.with_suffix(f".{os.getpid()}.partial")  # an interruption leaves no half-written object
        sys.stderr.write(run([*command, "-MMD", "-MF", str(dependencies), "-o", str(partial)]))
        os.replace(partial, target)
        record.write_text(made_by)
        return str(target)

    def copy_extensions_to_source(self) -> None:
        """Builds in place: the facts go where the extension goes, and an extension that did not build leaves no old one there."""
        build_py = self.get_finalized_command("build_py")
        package = Path(build_py.get_package_dir(PACKAGE))
        for ext in self.extensions:
            built = Path(self.get_ext_fullpath_in_build(ext))
            if not built.exists():
                (package / built.name).unlink(missing_ok=True)
        super().copy_extensions_to_source()
        facts = Path(self.build_lib) / PACKAGE / "_build.json"
        if facts.exists():
            shutil.copy(facts, package / "_build.json")

    def get_ext_fullpath_in_build(self, ext: Extension) -> str:
        return os.path.join(self.build_lib, self.get_ext_filename(self.get_ext_fullname(ext.name)))


class BuildPython(build_py):
    """build_py; where there is no extension to build, it leaves the cause for `mmgen-kernels info`."""

    def run(self) -> None:
        super().run()
        if EXTENSIONS:
            return
        package = Path(self.get_package_dir(PACKAGE)) if self.editable_mode else Path(self.build_lib) / PACKAGE
        package.mkdir(parents=True, exist_ok=True)
        for old in package.glob("_C.*so"):
            old.unlink()
        write_facts(package, {"built": False, "cause": CAUSE})


class Wheel(bdist_wheel):
    """bdist_wheel from an empty build folder: setuptools would pack whatever earlier builds left there."""

    def run(self) -> None:
        shutil.rmtree(self.get_finalized_command("build").build_lib, ignore_errors=True)
        super().run()


def run(command: list[str]) -> str:
    """Runs a compiler; returns its warnings, raises with its errors."""
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError as error:
        if command[0] == "nvcc":
            raise RuntimeError("no CUDA compiler: nvcc was not found") from error
        raise RuntimeError(f"no C++ compiler: {command[0]!r} was not found (install one, or name it in CXX)") from error
    except OSError as error:
        raise RuntimeError(f"the C++ compiler does not run: {error}") from error
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")
    return done.stderr


def newest(dependencies: Path) -> float:
    """When the last of the files changed that a makefile rule, as compilers write it, names; infinity if one is gone."""
    names = dependencies.read_text().replace("\\\n", " ").partition(":")[2].split()
    return max(os.stat(name).st_mtime if os.path.exists(name) else float("inf") for name in names)


def short(error: Exception) -> str:
    return str(error).strip()[-2000:]


def write_facts(folder: Path, facts: dict) -> None:
    """`mmgen-kernels info` reads these: what the C++ part was built with, or why it was not. Those of "cuda" alone are added."""
    path = folder / "_build.json"
    if "built" not in facts and path.exists():
        facts = json.loads(path.read_text()) | facts
    path.write_text(json.dumps(facts, indent=1) + "\n")


EXTENSIONS, CAUSE = extensions()
setup(
    ext_modules=EXTENSIONS,
    cmdclass={"build_ext": Build, "build_py": BuildPython, "bdist_wheel": Wheel},
    package_data={PACKAGE: ["py.typed"]},
    # no torch symbol and no Python symbol but stable ones: one wheel for every Python from 3.11 on
    options={"bdist_wheel": {"py_limited_api": "cp311"}} if EXTENSIONS else {},
)
