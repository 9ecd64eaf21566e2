"""Timelines: values over the epochs of a run."""

import pytest

from common.timeline import parse, parse_optional


def test_steps_hold_until_the_next_point():
    line = parse("0:0.4, 260:0.6", "KEY")
    assert [line.at(e) for e in (0, 259, 259.9, 260, 299)] == [0.4, 0.4, 0.4, 0.6, 0.6]
    assert line.values == (0.4, 0.6)
    assert line.end == 260


def test_ramps_are_linear_and_may_be_followed_by_steps():
    line = parse("0:1 -> 10:2 -> 20:0, 30:5", "KEY")
    assert [line.at(e) for e in (0, 5, 10, 15, 20, 29, 30, 99)] == [1, 1.5, 2, 1, 0, 0, 5, 5]


def test_ramps_of_sizes_go_in_multiples_and_end_at_their_last_value():
    line = parse("0:130 -> 10:230", "KEY", multiple=32)
    assert [line.at(e) for e in (0, 1, 5, 9, 10)] == [130, 128, 192, 224, 230]


def test_text_of_a_timeline_parses_to_the_same_timeline():
    for text in ("0:0.4, 260:0.6", "0:1 -> 10:2 -> 20:0, 30:5", "0:0.99996"):
        assert str(parse(text, "KEY")) == text


def test_empty_text_is_no_timeline():
    assert parse_optional("", "KEY") is None


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("0.4", "'0.4' is not EPOCH:VALUE"),
        ("0:0.4; 260:0.6", "is not EPOCH:VALUE"),
        ("5:0.4", "must begin with epoch 0"),
        ("0:0.4 ->", "is not EPOCH:VALUE"),
        ("0:1, 9:2, 9:3", "epoch 9 does not come after 9"),
        ("0:1.2.3", "is not EPOCH:VALUE"),
        ("0:1, 2.5:3", "'2.5:3' is not EPOCH:VALUE with a whole epoch"),
    ],
)
def test_wrong_text_is_named_with_its_key(text, part):
    with pytest.raises(ValueError, match=r"TIMELINE\.KEY") as caught:
        parse(text, "TIMELINE.KEY")
    assert part in str(caught.value)
