"""What members come for: cases that the rules allow and cases that they don't, and what is right in each."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import msgspec

from envs.customer_service.library import (
    MAX_HOLDS,
    MAX_OWED_CENTS,
    MAX_RENEWALS,
    MAX_WAIVED_CENTS,
    Fee,
    Library,
    Loan,
    Member,
    Title,
)

FIRST = ("Alma", "Bodo", "Cleo", "Dara", "Enno", "Frida", "Goran", "Hanne", "Ilias", "Juno", "Kemal", "Liv")
LAST = ("Abel", "Brandt", "Castro", "Diaz", "Ekberg", "Fofana", "Grau", "Haddad", "Ito", "Jansen", "Kovac")
ADJECTIVES = ("Silent", "Amber", "Hidden", "Frozen", "Distant", "Crooked", "Golden", "Last", "Paper", "Salt")
NOUNS = ("Harbour", "Orchard", "Lighthouse", "Meridian", "Clockmaker", "River", "Archive", "Winter", "Garden")


class Case(msgspec.Struct):
    """A case: the library as it is, who asks for what, and what a good clerk does.

    Attributes:
        wish: what the member wants, in their words.
        details: what they say when asked more.
        actions: the tool calls, with arguments, that change something; none if the rules forbid it.
        told: words that a good clerk's messages hold, any of each group: the reason of a refusal.
    """

    library: Library
    member: str
    wish: str
    details: str
    actions: list[tuple[str, dict[str, Any]]] = []
    told: list[list[str]] = []


class _Drawn(msgspec.Struct):
    """A library and one of its members, who has two loans, a hold and a fee, all within the rules."""

    library: Library
    me: Member
    loan: Loan
    wanted: Title


def _draw(rng: random.Random) -> _Drawn:
    names = rng.sample([f"The {adjective} {noun}" for adjective in ADJECTIVES for noun in NOUNS], 8)
    titles = {f"T{100 + n}": Title(f"T{100 + n}", name, rng.randint(1, 3)) for n, name in enumerate(names)}
    people = rng.sample([f"{first} {last}" for first in FIRST for last in LAST], 4)
    ids = list(titles)
    members: dict[str, Member] = {}
    for n, name in enumerate(people):
        id = f"M{rng.randint(100, 999)}{n}"
        born = f"{rng.randint(1940, 2007)}-{rng.randint(1, 12):02}-{rng.randint(1, 28):02}"
        loans = [
            Loan(f"L{rng.randint(100, 999)}{n}{place}", title, rng.randint(0, MAX_RENEWALS - 1))
            for place, title in enumerate(rng.sample(ids[:5], 2))
        ]
        fees = [Fee(f"F{rng.randint(100, 999)}{n}", rng.randrange(50, MAX_WAIVED_CENTS, 10))]
        members[id] = Member(id, name, born, loans, [], fees)
    me = members[rng.choice(list(members))]
    wanted = titles[ids[6]]
    wanted.free_copies = 0
    me.holds = [ids[7]]
    return _Drawn(Library(members, titles), me, rng.choice(me.loans), wanted)


def _renew(drawn: _Drawn) -> Case:
    name = drawn.library.titles[drawn.loan.title].name
    action = ("renew_loan", {"member_id": drawn.me.id, "loan_id": drawn.loan.id})
    return _case(drawn, f"I would like to keep {name} for longer.", f"Please renew {name}.", [action])


def _renew_used_up(drawn: _Drawn) -> Case:
    drawn.loan.renewals = MAX_RENEWALS
    case = _renew(drawn)
    case.actions, case.told = [], [["2 times", "twice", "two times", "renewals", "already been renewed"]]
    return case


def _renew_wanted(drawn: _Drawn) -> Case:
    other = next(member for member in drawn.library.members.values() if member.id != drawn.me.id)
    other.holds = [drawn.loan.title]
    case = _renew(drawn)
    case.actions, case.told = [], [["hold", "waiting", "another member", "reserved"]]
    return case


def _hold(drawn: _Drawn) -> Case:
    action = ("place_hold", {"member_id": drawn.me.id, "title_id": drawn.wanted.id})
    details = f"The book is {drawn.wanted.name}."
    return _case(drawn, "I want to be the next to get a book that is out.", details, [action])


def _hold_owing(drawn: _Drawn) -> Case:
    drawn.me.fees.append(Fee("F9999", MAX_OWED_CENTS))
    case = _hold(drawn)
    case.actions, case.told = [], [["owe", "fee", "cents"]]
    return case


def _hold_free(drawn: _Drawn) -> Case:
    drawn.wanted.free_copies = 2
    case = _hold(drawn)
    case.actions, case.told = [], [["free", "available", "on the shelf"]]
    return case


def _swap(drawn: _Drawn) -> Case:
    old = drawn.me.holds[0]
    drawn.me.holds = [
        old,
        *[id for id in drawn.library.titles if id not in (old, drawn.wanted.id)][: MAX_HOLDS - 1],
    ]
    wish = f"Put me down for {drawn.wanted.name}, and strike me off for {drawn.library.titles[old].name}."
    actions = [
        ("cancel_hold", {"member_id": drawn.me.id, "title_id": old}),
        ("place_hold", {"member_id": drawn.me.id, "title_id": drawn.wanted.id}),
    ]
    return _case(drawn, wish, "Yes, the one instead of the other.", actions)


def _waive(drawn: _Drawn) -> Case:
    fee = drawn.me.fees[0]
    action = ("waive_fee", {"member_id": drawn.me.id, "fee_id": fee.id})
    wish = f"I was ill and could not bring a book back. Must I pay the {fee.cents} cents?"
    return _case(drawn, wish, f"It is the fee {fee.id}. Please let me off.", [action])


def _waive_again(drawn: _Drawn) -> Case:
    drawn.me.waived_this_year = True
    case = _waive(drawn)
    case.actions, case.told = [], [["year", "once", "already", "one fee"]]
    return case


def _waive_large(drawn: _Drawn) -> Case:
    drawn.me.fees[0].cents += MAX_WAIVED_CENTS
    case = _waive(drawn)
    case.actions, case.told = [], [[str(MAX_WAIVED_CENTS), "5.00", "more than", "too large", "too high"]]
    return case


def _person(drawn: _Drawn) -> Case:
    wish = "Somebody has stolen my purse, and my library card was in it."
    return _case(drawn, wish, "I need a new card.", [("hand_over", {"subject": "a stolen card"})])


CASES: dict[str, Callable[[_Drawn], Case]] = {
    "renew": _renew,
    "renew_used_up": _renew_used_up,
    "renew_wanted": _renew_wanted,
    "hold": _hold,
    "hold_owing": _hold_owing,
    "hold_free": _hold_free,
    "swap": _swap,
    "waive": _waive,
    "waive_again": _waive_again,
    "waive_large": _waive_large,
    "person": _person,
}


def draw(kind: str, rng: random.Random) -> Case:
    """A case of a kind."""
    return CASES[kind](_draw(rng))


def _case(drawn: _Drawn, wish: str, details: str, actions: list[tuple[str, dict[str, Any]]]) -> Case:
    return Case(drawn.library, drawn.me.id, wish, details, actions)
