"""Questions with one right answer that a tiny model can learn, drawn by a seeded random generator.

Every task draws a prompt and its answer. A hash of the prompt determines whether a question is held out, so training
and evaluation need no lists of each other's questions. Uses only the standard library.
"""

import hashlib
import random
from collections.abc import Callable
from dataclasses import dataclass

HELD_OUT_SHARE = 1 / 8
# The first salt with which every answer can be learned. At most two of the three wordings of a question about a fact of
# a known list are held out. For neighbours in a list (and for the few months or primes after one), at most one wording
# is held out. Prompts that show only the first one or two items of a list, to be continued, are never held out.
SALT = 117617

# Each list is longer than the longest list of pairs, so that no name or thing occurs twice.
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
# Questions about a known list: three wordings of every fact
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
    """A prompt and its only right answer, both without surrounding blanks."""

    task: str
    prompt: str
    answer: str

    @property
    def separator(self) -> str:
        """The separator of prompt and answer in text without a chat template.

        It is a newline after a question mark or a full stop. Otherwise the answer continues the sentence after a blank.
        """
        return "\n" if self.prompt[-1] in "?." else " "

    @property
    def held_out(self) -> bool:
        """Whether the question is excluded from training. Depends only on its prompt."""
        first = int.from_bytes(hashlib.sha256(f"{SALT}:{self.prompt}".encode()).digest()[:4], "big")
        return first < HELD_OUT_SHARE * 2**32


def _known_list(items: list[str], heading: str, kind: str) -> Callable[[random.Random], tuple[str, str]]:
    """Return a function that draws questions about a memorized list: continue it, list a part, name neighbours."""

    def draw(rng: random.Random) -> tuple[str, str]:
        form = rng.choice(["go on", *FORMS])
        i = rng.randrange(1, len(items) - (form == "few"))  # "few" needs at least two following items
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
    """Draw names with one thing each."""
    return dict(zip(rng.sample(NAMES, num_pairs), rng.sample(THINGS, num_pairs)))


def lookup(pairs: dict[str, str], asked: list[str]) -> tuple[str, str]:
    """Return a prompt with all pairs and a question about some of them, and the answer.

    A pair is one line, which is three tokens in the tiny model's vocabulary. The answer consists of lines of the list:
    the model writes a name, and then looks up the thing after that name. A name begins a line in the list and in the
    answer, so it is the same token in both (after a blank it would be another token).
    """
    told = "\n".join(f"{name} {thing}" for name, thing in pairs.items())
    answer = "\n".join(f"{name} {pairs[name]}" for name in asked)
    return f"Who has what?\n{told}\nWhat about {', '.join(asked)}?", f"{answer}."


def _lookup(rng: random.Random) -> tuple[str, str]:
    pairs = draw_pairs(rng, rng.randint(2, 30))
    return lookup(pairs, rng.sample(list(pairs), rng.randint(1, min(4, len(pairs)))))


def _long_lookup(rng: random.Random) -> tuple[str, str]:
    """Draw a lookup with 64 to 100 pairs after the requested pair: at least 192 tokens, three times a window of 64."""
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
    """Draw a question of a task, from its held-out questions or from the others."""
    while True:
        question = Question(task, *TASKS[task](rng))
        if question.held_out == held_out:
            return question


def held_out_questions(task: str, num: int, seed: int) -> list[Question]:
    """Return up to `num` different held-out questions; fewer if 20 * num draws do not find as many."""
    rng = random.Random(f"{seed}:{task}")  # a string seed gives the same numbers in every process
    questions: dict[Question, None] = {}  # in the order drawn
    for _ in range(20 * num):
        questions[draw_question(task, rng, held_out=True)] = None
        if len(questions) == num:
            break
    return list(questions)


def prompt_text(question: Question, chat_tokenizer: object | None = None) -> str:
    """Return the prompt as the model reads it: bare, or as a user turn if a tokenizer with a chat template is given."""
    if chat_tokenizer is None:
        return question.prompt
    messages = [{"role": "user", "content": question.prompt}]
    return chat_tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


def is_right(question: Question, text: str) -> bool:
    """Return whether a completion is exactly the answer, except for surrounding whitespace."""
    return text.strip() == question.answer
