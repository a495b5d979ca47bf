"""The rules of the tree that no linter knows."""

import ast
import importlib
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import triton.language as tl

from lim_sglang.policies import POLICIES

ROOT = Path(__file__).parents[1]
FOLDERS = (
    *("lim_sglang", "lim_sglang/bench", "lim_sglang/gates", "lim_sglang/launch"),
    *("lim_sglang/layers", "lim_sglang/lossless", "lim_sglang/policies", "lim_sglang/tracing"),
    *("kernels", "programs", "programs/grading", "programs/proxy", "evals"),
)
MAX_LINES = 650
MAX_FILES = 26
"""Most files of a folder; a larger one needs folders of its own."""
INTERNAL = ("compat.py", "mends.py", "frontend.py", "internals.py", "doctor.py")
"""Files that may name modules of SGLang that it does not document."""
SERVER_SIDE = (
    *("errors", "config", "counters", "compat", "frontend", "validation", "flags", "audit"),
    *("mends", "request_checks", "request_door"),
    *("models", "attention_backend", "cpu_backend", "lossless.sampler"),
    *("lossless.sampling", "lossless.cpu_kernels", "lossless.widths", "lossless.internals"),
    *("lossless.passes", "lossless.cpu_passes", "lossless.gpu_backends", "lossless.row_pass"),
    *("lossless.gpu_passes", "lossless.worker", "lossless.algorithm", "model_runner", "plugin"),
    *("launch.supervisor", "launch.server_log", "launch.server", "launch.replicas"),
    "launch.serve",
    *("verify_gpu", "doctor"),
)
"""Modules of lim_sglang/, lossless/ and launch/, each of which may import those before it."""
BALANCES: Mapping[str, tuple[str, ...]] = {"launch.replicas": ("programs.proxy.",)}
"""Modules of the server side that put a proxy before servers, and the folder that has the proxy."""
EVERYWHERE = {
    *("errors", "config", "environment", "markdown_section", "plot_style", "progress"),
    "policies",
}
"""Modules of lim_sglang/, and the folder, that every folder may import."""
MAY_IMPORT: Mapping[str, set[str]] = {
    "kernels": {"kernels"},
    "layers": {"layers", "kernels"},
    "policies": {"policies", "gates", "kernels", "errors"},
    "gates": {"gates", "kernels", "errors", "compat", "progress", "config", "models"},
    "programs": {"programs", "frontend", *EVERYWHERE},
    "evals": {"evals", "programs", "launch.server", *EVERYWHERE},
    "bench": {"bench", "gates", "kernels", "programs", "evals", *SERVER_SIDE, *EVERYWHERE},
    "tracing": {
        "tracing",
        "bench",
        "gates",
        "kernels",
        "programs",
        "evals",
        *SERVER_SIDE,
        *EVERYWHERE,
    },
}
"""Folders, and single modules, that each folder may import."""


def sources(*folders: str) -> list[Path]:
    """List the Python files of some folders, symlinks not followed."""
    return sorted(path for folder in folders for path in (ROOT / folder).glob("*.py"))


def module_name(path: Path) -> str:
    """Return the name under `lim_sglang` that a file is imported by."""
    inside = path.relative_to(ROOT).with_suffix("")
    return ".".join(part for part in inside.parts if part != "lim_sglang")


MODULES = {module_name(path): path for path in sources(*FOLDERS) if path.stem != "__init__"}


