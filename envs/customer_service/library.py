"""The backend: a lending library's members, titles, loans, holds and fees, and what a clerk can do."""

from __future__ import annotations

import msgspec

from envs.tools import ToolError

MAX_RENEWALS, MAX_HOLDS, MAX_WAIVED_CENTS, MAX_OWED_CENTS = 2, 3, 500, 1000

POLICY = f"""\
You are a clerk of the Lantern Library and help one member at a time, by writing to them and with your tools.

- Before you look at or change anything of a member's, ask for their full name and date of birth and find \
them with both. Never take their number on trust.
- A loan may be renewed {MAX_RENEWALS} times at most, and not while another member has a hold on its title.
- A member may have {MAX_HOLDS} holds at most, and place none while they owe more than {MAX_OWED_CENTS} cents.
- A hold is only for titles of which no copy is free.
- One fee a year may be waived, and only if it is no more than {MAX_WAIVED_CENTS} cents.
- Do what the rules allow and the member asks for, and nothing else. What they forbid, refuse and say why.
- What your tools cannot do (lost cards, opening hours, complaints) goes to a person: hand it over.
- Write to the member only when you need to know something or to say what has been done."""


class Loan(msgspec.Struct):
    id: str
    title: str
    renewals: int


class Fee(msgspec.Struct):
    id: str
    cents: int
    waived: bool = False


class Member(msgspec.Struct):
    id: str
    name: str
    born: str
    loans: list[Loan] = []
    #: Titles' ids.
    holds: list[str] = []
    fees: list[Fee] = []
    waived_this_year: bool = False

    @property
    def owed(self) -> int:
        """In cents."""
        return sum(fee.cents for fee in self.fees if not fee.waived)


class Title(msgspec.Struct):
    id: str
    name: str
    free_copies: int


class Library(msgspec.Struct):
    """All of the backend's state; two of them are equal if all in them is.

    The tools do what they are told, as a real backend does: the rules are the clerk's business.
    """

    members: dict[str, Member]
    titles: dict[str, Title]
    #: What was handed over to a person.
    handed_over: list[str] = []

    def find_member(self, name: str, born: str) -> Member:
        """Raises:
        ToolError: there is none.
        """
        for member in self.members.values():
            if member.name.casefold() == name.strip().casefold() and member.born == born.strip():
                return member
        raise ToolError("no member has that name and date of birth")

    def member(self, id: str) -> Member:
        """Raises:
        ToolError: there is none.
        """
        if id not in self.members:
            raise ToolError(f"there is no member {id[:40]}")
        return self.members[id]

    def title(self, id: str) -> Title:
        """Raises:
        ToolError: there is none.
        """
        if id not in self.titles:
            raise ToolError(f"there is no title {id[:40]}")
        return self.titles[id]

    def search(self, words: str) -> list[Title]:
        wanted = words.casefold().split()
        return [t for t in self.titles.values() if any(word in t.name.casefold() for word in wanted)][:10]

    def holders(self, title: str) -> list[str]:
        """Members who have a hold on a title."""
        return [member.id for member in self.members.values() if title in member.holds]

    def renew_loan(self, member_id: str, loan_id: str) -> str:
        loan = next((loan for loan in self.member(member_id).loans if loan.id == loan_id), None)
        if loan is None:
            raise ToolError(f"member {member_id} has no loan {loan_id[:40]}")
        loan.renewals += 1
        return f"{loan.id} is renewed, {loan.renewals} times now"

    def place_hold(self, member_id: str, title_id: str) -> str:
        member, title = self.member(member_id), self.title(title_id)
        if title.id in member.holds:
            raise ToolError(f"member {member.id} has a hold on {title.id} already")
        member.holds.append(title.id)
        return f"{member.id} has a hold on {title.id}"

    def cancel_hold(self, member_id: str, title_id: str) -> str:
        member = self.member(member_id)
        if title_id not in member.holds:
            raise ToolError(f"member {member.id} has no hold on {title_id[:40]}")
        member.holds.remove(title_id)
        return f"{member.id} has no hold on {title_id} any more"

    def waive_fee(self, member_id: str, fee_id: str) -> str:
        member = self.member(member_id)
        fee = next((fee for fee in member.fees if fee.id == fee_id and not fee.waived), None)
        if fee is None:
            raise ToolError(f"member {member.id} owes no fee {fee_id[:40]}")
        fee.waived = member.waived_this_year = True
        return f"{fee.id} is waived; {member.id} owes {member.owed} cents"

    def hand_over(self, subject: str) -> str:
        # What it is called is the clerk's choice: only that it was handed over counts.
        self.handed_over.append("handed over")
        return "a person will take care of it"
