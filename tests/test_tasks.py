"""Questions of the tiny model's tasks: their answers are right, and training never draws held-out questions."""

import itertools
import random
import re

import pytest
from engines import standard_python

from benchmarks import tasks
from benchmarks.tasks import FORMS, HELD_OUT_SHARE, TASKS, Question, draw_question, held_out_questions

KNOWN = {
    "months": "January February March April May June July August September October November December".split(),
    "weekdays": "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split(),
    "alphabet": list("ABCDEFGHIJKLMNOPQRSTUVWXYZ"),
    "primes": [str(n) for n in range(2, 72) if all(n % d for d in range(2, n))],
}


def some(task, num=300):
    rng = random.Random(0)
    return [Question(task, *TASKS[task](rng)) for _ in range(num)]


@pytest.mark.parametrize("task", KNOWN)
def test_answers_about_known_lists_have_no_gap(task):
    """The items of the answer are consecutive in the list, and fit the items that the prompt names."""
    items = KNOWN[task]
    for question in some(task):
        told = question.answer.removesuffix(".").split(", ")
        prompt = re.sub(rf"\b{len(told)} (?=month|day|letter|prime)", "", question.prompt)  # a count is not an item
        asked = [word for word in re.findall(r"\w+", prompt.split(":")[-1]) if word in items]
        first = items.index(told[0])
        assert told == items[first : first + len(told)]
        if question.prompt.endswith(","):
            assert asked == items[:first] and told[-1] == items[-1]
        elif "from" in question.prompt.lower():
            assert asked == [told[0], told[-1]]
        elif "before" in question.prompt.lower():
            assert items[first + 1] == asked[-1] and len(told) == 1
        else:
            assert items[first - 1] == asked[-1]


def test_every_answer_about_a_known_list_can_be_learned():
    """At most two wordings of a question are held out, and at most one for neighbours in a list.

    Prompts that show only the first one or two items of a list are never held out.
    """

    def num_held_out(prompts):
        return sum(Question("any", prompt, "any").held_out for prompt in prompts)

    for kind, (name, items) in zip(("month", "day", "letter", "prime number"), KNOWN.items()):
        for i, (before, after) in enumerate(itertools.pairwise(items), start=1):
            facts = {"next": [{"before": before}], "previous": [{"after": after}]}
            facts["few"] = [{"before": before, "num": num} for num in (2, 3, 4) if i + num <= len(items)]
            facts["piece"] = [{"first": before, "last": last} for last in items[i:]]
            for form, all_words in facts.items():
                single = form in ("next", "previous") or (form == "few" and name in ("months", "primes"))
                for words in all_words:
                    prompts = [phrase.format(kind=kind, **words) for phrase in FORMS[form]]
                    assert num_held_out(prompts) <= (1 if single else 2), prompts
        rng = random.Random(0)
        drawn = {TASKS[name](rng)[0] for _ in range(2000)}
        heads = [prompt for prompt in drawn if re.search(rf": {items[0]},( {items[1]},)?$", prompt)]
        assert len(heads) == 2 and num_held_out(heads) == 0


def test_answers_to_counting_and_sums_are_right():
    for question in some("counting"):
        by, start, end, *told = map(int, re.findall(r"\d+", question.prompt))
        assert told + [int(n) for n in re.findall(r"\d+", question.answer)] == list(range(start, end + 1, by))
    for question in some("sums"):
        assert sum(map(int, re.findall(r"\d+", question.prompt))) == int(question.answer.removesuffix("."))


def test_words_are_repeated_and_reversed():
    for task, step in (("copying", 1), ("reversing", -1)):
        for question in some(task):
            words = question.prompt.split(": ")[1].removesuffix(".").split()
            assert question.answer == " ".join(words[::step]) + "."


@pytest.mark.parametrize("task", ["lookup", "long lookup"])
def test_the_answer_of_a_lookup_is_in_its_list(task):
    for question in some(task):
        _, *pairs, asked = question.prompt.split("\n")
        assert len({pair.split()[0] for pair in pairs}) == len(pairs)
        answers = question.answer.removesuffix(".").split("\n")
        assert set(answers) <= set(pairs)
        assert [answer.split()[0] for answer in answers] == asked.removeprefix("What about ")[:-1].split(", ")
        assert task == "lookup" or pairs.index(answers[0]) < len(pairs) - 64


def test_the_share_of_held_out_questions_is_as_intended():
    prompts = {question.prompt for task in TASKS for question in some(task)}
    held_out = {prompt for prompt in prompts if Question("any", prompt, "any").held_out}
    assert len(held_out) / len(prompts) == pytest.approx(HELD_OUT_SHARE, rel=0.3)


@pytest.mark.parametrize("held_out", [False, True])
def test_drawn_questions_are_held_out_only_if_requested(held_out):
    rng = random.Random(1)
    assert all(draw_question(task, rng, held_out).held_out == held_out for task in TASKS for _ in range(20))


def test_held_out_questions_are_distinct_and_equal_in_every_process():
    here = [question.prompt for task in TASKS for question in held_out_questions(task, 30, seed=5)]
    assert len(set(here)) == len(here)
    there = standard_python(tasks, "print([q.prompt for task in TASKS for q in held_out_questions(task, 30, seed=5)])")
    assert there.strip() == str(here)


def test_a_story_ends_with_its_own_names_and_the_next_weekday():
    for question in some("stories"):
        hero, animal, place, friend, day, thing = re.fullmatch(
            r"(\w+) the (\w+) lived by the (\w+) and had a friend, (\w+)\. On (\w+), \1 lost the (\w+)\.",
            question.prompt,
        ).groups()
        week = KNOWN["weekdays"]
        next_day = week[(week.index(day) + 1) % 7]
        assert hero != friend
        assert question.answer == (
            f"{hero} looked for the {thing} by the {place}. On {next_day}, {friend} found the {thing}. "
            f"{friend} gave the {thing} back to {hero}, and the {animal} was happy."
        )
