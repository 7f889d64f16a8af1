"""What holds for all tests."""


def pytest_ignore_collect(collection_path, config):
    """Leave the smoke tests alone unless they are asked for: their tasks would be every app's."""
    return True if collection_path.name == "smoke" and config.option.markexpr == "not smoke" else None
