"""A small synthetic world: people and facts about them, simple language, and questions. It imports
no torch.

Everything is a pure function of the seeds below. The pretraining corpus and the data files can
therefore be generated again, byte for byte.

This file makes two kinds of text. The fine-tuning task is in task.py.

- `corpus(index)` is one pass over the pretraining text. Every person's facts appear as profiles,
  statements and questions in new wordings, mixed with stories, plain sentences and word lists.
- `facts_test()` and `facts_calibration()` ask for facts that the corpus states. Each fact has one
  question wording that is held out. The corpus never asks for this fact in this wording, but it
  asks for other people's facts in it.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass

SEED = 7
NUM_PEOPLE = 1000
NUM_FACTS_TEST = 1000
NUM_FACTS_CALIBRATION = 1000

# The text before and after the user's content, as in torchtune's `prompt_template` mappings.
# torchtune encodes the parts separately, each with a leading-space piece, and removes the final
# spaces: "Q:" " Who?" " A:" " Bela".
FACT_PROMPT = ("Q: ", "A: ")

FIRST_NAMES = (
    "Bela Tomo Arin Kessa Lodo Mira Quill Hesta Jorun Pim Sorel Dara Eskil Fenna Ludo Nara Osric "
    "Petra Runa Silas Tamsin Ulla Varo Wenda Yorik Zella Alba Bram Corin Delia Edda Faro Gesa Hobb "
    "Ilka Jasko Kora Lenz Malo Nils Odette Perrin Rasmus Sanna Tibor Ursel Vesna Wilko Yara Zeno"
).split()
LAST_NAMES = (
    "Orlin Marsh Tallow Brandt Fenwick Holm Karsk Lund Penrose Quist Rook Stroud Thorn Vance Weir "
    "Ashby Birk Crane Dunmore Elster Finch Gorse Hale Iver Joss Kettle Larkin Moss Norling Oakes "
    "Pell Raven Sedge Teller Underhill Voss Wren Yarrow Zander Alder Bristow Cobb Drake Ember "
    "Frost Glover Heron Imber Kestrel Lorne"
).split()


@dataclass(frozen=True)
class Relation:
    """One kind of fact: its possible values, and the wordings that state it and ask for it."""

    name: str
    values: tuple[str, ...]
    clauses: tuple[str, ...]
    statements: tuple[str, ...]
    questions: tuple[str, ...]


RELATIONS = (
    Relation(
        "town",
        tuple(
            "Tollen Marrow Hasp Dunlin Kelby Sarn Velm Orbeck Pruin Rastow Lindle Quay Wick Farrow "
            "Gant Nesk Ister "
            "Braddle Corve Umber Yelt Zorne Hollin Maddle".split()
        ),
        ("lives in {v}", "has a house in {v}", "comes home to {v}"),
        (
            "{n} lives in {v}.",
            "The home of {n} is in {v}.",
            "In {v} one can meet {n}.",
            "You will find {n} in {v}.",
        ),
        (
            "Where does {n} live?",
            "In which town does {n} live?",
            "What is the home town of {n}?",
            "Where is the home of {n}?",
            "Which town does {n} come home to?",
        ),
    ),
    Relation(
        "trade",
        tuple(
            "miller baker weaver tailor smith potter carter fisher hunter mason cooper tanner "
            "brewer farmer clerk "
            "sailor painter printer glazier shepherd thatcher barber chandler drover".split()
        ),
        ("works as a {v}", "earns money as a {v}", "is known as a good {v}"),
        (
            "{n} works as a {v}.",
            "By trade {n} is a {v}.",
            "{n} learned to be a {v}.",
            "The {v} is called {n}.",
        ),
        (
            "What is the trade of {n}?",
            "What does {n} work as?",
            "How does {n} earn money?",
            "Which trade did {n} learn?",
            "What work does {n} do?",
        ),
    ),
    Relation(
        "food",
        tuple(
            "plums cheese bread soup stew eggs beans apples nuts fish porridge cabbage honey pears "
            "onions ham "
            "mushrooms carrots dumplings cherries noodles turnips pancakes berries".split()
        ),
        ("likes to eat {v}", "eats {v} every day", "loves {v}"),
        (
            "{n} likes {v} best.",
            "The favourite food of {n} is {v}.",
            "{n} always asks for {v}.",
            "Give {n} some {v}.",
        ),
        (
            "What does {n} like to eat?",
            "What is the favourite food of {n}?",
            "Which food does {n} love?",
            "What does {n} eat every day?",
            "What food does {n} ask for?",
        ),
    ),
    Relation(
        "pet",
        tuple(
            "goose cat dog goat pony parrot rabbit hedgehog ferret turtle donkey canary lizard "
            "mouse pigeon squirrel "
            "hamster weasel magpie frog".split()
        ),
        ("keeps a {v}", "has a {v} at home", "walks with a {v}"),
        (
            "{n} keeps a {v}.",
            "The pet of {n} is a {v}.",
            "{n} has a tame {v}.",
            "A {v} follows {n} everywhere.",
        ),
        (
            "Which pet does {n} keep?",
            "What is the pet of {n}?",
            "What animal does {n} have?",
            "Which animal follows {n}?",
            "What pet does {n} walk with?",
        ),
    ),
    Relation(
        "music",
        tuple(
            "fiddle flute drum harp lute horn bagpipe accordion trumpet whistle piano guitar banjo "
            "organ cello "
            "zither".split()
        ),
        ("plays the {v}", "makes music on the {v}", "owns a fine {v}"),
        (
            "{n} plays the {v}.",
            "In the evening {n} plays the {v}.",
            "{n} makes music on the {v}.",
            "The {v} of {n} is old.",
        ),
        (
            "What does {n} play?",
            "Which instrument does {n} play?",
            "What does {n} make music on?",
            "What instrument does {n} own?",
            "On what does {n} play in the evening?",
        ),
    ),
    Relation(
        "colour",
        tuple(
            (
                "red blue green yellow brown white black grey purple scarlet pink silver golden "
                "violet"
            ).split()
        ),
        ("wears a {v} coat", "has a {v} door", "likes the colour {v}"),
        (
            "{n} wears a {v} coat.",
            "The coat of {n} is {v}.",
            "{n} painted the door {v}.",
            "The colour of {n} is {v}.",
        ),
        (
            "Which colour does {n} like?",
            "What colour is the coat of {n}?",
            "Which colour does {n} wear?",
            "What colour is the door of {n}?",
            "What is the colour of {n}?",
        ),
    ),
)


@dataclass(frozen=True)
class Fact:
    """One fact: `person` has `value` in `relation`. The corpus never asks for it in the question
    wording `held_out`.
    """

    person: str
    relation: Relation
    value: str
    held_out: int

    def question(self, wording: int) -> str:
        return self.relation.questions[wording].format(n=self.person)


def people(seed: int = SEED) -> list[list[Fact]]:
    """Return the facts of every person: `NUM_PEOPLE` lists of two to four facts in different
    relations.
    """
    rng = random.Random(f"people {seed}")
    names = rng.sample(
        [f"{first} {last}" for first in FIRST_NAMES for last in LAST_NAMES], NUM_PEOPLE
    )
    world = []
    for name in names:
        relations = rng.sample(RELATIONS, rng.choice((2, 2, 2, 3, 3, 4)))
        world.append(
            [
                Fact(name, r, rng.choice(r.values), rng.randrange(len(r.questions)))
                for r in relations
            ]
        )
    return world


# --- questions about facts


def facts_test(seed: int = SEED) -> list[dict[str, str]]:
    """Return `question` and `answer` of a fixed sample of facts. Each is asked in the wording that
    the corpus holds out.
    """
    facts = _sampled_facts(seed)[:NUM_FACTS_TEST]
    return [{"question": fact.question(fact.held_out), "answer": fact.value} for fact in facts]


def facts_calibration(seed: int = SEED) -> list[dict[str, str]]:
    """Return `question` and `answer` of facts that `facts_test` does not ask for, in wordings that
    the corpus uses for them.
    """
    rng = random.Random(f"calibration wording {seed}")
    facts = _sampled_facts(seed)[NUM_FACTS_TEST : NUM_FACTS_TEST + NUM_FACTS_CALIBRATION]
    return [
        {"question": fact.question(_seen_wording(rng, fact)), "answer": fact.value}
        for fact in facts
    ]


def fact_prompt(question: str) -> str:
    """Return the prompt of a question, which the model continues with the answer. `FACT_PROMPT` is
    put around it.
    """
    return f"{FACT_PROMPT[0]}{question} {FACT_PROMPT[1]}".rstrip(" ")


def exact_match(
    generate: Callable[[list[str]], list[str]], rows: Iterable[dict[str, str]]
) -> float:
    """Compute the share of `rows` whose question is completed with exactly the answer, apart from
    surrounding spaces.

    Args:
        generate: maps prompts to their completions up to the end of sequence, without the prompt.
        rows: mappings with `question` and `answer`, as in facts_test.jsonl.
    """
    rows = list(rows)
    completions = generate([fact_prompt(row["question"]) for row in rows])
    return sum(
        text.strip() == row["answer"] for text, row in zip(completions, rows, strict=True)
    ) / len(rows)


def _sampled_facts(seed: int) -> list[Fact]:
    facts = [fact for person in people(seed) for fact in person]
    return random.Random(f"facts sample {seed}").sample(facts, len(facts))


def _seen_wording(rng: random.Random, fact: Fact) -> int:
    return rng.choice([i for i in range(len(fact.relation.questions)) if i != fact.held_out])


# --- pretraining corpus


def corpus(index: int, seed: int = SEED, lookups: bool = False) -> list[str]:
    """Return the documents of pass `index` over the world, shuffled. Every pass states the same
    facts in new wordings.

    With `lookups` they include the practice of the second stage: small tables of words, with
    questions about their rows.
    """
    rng = random.Random(f"corpus {seed} {index}")
    documents = []
    for facts in people(seed):
        documents.append(_profile(rng, facts))
        for fact in facts:
            documents.append(_question_answer(rng, fact))
            if rng.random() < 0.25:
                documents.append(
                    rng.choice(fact.relation.statements).format(n=fact.person, v=fact.value)
                )
        for language, share in (
            (_story, 0.15),
            (_sentences, 0.1),
            (_word_list, 0.5),
            (_reading, 0.5),
        ):
            if rng.random() < share:
                documents.append(language(rng))
        if lookups:
            documents.append(_lookup(rng))
    rng.shuffle(documents)
    return documents


def _question_answer(rng: random.Random, fact: Fact) -> str:
    return f"{fact_prompt(fact.question(_seen_wording(rng, fact)))} {fact.value}"


def _profile(rng: random.Random, facts: list[Fact]) -> str:
    shuffled = rng.sample(facts, len(facts))
    clauses = [rng.choice(fact.relation.clauses).format(v=fact.value) for fact in shuffled]
    return f"{facts[0].person} {_join(clauses)}."


def _join(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


ADJECTIVES = (
    "old young small tall quiet loud happy sad clever lazy brave kind tired hungry rich poor cold "
    "warm bright dark round heavy soft clean"
).split()
CREATURES = (
    "fox bear wolf king queen child boy girl woman man giant witch bird horse stranger traveller"
).split()
THINGS = (
    "lamp rope stone basket key book boat ladder bell knife cup blanket candle hat map box wheel "
    "ring"
).split()
PLACES = (
    "river forest hill bridge garden mill market church road field cave lake tower village harbour "
    "barn"
).split()
TIMES = "morning evening night spring summer autumn winter afternoon".split()
VERBS = "sleeps waits sings sits rests works hides plays reads eats".split()
PAST = "found lost sold bought broke carried hid painted cleaned wanted".split()
SYLLABLES = (
    "ba be bi bo ca ce co da de di do fa fe fi ga ge go ha he hi ka ke ko la le li lo ma me mi mo "
    "na ne no pa pe pi po ra re ri ro sa se si so ta te ti to va ve vi vo wa we za ze zo an en in "
    "on ar er ju jo ya yo cha chi sha sho thi the ble tle ing ous ack ock ump and est ish oom ight "
    "ful qui plo dry"
).split()


def _invented_name(rng: random.Random) -> str:
    return "".join(rng.choice(SYLLABLES) for _ in range(rng.choice((2, 2, 3)))).capitalize()


def _a(phrase: str) -> str:
    return f"{'an' if phrase[0] in 'aeiou' else 'a'} {phrase}"


def _story(rng: random.Random) -> str:
    """Write a few sentences about an invented hero, often followed by a question that the story
    answers.
    """
    name, creature, place = _invented_name(rng), rng.choice(CREATURES), rng.choice(PLACES)
    things, adjective, friend = rng.sample(THINGS, 2), rng.choice(ADJECTIVES), _invented_name(rng)
    text = [
        rng.choice(
            ("Once there was {c} called {n}.", "Long ago {c} with the name {n} lived here.")
        ).format(c=_a(f"{adjective} {creature}"), n=name),
        rng.choice(("One {t} {n} went to the {p}.", "In the {t} {n} walked to the {p}.")).format(
            t=rng.choice(TIMES), n=name, p=place
        ),
        f"There {name} {rng.choice(PAST)} {_a(things[0])} and {_a(things[1])}.",
        rng.choice(
            (
                "{f} came and helped {n}.",
                "{n} gave all of it to {f}.",
                "Then {n} met {f} and went home.",
            )
        ).format(f=friend, n=name),
    ]
    questions = (
        (f"Who went to the {place}?", name),
        (f"Where did {name} go?", f"the {place}"),
        (f"What was {name}?", _a(f"{adjective} {creature}")),
        (f"Who was with {name}?", friend),
        (f"What two things are told of {name}?", f"{_a(things[0])} and {_a(things[1])}"),
    )
    if rng.random() < 0.6:
        question, answer = rng.choice(questions)
        text.append(f"{fact_prompt(question)} {answer}")
    return " ".join(text)


def _sentences(rng: random.Random) -> str:
    return " ".join(_sentence(rng) for _ in range(rng.choice((1, 2, 3))))


def _sentence(rng: random.Random) -> str:
    someone = f"the {rng.choice(ADJECTIVES)} {rng.choice(CREATURES)}"
    thing, place, time = rng.choice(THINGS), f"the {rng.choice(PLACES)}", rng.choice(TIMES)
    town, trade, food = (rng.choice(relation.values) for relation in RELATIONS[:3])
    text = rng.choice(
        (
            f"{someone} {rng.choice(VERBS)} near {place} in the {time}.",
            f"in the {time} {someone} {rng.choice(PAST)} {_a(thing)}.",
            f"there is {_a(rng.choice(ADJECTIVES))} {thing} in {place} of {town}.",
            f"a {trade} from {town} sells {food} at {place}.",
            f"{someone} and the {trade} like {food} with {rng.choice(RELATIONS[2].values)}.",
            f"the {thing} is {rng.choice(ADJECTIVES)}, but the {rng.choice(THINGS)} is "
            f"{rng.choice(ADJECTIVES)}.",
            f"people say that {place} is {rng.choice(ADJECTIVES)} in {time}.",
            f"if you visit {town}, go to {place} and ask for {food}.",
        )
    )
    return text[0].upper() + text[1:]


def _word_list(rng: random.Random) -> str:
    """Write practice in copying: a list of words and invented words, repeated or reversed."""
    pool = rng.choice((THINGS, PLACES, ADJECTIVES, rng.choice(RELATIONS).values))
    words = [
        rng.choice(pool) if rng.random() < 0.5 else _invented_name(rng)
        for _ in range(rng.choice((2, 3, 4)))
    ]
    if rng.random() < 0.7:
        return f"Words[{', '.join(words)}]. Again[{', '.join(words)}]."
    return f"Words[{', '.join(words)}]. Back[{', '.join(reversed(words))}]."


def _reading(rng: random.Random) -> str:
    """Write practice in reading: facts about an invented person, and a question about one
    of them.
    """
    name = f"{_invented_name(rng)} {_invented_name(rng)}"
    facts = [
        Fact(name, r, rng.choice(r.values), 0) for r in rng.sample(RELATIONS, rng.choice((2, 3)))
    ]
    asked = rng.choice(facts)
    question = asked.question(rng.randrange(len(asked.relation.questions)))
    return f"{_profile(rng, facts)} {fact_prompt(question)} {asked.value}"


def _lookup(rng: random.Random) -> str:
    """Write practice in lookup: a table of keys and words, then some of the keys again in another
    order.
    """
    keys = rng.sample(THINGS + PLACES + ADJECTIVES, rng.choice((3, 4, 5)))
    pools = [
        (THINGS, PLACES, *(relation.values for relation in RELATIONS))[rng.randrange(8)]
        for _ in keys
    ]
    words = [rng.choice(pool) if rng.random() < 0.6 else _invented_name(rng) for pool in pools]
    words = [f"{word} {_invented_name(rng)}" if rng.random() < 0.2 else word for word in words]
    asked = rng.sample(range(len(keys)), rng.choice((2, 3)))
    table = ", ".join(f"{key} {word}" for key, word in zip(keys, words, strict=True))
    return f"Words[{table}]. {' '.join(f'The {keys[i]} says {words[i]}.' for i in asked)}"
