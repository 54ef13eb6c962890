"""Figures in README and docs come from committed JSON."""

import re

import pytest

from bench import report


@pytest.mark.parametrize("page", report.PAGES, ids=lambda page: page.name)
def test_figures_are_those_of_the_json(page):
    text = page.read_text()
    assert report.rendered(text) == text, "run python -m bench.report"


def test_a_changed_figure_is_noticed():
    text = report.PAGES[0].read_text()
    block = next(report.BLOCK.finditer(text))
    number = re.search(r"\d+\.\d", block[0][len(block[1]) :])
    at = block.start() + len(block[1]) + number.start()
    changed = text[:at] + str((int(text[at]) + 1) % 10) + text[at + 1 :]
    assert changed != text == report.rendered(changed)


def test_a_figure_without_json_fails():
    with pytest.raises(KeyError):
        report.rendered("<!-- figures: dreamt-up -->\n<!-- end -->")
