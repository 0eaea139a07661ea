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
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_hgpt.errors import DataError, SkipSample
from megatron_hgpt.samples import Sample, Task, Turn
from megatron_hgpt.text.templates import check_image_count

_ROLES = {"human": "user", "gpt": "assistant"}
_FIELDS = {"id", "image", "images", "conversations", "task", "target_indices", "target_image", "source"}
"""Fields that become something else than metadata."""
_INDEX_ANSWER = re.compile(r"(.*?)<start_index>\s*((?:<idx_\d{1,9}>\s*)+)<end_index>\s*", re.DOTALL)
_INDEX = re.compile(r"<idx_(\d+)>")
_ANY_IMAGE_TOKEN = re.compile(r"<start_index>|<end_index>|<idx_\d+>")


def read_records(path: Path) -> Iterator[Any]:
    """Raw records of a `.json` (one list) or `.jsonl` file, in order; a line that is no JSON comes as its text.

    Raises:
        DataError: no such file, or a `.json` file that is not a list.
    """
    if not path.is_file():
        raise DataError(f"{path} does not exist; give a .json, .jsonl or .parquet file")
    if path.suffix == ".jsonl":
        with path.open(encoding="utf-8", errors="replace") as stream:
            for line in stream:
                if line.strip():
                    yield _parse_line(line)
        return
    try:
        records = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{path} is not JSON ({error}); one record per line needs the ending .jsonl") from error
    if not isinstance(records, list):
        raise DataError(f"{path} holds a {type(records).__name__}, not a list of records")
    yield from records


def _parse_line(line: str) -> Any:
    try:
        return json.loads(line)
    except ValueError:
        return line


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
            ``image_count_mismatch``, ``path_escape``, ``missing_image``, ``bad_indices``.
    """
    if not isinstance(record, dict):
        raise SkipSample("malformed_record", f"expected a JSON object, got {str(record)[:80]!r}")
    turns = _turns(record.get("conversations"))
    images = [resolve_picture(item, image_root) for item in input_pictures(record)]
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
        sample_id=record_id(record, default_id),
        task=task,
        turns=turns,
        images=images,
        target_image=resolve_picture(target, image_root) if indices is None and target is not None else None,
        target_indices=indices,
        source=str(record.get("source", source)),
        metadata={key: value for key, value in record.items() if key not in _FIELDS},
    )


def record_id(record: Any, default: str) -> str:
    """The record's own id as text; the default for a record without one."""
    own = record.get("id") if isinstance(record, dict) else None
    return default if own is None else str(own)


def _turns(conversations: Any) -> list[Turn]:
    if not isinstance(conversations, list) or not conversations:
        raise SkipSample("malformed_record", "conversations is not a list of turns")
    turns = []
    for entry in conversations:
        if not isinstance(entry, dict) or not isinstance(entry.get("value"), str):
            raise SkipSample("malformed_record", f"turn {str(entry)[:80]!r} has no text value")
        if entry.get("from") not in _ROLES:
            raise SkipSample("bad_role_order", f"a turn is from {entry.get('from')!r}; human or gpt is expected")
        turns.append(Turn(role=_ROLES[entry["from"]], text=entry["value"]))
    roles = [turn.role for turn in turns]
    if "assistant" not in roles:
        raise SkipSample("no_assistant_turn", "nothing to learn: no turn is from gpt")
    if roles != ["user", "assistant"] * (len(roles) // 2):
        raise SkipSample("bad_role_order", f"human and gpt do not alternate: {', '.join(roles)}")
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
    if name not in {task.value for task in Task} or (has_target and name != Task.GENERATION.value):
        raise SkipSample("malformed_record", f"task {name!r} {'with an image to draw' if has_target else 'is unknown'}")
    return Task(name)


def resolve_picture(item: Any, image_root: Path) -> Path | bytes:
    """A path under the root, or the encoded bytes (parquet).

    Raises:
        SkipSample: ``malformed_record``, ``path_escape`` (absolute, or out of the root), ``missing_image``.
    """
    if isinstance(item, bytes) and item:
        return item
    if not isinstance(item, str) or not item or "\0" in item:
        raise SkipSample("malformed_record", f"image {str(item)[:80]!r} is not a path")
    root = os.path.abspath(image_root)
    path = os.path.normpath(os.path.join(root, item))
    # Links below the root are the user's own; only what the record says is checked.
    if os.path.commonpath((root, path)) != root:
        raise SkipSample("path_escape", f"image {item!r} is outside of the image root")
    if not os.path.isfile(path):
        raise SkipSample("missing_image", f"image {item!r} does not exist under the image root")
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
        raise SkipSample("bad_indices", f"index {outside[0]} is outside the codebook (entries: {num_codes})")
    return found
