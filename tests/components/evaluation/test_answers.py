"""Normalized answers, worked out by hand from the rules of SQuAD, TriviaQA, GSM8K and MATH."""

from decimal import Decimal

import pytest

from kasa_tune.components.evaluation import answers, math_answers

# --------------------------------------------------------------------------------- words


@pytest.mark.parametrize(
    ("text", "squad", "trivia"),
    [
        ("The  Beatles!", "beatles", "beatles"),
        ("an apple, a pear", "apple pear", "apple pear"),
        ("Theatre", "theatre", "theatre"),
        ("U.S.", "us", "u s"),
        ("rock-and-roll", "rockandroll", "rock and roll"),
        ("O’Hara", "o’hara", "o hara"),
        ("the", "", ""),
        ("snake_case", "snakecase", "snake case"),
    ],
)
def test_normalization(text, squad, trivia):
    assert answers.squad_normalized(text) == squad
    assert answers.triviaqa_normalized(text) == trivia


def test_any_alias_will_do():
    assert answers.exact_match("December 1972.", ["14 December 1972 UTC", "December 1972"]) == 1
    assert answers.exact_match("in December 1972", ["December 1972"]) == 0
    assert answers.exact_match("the", ["a"]) == 1  # nothing is left of either
    assert answers.exact_match(" Fox", ["fox"], answers.stripped) == 0
    assert answers.exact_match(" fox\n", ["fox"], answers.stripped) == 1


def test_f1_is_of_the_best_reference():
    # 2 of 3 given words are among 4: 2 * 2 / 7; the other reference shares none
    assert answers.f1("red cat sat", ["cat sat on mat", "dog"]) == pytest.approx(4 / 7)
    assert answers.f1("cat cat", ["cat"]) == pytest.approx(
        2 / 3
    )  # a word counts as often as it is there
    assert answers.f1("dog", ["cat"]) == 0
    assert answers.f1("the cat", ["a cat"]) == 1


# --------------------------------------------------------------------------------- numbers


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("He has 3 + 4 = 7 apples.", "7"),
        ("#### 1,234", "1234"),
        ("$-2.50.", "-2.50"),
        ("from 7-3 it is", "3"),
        ("about -.5 of it", "-0.5"),
        ("18", "18"),
        ("in 2020, 1,000,000", "1000000"),
        ("it is 5.", "5"),
        ("none", None),
    ],
)
def test_the_last_number(text, number):
    assert math_answers.last_number(text) == (None if number is None else Decimal(number))


def test_the_marked_number():
    assert math_answers.marked_number("3 + 4 = 7\n#### 7\nThe cost is 9") == 7
    assert math_answers.marked_number("#### 1\n#### -2,000") == -2000
    assert math_answers.marked_number("7") is None
    assert math_answers.marked_number("#### none") is None


# --------------------------------------------------------------------------------- expressions


@pytest.mark.parametrize(
    ("text", "expression"),
    [
        (r"so $\boxed{1}$ or rather $\boxed{\frac{1}{2}}$.", r"\frac{1}{2}"),
        (r"\boxed{\{x : x > 1\}}", r"\{x : x > 1\}"),
        (r"the answer is $\boxed 7$.", "7"),
        (r"\fbox{12}", "12"),
        (r"\boxed{1 + {2", None),
        ("no box", None),
    ],
)
def test_the_last_box(text, expression):
    assert math_answers.boxed_expression(text) == expression


def test_the_final_expression_without_a_box():
    assert math_answers.final_expression("Thus 3. The answer is: $\\frac{3}{4}$.") == "\\frac{3}{4}"
    assert math_answers.final_expression(r"answer is: 5, \boxed{6}") == "6"
    assert math_answers.final_expression("5") is None


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        (r"\frac12", r"\frac{1}{2}"),
        (r"\dfrac{1}{2}", r"\tfrac12"),
        ("1/2", r"\frac{1}{2}"),
        ("0.5", r"\frac{1}{2}"),
        (".25", "0.25"),
        (r"\sqrt3", r"\sqrt{3}"),
        (r"x = 5", "5"),
        (r"\left( 1, 2 \right)", "(1,2)"),
        (r"50\%", "50"),
        (r"\$12", "12"),
        (r"90^\circ", "90"),
        (r"3\text{ cm}", "3"),
        ("1,000", "1000"),
        ("2.0", "2"),
        (r"10\!000", "10000"),
    ],
)
def test_equal_expressions(given, wanted):
    assert math_answers.same_expression(given, wanted)


@pytest.mark.parametrize(
    ("given", "wanted"),
    [("1", "2"), (r"\frac{1}{2}", r"\frac{2}{1}"), ("x+1", "1+x"), ("nan", "NaN "), ("", "0")],
)
def test_unequal_expressions(given, wanted):
    assert not math_answers.same_expression(given, wanted)
