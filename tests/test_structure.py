"""The rules of the tree that no linter knows."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("lim_sglang", "lim_sglang/bench", "kernels", "programs", "evals")
MAX_LINES = 300

# Each module of the server side may import those before it.
LAYERS = (
    *(
        "errors",
        "signals",
        "versions",
        "config",
        "schedule",
        "refusals",
        "plan",
        "stats",
        "tracing",
        "flags",
    ),
    *(
        "compat",
        "gpu",
        "audit",
        "kept_attention",
        "backend",
        "cpu_backend",
        "model_runner",
        "plugin",
    ),
    *("models", "server", "serve"),
)
SERVING = {*LAYERS[LAYERS.index("plan") :], "cpu_platform", "gate"} - {"compat"}


def sources(*folders: str) -> list[Path]:
    """The Python files of some folders, symlinks not followed."""
    return sorted(path for folder in folders for path in (ROOT / folder).glob("*.py"))


def imports(path: Path) -> Iterator[str]:
    """The dotted names that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def own_module(name: str) -> str | None:
    """`plan` for `lim_sglang.counters.DecodePlan`; None for what is not ours."""
    found = re.match(r"lim_sglang\.(\w+)", name)
    return found[1] if found else None


@pytest.mark.parametrize("index", range(len(LAYERS)), ids=LAYERS)
def test_imports_go_one_way(index: int) -> None:
    later = set(LAYERS[index + 1 :])
    used = {own_module(name) for name in imports(ROOT / "lim_sglang" / f"{LAYERS[index]}.py")}
    assert not used & later


def test_kernels_import_only_torch_triton_and_each_other() -> None:
    allowed = set(sys.stdlib_module_names) | {"torch", "triton"}
    for path in sources("kernels"):
        foreign = {n for n in imports(path) if not n.startswith("lim_sglang.kernels.")}
        packages = {name.split(".")[0] for name in foreign} - allowed
        assert packages == ({"flashinfer"} if path.name == "scoring.py" else set()), path


def test_programs_and_evals_speak_http_only() -> None:
    for path in sources("programs", "evals"):
        # What starts a server and ends it, in a process of its own.
        may_use = {"serve", "server"} if path == ROOT / "evals/serving.py" else set()
        assert not {own_module(name) for name in imports(path)} & SERVING - may_use, path


def test_only_compat_names_sglang_internals() -> None:
    # versions.py holds their signatures, doctor.py the names of SGLang's entry point groups.
    may_name = ("compat.py", "versions.py", "doctor.py")
    for path in sources(*PACKAGES):
        internal = re.findall(r"sglang\.(?:srt|lang)\b", path.read_text())
        assert not internal or path.name in may_name, path


def test_importing_the_package_is_light() -> None:
    heavy = "{'torch', 'sglang', 'transformers', 'datasets', 'math_verify'}"
    program = f"import sys, lim_sglang.cli; print(sorted({heavy} & set(sys.modules)))"
    shown = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert shown.stdout.strip() == "[]", shown.stderr


@pytest.mark.parametrize("folder", ["kernels", "programs", "evals"])
def test_folders_behind_symlinks_have_no_package_marker(folder: str) -> None:
    assert not (ROOT / folder / "__init__.py").exists()
    assert (ROOT / "lim_sglang" / folder).is_symlink()


def test_no_file_is_called_like_a_standard_module() -> None:
    names = {path.stem for path in sources(*PACKAGES)} - {"__init__"}
    assert not names & set(sys.stdlib_module_names)


def test_no_code_file_is_long() -> None:
    files = [*sources(*PACKAGES), *(ROOT / "tests").rglob("*.py"), ROOT / "launch.sh"]
    long = {str(path): n for path in files if (n := len(path.read_text().splitlines())) > MAX_LINES}
    assert not long


def test_the_readmes_file_tree_is_true() -> None:
    readme = (ROOT / "README.md").read_text()
    tree = re.search(r"```text\n(lim_sglang/.*?)```", readme, re.DOTALL)
    assert tree, "the README shows no file tree"
    named: set[str] = set()
    folder = ""
    for line in tree[1].splitlines():
        path = line.split()[0]
        folder = "" if not line.startswith(" ") else folder
        if path.endswith("/"):
            folder = path
        named.add(path if path.endswith("/") else folder + path)
    missing = [path for path in named if not (ROOT / path).exists()]
    unnamed = {str(p.relative_to(ROOT)) for p in sources(*PACKAGES)} - named
    assert not missing
    # The README names lim_sglang/bench/ as a whole.
    assert not {path for path in unnamed - {"lim_sglang/__init__.py"} if "/bench/" not in path}


def kernels_that_follow() -> dict[str, ast.FunctionDef]:
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
        and "FOLLOWS" in [argument.arg for argument in function.args.args]
    }


def calls(function: ast.FunctionDef, name: str) -> bool:
    """Whether a function calls another one by this name."""
    return any(
        isinstance(node, ast.Call) and ast.unparse(node.func) == name for node in ast.walk(function)
    )


def test_a_kernel_that_follows_waits_before_all_else() -> None:
    kernels = kernels_that_follow()
    assert set(kernels) == {"_shortlist", "_rank", "_compact", "_pool", "_keep_heaviest"}
    for function in kernels.values():
        lines = [ast.unparse(line) for line in function.body]
        assert "follow(FOLLOWS)" in lines[: 1 + (lines[0] == "let_next_follow(FOLLOWS)")]


def test_only_kernels_whose_next_one_is_ours_let_it_follow() -> None:
    kernels = kernels_that_follow()
    assert {name for name in kernels if calls(kernels[name], "let_next_follow")} == {
        *("_shortlist", "_rank", "_pool")
    }
    trees = (ast.parse(path.read_text()) for path in sources("kernels"))
    functions = (node for tree in trees for node in tree.body if isinstance(node, ast.FunctionDef))
    triggers = {f.name for f in functions if calls(f, "gdc_launch_dependents")}
    assert triggers == {"let_next_follow"}


def test_a_kernel_is_launched_early_if_and_only_if_it_waits() -> None:
    follow, launched = kernels_that_follow(), set()
    for path in sources("kernels"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript):  # kernel[grid]
                name = ast.unparse(node.func.value)
                options = [ast.unparse(word.value) for word in node.keywords if not word.arg]
                assert ("follows()" in options) == (name in follow)
                assert not any(word.arg == "launch_pdl" for word in node.keywords)
                launched.add(name)
    assert launched >= set(follow)
