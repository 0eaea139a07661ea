"""Records in VL-Health's JSON schema (LLaVA style) to `Sample`s.

    {"id": "…", "image": "path" or ["path", …], "conversations": [{"from": "human" | "gpt", "value": "…"}, …]}

`image` may be absent; each image needs its `<image>` in a human turn. A record is a generation sample when it has
``"task": "generation"`` or the image to draw, given in one of three ways (no generation file of VL-Health is public):

    (a) the last answer holds `<start_index><idx_5>…<end_index>`
    (b) "target_indices": [5, …]
    (c) "target_image": "path", encoded by the VQGAN while preprocessing

Paths are relative to an image root and may not leave it.
"""

from __future__ import annotations

import json
import os
import re
import reprlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from megatron_hgpt.errors import DataError, SkipSample
from megatron_hgpt.samples import Sample, Task, Turn
from megatron_hgpt.text.templates import check_image_count

_ROLES = {"human": "user", "gpt": "assistant"}
_FIELDS = {"id", "image", "images", "conversations", "task", "target_indices", "target_image", "source"}
"""Fields that become something else than metadata."""
_INDEX_ANSWER = re.compile(r"(.*?)<start_index>\s*((?:<idx_\d{1,9}>\s*)+)<end_index>\s*", re.DOTALL)
_INDEX = re.compile(r"<idx_(\d+)>")
_ANY_IMAGE_TOKEN = re.compile(r"<start_index>|<end_index>|<idx_\d+>")
_STRUCTURE = re.compile(r'"(?:[^"\\]|\\.)*+"|[\[\]{},]', re.DOTALL)

MAX_TEXT = 1 << 20
"""Characters of all turns of a record: what is more fits no model, and takes memory to tokenise."""
MAX_PICTURES = 256
"""Pictures of a record."""
MAX_NAME = 10_000
"""Characters of an id or a source (a parquet row's id joins those of its pictures)."""
_MAX_LINE = 1 << 24
"""Characters of a line of .jsonl."""
_QUOTE = reprlib.Repr()
_QUOTE.maxlevel, _QUOTE.maxstring = 2, 80


def read_records(path: Path) -> Iterator[Any]:
    """Raw records of a `.json` (one list) or `.jsonl` file, in order; one that cannot be parsed comes as its text.

    Raises:
        DataError: no such file, or a `.json` file that is not a list.
    """
    if not path.is_file():
        raise DataError(f"{path} does not exist; give a .json, .jsonl or .parquet file")
    if path.suffix == ".jsonl":
        with path.open(encoding="utf-8", errors="replace") as stream:
            for line in _lines(stream):
                if line.strip():
                    yield parse_or_text(line)
        return
    try:
        text = path.read_text(encoding="utf-8")
        records = _items(text)
    except ValueError as error:
        raise DataError(f"{path} is not JSON ({error}); one record per line needs the ending .jsonl") from error
    if not isinstance(records, list):
        raise DataError(f"{path} holds a {type(records).__name__}, not a list of records")
    yield from records


