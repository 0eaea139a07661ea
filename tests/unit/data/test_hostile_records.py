"""Whatever a file of records holds: each record is a sample or a counted skip, and the work is finished."""

from __future__ import annotations

import json
import resource
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from megatron_hgpt.data.dataset import VLDataset
from megatron_hgpt.data.preprocess import Input, PreprocessOptions, preprocess
from megatron_hgpt.data.verify import verify_dataset
from megatron_hgpt.errors import DataError
from megatron_hgpt.text.tokenizer import TextTokenizer
from megatron_hgpt.text.vocabulary import Vocabulary
from megatron_hgpt.vl_health import llava_json
from megatron_hgpt.vl_health.llava_json import MAX_PICTURES, MAX_TEXT

BATCH = 25
"""Records of one example: a file of its own."""
GOOD = {"id": "good", "conversations": [{"from": "human", "value": "Is it?"}, {"from": "gpt", "value": "yes"}]}
ANSWER = "<start_index><idx_3><idx_0><idx_15><idx_7><end_index>"

texts = st.one_of(
    st.sampled_from(
        [
            "",
            " ",
            "yes",
            "<image>",
            "<image>\nWhat?",
            ANSWER,
            f"{ANSWER}x",
            "<idx_99999999999>",
            "<|end|>",
            "\0",
            "\ud800",
            "\udc80x",
            "a.png",
            "../a.png",
            "/etc/passwd",
            ".",
            "x" * 300,
            "<image>" * 300,
            "generation",
            "comprehension",
            "human",
            "gpt",
            "\ufeff",
            "‮",
            "﷽" * 50,
        ]
    ),
    st.text(max_size=20),
    st.text(alphabet=st.characters(categories=["Cs", "Co", "Cn", "Cc"]), max_size=4),
)
numbers = st.one_of(
    st.integers(), st.floats(), st.booleans(), st.none(), st.sampled_from([10**400, -(10**4000), 1e308, 2**63, 2**31])
)
values = st.recursive(
    st.one_of(texts, numbers),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(texts, inner, max_size=4)),
    max_leaves=8,
)


