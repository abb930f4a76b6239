"""Several workers (`pytest -n 2 --dist loadgroup`): a file's tests stay together, for they share what they made; smoke runs go wherever there is room."""
import pytest


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    for item in items:
        if item.path.name != "test_smoke.py": item.add_marker(pytest.mark.xdist_group(item.path.name))
