"""The documentation's tables of algorithms are the code's."""

from __future__ import annotations

from pathlib import Path

import pytest

from mpicdsgd.algorithms import registry, table

PAGE = Path(__file__).parents[3] / "docs" / "algorithms.md"


def test_the_page_has_the_tables_of_now() -> None:
    page = PAGE.read_text()
    assert page == table.written(page), (
        "run: python -m mpicdsgd.algorithms.table docs/algorithms.md"
    )


def test_the_page_says_of_each_algorithm_what_its_update_is() -> None:
    first, _, _ = PAGE.read_text().partition(table.BEGIN)
    assert [name for name in registry.algorithms() if f"`{name}`" not in first] == []


def test_a_table_of_before_is_replaced(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"before\n{table.BEGIN}\nold\n{table.END}\nafter\n")
    table.main([str(page)])
    table.main([])
    printed = capsys.readouterr().out
    assert page.read_text() == f"before\n{table.BEGIN}\n\n{printed}\n{table.END}\nafter\n"


def test_every_setting_has_its_documentation() -> None:
    assert [key for key, _, what in table.settings() if not what] == []
