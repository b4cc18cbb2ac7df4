"""Text-to-SQL rows made from a seed, so that the first run needs neither network nor files.

Six small tables share a closed vocabulary; five kinds of question are asked about them, the columns listed in
any order. A query belongs to the training, validation or test split by a hash of its SQL, so no held-out query
is ever an answer in training.
`sql` and `sql-pipe` ask the same questions; the second answers them in pipe syntax (FROM first, one step a pipe).
"""

import hashlib
import random
from collections.abc import Callable
from dataclasses import dataclass

from trainer.nearest import nearest

SPLIT_ROWS = {"train": 10000, "valid": 256, "test": 256}

TABLES = {
    "staff": ("name", "city", "age", "salary"),
    "players": ("name", "team", "age", "score"),
    "songs": ("title", "genre", "year", "length"),
    "books": ("title", "country", "year", "price"),
    "shops": ("city", "country", "size", "price"),
    "cars": ("brand", "color", "year", "price"),
}
WORDS = {
    "name": ("Anna", "Ben", "Clara", "David", "Emma", "Felix", "Grace", "Henry"),
    "city": ("Berlin", "Cairo", "Delhi", "Lima", "Oslo", "Paris", "Rome", "Tokyo"),
    "team": ("Bears", "Eagles", "Lions", "Sharks", "Tigers", "Wolves"),
    "title": ("Dawn", "Echo", "Harbor", "Island", "Mirror", "River", "Shadow", "Winter"),
    "genre": ("drama", "comedy", "history", "jazz", "mystery", "rock"),
    "country": ("Brazil", "Canada", "Egypt", "France", "India", "Japan", "Kenya", "Spain"),
    "brand": ("Atlas", "Comet", "Delta", "Falcon", "Nova", "Orion"),
    "color": ("black", "blue", "green", "red", "silver", "white"),
}
NUMBERS = tuple(str(number) for number in range(10, 100, 5))


@dataclass(frozen=True)
class Query:
    """What is asked: `select` (a column or an aggregate of one) of the rows of `table` where `column op value`."""

    table: str
    select: str
    column: str
    op: str
    value: str
    order: str = ""


def plain_sql(query: Query) -> str:
    """`SELECT … FROM … WHERE … [ORDER BY …]`."""
    order = f" ORDER BY {query.order}" if query.order else ""
    return f"SELECT {query.select} FROM {query.table} WHERE {query.column} {query.op} {query.value}{order}"


def pipe_sql(query: Query) -> str:
    """The same query as a chain of steps, in the order in which they happen."""
    order = f" |> ORDER BY {query.order}" if query.order else ""
    return f"FROM {query.table} |> WHERE {query.column} {query.op} {query.value}{order} |> SELECT {query.select}"


DIALECTS: dict[str, Callable[[Query], str]] = {"sql": plain_sql, "sql-pipe": pipe_sql}


def synthetic_rows(name: str, split: str, seed: int) -> list[dict[str, str]]:
    """The rows of `synthetic:NAME`, as `{"prompt": …, "completion": …}`.

    Args:
        name: "sql" or "sql-pipe".
        split: "train" (10000 rows), "valid" or "test" (256 each). No query of one split occurs in another.
        seed: Chooses the rows; the split a query belongs to does not depend on it.

    Raises:
        ValueError: The name or the split is unknown; the text has the nearest known one.
    """
    if name not in DIALECTS:
        near = nearest(name, DIALECTS)
        hint = f" Did you mean synthetic:{near}?" if near else ""
        raise ValueError(f"Unknown data set synthetic:{name}; known: {', '.join(DIALECTS)}.{hint}")
    if split not in SPLIT_ROWS:
        raise ValueError(f"synthetic:{name} has no split {split!r}; allowed: {', '.join(SPLIT_ROWS)}.")
    chooser = random.Random(f"sql/{split}/{seed}")
    rows: dict[str, str] = {}
    while len(rows) < SPLIT_ROWS[split]:
        question, query = _ask(chooser)
        if _split_of(query) == split:
            columns = chooser.sample(TABLES[query.table], len(TABLES[query.table]))
            prompt = f"table: {query.table}\ncolumns: {', '.join(columns)}\nQ: {question}\nA:"
            rows[prompt] = " " + DIALECTS[name](query)
    return [{"prompt": prompt, "completion": completion} for prompt, completion in rows.items()]


def _ask(chooser: random.Random) -> tuple[str, Query]:
    """One question in words and the query that answers it."""
    table = chooser.choice(sorted(TABLES))
    words = [column for column in TABLES[table] if column in WORDS]
    numbers = [column for column in TABLES[table] if column not in WORDS]
    select, column = chooser.sample(words, 2)
    number, order = chooser.choice(numbers), chooser.choice(numbers)
    value, limit = chooser.choice(WORDS[column]), chooser.choice(NUMBERS)
    named = Query(table, select, column, "=", f"'{value}'")
    kinds = (
        (f"what is the {select} where {column} is {value} ?", named),
        (f"how many {table} have {column} {value} ?", Query(table, "COUNT(*)", column, "=", f"'{value}'")),
        (f"which {select} has {number} above {limit} ?", Query(table, select, number, ">", limit)),
        (f"what is the highest {number} for {column} {value} ?",
         Query(table, f"MAX({number})", column, "=", f"'{value}'")),
        (f"list {select} by {order} where {column} is not {value} ?",
         Query(table, select, column, "!=", f"'{value}'", order)),
    )
    return chooser.choice(kinds)


def _split_of(query: Query) -> str:
    """5 % of all queries each for validation and test."""
    part = hashlib.sha256(plain_sql(query).encode()).digest()[0] % 20
    return {0: "valid", 1: "test"}.get(part, "train")
