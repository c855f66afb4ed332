"""Regular expressions of strangers."""

import pytest

from lorakit.adapter.patterns import ends, matching
from lorakit.errors import ConfigError

PATHS = ["model.layers.0.q_proj", "model.layers.10.q_proj", "lm_head"]


def test_whole_paths_are_matched_and_ends_on_request():
    assert matching(r".*\.\d\.q_proj", PATHS, "x") == PATHS[:1]
    assert matching("q_proj", PATHS, "x") == []
    assert matching(ends("q_proj"), PATHS, "x") == PATHS[:2]
    assert matching(ends("lm_head"), PATHS, "x") == PATHS[2:]


def test_what_is_no_expression_or_takes_for_ever_is_an_error():
    with pytest.raises(ConfigError, match=r"rank_pattern 'a\(': 'a\(' is not a regular expression"):
        matching("a(", PATHS, "rank_pattern 'a('")
    with pytest.raises(ConfigError, match="takes too long to match"):
        matching(r"(\w|\w\w)*\1[!?]", ["abcdefghij" * 8], "x")
