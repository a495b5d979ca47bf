"""SGLang's frontend without the rest of SGLang.

`import sglang` takes 10 to 26 s, since SGLang's package file imports what servers need: torch and
transformers. `from lim_sglang.frontend import sgl` takes 2 s: the modules of `sglang.lang` are
loaded under a package whose file has not run. `import sglang as sgl` gives the same package then.
"""

import importlib
import logging
import sys
import threading
from collections.abc import Mapping
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import module_from_spec, spec_from_loader
from types import ModuleType
from typing import TYPE_CHECKING, Any

from lim_sglang.compat import check_version, missing_attributes, wrong_signatures

if TYPE_CHECKING:
    from sglang.lang.backend.base_backend import BaseBackend
    from sglang.lang.chat_template import ChatTemplate

    sgl: Any
    __all__ = ["BaseBackend", "ChatTemplate", "sgl"]

_LANGUAGE = "sglang.lang."
FRONTEND: Mapping[str, str] = {
    name: module
    for module, names in {
        f"{_LANGUAGE}api": "assistant assistant_begin assistant_end flush_cache function gen"
        " gen_int gen_string get_server_info image select separate_reasoning set_default_backend"
        " system system_begin system_end user user_begin user_end video",
        f"{_LANGUAGE}backend.runtime_endpoint": "RuntimeEndpoint",
        f"{_LANGUAGE}choices": "greedy_token_selection token_length_normalized"
        " unconditional_likelihood_normalized",
        "sglang.global_config": "global_config",
        "sglang.version": "__version__",
    }.items()
    for name in names.split()
}
"""Names of `sglang` that need no torch, by the module that defines each."""

USED_BY_PROGRAMS: Mapping[str, tuple[str, ...]] = {
    path: tuple(parameters.split())
    for path, parameters in {
        f"{_LANGUAGE}api.function": "func num_api_spec_tokens",
        f"{_LANGUAGE}api.user": "expr",
        f"{_LANGUAGE}backend.base_backend.BaseBackend.generate": "self s sampling_params",
        f"{_LANGUAGE}interpreter.ProgramState.fork": "self size position_ids_offset",
        f"{_LANGUAGE}interpreter.StreamExecutor.end": "self",
        f"{_LANGUAGE}chat_template.ChatTemplate": "name default_system_prompt"
        " role_prefix_and_suffix stop_str image_token audio_token style",
    }.items()
}
"""Parameters of the frontend's functions and classes that programs call or override."""
_CLASSES: Mapping[str, str] = {
    "BaseBackend": f"{_LANGUAGE}backend.base_backend",
    "ChatTemplate": f"{_LANGUAGE}chat_template",
}
_EXECUTOR = f"{_LANGUAGE}interpreter.StreamExecutor"
_EXECUTOR_STATE = ("variables", "variable_event", "messages_", "queue", "worker")

_LOADING = threading.RLock()
"""Held by the thread that loads the frontend or runs SGLang's package file."""


def __getattr__(name: str) -> Any:
    if name == "sgl":
        return load_frontend()
    if name not in _CLASSES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    load_frontend()
    return getattr(importlib.import_module(_CLASSES[name]), name)


def load_frontend() -> ModuleType:
    """Return the module `sglang`, loaded as far as programs need.

    If the frontend has other signatures than expected, or does not load by itself, the package file
    runs, with a warning. A package that is loaded already is returned as it is.

    Raises:
        ServerError: another SGLang than the pinned one, or none, is installed.
    """
    with _LOADING:
        if "sglang" not in sys.modules:
            check_version()
            _load_light_package()
        return sys.modules["sglang"]


def _load_light_package() -> None:
    spec = PathFinder.find_spec("sglang")
    if spec is None:  # another finder has it, such as an editable installation's
        importlib.import_module("sglang")
        return
    package = sys.modules["sglang"] = module_from_spec(spec)
    package.__class__ = _LightPackage
    assert isinstance(package, _LightPackage)
    try:
        for module in {f"{_LANGUAGE}api", "sglang.global_config", "sglang.version"}:
            importlib.import_module(module)
        reasons = wrong_signatures(USED_BY_PROGRAMS)
        reasons = reasons or missing_attributes(_EXECUTOR, _EXECUTOR_STATE)
    except (ImportError, AttributeError) as error:
        reasons = [f"SGLang's frontend does not load by itself ({error})"]
    sys.meta_path.insert(0, _ServerModules())
    if reasons:
        logging.getLogger(__name__).warning("loading all of SGLang, since %s", reasons[0])
        package.complete()


class _LightPackage(ModuleType):
    """The package `sglang` before its package file has run: it has the names of `FRONTEND`.

    Any other name, and any module outside `sglang.lang`, runs the package file first. So a process
    that comes to serve has all of SGLang.
    """

    is_completing = False

    def __getattr__(self, name: str) -> Any:
        if module := FRONTEND.get(name):
            value = getattr(importlib.import_module(module), name)
            setattr(self, name, value)
            return value
        if name.startswith("__") and name != "__all__":  # asked for by inspection
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        self.complete()
        return ModuleType.__getattribute__(self, name)  # the class is another one now

    def complete(self) -> None:
        """Run the package file; the module is an ordinary one afterwards."""
        with _LOADING:
            if type(self) is ModuleType or self.is_completing:
                return
            self.is_completing = True
            try:
                spec = self.__spec__
                assert spec
                assert spec.loader
                spec.loader.exec_module(self)
                self.__class__ = ModuleType  # type: ignore[assignment]
            finally:
                del self.is_completing


class _ServerModules(MetaPathFinder):
    """Finder that completes a light `sglang` before a module outside `sglang.lang` is imported."""

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> ModuleSpec | None:
        """Return None, or a loader of the module if completing the package has imported it."""
        package = sys.modules.get("sglang")
        is_outside = fullname.startswith("sglang.") and not fullname.startswith(_LANGUAGE)
        if not isinstance(package, _LightPackage) or package.is_completing or not is_outside:
            return None
        package.complete()
        # Taken out, so that the import system believes this finder and runs the module only once.
        loaded = sys.modules.pop(fullname, None)
        return spec_from_loader(fullname, _Loaded(loaded)) if loaded else None


class _Loaded(Loader):
    """Loader of a module that is loaded already."""

    def __init__(self, module: ModuleType) -> None:
        self._module, self._spec = module, module.__spec__

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        """Return the module."""
        return self._module

    def exec_module(self, module: ModuleType) -> None:
        """Give the module back its own spec."""
        module.__spec__ = self._spec
