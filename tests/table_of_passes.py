"""The table of passes at the end of `pytest -m cuda`."""

import pytest

WAYS, PRECISIONS = ("head", "layer4", "all"), ("fp32", "bf16", "fp16", "auto")
passes = pytest.StashKey[dict[tuple[str, str, str], str]]()


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item):
    outcome = yield
    report, found = outcome.get_result(), getattr(item, "callspec", None)
    is_last = report.when == "call" or (report.when == "setup" and not report.passed)
    if found and is_last and {"where", "way", "precision"} <= set(found.params):
        key = (found.params["where"], found.params["way"], found.params["precision"])
        item.config.stash.setdefault(passes, {})[key] = report.outcome


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    told = config.stash.get(passes, {})
    for where in dict.fromkeys(where for where, _, _ in told):
        terminalreporter.section(f"training on {where}")
        terminalreporter.write_line(f"{'':<8}" + "".join(f"{precision:>9}" for precision in PRECISIONS))
        for way in WAYS:
            row = "".join(f"{told.get((where, way, precision), '–'):>9}" for precision in PRECISIONS)
            terminalreporter.write_line(f"{way:<8}{row}")
