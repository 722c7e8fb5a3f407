"""Questions with one right answer, drawn from a seeded grammar: what a tiny model can be taught.

Every task makes a prompt and its answer from a random generator. A hash of the prompt says whether a question is held
out, so training and evaluation need no lists of each other. Knows only the standard library.
"""

import hashlib
import random
from collections.abc import Callable
from dataclasses import dataclass

HELD_OUT_SHARE = 1 / 8
# The first under which every single answer can be learned: of a fact of the known lists, never all three forms of its
# question are held out, of a list's neighbours (and the few months or primes after one) never more than one form, and
# the first two steps into a list are not.
SALT = 117617

# More of each than a list of pairs can hold, so that no key comes twice.
NAMES = """Adam Alice Amir Anna Arthur Ben Bella Boris Carla Carl Chloe Clara Cora Dan Daisy David Diana Dora Edgar Ella
Elias Emil Emma Eric Eva Felix Fiona Flora Frank Fred Gina George Grace Greta Gus Hanna Harry Heidi Helen Henry Hugo Ida
Igor Ines Iris Isaac Ivan Jack Jane Jasper Jill Joan Joel John Julia Karen Karl Kate Kevin Kim Lara Laura Lea Leo Lily
Linda Lisa Lola Louis Lucas Luna Marco Maria Mark Martin Max Mia Mike Mila Mona Nadia Nancy Nora Oliver Olga Omar Oscar
Otto Pablo Paul Paula Peter Petra Philip Ralph Rita Robert Rosa Ruby Ruth Sam Sara Simon Sofia Stella Tara Theo Tim
Tina Toby Tom Uma Ursula Vera Victor Viola Walter Wanda Wendy Will Yara Zoe""".split()
THINGS = """apple arrow axe bag ball banjo basket bell belt bike blanket boat book boot bottle bowl box bread brick
bridge broom brush bucket button cake camera candle cap card carpet chair chalk cheese clock cloud coat coin comb
compass cookie cork crown cup curtain desk diary dice dish doll door dress drum egg envelope fan feather fence flag
flute fork glass globe glove guitar hammer harp hat helmet honey hook horn jacket jar jug kettle key kite knife ladder
lamp leaf lemon letter lock magnet map mask medal melon mirror mug nail needle nest net nut oar onion orange paddle
paint pan paper pearl pen pencil piano pillow pin pipe plate plum pocket pot purse puzzle radio rake ring robe rocket
rope rug ruler sack saddle saw scarf shell shield shirt shoe shovel sock soap sofa spoon stamp stone stool string
sword table tent ticket tile torch towel toy train tray trumpet vase violin wagon wallet watch wheel whistle
window""".split()

MONTHS = "January February March April May June July August September October November December".split()
WEEKDAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
LETTERS = [chr(ord("A") + i) for i in range(26)]
# How a known list is asked about: every fact in three ways.
FORMS = {
    "piece": [
        "List the {kind}s from {first} to {last}.",
        "From {first} to {last}, the {kind}s are",
        "Which {kind}s are there from {first} to {last}?",
    ],
    "few": [
        "The {num} {kind}s after {before} are",
        "Name the {num} {kind}s after {before}.",
        "After {before} come the {num} {kind}s",
    ],
    "next": [
        "Which {kind} comes next after {before}?",
        "The {kind} after {before} is",
        "After the {kind} {before} comes",
    ],
    "previous": [
        "Which {kind} comes right before {after}?",
        "The {kind} before {after} is",
        "Before the {kind} {after} comes",
    ],
}
PRIMES = "2 3 5 7 11 13 17 19 23 29 31 37 41 43 47 53 59 61 67 71".split()


@dataclass(frozen=True)
class Question:
    """A prompt and the only right answer to it, without blanks around either."""

    task: str
    prompt: str
    answer: str

    @property
    def separator(self) -> str:
        """What stands between prompt and answer in a bare text: a sentence goes on, a question gets a line below."""
        return "\n" if self.prompt[-1] in "?." else " "

    @property
    def held_out(self) -> bool:
        """Whether the question is kept from training: decided by its prompt alone."""
        first = int.from_bytes(hashlib.sha256(f"{SALT}:{self.prompt}".encode()).digest()[:4], "big")
        return first < HELD_OUT_SHARE * 2**32


def _known_list(items: list[str], heading: str, kind: str) -> Callable[[random.Random], tuple[str, str]]:
    """Questions about a list that one knows by heart: go on with it, cut a piece out of it, name neighbours."""

    def draw(rng: random.Random) -> tuple[str, str]:
        form = rng.choice(["go on", *FORMS])
        i = rng.randrange(1, len(items) - (form == "few"))  # a few are at least two
        if form == "go on":
            return f"{heading}: {', '.join(items[:i])},", f"{', '.join(items[i:])}."
        if form == "piece":
            first, last = sorted(rng.sample(range(len(items)), 2))
            answer = items[first : last + 1]
        else:
            answer = {"few": items[i : i + rng.randint(2, 4)], "next": [items[i]], "previous": [items[i - 1]]}[form]
        prompt = rng.choice(FORMS[form]).format(
            kind=kind, before=items[i - 1], after=items[i], num=len(answer), first=answer[0], last=answer[-1]
        )
        return prompt, f"{', '.join(answer)}."

    return draw


