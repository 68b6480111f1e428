"""The sources and models of the evaluation tests, whose results the pages show."""

from tests.evaluation.conftest import classifier, index, masks, segmenter  # noqa: F401