def mostly(usual: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.one_of(usual, usual, usual, values)


turns = mostly(
    st.fixed_dictionaries({}, optional={"from": mostly(st.sampled_from(["human", "gpt"])), "value": mostly(texts)})
)
pairs = st.tuples(mostly(texts), mostly(texts)).map(
    lambda pair: [{"from": "human", "value": pair[0]}, {"from": "gpt", "value": pair[1]}]
)
indices = st.lists(mostly(st.integers(-1, 17)), min_size=3, max_size=5)
records = mostly(
    st.fixed_dictionaries(
        {"conversations": mostly(st.one_of(pairs, st.lists(turns, max_size=4)))},
        optional={
            "id": mostly(texts),
            "image": mostly(st.one_of(st.just("a.png"), texts, st.lists(texts, max_size=3))),
            "images": values,
            "task": mostly(st.sampled_from(["generation", "comprehension"])),
            "target_image": mostly(st.sampled_from(["a.png", "bad.png"])),
            "target_indices": mostly(indices),
            "source": mostly(texts),
            "extra": values,
        },
    )
)


class FakeVQGAN:
    num_codes, num_indices = 16, 4

    def preprocess(self, image: Image.Image) -> torch.Tensor:
        return torch.zeros(3, 2, 2)

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        return images[:, 0].flatten(1).long()


@pytest.fixture(scope="module")
def run(
    tmp_path_factory: pytest.TempPathFactory, sentencepiece: TextTokenizer, vocabulary: Vocabulary
) -> Callable[..., dict[str, Any]]:
    """Preprocess one file and read the dataset back; the manifest."""
    folder = tmp_path_factory.mktemp("records")
    Image.new("RGB", (4, 4)).save(folder / "a.png")
    (folder / "bad.png").write_bytes(b"no picture")

    def make(path: Path, **options: Any) -> dict[str, Any]:
        values: dict[str, Any] = {"template": "phi3_instruct", "num_indices": 4, "num_image_tokens": 3, **options}
        settings = PreprocessOptions(max_consecutive_skips=10**9, overwrite=True, **values)
        common = {"tokenizer": sentencepiece, "vocabulary": vocabulary, "vqgan": FakeVQGAN()}
        item = Input(path=path, image_root=folder)
        manifest = preprocess([item], folder / "data", options=settings, **common)  # type: ignore[arg-type]
        assert verify_dataset(folder / "data") > 0
        hashes = {"tokenizer_hash": sentencepiece.hash, "template": "phi3_instruct"}
        dataset = VLDataset(folder / "data", vocabulary=vocabulary, **hashes)  # type: ignore[arg-type]
        assert len([dataset[i] for i in range(len(dataset))]) == manifest["counts"]["samples"]
        for line in (folder / "data" / "skipped.jsonl").read_text(encoding="utf-8").splitlines():
            assert json.loads(line).keys() <= {"id", "file", "record", "reason", "detail", "text"}
        manifest["all"] = manifest["counts"]["samples"] + sum(manifest["skipped"].values())
        return manifest

    make.folder = folder  # type: ignore[attr-defined]
    return make


def fuzz(run: Any, num_records: int) -> Counter[str]:
    """`num_records` of chance, in files of `BATCH` behind a good one; samples and skips by reason."""
    outcomes: Counter[str] = Counter()

    @settings(
        max_examples=num_records // BATCH,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.lists(records, min_size=BATCH, max_size=BATCH), st.sampled_from([".json", ".jsonl"]), st.booleans())
    def try_one(drawn: list[Any], ending: str, list_text: bool) -> None:
        path = run.folder / f"records{ending}"
        items = [json.dumps(record) for record in [GOOD, *drawn]]
        path.write_text(f"[{','.join(items)}]" if ending == ".json" else "\n".join(items))
        manifest = run(path, list_text=list_text)
        assert manifest["all"] == 1 + BATCH
        outcomes.update(manifest["skipped"])
        outcomes["samples"] += manifest["counts"]["samples"] - 1

    try_one()
    return outcomes


def test_records_of_chance(run: Any) -> None:
    outcomes = fuzz(run, 250)
    assert len(outcomes) > 5 and sum(outcomes.values()) >= 250


@pytest.mark.slow
def test_three_thousand_records_of_chance(run: Any, capsys: pytest.CaptureFixture[str]) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    outcomes = fuzz(run, 3000)
    risen = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    with capsys.disabled():
        sys.stdout.write(f"\n{sum(outcomes.values())} records: {dict(outcomes)}; peak memory rose by {risen:.0f} MiB\n")
    assert sum(outcomes.values()) >= 3000 and risen < 300


def record(**changes: Any) -> str:
    return json.dumps({**GOOD, **changes})


def said(value: str, number: int = 1) -> str:
    return record(conversations=[{"from": "human", "value": value}, {"from": "gpt", "value": "yes"}] * number)


DEEP = "[" * 100_000 + "]" * 100_000
SPECIAL = {
    "malformed_record": [
        DEEP,
        record(id={"a": 1}),
        f'{{"id": {"9" * 5000}}}',
        "null",
        "[]",
        "3",
        '"text"',
        record(source=["a"]),
        record(task=[1]),
        record(id="\ud800"),
        said("\ud800"),
        record(id="x" * 20_000),
        record(conversations=7),
        record(image=7, images=["a"]),
        record(conversations=[{"from": "human", "value": 1}]),
        f'{{"id": {DEEP}}}',
        record(id=""),
        record(image=["\0"]),
        '{"id": "' + "[" * 1000 + '", "conversations": null}',
        record(image=[[["a.png"]]]),
        record(target_image={"b": 1}),
    ],
    "bad_role_order": [
        record(conversations=[{"from": {"a": []}, "value": "x"}]),
        record(conversations=[{"from": ["human"], "value": "x"}]),
    ],
    "text_too_long": [said("x" * (MAX_TEXT + 1)), said("x" * 1000, 2000)],
    "too_many_images": [record(image=["a.png"] * (MAX_PICTURES + 1))],
    "bad_indices": [record(target_indices=[10**400] * 4), record(target_indices=[[1]] * 4)],
    "image_count_mismatch": [said("<image>" * 100_000)],
    "missing_image": [record(image="x" * 100_000), record(image="\ud800.png")],
}


@pytest.mark.parametrize("ending", [".json", ".jsonl"])
def test_each_special_record_is_one_skip(run: Any, ending: str) -> None:
    path = run.folder / f"special{ending}"
    items = [record(), *(item for items in SPECIAL.values() for item in items), record(id="last")]
    path.write_text(f"[{','.join(items)}]" if ending == ".json" else "\n".join(items))
    manifest = run(path, list_text=True)
    assert manifest["skipped"] == {reason: len(items) for reason, items in SPECIAL.items()}
    assert manifest["counts"]["samples"] == 2
    assert max(map(len, (run.folder / "data" / "skipped.jsonl").read_text().splitlines())) < 1000


def test_a_line_of_any_length_is_one_skip(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llava_json, "_MAX_LINE", 500)
    path = run.folder / "long.jsonl"
    path.write_bytes(b"\n".join([record().encode(), b"x" * 500, b"x" * 12_345, b"\xff\xfe{", record(id="b").encode()]))
    manifest = run(path)
    assert (manifest["skipped"], manifest["counts"]["samples"]) == ({"malformed_record": 3}, 2)


def test_names_of_files_may_be_any_bytes(run: Any) -> None:
    """A name that is not UTF-8 once failed in finish(), after all the work."""
    path = Path(f"{run.folder}/\udcff\udcfe.jsonl")
    path.write_text(f"{json.dumps({'conversations': GOOD['conversations']})}\n{record(id=[])}")
    manifest = run(path)
    assert manifest["creation"]["inputs"] == [{"file": "\\udcff\\udcfe.jsonl", "source": "\\udcff\\udcfe"}]


def test_broken_json_stays_an_error(run: Any) -> None:
    for content in (f"[{DEEP}", f'{{"a": {DEEP}}}', f"{DEEP}]", "[1,", "[]", ""):
        (run.folder / "broken.json").write_text(content)
        with pytest.raises(DataError, match=r"is not JSON|no usable sample"):
            run(run.folder / "broken.json")


def test_rows_of_parquet(run: Any) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow.parquet import write_table

    good = json.dumps(GOOD["conversations"])
    picture = (run.folder / "a.png").read_bytes()
    rows: list[tuple[Any, Any, Any]] = [
        ([], ["a"], good.encode()),
        ([picture], ["b"], good.replace("Is it?", "<image>").encode()),
        ([b""], None, good.encode()),
        ([b"no picture"], ["c"], good.replace("Is it?", "<image>").encode()),
        ([None], [None], good.encode()),
        (None, None, None),
        ([], ["d"], b"\xff\xfe"),
        ([], ["\ud800".encode("utf-8", "surrogatepass")], good.encode()),
        ([], ["e"], DEEP.encode()),
        ([], ["x" * 20_000], good.encode()),
        ([picture] * 300, ["f"], good.encode()),
    ]
    columns = {
        "images": pyarrow.array([row[0] for row in rows], pyarrow.list_(pyarrow.binary())),
        "image_ids": pyarrow.array([row[1] for row in rows], pyarrow.list_(pyarrow.binary())),
        "conversations": pyarrow.array([row[2] for row in rows], pyarrow.binary()).view(pyarrow.string()),
    }
    ids = columns["image_ids"]
    columns["image_ids"] = pyarrow.ListArray.from_arrays(
        ids.offsets, ids.values.view(pyarrow.string()), mask=ids.is_null()
    )
    write_table(pyarrow.table(columns), run.folder / "rows.parquet")
    manifest = run(run.folder / "rows.parquet")
    assert (manifest["all"], manifest["counts"]["samples"]) == (len(rows), 2)
    assert manifest["skipped"] == {"malformed_record": 7, "too_many_images": 1, "unreadable_image": 1}
