"""Packages are listed by hand: `kernels/` stands at the top level and installs as `avadclip_fast.kernels`."""

from setuptools import setup

PACKAGES = ["reference", "ops", "modules", "models", "data", "engine", "cli", "kernels"]

setup(
    packages=["avadclip_fast", *(f"avadclip_fast.{name}" for name in PACKAGES)],
    package_dir={"avadclip_fast": "avadclip_fast", "avadclip_fast.kernels": "kernels"},
    package_data={"avadclip_fast": ["py.typed"]},
)
