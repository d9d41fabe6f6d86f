"""What every benchmark shares: questions with their pictures and truth, the rows of official files, and which row of answers belongs to which question.

A row is an object of a JSON list, a line of JSON lines (whatever the file's extension: POPE's .json are lines), or one member of an object of objects;
its `where` names it in errors. Gives up: files larger than memory.
"""

import dataclasses
import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path

from neva_jax.data.conversation import PLACEHOLDER
from neva_jax.data.record import shown
from neva_jax.errors import DataError

log = logging.getLogger(__name__)

SHORT = "Answer the question using a single word or phrase."
LETTER = "Answer with the option's letter from the given choices directly."
TEXT_FIELDS = ("text", "answer", "prediction", "caption")
ID_FIELDS = ("question_id", "questionId", "image_id", "id")


@dataclasses.dataclass(frozen=True)
class Question:
    """id: the benchmark's, a text or a number; text: what is asked, without tags of pictures; images: for each picture the names it may have in its folder.

    truth: what the scorer compares an answer with, None where nobody tells; aliases: other ids under which answers to it may be filed; group: a split, a
    category or a type to sum by; where: the words that name it in an error.
    """

    id: str | int
    text: str
    images: tuple[tuple[str, ...], ...] = ()
    truth: object = None
    aliases: tuple[str | int, ...] = ()
    group: str = ""
    where: str = ""


@dataclasses.dataclass(frozen=True)
class Row:
    where: str
    fields: Mapping

    def get(self, name: str, kind=str, *, default=...):
        """One field, of type `kind`. Raises DataError where it is missing (unless there is a default) or of another type."""
        value = self.fields.get(name, default)
        if value is ...:
            raise DataError(f"{self.where}: has no {name!r}; found {', '.join(self.fields) or 'nothing'}")
        if value is not default and (not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool)):
            kinds = " or ".join(NAMES[k] for k in (kind if isinstance(kind, tuple) else (kind,)))
            raise DataError(f"{self.where}: {name!r} is {shown(value)}, expected {kinds}")
        return value

    def id(self, name: str = "question_id") -> str | int:
        return self.get(name, (str, int))


NAMES = {str: "a text", int: "a whole number", list: "a list", dict: "an object", type(None): "null", bool: "true or false"}


# ---- files ---------------------------------------------------------------------------------------------------------------------------------------------


def read_text(path: str | Path) -> str:
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 at byte {error.start}; expected JSON in UTF-8") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None


def read_json(path: str | Path):
    """The value of a JSON file, and the numbers of its lines where it is JSON lines, whose value is a list (else None)."""
    text = read_text(path)
    try:
        return json.loads(text), None
    except (ValueError, RecursionError) as error:
        problem = error
    numbered = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not numbered:
        raise DataError(f"{path}: is empty, expected JSON")
    values = []
    for number, line in numbered:
        try:
            values.append(json.loads(line))
        except (ValueError, RecursionError) as error:
            if not values:  # its first line is no value, so it is one broken JSON value rather than lines
                raise DataError(f"{path}: not valid JSON ({problem})") from None
            raise DataError(f"{path}: line {number} is not valid JSON ({error})") from None
    return values, [number for number, _ in numbered]


def rows(path: str | Path, *keys: str) -> list[Row]:
    """The rows of a file. keys: fields of a JSON object that may hold them ("data"). Raises DataError unless there is at least one."""
    value, numbers = read_json(path)
    key = next((key for key in keys if isinstance(value, dict) and key in value), None)
    return rows_of(path if key is None else f"{path}: {key}", value if key is None else value[key], numbers)


def rows_of(path, value, numbers: list[int] | None = None) -> list[Row]:
    """Rows of a list of objects, or of an object of objects, which get their names as `id`. numbers: lines' numbers, for errors; else records count from 0."""
    if isinstance(value, dict) and value and all(isinstance(member, dict) for member in value.values()):
        return [Row(f"{path}: record {name!r}", {"id": name} | member) for name, member in value.items()]
    if isinstance(value, dict) and value:
        value, numbers = [value], [1]
    if not isinstance(value, list) or not value:
        raise DataError(f"{path}: found {shown(value)}, expected a list of objects, at least one")
    found = []
    for i, member in enumerate(value):
        where = f"{path}: line {numbers[i]}" if numbers else f"{path}: record {i}"
        if not isinstance(member, dict):
            raise DataError(f"{where}: found {shown(member)}, expected an object")
        found.append(Row(where, member))
    return found


def by_id(found: list[Row], name: str = "question_id") -> dict[str, Row]:
    """{id as text: row}. Raises DataError where two rows have one id."""
    index: dict[str, Row] = {}
    for row in found:
        if (other := index.setdefault(str(row.id(name)), row)) is not row:
            raise DataError(f"{row.where}: has the {name} of another row ({other.where}); ids must differ")
    return index


