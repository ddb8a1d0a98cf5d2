"""Build backend: setuptools, plus the sight of the torch that is already installed.

pip builds in an isolated environment. The kernels need only torch's headers and the names of two libraries, so the
torch of the environment being installed into serves, and no second one is downloaded. Where there is none, or where
the front end isolates by a separate environment, the build asks for one.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from functools import cache

import setuptools
from setuptools import build_meta
from setuptools.build_meta import build_sdist, get_requires_for_build_sdist, prepare_metadata_for_build_wheel

__all__ = [
    "build_editable",
    "build_sdist",
    "build_wheel",
    "get_requires_for_build_editable",
    "get_requires_for_build_sdist",
    "get_requires_for_build_wheel",
    "prepare_metadata_for_build_editable",
    "prepare_metadata_for_build_wheel",
]

if int(setuptools.__version__.split(".")[0]) < 77:  # else it would find fault with pyproject.toml
    sys.exit(
        f"metate: setuptools {setuptools.__version__} is older than 77.\n"
        "--no-build-isolation builds with what is installed: `pip install --upgrade setuptools`, or leave the option\n"
        "out, and run this again."
    )

TORCH = (2, 10)
PROBE = """
import importlib.metadata, json, sys
try:
    print(json.dumps([importlib.metadata.version("torch"), sys.path]))
except importlib.metadata.PackageNotFoundError:
    print("null")
"""


@cache
def torch_path() -> list[str]:
    """`sys.path` of the environment being installed into, if a torch new enough is on it."""
    # pip isolates through these variables: without them the same interpreter is the user's own.
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONNOUSERSITE")}
    try:
        answer = subprocess.run([sys.executable, "-c", PROBE], env=environment, capture_output=True, check=True)
        found = json.loads(answer.stdout)
    except (OSError, subprocess.CalledProcessError, ValueError):
        return []
    if not found or tuple(int(part) for part in found[0].split(".")[:2]) < TORCH:
        return []
    return [path for path in found[1] if path]


def runs(tool: str) -> bool:
    """A script of the user's environment may be found, and fail here: its package is hidden from an isolated build."""
    return bool(shutil.which(tool)) and subprocess.run([tool, "--version"], capture_output=True).returncode == 0


def requirements() -> list[str]:
    tools = [tool for tool in ("cmake", "ninja") if not runs(tool)]
    return tools + ([] if torch_path() else [f"torch>={TORCH[0]}.{TORCH[1]}"])


def get_requires_for_build_wheel(config_settings=None):
    return build_meta.get_requires_for_build_wheel(config_settings) + requirements()


def get_requires_for_build_editable(config_settings=None):
    return build_meta.get_requires_for_build_editable(config_settings) + requirements()


prepare_metadata_for_build_editable = build_meta.prepare_metadata_for_build_editable


def build_wheel(wheel_directory, config_settings=None, metadata_directory=None):
    sys.path += torch_path()
    return build_meta.build_wheel(wheel_directory, config_settings, metadata_directory)


def build_editable(wheel_directory, config_settings=None, metadata_directory=None):
    sys.path += torch_path()
    return build_meta.build_editable(wheel_directory, config_settings, metadata_directory)