def parse_or_text(text: str) -> Any:
    """The JSON value, or the text itself where it is none that Python can hold."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):  # a number of 5,000 digits is a ValueError, deep nesting the other
        return text


def _lines(stream: TextIO) -> Iterator[str]:
    """Lines of which at most `_MAX_LINE` characters are ever in memory: the rest of a longer one is passed over."""
    while line := stream.readline(_MAX_LINE):
        rest = line
        while len(rest) == _MAX_LINE and not rest.endswith("\n"):
            rest = stream.readline(_MAX_LINE)
        yield line


def _items(text: str) -> Any:
    """The content of a `.json` file; where one item cannot be parsed, the list of the others with that item's text.

    Raises:
        ValueError: not JSON.
    """
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        raise
    except (ValueError, RecursionError):
        return [parse_or_text(text[start:end]) for start, end in _spans(text)]


def _spans(text: str) -> list[tuple[int, int]]:
    """Where the items of a JSON list start and end, found by its brackets, commas and strings alone.

    Raises:
        ValueError: these do not fit together.
    """
    spans, depth, start = [], 0, 0
    for match in _STRUCTURE.finditer(text):
        mark = match[0]
        if mark in "[{":
            depth += 1
            start = match.end() if depth == 1 else start
        elif mark in "]}," and depth == 1:
            spans.append((start, match.start()))
            start = match.end()
        depth -= mark in "]}"
    if depth or not text.lstrip().startswith("["):
        raise ValueError("brackets do not fit together")
    return spans


def parse_record(
    record: Any,
    image_root: Path,
    *,
    num_codes: int | None = None,
    num_indices: int | None = None,
    default_id: str = "",
    source: str = "",
) -> Sample:
    """One record as a sample; pictures are not opened.

    Args:
        record: what `read_records` gave.
        image_root: folder that image paths are relative to.
        num_codes: codebook entries; None leaves the indices unchecked.
        num_indices: indices of one image; None leaves their number unchecked.
        default_id: id of a record without one.
        source: name of the data source of a record without ``"source"``.

    Raises:
        SkipSample: ``malformed_record``, ``bad_role_order``, ``no_assistant_turn``, ``empty_answer``,
            ``image_count_mismatch``, ``path_escape``, ``missing_image``, ``bad_indices``, ``text_too_long``,
            ``too_many_images``.
    """
    require_record(record)
    name = _name(record, "id", default_id)
    turns = _turns(record.get("conversations"))
    pictures = input_pictures(record)
    if len(pictures) > MAX_PICTURES:
        raise SkipSample("too_many_images", f"{len(pictures)} images; a record may have {MAX_PICTURES}")
    images = [resolve_picture(item, image_root) for item in pictures]
    indices = _indices(record, turns, num_codes=num_codes, num_indices=num_indices)
    target = record.get("target_image")
    task = _task(record, has_target=indices is not None or target is not None)
    if task is Task.GENERATION and indices is None and target is None:
        raise SkipSample("bad_indices", "a generation record without image indices and without target_image")
    answers = [turn for turn in turns if turn.role == "assistant"]
    for answer in answers[: -1 if task is Task.GENERATION else None]:
        if not answer.text.strip():
            raise SkipSample("empty_answer", "an answer is empty")
    check_image_count(turns, len(images))
    return Sample(
        sample_id=name,
        task=task,
        turns=turns,
        images=images,
        target_image=resolve_picture(target, image_root) if indices is None and target is not None else None,
        target_indices=indices,
        source=_name(record, "source", source),
        metadata={key: value for key, value in record.items() if key not in _FIELDS},
    )


def require_record(record: Any) -> None:
    """Refuse what is no JSON object.

    Raises:
        SkipSample: ``malformed_record``.
    """
    if not isinstance(record, dict):
        raise SkipSample("malformed_record", f"a {type(record).__name__}, not a JSON object", quote(record))


def record_id(record: Any, default: str) -> str:
    """The record's own id as text; the default for a record without one that can be used."""
    try:
        return _name(record, "id", default) if isinstance(record, dict) else default
    except SkipSample:
        return default


def quote(value: Any) -> str:
    """A few words of a record for a message, whatever it is."""
    return _QUOTE.repr(value)


def _name(record: dict[str, Any], field: str, default: str) -> str:
    """Text or a number that names something; the default where there is none."""
    value = record.get(field)
    if value is None:
        return default
    text = str(value) if isinstance(value, (str, int, float)) else ""
    if not text or len(text) > MAX_NAME or not _is_unicode(text):
        raise SkipSample("malformed_record", f"{field} is no text of 1 to {MAX_NAME} characters", quote(value))
    return text