def imports(path: Path) -> Iterator[str]:
    """Yield the dotted names that a file imports, but for its part as a script."""
    for statement in ast.parse(path.read_text()).body:
        if isinstance(statement, ast.If) and ast.unparse(statement.test).startswith("__name__"):
            continue
        for node in ast.walk(statement):
            if isinstance(node, ast.Import):
                yield from (alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.module:
                yield from (f"{node.module}.{alias.name}" for alias in node.names)


def own_imports(path: Path) -> set[str]:
    """Return the modules of this project that a file imports."""
    found = set()
    for name in imports(path):
        inside = name.removeprefix("lim_sglang.")
        for module in (inside, inside.rpartition(".")[0]):
            if module in MODULES and name != inside:
                found.add(module)
                break
    return found - {module_name(path)}


ARROWS = {name: own_imports(path) for name, path in MODULES.items()}


def test_no_module_imports_itself_through_others() -> None:
    left = dict(ARROWS)
    while free := [name for name, used in left.items() if not used & set(left)]:
        for name in free:
            del left[name]
    assert not left, "these modules import each other in a circle"


@pytest.mark.parametrize("module", SERVER_SIDE)
def test_the_server_side_imports_downwards(module: str) -> None:
    below = {*SERVER_SIDE[: SERVER_SIDE.index(module)], *EVERYWHERE}
    folders = ("kernels.", "layers.", "policies.", *BALANCES.get(module, ()))
    assert {name for name in ARROWS[module] if not name.startswith(folders)} <= below


@pytest.mark.parametrize("folder", MAY_IMPORT)
def test_a_folder_imports_only_what_lies_below_it(folder: str) -> None:
    rooms = {name: used for name, used in ARROWS.items() if name.startswith(f"{folder}.")}
    for name, used in rooms.items():
        above = {n for n in used if not {n, n.partition(".")[0]} & MAY_IMPORT[folder]}
        assert not above, f"{name} imports {above}"


def test_every_module_has_its_place() -> None:
    alone = {
        name for name in MODULES if "." not in name or name.startswith(("launch.", "lossless."))
    }
    assert alone == {*SERVER_SIDE, *EVERYWHERE, "cli", "__main__", "api"} - {"policies"}


def test_only_the_package_itself_imports_the_python_interface() -> None:
    """`api.py` is the one exception: it lies above programs and evals, and the package names it."""
    assert not [name for name, used in ARROWS.items() if "api" in used]
    assert "lim_sglang.api.ask" in set(imports(ROOT / "lim_sglang" / "__init__.py"))


def test_kernels_import_only_torch_triton_and_each_other() -> None:
    allowed = set(sys.stdlib_module_names) | {"torch", "triton"}
    for path in sources("kernels"):
        foreign = {n for n in imports(path) if not n.startswith("lim_sglang.kernels.")}
        packages = {name.split(".")[0] for name in foreign} - allowed
        assert packages == ({"flashinfer"} if path.name == "scores.py" else set()), path


@pytest.mark.parametrize("module", ["attention_backend", "cpu_backend", "model_runner", "audit"])
def test_a_decode_step_asks_for_no_policy_by_name(module: str) -> None:
    words = {
        node.value
        for node in ast.walk(ast.parse(MODULES[module].read_text()))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }
    assert not words & POLICIES.keys()


def test_four_modules_and_the_doctor_name_sglang_internals() -> None:
    for path in sources(*FOLDERS):
        internal = re.findall(r"sglang\.(?:srt|lang)\b", path.read_text())
        # doctor.py has the names of SGLang's entry point groups.
        assert not internal or path.name in INTERNAL, path


def test_importing_the_package_is_light() -> None:
    heavy = "{'torch', 'sglang', 'transformers', 'datasets', 'math_verify', 'matplotlib', 'pandas'}"
    for module, more in (("lim_sglang", "{'rich', 'httpx', 'typer'}"), ("lim_sglang.cli", "set()")):
        program = f"import sys, {module}; print(sorted(({heavy} | {more}) & set(sys.modules)))"
        shown = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
        assert shown.stdout.strip() == "[]", shown.stderr


@pytest.mark.parametrize("folder", ["kernels", "programs", "evals"])
def test_folders_behind_symlinks_have_no_package_marker(folder: str) -> None:
    assert not (ROOT / folder / "__init__.py").exists()
    assert (ROOT / "lim_sglang" / folder).is_symlink()


def test_no_file_is_called_like_a_standard_module() -> None:
    assert not {path.stem for path in sources(*FOLDERS)} & (
        set(sys.stdlib_module_names) - {"__init__", "__main__"}
    )


def test_folders_hold_few_files_and_none_is_long() -> None:
    files = sources(*FOLDERS)
    per_folder = Counter(path.parent for path in files)
    assert not {str(folder): n for folder, n in per_folder.items() if n > MAX_FILES}
    tests = (ROOT / "tests").rglob("*.py")
    long = {
        str(p): n for p in [*files, *tests] if (n := len(p.read_text().splitlines())) > MAX_LINES
    }
    assert not long


def test_constants_of_kernels_equal_themselves() -> None:
    """Triton refuses a second launch where a global constant has changed, and NaN always has."""
    for path in sources("kernels"):
        module = importlib.import_module(f"lim_sglang.kernels.{path.stem}")
        for name, constant in vars(module).items():
            if isinstance(constant, tl.constexpr):
                assert constant.value == constant.value, name


def kernels_with_pdl() -> dict[str, ast.FunctionDef]:
    """Kernels that are launched while the one before still runs."""
    functions = (
        node
        for path in sources("kernels")
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.FunctionDef)
    )
    return {
        function.name: function
        for function in functions
        if function.name.startswith("_")
        and "USE_PDL" in [argument.arg for argument in function.args.args]
    }


def calls(function: ast.FunctionDef, name: str) -> bool:
    """Return True if a function calls another function by this name."""
    return any(
        isinstance(node, ast.Call) and ast.unparse(node.func) == name for node in ast.walk(function)
    )


def test_a_kernel_with_pdl_waits_before_all_else() -> None:
    kernels = kernels_with_pdl()
    assert set(kernels) == {
        "_shortlist_tokens",
        "_rank_tokens",
        "_compact_slots",
        "_softmax_mass",
        "_topk_by_mass",
        *("_multiply", "_norm_rotate_store"),
    }
    for function in kernels.values():
        lines = [ast.unparse(line) for line in function.body]
        assert "pdl_wait(USE_PDL)" in lines[: 1 + (lines[0] == "pdl_launch_next(USE_PDL)")]


def test_only_kernels_whose_next_one_waits_launch_it_early() -> None:
    """The next one is ours; of `_multiply` also a norm, which waits first (`docs/design.md`)."""
    kernels = kernels_with_pdl()
    assert {name for name in kernels if calls(kernels[name], "pdl_launch_next")} == {
        *("_shortlist_tokens", "_rank_tokens", "_softmax_mass", "_multiply")
    }
    trees = (ast.parse(path.read_text()) for path in sources("kernels"))
    functions = (node for tree in trees for node in tree.body if isinstance(node, ast.FunctionDef))
    triggers = {f.name for f in functions if calls(f, "gdc_launch_dependents")}
    assert triggers == {"pdl_launch_next"}


def test_a_kernel_is_launched_early_if_and_only_if_it_waits() -> None:
    follow, launched = kernels_with_pdl(), set()
    for path in sources("kernels"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript):  # kernel[grid]
                name = ast.unparse(node.func.value)
                options = [ast.unparse(word.value) for word in node.keywords if not word.arg]
                assert ("pdl_options()" in options) == (name in follow)
                assert not any(word.arg == "launch_pdl" for word in node.keywords)
                launched.add(name)
    assert launched >= set(follow)