# ---- answers -------------------------------------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Given:
    """One answer of a file. prompt: what was asked, "" where the file does not say; field: the name that the file gives the answer."""

    id: str
    text: str
    prompt: str = ""
    field: str = "text"
    where: str = ""


def read_answers(path: str | Path) -> list[Given]:
    """LLaVA's lines {question_id, prompt, text, ...}, a server's list of {question_id, answer}, {questionId, prediction} or {image_id, caption}, or the
    {outputs: {id: text}} that LLaVA's ScienceQA script leaves."""
    value, numbers = read_json(path)
    if isinstance(value, dict) and isinstance(value.get("outputs"), dict):
        value = [{"question_id": name, "text": text} for name, text in value["outputs"].items()]
    return [given_of(row) for row in rows_of(path, value, numbers)]


def given_of(row: Row) -> Given:
    names = [[name for name in fields if name in row.fields] for fields in (ID_FIELDS, TEXT_FIELDS)]
    for found, fields in zip(names, (ID_FIELDS, TEXT_FIELDS), strict=True):
        if not found:
            raise DataError(f"{row.where}: has none of {', '.join(fields)}; found {', '.join(row.fields) or 'nothing'}")
    (id_name, *_), (text_name, *_) = names
    return Given(str(row.id(id_name)), row.get(text_name), row.get("prompt", default=""), text_name, row.where)


def bare(prompt: str) -> str:
    """A prompt as the question that it asks: without tags and the suffixes that LLaVA's prompts end with, in lower case."""
    return " ".join(prompt.replace(PLACEHOLDER, " ").replace(SHORT, " ").replace(LETTER, " ").lower().split())


def matched(
    questions: list[Question], given: list[Given], path, *, asked: Callable[[str], str] = bare, extra: bool = False, repeated: bool = False,
    may_lack: Callable[[Question], bool] = lambda question: False,
) -> list[Given | None]:  # fmt: skip
    """The answer to each question: by id and prompt, or by id alone where one question has it. None: there is none, and it may lack one.

    asked: prompt -> question, for comparison. extra: answers to questions that are not there are left out; repeated: of several answers to one question the
    last counts. Both with a warning; else, and where an answer is lacking, DataError.
    """
    full, short = _places(questions, asked)
    answers: list[Given | None] = [None] * len(questions)
    num_unknown = 0
    for one in given:
        places = (full.get((one.id, asked(one.prompt))) if one.prompt else None) or short.get(one.id)
        if not places and not extra:
            raise DataError(f"{one.where}: answers question {one.id!r}, which is not among the {len(questions)} questions; score it with its own questions")
        if not places:
            num_unknown += 1
            continue
        if len({asked(questions[i].text) for i in places}) > 1:
            raise DataError(f"{one.where}: {len(places)} questions have the id {one.id!r}, and its prompt ({shown(one.prompt)}) is none of theirs")
        place = next((i for i in places if answers[i] is None), places[-1])
        if answers[place] is not None and not repeated:
            raise DataError(f"{one.where}: a second answer to question {one.id!r}, after {answers[place].where}; keep one")
        answers[place] = one
    lacking = [question for question, answer in zip(questions, answers, strict=True) if answer is None]
    refused = [question for question in lacking if not may_lack(question)]
    if refused:
        raise DataError(f"{path}: lacks {len(refused)} of {len(questions)} answers, the first to question {refused[0].id!r} ({refused[0].where}); "
                        "answer them all, or count them as wrong with --missing_as_wrong")  # fmt: skip
    _warn(path, num_unknown, len(given) - num_unknown - (len(answers) - len(lacking)), lacking)
    return answers


def _places(questions: list[Question], asked) -> tuple[dict, dict]:
    """{(id, question): indices}, {id: indices}; an alias is an id where no question has it as its own."""
    full, short, other = {}, {}, {}
    for i, question in enumerate(questions):
        for name in dict.fromkeys(map(str, (question.id, *question.aliases))):
            full.setdefault((name, asked(question.text)), []).append(i)
            (short if name == str(question.id) else other).setdefault(name, []).append(i)
    return full, other | short


def _warn(path, num_unknown: int, num_repeated: int, lacking: list[Question]) -> None:
    for count, what in ((num_unknown, "to other questions are left out"), (num_repeated, "take the place of earlier ones to the same question")):
        if count:
            log.warning(f"{path}: {count} answers {what}")
    if lacking:
        log.warning(f"{path}: {len(lacking)} questions have no answer, the first is {lacking[0].id!r}")