def _is_unicode(text: str) -> bool:
    """Whether UTF-8 can hold it: JSON's escapes can write halves of a character (lone surrogates), which it cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _turns(conversations: Any) -> list[Turn]:
    if not isinstance(conversations, list) or not conversations:
        raise SkipSample("malformed_record", "conversations is not a list of turns")
    turns, room = [], MAX_TEXT
    for entry in conversations:
        if not isinstance(entry, dict) or not isinstance(entry.get("value"), str):
            raise SkipSample("malformed_record", "a turn has no text value", quote(entry))
        role, text = entry.get("from"), entry["value"]
        if not isinstance(role, str) or role not in _ROLES:
            raise SkipSample("bad_role_order", "a turn is from neither human nor gpt", quote(role))
        if not _is_unicode(text):
            raise SkipSample("malformed_record", "the text of a turn is not valid Unicode", quote(text))
        room -= len(text) + 1
        if room < 0:
            raise SkipSample("text_too_long", f"more than {MAX_TEXT} characters in all turns")
        turns.append(Turn(role=_ROLES[role], text=text))
    roles = [turn.role for turn in turns]
    if "assistant" not in roles:
        raise SkipSample("no_assistant_turn", "nothing to learn: no turn is from gpt")
    if roles != ["user", "assistant"] * (len(roles) // 2):
        shown = f"{', '.join(roles[:8])}{', …' if len(roles) > 8 else ''}"
        raise SkipSample("bad_role_order", f"human and gpt do not alternate: {shown}")
    return turns


def input_pictures(record: dict[str, Any]) -> list[Any]:
    """What a record names as its pictures, for `resolve_picture`; the one to draw is not among them."""
    value = record.get("image", record.get("images"))
    if value is None:
        return []
    return value if isinstance(value, list) else [value]


def _task(record: dict[str, Any], *, has_target: bool) -> Task:
    name = record.get("task")
    if name is None:
        return Task.GENERATION if has_target else Task.COMPREHENSION
    known = isinstance(name, str) and name in {task.value for task in Task}
    if not known or (has_target and name != Task.GENERATION.value):
        detail = "task does not go with an image to draw" if known else "task is unknown"
        raise SkipSample("malformed_record", detail, quote(name))
    return Task(name)


def resolve_picture(item: Any, image_root: Path) -> Path | bytes:
    """A path under the root, or the encoded bytes (parquet).

    Raises:
        SkipSample: ``malformed_record``, ``path_escape`` (absolute, or out of the root), ``missing_image``.
    """
    if isinstance(item, bytes) and item:
        return item
    if not isinstance(item, str) or not item or "\0" in item:
        raise SkipSample("malformed_record", "an image is not a path", quote(item))
    root = os.path.abspath(image_root)
    path = os.path.normpath(os.path.join(root, item))
    # Links below the root are the user's own; only what the record says is checked.
    if os.path.commonpath((root, path)) != root:
        raise SkipSample("path_escape", "an image is outside of the image root", quote(item))
    if not os.path.isfile(path):
        raise SkipSample("missing_image", "an image does not exist under the image root", quote(item))
    return Path(path)


def _indices(
    record: dict[str, Any], turns: list[Turn], *, num_codes: int | None, num_indices: int | None
) -> list[int] | None:
    """The indices of the image to draw, from the last answer (they are removed from its text) or from the field."""
    for turn in turns[:-1]:
        if turn.role == "assistant" and _ANY_IMAGE_TOKEN.search(turn.text):
            raise SkipSample("bad_indices", "image indices in an answer that is not the last one")
    found: list[int] | None = None
    if _ANY_IMAGE_TOKEN.search(turns[-1].text):
        match = _INDEX_ANSWER.fullmatch(turns[-1].text)
        if match is None or _ANY_IMAGE_TOKEN.search(match[1]):
            raise SkipSample("bad_indices", "the answer is not <start_index><idx_…>…<end_index>")
        turns[-1].text = match[1]
        found = [int(index) for index in _INDEX.findall(match[2])]
    listed = record.get("target_indices")
    if listed is not None:
        if not isinstance(listed, list) or any(type(index) is not int for index in listed):
            raise SkipSample("bad_indices", "target_indices is not a list of integers")
        if found is not None and found != listed:
            raise SkipSample("bad_indices", "target_indices and the indices of the answer differ")
        found = listed
    if found is None:
        return None
    if num_indices is not None and len(found) != num_indices:
        raise SkipSample("bad_indices", f"{len(found)} indices, an image has {num_indices}")
    outside = [index for index in found if index < 0 or (num_codes is not None and index >= num_codes)]
    if outside:
        raise SkipSample("bad_indices", f"an index is outside the codebook (entries: {num_codes})", quote(outside[0]))
    return found
