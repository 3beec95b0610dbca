"""The tests that say most come first, for when the time on a device is short."""

ORDER = ("scan", "ssd", "paths", "conv", "norm", "update", "kernels", "mixers", "sanitizer")


def pytest_collection_modifyitems(items):
    def rank(item):
        name = item.path.stem
        return next((i for i, word in enumerate(ORDER) if word in name), len(ORDER))

    items.sort(key=rank)
