# SPDX-License-Identifier: Apache-2.0
"""Everything is in setup.cfg; here is only what it cannot say: that the sdist carries the tests and their tools."""

from __future__ import annotations

from pathlib import Path

from setuptools import setup
from setuptools.command.sdist import sdist


class SdistWithTests(sdist):
    """An sdist whose receiver can run what the project's own CI runs."""

    def make_release_tree(self, base_dir: str, files: list[str]) -> None:
        """Add the tests and `.ci/` to the files that setuptools finds by itself."""
        patterns = ("test_*.py", ".ci/*", ".ci/*/*")
        more = {str(path) for pattern in patterns for path in Path().glob(pattern) if path.is_file()}
        super().make_release_tree(base_dir, sorted({*files, *more}))


setup(cmdclass={"sdist": SdistWithTests})
