"""A browser without a window, for tests of pages: chromium, which .ci/run installs."""

import os
import shutil

import pytest

FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage")
NOWHERE = "--host-resolver-rules=MAP * ~NOTFOUND"  # no name leads anywhere: a page must not need the network


def find_browser() -> str:
    """Path of chromium; a test without it is skipped, and in continuous integration fails."""
    found = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if not found and os.environ.get("CI"):
        pytest.fail("no browser is here: apt-get install chromium, as .ci/run does")
    if not found:
        pytest.skip("no chromium is installed here; .ci/run installs it")
    return found
