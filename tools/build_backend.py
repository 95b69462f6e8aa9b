"""The PEP 517 backend: setuptools' own, with the caller's torch in sight while compiling.

An isolated build sees only what build-system.requires lists. Listing torch there would download
another torch, perhaps of another version than the one the extension will meet at run time. So torch
is left out, and the hooks that compile look for it where the interpreter that runs the build would
find it without isolation (with pip: the environment that pip installs into). Those folders come
last in sys.path, behind everything that the isolated environment brings. Metadata and sdist never
import torch.
"""

import importlib.util
import site
import sys
from collections.abc import Mapping
from typing import Any

from setuptools import build_meta
from setuptools.build_meta import (  # noqa: F401  (hooks that need no torch)
    build_sdist,
    get_requires_for_build_editable,
    get_requires_for_build_sdist,
    get_requires_for_build_wheel,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)

Config = Mapping[str, Any] | None


def _show_callers_torch() -> None:
    folders = site.getsitepackages()
    if sys.prefix == sys.base_prefix:  # not in a virtual environment
        folders.append(site.getusersitepackages())
    for folder in folders:
        if importlib.util.find_spec("torch") is not None:
            return
        site.addsitedir(folder)


def build_wheel(
    wheel_directory: str, config_settings: Config = None, metadata_directory: str | None = None
) -> str:
    _show_callers_torch()
    return build_meta.build_wheel(wheel_directory, config_settings, metadata_directory)


def build_editable(
    wheel_directory: str, config_settings: Config = None, metadata_directory: str | None = None
) -> str:
    _show_callers_torch()
    return build_meta.build_editable(wheel_directory, config_settings, metadata_directory)
