from importlib.util import find_spec

import pytest

collect_ignore_glob = [] if find_spec("mmengine") else ["test_*.py"]


def pytest_collection_modifyitems(items):
    for item in items:
        if "tests/openmmlab" in item.path.as_posix():
            item.add_marker(pytest.mark.openmmlab)
