"""What became of every row of a dataset: rows in = trained + dropped, and no run leaves it out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from luthier import terminal

TOO_LONG = "too long"
EMPTY_ANSWER = "empty answer"
NO_TRAINED_TOKEN = "no trained token"
EMPTY_ROW = "empty row"


@dataclass(frozen=True)
class Ledger:
    """Counts of rows and tokens; ``tokens``, ``trained_tokens`` and ``longest`` are those of the rows that train.

    ``longest_in`` is the longest row as it came, ``truncated`` the number of rows that were cut and still train.
    """

    rows_in: int
    trained: int
    dropped: Counter[str] = field(default_factory=Counter)
    tokens: int = 0
    trained_tokens: int = 0
    longest: int = 0
    longest_in: int = 0
    truncated: int = 0

    def __post_init__(self) -> None:
        assert self.rows_in == self.trained + self.dropped.total(), f"rows are unaccounted for: {self}"
        assert self.trained <= self.trained_tokens <= self.tokens, f"a row trains without a token: {self}"
        assert self.longest <= min(self.tokens, self.longest_in), f"impossible lengths: {self}"
        assert self.truncated <= self.trained, f"more rows truncated than there are: {self}"

    @classmethod
    def count(
        cls, lengths: Sequence[int], trained: Sequence[int], dropped: Mapping[str, int], longest_in: int, truncated: int = 0
    ) -> Ledger:
        """The ledger of the rows that were kept (their ``lengths`` and ``trained`` tokens) and those that were dropped."""
        dropped = Counter({reason: rows for reason, rows in dropped.items() if rows})
        return cls(
            rows_in=len(lengths) + dropped.total(),
            trained=len(lengths),
            dropped=dropped,
            tokens=sum(lengths),
            trained_tokens=sum(trained),
            longest=max(lengths, default=0),
            longest_in=longest_in,
            truncated=truncated,
        )

    @property
    def empty(self) -> int:
        """Rows that were dropped because they or all their answers were empty."""
        return self.dropped[EMPTY_ANSWER] + self.dropped[EMPTY_ROW]

    @property
    def trained_share(self) -> float:
        """The share of the tokens that train, 0 to 1."""
        return self.trained_tokens / self.tokens if self.tokens else 0.0

    def followed_by(self, later: Ledger) -> Ledger:
        """One ledger for two passes, the second over the rows that the first let train."""
        assert later.rows_in == self.trained, f"{later.rows_in} rows came in of {self.trained}"
        return Ledger(
            rows_in=self.rows_in,
            trained=later.trained,
            dropped=self.dropped + later.dropped,
            tokens=later.tokens,
            trained_tokens=later.trained_tokens,
            longest=later.longest,
            longest_in=max(self.longest_in, later.longest_in),
            truncated=min(self.truncated, later.trained),
        )

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "rows_in": self.rows_in,
            "trained": self.trained,
            "dropped": dict(self.dropped),
            "tokens": self.tokens,
            "trained_tokens": self.trained_tokens,
            "trained_share": round(self.trained_share, 4),
            "longest": self.longest,
            "longest_in": self.longest_in,
            "truncated": self.truncated,
            "empty": self.empty,
        }

    def table(self, title: str = "Data") -> None:
        """Print it to the terminal."""
        rows = [("rows in", f"{self.rows_in:,}"), ("rows that train", f"{self.trained:,}")]
        rows += [(f"dropped: {reason}", f"{count:,}") for reason, count in self.dropped.most_common()]
        rows += [("truncated", f"{self.truncated:,}")] if self.truncated else []
        rows += [("tokens", f"{self.tokens:,}"), ("tokens that train", f"{self.trained_tokens:,} ({self.trained_share:.1%})")]
        rows += [("longest row that trains", f"{self.longest:,} tokens"), ("longest row in", f"{self.longest_in:,} tokens")]
        terminal.table(title, ("", "count"), rows)
