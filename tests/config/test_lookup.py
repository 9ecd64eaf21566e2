"""Keys in which two configs differ."""

from config.lookup import config_differences


def test_differences_name_keys_and_leave_out_the_ignored_ones():
    old, new = {"A": {"B": 1, "C": 2}, "D": 3}, {"A": {"B": 1, "C": 5}, "D": 4}
    assert config_differences(old, new, ("D",)) == ["A.C: 2 -> 5"]
    assert config_differences(old, new, ("A",)) == ["D: 3 -> 4"]