def _counting(rng: random.Random) -> tuple[str, str]:
    by, start, length = rng.randint(1, 10), rng.randint(0, 30), rng.randint(3, 10)
    numbers = [str(start + by * i) for i in range(length)]
    heading = f"Count by {by} from {start} to {numbers[-1]}:"
    told = rng.choice([0, 0, 2])
    return " ".join([heading, *(f"{n}," for n in numbers[:told])]), f"{', '.join(numbers[told:])}."


def _sums(rng: random.Random) -> tuple[str, str]:
    a, b = rng.randint(0, 30), rng.randint(0, 30)
    return rng.choice([f"{a} + {b} =", f"What is {a} plus {b}?"]), f"{a + b}."


def _copying(rng: random.Random) -> tuple[str, str]:
    words = rng.sample(THINGS, rng.randint(2, 12))
    return f"Repeat these words: {' '.join(words)}.", f"{' '.join(words)}."


def _reversing(rng: random.Random) -> tuple[str, str]:
    words = rng.sample(THINGS, rng.randint(2, 8))
    return f"Reverse these words: {' '.join(words)}.", f"{' '.join(reversed(words))}."


def draw_pairs(rng: random.Random, num_pairs: int) -> dict[str, str]:
    """People with one thing each."""
    return dict(zip(rng.sample(NAMES, num_pairs), rng.sample(THINGS, num_pairs)))


def lookup(pairs: dict[str, str], asked: list[str]) -> tuple[str, str]:
    """All pairs, a line of three tokens each in the tiny model's vocabulary, and a question for some of them.

    The answer is in lines of the list: the model says a name, and then looks up what followed it. A name begins a line
    in both, and so is the same token (after a blank it would be another one).
    """
    told = "\n".join(f"{name} {thing}" for name, thing in pairs.items())
    answer = "\n".join(f"{name} {pairs[name]}" for name in asked)
    return f"Who has what?\n{told}\nWhat about {', '.join(asked)}?", f"{answer}."


def _lookup(rng: random.Random) -> tuple[str, str]:
    pairs = draw_pairs(rng, rng.randint(2, 30))
    return lookup(pairs, rng.sample(list(pairs), rng.randint(1, min(4, len(pairs)))))


def _long_lookup(rng: random.Random) -> tuple[str, str]:
    """The pair asked for has 64 to 100 pairs behind it: 192 tokens and more, three times a window of 64."""
    num_behind = rng.randint(64, 100)
    pairs = draw_pairs(rng, rng.randint(num_behind + 1, 110))
    return lookup(pairs, [list(pairs)[-1 - num_behind]])


def _stories(rng: random.Random) -> tuple[str, str]:
    hero, friend = rng.sample(NAMES, 2)
    thing = rng.choice(THINGS)
    day = rng.randrange(7)
    animal = rng.choice("bear cat dog duck fox frog goat hare horse mouse owl pig".split())
    place = rng.choice("barn cave farm forest garden hill house lake river tower".split())
    prompt = (
        f"{hero} the {animal} lived by the {place} and had a friend, {friend}. "
        f"On {WEEKDAYS[day]}, {hero} lost the {thing}."
    )
    answer = (
        f"{hero} looked for the {thing} by the {place}. On {WEEKDAYS[(day + 1) % 7]}, {friend} found the {thing}. "
        f"{friend} gave the {thing} back to {hero}, and the {animal} was happy."
    )
    return prompt, answer


TASKS: dict[str, Callable[[random.Random], tuple[str, str]]] = {
    "months": _known_list(MONTHS, "The 12 months of the year are", "month"),
    "weekdays": _known_list(WEEKDAYS, "The 7 days of the week are", "day"),
    "alphabet": _known_list(LETTERS, "The 26 letters of the alphabet are", "letter"),
    "primes": _known_list(PRIMES, "The first 20 prime numbers are", "prime number"),
    "counting": _counting,
    "sums": _sums,
    "copying": _copying,
    "reversing": _reversing,
    "lookup": _lookup,
    "long lookup": _long_lookup,
    "stories": _stories,
}


def draw_question(task: str, rng: random.Random, held_out: bool) -> Question:
    """A question of a task, from the held-out ones or from the others."""
    while True:
        question = Question(task, *TASKS[task](rng))
        if question.held_out == held_out:
            return question


def held_out_questions(task: str, num: int, seed: int) -> list[Question]:
    """Up to `num` different held-out questions: all of them where a task has fewer."""
    rng = random.Random(f"{seed}:{task}")  # a text seeds it the same in every process
    questions: dict[Question, None] = {}  # in the order drawn
    for _ in range(20 * num):
        questions[draw_question(task, rng, held_out=True)] = None
        if len(questions) == num:
            break
    return list(questions)


def prompt_text(question: Question, chat_tokenizer: object | None = None) -> str:
    """The question as the model reads it: bare, or as a user's turn when a tokenizer with a chat template is given."""
    if chat_tokenizer is None:
        return question.prompt
    messages = [{"role": "user", "content": question.prompt}]
    return chat_tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


def is_right(question: Question, text: str) -> bool:
    """Whether a completion is the answer, and nothing else."""
    return text.strip() == question.answer
