# Copyright 2026 The GKC Authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""Lazy registration with transformers' Auto classes, so that `import modeling_gkc` does not import transformers.

Each module of this package registers its own classes when it is imported. `register` imports these modules at once
where transformers' Auto classes are loaded already. Else it watches the imports of both packages and imports ours when
the outermost one ends, as modules that are only half loaded cannot be imported from. Either way an Auto class knows
this package's classes before anybody can use it.
"""

import importlib
import sys
import threading
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

_AUTO = "transformers.models.auto"
# The Auto modules, and the modules of this package that register with each.
_REGISTERING = {
    f"{_AUTO}.configuration_auto": ("configuration_gkc", "configuration_gkc_zero_shot"),
    f"{_AUTO}.image_processing_auto": ("image_processing_gkc",),
    f"{_AUTO}.processing_auto": ("processing_gkc",),
    f"{_AUTO}.modeling_auto": (
        "modeling_clip_convnext",
        "modeling_clip_resnet",
        "modeling_gkc",
        "modeling_gkc_zero_shot",
    ),
}


class _WatchedImports(MetaPathFinder):
    """Import hook that observes imports of both packages until this one is registered with all Auto classes."""

    def __init__(self):
        self.waiting = dict(_REGISTERING)
        self.depth = threading.local()

    def find_spec(self, fullname: str, path: object = None, target: ModuleType | None = None) -> ModuleSpec | None:
        """Find a module of both packages by the other finders, and wrap its loader to observe its import."""
        if not fullname.startswith(("transformers.", f"{__package__}.")):
            return None
        for finder in sys.meta_path:
            spec = None if finder is self else finder.find_spec(fullname, path, target)
            if spec is not None:
                if spec.loader is not None:
                    spec.loader = _NotingLoader(spec.loader, self)
                return spec
        return None

    def register_loaded(self) -> None:
        """Import the modules of this package whose Auto module is loaded."""
        for auto_module in [name for name in self.waiting if name in sys.modules]:
            for name in self.waiting.pop(auto_module, ()):
                importlib.import_module(f".{name}", __package__)
        if not self.waiting and self in sys.meta_path:
            sys.meta_path.remove(self)


class _NotingLoader(Loader):
    """Loader that executes a module by its own loader and registers this package after the outermost import."""

    def __init__(self, loader: Loader, imports: _WatchedImports):
        self.loader, self.imports = loader, imports

    def __getattr__(self, name: str) -> object:
        """Delegate to the module's own loader, from which `python -m` and others get code, source and resources."""
        return getattr(self.loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        """Create the module as its own loader does."""
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        """Execute the module by its own loader, then register if no other observed import is in progress."""
        # Restored, because readers of the module's source or resources need its own loader.
        module.__loader__ = module.__spec__.loader = self.loader
        depth = self.imports.depth
        depth.value = getattr(depth, "value", 0) + 1
        try:
            self.loader.exec_module(module)
        finally:
            depth.value -= 1
        if depth.value == 0:
            self.imports.register_loaded()


def register() -> None:
    """Register this package's classes with transformers' Auto classes, now or as soon as they are loaded."""
    imports = _WatchedImports()
    sys.meta_path.insert(0, imports)
    imports.register_loaded()


__all__ = ["register"]
