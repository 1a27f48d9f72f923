import pytest

from moevlm.metrics.text import exact_match, normalise_answer, num_words, word_f1


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Yes.", "yes"),
        ("  The   red\tstar \n", "red star"),
        ("three", "3"),
        ("None", "0"),
        ("A", "a"),
        ("a cat", "cat"),
        ("top-left", "top left"),
        ("top left,", "top left"),
        ("3.5", "3.5"),
        ("5.", "5"),
        (".5", ".5"),
        ("don't", "don't"),
        ("'DOG'", "dog"),
        ('"SUN"!', "sun"),
        ("", ""),
        ("...", ""),
    ],
)
def test_normalise_answer_table(text: str, expected: str) -> None:
    assert normalise_answer(text) == expected


@pytest.mark.parametrize("text", ["The Red star.", "two, three", "A", "U.S.A.", "'x'", "3.5 cm"])
def test_normalising_twice_changes_nothing(text: str) -> None:
    assert normalise_answer(normalise_answer(text)) == normalise_answer(text)


def test_exact_match_takes_any_accepted_answer() -> None:
    assert exact_match("2", ["one", "two"])
    assert not exact_match("3", ["one", "two"])
    assert not exact_match("red star", "red")


def test_words_are_separated_by_white_space() -> None:
    assert num_words(" a red\nstar. ") == 3
    assert num_words("") == 0


def test_word_f1_by_hand() -> None:
    assert word_f1("a red star", "the red moon") == pytest.approx(0.5)
    assert word_f1("star star", "star") == pytest.approx(2 / 3)
    assert word_f1("Two stars.", "2 stars") == 1
    assert word_f1("", "star") == 0
    assert word_f1("", "") == 1
