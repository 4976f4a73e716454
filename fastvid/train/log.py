"""The CSV log of a run: one row every few steps, cut back to the checkpoint when the run is continued."""

import csv
import os
from pathlib import Path


class CsvLog:
    """Appends rows to `log.csv`; the first row fixes the columns.

    path:  the file; it is continued if it exists.
    after: the step that the run continues from; later rows, and a half-written last one, are dropped.
    """

    def __init__(self, path: Path, after: int = 0):
        self.path = path
        rows = _whole_rows(path, after)
        if rows:
            draft = path.with_suffix(".csv.tmp")
            with open(draft, "w", newline="") as file:
                csv.writer(file).writerows(rows)
            os.replace(draft, path)
        else:
            path.unlink(missing_ok=True)
        self.columns = rows[0] if rows else None

    def add(self, row: dict[str, float]) -> None:
        """Append one row and flush it. A column that the file does not know is an error (ValueError)."""
        with open(self.path, "a", newline="") as file:
            if self.columns is None:
                self.columns = list(row)
                csv.writer(file).writerow(self.columns)
            writer = csv.DictWriter(file, self.columns)
            writer.writerow({key: f"{value:.7g}" if isinstance(value, float) else value for key, value in row.items()})


def _whole_rows(path: Path, after: int) -> list[list[str]]:
    """The header and the rows up to step `after`; nothing if there is no such row."""
    if not path.is_file():
        return []
    text = path.read_text()
    lines = list(csv.reader(text[:text.rfind("\n") + 1].splitlines()))
    if not lines or "step" not in lines[0]:
        return []
    at, width = lines[0].index("step"), len(lines[0])
    kept = [line for line in lines[1:] if len(line) == width and line[at].isdigit() and int(line[at]) <= after]
    return [lines[0], *kept] if kept else []
